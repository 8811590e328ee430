"""``bench gate``: two builds of an implementation, judged and timed against each other; the exit code is the
verdict."""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.harness.cli import machine, options
from attnbench.harness.registry import entries
from attnbench.harness.run.errors import MENDABLE, Exit, RunError, make_folder, write_files
from attnbench.harness.run.gpus import visible_gpus
from attnbench.harness.run.plan import make_plan, select_impls
from attnbench.harness.run.suite import load_suite

if TYPE_CHECKING:
    from attnbench.harness.gate.power import Power
    from attnbench.harness.gate.sides import Side

Words = list[str] | None
_sides = partial(typer.Option, rich_help_panel="What to compare")
_select = partial(typer.Option, rich_help_panel="On what")
_measure = partial(typer.Option, rich_help_panel="How surely")
_output = partial(typer.Option, rich_help_panel="Where to and how loud")

DEFECT = 70  # as sysexits.h has it

REF = "A recorded run, an installed path, a virtual environment, a source tree, a wheel, or a git revision of --repo."


# A shared CPU has few quiet rounds, and neighbours that stay for dozens: docs/gate.md says what rounds buy there.
ROUNDS = {"cuda": 16, "cpu": 96}


def gate(
    base: Annotated[
        str, _sides(metavar="REF", help=f"What head is measured against. {REF}", show_default=False)
    ],
    head: Annotated[str, _sides(metavar="REF", help="What may be merged; as --base.", show_default=False)],
    repo: Annotated[Path, _sides(help="Repository that revisions are of.")] = Path(),
    pip: Annotated[
        Words, _sides("--pip-arg", help="Passed on to pip install, e.g. --no-build-isolation.")
    ] = None,
    suite: Annotated[str, _select(help="A built-in suite, or the path of a .toml file.")] = "smoke",
    only: Annotated[
        Words, _select(help="Implementations (default those that base or head register).")
    ] = None,
    mode: Annotated[Words, _select(help="fwd, bwd, fwd_bwd.")] = None,
    dtype: Annotated[Words, _select(help="bf16, fp16, fp32, fp64.")] = None,
    seqlen: Annotated[Words, _select(help="1k,8k: the longer of the two sequences.")] = None,
    headdim: Annotated[Words, _select(help="64,128.")] = None,
    causal: Annotated[str | None, _select(help="true, false or both.")] = None,
    device: Annotated[str | None, _select(help="cpu or cuda:N (default the first GPU, else cpu).")] = None,
    seed: Annotated[int, _select(help="Of inputs and order.")] = 0,
    threshold: Annotated[str, _measure(help="Smallest slowdown that matters.")] = "2%",
    alpha: Annotated[float, _measure(help="Chance that any verdict of the gate is wrong.")] = 0.05,
    looks: Annotated[int, _measure(help="Times that UNSURE cells are measured.", min=1)] = 3,
    pairs: Annotated[int, _measure(help="Fresh process pairs a look.", min=2)] = 5,
    rounds: Annotated[
        int | None, _measure(help="Rounds a pair, half in each order (default 16, on a CPU 96).", min=2)
    ] = None,
    samples: Annotated[int, _measure(help="Samples a round.", min=1)] = 5,
    budget: Annotated[float, _measure(help="Seconds after which no look begins.", min=1.0)] = 600.0,
    time_limit: Annotated[float, _measure(help="Seconds a worker may take to answer.", min=1.0)] = 120.0,
    unsure: Annotated[str, _measure(help="fail (exit 6) or pass (exit 0).")] = "fail",
    output_dir: Annotated[
        Path | None, _output(help="For records and reports (default a new gates/<time>).")
    ] = None,
    as_json: Annotated[bool, _output("--json", help="One JSON document on stdout.")] = False,
    markdown: Annotated[bool, _output("--markdown", help="A pull-request comment on stdout.")] = False,
    junit: Annotated[Path | None, _output(help="Also write JUnit XML to this file.")] = None,
    quiet: Annotated[bool, _output("--quiet", "-q", help="Errors alone on stderr.")] = False,
) -> None:
    """Say whether head is slower than base.

    Exit codes: 0 no regression, 1 regression, 2 bad usage, 3 nothing was measured, 4 wrong answers, 5 the machine is
    unfit (throttled, shared, or too noisy for the threshold), 6 unsure at the end of the budget. 130 is an interrupt,
    70 a defect of the gate itself.
    """
    margin = options.share("--threshold", threshold)
    if not 0 < alpha < 1:
        raise RunError(f"--alpha {alpha:g}: a chance lies between 0 and 1")
    options.known("--unsure", "word", [unsure], ("fail", "pass"))
    if as_json and markdown:
        raise RunError(
            "--json and --markdown both want stdout; the other form is in the output folder anyway"
        )
    filters = options.filters(dtype, seqlen, headdim, causal, mode)
    (on,) = machine.choose_devices([device] if device else [], visible_gpus())
    folder, kind = _free(output_dir), on.partition(":")[0]

    from attnbench.harness.gate import beside, recorded, sides
    from attnbench.harness.gate.procedure import GateOptions, Procedure
    from attnbench.harness.gate.write import write_all

    command = ("bench", *sys.argv[1:])
    with _no_accident_is_a_verdict(), tempfile.TemporaryDirectory(prefix="attnbench-sides-") as scratch:
        given = (("base", base), ("head", head))
        one, other = (sides.resolve(name, ref, repo, Path(scratch), pip or ()) for name, ref in given)
        for place in (folder, *((junit.parent,) if junit else ())):
            make_folder(place)
        if recording := one.recorded or other.recorded:
            chosen = options.split(only)
            runs = [
                side.recorded or beside.record(side, recording, chosen, on, folder / side.name, command)
                for side in (one, other)
            ]
            result = recorded.compare(
                runs[0],
                runs[1],
                only=chosen,
                words=(one.what, other.what),
                threshold=margin,
                alpha=alpha,
                command=command,
            )
        else:
            impls = _impls((one, other), only)
            plans = make_plan(load_suite(suite, kind), impls, seed=seed, only_filters=filters)
            asked = GateOptions(
                device=on, output=folder, rounds=rounds or ROUNDS[kind], threshold=margin, alpha=alpha, looks=looks,
                pairs=pairs, samples=samples, budget_s=budget, time_limit_s=time_limit, seed=seed, command=command,
            )  # fmt: skip
            result = Procedure(
                plans, impls, one, other, asked, lambda line: None if quiet else _say(line)
            ).run()
    texts = write_all(result, folder, unsure_passes=unsure == "pass", junit=junit)
    typer.echo(texts["json" if as_json else "markdown" if markdown else "text"].rstrip("\n"))
    raise typer.Exit(result.exit_code(unsure_passes=unsure == "pass"))


@contextmanager
def _no_accident_is_a_verdict() -> Iterator[None]:
    """An interrupt and a defect of the gate itself have codes of their own: Python's 1 would read as a regression."""
    try:
        yield
    except KeyboardInterrupt:
        raise RunError("interrupted; nothing is known", Exit.INTERRUPTED) from None
    except Exception as error:
        if isinstance(error, RunError) or (isinstance(error, OSError) and error.errno in MENDABLE):
            raise
        traceback.print_exc()
        raise typer.Exit(DEFECT) from None


def _impls(both: Sequence[Side], only: Words) -> tuple[str, ...]:
    """What is compared: what the sides register, or what is named, which this environment may register too."""
    registered = sorted({name for side in both for name in side.impls})
    if chosen := options.split(only):
        return select_impls([*registered, *entries()], chosen, ())
    if not registered:
        raise RunError(
            "neither side registers an implementation (entry point attnbench.impls); name one with --only"
        )
    return tuple(registered)


def _free(output_dir: Path | None) -> Path:
    """A folder of its own for every gate."""
    if output_dir is None:
        return Path("gates", datetime.datetime.now().astimezone().strftime("%Y-%m-%d-%H%M%S.%f")[:-3])
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise RunError(f"--output-dir {output_dir}: not an empty folder, and every gate has one of its own")
    return output_dir


def _say(line: str) -> None:
    typer.echo(line, err=True)


def gate_power(
    banks: Annotated[
        list[Path],
        typer.Argument(metavar="GATE...", help="Folders of gates, or files bank.json.", show_default=False),
    ],
    gates: Annotated[int, _measure(help="Gates to draw.", min=1)] = 300,
    threshold: Annotated[str, _measure(help="Smallest slowdown that matters.")] = "2%",
    alpha: Annotated[float, _measure(help="Chance that any verdict of a gate is wrong.")] = 0.05,
    looks: Annotated[int, _measure(help="Times that UNSURE cells are measured.", min=1)] = 3,
    pairs: Annotated[int, _measure(help="Process pairs a look.", min=2)] = 5,
    output_dir: Annotated[
        Path | None, _output(help="Write bank.json, power.json and the figure there.")
    ] = None,
    as_json: Annotated[bool, _output("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Say how surely gates find a slowdown, from the A/A rounds that earlier gates calibrated with."""
    from attnbench.harness.gate import power
    from attnbench.harness.gate.decision import Design

    bank = power.read_bank(banks)
    if output_dir:
        make_folder(output_dir)
    design = Design(len(bank), options.share("--threshold", threshold), alpha, looks, pairs)
    found = power.power(bank, design, gates)
    document = _power_document(found)
    if output_dir:
        from attnbench.harness.gate.figures import power_plot

        title = f"{gates} gates drawn from {found.calibration.drawn_from}"
        files = {
            "bank.json": json.dumps(power.bank_document(bank)).encode() + b"\n",
            "power.json": json.dumps(document, indent=1).encode() + b"\n",
        }
        for kind, image in power_plot(found.curves, design.threshold, title).encode("png", "svg").items():
            files[f"power.{kind}"] = image
        write_files(output_dir, files)
    if as_json:
        typer.echo(json.dumps(document))
        return
    from attnbench.harness.gate.outcome import calibration_in_words

    typer.echo(calibration_in_words(found.calibration))
    for row in document["cells"]:
        for slowdown, said in row["slowdowns"].items():
            share, same = said["found"] / gates, said["same"] / gates
            line = f"{row['impl']}\t{row['problem']}\t{float(slowdown):.0%} slower\tfound {share:.1%}\tSAME {same:.1%}"
            typer.echo(line)


def _power_document(found: Power) -> dict[str, Any]:
    calibration = found.calibration
    rate = calibration.false_positives
    return {
        "threshold": calibration.design.threshold,
        "alpha": calibration.design.alpha,
        "looks": calibration.design.looks,
        "pairs_a_look": calibration.design.pairs,
        "gates": rate.of,
        "drawn_from": calibration.drawn_from,
        "false_positives": rate.count,
        "false_positive_bound_95": rate.most,
        "unsure": calibration.unsure.count,
        "cells": [
            {
                "impl": key.impl,
                "problem": key.problem,
                "smallest_found_in_4_of_5": calibration.detectable[cell],
                "slowdowns": {
                    str(slowdown): {"found": rates[cell][0].count, "same": rates[cell][1].count}
                    for slowdown, rates in found.table.items()
                },
            }
            for cell, key in enumerate(found.cells)
        ],
    }
