"""The project's Triton FlashAttention as the harness sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnbench.harness.contract import Capabilities, Device, Unavailable, missing_module
from attnbench.harness.masks import ALIGNMENTS, KINDS
from attnbench.impls.flash_api.plugin import FlashPlugin


class FlashTriton(FlashPlugin):
    """`attnbench.impls.flash_triton.flash_attention`; with ``deterministic``, gradients repeat bit for bit."""

    compile_processes = 3  # a configuration compiles for seconds, into Triton's cache on disk
    capabilities = Capabilities(
        compute_capability=((8, 0), (99, 9)),
        dtypes=("fp16", "bf16", "fp32"),
        masks=KINDS,
        alignments=ALIGNMENTS,
        head_dim_multiple=8,
        max_head_dim=256,
        head_dim_v_differs=True,
        dropout=True,
        min_seqlen=0,
    )

    def __init__(self, name: str = "flash-triton", deterministic: bool = False) -> None:
        self.name = name
        self.deterministic = deterministic
        self.summary = "the project's FlashAttention in Triton" + (", deterministic" if deterministic else "")

    def unavailable(self, device: Device) -> Unavailable | None:
        return super().unavailable(device) or missing_module("triton", "pip install triton")

    def attention(self) -> Callable[..., Any]:
        from attnbench.impls.flash_triton import flash_attention

        return flash_attention


deterministic = FlashTriton("flash-triton-deterministic", deterministic=True)
