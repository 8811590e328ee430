"""The project's Triton FlashAttention as the harness sees it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attnbench.harness.contract import (
    TUNED_VARIABLE,
    Candidate,
    Capabilities,
    Device,
    Unavailable,
    missing_module,
)
from attnbench.harness.masks import ALIGNMENTS, KINDS
from attnbench.harness.problem import Problem
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

    def candidates(self, problem: Problem, device: Device) -> Sequence[Candidate]:
        from attnbench.impls.flash_triton.space import candidates

        return candidates(problem, device, self.deterministic)

    def version(self) -> str:
        """A table of choices is part of what is measured, and of the version: two runs under two tables differ."""
        named = os.environ.get(TUNED_VARIABLE)
        if not named:
            return super().version()
        try:
            digest = hashlib.sha256(Path(named).read_bytes()).hexdigest()[:8]
        except OSError:
            digest = "unreadable"
        return f"{super().version()}+tuned.{digest}"

    def attention(self) -> Callable[..., Any]:
        from attnbench.impls.flash_triton import flash_attention

        return flash_attention


deterministic = FlashTriton("flash-triton-deterministic", deterministic=True)
