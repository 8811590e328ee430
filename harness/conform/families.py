"""Failures of one implementation at one named case, told once: its directions, dtypes, kinds of inputs and seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.verdict import Finding


@dataclass(frozen=True)
class Family:
    """failed: at least one, in the order found. asked: how many cases of the name were put to it."""

    impl: str
    name: str
    failed: tuple[Finding, ...]
    asked: int

    @property
    def counts(self) -> str:
        """In words: ``3 FAIL, 1 ERROR of 12``."""
        counts = Counter(finding.verdict for finding in self.failed)
        return f"{', '.join(f'{count} {verdict}' for verdict, count in counts.items())} of {self.asked}"


def families(findings: Iterable[Finding], cases: Mapping[str, Case]) -> list[Family]:
    """Those with a failure, by implementation, then in the order found."""
    asked: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        asked.setdefault((finding.impl, cases[finding.case].family), []).append(finding)
    found = [
        Family(impl, name, failed, len(own))
        for (impl, name), own in asked.items()
        if (failed := tuple(finding for finding in own if finding.failed))
    ]
    return sorted(found, key=lambda family: family.impl)
