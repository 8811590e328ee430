"""Who is ahead, over which cells, and who cannot be told apart.

Implementations are ranked over the cells they all completed, by the geometric mean of a metric. For what was timed, the
score of each is taken round by round against the field (the mean log-time of the ranked implementations in the
same round), so that a card that slows down during a group costs nobody a place; two implementations whose score
intervals overlap share their rank. What gave up on many of the cells would keep the common ones short: it has no rank,
and stands beside the leader over the cells that both completed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnbench.harness.report import stats
from attnbench.harness.report.metrics import Metric
from attnbench.harness.report.stats import Array, Estimate

if TYPE_CHECKING:
    import pandas as pd

LEAST_COMMON = 0.9
"""The common set holds at least this share of the cells that anyone completed, or a ranking would speak of a corner:
what materialises the scores ends where sequences become long, and every other one is told apart there."""


@dataclass(frozen=True)
class Standing:
    """One implementation's place. rank: None if it is not ranked. covered: cells it completed, of Ranking.posed.

    score: its geomean over that of the leader, oriented so that larger is better (leader 1); without a rank over the
    cells that both completed. geomean: of the metric over the common cells.
    """

    impl: str
    covered: int
    rank: int | None = None
    score: Estimate = Estimate(None)
    geomean: float | None = None


@dataclass(frozen=True)
class Ranking:
    """standings: best first, the unranked last by coverage. common: cells that every ranked one completed."""

    metric: Metric
    direction: str
    posed: int
    common: int
    standings: list[Standing]

    @property
    def order(self) -> list[str]:
        return [standing.impl for standing in self.standings]


def rank(table: pd.DataFrame, metric: Metric, direction: str) -> Ranking:
    """Ranking of every exact implementation of ``direction`` by a metric of the time or memory family; approximations
    are listed unranked.

    table: the frame of one run. While the ranked ones have too little in common (``LEAST_COMMON``), the one that
    completed the fewest cells stops being ranked.
    """
    posed = table[table["direction"] == direction]
    done = posed[(posed["status"] == "OK") & (posed[metric.column] > 0)]
    cells = {impl: set(own["group"]) for impl, own in done.groupby("impl")}
    covered = {impl: len(cells.get(impl, ())) for impl in posed["impl"].unique()}
    approximate = set(posed.loc[posed["approximate"].fillna(value=False), "impl"])
    by_coverage = sorted(covered, key=lambda impl: (impl in approximate, -covered[impl], impl))
    ranked = [impl for impl in by_coverage if covered[impl] and impl not in approximate]
    least = LEAST_COMMON * done.loc[~done["impl"].isin(approximate), "group"].nunique()
    while ranked and len(common := set.intersection(*(cells[impl] for impl in ranked))) < least:
        ranked.pop()
    if not ranked:
        common = set()
    standings = _standings(done, metric, ranked, sorted(common), covered)
    leader = standings[0].impl if standings else None
    for impl in by_coverage:
        if impl not in ranked:
            both = cells[leader] & cells.get(impl, set()) if leader and impl not in approximate else set()
            score = _beside(done, metric, leader, impl, sorted(both)) if leader and both else Estimate(None)
            standings.append(Standing(impl, covered[impl], score=score))
    return Ranking(metric, direction, posed["group"].nunique(), len(common), standings)


def _standings(
    done: pd.DataFrame, metric: Metric, ranked: list[str], common: list[str], covered: dict[str, int]
) -> list[Standing]:
    if not ranked:
        return []
    of = done.set_index(["impl", "group"])
    if metric.family == "time":
        times = {cell: _log_times([of.at[(impl, cell), "round_ms"] for impl in ranked]) for cell in common}
        lead = [
            [times[cell].mean(axis=0) - times[cell][place] for cell in times] for place in range(len(ranked))
        ]
        scores = dict(zip(ranked, map(stats.geomean_over_cells, lead), strict=True))
    else:
        sizes = {impl: [of.at[(impl, cell), metric.column] for cell in common] for impl in ranked}
        scores = {impl: Estimate(stats.geomean(values)).inverse() for impl, values in sizes.items()}
    best = max(score.value for score in scores.values() if score.value)
    scores = {impl: score.scaled(1 / best) for impl, score in scores.items()}
    return [
        Standing(
            impl=impl,
            covered=covered[impl],
            rank=1 + sum(_ahead(other, scores[impl]) for other in scores.values()),
            score=scores[impl],
            geomean=stats.geomean([of.at[(impl, cell), metric.column] for cell in common]),
        )
        for impl in sorted(scores, key=lambda impl: (-(scores[impl].value or 0), impl))
    ]


def _beside(done: pd.DataFrame, metric: Metric, leader: str, impl: str, cells: Sequence[str]) -> Estimate:
    """Of an implementation without a rank: its geomean over the leader's, over the cells that both completed."""
    of = done.set_index(["impl", "group"])
    if metric.family == "time":
        both = [_log_times([of.at[(name, cell), "round_ms"] for name in (leader, impl)]) for cell in cells]
        return stats.geomean_over_cells([first - own for first, own in both])
    ratios = [of.at[(leader, cell), metric.column] / of.at[(impl, cell), metric.column] for cell in cells]
    return Estimate(stats.geomean(ratios))


def _log_times(rounds: Sequence[Array]) -> Array:
    """(implementations, rounds) of log medians, cut to the rounds that all of them have."""
    paired = min(map(len, rounds))
    return np.log(np.stack([values[:paired] for values in rounds]))


def _ahead(other: Estimate, own: Estimate) -> bool:
    """Whether ``other`` is clearly better: its interval lies wholly above; without intervals, its value does."""
    low = other.value if other.low is None else other.low
    high = own.value if own.high is None else own.high
    return low is not None and high is not None and low > high * (1 + 1e-9)
