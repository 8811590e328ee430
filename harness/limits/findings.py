"""What the FlashAttention paper found (arXiv 2205.14135, section 4.3 and appendix E.6), asked of a run's own records.

Each finding is a question with a figure for an answer, and holds or does not hold on this card; where the run lacks a
cell that it needs, it is open. A ratio is taken within one length, round by round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnbench.harness.report import stats
from attnbench.harness.report.tables import DIRECTION_TITLES, figure, length_text

if TYPE_CHECKING:
    import pandas as pd

LINEAR_UP_TO = 1.1
"""Exponent of memory in the sequence length that still counts as linear."""


@dataclass(frozen=True)
class Roles:
    """Which implementation of the run plays which part of the paper's comparison."""

    standard: str
    flash: str
    block_sparse: str


@dataclass(frozen=True)
class Finding:
    """claim: the paper's. holds: None where the run does not say. evidence: the figures, one line."""

    claim: str
    direction: str
    holds: bool | None
    evidence: str


def findings(table: pd.DataFrame, roles: Roles) -> list[Finding]:
    """table: the frame of one run, with one problem a length and direction. Full masks without dropout are asked.

    ValueError for a run that poses several problems of one length, as other suites than the paper's do.
    """
    own = table[(table["mask"] == "full") & (table["dropout_p"] == 0) & (table["status"] == "OK")]
    own = own.assign(impl=own["impl"].str.removesuffix(" (approximate)"))
    several = own[own.duplicated(["impl", "direction", "seqlen_k"])]
    if not several.empty:
        length = length_text(int(several["seqlen_k"].iloc[0]))
        raise ValueError(f"the run poses several problems of length {length}: ask one of the suite fa1-paper")
    found = []
    for direction in dict.fromkeys(own["direction"]):
        cells = own[own["direction"] == direction]
        found += [
            _linear_memory(cells, direction, roles),
            _faster(
                cells,
                direction,
                roles.flash,
                roles.standard,
                "FlashAttention is faster than standard attention",
            ),
            _crossover(cells, direction, roles),
            _sparse_ahead(cells, direction, roles),
            *_memory_saved(cells, direction, roles),
        ]
    return found


def rows(found: Sequence[Finding]) -> list[tuple[str, ...]]:
    said = {True: "holds", False: "does not hold", None: "open"}
    return [(one.claim, DIRECTION_TITLES[one.direction], said[one.holds], one.evidence) for one in found]


def _linear_memory(cells: pd.DataFrame, direction: str, roles: Roles) -> Finding:
    exponents = {impl: _memory_exponent(cells, impl) for impl in (roles.flash, roles.standard)}
    flash, standard = exponents[roles.flash], exponents[roles.standard]
    told = [f"{impl} N^{value:.2f}" for impl, value in exponents.items() if value is not None]
    holds = None if flash is None else flash <= LINEAR_UP_TO and (standard is None or standard > flash)
    return Finding(
        "FlashAttention's memory is linear in the sequence length", direction, holds, ", ".join(told)
    )


def _memory_exponent(cells: pd.DataFrame, impl: str) -> float | None:
    """Slope of log peak memory over the longer half of the lengths that it completed, three at least."""
    memory = _by_length(cells, impl)["peak_mib"].dropna()
    memory = memory[memory > 0]
    longest = memory.iloc[-max(3, len(memory) // 2) :]
    if len(longest) < 3:
        return None
    return float(np.polyfit(np.log(longest.index.to_numpy(float)), np.log(longest.to_numpy(float)), 1)[0])


def _memory_saved(cells: pd.DataFrame, direction: str, roles: Roles) -> list[Finding]:
    both = _by_length(cells, roles.standard)["peak_mib"] / _by_length(cells, roles.flash)["peak_mib"]
    both = both.replace(np.inf, np.nan).dropna()
    if both.empty:
        return []
    claim = "FlashAttention needs up to 20 times less memory than exact baselines"
    most, where = float(both.max()), length_text(both.idxmax())
    return [
        Finding(
            claim, direction, most >= 20, f"{figure(most)}× less at {where}, the longest that both finish"
        )
    ]


def _faster(cells: pd.DataFrame, direction: str, one: str, other: str, claim: str) -> Finding:
    ratios = {n: r for n in _lengths(cells) if (r := _speedup(cells, n, one, other)) is not None}
    if not ratios:
        return Finding(claim, direction, None, f"{one} and {other} completed no length in common")
    told = ", ".join(f"{length_text(n)} {figure(r)}×" for n, r in ratios.items())
    return Finding(claim, direction, all(r > 1 for r in ratios.values()), told)


def _crossover(cells: pd.DataFrame, direction: str, roles: Roles) -> Finding:
    """The paper: approximations begin to win between 512 and 2k tokens, where their linear cost crosses. One crosses at
    the shortest length from which on it is ahead."""
    claim = "approximate attention crosses FlashAttention between 512 and 2k tokens"
    crossings: dict[str, int | None] = {}
    for impl in _approximations(cells, roles):
        ratios = {n: r for n in _lengths(cells) if (r := _speedup(cells, n, impl, roles.flash)) is not None}
        if ratios:
            behind = max((n for n, ratio in ratios.items() if ratio <= 1), default=0)
            crossings[impl] = min((n for n in ratios if n > behind), default=None)
    if not crossings:
        return Finding(claim, direction, None, f"{roles.flash} met no approximation")
    told = ", ".join(f"{impl} {length_text(n) if n else 'never'}" for impl, n in crossings.items())
    holds = all(n is not None and 512 <= n <= 2048 for n in crossings.values())
    return Finding(claim, direction, holds, f"ahead from: {told}")


def _sparse_ahead(cells: pd.DataFrame, direction: str, roles: Roles) -> Finding:
    claim = "block-sparse FlashAttention is faster than every approximate method at every length"
    behind, compared = [], 0
    for n in _lengths(cells):
        for impl in _approximations(cells, roles):
            ratio = _speedup(cells, n, roles.block_sparse, impl)
            compared += ratio is not None
            if ratio is not None and ratio <= 1:
                behind.append(f"{impl} at {length_text(n)} ({figure(1 / ratio)}×)")
    if not compared:
        return Finding(claim, direction, None, f"{roles.block_sparse} met no approximation")
    told = f"of {compared} pairs, behind in {len(behind)}"
    return Finding(claim, direction, not behind, f"{told}: {', '.join(behind)}" if behind else told)


def _approximations(cells: pd.DataFrame, roles: Roles) -> list[str]:
    rough = cells.loc[cells["approximate"].fillna(value=False), "impl"].unique()
    return sorted(set(rough) - {roles.block_sparse})


def _lengths(cells: pd.DataFrame) -> list[int]:
    return sorted(cells["seqlen_k"].unique())


def _by_length(cells: pd.DataFrame, impl: str) -> pd.DataFrame:
    return cells[cells["impl"] == impl].set_index("seqlen_k").sort_index()


def _speedup(cells: pd.DataFrame, length: int, one: str, other: str) -> float | None:
    """Time of ``other`` over that of ``one``, paired by round; None where either has none."""
    here = cells[cells["seqlen_k"] == length].set_index("impl")["round_ms"]
    if one not in here or other not in here or here[one] is None or here[other] is None:
        return None
    return stats.ratio(here[other], here[one]).value
