"""What the conformance suites found of each implementation, suite by suite, for the page of the support matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attnbench.harness.conform import records
from attnbench.harness.conform.records import Recorded
from attnbench.harness.conform.verdict import FAILURES, Finding, Verdict
from attnbench.harness.publish.devices import device_title


@dataclass
class Tally:
    """One implementation in one suite: how many cases ended in which verdict, those that failed, how many were not
    examined, and of these how many for which fault of the machine."""

    verdicts: Counter[str] = field(default_factory=Counter)
    failures: list[Finding] = field(default_factory=list)
    unexamined: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        return sum(self.verdicts[verdict] for verdict in FAILURES)

    @property
    def passed(self) -> int:
        return self.verdicts[Verdict.PASS]

    @property
    def state(self) -> str:
        """failed, yes (at least one case passed), absent, no (every case refused), or empty."""
        if self.failed:
            return "failed"
        if self.passed:
            return "yes"
        if self.verdicts[Verdict.UNAVAILABLE]:
            return "absent"
        return "no" if self.verdicts else ""

    @property
    def text(self) -> str:
        """``12 of 14, 3 not examined``: passed, of those that were not refused; else the state."""
        answered = self.passed + self.failed
        words = [f"{self.passed} of {answered}" if answered else self.state]
        words += [f"{self.unexamined} not examined"] if self.unexamined else []
        return ", ".join(filter(None, words))

    @property
    def told(self) -> str:
        words = [f"{count} {verdict}" for verdict, count in sorted(self.verdicts.items())]
        words += [f"{count} not examined, the machine at fault: {why}" for why, count in self.faults.items()]
        return ", ".join(words)


@dataclass(frozen=True)
class Conformance:
    """One device. suites: in order. tallies: by implementation, one a suite. cites: by case, the issues it covers.
    problems: by folder, what of it could not be read.
    """

    device: str
    started: str
    suites: list[str]
    tallies: dict[str, list[Tally]]
    why: dict[str, str]
    cites: dict[str, tuple[str, ...]]
    problems: dict[Path, list[str]] = field(default_factory=dict)

    @property
    def failures(self) -> list[Finding]:
        return [finding for own in self.tallies.values() for tally in own for finding in tally.failures]


def load(folders: Sequence[Path]) -> list[Conformance]:
    """One a device from the conformance runs in ``folders``; of a case posed twice, the latest finding counts."""
    runs = sorted(map(records.read, folders), key=_started, reverse=True)
    by_device: dict[str, list[Recorded]] = {}
    for run in runs:
        by_device.setdefault(device_title(run.environment), []).append(run)
    return [_of_device(device, own) for device, own in by_device.items()]


def _of_device(device: str, runs: list[Recorded]) -> Conformance:
    cases = {name: case for run in reversed(runs) for name, case in run.cases.items()}
    latest: dict[tuple[str, str], Finding] = {}
    for run in runs:
        own = {(finding.impl, finding.case): finding for finding in run.findings}
        latest = own | latest
    unexamined = {pair for run in runs for pair in run.unexamined} - set(latest)
    faults = {pair: why for run in reversed(runs) for pair, why in run.faults.items()}
    suites = sorted({cases[case].suite for _, case in [*latest, *unexamined]})
    tallies: dict[str, dict[str, Tally]] = {}
    for (impl, case), finding in sorted(latest.items()):
        tally = tallies.setdefault(impl, {}).setdefault(cases[case].suite, Tally())
        tally.verdicts[finding.verdict] += 1
        if finding.failed:
            tally.failures.append(finding)
    for impl, case in sorted(unexamined):
        tally = tallies.setdefault(impl, {}).setdefault(cases[case].suite, Tally())
        tally.unexamined += 1
        if why := faults.get((impl, case)):
            tally.faults[why] += 1
    return Conformance(
        device=device,
        started=_started(runs[0]),
        suites=suites,
        tallies={impl: [own.get(suite, Tally()) for suite in suites] for impl, own in tallies.items()},
        why={name: case.why for name, case in cases.items()},
        cites={name: case.cites for name, case in cases.items()},
        problems={run.folder: run.problems for run in runs},
    )


def _started(run: Recorded) -> str:
    return str(run.environment.get("started") or "")
