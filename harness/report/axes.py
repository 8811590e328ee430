"""How a run's problems are laid out in a figure: what runs along x, and which panel a problem belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from attnbench.harness.report.tables import length_text

# A line joins problems that differ in nothing but length, save for batch and heads that shrink as length and head_dim
# grow. Each of these, where it varies within a panel, goes into the column's title instead.
SPLIT_ALWAYS = {
    "other_length": "", "dtype": "", "kv_share": "", "head_dim_v": "dv", "dropout_p": "dropout", "scale": "scale",
    "layout": "", "strides": "strides",
}  # fmt: skip
SPLIT_IF_SHARED = {"heads": "heads", "batch": "batch", "case": ""}


@dataclass(frozen=True)
class Layout:
    """cells: the frame with x (a length), row and column of the panel, and problem (a short name) added.

    by_length: whether there is enough to draw against length; else problems are shown one by one, by name.
    """

    cells: pd.DataFrame
    by_length: bool
    x_title: str


def lay_out(table: pd.DataFrame) -> Layout:
    """Panels by head_dim (rows) and mask (columns) against the length that varies, for cells of one direction.

    Where most panels would be left with a single point, as in a suite of single cases, problems are listed by name.
    """
    x, x_title = _length(table)
    other = "seqlen_q" if x == "seqlen_k" else "seqlen_k"
    cells = table.assign(
        x=table[x],
        row=table["head_dim"].map("head_dim {}".format),
        column=table["mask"],
        problem=_problem_names(table),
        kv_share=[_kv_share(heads, kv) for heads, kv in zip(table["heads"], table["kv_heads"], strict=True)],
        other_length=[
            "" if q == k else f"{other[-1]} {length_text(fixed)}"
            for q, k, fixed in zip(table["seqlen_q"], table["seqlen_k"], table[other], strict=True)
        ],
    )
    # A field that follows from head_dim alone, as head_dim_v mostly does, says nothing new within a panel.
    for name, title in SPLIT_ALWAYS.items():
        if cells.groupby(["row", "column"])[name].nunique(dropna=False).max() > 1:
            cells["column"] += _told(cells[name], title)
    for name, title in SPLIT_IF_SHARED.items():
        if cells.groupby(["row", "column", "x"])[name].nunique(dropna=False).max() > 1:
            cells["column"] += _told(cells[name], title)
    points = cells.groupby(["row", "column"])["x"].nunique()
    return Layout(cells, by_length=points.median() >= 2, x_title=x_title)


def _told(values: pd.Series, title: str) -> pd.Series:
    return values.map(
        lambda value: f", {title} {value}".replace("  ", " ") if value not in ("", None) else ""
    )


def _kv_share(heads: int, kv_heads: int) -> str:
    return "" if kv_heads == heads else f"{heads // kv_heads} heads a kv head"


def _problem_names(table: pd.DataFrame) -> list[str]:
    """Short names of the problems, unique within the table."""
    varying = [
        name for name in ("dtype", "dropout_p", "scale", "layout", "strides") if table[name].nunique() > 1
    ]
    names = pd.Series([_problem_name(row, varying) for _, row in table.iterrows()], index=table.index)
    if table["group"].groupby(names).nunique().max() > 1:
        names = names + ", batch " + table["batch"].astype(str) + ", heads " + table["heads"].astype(str)
    if table["group"].groupby(names).nunique().max() > 1:
        names = table["group"]
    return list(names)


def _problem_name(row: pd.Series, varying: list[str]) -> str:
    q, k = length_text(row["seqlen_q"]), length_text(row["seqlen_k"])
    share = _kv_share(row["heads"], row["kv_heads"])
    parts = [
        row["mask"],
        f"hd {row['head_dim']}",
        q if q == k else f"{q} × {k}",
        share,
        *(row[name] for name in varying),
    ]
    return ", ".join(str(part) for part in parts if part not in ("", None))


def _length(table: pd.DataFrame) -> tuple[str, str]:
    if (table["seqlen_q"] == table["seqlen_k"]).all():
        return "seqlen_k", "sequence length"
    if table["seqlen_k"].nunique() >= table["seqlen_q"].nunique():
        return "seqlen_k", "keys (seqlen_k)"
    return "seqlen_q", "queries (seqlen_q)"
