"""``bench compare``: two runs, or two implementations of one run, cell by cell."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.harness.cli import left_out, options
from attnbench.harness.run.errors import RunError, make_folder, write_files

if TYPE_CHECKING:
    from attnbench.harness.gate.compare import Change
    from attnbench.harness.gate.decision import Bounds
    from attnbench.harness.report.load import Run

COLUMNS = ("", "implementation", "problem", "A ms", "B ms", "change", "95%", "cycles", "95%")


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of a run; with --run, an implementation.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared with A: another of the same.")],
    run: Annotated[Path | None, typer.Option(help="A and B are implementations of this run.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Implementations, of two runs.")] = None,
    only_changed: Annotated[
        bool, typer.Option("--only-changed", help="Cells surely faster, slower, or of another status.")
    ] = False,
    threshold: Annotated[str, typer.Option(help="Smallest change that matters.")] = "2%",
    output_dir: Annotated[
        Path | None, typer.Option(help="Also write compare.md, compare.json and figures there.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Compare the times of B with those of A: change with 95% interval over rounds, in ms and in SM clock cycles."""
    margin = options.share("--threshold", threshold)
    if run is not None and only:
        raise RunError("--only chooses implementations of two runs; with --run, A and B name them")

    from attnbench.harness.gate import compare as compared
    from attnbench.harness.report.load import LoadError, load_run

    loaded: tuple[Run, ...]
    try:
        if run is None:
            loaded = one, other = load_run(Path(a)), load_run(Path(b))
            changes, notes = compared.runs(one, other, options.split(only)), _notes(one, other)
        else:
            loaded = (one,) = (load_run(run),)
            changes, notes = compared.implementations(one, a, b), []
    except LoadError as error:
        raise RunError(str(error)) from None
    for read in loaded:
        left_out.tell(read.folder, read.problems)
    for note in notes:
        typer.echo(note, err=True)
    total = len(changes)
    if only_changed:
        changes = [change for change in changes if change.changed(math.log1p(margin))]
        typer.echo(
            f"{len(changes)} of {total} cells changed by more than {margin:.2%}, or their status", err=True
        )
    document: dict[str, Any] = {"a": a, "b": b, "run": run and str(run), "threshold": margin, "notes": notes}
    document["cells"] = [_json(change, margin) for change in changes]
    rows = [_row(change, margin) for change in changes]
    if output_dir:
        for path in _write(output_dir, document, rows, changes, margin, f"{b} over {a}"):
            typer.echo(path, err=True)
    if as_json:
        typer.echo(json.dumps(document))
    elif markdown:
        typer.echo(_markdown(rows))
    else:
        from attnbench.harness.cli.show import print_table

        print_table(f"{b} over {a}", COLUMNS, rows)


def _notes(a: Run, b: Run) -> list[str]:
    """Where the two runs were not measured on one thing."""
    found = []
    for name in ("torch", "triton", "driver", "python"):
        one, other = a.environment.get(name), b.environment.get(name)
        if one != other:
            found.append(f"note: {name} is {one} in A and {other} in B")
    for impl_side, run in (("A", a), ("B", b)):
        if any(cell.timing and not cell.timing.renewed for cell in run.cells):
            found.append(f"note: in {impl_side} timed calls came back to inputs that they had had before")
    devices = [{str(d.get("name")) for d in r.environment.get("devices") or []} for r in (a, b)]
    if devices[0] != devices[1]:
        found.append(f"note: A ran on {', '.join(sorted(devices[0]))}, B on {', '.join(sorted(devices[1]))}")
    return [
        *found,
        "note: the two runs were not measured side by side; only rounds within each are resampled",
    ]


def _row(change: Change, margin: float) -> tuple[str, ...]:
    verdict = change.verdict(math.log1p(margin))
    same_status = change.statuses[0] == change.statuses[1]
    word = str(verdict) if verdict else " → ".join(change.statuses[:1] if same_status else change.statuses)
    return (
        word, *change.key, _ms(change.a_ms), _ms(change.b_ms), *_percent(change.ms), *_percent(change.cycles)
    )  # fmt: skip


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(found: Bounds | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    if math.isinf(found.low):
        return f"{math.expm1(found.value):+.2%}", ""
    low, high = math.expm1(found.low), math.expm1(found.high)
    return f"{math.expm1(found.value):+.2%}", f"{low:+.2%} … {high:+.2%}"


def _json(change: Change, margin: float) -> dict[str, Any]:
    def relative(found: Bounds | None) -> dict[str, float | None] | None:
        if found is None:
            return None
        ends = {"change": found.value, "low": found.low, "high": found.high}
        return {name: math.expm1(end) if math.isfinite(end) else None for name, end in ends.items()}

    return {
        "impl": change.key.impl,
        "problem": change.key.problem,
        "verdict": change.verdict(math.log1p(margin)),
        "statuses": change.statuses,
        "reason": change.reason,
        "a_ms": change.a_ms,
        "b_ms": change.b_ms,
        "ms": relative(change.ms),
        "cycles": relative(change.cycles),
    }


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    from attnbench.harness.report.escape import markdown_escape

    lines = [COLUMNS, ("---",) * 3 + ("--:",) * 6, *([markdown_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write(
    folder: Path, document: dict[str, Any], rows: Sequence[Sequence[str]], changes: Sequence[Change], margin: float,
    title: str,
) -> list[Path]:  # fmt: skip
    from attnbench.harness.gate.figures import change_plots

    make_folder(folder)
    files = {"compare.json": json.dumps(document, indent=1).encode() + b"\n"}
    files["compare.md"] = f"# {title}\n\n{_markdown(rows)}\n".encode()
    for plot in change_plots(changes, margin, title):
        for kind, image in plot.encode("png", "svg").items():
            files[f"{plot.name}.{kind}"] = image
    return write_files(folder, files)
