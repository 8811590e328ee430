"""The command lines behind a figure: the run's own, one row's part of it, and the one that verifies the row."""

from __future__ import annotations

import shlex
from typing import Any

from attnbench.harness.publish.rows import PublishedRun, Row

# Of bench run, as plan.json names them, with the default that needs no word.
OPTIONS: dict[str, tuple[str, Any]] = {
    "seed": ("--seed", 0),
    "rounds": ("--rounds", 5),
    "samples": ("--samples", 5),
    "time_limit_s": ("--time-limit", 120.0),
    "hot": ("--hot", False),
    "cudagraph": ("--cudagraph", False),
    "energy": ("--energy", False),
}


def of_run(run: PublishedRun) -> str:
    """As it was typed; empty where it was not recorded."""
    command = run.run.environment.get("command")
    return shlex.join(map(str, command)) if isinstance(command, list) else ""


def of_row(run: PublishedRun, row: Row) -> str:
    """Measures the row again beside its baseline: the run's suite, narrowed to the row's problem."""
    problem = row.cell.problem
    baseline = run.baseline_of(row)
    impls = [row.cell.impl, *([baseline.cell.impl] if baseline else [])]
    words = ["bench", "run", "--suite", _suite(run, row), "--only", ",".join(impls)]
    words += ["--mode", problem.direction, "--dtype", problem.dtype, "--headdim", str(problem.head_dim)]
    words += ["--causal", str(problem.mask.right == 0).lower()]
    words += ["--seqlen", str(max(problem.seqlen_q, problem.seqlen_k))]
    recorded = run.plan.get("options")
    options = recorded if isinstance(recorded, dict) else {}
    for name, (word, default) in OPTIONS.items():
        value = options.get(name, default)
        if value != default:
            words += [word] if value is True else [word, f"{value:g}"]
    return shlex.join(words)


def _suite(run: PublishedRun, row: Row) -> str:
    """The suite as the run's command named it, which may be the path of a file."""
    command = [str(word) for word in run.run.environment.get("command") or []]
    for place, word in enumerate(command):
        if word == "--suite" and place + 1 < len(command) and len(run.suites) == 1:
            return command[place + 1]
    return row.cell.suite
