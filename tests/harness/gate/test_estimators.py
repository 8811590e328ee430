from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from gate_runs import timed

from attnbench.harness.gate.calibration import calibrate
from attnbench.harness.gate.decision import Design, Verdict, bounds
from attnbench.harness.gate.estimators import BY_NAME, UNDISTURBED, Estimator
from attnbench.harness.gate.pairs import PairLogs, contrasts
from attnbench.harness.gate.rounds import RoundLogs
from attnbench.harness.run.record import Cell

DESIGN = Design(cells=1)


def beside_busy_neighbours(device: str, slowdown: float, seed: int) -> PairLogs:
    """Five pairs on shared cores. In ten of its sixteen stretches of three rounds a process has a neighbour, who adds a
    tenth of the time of a call and more to every sample, whatever the call costs.
    """
    rng = np.random.default_rng(seed)

    def cell(side: str, number: int) -> Cell:
        made = timed(f"k@{side}.{number}", 1.0, seed=0)
        ms = (1 + slowdown * (side == "head")) * rng.normal(1, 0.004, (48, 5))
        neighbour = np.repeat(rng.permutation(16) < 10, 3)[:, None]
        ms += neighbour * (0.1 + rng.exponential(0.1, (48, 5)))
        assert made.timing
        timing = dataclasses.replace(made.timing, rounds=ms.tolist(), sm_mhz=[])
        return dataclasses.replace(made, device=device, timing=timing)

    cells = [cell(side, number) for number in range(5) for side in ("base", "head")]
    (contrast,) = contrasts(cells, over="head", under="base").values()
    return contrast.logs


def test_a_cpu_whose_neighbours_are_busy_is_fit_and_its_verdicts_are_right() -> None:
    equal, slower = (beside_busy_neighbours("cpu", slowdown, seed=1) for slowdown in (0.0, 0.05))
    found = calibrate([equal], DESIGN, gates=300)
    assert found.fit
    assert found.false_positives.count == 0
    assert found.smallest is not None
    assert found.smallest < 0.05
    assert bounds(equal.values(), DESIGN).verdict(DESIGN.margin) is Verdict.SAME
    assert bounds(slower.values(), DESIGN).verdict(DESIGN.margin) is Verdict.SLOWER
    assert math.expm1(slower.values().mean()) == pytest.approx(0.05, abs=0.005)


def test_the_middle_of_its_times_would_not_be() -> None:
    """The control of the test above: the same times, read as a GPU's."""
    assert not calibrate([beside_busy_neighbours("cuda:0", 0.0, seed=1)], DESIGN, gates=300).fit


def test_a_round_says_its_median_and_on_a_cpu_its_fastest_sample() -> None:
    cell = timed("k", 1.0, seed=1)
    assert cell.timing
    cell.timing.rounds[:] = [[3.0, 2.0, 9.0]] * 4
    assert np.exp(RoundLogs.of(cell).ms) == pytest.approx([3.0] * 4)
    assert np.exp(RoundLogs.of(dataclasses.replace(cell, device="cpu")).ms) == pytest.approx([2.0] * 4)


def test_a_burst_in_one_flip_does_not_move_a_pair() -> None:
    ratios = np.zeros((5, 7))
    ratios[2, 3] = 3.0
    assert PairLogs.of_ratios(ratios).values().tolist() == [0.0] * 5


def test_what_disturbs_most_rounds_does_not_move_a_pair_on_a_cpu() -> None:
    """Neither where one side has the worse neighbours, nor where the quiet rounds of the two are not the same."""
    logs = np.full((1, 10, 2, 2), [[0.5], [0.9]])
    logs[0, :2, 0] = 0.0
    logs[0, 8:, 1] = 0.0
    assert UNDISTURBED.pair(logs) == pytest.approx([0.0])


@pytest.mark.parametrize("estimator", BY_NAME.values(), ids=BY_NAME)
def test_a_slowdown_is_a_shift_and_swapped_sides_swap_the_sign(estimator: Estimator) -> None:
    logs = np.random.default_rng(1).normal(0, 0.05, (5, 24, 2, 2))
    said = estimator.pair(logs)
    assert np.abs(said).max() > 0.001
    assert estimator.pair(logs[:, :, ::-1]) == pytest.approx(-said)
    assert estimator.pair(logs + np.array([[0.0], [0.05]])) == pytest.approx(said + 0.05)
