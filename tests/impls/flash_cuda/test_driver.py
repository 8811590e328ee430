"""Calls of the driver, with a stand-in for it: contexts of threads, and the counters that launches draw from."""
# ruff: noqa: N802 - the driver's own names

import subprocess
import sys
import threading
import weakref
from collections import defaultdict

import pytest
import torch
from cuda.bindings import driver as real

from attnbench.impls.flash_cuda import driver

SUCCESS = real.CUresult.CUDA_SUCCESS


class Driver:
    """As much of the driver as `call` meets: a context for each thread, and launches that need one."""

    CUresult, CUdevice, CUstreamCaptureMode = real.CUresult, real.CUdevice, real.CUstreamCaptureMode
    PRIVATE = 77

    def __init__(self) -> None:
        self.thread = threading.local()
        self.retained: list[int] = []
        self.launches = 0
        self.refuses = SUCCESS
        self.memory: list[range] = []
        self.zeroed: list[tuple[int, int]] = []
        self.cached = False
        self.streams: list[int] = []
        self.capture_mode = self.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL

    def cuDevicePrimaryCtxRetain(self, device):
        self.retained.append(int(device))
        return SUCCESS, f"context {int(device)}"

    def cuCtxSetCurrent(self, context):
        self.thread.context = context
        return (SUCCESS,)

    def cuLaunchKernel(self, *arguments):
        if getattr(self.thread, "context", None) is None:
            return (self.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        self.launches += self.refuses == SUCCESS
        return (self.refuses,)

    def cuThreadExchangeStreamCaptureMode(self, mode):
        before, self.capture_mode = self.capture_mode, mode
        return SUCCESS, before

    def cuMemAlloc(self, size):
        assert self.capture_mode == self.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        assert not driver._issuing.locked(), "an allocation may wait for the device"
        if self.cached:
            return self.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        self.memory.append(range(2**20 * (len(self.memory) + 1), 2**20 * (len(self.memory) + 1) + size))
        return SUCCESS, self.memory[-1].start

    def cuStreamCreate(self, flags):
        assert flags == 1, "it would wait for the legacy default stream"
        self.streams.append(self.PRIVATE)
        return SUCCESS, self.PRIVATE

    def cuStreamDestroy(self, stream):
        self.streams.remove(stream)
        return (SUCCESS,)

    def cuMemsetD32Async(self, address, value, count, stream):
        assert value == 0
        assert stream in self.streams
        self.zeroed.append((address, 4 * count))
        return (SUCCESS,)

    def cuStreamSynchronize(self, stream):
        assert stream in self.streams, "others may wait for a launch of another thread"
        assert not driver._issuing.locked(), "that thread may want a ticket"
        return (SUCCESS,)

    def cuGetErrorName(self, status):
        return SUCCESS, status.name.encode()


@pytest.fixture
def stand_in(monkeypatch):
    found = Driver()
    monkeypatch.setattr(driver, "driver", found)
    monkeypatch.setattr(driver.torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(driver, "_unused_tickets", defaultdict(list))
    monkeypatch.setattr(driver.torch.cuda, "is_current_stream_capturing", lambda: False)
    for known in (driver._primary_context, driver._ticket_of_stream):
        known.cache_clear()
    yield found
    for known in (driver._primary_context, driver._ticket_of_stream):
        known.cache_clear()


def test_a_thread_without_a_context_is_given_the_current_device_s(stand_in):
    kernel, failed = driver.Kernel("function"), []

    def launch() -> None:
        try:
            for _ in range(2):
                kernel.launch(1, 128, b"params", 0)
        except driver.LaunchError as error:
            failed.append(error)
        assert stand_in.thread.context == "context 3"

    for _ in range(2):
        thread = threading.Thread(target=launch)
        thread.start()
        thread.join()
    assert failed == []
    assert stand_in.launches == 4
    assert stand_in.retained == [3], "a context is retained once a device"


@pytest.mark.parametrize("status", ["CUDA_ERROR_INVALID_CONTEXT", "CUDA_ERROR_INVALID_VALUE"])
def test_what_the_driver_refuses_all_the_same_is_an_error(stand_in, status):
    stand_in.thread.context = "context 3"
    stand_in.refuses = getattr(real.CUresult, status)
    with pytest.raises(driver.LaunchError, match=f"kernel launch: {status}"):
        driver.Kernel("function").launch(1, 128, b"params", 0)


def test_tickets_are_zeros_that_torch_does_not_own(stand_in):
    """Torch's pools may belong to a graph, which expects its memory back."""
    streams = [(device, stream) for device in (0, 1) for stream in range(driver.TICKETS + 1)]
    given = {one: driver.ticket(*one) for one in streams}
    assert all(driver.ticket(*one) == address for one, address in given.items())
    assert len(set(given.values())) == len(streams)
    assert len(stand_in.memory) == 4
    assert stand_in.zeroed == [(memory.start, len(memory)) for memory in stand_in.memory]
    assert all(any(address in memory for memory in stand_in.memory) for address in given.values())
    assert stand_in.capture_mode == real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
    assert stand_in.streams == []


def test_threads_have_tickets_of_their_own_on_per_thread_default_streams(stand_in):
    """Also one that begins when another has ended: what that one launched may still run."""
    given = []

    def draw() -> None:
        given.append([driver.ticket(0, stream) for stream in (real.CU_STREAM_PER_THREAD,) * 2 + (1,)])

    for _ in range(20):  # most of them with an ident that one before them had
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
    own, again, shared = zip(*given, strict=True)
    assert own == again
    assert len(set(own)) == 20
    assert len(set(shared) - set(own)) == 1 == len(set(shared))


def test_torch_gives_up_its_cache_for_tickets(stand_in, monkeypatch):
    stand_in.cached = True
    monkeypatch.setattr(driver.torch.cuda, "empty_cache", lambda: setattr(stand_in, "cached", False))
    assert driver.ticket(0, 5) in stand_in.memory[0]


def test_no_memory_for_tickets_is_torch_s_error_of_that_kind(stand_in, monkeypatch):
    """Harnesses tell running out of memory from other failures by it."""
    stand_in.cached, emptied = True, []
    monkeypatch.setattr(driver.torch.cuda, "empty_cache", lambda: emptied.append(1))
    with pytest.raises(
        torch.OutOfMemoryError, match="memory for tickets: CUDA_ERROR_OUT_OF_MEMORY"
    ) as caught:
        driver.ticket(0, 5)
    assert isinstance(caught.value, driver.LaunchError)
    assert len(emptied) == 1
    assert stand_in.capture_mode == real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL


@pytest.fixture
def encoded(monkeypatch):
    """Every tensor map that is still remembered, and how often one was encoded."""
    alive, count = weakref.WeakSet(), []

    class Encoded:
        pass

    def encode(known, address):
        count.append(address)
        found = Encoded()
        alive.add(found)
        return found

    monkeypatch.setattr(driver.TensorMap, "_encode", encode)
    yield alive, count
    driver.TensorMap.at.cache_clear()


def tensor_map():
    return driver.TensorMap(torch.float16, (64, 8, 1, 1), (128, 128, 128), (64, 8, 1, 1))


def test_a_deep_model_s_maps_are_encoded_once(encoded):
    maps = [tensor_map() for _ in range(11)]
    for _ in range(2):
        for layer in range(200):
            for known in maps:
                known.at(16 * layer)
    assert len(encoded[1]) == 11 * 200


def test_remembered_maps_are_bounded_over_all_plans(encoded):
    maps = [tensor_map() for _ in range(100)]
    for address in range(200):
        for known in maps:
            known.at(16 * address)
    assert len(encoded[0]) <= driver.REMEMBERED_MAPS < len(encoded[1])


def test_maps_of_a_kernel_s_tensors_are_joined_in_order_and_bounded(monkeypatch):
    monkeypatch.setattr(driver.TensorMap, "_encode", lambda known, address: bytes([address]) * 128)
    maps = driver.TensorMaps((tensor_map(), tensor_map()))
    try:
        assert maps.at(1, 2) == bytes([1]) * 128 + bytes([2]) * 128
        assert maps.at(2, 1) == bytes([2]) * 128 + bytes([1]) * 128
        assert maps.at(1, 2) is maps.at(1, 2)
        with pytest.raises(ValueError, match="argument"):
            maps.at(1)
        assert driver.TensorMaps.at.cache_info().maxsize == driver.REMEMBERED_SETS
    finally:
        driver.TensorMap.at.cache_clear()
        driver.TensorMaps.at.cache_clear()


COLD = """
import subprocess
import sys
import threading
from collections import defaultdict
import torch
from attnbench.impls.flash_cuda import flash_attention

warm = [torch.empty(1 << 22, device="cuda") for _ in range(8)]  # later allocations meet no call of the runtime
del warm
q, k, v = (torch.randn(1, 256, 2, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
expected = flash_attention(q, k, v)
d_out = torch.ones_like(expected)
if {forward}:
    got = []
    thread = threading.Thread(target=lambda: got.append(flash_attention(q, k, v)))
    thread.start()
    thread.join()
    assert torch.equal(got[0], expected)
else:
    torch.autograd.grad(expected, q, d_out)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("forward", [True, False])
def test_the_first_launch_of_a_thread(forward):
    ran = subprocess.run(
        [sys.executable, "-c", COLD.format(forward=forward)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.gpu
def test_compiled_into_graphs():
    """The first call allocates from the pool of the graph that the third one captures."""
    ran = subprocess.run([sys.executable, "-c", GRAPHED], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]


GRAPHED = """
import torch
from attnbench.impls.flash_cuda import flash_attention

q, k, v = (torch.randn(1, 256, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
compiled = torch.compile(flash_attention, mode="reduce-overhead")
for _ in range(4):
    out = compiled(q, k, v).clone()
assert torch.equal(out, flash_attention(q, k, v))
"""
