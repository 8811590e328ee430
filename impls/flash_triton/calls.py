"""Kernel calls that are settled but for addresses, and repeat without Triton's Python.

From the arguments of a launch, about fifty, Triton derives each time which compiled kernel they mean and checks tensor
descriptors anew: 20 to 30 us a kernel on the host of an H200. Between two calls with the same layouts only addresses
differ, so the first goes through Triton, and the others hand the compiled kernel what it was compiled for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Address:
    """An argument that is the address of a tensor, by the tensor's name."""

    tensor: str


@dataclass(frozen=True)
class Tiles:
    """An argument that is a descriptor of a tensor's tiles: the tensor's name and what a descriptor says of it."""

    tensor: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    make: Callable[[Tensor], Any]


class Launcher:
    """The C function that Triton built to launch one kernel, without what Triton's Python does around it.

    That Python encodes every tensor descriptor anew, 3 us each; here an encoding is kept for the address it was made
    for, and says nothing but address, shape and strides. The C function is no public name of Triton, and what it is
    told changes between versions: with one that `KNOWN` does not name, launches go the long way.
    """

    def __init__(
        self,
        compiled: CompiledKernel,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        addresses: Mapping[str, int],
    ) -> None:
        """arguments: of the launch that it repeats, constants too; addresses: of its tensors."""
        run = compiled.run
        launch = run.launch
        tiles = [a for a in arguments if isinstance(a, Tiles)]
        if tiles:
            inside = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
            launch = inside["launcher"].cell_contents
        if run.global_scratch_size or run.profile_scratch_size:
            raise ValueError("needs scratch memory")
        self.launch = launch
        metadata = getattr(compiled.metadata, "tensordesc_meta", None) or ()
        encoders = iter([_encoder(t, m) for t, m in zip(tiles, metadata, strict=True)])
        # Grid, stream, function, cooperative, dependent launch, two scratch areas, metadata; what hooks would be told;
        # hooks.
        told = [
            *grid, 0, compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
            compiled.packed_metadata, None, None, None,
        ]  # fmt: skip
        self.stream = len(grid)
        self.addresses: list[tuple[int, str]] = []
        self.tiles: list[tuple[slice, str, dict[int, list[Any]], Callable[[int], list[Any]]]] = []
        for argument in arguments:
            if isinstance(argument, Tiles):
                encode = next(encoders)
                encoded = encode(addresses[argument.tensor])
                place = slice(len(told), len(told) + len(encoded))
                self.tiles.append((place, argument.tensor, {}, encode))
                told += encoded
            else:
                if isinstance(argument, Address):
                    self.addresses.append((len(told), argument.tensor))
                told.append(argument)
        self.told = told

    def __call__(self, stream: int, addresses: Mapping[str, int]) -> bool:
        """Launch with tensors at these addresses; False where it was compiled for others, and did not.

        Those are multiples of 16, as Triton compiles for where it sees them.
        """
        told = self.told.copy()
        told[self.stream] = stream
        low_bits = 0
        for i, name in self.addresses:
            told[i] = address = addresses[name]
            low_bits |= address
        if low_bits & 15:
            return False
        for place, name, known, encode in self.tiles:
            address = addresses[name]
            encoded = known.get(address)
            if encoded is None:
                if len(known) >= ENCODINGS_KEPT:
                    known.clear()
                encoded = known[address] = encode(address)
            told[place] = encoded
        self.launch(*told)
        return True


KNOWN = triton.__version__.startswith("3.6.")
"""Whether this Triton's C function is the one that is known: 3.9 has another, and would read wrong arguments."""

ENCODINGS_KEPT = 64
"""Of each descriptor, the encodings that are kept: an allocator reuses few addresses for tensors of one shape."""


def _encoder(tiles: Tiles, metadata: Any) -> Callable[[int], list[Any]]:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return lambda address: make_tensordesc_arg(Placed(address, tiles.shape, tiles.strides), metadata)


class Placed:
    """What Triton's encoder reads of a tensor descriptor, checked when the first one was made."""

    padding = "zero"

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.address, self.shape, self.strides = address, shape, strides
        self.base = self

    def data_ptr(self) -> int:
        return self.address


class Call:
    """One launch of `kernel`: arguments in order, numbers and `Address` and `Tiles`; constants and options by name."""

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.arguments, self.constants, self.options = list(arguments), constants, options
        self.launcher: Launcher | None = None

    def __call__(self, tensors: Mapping[str, Tensor], addresses: Mapping[str, int], stream: int) -> None:
        """Launch on a stream of the current device; addresses are those of the tensors."""
        assert self.launcher is not None, "the first launch goes through Triton"
        if not self.launcher(stream, addresses):
            self.through_triton(tensors)

    def first(self, tensors: Mapping[str, Tensor]) -> None:
        """Launch through Triton, and keep what it made of the call."""
        compiled = self.through_triton(tensors)
        addresses = {name: x.data_ptr() for name, x in tensors.items()}
        aligned = all(addresses[a.tensor] % 16 == 0 for a in self.arguments if isinstance(a, Address))
        if (
            KNOWN and self.launcher is None and aligned and isinstance(compiled, CompiledKernel)
        ):  # the interpreter has none
            constants = [self.constants[name] for name in self.kernel.arg_names[len(self.arguments) :]]
            with suppress(AttributeError, KeyError, ValueError):
                self.launcher = Launcher(compiled, self.grid, [*self.arguments, *constants], addresses)

    def through_triton(self, tensors: Mapping[str, Tensor]) -> Any:
        """Launch on the current stream of the current device, as any kernel of Triton's is launched."""
        arguments = [
            tensors[a.tensor] if isinstance(a, Address) else a.make(tensors[a.tensor]) if isinstance(a, Tiles) else a
            for a in self.arguments
        ]  # fmt: skip
        return self.kernel[self.grid](*arguments, **self.constants, **self.options)


def launch(calls: Sequence[Call], tensors: Mapping[str, Tensor]) -> None:
    """All calls in order on the current stream of the current device, by the tensors' names."""
    if knobs.runtime.launch_enter_hook.calls or any(call.launcher is None for call in calls):
        for call in calls:
            call.first(tensors)
        return
    addresses = {name: x.data_ptr() for name, x in tensors.items()}
    active = driver.active
    stream = active.get_current_stream(active.get_current_device())
    for call in calls:
        call(tensors, addresses, stream)
