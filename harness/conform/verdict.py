"""What became of a case for one implementation, and the record of it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from attnbench.harness.run.record import RecordError

SCHEMA = 1


class Verdict(StrEnum):
    """A closed set."""

    PASS = "PASS"  # the check holds
    FAIL = "FAIL"  # the check does not hold; reason and facts say where
    REFUSED = "REFUSED"  # declared unsupported, and not answered wrongly; reason is its own
    UNAVAILABLE = "UNAVAILABLE"  # it cannot run on this machine at all
    OOM = "OOM"  # memory ran out
    TIMEOUT = "TIMEOUT"  # no answer within the time limit; its worker was killed
    CRASHED = "CRASHED"  # its worker died
    ERROR = "ERROR"  # it raised on what it declares supported


Pair = tuple[str, str]
"""An implementation's name and a case's id: what there is one finding of."""
FAILURES = (Verdict.FAIL, Verdict.TIMEOUT, Verdict.CRASHED, Verdict.ERROR)

NOT_ASKED = {"asked": False}
"""Facts of a finding that says nothing of the implementation."""
UPSET = "an_upset_worker_said"
"""The fact of what was raised in a process that an earlier case had upset, where a fresh one said something else."""
NOT_EXAMINED = "NOT EXAMINED"
"""In the place of a verdict, where there is none to be had of the implementation."""


def masked(reason: str) -> str:
    """What was said without its numbers: addresses and sizes, which differ from case to case and process to process."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", reason)


@dataclass(frozen=True)
class Finding:
    """One case, one implementation. case: ``Case.id``. facts: figures behind the reason, as the check gives them.

    evidence: longer text (a traceback's end, what a refusal said). ms: what the check took, without the oracle.
    """

    case: str
    impl: str
    impl_version: str
    device: str
    verdict: Verdict
    reason: str = ""
    evidence: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    ms: float | None = None

    def __post_init__(self) -> None:
        if (self.verdict is Verdict.PASS) == bool(self.reason):
            raise RecordError(
                f"{self.case}: {self.verdict} with reason {self.reason!r}; all but PASS need one, PASS none"
            )

    @property
    def pair(self) -> Pair:
        return self.impl, self.case

    @property
    def failed(self) -> bool:
        """Whether the implementation did; not where the machine was at fault."""
        return self.asked and self.verdict in FAILURES

    @property
    def asked(self) -> bool:
        """Whether the case was put to the implementation; where its worker did not start, or the referee had no right
        answer, it was not, and the machine is at fault."""
        return bool(self.facts.get("asked", True))

    @property
    def word(self) -> str:
        return str(self.verdict) if self.asked else NOT_EXAMINED

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "kind": "finding"} | dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Finding:
        """Inverse of ``to_json``; RecordError for another schema or kind, a missing field, a broken invariant."""
        if (data.get("schema"), data.get("kind")) != (SCHEMA, "finding"):
            raise RecordError(
                f"not a finding of schema {SCHEMA}: {data.get('kind')!r} {data.get('schema')!r}"
            )
        fields = {name: value for name, value in data.items() if name not in ("schema", "kind")}
        try:
            return cls(**fields | {"verdict": Verdict(fields["verdict"])})
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"malformed finding: {error}") from error
