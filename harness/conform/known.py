"""Failures that are known: named in a file with the reason and where they are told of; counted apart, never hidden.

A TOML file of tables, each one fault::

    [[known]]
    impl = "sdpa-flash"
    case = "numerics/scales["          part of the ids of its cases
    says = "is nan"                    part of the reason: anything else that goes wrong there is a new failure
    why = "a negative scale turns the running maximum into a minimum"
    issue = "pytorch#105202"           where it is told, or a link

``impl`` and ``case`` may be lists, for one fault that several share: it is that of each implementation at each case.

A finding stays what it is in the records. What is no longer seen is told too, so that a mended fault leaves the file.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from attnbench.harness.conform.verdict import Finding
from attnbench.harness.run.errors import RunError

SHARED = ("impl", "case")
"""Fields that may be lists."""


@dataclass(frozen=True)
class Known:
    """One fault of one implementation at one case; what each field says is told above."""

    impl: str
    case: str
    says: str
    why: str
    issue: str

    def __str__(self) -> str:
        return f"{self.impl} {self.case}: {self.why} ({self.issue})"

    def is_at(self, finding: Finding) -> bool:
        return self.impl == finding.impl and self.case in finding.case

    def explains(self, finding: Finding) -> bool:
        return finding.failed and self.is_at(finding) and self.says in finding.reason


def read_known(file: Path) -> list[Known]:
    """The faults of a file, in order; RunError where it cannot be read, or one lacks a field or has another."""
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8")).get("known")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"cannot read known failures of {file}: {error}") from None
    if not isinstance(tables, list) or not tables:
        raise RunError(f"{file} has no [[known]]")
    numbered = enumerate(tables, 1)
    return [fault for number, table in numbered for fault in _known(table, f"{file}: known failure {number}")]


def _known(table: Mapping[str, object], where: str) -> list[Known]:
    wanted = [f.name for f in dataclasses.fields(Known)]
    words: dict[str, list[str]] = {}
    for name in dict.fromkeys([*wanted, *table]):
        if name not in wanted:
            raise RunError(f"{where}: unknown key {name!r} (known: {', '.join(wanted)})")
        value = table.get(name)
        listed = value if isinstance(value, list) and name in SHARED else [value]
        words[name] = [word for word in listed if isinstance(word, str) and word]
        if not listed or len(words[name]) < len(listed):
            raise RunError(f"{where}: {name} is missing, empty or no text")
    return [Known(**dict(zip(words, chosen, strict=True))) for chosen in product(*words.values())]


def is_new(finding: Finding, known: Collection[Known]) -> bool:
    """Whether it is a failure that no known fault accounts for."""
    return finding.failed and not any(fault.explains(finding) for fault in known)


def explained(findings: Iterable[Finding], known: Collection[Known]) -> dict[Known, list[Finding]]:
    """The failures that each fault accounts for, the first that does where several would; empty lists as well."""
    found: dict[Known, list[Finding]] = {fault: [] for fault in known}
    for finding in findings:
        if fault := next((fault for fault in known if fault.explains(finding)), None):
            found[fault].append(finding)
    return found


def no_longer_seen(findings: Sequence[Finding], known: Collection[Known]) -> list[Known]:
    """Faults that account for nothing although their cases were answered."""
    return [
        fault
        for fault, seen in explained(findings, known).items()
        if not seen and any(fault.is_at(finding) and finding.asked for finding in findings)
    ]
