"""Run the CUDA kernels on a CPU: the sources of `csrc` as they are, the instructions of `ptx/` emulated.

`emulating()` stands in for the driver below `flash_cuda.forward` and `.backward`, so that `flash_attention` takes CPU
tensors and everything above the driver is real. On the command line, one problem against fp64:

    python tests/impls/flash_cuda/emulator/emulate.py --seqlen-q 200 --head-dim 64 --causal --seed 3

What it can see and what it cannot: CONTRIBUTING.md, "Run a kernel change on the CPU".
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import functools
import hashlib
import inspect
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attnbench.impls.flash_api import settled
from attnbench.impls.flash_cuda import backward as backward_module
from attnbench.impls.flash_cuda import flash_attention, scope
from attnbench.impls.flash_cuda import forward as forward_module
from attnbench.impls.flash_cuda.build import CSRC
from attnbench.impls.flash_cuda.driver import SHARED_BYTES, TensorMap

EMULATOR = Path(__file__).parent
MODULES = (forward_module, backward_module)

WARNINGS = ("-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-unused-function", "-Wno-unused-variable")
COMMON_FLAGS = ("-g1", "-fPIC", "-U_FORTIFY_SOURCE", "-fcf-protection=none", *WARNINGS)
MACHINE_FLAGS = ("-std=c++20", "-O2", "-ftree-vectorize", *COMMON_FLAGS)
KERNEL_FLAGS = (
    "-std=c++17", "-O1", "-fno-strict-aliasing", "-fsanitize=thread", "-Wno-maybe-uninitialized",
    "-Wno-uninitialized", *COMMON_FLAGS,
)  # fmt: skip
"""The sanitizer's calls go to the machine, which sees every access to shared memory through them."""

TENSOR_MAP = struct.Struct("<Q5Q4Q5I3I16x")
"""emulator::TensorMap in the 128 bytes of a tensor map: base, sizes, strides, box, rank, element bytes, magic."""
TENSOR_MAP_MAGIC = 0x70414D54

KEPT_SECONDS = 7 * 24 * 3600

PARAMETERS = re.compile(r"(\w+)\(const __grid_constant__ ")


class EmulationError(RuntimeError):
    """What the machine found wrong: a race, a missing wait or fence, an address out of bounds, a deadlock."""


@functools.cache
def compiler() -> str:
    """The compiler. The machine answers what g++ asks of a sanitizer, and no other."""
    found = shutil.which("g++")
    if found is None:
        raise EmulationError("g++ compiles the kernels for the host, and is not here")
    return found


@functools.cache
def cache_folder() -> Path:
    """Where what is compiled is kept for a week, by the content of what it was compiled from: this user's folder."""
    folder = Path(tempfile.gettempdir()) / f"attnbench-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    for path in folder.iterdir():
        with suppress(OSError):  # another process may do the same
            if path.is_file() and time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink()
    return folder


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def _contents(folder: Path, *patterns: str) -> str:
    found = sorted(path for pattern in patterns for path in folder.rglob(pattern))
    return "\0".join(f"{path.relative_to(folder)}\0{path.read_text()}" for path in found)


def _run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"{command[0]} refused this kernel:\n{done.stderr[:4000]}")


def _compiled(name: str, commands: Any) -> Path:
    """The file that `commands(target)` make, made once; others may make it at the same time."""
    target = cache_folder() / name
    if target.exists():
        return target
    with (cache_folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            staged = Path(scratch) / name
            for command in commands(Path(scratch), staged):
                _run(*command)
            staged.rename(target)
    return target


@functools.cache
def machine() -> Path:
    """The library of the machine."""
    sources = sorted(path.name for path in EMULATOR.glob("*.cpp"))
    name = f"machine-{_digest(compiler(), MACHINE_FLAGS, _contents(EMULATOR, '*.cpp', '*.h'))}.so"

    def commands(scratch: Path, target: Path) -> list[list[object]]:
        whole = scratch / "machine.cpp"  # as one, which halves the time
        whole.write_text("".join(f'#include "{source}"\n' for source in sources))
        return [[compiler(), *MACHINE_FLAGS, f"-I{EMULATOR}", "-shared", whole, "-o", target]]

    return _compiled(name, commands)


@functools.cache
def library(source: str, csrc: Path) -> tuple[Path, ctypes.PyDLL]:
    """A kernel source, compiled for the host; and loaded."""
    names = PARAMETERS.findall(source)
    entries = "\n".join(f"ENTRY({name})" for name in names)
    whole = f'#include "cuda.h"\n{source}\n#include "entry.h"\n{entries}\n'
    headers = _contents(EMULATOR, "*.h", "*.cuh") + _contents(csrc, "*.cuh")
    name = f"kernel-{_digest(compiler(), KERNEL_FLAGS, machine().name, whole, headers)}.so"

    def commands(scratch: Path, target: Path) -> list[list[object]]:
        (scratch / "kernel.cpp").write_text(whole)
        includes = [f"-I{EMULATOR}", f"-I{csrc}"]
        return [
            [compiler(), *KERNEL_FLAGS, *includes, "-c", scratch / "kernel.cpp", "-o", scratch / "kernel.o"],
            [compiler(), "-shared", scratch / "kernel.o", machine(), "-Wl,-rpath,$ORIGIN", "-Wl,-z,defs", "-o", target],
        ]  # fmt: skip

    path = _compiled(name, commands)
    return path, ctypes.PyDLL(str(path))  # of which one call runs at a time


def located(text: str, path: Path) -> str:
    """Offsets {0x...} into a library, in the words of the source: the call chain there, innermost first."""
    tool = shutil.which("addr2line")
    options = ("--inlines", "--functions", "--demangle", "--pretty-print")

    def words(match: re.Match[str]) -> str:
        if tool is None:
            return match[0]
        command = [tool, *options, "--exe", str(path), match[1]]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        lines = []
        for line in found.splitlines():
            parted = re.match(r"(?: \(inlined by\) )?(.*) at (.*)", line)
            if parted is None:
                continue
            function = re.sub(r"<.*>|\(.*\)", "", parted[1])
            file, _, number = parted[2].partition(":")
            lines.append(f"{'/'.join(Path(file).parts[-2:])}:{number.split()[0]} {function}")
        return "\n      ".join(lines)

    return re.sub(r"\{(0x[0-9a-f]+)\}", words, text)


@dataclass(frozen=True, eq=False)
class EmulatedKernel:
    """Stands in for `driver.Kernel`."""

    emulation: Emulation
    name: str
    path: Path
    loaded: ctypes.PyDLL
    cluster: int

    def launch(self, grid: int, threads: int, params: bytes, stream: int, shared: int = SHARED_BYTES) -> None:
        """One launch, done when this returns. EmulationError with what is wrong, and where."""
        expected = ctypes.c_size_t.in_dll(self.loaded, f"emulated_{self.name}_bytes").value
        if len(params) != expected:
            raise EmulationError(f"{self.name}: {len(params)} bytes of parameters, declared are {expected}")
        run = self.loaded.emulator_run
        run.restype = ctypes.c_char_p
        # Shared memory that functions declare exists once: then one block after the other.
        resident = self.emulation.multiprocessors if shared else 1
        seed = self.emulation.next_seed()
        error = run(
            getattr(self.loaded, f"emulated_{self.name}"), params, grid, threads, shared, resident,
            self.cluster, ctypes.c_uint64(seed),
        )  # fmt: skip
        if error is not None:
            text = located(error.decode(), self.path)
            raise EmulationError(f"{self.name}, grid {grid}, seed {seed}: {text}")


@dataclass
class Emulation:
    """A device: its sources, how many blocks run side by side, and the seed of every order that is not settled."""

    seed: int = 0
    multiprocessors: int = 3
    csrc: Path = CSRC
    launches: int = 0
    ticket: Tensor = field(default_factory=lambda: torch.zeros(32, dtype=torch.int32))

    def next_seed(self) -> int:
        self.launches += 1
        return self.seed * 1_000_003 + self.launches

    def load(self, source: str, name: str, device: int, shared: int = SHARED_BYTES) -> EmulatedKernel:
        """Stands in for `driver.load`."""
        clusters = re.search(
            rf"__cluster_dims__\((\d+), 1, 1\) __launch_bounds__\([^)]*\)\s+{name}\(", source
        )
        return EmulatedKernel(self, name, *library(source, self.csrc), int(clusters[1]) if clusters else 1)

    def stand_ins(self) -> dict[str, Any]:
        """What takes the place of which name of `driver` and `scope`, in the modules that import it."""
        return {
            "load": self.load,
            "multiprocessors": lambda device: self.multiprocessors,
            "on_device": lambda device: nullcontext(),
            "stream_of": lambda device: 0,
            "ticket": lambda device, stream: self.ticket.data_ptr(),
        }


def encode(known: TensorMap, address: int) -> bytes:
    """Stands in for `TensorMap._encode`: what cuTensorMapEncodeTiled would be told, refused where it would refuse."""
    rank = len(known.sizes)
    sound = (
        address % 16 == 0 and len(known.strides) == rank - 1 and len(known.box) == rank and 3 <= rank <= 5
        and all(0 < size < 2**32 for size in known.sizes) and all(0 < extent <= 256 for extent in known.box)
        and all(stride % 16 == 0 and 0 < stride < 2**40 for stride in known.strides)
        and known.box[0] * known.dtype.itemsize <= 128
    )  # fmt: skip
    if not sound:
        raise EmulationError(f"tensor map of {known.sizes}, strides {known.strides}, box {known.box}")

    def filled(values: tuple[int, ...], count: int) -> tuple[int, ...]:
        return values + (0,) * (count - len(values))

    return TENSOR_MAP.pack(
        address, *filled(known.sizes, 5), *filled(known.strides, 4), *filled(known.box, 5), rank,
        known.dtype.itemsize, TENSOR_MAP_MAGIC,
    )  # fmt: skip


def _forget_plans() -> None:
    """Plans hold loaded kernels and encoded maps."""
    settled.forget()
    for module in MODULES:
        for _, value in inspect.getmembers(module, inspect.isclass):
            if value.__module__ == module.__name__:
                for name in vars(value):
                    clear = getattr(getattr(value, name), "cache_clear", None)
                    if clear is not None:
                        clear()


@contextmanager
def emulating(**options: Any) -> Iterator[Emulation]:
    """Within, `flash_attention` runs on CPU tensors; options are Emulation's. torch.empty gives NaN."""
    emulation = Emulation(**options)
    deterministic = torch.are_deterministic_algorithms_enabled()
    patches = [
        mock.patch.object(scope, "check_device", return_value=None),
        mock.patch.object(TensorMap, "_encode", encode),
    ]
    for module in MODULES:
        for name, stand_in in emulation.stand_ins().items():
            if hasattr(module, name):
                patches.append(mock.patch.object(module, name, stand_in))
    _forget_plans()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        for patch in patches:
            patch.start()
        yield emulation
    finally:
        for patch in reversed(patches):
            patch.stop()
        torch.use_deterministic_algorithms(deterministic)
        _forget_plans()


def main() -> None:
    """One problem, its errors against fp64 beside those of the same in eager torch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("batch", 1), ("heads", 2), ("kv-heads", 0), ("seqlen-q", 200), ("seqlen-k", 0), ("head-dim", 64),
        ("head-dim-v", 0), ("seed", 0), ("seeds", 1), ("multiprocessors", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--left", type=int)
    parser.add_argument("--right", type=int)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--top-left", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--backward", action="store_true")
    given = parser.parse_args()

    torch.manual_seed(0)
    seqlen_k, kv_heads = given.seqlen_k or given.seqlen_q, given.kv_heads or given.heads
    dim, dim_v = given.head_dim, given.head_dim_v or given.head_dim
    dtype = torch.float16 if given.fp16 else torch.bfloat16
    q = torch.randn(given.batch, given.seqlen_q, given.heads, dim).to(dtype)
    k = torch.randn(given.batch, seqlen_k, kv_heads, dim).to(dtype)
    v = torch.randn(given.batch, seqlen_k, kv_heads, dim_v).to(dtype)
    d_out = torch.randn(given.batch, given.seqlen_q, given.heads, dim_v).to(dtype)
    right = 0 if given.causal else given.right
    alignment = "top_left" if given.top_left else "bottom_right"

    i = torch.arange(given.seqlen_q)[:, None] + (0 if given.top_left else seqlen_k - given.seqlen_q)
    j = torch.arange(seqlen_k)[None]
    seen = torch.ones(given.seqlen_q, seqlen_k, dtype=torch.bool)
    if given.left is not None:
        seen &= j >= i - given.left
    if right is not None:
        seen &= j <= i + right

    def dense(kind: torch.dtype) -> list[Tensor]:
        a, b, c = (x.detach().to(kind).requires_grad_() for x in (q, k, v))
        group = given.heads // kv_heads
        scores = torch.einsum("bihd,bjhd->bhij", a, b.repeat_interleave(group, 2)) / math.sqrt(dim)
        p = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).masked_fill(~seen, 0.0)
        out = torch.einsum("bhij,bjhd->bihd", p, c.repeat_interleave(group, 2))
        return [out.detach(), *torch.autograd.grad(out, (a, b, c), d_out.to(kind))]

    reference, eager = dense(torch.float64), dense(dtype)
    for seed in range(given.seed, given.seed + given.seeds):
        with emulating(seed=seed, multiprocessors=given.multiprocessors):
            a, b, c = (x.detach().requires_grad_(given.backward) for x in (q, k, v))
            out = flash_attention(a, b, c, window=(given.left, right), alignment=alignment)
            assert isinstance(out, Tensor)
            got = [out.detach()]
            if given.backward:
                got += torch.autograd.grad(out, (a, b, c), d_out)
        for name, x, right_one, near in zip(("out", "dq", "dk", "dv"), got, reference, eager, strict=False):
            error, usual = ((y.double() - right_one).abs().max().item() for y in (x, near))
            print(f"seed {seed}  {name}: error {error:.3g}, of eager {usual:.3g}")


if __name__ == "__main__":
    sys.exit(main())
