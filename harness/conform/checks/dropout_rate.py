"""How often, and how independently, weights are dropped: counts of recovered masks against the declared rate.

Every count is a sum of independent draws if the masks are what they should be, so its tails are known. Generator states
are fixed, so a verdict repeats; ALPHA bounds the chance that a right implementation was unlucky with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import stats

from attnbench.harness.conform.posed import Posed

ALPHA = 1e-6
"""Of all tests of one case together: Bonferroni over their number."""
LAGS = (1, 2, 3, 4, 8, 16, 32, 64)
"""Distances between rows, and between keys, that share lanes, words or tiles of a generator's output."""

Counts = tuple[str, np.ndarray, np.ndarray]


def check(posed: Posed) -> None:
    problem = posed.problem
    rate = posed.implementation.dropout_effective(problem.dropout_p).probability
    masks = np.stack([posed.kept(posed.state(n)).keep.cpu().numpy() for n in range(posed.option("calls"))])
    rows = torch.arange(problem.seqlen_q)
    visible = problem.mask.dense(rows, problem.heads, problem.seqlen_q, problem.seqlen_k).numpy()
    visible = np.broadcast_to(visible, masks.shape[2:])
    groups = list(_groups(masks, visible))
    tests = sum(int((drawn > 0).sum()) for _, _, drawn in groups)
    for what, kept, drawn in groups:
        # Both tails: the chance of a count as far out as this one, or further.
        chance = 2 * np.minimum(
            stats.binom.cdf(kept, drawn, 1 - rate), stats.binom.sf(kept - 1, drawn, 1 - rate)
        )
        chance = np.where(drawn > 0, chance, 1.0)
        if chance.min() < ALPHA / tests:
            place = tuple(int(i) for i in np.unravel_index(chance.argmin(), chance.shape))
            share, of = 1 - kept[place] / drawn[place], int(drawn[place])
            posed.fail(
                f"drops {share:.4f} of {of} weights {what}{list(place) if place else ''}, and declares {rate:.4f} "
                f"(chance {chance.min():.1g}, {tests} tests)",
                dropped=float(share),
                declared=rate,
                weights=of,
            )
    _independent(posed, masks, visible, rate)


def _groups(masks: np.ndarray, visible: np.ndarray) -> Iterator[Counts]:
    """Kept and drawn weights: of all, by row, by key, by batch and head, and by position in the score matrix.

    masks: bool (calls, batch, heads, rows, keys); visible: (heads, rows, keys).
    """
    calls, batch = masks.shape[:2]
    total = np.broadcast_to(visible, masks.shape[1:])
    by_head = masks.sum(axis=0, dtype=np.int64)
    yield "of all", by_head.sum(), calls * total.sum(dtype=np.int64)
    yield "in row ", by_head.sum((0, 1, 3)), calls * total.sum((0, 1, 3), dtype=np.int64)
    yield "at key ", by_head.sum((0, 1, 2)), calls * total.sum((0, 1, 2), dtype=np.int64)
    yield "of batch and head ", by_head.sum((2, 3)), calls * total.sum((2, 3), dtype=np.int64)
    yield "at (row, key) ", by_head.sum((0, 1)), calls * batch * visible.sum(0, dtype=np.int64)


def _independent(posed: Posed, masks: np.ndarray, visible: np.ndarray, rate: float) -> None:
    """Products of two weights' deviations have mean 0 and variance (rate (1 - rate))^2 where they are independent."""
    deviation = np.where(visible, masks - (1 - rate), 0.0)
    variance = rate * (1 - rate)
    if variance == 0:
        return
    calls, batch, heads, rows, keys = masks.shape
    pairs = [
        (f"rows {lag} apart", deviation[..., lag:, :], deviation[..., :-lag, :], visible[:, lag:] & visible[:, :-lag])
        for lag in LAGS if lag < rows
    ] + [
        (f"keys {lag} apart", deviation[..., lag:], deviation[..., :-lag], visible[..., lag:] & visible[..., :-lag])
        for lag in LAGS if lag < keys
    ]  # fmt: skip
    pairs += [
        (f"heads 0 and {head}", deviation[:, :, head], deviation[:, :, 0], visible[head] & visible[0])
        for head in range(1, heads)
    ]
    pairs += [
        (f"batch entries 0 and {entry}", deviation[:, entry], deviation[:, 0], visible)
        for entry in range(1, batch)
    ]
    pairs += [
        (f"the masks of generator states 0 and {call}", deviation[call], deviation[0], visible)
        for call in range(1, calls)
    ]
    limit = stats.norm.isf(ALPHA / 2 / len(pairs))
    for what, one, other, seen in pairs:
        drawn = one.size // max(1, seen.size) * int(seen.sum())
        if not drawn:
            continue
        deviations = float((one * other).sum()) / (variance * math.sqrt(drawn))
        if abs(deviations) > limit:
            posed.fail(
                f"its masks are correlated between {what}: {deviations:+.1f} standard deviations, {limit:.1f} allowed",
                deviations=deviations,
                weights=drawn,
            )
