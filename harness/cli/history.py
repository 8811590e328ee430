"""``bench history``: how cells moved over the runs of a folder, and between which runs they changed."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.harness.cli import left_out, options
from attnbench.harness.run.errors import RunError, make_folder, unknown_word, write_files

if TYPE_CHECKING:
    from attnbench.harness.report.history import Course

COLUMNS = ("implementation", "problem", "device", "timed", "runs", "first ms", "last ms", "changes")


def history(
    results: Annotated[
        Path, typer.Argument(metavar="[RESULTS]", help="Folder with runs, at any depth.")
    ] = Path("results"),
    only: Annotated[list[str] | None, typer.Option(help="Implementations: a,b or 'sdpa-*'.")] = None,
    problem: Annotated[
        str | None, typer.Option(help="Problems whose name matches, as in '*q4096*_fwd'.")
    ] = None,
    only_changed: Annotated[bool, typer.Option("--only-changed", help="Cells with a change point.")] = False,
    threshold: Annotated[str, typer.Option(help="Smallest change that counts.")] = "2%",
    output_dir: Annotated[
        Path | None, typer.Option(help="Also write history.json and figures there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show how the time of each cell moved over the runs in a folder, with its change points."""
    least = options.share("--threshold", threshold)

    from attnbench.harness.report import history as courses_of
    from attnbench.harness.report.load import LoadError

    try:
        runs = courses_of.find_runs(results)
    except LoadError as error:
        raise RunError(str(error)) from None
    for run in runs:
        left_out.tell(run.folder, run.problems)
    found = courses_of.courses(runs, least)
    if wanted := options.split(only):
        known = sorted({course.key.impl for course in found})
        for pattern in wanted:
            if not fnmatch.filter(known, pattern):
                raise RunError(f"--only: {unknown_word('implementation', pattern, known)}")
        found = [c for c in found if any(fnmatch.fnmatchcase(c.key.impl, pattern) for pattern in wanted)]
    if problem:
        found = [course for course in found if fnmatch.fnmatchcase(course.key.problem, problem)]
    if only_changed:
        found = [course for course in found if course.changes]
    document = {"threshold": least, "courses": [_json(course) for course in found]}
    if output_dir:
        from attnbench.harness.report.history_plot import history_plots

        make_folder(output_dir)
        files = {"history.json": json.dumps(document, indent=1).encode() + b"\n"}
        for plot in history_plots(found):
            files |= {f"{plot.name}.{kind}": image for kind, image in plot.encode("png", "svg").items()}
        write_files(output_dir, files)
    if as_json:
        typer.echo(json.dumps(document))
        return
    from attnbench.harness.cli.show import print_table

    print_table(f"Time over the runs in {results}", COLUMNS, [_row(course) for course in found])


def _row(course: Course) -> tuple[str, ...]:
    points = course.points
    changes = "; ".join(
        f"{change.change:+.1%} at {points[change.at].run}"
        + (f" ({', '.join(change.differs)})" if change.differs else "")
        for change in course.changes
    )
    key = course.key
    times = f"{points[0].ms:.4g}", f"{points[-1].ms:.4g}"
    return (key.impl, key.problem, key.device, key.way, str(len(points)), *times, changes)


def _json(course: Course) -> dict[str, Any]:
    points = [
        {"run": p.run, "started": p.started, "ms": p.ms, "level_ms": level, "version": p.version, **p.facts}
        for p, level in zip(course.points, course.levels, strict=True)
    ]
    return {
        **course.key._asdict(),
        "points": points,
        "changes": [dataclasses.asdict(change) for change in course.changes],
    }
