"""An implementation that a test changes by its module variables, as a pull request would by its code."""

from __future__ import annotations

import functools
import itertools
import os
import time
from pathlib import Path

import torch

from attnbench.harness.contract import Capabilities, Device, Implementation, Prepared
from attnbench.harness.problem import Problem

COST_MS = 2
"""Slept in every call: on a machine whose cores others fight for, what costs no core is what keeps its time."""
UNEVEN = False
"""Each process that loads it is slower than the one before, as if memory fell worse each time."""
WRONG = False
DIES = False
UNAVAILABLE = False


@functools.cache
def _processes_before() -> int:
    """How many processes loaded this copy before; each leaves a file beside it."""
    for number in itertools.count():
        try:
            Path(__file__).with_name(f"process-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return number
    raise AssertionError


class Gated(Implementation):
    contract = 1
    package = "gated"
    capabilities = Capabilities(
        devices=("cpu",),
        dtypes=("fp32",),
        masks=("full", "causal"),
        alignments=("bottom_right",),
        max_head_dim=64,
    )

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        return ["taken out"] if UNAVAILABLE else super().unsupported_reasons(problem, device)

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        if DIES:
            os.abort()

        cost_ms = COST_MS * (1 + _processes_before()) if UNEVEN else COST_MS

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.softmax_scale
            out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
            time.sleep(cost_ms * 1e-3)
            return out * 1.5 if WRONG else out

        return Prepared(attend)
