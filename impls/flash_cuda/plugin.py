"""The project's CUDA FlashAttention as the harness sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnbench.harness.contract import (
    Build,
    Capabilities,
    Device,
    Unavailable,
    Unsupported,
    missing_module,
)
from attnbench.harness.masks import ALIGNMENTS, KINDS
from attnbench.harness.problem import Problem
from attnbench.impls.flash_api.plugin import FlashPlugin
from attnbench.impls.flash_cuda.configs import LEAST_BACKWARD_KEYS, LIST_KEYS, LIST_QUERIES


class FlashCuda(FlashPlugin):
    """`attnbench.impls.flash_cuda.flash_attention`; with ``deterministic``, gradients repeat bit for bit."""

    compile_processes = 3  # a configuration compiles in about a second, into a cache on disk
    capabilities = Capabilities(
        compute_capability=((9, 0), (9, 0)),
        dtypes=("fp16", "bf16"),
        masks=KINDS,
        alignments=ALIGNMENTS,
        head_dim_multiple=8,
        max_head_dim=256,
        head_dim_v_differs=True,
        dropout=True,
        min_seqlen=0,
    )

    def __init__(self, name: str = "flash-cuda", deterministic: bool = False) -> None:
        self.name = name
        self.deterministic = deterministic
        words = ", deterministic" if deterministic else ""
        self.summary = "the project's FlashAttention-3 in CUDA C++ for Hopper" + words

    def unavailable(self, device: Device) -> Unavailable | None:
        return super().unavailable(device) or _missing_compiler()

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        found = super().unsupported_reasons(problem, device)
        blocks = problem.mask.blocks
        if blocks and (blocks.block_q % LIST_QUERIES or blocks.block_k % LIST_KEYS):
            found.append(
                f"mask blocks {blocks.block_q}x{blocks.block_k} are not multiples of {LIST_QUERIES}x{LIST_KEYS}"
            )
        if problem.direction != "fwd" and blocks:
            if blocks.block_k % LEAST_BACKWARD_KEYS:
                found.append(
                    f"the backward takes mask blocks of multiples of {LEAST_BACKWARD_KEYS} keys, not {blocks.block_k}"
                )
            if self.deterministic:
                found.append("a deterministic backward takes no mask blocks")
        return found

    def builds(self) -> Mapping[str, Build]:
        if absent := _missing_compiler():
            raise Unsupported(absent.line)
        from attnbench.impls.flash_cuda.ahead import builds

        return builds(self.deterministic)

    def attention(self) -> Callable[..., Any]:
        from attnbench.impls.flash_cuda import flash_attention

        return flash_attention


def _missing_compiler() -> Unavailable | None:
    return missing_module("cuda.bindings", "pip install cuda-bindings nvidia-cuda-nvrtc")


deterministic = FlashCuda("flash-cuda-deterministic", deterministic=True)
