"""``bench conform``: what implementations declare, held against what they do."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.harness.cli import machine, options
from attnbench.harness.registry import entries
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.gpus import visible_gpus
from attnbench.harness.run.plan import select_impls

if TYPE_CHECKING:
    from attnbench.harness.conform.case import Case
    from attnbench.harness.conform.reproduce import Reproducer
    from attnbench.harness.conform.verdict import Finding

Words = list[str] | None
_select = partial(typer.Option, rich_help_panel="What to examine")
_examine = partial(typer.Option, rich_help_panel="How to examine")
_output = partial(typer.Option, rich_help_panel="Where to and how loud")


def conform(
    impl: Annotated[Words, _select(help="Implementations: a,b or 'sdpa-*' (default all).")] = None,
    skip: Annotated[Words, _select(help="Implementations to leave out.")] = None,
    suite: Annotated[
        Words, _select(help="Conformance suites, or paths of .toml files (default all).")
    ] = None,
    case: Annotated[Words, _select(help="Keep cases whose id holds this text.")] = None,
    nightly: Annotated[bool, _select("--nightly", help="The larger selection.")] = False,
    seeds: Annotated[int, _select(help="Draws of each case's inputs.", min=1)] = 1,
    list_cases: Annotated[
        bool, _select("--list", help="Print the cases and why they are there; run none.")
    ] = False,
    device: Annotated[
        str | None, _examine(help="cpu, cuda or cuda:N (default the first GPU, else cpu).")
    ] = None,
    jobs: Annotated[
        int | None, _examine(help="Workers side by side (default: cores, twice as many for a GPU).", min=1)
    ] = None,
    time_limit: Annotated[float, _examine(help="Seconds a case may take.", min=1.0)] = 120.0,
    scripts: Annotated[
        int,
        _output(help="Failures an implementation that are shrunk and shown by a script (0: none).", min=0),
    ] = 3,
    shrink_seconds: Annotated[
        float, _output(help="Seconds that shrinking one failure may take.", min=0.0)
    ] = 90.0,
    output_dir: Annotated[
        Path | None,
        _output(help="Folder of the records (default results/conformance/<device>/<date>-<commit>)."),
    ] = None,
    as_json: Annotated[bool, _output("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, _output("--quiet", "-q", help="Errors alone on stderr.")] = False,
) -> None:
    """Hold implementations to what they declare: every case a known bug or a question, every verdict with evidence."""
    from attnbench.harness.conform.examination import Examination, jobs_for
    from attnbench.harness.conform.records import Recorder
    from attnbench.harness.conform.reproduce import FOLDER, reproduce, worst_first
    from attnbench.harness.conform.suite import select

    gpus = visible_gpus()
    (where,) = machine.choose_devices(options.split([device] if device else None)[:1], gpus)
    kind = where.partition(":")[0]
    cases = select(options.split(suite), kind, nightly=nightly, only=tuple(case or ()), seeds=seeds)
    if list_cases:
        typer.echo("\n".join(_listed(cases)))
        return
    impls = select_impls(entries(), options.split(impl), options.split(skip), "--impl")
    folder = output_dir or machine.default_output((where,), gpus, Path("results", "conformance"))
    recorder = Recorder(folder)
    findings: list[Finding] = []

    def take(finding: Finding) -> None:
        recorder.append(finding)
        findings.append(finding)
        if finding.failed and not quiet:
            typer.echo(_line(finding), err=True)

    workers = jobs or jobs_for(where)
    with Examination(where, cases, time_limit_s=time_limit) as examination:
        recorder.open(cases, ("bench", *sys.argv[1:]), examination.facts)
        try:
            examination.run(impls, cases, workers, take)
            chosen = worst_first(findings, cases, scripts)
            shrunk = reproduce(examination, chosen, folder / FOLDER, shrink_seconds, workers)
        except KeyboardInterrupt:
            raise RunError(f"interrupted; findings so far are in {folder}", Exit.INTERRUPTED) from None
    if shrunk:
        recorder.reproducers(shrunk)
        if not quiet:
            typer.echo("\n".join(map(_shrunk_line, shrunk)), err=True)
    files = [folder / "cases.json", *recorder.files.values(), folder / "environment.json"]
    files += [one.script for one in shrunk if one.script]
    code = exit_code(findings)
    _print(impls, findings, folder, files, code, as_json=as_json)
    raise typer.Exit(code)


def exit_code(findings: Iterable[Finding]) -> Exit:
    """1 where something failed, 3 where not one case was answered."""
    from attnbench.harness.conform.verdict import Verdict

    found = list(findings)
    if any(finding.failed for finding in found):
        return Exit.CELLS
    return Exit.OK if any(finding.verdict is Verdict.PASS for finding in found) else Exit.NOTHING


def _print(
    impls: Iterable[str],
    findings: list[Finding],
    folder: Path,
    files: list[Path],
    code: Exit,
    *,
    as_json: bool,
) -> None:
    counts = {name: dict(Counter(f.verdict for f in findings if f.impl == name)) for name in impls}
    if as_json:
        failures = [finding.to_json() for finding in findings if finding.failed]
        document = {
            "folder": folder, "counts": counts, "failures": failures, "exit_code": int(code), "files": files,
        }  # fmt: skip
        typer.echo(json.dumps(document, default=str))
        return
    for name, verdicts in counts.items():
        words = (f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        typer.echo("\t".join([name, *words]))
    typer.echo("\n".join(map(str, files)))


def _shrunk_line(one: Reproducer) -> str:
    shown = f"shown by {one.script}" if one.script else one.said
    return f"shrunk {one.found.impl} {one.case.id}: {shown}"


def _line(finding: Finding) -> str:
    return f"{finding.verdict} {finding.impl} {finding.case}: {finding.reason}"


def _listed(cases: Iterable[Case]) -> Iterable[str]:
    for case in cases:
        yield "\t".join([case.id, case.why, " ".join(case.cites)])
