"""torch's flash attention with more work on the stream: SHARE of a call, sized to the call when it is prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnbench.harness.contract import Capabilities, Device, Implementation, Prepared
from attnbench.harness.problem import Problem

SHARE = 0.0
REPEATS = 15
SHORT, LONG = 20_000, 220_000  # cycles of the spin, to tell what a cycle costs from what a launch does


class Planted(Implementation):
    contract = 1
    package = "planted"
    capabilities = Capabilities(
        devices=("cuda",), dtypes=("bf16",), masks=("full", "causal"), alignments=("top_left",), max_head_dim=128,
        gqa=False,
    )  # fmt: skip

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        causal = problem.mask.right == 0

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
                out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal)
            return out.transpose(1, 2)

        forward, backward = spins(attend, problem) if SHARE else (0, 0)
        return Prepared(lambda q, k, v: MoreWork.apply(attend(q, k, v), forward, backward))


class MoreWork(torch.autograd.Function):
    """The identity, and a spin of so many cycles in either direction."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, forward: int, backward: int) -> torch.Tensor:
        ctx.cycles = backward
        if forward:
            torch.cuda._sleep(forward)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.cycles:
            torch.cuda._sleep(ctx.cycles)
        return grad, None, None


def spins(attend: Callable[..., torch.Tensor], problem: Problem) -> tuple[int, int]:
    """Cycles of SHARE of a forward call and of a backward call."""
    backward = problem.direction != "fwd"
    tensors = [
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
        for shape in (problem.q_shape, problem.k_shape, problem.v_shape)
    ]
    short, long = (median_ms(lambda cycles=cycles: torch.cuda._sleep(cycles)) for cycles in (SHORT, LONG))
    per_cycle = (long - short) / (LONG - SHORT)
    launch = short - SHORT * per_cycle

    def cycles(call_ms: float) -> int:
        return max(1, int((SHARE * call_ms - launch) / per_cycle))

    if not backward:
        return cycles(median_ms(lambda: attend(*tensors))), 0
    out = attend(*tensors)
    dout = torch.randn_like(out)
    return 0, cycles(median_ms(lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True)))


def median_ms(call: Callable[[], object]) -> float:
    """As the harness times: behind a held stream, with a cold L2."""
    flush = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(3 + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)
        flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[REPEATS // 2]
