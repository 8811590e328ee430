"""A timed cell in pytest-benchmark's words, the same whether it was measured under pytest or is exported from a run."""

from __future__ import annotations

from typing import Any

from attnbench.harness.run.record import Cell


def group_of(cell: Cell) -> str:
    """What is compared side by side: one problem's implementations."""
    return cell.problem.key


def fullname_of(cell: Cell) -> str:
    """By which two files are compared; says nothing of where attnbench is installed."""
    return f"attnbench/{cell.suite}::{cell.id}"


def seconds_of(cell: Cell) -> list[float]:
    """Every sample, in the unit that pytest-benchmark counts in; none of a cell that was not timed."""
    return [ms / 1e3 for samples in (cell.timing.rounds if cell.timing else ()) for ms in samples]


def extra_info(cell: Cell) -> dict[str, Any]:
    """What a reader of the JSON needs to know of the samples: whose, how taken, and that they were judged."""
    timing, judgement = cell.timing, cell.judgement
    return {
        "implementation": cell.impl,
        "version": cell.impl_version,
        "source": cell.source,
        "problem": cell.problem.to_json(),
        "flops": cell.problem.flops,
        "device": cell.device,
        "mode": timing.mode if timing else None,
        "samples_per_round": list(map(len, timing.rounds)) if timing else [],
        "timed_calls_checked": timing.checked if timing else 0,
        "judged": list(judgement.tensors) if judgement else [],
        "warnings": list(cell.warnings),
    }
