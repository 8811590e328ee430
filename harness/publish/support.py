"""The support matrix as runs saw it: which implementation answered which feature, and why not where it did not.

What was posed decides: a feature that no problem had is empty, and a declaration that no run met is not repeated.
Of several runs on one device, the latest that posed a problem to an implementation speaks for the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from attnbench.harness.masks import KINDS
from attnbench.harness.problem import DIRECTIONS, DTYPES
from attnbench.harness.publish.devices import CPU
from attnbench.harness.publish.families import family_of
from attnbench.harness.publish.rows import PublishedRun, Row
from attnbench.harness.report.tables import DIRECTION_TITLES
from attnbench.harness.run.record import Status

State = Literal["yes", "partly", "no", "failed", "absent", "not posed"]
FAILED = (Status.INCORRECT, Status.CRASHED, Status.TIMEOUT, Status.ERROR)


@dataclass
class Support:
    """One implementation and one feature. statuses: how many problems ended in which. reasons: each with its count."""

    statuses: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def posed(self) -> int:
        return sum(self.statuses.values())

    @property
    def ok(self) -> int:
        return self.statuses.get(Status.OK, 0)

    @property
    def state(self) -> State:
        """failed when any answer was wrong, lost or an error, whatever else was right."""
        if not self.posed:
            return "not posed"
        if any(self.statuses.get(status) for status in FAILED):
            return "failed"
        if self.ok == self.posed:
            return "yes"
        if self.ok:
            return "partly"
        return "absent" if self.statuses.get(Status.UNAVAILABLE) == self.posed else "no"

    def add(self, row: Row) -> None:
        status = str(row.cell.status)
        self.statuses[status] = self.statuses.get(status, 0) + 1
        for reason in row.cell.reasons:
            text = f"{status}: {reason}"
            self.reasons[text] = self.reasons.get(text, 0) + 1


@dataclass(frozen=True)
class Matrix:
    """One device's matrix. features: (group, name) in order. entries: by implementation, a Support a feature."""

    device: str
    features: list[tuple[str, str]]
    entries: dict[str, list[Support]]


def matrices(runs: Sequence[PublishedRun]) -> list[Matrix]:
    """One matrix a device, CPUs last. runs: latest first."""
    found = []
    for device in sorted(dict.fromkeys(run.device for run in runs), key=lambda name: name.startswith(CPU)):
        latest: dict[tuple[str, str], Row] = {}
        for run in runs:
            if run.device == device:
                for row in run.rows:
                    name = f"{row.cell.impl} (approximate)" if row.cell.approximate else row.cell.impl
                    latest.setdefault((name, row.cell.problem.key), row)
        entries: dict[str, dict[tuple[str, str], Support]] = {}
        for (impl, _), row in sorted(latest.items()):
            for feature in features_of(row):
                entries.setdefault(impl, {}).setdefault(feature, Support()).add(row)
        features = sorted({feature for own in entries.values() for feature in own}, key=_order)
        table = {impl: [own.get(feature, Support()) for feature in features] for impl, own in entries.items()}
        found.append(Matrix(device, features, table))
    return found


def features_of(row: Row) -> list[tuple[str, str]]:
    """The features that the row's problem has, as (group, name)."""
    problem = row.cell.problem
    special = [("shape", word) for word in family_of(problem).more] or [("shape", "plain")]
    return [
        ("direction", DIRECTION_TITLES[problem.direction]),
        ("dtype", problem.dtype),
        ("mask", problem.mask.kind.replace("_", "-")),
        ("head_dim", str(problem.head_dim)),
        *special,
    ]


def _order(feature: tuple[str, str]) -> tuple[int, int, str]:
    group, name = feature
    groups = ("direction", "dtype", "mask", "head_dim", "shape")
    places: dict[str, list[str]] = {
        "direction": [DIRECTION_TITLES[direction] for direction in DIRECTIONS],
        "dtype": list(DTYPES),
        "mask": [kind.replace("_", "-") for kind in KINDS],
        "head_dim": [],
        "shape": ["plain"],
    }
    known = places[group]
    place = int(name) if group == "head_dim" else known.index(name) if name in known else len(known)
    return groups.index(group), place, name
