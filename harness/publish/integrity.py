"""What a published row must hold. A row that breaks a rule is refused: shown with the reason, and never ranked.

A rule that a record does not speak to (an older run, a card without a known limit) is said to be unknown; unknown is
neither held nor broken, and the row's page shows which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from attnbench.harness.publish.clock_limit import least_ms
from attnbench.harness.run.record import Cell, Status, Timing

State = Literal["held", "broken", "unknown"]
Device = dict[str, Any]


@dataclass(frozen=True)
class Timed:
    """A cell that was timed, and the environment's entry for its device."""

    cell: Cell
    timing: Timing
    device: Device


@dataclass(frozen=True)
class Finding:
    """How a row stands to one rule, with the figure that says so."""

    rule: str
    state: State
    why: str


def examine(cell: Cell, device: Device) -> list[Finding]:
    """Every rule's finding on a cell that was timed; none for a cell without a time, which claims nothing.

    device: the environment's entry for the cell's device.
    """
    if cell.timing is None:
        return []
    timed = Timed(cell, cell.timing, device)
    return [Finding(rule, *check(timed)) for rule, check in RULES.items()]


def broken(findings: list[Finding]) -> list[str]:
    """Why a row is refused, one line each; empty if it may be ranked."""
    return [f"{finding.rule}: {finding.why}" for finding in findings if finding.state == "broken"]


def _judged(row: Timed) -> tuple[State, str]:
    """The answer was judged right against an fp64 reference; of an approximation, its error is reported."""
    judgement = row.cell.judgement
    right = judgement and (judgement.finite if row.cell.approximate else judgement.ok)
    if judgement is None or not right or not judgement.rows:
        return "broken", "no judgement of its answer is recorded"
    if row.cell.approximate:
        return (
            "held",
            f"an approximation: its errors are reported, on {judgement.rows} of {judgement.rows_total} rows",
        )
    names = ", ".join(judgement.tensors)
    return "held", f"{names} against the fp64 reference on {judgement.rows} of {judgement.rows_total} rows"


def _inputs_unmodified(row: Timed) -> tuple[State, str]:
    """The judged call left q, k, v and dout as they were."""
    # The judging call compares checksums of every input before and after; where they differ the cell is INCORRECT.
    if row.cell.status is not Status.OK:
        return "broken", f"the cell is {row.cell.status}"
    return "held", "checksums of q, k, v and dout were equal before and after the judged call"


def _timed_calls_checked(row: Timed) -> tuple[State, str]:
    """In every round the output of one of the timed calls, drawn at random, was itself checked."""
    rounds = len(row.timing.rounds)
    if row.timing.checked < rounds:
        return "broken", f"the output of a timed call was checked in {row.timing.checked} of {rounds} rounds"
    return "held", f"in each of {rounds} rounds the output of a timed call, drawn at random, was checked"


def _fresh_inputs(row: Timed) -> tuple[State, str]:
    """No timed call had inputs that a call before it had (``bwd``: no dout, over a graph that is kept); in older
    records, none had those of the call just before.
    """
    sets = row.timing.inputs
    if row.timing.renewed and row.cell.problem.direction == "bwd":
        return "held", f"{sets} graph{'s' * (sets != 1)} of a forward, dout changed after every call"
    if row.timing.renewed:
        return "held", f"{sets} set{'s' * (sets != 1)} of inputs, changed after every call: none came twice"
    if sets is None:
        return "unknown", "the record does not say on how many sets of inputs it was timed"
    if sets < 2:
        return "broken", "all timed calls had the same inputs (one set filled the memory)"
    return "held", f"timed calls rotated through {sets} sets: none had those of the timed call before it"


def _possible(row: Timed) -> tuple[State, str]:
    """No sample is faster than the card's matrix units at their highest clock allow."""
    least = least_ms(row.cell.problem, row.device)
    if least is None:
        return "unknown", "no peak rate is known for this device"
    fastest = min(min(samples) for samples in row.timing.rounds)
    limit = f"{least:.4g} ms, what its matrix units need at {row.device['max_sm_mhz']} MHz"
    if fastest < least:
        return "broken", f"a sample of {fastest:.4g} ms is below {limit}"
    return "held", f"the fastest sample, {fastest:.4g} ms, is above {limit}"


def _source_stored(row: Timed) -> tuple[State, str]:
    """The record holds the version and a hash of the sources."""
    if not row.cell.source:
        return "unknown", "the record holds the version, but no hash of the sources"
    return "held", f"version {row.cell.impl_version}, sources {row.cell.source}"


def _samples_stored(row: Timed) -> tuple[State, str]:
    """The record holds every sample, by round."""
    samples = sum(map(len, row.timing.rounds))
    return "held", f"{samples} raw samples in {len(row.timing.rounds)} rounds"


RULES: dict[str, Callable[[Timed], tuple[State, str]]] = {
    "answer judged": _judged,
    "timed calls checked": _timed_calls_checked,
    "inputs unmodified": _inputs_unmodified,
    "fresh inputs": _fresh_inputs,
    "possible at the highest clock": _possible,
    "samples stored": _samples_stored,
    "source hash stored": _source_stored,
}
