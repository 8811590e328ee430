"""``bench tune``: implementations' own choices measured on this device, and kept for them to read."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.harness.cli import machine, options
from attnbench.harness.cli.show import print_table
from attnbench.harness.contract import Implementation
from attnbench.harness.registry import PluginError, entries, load
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.gpus import visible_gpus
from attnbench.harness.run.plan import make_plan, select_impls
from attnbench.harness.run.suite import load_suite

if TYPE_CHECKING:
    from attnbench.harness.tune.search import Tuned

Words = list[str] | None
_select = partial(typer.Option, rich_help_panel="Problems")
MOST_PROCESSES = 8
"""Each takes half a GB of a GPU for its context."""


def tune(
    only: Annotated[Words, typer.Option(help="Implementations: a,b or 'flash-*'.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Table to write, or to bring up to date; without it, only shown.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default as in run).")] = None,
    rounds: Annotated[
        int, typer.Option(help="Rounds that choose among the finalists, and as many that decide.", min=5)
    ] = 20,
    most: Annotated[int, typer.Option(help="Candidates a problem, the likeliest first.", min=2)] = 32,
    processes: Annotated[
        int | None, typer.Option(help="Compilers side by side (default one a core, at most 8).", min=1)
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for one request to a worker.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of inputs and orders.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The table as JSON on stdout.")] = False,
    suite: Annotated[str, _select(help="Suite, or a path to a .toml file.")] = "long-seq",
    dtype: Annotated[Words, _select(help="fp16, bf16, fp32, fp64.")] = None,
    seqlen: Annotated[Words, _select(help="Sequence lengths: 1k,8k.")] = None,
    headdim: Annotated[Words, _select(help="Head dims: 64,128.")] = None,
    causal: Annotated[str | None, _select(help="true, false or both.")] = None,
    mode: Annotated[Words, _select(help="fwd, bwd.")] = None,
) -> None:
    """Search the configurations of implementations for given problems, on the device at hand.

    A candidate is judged right before it is timed, in interleaved rounds. What is faster than the implementation's own
    choice beyond doubt goes into the table. Implementations read the one that ATTNBENCH_TUNED names.
    """
    say = partial(typer.echo, err=True)
    impls = [name for name in select_impls(entries(), options.split(only), ()) if _chooses(name, say)]
    if not impls:
        raise RunError("none of these implementations lets its configurations be chosen", Exit.NOTHING)
    (chosen,) = machine.choose_devices(options.split([device] if device else None)[:1], visible_gpus())
    filters = options.filters(dtype, seqlen, headdim, causal, mode)
    plans = make_plan(load_suite(suite, chosen.partition(":")[0]), impls, seed=seed, only_filters=filters)

    from attnbench.harness.run import environment
    from attnbench.harness.run.lock import device_lock
    from attnbench.harness.run.referee import Referee
    from attnbench.harness.tune import search, table

    facts = Referee(chosen).do_hello()
    ran_on = environment.gather(
        run="tune", command=("bench", *sys.argv[1:]), suites=(suite,), seed=seed, mode="cold", devices=[facts]
    )
    table.updated(output, (), ran_on)  # refused before anything is measured, if at all
    helpers = processes or min(os.cpu_count() or 1, MOST_PROCESSES)
    tuned: list[Tuned] = []
    with (
        device_lock(str(facts["uuid"])) if "uuid" in facts else nullcontext(),
        tempfile.TemporaryDirectory(prefix="attnbench-tune-") as folder,
    ):
        for impl in impls:
            for one in search.tune(
                impl, plans, chosen, Path(folder), rounds=rounds, most=most, limit_s=time_limit,
                compilers=helpers if helpers > 1 else 0, tell=lambda text: say(f"bench: {text}"),
            ):  # fmt: skip
                tuned.append(one)
                if output:  # after each, so that an early end loses one problem
                    _write(output, table.updated(output, [one], ran_on))
    if as_json:
        typer.echo(json.dumps(table.updated(None, tuned, ran_on)))
    else:
        print_table(f"Choices on {facts['name']}", table.COLUMNS, table.rows(tuned))
    if output:
        say(
            f"bench: {sum(one.faster for one in tuned)} of {len(tuned)} problems have a faster choice in {output}"
        )
    if all(one.best is None for one in tuned):
        raise typer.Exit(Exit.NOTHING)


def _chooses(name: str, say: Callable[[str], None]) -> bool:
    try:
        return type(load(name)).candidates is not Implementation.candidates
    except PluginError as error:
        say(f"bench: {error}")
        return False


def _write(path: Path, document: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replacement = path.with_name(f"{path.name}.tmp")
    replacement.write_text(json.dumps(document, indent=1) + "\n")
    replacement.replace(path)
