"""The Gluon kernels on a CPU: their own source, with tiles that are torch tensors and a thread for each partition.

What is asynchronous happens as late as the program allows: a product reads its operands when it is waited for, the copy
engine shared memory when its stores are waited for. A buffer that is written too early then gives a wrong result, a
tile that is used before its wait is an error, and so is a barrier that never opens. Layouts, fences and registers are
not modelled; a layout that does not fit is the compiler's to refuse.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnbench.impls.flash_triton import kernels
from attnbench.impls.flash_triton.calls import Address, Call, Tiles

FOLDER = Path(kernels.__file__).parent
of_thread = threading.local()


class Tile(Tensor):
    """A tile in registers. Layouts are not modelled, and all are None."""

    type = SimpleNamespace(layout=None)


class Memory:
    """Shared memory: a torch tensor, and views of it."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def index(self, i: Any) -> Memory:
        return Memory(self.data[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        return Memory(self.data.narrow(dim, int(start), length))

    def reshape(self, shape: Sequence[int]) -> Memory:
        return Memory(self.data.view(list(shape)))

    def permute(self, order: Sequence[int]) -> Memory:
        return Memory(self.data.permute(order))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone().as_subclass(Tile)

    def store(self, tile: Tensor) -> None:
        assert isinstance(tile, Tensor), "stored before its wait"
        assert tile.shape == self.data.shape
        self.data.copy_(tile)


class Partitions:
    """How many run, and how many of these wait at barriers: when all do, none will ever open."""

    def __init__(self) -> None:
        self.changed, self.running, self.waiting, self.over = threading.Condition(), 0, 0, False

    def wait(self) -> None:
        """For any barrier to open; the lock is held."""
        self.waiting += 1
        assert self.waiting < self.running, "a barrier never opens"
        self.changed.wait()
        assert not self.over, "another partition has failed"

    def wake(self) -> None:
        """All that wait; the lock is held."""
        self.waiting = 0
        self.changed.notify_all()

    def leave(self, failed: bool) -> None:
        """One partition has ended: those that wait see whether they are all that is left."""
        with self.changed:
            self.running -= 1
            self.over |= failed
            self.wake()


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all announced bytes have landed."""

    def __init__(self, partitions: Partitions) -> None:
        self.partitions, self.phase, self.count, self.missing, self.bytes = partitions, 0, 0, 0, 0

    def arrive(self, count: int = 0, announced: int = 0, landed: int = 0) -> None:
        with self.partitions.changed:
            self.missing -= count
            self.bytes += announced - landed
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.partitions.wake()

    def wait(self, parity: int) -> None:
        """Until the phase of this parity has ended: at first the one before phase 0 has."""
        with self.partitions.changed:
            while self.phase % 2 == parity:
                self.partitions.wait()


class Barriers:
    """An array of them, or the first of it."""

    def __init__(self, count: int, partitions: Partitions) -> None:
        self.all = [Barrier(partitions) for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.all[0], name)


class Product:
    """A product that is under way."""

    def __init__(self, a: Any, b: Memory, start: Any, use_acc: bool) -> None:
        self.a, self.b, self.start, self.use_acc, self.result = a, b, start, use_acc, None

    def finish(self) -> None:
        a = self.a.data if isinstance(self.a, Memory) else self.a
        start = self.start.result if isinstance(self.start, Product) else self.start
        product = (a.float() @ self.b.data.float()).as_subclass(Tile)
        assert product.shape == start.shape
        self.result = start + product if self.use_acc else product


class Descriptor:
    """The copy engine's view of a tensor: tiles beyond its end read as zeros and are not written."""

    def __init__(self, tensor: Tensor, block: Sequence[int]) -> None:
        self.tensor, self.layout, self.dtype = tensor, None, tensor.dtype
        nbytes = torch.Size(block).numel() * tensor.element_size()
        self.block, self.block_type = tuple(block), SimpleNamespace(nbytes=nbytes)

    def tile(self, place: Sequence[Any], shape: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
        assert tuple(shape) == self.block, (shape, self.block)
        view = self.tensor
        for dim, (start, length) in enumerate(zip(place, shape, strict=True)):
            here = max(0, min(length, view.shape[dim] - int(start)))
            view = view.narrow(dim, int(start) if here else 0, here)
        return view, tuple(slice(0, n) for n in view.shape)


class Pointer:
    """The address of an element of a tensor."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + by)


def full(shape: Sequence[int], value: Any, dtype: torch.dtype, layout: Any) -> Tensor:
    return torch.full(list(shape), value, dtype=dtype).as_subclass(Tile)


def decorator(function: Any = None, **_: Any) -> Any:
    return function if function is not None else lambda f: f


def load_async(desc: Descriptor, place: Sequence[Any], barrier: Any, memory: Memory) -> None:
    source, inside = desc.tile(place, memory.shape)
    memory.data.zero_()
    memory.data[inside] = source
    barrier.arrive(landed=desc.block_type.nbytes)


def later(act: Callable[[Tensor, Tensor], Any]) -> Callable[[Descriptor, Sequence[Any], Memory], None]:
    """A store of the copy engine that reads shared memory when it is waited for."""

    def start(desc: Descriptor, place: Sequence[Any], memory: Memory) -> None:
        target, inside = desc.tile(place, memory.shape)
        of_thread.stores.append(lambda: act(target, memory.data[inside]))

    return start


def store_wait(pending: int) -> None:
    while len(of_thread.stores) > pending:
        of_thread.stores.pop(0)()


def mma(a: Any, b: Memory, start: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    assert not isinstance(a, Product), "an operand is used before its wait"
    of_thread.products.append(Product(a, b, start, use_acc))
    return of_thread.products[-1]


def mma_wait(pending: int, deps: Sequence[Any]) -> Any:
    while len(of_thread.products) > pending:
        of_thread.products.pop(0).finish()
    done = [x.result if isinstance(x, Product) else x for x in deps]
    assert all(x is not None for x in done), "waited for too few products"
    return done[0] if len(done) == 1 else tuple(done)


WORD = 0xFFFFFFFF


def inline_asm(asm: str, _constraints: str, args: Sequence[Any], **_: Any) -> Any:
    """The kernels' instructions in PTX, each by what it begins with; 32-bit words stand in int64."""
    return next(act for name, act in INSTRUCTIONS.items() if name in asm)(asm, *args)


def masked(asm: str, x: Tensor, place: Tensor, first: Tensor, *second: Tensor) -> Tensor:
    """The masks: `keep_between` and `mask_scores`."""
    inside = place >= first if "setp.ge.s32 inside, $2, $3" in asm else place <= first
    if second:
        assert "setp.le.and.s32 inside, $2, $4, inside" in asm
        inside &= place <= second[0]
    return torch.where(inside, x, float("-inf") if "0fFF800000" in asm else 0.0)


def wide_product(_asm: str, a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    product = (a & WORD) * b  # modulo 2**64, which leaves both words right
    return product >> 32 & WORD, product & WORD


def majority(asm: str, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    assert "0xE8" in asm
    return (a & b | a & c | b & c) & WORD


def byte_masked(asm: str, x: Tensor, first: Tensor, *rest: Any) -> Tensor:
    """x without the bits of a mask that PRMT makes of the signs of bytes."""
    assert "lop3.b32 $0, $1, gone, 0, 0x30" in asm
    second, selector = rest if len(rest) == 2 else (0, *rest)
    both = torch.stack([first & WORD, torch.zeros_like(first) + second], -1)
    gone = torch.zeros_like(first)
    for i in range(4):
        chosen = torch.as_tensor(selector) >> 4 * i & 15
        assert (chosen >= 8).all(), "a byte itself, not its sign"
        word = both.gather(-1, (chosen >> 2 & 1).expand(first.shape)[..., None])[..., 0]
        gone |= (word >> 8 * (chosen & 3) + 7 & 1) * 0xFF << 8 * i
    if x.is_floating_point():
        assert ((gone == 0) | (gone == WORD)).all()
        return x.masked_fill(gone != 0, 0)
    return x & ~gone


INSTRUCTIONS = {"setp": masked, "mul.wide.u32": wide_product, "prmt": byte_masked, "lop3": majority}


def pack_pairs(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous().view(torch.int32).to(torch.int64) & WORD


def unpack_pairs(pairs: Tensor, dtype: torch.dtype, _layout: Any) -> Tensor:
    return (pairs - (pairs >> 31 << 32)).to(torch.int32).view(dtype)


class Scalar(int):
    """An integer of a kernel, which has the methods of a tile."""

    def to(self, _dtype: Any) -> Scalar:
        return self


def _scalar(operation: str) -> Callable[..., Any]:
    def apply(self: int, *other: Any) -> Any:
        found = getattr(int, operation)(self, *other)
        return Scalar(found) if isinstance(found, int) else found

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "and", "xor", "rshift", "neg"):
    setattr(Scalar, f"__{_name}__", _scalar(f"__{_name}__"))


def elementwise(operation: Callable[..., Tensor]) -> Callable[..., Any]:
    """Of tiles and scalars; of scalars alone a scalar."""

    def apply(*operands: Any) -> Any:
        found = operation(*(torch.as_tensor(x) for x in operands))
        return found if any(isinstance(x, Tensor) for x in operands) else Scalar(found)

    return apply


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Scalar:
    return Scalar(pointer.tensor.view(-1)[pointer.offset] if mask else other)


def store(pointer: Pointer, tile: Tensor, mask: Tensor) -> None:
    pointer.tensor.view(-1)[pointer.offset[mask]] = tile[mask]


def atomic_add(pointer: Pointer, x: Any, sem: str) -> Any:
    """The value before, of a scalar."""
    if isinstance(x, Tensor):
        return pointer.tensor.view(-1).index_add_(0, pointer.offset, x)
    before = load(pointer)
    pointer.tensor.view(-1)[pointer.offset] += x
    return before


def reduction(reduce: Callable[..., Tensor]) -> Callable[[Tensor, int], Any]:
    """Along a dimension; the only one gives a scalar."""

    def apply(x: Tensor, dim: int) -> Any:
        found = reduce(x, dim)
        return found if found.dim() else Scalar(found)

    return apply


class Machine:
    """One program at a time of a kernel's grid."""

    def __init__(self) -> None:
        self.partitions = Partitions()
        self.modules: dict[str, SimpleNamespace] = {}
        self.program, self.programs = 0, 1
        both = {
            "constexpr": lambda x: x, "program_id": lambda _: Scalar(self.program), "static_range": range,
            "minimum": elementwise(torch.minimum), "maximum": elementwise(torch.maximum),
            "where": elementwise(torch.where), "cdiv": lambda a, b: Scalar((a + b - 1) // b),
            "load": load, "int64": torch.int64, "float32": torch.float32, "int32": torch.int32, "uint32": torch.int64,
            "float16": torch.float16, "exp2": torch.exp2, "abs": torch.abs, "math": torch, "store": store,
            "max": reduction(torch.amax), "sum": reduction(torch.sum),
        }  # fmt: skip
        language = SimpleNamespace(
            **both, NVMMADistributedLayout=layout_of, DotOperandLayout=layout_of, SliceLayout=layout_of,
            NVMMASharedLayout=SimpleNamespace(get_default_for=layout_of), allocate_shared_memory=self.allocate,
            full=full, zeros=lambda shape, dtype, layout: full(shape, 0, dtype, layout),
            arange=lambda a, b, layout: torch.arange(a, b).as_subclass(Tile), num_programs=lambda _: self.programs,
            DistributedLinearLayout=layout_of, BlockedLayout=layout_of, SwizzledSharedLayout=layout_of,
            num_warps=lambda: 4, full_like=torch.full_like, join=lambda a, b: torch.stack([a, b], -1),
            atomic_add=atomic_add,
            reshape=lambda x, shape: x.reshape(shape), permute=lambda x, order: x.permute(order),
            split=lambda x: (x[..., 0], x[..., 1]), convert_layout=lambda x, layout, assert_trivial=False: x,
            inline_asm_elementwise=inline_asm, warp_specialize=self.specialize, static_assert=lambda _: None,
        )  # fmt: skip
        barrier = SimpleNamespace(
            MBarrierLayout=lambda: "barrier", init=self.init_barrier, wait=lambda b, phase: b.wait(int(phase)),
            arrive=lambda b, count: b.arrive(count), expect=lambda b, nbytes: b.arrive(1, announced=nbytes),
        )  # fmt: skip
        hopper = SimpleNamespace(
            fence_async_shared=lambda: None, mbarrier=barrier, warpgroup_mma=mma, warpgroup_mma_wait=mma_wait
        )
        gluon = SimpleNamespace(jit=decorator, constexpr_function=decorator, language=language)
        triton = SimpleNamespace(jit=decorator, language=SimpleNamespace(**both))
        self.known = {
            "triton": triton, "triton.language": triton, "triton.experimental": SimpleNamespace(gluon=gluon),
            "triton.experimental.gluon": gluon, "triton.experimental.gluon.language.nvidia.hopper": hopper,
        }  # fmt: skip
        self.modules["hopper_pairs"] = SimpleNamespace(pack_pairs=pack_pairs, unpack_pairs=unpack_pairs)
        self.modules["hopper_tma"] = SimpleNamespace(
            load_async=load_async,
            store_async=later(Tensor.copy_),
            add_async=later(Tensor.add_),
            store_wait=store_wait,
        )

    def module(self, name: str) -> SimpleNamespace:
        """A module of the kernels, with this machine in the place of Triton."""
        if name not in self.modules:
            scope = {"__name__": name, "__builtins__": {**vars(builtins), "__import__": self.find}}
            exec(compile((FOLDER / f"{name}.py").read_text(), FOLDER / f"{name}.py", "exec"), scope)
            self.modules[name] = SimpleNamespace(**scope)
        return self.modules[name]

    def find(self, name: str, *rest: Any) -> Any:
        if name.startswith(kernels.__name__):
            return self.module(name.rpartition(".")[2])
        return self.known[name] if name.startswith("triton") else builtins.__import__(name, *rest)

    def allocate(self, dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        """Shared memory, NaN at first, or barriers."""
        if layout == "barrier":
            return Barriers(shape[0], self.partitions)
        return Memory(torch.full(list(shape), float("nan") if dtype.is_floating_point else -1, dtype=dtype))

    def init_barrier(self, barrier: Any, count: int) -> None:
        barrier = barrier.all[0] if isinstance(barrier, Barriers) else barrier
        barrier.count = barrier.missing = count

    def specialize(self, partitions: Sequence[tuple[Any, Any]], *_: Any) -> None:
        """All partitions at once; the first error of any is raised."""
        errors: list[BaseException] = []
        together = self.partitions
        together.running, together.waiting, together.over = len(partitions), 0, False

        def run(function: Any, arguments: Any) -> None:
            of_thread.products, of_thread.stores = [], []
            try:
                with torch.no_grad():
                    function(*arguments)
                    store_wait(0)
                assert not of_thread.products, "a product that nobody waits for"
            except BaseException as error:  # noqa: BLE001 - raised below
                errors.append(error)
            together.leave(failed=bool(errors))

        threads = [threading.Thread(target=run, args=p, daemon=True) for p in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def run(self, call: Call, tensors: Mapping[str, Tensor]) -> None:
        """A launch, every program of its grid after the other."""
        arguments: list[Any] = []
        for argument in call.arguments:
            if isinstance(argument, Address):
                arguments.append(Pointer(tensors[argument.tensor]))
            elif isinstance(argument, Tiles):
                made = argument.make(tensors[argument.tensor])
                view = made.base.as_strided(made.shape, made.strides)
                arguments.append(Descriptor(view, made.block_shape))
            else:
                arguments.append(Scalar(argument) if isinstance(argument, int) else argument)
        function = call.kernel.fn
        kernel = getattr(self.module(function.__module__.rpartition(".")[2]), function.__name__)
        self.programs = call.grid[0]
        for program in range(call.grid[0]):
            self.program = program
            kernel(*arguments, **call.constants)


def layout_of(*_: Any) -> None:
    """A layout: not modelled."""
