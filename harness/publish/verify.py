"""A published row measured again on this machine: reproduced, differs, or cannot, with the reason and the tolerance.

Compared is the ratio of the row's time to its baseline's, both measured here in the same rounds: a time in ms says as
much of the card's temperature as of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from attnbench.harness.publish.rows import PublishedRun, Row
from attnbench.harness.publish.tolerance import TOLERANCE
from attnbench.harness.report import stats
from attnbench.harness.report.load import load_run
from attnbench.harness.report.stats import Estimate
from attnbench.harness.run.environment import differences, ground, ground_here
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Cell, Status
from attnbench.harness.run.runner import Progress, RunOptions, run

LEAST_DIGITS = 6
ROUNDS = 20
"""Of a verification: enough that the noise of ratios (about 1% a round on a GPU) stays well inside the tolerance."""

Outcome = Literal["reproduced", "differs", "cannot"]


@dataclass(frozen=True)
class Verification:
    """published, here: time of the row over that of its baseline, None where there is none. notes: what of the
    environment is not as it was. exit_code: of the command that ends with this.
    """

    row: str
    outcome: Outcome
    reason: str
    exit_code: int
    baseline: str | None = None
    published: Estimate | None = None
    here: Estimate | None = None
    tolerance: float = TOLERANCE
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("published", "here")}
        return asdict(self) | {name: value._asdict() if value else None for name, value in named.items()}


def find(runs: Sequence[PublishedRun], word: str) -> tuple[PublishedRun, Row]:
    """The row whose address begins with ``word``, or whose cell is named so; of equal ones the latest run's.

    runs: latest first. RunError for one that is not there, and for one that could be several.
    """
    found: dict[str, tuple[PublishedRun, Row]] = {}
    for published in runs:
        for row in published.rows:
            by_address = len(word) >= LEAST_DIGITS and row.address.startswith(word)
            if by_address or row.cell.id == word:
                found.setdefault(row.address, (published, row))
    if not found:
        raise RunError(
            f"no row {word!r} in {len(runs)} published runs; a row is named by its address, as a site shows it"
        )
    if len(found) > 1:
        named = [
            f"{address} ({one.cell.id} of {published.slug})" for address, (published, one) in found.items()
        ]
        raise RunError(f"{word!r} could be any of {', '.join(named[:4])}: name more of the address")
    return next(iter(found.values()))


def choose_baseline(published: PublishedRun, row: Row, name: str | None) -> Row | None:
    """The row's own baseline, or the one of that name in the same rounds; RunError if it was not timed there."""
    if name is None:
        return published.baseline_of(row)
    beside = {
        other.cell.impl: other
        for other in published.rows
        if other.cell.problem == row.cell.problem and other.cell.timing and other.cell.impl != row.cell.impl
    }
    if name not in beside:
        raise RunError(
            f"--baseline {name}: not timed beside this row; there are {', '.join(beside) or 'none'}"
        )
    return beside[name]


@dataclass(frozen=True)
class Place:
    """Where a row is measured again. device: ``cpu`` or ``cuda:N``, whose model is ``name``. folder: of the run."""

    device: str
    name: str
    folder: Path
    progress: Progress


def verify(
    published: PublishedRun,
    row: Row,
    baseline: Row | None,
    place: Place,
    *,
    tolerance: float = TOLERANCE,
    rounds: int = ROUNDS,
) -> Verification:
    """Measures ``row`` beside ``baseline`` here and now, as it was measured then but for the number of rounds."""
    if why := _obstacle(published, row, baseline, place.name):
        return Verification(row.address, "cannot", why[0], why[1], tolerance=tolerance)
    impls = (row.cell.impl, *([baseline.cell.impl] if baseline else []))
    plan = replace(_plan(published, row), impls=impls, problems=(row.cell.problem,))
    recorded = published.plan.get("options") or {}
    method = {name: recorded[name] for name in ("seed", "samples", "hot", "cudagraph") if name in recorded}
    command = ("bench", "verify", row.address)
    options = RunOptions(
        (place.device,), place.folder, rounds=rounds, memory=False, command=command, **method
    )
    run([plan], options, place.progress)
    again = load_run(place.folder)
    cells = {cell.impl: cell for cell in again.cells}
    notes = differences(ground(published.run.environment), ground(again.environment))
    return replace(
        judge(row, baseline, cells, tolerance),
        notes=[note for note in notes if not note.startswith("device ")],
    )


def judge(row: Row, baseline: Row | None, cells: dict[str, Cell], tolerance: float) -> Verification:
    """What the cells measured here, by implementation, say of the published row."""

    def ended(outcome: Outcome, reason: str, code: int, **figures: Any) -> Verification:
        name = baseline.cell.impl if baseline else None
        return Verification(row.address, outcome, reason, code, name, tolerance=tolerance, **figures)

    for side in filter(None, (row, baseline)):
        if why := _another(side.cell, cells[side.cell.impl]):
            return ended("cannot", why, Exit.NOTHING)
    here = cells[row.cell.impl]
    if here.status is not row.cell.status:
        why = f": {'; '.join(here.reasons)}" if here.reasons else ""
        return ended("differs", f"it was {row.cell.status}, and is {here.status} here{why}", Exit.CELLS)
    if here.timing is None or row.cell.timing is None:
        return ended("reproduced", f"it is {here.status} here too: {'; '.join(here.reasons)}", Exit.OK)
    if baseline is None:
        return ended(
            "cannot", "no other implementation was timed beside it, so there is no ratio", Exit.NOTHING
        )
    beside = cells[baseline.cell.impl]
    if beside.timing is None:
        why = f"{beside.impl} is {beside.status} here: {'; '.join(beside.reasons)}"
        return ended("cannot", f"its baseline {why}", Exit.NOTHING)
    published, again = _ratio(row.cell, baseline.cell), _ratio(here, beside)
    return ended(*compare(published, again, tolerance), published=published, here=again)


def compare(published: Estimate, here: Estimate, tolerance: float) -> tuple[Outcome, str, int]:
    """Outcome, reason and exit code for two ratios. The interval of their quotient takes the worst of both ends: inside
    the tolerance is reproduced, outside it differs, across its edge nothing can be said."""
    ends = [published.low, published.high, here.low, here.high]
    if published.value is None or here.value is None or any(end is None for end in ends):
        return "cannot", "a single round has no interval, so noise cannot be told from change", Exit.NOTHING
    low, high = here.low / published.high, here.high / published.low  # type: ignore[operator]
    moved = f"the ratio moved by {100 * (here.value / published.value - 1):+.1f}%"
    span = f"{100 * (low - 1):+.1f}% to {100 * (high - 1):+.1f}%"
    edge = math.log1p(tolerance)
    if -edge <= math.log(low) and math.log(high) <= edge:
        return "reproduced", f"{moved} ({span}), within {100 * tolerance:g}%", Exit.OK
    if math.log(low) > edge or math.log(high) < -edge:
        return "differs", f"{moved} ({span}), beyond {100 * tolerance:g}%", Exit.CELLS
    return (
        "cannot",
        f"{moved}, but by the noise of both it may be {span}: too wide for {100 * tolerance:g}%",
        Exit.MACHINE,
    )


def _obstacle(
    published: PublishedRun, row: Row, baseline: Row | None, device_name: str
) -> tuple[str, int] | None:
    """Why the row cannot be measured here at all, and the exit code; None if it can be tried."""
    if row.refusals:
        return f"the row is refused: {'; '.join(row.refusals)}", Exit.NOTHING
    if row.cell.status is Status.UNAVAILABLE:
        return "the row says that it was UNAVAILABLE there, which says nothing of the kernel", Exit.NOTHING
    was = ground(published.run.environment)["device"]
    here = ground_here([device_name])["device"]
    if was != here:
        return f"the row was measured on {was}, and this is {here}", Exit.MACHINE
    if row.cell.timing and baseline is None:
        return "no other implementation was timed beside it, so there is no ratio", Exit.NOTHING
    return None


def _another(was: Cell, here: Cell) -> str:
    """Why what was measured here is not what the published row is of; empty if it is, as far as records tell."""
    if here.status is Status.UNAVAILABLE:
        return f"{was.impl} is not available here: {'; '.join(here.reasons)}"
    if was.impl_version != here.impl_version:
        return f"{was.impl} was version {was.impl_version}, here it is {here.impl_version}"
    if was.source and here.source and was.source != here.source:
        return f"{was.impl} had sources {was.source}, here they are {here.source}: another kernel"
    return ""


def _ratio(row: Cell, baseline: Cell) -> Estimate:
    assert row.timing
    assert baseline.timing
    return stats.ratio(stats.round_medians(row.timing.rounds), stats.round_medians(baseline.timing.rounds))


def _plan(published: PublishedRun, row: Row) -> GroupPlan:
    """The group as it was planned, which says how its inputs were drawn."""
    for data in published.plan.get("plans") or []:
        plan = GroupPlan.from_json(data)
        if (plan.suite, plan.group) == (row.cell.suite, row.cell.group):
            return plan
    raise RunError(f"{published.run.folder} has no plan.json that says how the row's inputs were drawn")
