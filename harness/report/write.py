"""Writes what a run's records say: tables, a report and plots, into the run's own folder unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench.harness.report import render
from attnbench.harness.report.drawing import drawing
from attnbench.harness.report.frame import frame, with_speedup
from attnbench.harness.report.load import Run, load_run
from attnbench.harness.report.metrics import Metric, did_you_mean, metrics_named
from attnbench.harness.report.plots import Plot, plots
from attnbench.harness.report.summary import summarise
from attnbench.harness.report.tables import build
from attnbench.harness.run.errors import make_folder, write_files, writing

if TYPE_CHECKING:
    import pandas as pd

FILES = {"md": "tables.md", "csv": "tables.csv", "tex": "tables.tex", "html": "report.html"}
WITH_FIGURES = ("md", "html")
PLOTS = "plots"
MOST_FILE_BYTES = 2_000_000


def write_report(
    run_folder: Path,
    *,
    formats: Sequence[str] | None = None,
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
    out: Path | None = None,
    draw: bool = True,
) -> list[Path]:
    """Writes the tables of a run in ``formats`` (keys of FILES; None: all) under ``out`` (None: the run's folder), and
    its figures under ``plots`` there, if one of the formats shows figures. Called at the end of each run, too.

    baseline: implementation the speed-ups are over; without one there is no speed-up. metrics: names out of METRICS,
    None for the default ones. draw: False leaves the figures as they are; Markdown names them, HTML goes without.
    ValueError for an unknown name, LoadError for a folder without records.
    """
    chosen = list(FILES) if formats is None else list(dict.fromkeys(formats))
    for kind in chosen:
        if kind not in FILES:
            raise ValueError(f"unknown format {kind!r}{did_you_mean(kind, list(FILES))}")
    with_figures = bool(set(chosen) & set(WITH_FIGURES))
    with drawing(None if with_figures and draw else 1) as begin:
        run, table, shown = _read(run_folder, baseline, metrics)
        folder = make_folder(out or run.folder)
        figures = list(plots(table, shown, baseline)) if with_figures else []
        encoded = begin(figures if draw else [])
        tables, summary = build(table, shown, baseline), summarise(run, table)
        images = list(zip(figures, encoded(), strict=False))
    named = [(figure.title, Path(PLOTS, f"{figure.name}.png")) for figure in figures]
    embedded = [(figure.title, files) for figure, files in images]
    write = {
        "md": lambda: render.markdown(tables, summary, named),
        "csv": lambda: render.csv(table),
        "tex": lambda: render.latex(tables, summary),
        "html": lambda: render.html(tables, summary, embedded, MOST_FILE_BYTES),
    }
    for kind in chosen:
        text = write[kind]()
        with writing(folder / FILES[kind]):
            (folder / FILES[kind]).write_text(text, encoding="utf-8")
    return [folder / FILES[kind] for kind in chosen] + _write_images(images, folder / PLOTS)


def write_plots(
    run_folder: Path,
    *,
    metrics: Sequence[str] | None = None,
    out: Path | None = None,
    baseline: str | None = None,
) -> list[Path]:
    """Writes the figures of a run as PNG and SVG under ``out`` (None: plots/ in the run's folder); see write_report."""
    with drawing() as begin:
        run, table, chosen = _read(run_folder, baseline, metrics)
        folder = make_folder(out or run.folder / PLOTS)
        figures = list(plots(table, chosen, baseline))
        images = list(zip(figures, begin(figures)(), strict=True))
    return _write_images(images, folder)


def _read(
    run_folder: Path, baseline: str | None, metrics: Sequence[str] | None
) -> tuple[Run, pd.DataFrame, list[Metric]]:
    chosen = metrics_named(metrics)
    run = load_run(run_folder)
    table = frame(run)
    if baseline is None:
        if metrics is not None and "speedup" in metrics:
            raise ValueError("metric speedup needs a baseline implementation (--baseline)")
        return run, table, [metric for metric in chosen if metric.name != "speedup"]
    return run, with_speedup(table, baseline), chosen


def _write_images(images: list[tuple[Plot, dict[str, bytes]]], out: Path) -> list[Path]:
    if images:
        make_folder(out)
    return write_files(
        out, {f"{plot.name}.{kind}": content for plot, kinds in images for kind, content in kinds.items()}
    )
