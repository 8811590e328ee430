"""The least time a device could take for a problem, and which of its limits that is.

Three things must be done, each at the rate the device showed in the same round, and at best all at once: matrix
products (at the GEMM's rate), exponentials (at the SM clock), and the traffic no algorithm avoids (at the copy's
rate). Before any of them a kernel must be launched. The GEMM's rate is a yardstick and no bound: a kernel that leaves
the card cooler than the GEMM does can pass it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnbench.harness.problem import Problem
from attnbench.harness.report.stats import Array

EXP_PER_CLOCK_PER_SM = 16
"""Exponentials one SM's special-function unit starts in a clock (CUDA Programming Guide, arithmetic throughput)."""

LEAST_LAUNCH_MS = 0.0026
"""Of an empty kernel between two events on an H200: 2.63 µs at the 10% quantile of `bench ceilings`, 2.72 its median
(results/nvidia-h200/2026-11-21-8f0c7092f38f-limits). Each pass needs one kernel at least."""

PASSES = {"fwd": 1, "bwd": 1, "fwd_bwd": 2}
"""Kernels at least, and exponentials a visible pair: the backward pass computes P again."""


class Floor(NamedTuple):
    """ms: per round, (rounds,). binding: the longest term over the rounds: matrix, exp, HBM or launch."""

    ms: Array
    binding: str


def floor(
    problem: Problem, pairs: int, gemm_tflops: Array, copy_gbs: Array, sm_mhz: Array, sm_count: int | None
) -> Floor:
    """pairs: the problem's visible pairs. sm_count: None where the device is no GPU, or an unknown one, which leaves
    out the exponential and the launch term. A round whose clock was not read goes without the exponential term."""
    paired = min(len(gemm_tflops), len(copy_gbs))
    at_once = {
        "matrix": problem.flops / 1e9 / gemm_tflops[:paired],
        "HBM": problem.minimal_bytes / 1e6 / copy_gbs[:paired],
    }
    passes = PASSES[problem.direction]
    if sm_count and len(sm_mhz) >= paired:
        rate = EXP_PER_CLOCK_PER_SM * sm_count * sm_mhz[:paired] * 1e3
        at_once["exp"] = np.nan_to_num(passes * pairs / rate, nan=0.0)
    before = passes * LEAST_LAUNCH_MS if sm_count else 0.0
    terms = {name: float(np.nanmedian(ms)) if paired else 0.0 for name, ms in at_once.items()} | {
        "launch": before
    }
    return Floor(np.maximum.reduce(list(at_once.values())) + before, max(terms, key=lambda name: terms[name]))
