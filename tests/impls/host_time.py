"""What Python costs a call of the project's own kernels, layer by layer, without a GPU.

`python tests/impls/host_time.py [cuda] [triton]`.
Compiled kernels and the driver are replaced by functions that do nothing; all above them is real, on tensors of a CPU.
A device adds to this: its allocator, the driver's launch, and in a backward the hand-over to autograd's thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

CALLS, REPEATS = 500, 40
SHAPE = (1, 64, 2, 64)


def us(call: Callable[[], Any]) -> float:
    """Microseconds of this thread that one call takes: the fastest of several runs, since all that disturbs adds."""
    for _ in range(50):
        call()
    fastest = float("inf")
    for _ in range(REPEATS):
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        fastest = min(fastest, time.thread_time() - begin)
    return fastest / CALLS * 1e6


def cuda() -> tuple[Any, Any, Any]:
    """flash_cuda's (attention, plan_forward, plan_backward) above a driver that does nothing."""
    from cuda.bindings import driver as real

    from attnbench.impls.flash_cuda import backward, driver, forward, op

    class Driver:
        CUresult = real.CUresult
        answer = (real.CUresult.CUDA_SUCCESS,)

        def cuLaunchKernel(self, *arguments: Any) -> Any:  # noqa: N802 - the driver's own name
            return self.answer

    driver.driver = Driver()
    for module in (forward, backward):
        module.check = lambda *_: None
        module.load = lambda *_, **__: driver.Kernel(0)
        module.multiprocessors = lambda device: 132
        module.stream_of = lambda device: 0
    torch._C._cuda_getDevice = lambda: -1
    torch.cuda.is_current_stream_capturing = lambda: False
    driver._ticket_of_stream = lambda device, stream: 0
    driver.TensorMap._encode = lambda self, address: bytes(128)
    return op.flash_attention, forward.plan_forward, backward.plan_backward


def triton() -> tuple[Any, Any, Any]:
    """flash_triton's, with kernels compiled for an H200 whose C function does nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.compiler.compiler import CompiledKernel

    class Driver:
        utils = property(lambda self: self)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 7)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        fill_tma_descriptor = staticmethod(lambda *_: 0)

    class Run:
        global_scratch_size = profile_scratch_size = launch_cooperative_grid = launch_pdl = 0

        def __init__(self, compiled: Any) -> None:
            meta = getattr(compiled.metadata, "tensordesc_meta", None)
            signature = dict(enumerate(compiled.src.signature.values()))
            self.launch = nvidia.wrap_handle_tensordesc(lambda *_: None, signature, meta)

        def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            self.launch(x, y, z, stream, function, 0, 0, None, None, *rest)

    runs: dict[int, Run] = {}
    triton.runtime.driver.set_active(Driver())
    CompiledKernel.run = property(lambda self: runs.setdefault(id(self), Run(self)))
    CompiledKernel._init_handles = lambda self: None
    CompiledKernel.function = 5

    from attnbench.impls.flash_triton import configs, launch, op

    launch.device_for = lambda device, dtype: configs.Device((9, 0), 132)
    return op.flash_attention, launch.plan_forward, launch.plan_backward


def layers(attention: Any, plan_forward: Any, plan_backward: Any) -> dict[str, Callable[[], Any]]:
    """Calls of one family, and below each what it is made of."""
    from attnbench.impls.flash_api import Options

    q, k, v = (torch.randn(SHAPE).to(torch.bfloat16) for _ in range(3))
    options = Options(None, 0, True, 0.1, 0.0, (0, 0), False)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    graph = attention(*leaves, causal=True, scale=0.1)
    forward = plan_forward(q, k, v, options)
    out, lse = forward(q, k, v, None)
    d_out = torch.randn_like(out)
    backward = plan_backward(d_out, q, k, v, out, lse, options)
    return {
        "attention": lambda: attention(q, k, v, causal=True, scale=0.1),
        "attention, gradients wanted": lambda: attention(*leaves, causal=True, scale=0.1),
        "  of it the launch": lambda: forward(q, k, v, None),
        "    of it two allocations": lambda: (torch.empty_like(q), torch.empty_like(lse)),
        "autograd.grad": lambda: torch.autograd.grad(graph, leaves, d_out, retain_graph=True),
        "  of it the launches": lambda: backward(d_out, q, k, v, out, lse, None),
    }


def main(families: list[str]) -> None:
    torch.set_num_threads(1)
    known = {"cuda": cuda, "triton": triton}
    for family in families or list(known):
        for name, call in layers(*known[family]()).items():
            print(f"flash_{family}  {name:28} {us(call):6.1f} us", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
