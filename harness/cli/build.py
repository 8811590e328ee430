"""``bench build``: what implementations compile at first use, compiled ahead of it."""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Annotated

import typer

from attnbench.harness.cli import options
from attnbench.harness.cli.show import print_table
from attnbench.harness.contract import Build, Compiled, Unsupported
from attnbench.harness.registry import PluginError, entries, load
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.plan import select_impls
from attnbench.harness.run.protect import die_with
from attnbench.harness.run.waiting import LOOK_EVERY_S

COLUMNS = ("configuration", "seconds", "registers", "spilled bytes", "code bytes", "")


def build(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Implementations, or their configurations: flash-cuda, 'flash-cuda/*dim128*'."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the configurations; compile nothing.")] = False,
    processes: Annotated[
        int | None, typer.Option(help="Compilers side by side (default one a core).", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Compile ahead what implementations compile at first use, so that no first call waits for it; needs no GPU.

    Exit code 1 where a configuration does not compile, spills, or draws a remark that its implementation refuses.
    """
    chosen = _choose(options.split(only))
    if list_:
        typer.echo(json.dumps(list(chosen)) if as_json else "\n".join(chosen))
        return
    from rich.console import Console
    from rich.progress import Progress

    begin, done = time.monotonic(), {}
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=len(chosen))
        for name, seconds, compiled in _compile(chosen, processes or os.cpu_count() or 1):
            done[name] = seconds, compiled
            bar.update(task, advance=1, description=name)
            if compiled.problems or not console.is_terminal:
                line = f"[{len(done)}/{len(chosen)}] {seconds:.1f} s {name}: {_outcome(compiled)}"
                console.print(line, markup=False)
    done = {name: done[name] for name in chosen}
    bad = {name: compiled for name, (_, compiled) in done.items() if compiled.problems}
    if as_json:
        typer.echo(json.dumps({n: {"seconds": s} | vars(c) for n, (s, c) in done.items()}))
    else:
        print_table("Configurations", COLUMNS, [_row(name, *done[name]) for name in done])
    for name, compiled in bad.items():
        typer.echo(f"\n{name}: {'; '.join(compiled.problems)}\n{compiled.log}", err=True)
    fresh = sum(not compiled.cached for _, compiled in done.values())
    told = f"{len(done)} configurations, {fresh} compiled in {time.monotonic() - begin:.0f} s, {len(bad)} not fit"
    typer.echo(f"bench: {told}", err=True)
    if bad:
        raise typer.Exit(Exit.CELLS)


def _choose(patterns: tuple[str, ...]) -> dict[str, Build]:
    """What matches, by ``implementation/configuration``: a pattern without a slash is an implementation's name."""
    available = {name: build for impl in _meant(patterns) for name, build in _builds(impl, patterns).items()}
    if not available:
        raise RunError("these implementations compile nothing ahead of their calls", Exit.NOTHING)
    chosen: list[str] = []
    for pattern in patterns or ("*",):
        names = fnmatch.filter(available, pattern if "/" in pattern else f"{pattern}/*")
        if not names:
            raise RunError(f"--only: no configuration matches {pattern!r}; see bench build --list")
        chosen += names
    return {name: available[name] for name in dict.fromkeys(chosen)}


def _meant(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The implementations that the patterns speak of."""
    return select_impls(entries(), [pattern.partition("/")[0] for pattern in patterns], ())


def _builds(name: str, patterns: tuple[str, ...]) -> dict[str, Build]:
    try:
        found: Mapping[str, Build] = load(name).builds()
    except (PluginError, Unsupported) as error:
        if patterns:
            raise RunError(f"{name}: {error}", Exit.MACHINE) from None
        typer.echo(f"bench: {name}: {error}", err=True)
        return {}
    return {f"{name}/{configuration}": build for configuration, build in found.items()}


def _compile(chosen: Mapping[str, Build], processes: int) -> Iterator[tuple[str, float, Compiled]]:
    """(name, seconds, outcome) as they come. RunError where the cache cannot be written."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(processes, len(chosen)), mp_context=spawn, initializer=_begin, initargs=(os.getpid(),)
    )
    try:
        pending = {pool.submit(_timed, build): name for name, build in chosen.items()}
        while pending:
            done, _ = wait(pending, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
            for future in done:
                yield pending.pop(future), *_result(future)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(future: Future[tuple[float, Compiled]]) -> tuple[float, Compiled]:
    try:
        return future.result()
    except OSError as error:
        raise RunError(str(error), Exit.MACHINE) from None
    except Exception as error:  # noqa: BLE001  a compiler may raise anything, or take its process along
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return 0.0, Compiled(problems=(reason,), log=str(error))


def _begin(parent: int) -> None:
    """A terminal's Ctrl-C reaches every process of the group: here it is the parent that hears it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)


def _timed(build: Build) -> tuple[float, Compiled]:
    begin = time.perf_counter()
    compiled = build()
    return time.perf_counter() - begin, compiled


def _row(name: str, seconds: float, compiled: Compiled) -> tuple[str, ...]:
    figures = (compiled.registers, compiled.spill_bytes, compiled.code_bytes)
    shown = ("–" if x is None else str(x) for x in figures)
    return name, f"{seconds:.1f}", *shown, _outcome(compiled)


def _outcome(compiled: Compiled) -> str:
    return "; ".join(compiled.problems) or ("cached" if compiled.cached else "ok")
