"""Compiled kernels on a device: loading, launching, and the tensor maps that tell the copy engine about a tensor."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from ctypes import addressof
from dataclasses import dataclass
from functools import cache, lru_cache
from threading import Lock, get_native_id
from typing import Any

import torch
from cuda.bindings import driver

from attnbench.impls.flash_cuda.build import build
from attnbench.impls.flash_cuda.configs import SHARED_BYTES

_Arguments = ctypes.c_char_p * 1
_SUCCESS = driver.CUresult.CUDA_SUCCESS


class LaunchError(RuntimeError):
    """The driver refused a kernel, a launch or a tensor map."""


class OutOfMemoryError(LaunchError, torch.OutOfMemoryError):
    """It refused for want of device memory: to whoever asks, as when torch's allocator has none."""


def call(what: str, function: Any, *arguments: Any) -> Any:
    """The value of a driver call, or LaunchError naming what was attempted.

    A thread has no context until the runtime gives it one, which autograd's threads may not have met: then, once more.
    """
    answer = function(*arguments)
    if answer[0] == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        bind_context(torch.cuda.current_device())
        answer = function(*arguments)
    if answer[0] != _SUCCESS:
        _, name = driver.cuGetErrorName(answer[0])
        short = answer[0] == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        raise (OutOfMemoryError if short else LaunchError)(f"{what}: {name.decode()}")
    return answer[1] if len(answer) > 1 else None


def bind_context(device: int) -> None:
    """Give this thread the context that torch and the runtime use on a device."""
    (status,) = driver.cuCtxSetCurrent(_primary_context(device))
    if status != driver.CUresult.CUDA_SUCCESS:
        raise LaunchError(f"binding the context of device {device}: {status.name}")


@cache
def _primary_context(device: int) -> Any:
    return call(f"the context of device {device}", driver.cuDevicePrimaryCtxRetain, driver.CUdevice(device))


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel ready to launch on the device that `load` was called for."""

    function: Any

    def launch(self, grid: int, threads: int, params: bytes, stream: int, shared: int = SHARED_BYTES) -> None:
        """One asynchronous launch on a stream of the current device; params is the one argument, by value."""
        pointers = _Arguments(params)
        at = addressof(pointers)
        answer = driver.cuLaunchKernel(self.function, grid, 1, 1, threads, 1, 1, shared, stream, at, 0)
        if answer[0] != _SUCCESS:  # it launched nothing
            call(
                "kernel launch", driver.cuLaunchKernel,
                self.function, grid, 1, 1, threads, 1, 1, shared, stream, at, 0,
            )  # fmt: skip


@cache
def load(source: str, name: str, device: int, shared: int = SHARED_BYTES) -> Kernel:
    """The kernel `name` of a generated source, compiled if need be, on a device."""
    kernel = call(f"kernel {name}", driver.cuLibraryGetKernel, _library(source), name.encode())
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    call("shared memory", driver.cuKernelSetAttribute, attribute, shared, kernel, driver.CUdevice(device))
    return Kernel(driver.CUfunction(int(kernel)))


@cache
def _library(source: str) -> Any:
    cubin = build(source).cubin
    return call("loading a kernel", driver.cuLibraryLoadData, cubin, [], [], 0, [], [], 0)


@lru_cache(maxsize=64)
def multiprocessors(device: int) -> int:
    """How many multiprocessors a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


TICKETS = 512
TICKET_BYTES = 128
"""Tickets lie in cache lines of their own."""

_PER_THREAD = int(driver.CU_STREAM_PER_THREAD)
_NON_BLOCKING = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
_unused_tickets: dict[int, list[int]] = defaultdict(list)
_issuing = Lock()


def ticket(device: int, stream: int) -> int:
    """Address of a zero from which the blocks of one launch on the current device draw tiles; they leave it at zero.

    It is one at every launch: it begins as one, a launch that ends draws until the counter has wrapped to it, and one
    that does not end (a fault, a kill) takes the context with it, its memory and all later launches.

    Launches of one stream follow one another and share it; as in torch's allocator, a handle means one stream, but for
    that of the per-thread default streams. Captured launches may be replayed side by side: each has one, which nobody
    else is given before it is launched.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device).data_ptr()
    if stream == _PER_THREAD:
        # get_ident is soon another thread's, while what this one launched may still run
        return _ticket_of_stream(device, stream, get_native_id())
    return _ticket_of_stream(device, stream)


@cache
def _ticket_of_stream(device: int, stream: int, thread: int | None = None) -> int:
    with _issuing:
        if _unused_tickets[device]:
            return _unused_tickets[device].pop()
    first = _zeros(TICKETS * TICKET_BYTES)  # waits for the device: not while other threads wait for the lock
    with _issuing:
        _unused_tickets[device] += range(first, first + TICKETS * TICKET_BYTES, TICKET_BYTES)
        return _unused_tickets[device].pop()


def _zeros(size: int) -> int:
    """Address of memory for good. Not torch's, whose pools may be a graph's that is about to be captured.

    Nothing but the zeroing is waited for: a collective under way may need a launch that this thread has yet to make.
    """
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = call("allowing captures", driver.cuThreadExchangeStreamCaptureMode, relaxed)  # by other threads
    try:
        address = _memory(size)
        stream = call("zeros for tickets", driver.cuStreamCreate, _NON_BLOCKING)
        call("zeros for tickets", driver.cuMemsetD32Async, address, 0, size // 4, stream)
        call("zeros for tickets", driver.cuStreamSynchronize, stream)
        call("zeros for tickets", driver.cuStreamDestroy, stream)
    finally:
        call("allowing captures", driver.cuThreadExchangeStreamCaptureMode, before)
    return address


def _memory(size: int) -> int:
    """Address of device memory, which torch gives up where its cache holds all."""
    try:
        return int(call("memory for tickets", driver.cuMemAlloc, size))
    except OutOfMemoryError:
        torch.cuda.empty_cache()
        return int(call("memory for tickets", driver.cuMemAlloc, size))


_DATA_TYPES = {
    torch.float16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    torch.bfloat16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
}
REMEMBERED_MAPS = 16384
"""Of all plans together, some 6 MB. A model's training step needs up to 11 a layer."""


@dataclass(frozen=True, eq=False)
class TensorMap:
    """Tensor maps of one layout; the latest of all layouts are remembered.

    sizes and box in elements, innermost first; strides in bytes, of all dimensions but the innermost, multiples of 16.
    Tiles are swizzled in rows of 128 bytes; what lies outside the tensor reads as 0.
    """

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    @lru_cache(maxsize=REMEMBERED_MAPS)  # noqa: B019 - bounds what plans that are gone leave behind, too
    def at(self, address: int) -> bytes:
        """The 128 bytes of the map of a tensor that begins at a 16-byte aligned address."""
        return self._encode(address)

    def _encode(self, address: int) -> bytes:
        encoded = call(
            f"tensor map of {self.sizes}, strides {self.strides}, box {self.box}",
            driver.cuTensorMapEncodeTiled,
            _DATA_TYPES[self.dtype],
            len(self.sizes),
            address,
            [driver.cuuint64_t(size) for size in self.sizes],
            [driver.cuuint64_t(stride) for stride in self.strides],
            [driver.cuuint32_t(extent) for extent in self.box],
            [driver.cuuint32_t(1)] * len(self.sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        return ctypes.string_at(encoded.getPtr(), 128)


REMEMBERED_SETS = 4096
"""Of all plans together, some 4 MB. A model's training step needs up to 3 a layer."""


@dataclass(frozen=True, eq=False)
class TensorMaps:
    """The maps of several tensors, one after the other, as the arguments of a kernel begin."""

    maps: tuple[TensorMap, ...]

    @lru_cache(maxsize=REMEMBERED_SETS)  # noqa: B019 - as above
    def at(self, *addresses: int) -> bytes:
        """The maps of tensors that begin at these addresses."""
        return b"".join([known.at(address) for known, address in zip(self.maps, addresses, strict=True)])
