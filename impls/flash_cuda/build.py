"""CUDA source to machine code: NVRTC, and a cache on disk that many processes may share.

A kernel is a few generated lines that include `csrc/` and name one configuration. Its cache folder holds the source
(`kernel.cu`), the machine code (`kernel.cubin`), its digest and the compiler's log (`kernel.log`), and is named after
what decides the outcome: the source, `csrc`, the options and the release of NVRTC. It appears by one rename; what does
not match its digest all the same is built anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

CSRC = Path(__file__).parent / "csrc"
ARCHITECTURE = "sm_90a"
OPTIONS = (
    f"--gpu-architecture={ARCHITECTURE}",
    "--std=c++17",
    "--ptxas-options=-v",
)
CACHE_VARIABLE = "ATTNBENCH_CUDA_CACHE"
OPTIONS_VARIABLE = "ATTNBENCH_CUDA_OPTIONS"
"""Further options for NVRTC, separated by spaces: with -DWATCHDOG a wait that never ends gives up, and the result is
wrong."""


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message holds the source and the compiler's log."""


class CacheError(OSError):
    """The cache of compiled kernels cannot be read or written; the message names it, and the variable that moves it."""


@dataclass(frozen=True)
class Built:
    """One compiled kernel. folder: where source, machine code and log lie."""

    folder: Path

    @property
    def complete(self) -> bool:
        """Whether the machine code is there and as it was written: a crash may leave files empty."""
        try:
            wanted = (self.folder / "cubin.sha256").read_text()
            return hashlib.sha256(self.cubin).hexdigest() == wanted and (self.folder / "kernel.log").exists()
        except (FileNotFoundError, NotADirectoryError):
            return False

    @property
    def cubin(self) -> bytes:
        return (self.folder / "kernel.cubin").read_bytes()

    @property
    def log(self) -> str:
        return (self.folder / "kernel.log").read_text()

    @property
    def resources(self) -> Resources:
        """What the assembler reported."""
        return Resources.of_log(self.log)


@dataclass(frozen=True)
class Resources:
    """The assembler's report of one source. warnings: its remarks C7501 to C7599, all of which cost speed: ignored
    setmaxnreg, serialised products."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    warnings: tuple[str, ...]

    @staticmethod
    def of_log(log: str) -> Resources:
        """Parse `ptxas -v`: the most registers, and the sums, of all kernels in it. ValueError if there is none."""
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
        )
        used = re.findall(r"Used (\d+) registers", log)
        if not frames or not used:
            raise ValueError(f"no ptxas report in the compiler's log:\n{log}")
        stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
        return Resources(
            max(map(int, used)), stack, stores, loads, tuple(re.findall(r".*\(C75\d\d\).*", log))
        )

    @property
    def problems(self) -> list[str]:
        """One line for each thing that no kernel here may have; empty if none."""
        found = [
            f"{count} bytes of {what}"
            for count, what in (
                (self.stack_bytes, "stack frame"),
                (self.spill_store_bytes, "spill stores"),
                (self.spill_load_bytes, "spill loads"),
            )
            if count
        ]
        return found + [line.strip() for line in self.warnings]


def cache_folder() -> Path:
    """$ATTNBENCH_CUDA_CACHE, or attnbench/cuda in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnbench" / "cuda"


def build(source: str, options: tuple[str, ...] = ()) -> Built:
    """Machine code of `source`, from the cache or from NVRTC.

    CompileError if NVRTC refuses it; CacheError if the cache cannot be read or written.
    """
    options = _all_options(options)
    built = _entry(source, options)
    cache = built.folder.parent
    with _cache_errors(cache):
        if built.complete:
            return built
        cache.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
    try:
        cubin, log = compile_source(source, options)
        with _cache_errors(cache):
            staged.chmod(0o755)  # others may share the cache, and mkdtemp is for one user
            (staged / "kernel.cu").write_text(source)
            (staged / "kernel.cubin").write_bytes(cubin)
            (staged / "kernel.log").write_text(log)
            (staged / "cubin.sha256").write_text(hashlib.sha256(cubin).hexdigest())
            _publish(staged, built)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return built


def cached(source: str, options: tuple[str, ...] = ()) -> bool:
    """Whether ``build`` would find it in the cache; CacheError if that cannot be read."""
    built = _entry(source, _all_options(options))
    with _cache_errors(built.folder.parent):
        return built.complete


def _all_options(options: tuple[str, ...]) -> tuple[str, ...]:
    return (*OPTIONS, *options, *os.environ.get(OPTIONS_VARIABLE, "").split())


def _entry(source: str, options: tuple[str, ...]) -> Built:
    return Built(cache_folder() / _key(source, options))


def _publish(staged: Path, built: Built) -> None:
    try:
        staged.rename(built.folder)
    except OSError:
        if built.complete:  # another process was first
            return
        damaged = Path(tempfile.mkdtemp(prefix="damaged-", dir=built.folder.parent))
        try:
            built.folder.rename(damaged / "entry")
            staged.rename(built.folder)
        except OSError:
            if not built.complete:  # another process mended it
                raise
        finally:
            shutil.rmtree(damaged, ignore_errors=True)


@contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"${CACHE_VARIABLE}: cannot keep compiled kernels in {cache}: {error}; name a folder that you can write to"
        ) from error


def compile_source(source: str, options: tuple[str, ...], kind: str = "CUBIN") -> tuple[bytes, str]:
    """(code, log) of NVRTC; kind is CUBIN or PTX."""
    from cuda.bindings import nvrtc

    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    try:
        arguments = [*options, f"--include-path={CSRC}"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), [a.encode() for a in arguments])
        log = _text(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode()
        log = log.rstrip("\0\n") + "\n"
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC {_version()} refused this kernel:\n{source}\n{log}")
        size, get = getattr(nvrtc, f"nvrtcGet{kind}Size"), getattr(nvrtc, f"nvrtcGet{kind}")
        return _text(nvrtc, size, get, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _key(source: str, options: tuple[str, ...]) -> str:
    parts = (source, *options, _release(), _csrc_digest())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _csrc_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(CSRC.rglob("*.cuh")):
        digest.update(str(path.relative_to(CSRC)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _release() -> str:
    """NVRTC's version, and its package's, which counts patches too."""
    found = [".".join(map(str, _version()))]
    for package in ("nvidia-cuda-nvrtc", f"nvidia-cuda-nvrtc-cu{_version()[0]}"):
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


@lru_cache(maxsize=1)
def _version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    _checked(nvrtc, (status, major))
    return major, minor


def _text(nvrtc: Any, size: Any, get: Any, program: Any) -> bytes:
    length = _checked(nvrtc, size(program))
    # NVRTC writes into it. Python shares all bytes objects of one byte, so an empty log would write into everybody's.
    text = bytes(max(2, length))
    (status,) = get(program, text)
    _checked(nvrtc, (status, None))
    return text[:length]


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    status, value = answer[0], answer[1]
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return value
