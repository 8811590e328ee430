"""The least time attainable, and which limit it names."""

from __future__ import annotations

import numpy as np
import pytest

from attnbench.harness.problem import Problem
from attnbench.harness.report.floor import LEAST_LAUNCH_MS, floor

GEMM, COPY, CLOCK = np.array([700.0, 800.0]), np.array([4000.0, 4000.0]), np.array([1980.0, 1500.0])
LONG = Problem(1, 16, 8192, 128, dtype="bf16")
DECODE = Problem(32, 32, 1, 128, kv_heads=8, seqlen_k=16384, dtype="bf16")


def floor_of(problem: Problem, *, sm_mhz: np.ndarray = CLOCK, sms: int | None = 132):
    return floor(problem, problem.visible_pairs, GEMM, COPY, sm_mhz, sms)


def test_matrix_work_binds_where_there_is_most_of_it() -> None:
    found = floor_of(LONG)
    assert found.binding == "matrix"
    assert found.ms == pytest.approx(LONG.flops / 1e9 / GEMM + LEAST_LAUNCH_MS)


def test_reading_the_keys_binds_a_decode() -> None:
    found = floor_of(DECODE)
    assert found.binding == "HBM"
    assert found.ms == pytest.approx(DECODE.minimal_bytes / 1e6 / COPY + LEAST_LAUNCH_MS)


def test_exponentials_bind_at_small_heads_and_a_low_clock() -> None:
    """One exp a pair at 16 an SM and clock: head_dim 32 has a quarter of the FLOP a pair of head_dim 128."""
    problem = Problem(1, 16, 8192, 32, dtype="bf16")
    found = floor_of(problem)
    assert found.binding == "exp"
    assert found.ms == pytest.approx(problem.visible_pairs / (16 * 132 * CLOCK * 1e3) + LEAST_LAUNCH_MS)
    assert floor_of(problem, sm_mhz=np.full(2, np.nan)).binding == "matrix"


def test_a_launch_binds_a_tiny_problem_and_both_passes_need_two() -> None:
    tiny = Problem(1, 1, 16, 16, dtype="bf16", direction="fwd_bwd")
    found = floor_of(tiny)
    assert found.binding == "launch"
    assert found.ms == pytest.approx(2 * LEAST_LAUNCH_MS, rel=0.01)


def test_a_device_that_is_no_gpu_has_neither_exp_nor_launch() -> None:
    tiny = Problem(1, 1, 16, 16, dtype="fp32")
    found = floor_of(tiny, sms=None)
    assert found.binding in ("matrix", "HBM")
    assert (found.ms < LEAST_LAUNCH_MS).all()


def test_without_a_round_there_is_no_figure() -> None:
    found = floor(LONG, LONG.visible_pairs, np.array([]), np.array([]), CLOCK, 132)
    assert not len(found.ms)
