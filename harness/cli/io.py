"""``bench io``: what attention moves, by model on a CPU and by hardware counters on a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.harness.cli import machine, options
from attnbench.harness.cli.show import print_table
from attnbench.harness.registry import entries
from attnbench.harness.run.errors import Exit, RunError, make_folder, write_files
from attnbench.harness.run.gpus import visible_gpus
from attnbench.harness.run.plan import make_plan, select_impls
from attnbench.harness.run.suite import load_suite

if TYPE_CHECKING:
    from attnbench.harness.problem import Problem

Words = list[str] | None
_model = partial(typer.Option, rich_help_panel="By model, on a modelled memory of M elements")
_counters = partial(typer.Option, rich_help_panel="By hardware counters")

SEQLENS, HEAD_DIMS, MEMORIES, DENSITIES = (
    ("256", "512", "1k", "4k", "16k", "64k"), ("32", "64", "128"), ("16k", "32k", "64k"), (0.5, 0.25, 0.125),
)  # fmt: skip
BALANCE = 989.5e12 / 4.8e12
"""FLOP a byte of an H200 by its datasheet (dense bf16, HBM)."""


def io(
    seqlen: Annotated[
        Words, typer.Option(help="N, or lengths to keep of --suite (default 256 to 64k).")
    ] = None,
    headdim: Annotated[
        Words, typer.Option(help="d, or sizes to keep of --suite (default 32,64,128).")
    ] = None,
    only: Annotated[Words, typer.Option(help="Implementations: a,b or 'sdpa-*'.")] = None,
    skip: Annotated[Words, typer.Option(help="Implementations to leave out.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Also write JSON, tables and figures here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    memory: Annotated[Words, _model(help="M, elements (default 16k,32k,64k).")] = None,
    count_up_to: Annotated[int, _model(help="Longest N that is run and counted, not only computed.")] = 1024,
    balance: Annotated[
        float, _model(help="FLOP a byte that the verdict is for (default an H200's).")
    ] = BALANCE,
    counters: Annotated[
        bool, _counters("--counters", help="Count DRAM and L2 bytes by Nsight Compute.")
    ] = False,
    recorded: Annotated[
        Path | None, _counters(metavar="FILE", help="Show a counters.json again; count nothing.")
    ] = None,
    suite: Annotated[str, _counters(help="Problems to count.")] = "long-seq",
    mode: Annotated[Words, _counters(help="fwd, bwd, fwd_bwd.")] = None,
    causal: Annotated[str | None, _counters(help="true, false or both.")] = None,
    device: Annotated[str | None, _counters(help="cuda or cuda:N.")] = None,
) -> None:
    """Count what moves between slow and fast memory: closed forms, modelled runs, and DRAM and L2 counters."""
    impls = select_impls(entries(), options.split(only), options.split(skip))
    say = partial(typer.echo, err=True)
    if output_dir:
        make_folder(output_dir)
    if recorded:
        (document, tables, figures), name = _recorded(recorded), "counters"
    elif counters:
        filters = options.filters(None, seqlen, headdim, causal, mode)
        gpus = visible_gpus()
        (chosen,) = machine.choose_devices(options.split([device] if device else ["cuda"])[:1], gpus)
        plans = make_plan(load_suite(suite, "cuda"), impls, seed=0, only_filters=filters)
        document, tables, figures = _count(impls, [p for plan in plans for p in plan.problems], chosen)
        name = "counters"
    else:
        if not balance > 0:
            raise RunError(f"--balance {balance:g}: FLOP a byte is above 0")
        sizes = _sizes(
            _above_zero("--seqlen", seqlen or SEQLENS),
            _above_zero("--headdim", headdim or HEAD_DIMS),
            _above_zero("--memory", memory or MEMORIES),
            count_up_to,
        )
        document, tables, figures = _by_model(impls, sizes, count_up_to, balance)
        name = "io"
    if output_dir:
        say("\n".join(map(str, _write(output_dir, name, document, tables, figures))))
    if as_json:
        typer.echo(json.dumps(document))
        return
    for title, columns, rows in tables:
        print_table(title, columns, rows)


def _above_zero(option: str, words: Sequence[str]) -> tuple[int, ...]:
    found = options.sizes(option, words)
    if not found or min(found) < 1:
        raise RunError(f"{option}: {','.join(words)!r} is not a size above 0: write 4096 or '4k'")
    return found


Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def _sizes(
    seqlens: tuple[int, ...], head_dims: tuple[int, ...], memories: tuple[int, ...], count_up_to: int
) -> list[tuple[int, int, int, float]]:
    """Every length; then head_dims, memories and densities one at a time, at the longest length that is counted and at
    the longest of all."""
    d, m = sorted(head_dims)[len(head_dims) // 2], min(memories)
    found = [(n, d, m, 1.0) for n in seqlens]
    for n in (max((n for n in seqlens if n <= count_up_to), default=min(seqlens)), max(seqlens)):
        found += [(n, other, max(memories), 1.0) for other in head_dims]
        found += [(n, d, other, 1.0) for other in memories]
        found += [(n, d, m, density) for density in DENSITIES]
    return list(dict.fromkeys(found))


def _by_model(
    impls: Iterable[str], sizes: list[tuple[int, int, int, float]], count_up_to: int, balance: float
) -> tuple[dict[str, Any], list[Table], dict[str, Any]]:
    from attnbench.harness.limits import io_model, io_tables

    able = io_model.with_a_model(impls)
    if not able:
        raise RunError(
            "none of these implementations runs on a modelled memory; leave --only out", Exit.NOTHING
        )
    tell = partial(typer.echo, err=True)
    points = list(io_model.sweep(able, sizes, count_up_to, lambda text: tell(f"bench: {text}")))
    grown = io_model.exponents(points)
    tables = [
        ("Accesses", io_tables.POINT_COLUMNS, io_tables.point_rows(points, balance)),
        ("Exponents of growth", io_tables.EXPONENT_COLUMNS, io_tables.exponent_rows(grown)),
    ]
    document = {
        "schema": 1, "command": ["bench", *sys.argv[1:]], "balance": balance,
        "points": [point.to_json() for point in points], "exponents": [vars(e) for e in grown],
    }  # fmt: skip
    wrong = [point for point in points if point.agrees is False]
    if wrong:
        raise RunError(
            f"{wrong[0].impl} moved {wrong[0].counted}, its closed form says {wrong[0].predicted}", 1
        )
    return document, tables, {"io": lambda: io_tables.draw(points)}


def _count(
    impls: tuple[str, ...], problems: list[Problem], device: str
) -> tuple[dict[str, Any], list[Table], dict[str, Any]]:
    from attnbench.harness.limits import counters, io_model
    from attnbench.harness.run import environment
    from attnbench.harness.run.lock import device_lock
    from attnbench.harness.run.referee import Referee

    try:
        counters.find_ncu()
        facts = Referee(device).do_hello()
        with device_lock(str(facts["uuid"])) if "uuid" in facts else nullcontext():
            tell = partial(typer.echo, err=True)
            counted = list(counters.count(impls, problems, device, lambda impl: tell(f"bench: {impl}")))
    except counters.NoCounters as absent:
        raise RunError(str(absent), Exit.MACHINE) from None
    able = io_model.with_a_model(entries())
    models = {p.key: io_model.bytes_by_algorithm(able, p, int(facts["shared_bytes"])) for p in problems}
    ran_on = environment.gather(
        run="counters", command=("bench", *sys.argv[1:]), suites=(), seed=0, mode="cold", devices=[facts]
    )
    document = {
        "schema": 1, "environment": ran_on, "models": models, "counted": [one.to_json() for one in counted],
    }  # fmt: skip
    return _shown(document)


def _recorded(file: Path) -> tuple[dict[str, Any], list[Table], dict[str, Any]]:
    try:
        return _shown(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"--recorded {file}: not the counters that bench io writes ({error})") from None


def _shown(document: dict[str, Any]) -> tuple[dict[str, Any], list[Table], dict[str, Any]]:
    """The table and the figure of a document of counters."""
    from attnbench.harness.limits import io_tables
    from attnbench.harness.limits.counters import Counted

    counted, models = [Counted.from_json(one) for one in document["counted"]], document["models"]
    names = sorted({name for by_name in models.values() for name in by_name})
    columns = (*io_tables.COUNTED_COLUMNS, *(f"L2 over {name}'s model" for name in names))
    table = ("Bytes moved", columns, io_tables.counted_rows(counted, models, names))
    return document, [table], {"counters": lambda: io_tables.draw_counted(counted)}


def _write(
    folder: Path, name: str, document: dict[str, Any], tables: list[Table], figures: dict[str, Any]
) -> list[Path]:
    from attnbench.harness.limits.io_tables import markdown
    from attnbench.harness.report.plots import Plot

    text = "\n".join(f"## {title}\n\n{markdown(columns, rows)}" for title, columns, rows in tables)
    files = {f"{name}.json": json.dumps(document, indent=1).encode(), f"{name}.md": text.encode()}
    for figure_name, draw in figures.items():
        encoded = Plot(figure_name, figure_name, draw).encode("png", "svg")
        files |= {f"{figure_name}.{kind}": content for kind, content in encoded.items()}
    return write_files(folder, files)
