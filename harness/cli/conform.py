"""``bench conform``: what implementations declare, held against what they do."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.harness.cli import machine, options
from attnbench.harness.cli.resume import check_ground
from attnbench.harness.cli.run import ANYWAY
from attnbench.harness.registry import entries
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.gpus import Gpu, visible_gpus
from attnbench.harness.run.plan import select_impls

if TYPE_CHECKING:
    from attnbench.harness.conform.case import Case
    from attnbench.harness.conform.examination import Examination
    from attnbench.harness.conform.known import Known
    from attnbench.harness.conform.matrix import Total
    from attnbench.harness.conform.records import Recorded, Recorder
    from attnbench.harness.conform.reproduce import Reproducer
    from attnbench.harness.conform.verdict import Finding, Pair

Words = list[str] | None
_select = partial(typer.Option, rich_help_panel="What to examine")
_examine = partial(typer.Option, rich_help_panel="How to examine")
_output = partial(typer.Option, rich_help_panel="Where to and how loud")

LEAST_TOLD_S = 0.05
RESUME = "Go on with the run in this folder: what it found is kept, what it did not examine is asked."
KNOWN = (
    "TOML file of failures that are known, with reasons: told apart, and none of the run's failures (README)."
)
SHRINK_BUDGET = "Seconds of shrinking and of running scripts in all; what they do not reach, --resume shows."
BUDGET = "Seconds of examining; what is not answered by then is named as not examined, and --resume asks it."


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
    resumed: Annotated[Path | None, _select("--resume", metavar="RUN_DIR", help=RESUME)] = None,
    resume_anyway: Annotated[bool, _select("--resume-anyway", help=ANYWAY)] = False,
    device: Annotated[
        str | None, _examine(help="cpu, cuda or cuda:N (default the first GPU, else cpu).")
    ] = None,
    jobs: Annotated[
        int | None, _examine(help="Workers side by side (default: cores, twice as many for a GPU).", min=1)
    ] = None,
    time_limit: Annotated[float, _examine(help="Seconds a case may take.", min=1.0)] = 120.0,
    budget: Annotated[float | None, _examine(help=BUDGET, min=1.0)] = None,
    scripts: Annotated[
        int,
        _output(help="Failures an implementation that are shrunk and shown by a script (0: none).", min=0),
    ] = 3,
    shrink_seconds: Annotated[
        float, _output(help="Seconds that shrinking one failure may take.", min=0.0)
    ] = 90.0,
    shrink_budget: Annotated[float | None, _output(help=SHRINK_BUDGET, min=0.0)] = None,
    known: Annotated[Path | None, _output(metavar="FILE", help=KNOWN)] = None,
    output_dir: Annotated[
        Path | None,
        _output(help="Folder of the records (default results/conformance/<device>/<date>-<commit>)."),
    ] = None,
    as_json: Annotated[bool, _output("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, _output("--quiet", "-q", help="Errors alone on stderr.")] = False,
) -> None:
    """Hold implementations to what they declare: every case a known bug or a question, every verdict with evidence."""
    from attnbench.harness.conform.examination import Examination, jobs_for
    from attnbench.harness.conform.known import read_known
    from attnbench.harness.conform.records import Recorder, read
    from attnbench.harness.conform.suite import select

    if resume_anyway and not resumed:
        raise RunError("--resume-anyway: name the run's folder with --resume")
    faults = read_known(known) if known else []
    gpus = visible_gpus()
    words = options.split([device] if device else None)[:1]
    before = None
    if resumed:
        given = {"--impl": impl, "--skip": skip, "--suite": suite, "--case": case, "--nightly": nightly,
                 "--seeds": seeds > 1, "--list": list_cases}  # fmt: skip
        before = _before(resumed, given, output_dir)
        where = _where(before, words, gpus, anyway=resume_anyway)
        cases, impls, folder = list(before.cases.values()), before.impls, resumed
    else:
        (where,) = machine.choose_devices(words, gpus)
        kind = where.partition(":")[0]
        cases = select(options.split(suite), kind, nightly=nightly, only=tuple(case or ()), seeds=seeds)
        if list_cases:
            typer.echo("\n".join(_listed(cases)))
            return
        impls = select_impls(entries(), options.split(impl), options.split(skip), "--impl")
        folder = output_dir or machine.default_output((where,), gpus, Path("results", "conformance"))
    recorder = Recorder(folder)
    shrink_all = math.inf if shrink_budget is None else shrink_budget
    how = _How(
        jobs or jobs_for(where), budget or math.inf, scripts, shrink_seconds, shrink_all, faults, quiet
    )
    with Examination(where, cases, time_limit_s=time_limit) as examination:
        command = ("bench", *sys.argv[1:])
        if before:
            recorder.reopen(before, command, examination.facts)
        else:
            recorder.open(cases, command, examination.facts, impls=impls)
        try:
            _run(examination, recorder, impls, cases, before.found if before else (), how)
        except KeyboardInterrupt:
            go_on = f"findings so far are in {folder}; go on with: bench conform --resume {folder}"
            raise RunError(f"interrupted; {go_on}", Exit.INTERRUPTED) from None
    recorded = read(folder)
    code = exit_code(recorded, faults)
    if recorded.unexamined:
        count = len(recorded.unexamined)
        how.tell(f"{count} not examined; go on with: bench conform --resume {folder}")
    _print(recorded, faults, code, as_json=as_json)
    raise typer.Exit(code)


def exit_code(recorded: Recorded, known: Collection[Known] = ()) -> Exit:
    """1 where something failed that is not known, else 5 where a fault of the machine kept a case from being examined,
    130 where anything else did, 3 where not one case was answered."""
    from attnbench.harness.conform.known import is_new
    from attnbench.harness.conform.verdict import Verdict

    if any(is_new(finding, known) for finding in recorded.findings):
        return Exit.CELLS
    if recorded.faults:
        return Exit.MACHINE
    if recorded.unexamined:
        return Exit.INTERRUPTED
    passed = any(finding.verdict is Verdict.PASS for finding in recorded.findings)
    return Exit.OK if passed else Exit.NOTHING


@dataclass(frozen=True)
class _How:
    """How to examine, and what to tell of it on stderr."""

    jobs: int
    budget_s: float
    scripts: int
    shrink_s: float
    shrink_all_s: float
    known: Collection[Known]
    quiet: bool

    def tell(self, line: str) -> None:
        if not self.quiet:
            typer.echo(line, err=True)


def _run(
    examination: Examination,
    recorder: Recorder,
    impls: Sequence[str],
    cases: Sequence[Case],
    found: Collection[Pair],
    how: _How,
) -> None:
    """Examines, then shows what failed; tells how long each took."""
    from attnbench.harness.conform.dealing import examine_all
    from attnbench.harness.conform.known import is_new

    def take(finding: Finding) -> None:
        recorder.append(finding)
        if is_new(finding, how.known) or not finding.asked:
            how.tell(_line(finding))

    begin = time.monotonic()
    examine_all(examination, impls, cases, how.jobs, take, budget_s=how.budget_s, found=found)
    examined = time.monotonic()
    _show(examination, recorder, how)
    how.tell(_phases({"examining": examined - begin, "shrinking and scripts": time.monotonic() - examined}))


def _before(folder: Path, given: Mapping[str, object], output_dir: Path | None) -> Recorded:
    """The run to go on with; RunError where what is ``given`` would make another one of it."""
    from attnbench.harness.conform.records import read

    if told := [name for name, value in given.items() if value]:
        raise RunError(f"{told[0]}: a resumed run keeps its cases and implementations; leave it out")
    if output_dir and output_dir.resolve() != folder.resolve():
        raise RunError("--output-dir: a resumed run stays in its folder; leave one of the two options out")
    return read(folder)


def _where(before: Recorded, words: Sequence[str], gpus: Sequence[Gpu], *, anyway: bool) -> str:
    """The device to go on with, the run's own if ``words`` name none; RunError where it is of another kind than the
    run's, or the commit or a library is another, unless ``anyway``."""
    devices: list[dict[str, Any]] = before.environment.get("devices") or [{}]
    begun = str(devices[0].get("id", "cpu"))
    (where,) = machine.choose_devices(words or (begun,), gpus)
    if where.partition(":")[0] != begun.partition(":")[0]:
        raise RunError(f"--resume {before.folder}: the run is on {begun}, not {where}")
    if not anyway:
        check_ground(before.folder, (where,), gpus)
    return where


def _show(examination: Examination, recorder: Recorder, how: _How) -> None:
    """Shrinks the failures of the whole run that are not known and were not shrunk before."""
    from attnbench.harness.conform.known import is_new
    from attnbench.harness.conform.records import read
    from attnbench.harness.conform.reproduce import FOLDER, reproduce, worst_first

    recorded = read(recorder.folder)
    shrunk = list(recorded.reproducers)
    shown = {(one["impl"], one["found"]) for one in shrunk}
    new = [finding for finding in recorded.findings if is_new(finding, how.known)]
    chosen = worst_first(new, recorded.cases, how.scripts)

    def keep(one: Reproducer) -> None:
        shrunk.append(one.to_json())
        recorder.reproducers(shrunk)
        how.tell(_shrunk_line(one))

    failures = [failure for failure in chosen if failure[0].pair not in shown]
    if failures:
        of = ", ".join(dict.fromkeys(finding.impl for finding, _ in failures))
        within = f", all within {how.shrink_all_s:g} s" if math.isfinite(how.shrink_all_s) else ""
        how.tell(
            f"to be shrunk, each for at most {how.shrink_s:g} s{within}: {len(failures)} failures of {of}"
        )
    folder, before = recorder.folder / FOLDER, len(shrunk)
    reproduce(examination, failures, folder, how.shrink_s, how.jobs, keep, budget_s=how.shrink_all_s)
    if left := len(failures) - (len(shrunk) - before):
        how.tell(f"{left} failures not shrunk; go on with: bench conform --resume {recorder.folder}")


def _phases(seconds: Mapping[str, float]) -> str:
    """Where the time went, as ``bench run`` tells it."""
    whole = sum(seconds.values())
    told = ((name, spent) for name, spent in seconds.items() if spent >= LEAST_TOLD_S)
    shares = ", ".join(f"{name} {spent:.1f} s, {100 * spent / whole:.0f}%" for name, spent in told)
    return f"{whole:.1f} s ({shares})"


def _print(recorded: Recorded, known: Collection[Known], code: Exit, *, as_json: bool) -> None:
    from attnbench.harness.conform.known import explained, is_new, no_longer_seen
    from attnbench.harness.conform.matrix import totals
    from attnbench.harness.conform.records import CASES
    from attnbench.harness.conform.reproduce import FOLDER
    from attnbench.harness.conform.summary import summary
    from attnbench.harness.run.environment import FILE

    folder = recorded.folder
    shown = [folder / FOLDER / one["script"] for one in recorded.reproducers if one["script"]]
    files = [folder / CASES, *sorted(folder.glob("findings-*.jsonl")), folder / FILE, *shown]
    if not as_json:
        typer.echo("\n".join([*summary(recorded, known), *map(str, files)]))
        return
    found = totals([recorded], known)
    document = {
        "folder": folder,
        "counts": {total.impl: total.verdicts for total in found},
        "bounds": {total.impl: _bound(total) for total in found if total.answered},
        "failures": [f.to_json() for f in recorded.findings if is_new(f, known)],
        "known": [
            dataclasses.asdict(fault) | {"cases": [finding.case for finding in findings]}
            for fault, findings in explained(recorded.findings, known).items()
        ],
        "no_longer_seen": [dataclasses.asdict(fault) for fault in no_longer_seen(recorded.findings, known)],
        "not_examined": recorded.unexamined,
        "machine_faults": [[*pair, why] for pair, why in recorded.faults.items()],
        "exit_code": int(code),
        "files": files,
    }
    typer.echo(json.dumps(document, default=str))


def _bound(total: Total) -> dict[str, float]:
    return {"answered": total.answered, "failed": total.failed, "below_at_95_percent": total.bound}


def _shrunk_line(one: Reproducer) -> str:
    shown = f"shown by {one.script}" if one.script else one.said
    return f"shrunk {one.found.impl} {one.case.id}: {shown}"


def _line(finding: Finding) -> str:
    return f"{finding.word} {finding.impl} {finding.case}: {finding.reason}"


def _listed(cases: Iterable[Case]) -> Iterable[str]:
    for case in cases:
        yield "\t".join([case.id, case.why, " ".join(case.cites)])
