from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.report import stats

positive = st.floats(1e-3, 1e3)
rounds = st.lists(st.lists(positive, min_size=1, max_size=5), min_size=1, max_size=12)


@given(rounds)
def test_the_interval_holds_the_median_and_stays_within_the_rounds(samples: list[list[float]]) -> None:
    medians = stats.round_medians(samples)
    estimate = stats.median_over_rounds(medians)
    assert estimate.value == np.median(medians)
    if len(samples) == 1:
        assert estimate.low is None
        assert estimate.high is None
    else:
        assert medians.min() <= estimate.low <= estimate.value <= estimate.high <= medians.max()
    assert estimate == stats.median_over_rounds(medians)


def test_a_round_weighs_the_same_however_many_samples_it_has() -> None:
    assert stats.median_over_rounds(stats.round_medians([[1.0] * 1000, [2.0], [3.0]])).value == 2.0


def test_one_disturbed_sample_does_not_move_its_round() -> None:
    assert stats.round_medians([[1.0, 1.1, 900.0], [2.0]]).tolist() == [1.1, 2.0]


def test_many_samples_in_few_rounds_do_not_narrow_the_interval() -> None:
    few = stats.median_over_rounds(stats.round_medians([[1.0], [2.0], [3.0]]))
    many = stats.median_over_rounds(stats.round_medians([[1.0] * 500, [2.0] * 500, [3.0] * 500]))
    assert few == many
    assert (many.low, many.high) == (1.0, 3.0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 400 made-up cells of 12 rounds, about 95% of the intervals hold the true median; 100% would be too wide."""
    draws = np.random.default_rng(7).normal(10.0, 1.0, (400, 12))
    held = [low <= 10.0 <= high for _, low, high in map(stats.median_over_rounds, draws)]
    assert 0.92 <= np.mean(held) <= 0.99


def test_a_paired_ratio_does_not_see_a_drift_that_both_sides_share() -> None:
    drift = np.linspace(1.0, 1.2, 10)
    noise = np.random.default_rng(1).normal(1.0, 0.001, (2, 10))
    ours, theirs = 1.01 * drift * noise[0], drift * noise[1]
    paired = stats.ratio(ours, theirs)
    assert 1.005 < paired.low < paired.value < paired.high < 1.015
    alone = stats.median_over_rounds(ours)
    assert alone.high / alone.low > 1.05  # the negative control: unpaired, the drift is all there is to see
    shuffled = stats.ratio(ours, np.random.default_rng(2).permutation(theirs))
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_rounds_that_one_side_lacks_are_left_out() -> None:
    assert stats.ratio(np.array([2.0, 4.0, 8.0]), np.array([1.0, 2.0])).value == pytest.approx(2.0)
    assert stats.ratio(np.array([2.0, 4.0]), np.array([1.0, math.nan])).value == pytest.approx(2.0)
    assert stats.ratio(np.array([2.0]), np.array([])) == stats.Estimate(None)


def test_inverse_swaps_the_ends() -> None:
    assert stats.Estimate(2.0, 1.0, 4.0).inverse(8.0) == (4.0, 2.0, 8.0)
    assert stats.Estimate(None).inverse() == (None, None, None)


@given(st.lists(positive, min_size=1, max_size=20), positive)
def test_geomean_scales_and_lies_between_its_ends(values: list[float], factor: float) -> None:
    mean = stats.geomean(values)
    assert min(values) * (1 - 1e-9) <= mean <= max(values) * (1 + 1e-9)
    assert stats.geomean([value * factor for value in values]) == pytest.approx(mean * factor)


def test_nothing_has_no_statistic() -> None:
    assert stats.geomean([]) is None
    assert stats.quantile([], 0.5) is None
    assert stats.geomean_over_cells([]) == stats.Estimate(None)
    assert stats.median_over_rounds(np.array([])) == stats.Estimate(None)


def test_the_geomean_over_cells_narrows_with_cells() -> None:
    noise = np.random.default_rng(3).normal(0.0, 0.05, (40, 8))
    one, many = stats.geomean_over_cells(list(noise[:1])), stats.geomean_over_cells(list(noise))
    assert many.high - many.low < (one.high - one.low) / 3
    assert stats.geomean_over_cells([np.array([0.0])]) == stats.Estimate(1.0)
