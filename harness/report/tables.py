"""The tables of a report as plain data: one for each metric and direction, ready for any format.

Rows are problems, columns implementations in order of rank. The best of a row is marked, and so is each that cannot be
told from it; a cell without a figure shows its status and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import pandas as pd

from attnbench.harness.masks import KINDS, Mask
from attnbench.harness.problem import DIRECTIONS
from attnbench.harness.report import stats
from attnbench.harness.report.frame import NOT_RECORDED, PROBLEM_KEY
from attnbench.harness.report.metrics import METRICS, Metric
from attnbench.harness.report.ranking import Ranking, rank

DIRECTION_TITLES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward and backward"}
NOT_RUNNABLE = ("UNSUPPORTED", "UNAVAILABLE")
SHORT_REASON = 40
RANKED_BY = {"time": "latency", "memory": "memory"}
"""The metric that orders and marks the implementations for all metrics of its family."""

# Fields of a problem as they head a row, in reading order. A field that is equal everywhere goes to the caption.
ROW_FIELDS = {
    "mask": "mask",
    "head_dim": "head_dim",
    "head_dim_v": "head_dim_v",
    "dtype": "dtype",
    "dropout_p": "dropout",
    "scale": "scale",
    "layout": "layout",
    "strides": "strides",
    "heads": "heads",
    "kv_heads": "kv_heads",
    "batch": "batch",
    "seqlen_q": "seqlen_q",
    "seqlen_k": "seqlen_k",
}
TWINS = {"head_dim_v": "head_dim", "kv_heads": "heads", "seqlen_k": "seqlen_q"}
"""A field that says nothing where it equals another everywhere."""


class Notes:
    """Full reasons, numbered in the order they are first met; equal reasons share a number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers) + 1)

    def __iter__(self) -> Any:
        return iter((number, text) for text, number in self._numbers.items())

    def __len__(self) -> int:
        return len(self._numbers)


@dataclass(frozen=True)
class Entry:
    """One place of a table. text: the figure, or the status. mark: ``best``, ``tied`` (cannot be told from the best)
    or empty. reason: short, of a cell without a figure; its full text is note number ``note``."""

    text: str = "–"
    mark: str = ""
    interval: str = ""
    status: str = ""
    reason: str = ""
    note: int | None = None


@dataclass(frozen=True)
class Table:
    """A metric in one direction. labels: heads of the problem columns. left_out: implementations that could run none
    of these problems, with the number of the note that says why."""

    metric: Metric
    direction: str
    fixed: str
    labels: list[str]
    impls: list[str]
    rows: list[tuple[list[str], list[Entry]]]
    left_out: list[tuple[str, int]]
    baseline: str | None = None

    @property
    def title(self) -> str:
        name = f"{self.metric.title} {self.baseline}" if self.baseline else self.metric.title
        return f"{name} ({self.metric.unit}), {DIRECTION_TITLES[self.direction]}"


@dataclass(frozen=True)
class Tables:
    """Everything tabular in a report."""

    tables: list[Table] = field(default_factory=list)
    rankings: list[Ranking] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)


def build(table: pd.DataFrame, metrics: Sequence[Metric], baseline: str | None = None) -> Tables:
    """Tables and rankings of a run's frame (``with_speedup`` already, if speedup is among the metrics).

    A metric that no cell of a direction has gives no table.
    """
    result = Tables()
    for direction in DIRECTIONS:
        posed = table[table["direction"] == direction]
        shown = [metric for metric in metrics if posed[metric.column].notna().any()]
        rankings = {family: rank(table, METRICS[name], direction) for family, name in RANKED_BY.items()}
        marks = {family: _marks(posed, METRICS[name]) for family, name in RANKED_BY.items()}
        for metric in shown:
            family = metric.family if metric.family in RANKED_BY else "time"
            own = marks.get(metric.family, {})
            result.tables.append(
                _table(posed, metric, direction, rankings[family].order, own, result.notes, baseline)
            )
        families = dict.fromkeys(metric.family for metric in shown)
        result.rankings.extend(rankings[family] for family in families if family in rankings)
    return result


def row_labels(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """What tells the problems of ``table`` apart, as text columns on its index, and what they share, as one line.

    The case, and if need be the group's key, come in only where the problems' own fields leave two of them equal.
    """
    twins = [name for name, twin in TWINS.items() if (table[name] == table[twin]).all()]
    fields = {name: title for name, title in ROW_FIELDS.items() if name not in twins}
    if "seqlen_k" in twins:
        fields["seqlen_q"] = "seqlen"
    text = pd.DataFrame({title: table[name].map(_field_text) for name, title in fields.items()})
    varying = [title for title in text if text[title].nunique() > 1] or [fields["seqlen_q"]]
    shared = [
        f"{title} {text[title].iloc[0]}" for title in text if title not in varying and _said(text[title])
    ]
    labels = text[varying]
    for extra in ("case", "group"):
        if table["group"].groupby([labels[title] for title in labels]).nunique().max() == 1:
            break
        labels = labels.assign(**{extra: table[extra]})
    return labels, ", ".join(shared)


def in_reading_order(cells: pd.DataFrame) -> pd.DataFrame:
    """Sorted as a reader expects: full before causal before the rest, then from small to large, lengths last."""
    fields = [
        "mask",
        "head_dim",
        "head_dim_v",
        "dtype",
        "dropout_p",
        "heads",
        "kv_heads",
        "seqlen_q",
        "seqlen_k",
    ]
    kinds = {label: f"{KINDS.index(Mask.parse(label).kind)} {label}" for label in cells["mask"].unique()}
    order = cells[fields].assign(mask=cells["mask"].map(kinds)).sort_values(fields, kind="stable").index
    return cells.loc[order]


def _said(values: pd.Series) -> bool:
    return values.iloc[0] not in ("", "default", "0", "bshd")


def _field_text(value: Any) -> str:
    if pd.isna(value):
        return "default"
    if isinstance(value, Integral):
        return length_text(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def length_text(value: float) -> str:
    """4096 as 4k; below 1024 or between, the number itself."""
    whole = int(value)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else f"{whole}"


def _table(
    posed: pd.DataFrame,
    metric: Metric,
    direction: str,
    order: list[str],
    marks: dict[tuple[str, str], str],
    notes: Notes,
    baseline: str | None,
) -> Table:
    labels, shared = row_labels(posed)
    impls = [impl for impl in order if not _never_ran(posed, impl)]
    rows = []
    for index, problem in in_reading_order(posed.drop_duplicates(PROBLEM_KEY)).iterrows():
        cells = posed[posed["group"] == problem["group"]].set_index("impl").to_dict("index")
        rows.append((list(labels.loc[index]), _entries(cells, impls, metric, marks, notes)))
    left_out = [(impl, notes.number(_why_never(posed, impl))) for impl in order if impl not in impls]
    shown_baseline = baseline if metric.name == "speedup" else None
    return Table(metric, direction, shared, list(labels.columns), impls, rows, left_out, shown_baseline)


def _never_ran(posed: pd.DataFrame, impl: str) -> bool:
    return bool(posed.loc[posed["impl"] == impl, "status"].isin((*NOT_RUNNABLE, NOT_RECORDED)).all())


def _why_never(posed: pd.DataFrame, impl: str) -> str:
    own = posed[posed["impl"] == impl]
    own = own[own["status"] != NOT_RECORDED] if (own["status"] != NOT_RECORDED).any() else own
    return "; ".join(
        dict.fromkeys(f"{status}: {reason}" for status, reason in own[["status", "reason"]].to_numpy())
    )


def _entries(
    cells: Mapping[str, dict[str, Any]],
    impls: list[str],
    metric: Metric,
    marks: dict[tuple[str, str], str],
    notes: Notes,
) -> list[Entry]:
    """cells: rows of the frame by implementation."""
    found = []
    for impl in impls:
        if impl not in cells:
            found.append(Entry(status=NOT_RECORDED))
            continue
        cell = cells[impl]
        if cell["status"] == NOT_RECORDED:
            found.append(Entry(NOT_RECORDED, status=NOT_RECORDED))
        elif cell["status"] != "OK":
            note = notes.number(f"{cell['status']}: {cell['reason']}")
            found.append(
                Entry(cell["status"], status=cell["status"], reason=_short(cell["reason"]), note=note)
            )
        elif pd.isna(cell[metric.column]):
            found.append(Entry(status="OK"))
        else:
            mark = marks.get((cell["group"], impl), "")
            beside = f" {cell[metric.beside]}" if metric.beside else ""
            text = f"{figure(cell[metric.column])}{beside}"
            found.append(Entry(text, mark, _interval(cell, metric), "OK"))
    return found


def _marks(posed: pd.DataFrame, metric: Metric) -> dict[tuple[str, str], str]:
    """Best and tied by (group, implementation). Of timed figures, one is tied when the interval of its ratio to the
    best, paired by round, holds 1 (drift of the card is in both, and cancels); of memory, when it reads the same."""
    marks: dict[tuple[str, str], str] = {}
    exact = ~posed["approximate"].fillna(value=False)
    done = posed[(posed["status"] == "OK") & posed[metric.column].notna() & exact]
    for group, cells in done.groupby("group"):
        if len(cells) < 2:
            continue
        own = cells.set_index("impl")
        best = own[metric.column].idxmin()
        marks[group, best] = "best"
        for impl in own.index.drop(best):
            if metric.family == "time":
                against = stats.ratio(own.at[impl, "round_ms"], own.at[best, "round_ms"])
                tied = (
                    against.low is not None and against.high is not None and against.low <= 1 <= against.high
                )
            else:
                tied = figure(own.at[impl, metric.column]) == figure(own.at[best, metric.column])
            if tied:
                marks[group, impl] = "tied"
    return marks


def _interval(cell: dict[str, Any], metric: Metric) -> str:
    if metric.low not in cell or pd.isna(cell[metric.low]):
        return ""
    return f"{figure(cell[metric.low])} to {figure(cell[metric.high])}"


def figure(value: float) -> str:
    """Three significant digits, without an exponent from 0.001 up."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}" if abs(value) >= 1e-3 else f"{value:.2e}"


def _short(reason: str) -> str:
    first = reason.splitlines()[0] if reason else ""
    return first if len(first) <= SHORT_REASON else first[: SHORT_REASON - 1].rstrip() + "…"
