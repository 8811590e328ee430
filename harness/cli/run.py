"""``bench run``: options to a plan, a plan to a run, a run to tables and plots."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.harness.cli import machine, options
from attnbench.harness.cli.resume import Recorded, read_recorded
from attnbench.harness.registry import entries
from attnbench.harness.run import journal
from attnbench.harness.run.errors import Exit, RunError, unknown_word
from attnbench.harness.run.gpus import visible_gpus
from attnbench.harness.run.plan import Filters, GroupPlan, make_plan, merge_plans, select_impls
from attnbench.harness.run.progress import make_progress
from attnbench.harness.run.record import Cell, Status
from attnbench.harness.run.suite import load_suite, read_suite, suite_names

if TYPE_CHECKING:
    from attnbench.harness.run.runner import RunOptions, RunSummary

FAILED = (Status.INCORRECT, Status.CRASHED, Status.TIMEOUT, Status.ERROR)
Words = list[str] | None
_select = partial(typer.Option, rich_help_panel="What to run")
_measure = partial(typer.Option, rich_help_panel="How to measure")
_output = partial(typer.Option, rich_help_panel="Where to and how loud")

RESUME = "Go on with the run in this folder; with --suite or filters, add their groups to it."
ANYWAY = "Go on though GPU model, commit or a library differ; the report says so."
DEVICE = "cpu, cuda, or cuda:0,cuda:1 to spread the groups (default the first GPU, else cpu)."


def run(
    suite: Annotated[str | None, _select(help="A built-in suite, or the path of a .toml file.")] = None,
    only: Annotated[Words, _select(help="Implementations to run: a,b or 'sdpa-*'.")] = None,
    skip: Annotated[Words, _select(help="Implementations to leave out.")] = None,
    mode: Annotated[Words, _select(help="fwd, bwd, fwd_bwd.")] = None,
    dtype: Annotated[Words, _select(help="bf16, fp16, fp32, fp64.")] = None,
    seqlen: Annotated[Words, _select(help="1k,8k: the longer of the two sequences.")] = None,
    headdim: Annotated[Words, _select(help="64,128.")] = None,
    causal: Annotated[str | None, _select(help="true, false or both.")] = None,
    resume: Annotated[Path | None, _select(metavar="RUN_DIR", help=RESUME)] = None,
    resume_anyway: Annotated[bool, _select("--resume-anyway", help=ANYWAY)] = False,
    device: Annotated[Words, _measure(help=DEVICE)] = None,
    rounds: Annotated[int | None, _measure(help="Interleaved rounds (default 5).", min=1)] = None,
    samples: Annotated[int | None, _measure(help="Samples a round (default 5).", min=1)] = None,
    time_limit: Annotated[
        float | None, _measure(help="Seconds a worker may take to answer (default 120).", min=1.0)
    ] = None,
    hot: Annotated[bool | None, _measure("--hot", help="Leave the L2 cache as it is.")] = None,
    cudagraph: Annotated[bool | None, _measure("--cudagraph", help="Time CUDA graph replays.")] = None,
    energy: Annotated[
        bool, _measure("--energy", help="Count joules too: two seconds of calls a cell, on a GPU.")
    ] = False,
    no_memory: Annotated[bool, _measure("--no-memory", help="Leave out the memory peaks.")] = False,
    seed: Annotated[int | None, _measure(help="Of inputs and order (default 0).")] = None,
    keep_going: Annotated[
        bool | None, _measure("--keep-going/--fail-fast", help="After a failed cell (default keep going).")
    ] = None,
    output_dir: Annotated[
        Path | None, _output(help="Folder of the run (default results/<device>/<date>-<commit>).")
    ] = None,
    baseline: Annotated[str | None, _output(help="Implementation that speed-ups are relative to.")] = None,
    metrics: Annotated[Words, _output(help="latency,tflops,speedup,memory ...")] = None,
    as_json: Annotated[bool, _output("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, _output("--quiet", "-q", help="Errors alone on stderr.")] = False,
    verbose: Annotated[bool, _output("--verbose", "-v", help="Every cell and phase.")] = False,
) -> None:
    """Judge and time implementations on a suite; print the paths of the records, tables and plots written."""
    filters = options.filters(dtype, seqlen, headdim, causal, mode)
    chosen_metrics = options.metrics(metrics, baseline)
    if resume_anyway and not resume:
        raise RunError("--resume-anyway: name the run's folder with --resume")
    recorded = read_recorded(resume) if resume else None
    gpus = visible_gpus()
    devices = machine.choose_devices(options.split(device) or (recorded.devices if recorded else ()), gpus)
    given: dict[str, Any] = {
        "seed": seed, "rounds": rounds, "samples": samples, "hot": hot, "cudagraph": cudagraph,
        "memory": False if no_memory else None, "time_limit_s": time_limit, "energy": energy or None,
        "fail_fast": None if keep_going is None else not keep_going,
    }  # fmt: skip
    if cudagraph and "cpu" in devices:
        raise RunError("--cudagraph needs a CUDA device, and this run is on cpu")
    if recorded:
        recorded.check_device(devices)
        if not resume_anyway:
            recorded.check_ground(devices, gpus)
        given = recorded.options_with(given)
        if (only or skip) and suite is None and filters == Filters():
            raise RunError(f"--only and --skip: the groups of {resume} keep their implementations; with --suite or a "
                           "filter they choose those of the groups to add")  # fmt: skip
    impls = _impls(suite, only, skip, recorded)
    plans = _plans(suite, impls, filters, devices, given["seed"] or 0, recorded)
    planned = list(dict.fromkeys(impl for plan in plans for impl in plan.impls))
    if baseline and baseline not in planned:
        raise RunError(f"--baseline: {unknown_word('implementation', baseline, planned)}")
    folder = _folder(output_dir, resume) or machine.default_output(devices, gpus)

    from attnbench.harness.run.runner import RunOptions

    said = {name: value for name, value in given.items() if value is not None}
    command = ("bench", *sys.argv[1:])
    summary = _complete(plans, RunOptions(devices, folder, command=command, **said), quiet, verbose)
    if not quiet:
        typer.echo(_in_words(summary), err=True)

    files = [*journal.parts(folder), folder / "environment.json"]
    try:
        from attnbench.harness.report.write import write_report

        files += write_report(folder, baseline=baseline, metrics=chosen_metrics)
    except KeyboardInterrupt:
        why = f"interrupted; all is recorded, and told by: bench report {folder}"
        raise RunError(why, Exit.INTERRUPTED) from None
    counts = _answers(folder)
    code = exit_code(counts)
    if as_json:
        document = {
            "folder": folder,
            "counts": counts,
            "exit_code": int(code),
            "files": files,
            "this_call": dataclasses.asdict(summary),
        }
        typer.echo(json.dumps(document, default=str))
    else:
        typer.echo("\n".join(map(str, files)))
    raise typer.Exit(code)


def exit_code(counts: Mapping[str, int]) -> Exit:
    """What a run with these cells by status exits with; a wrong answer says more than that none was right."""
    if any(counts.get(status) for status in FAILED):
        return Exit.CELLS
    return Exit.OK if counts.get(Status.OK) else Exit.NOTHING


def _answers(folder: Path) -> Counter[str]:
    """Cells by status of the whole run, with what an earlier call recorded."""
    records, _ = journal.read(folder)
    return Counter(record.status for record in records if isinstance(record, Cell))


def _impls(suite: str | None, only: Words, skip: Words, recorded: Recorded | None) -> tuple[str, ...]:
    """Approximations take part where the suite says so, and where they are named."""
    chosen, left_out = options.split(only), options.split(skip)
    # Groups added to a run meet the implementations that its other groups met, unless told otherwise.
    if recorded and not chosen and not left_out:
        return recorded.plans[0].impls
    wanted = bool(chosen) or (suite is not None and read_suite(suite).approximations)
    return select_impls([*entries(), *(entries(approximate=True) if wanted else ())], chosen, left_out)


def _plans(
    suite: str | None,
    impls: tuple[str, ...],
    filters: Filters,
    devices: tuple[str, ...],
    seed: int,
    recorded: Recorded | None,
) -> list[GroupPlan]:
    if recorded and suite is None:
        if filters == Filters():
            return list(recorded.plans)
        suite = recorded.only_suite()
    if suite is None:
        raise RunError(f"name a suite: --suite {' | '.join(suite_names())}, or the path of a .toml file")
    kind = devices[0].partition(":")[0]
    added = make_plan(load_suite(suite, kind), impls, seed=seed, only_filters=filters)
    return merge_plans(recorded.plans, added) if recorded else added


def _folder(output_dir: Path | None, resume: Path | None) -> Path | None:
    if resume and output_dir and output_dir.resolve() != resume.resolve():
        raise RunError("--output-dir: a resumed run stays in its folder; leave one of the two options out")
    if output_dir and not resume and (output_dir / "plan.json").exists():
        raise RunError(f"{output_dir} holds a run already; go on with --resume {output_dir}, or name another")
    return resume or output_dir


def _complete(plans: list[GroupPlan], run_options: RunOptions, quiet: bool, verbose: bool) -> RunSummary:
    from attnbench.harness.run import runner

    try:
        with make_progress(quiet=quiet, verbose=verbose) as progress:
            return runner.run(plans, run_options, progress)
    except KeyboardInterrupt:
        folder = run_options.output
        begun = (folder / "plan.json").exists()
        what = f"go on with: bench run --resume {folder}" if begun else "nothing was recorded yet"
        raise RunError(f"interrupted; {what}", Exit.INTERRUPTED) from None


def _in_words(summary: RunSummary) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in summary.counts.items() if count)
    phases: dict[str, Any] = dict(sorted(summary.phases.items(), key=lambda item: -item[1]))
    whole = sum(phases.values())
    shares = ", ".join(f"{name} {100 * seconds / whole:.0f}%" for name, seconds in phases.items() if seconds)
    skipped = f"; {summary.skipped} groups were complete already" if summary.skipped else ""
    return f"{counts or 'no cells'} in {summary.wall_s:.1f} s{f' ({shares})' if shares else ''}{skipped}"
