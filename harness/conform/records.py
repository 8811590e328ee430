"""A conformance run on disk: ``cases.json`` (what was posed, and to whom), ``findings-<impl>.jsonl`` (what came of it,
one sealed line a case), ``reproducers.json`` and ``environment.json``.

A file an implementation keeps each below 2 MiB, and lets runs of different machines lie in one folder. A pair of an
implementation and a case without a finding was not examined: nothing is claimed of it. A fault of the machine that kept
it from being asked is written in the place of a finding; otherwise nothing is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.verdict import Finding, Pair
from attnbench.harness.run import environment
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.journal import seal_json, unseal_json
from attnbench.harness.run.record import RecordError, to_plain

CASES = "cases.json"
REPRODUCERS = "reproducers.json"


@dataclass(frozen=True)
class Recorded:
    """cases by id; impls that they are put to; findings of them, the last of each pair; problems: one line for each
    line that could not be read; reproducers: what failures shrank to, as ``Reproducer.to_json`` has it; faults: of the
    machine, for which a pair without a finding was not asked, in one line each."""

    folder: Path
    cases: dict[str, Case]
    impls: tuple[str, ...]
    findings: list[Finding]
    environment: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    reproducers: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[Pair, str] = field(default_factory=dict)

    @property
    def found(self) -> set[Pair]:
        """Pairs that need not be asked again."""
        return {finding.pair for finding in self.findings}

    @property
    def unexamined(self) -> list[Pair]:
        """Pairs without a finding, in the order of the implementations and cases."""
        found = self.found
        return [(impl, case) for impl in self.impls for case in self.cases if (impl, case) not in found]


class Recorder:
    """Writes a run into a folder. RunError where it cannot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}

    def open(
        self, cases: Iterable[Case], command: Sequence[str], facts: dict[str, Any], *, impls: Sequence[str]
    ) -> None:
        """Begins a run in a folder that holds none yet. facts: what the device's referee said of it. impls: whom the
        cases are put to."""
        document = {
            "schema": 1, "kind": "cases", "impls": list(impls), "cases": {case.id: case.to_json() for case in cases},
        }  # fmt: skip
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / CASES).exists():
                raise RunError(
                    f"{self.folder} holds a conformance run already; go on with it by --resume {self.folder}, or name "
                    "another --output-dir"
                )
            (self.folder / CASES).write_text(json.dumps(document, separators=(",", ":")) + "\n")
            self._describe(document["cases"], command, facts)
        except OSError as error:
            raise RunError(f"cannot write to {self.folder}: {error.strerror}", Exit.MACHINE) from error

    def reopen(self, recorded: Recorded, command: Sequence[str], facts: dict[str, Any]) -> None:
        """Goes on with a run; the environment lists this call beside the first."""
        try:
            for path in self.folder.glob("findings-*.jsonl"):
                text = path.read_bytes()
                if text and not text.endswith(b"\n"):  # torn by the end of its writer
                    path.write_bytes(text + b"\n")
            self._describe({name: case.to_json() for name, case in recorded.cases.items()}, command, facts)
        except OSError as error:
            raise RunError(f"cannot write to {self.folder}: {error.strerror}", Exit.MACHINE) from error

    def _describe(self, cases: Any, command: Sequence[str], facts: dict[str, Any]) -> None:
        suites = sorted({case["suite"] for case in cases.values()})
        described = environment.gather(
            run=self.folder.name, command=command, suites=suites, seed=0, mode="conform", devices=[facts]
        )
        environment.write(self.folder, described)

    def append(self, finding: Finding) -> None:
        path = self.files.setdefault(finding.impl, self.folder / f"findings-{finding.impl}.jsonl")
        try:
            with path.open("a") as file:
                file.write(seal_json(to_plain(finding.to_json())) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}", Exit.MACHINE) from error

    def reproducers(self, found: Sequence[dict[str, Any]]) -> None:
        """Writes what the failures shrank to; their scripts lie in the folder already."""
        path = self.folder / REPRODUCERS
        document = {"schema": 1, "kind": "reproducers", "reproducers": list(found)}
        replacement = path.with_suffix(".tmp")
        replacement.write_text(json.dumps(document, indent=1) + "\n")
        replacement.replace(path)


def read(folder: Path) -> Recorded:
    """The run in ``folder``; RunError when it holds none."""
    try:
        document = json.loads((folder / CASES).read_text(encoding="utf-8"))
        cases = {name: Case.from_json(case) for name, case in document["cases"].items()}
        described = json.loads((folder / environment.FILE).read_text(encoding="utf-8"))
        shrunk = folder / REPRODUCERS
        reproducers = json.loads(shrunk.read_text(encoding="utf-8"))["reproducers"] if shrunk.exists() else []
    except FileNotFoundError as error:
        raise RunError(f"{folder} holds no conformance run (no {Path(error.filename).name})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder}/{CASES} cannot be read: {error}") from None
    found: dict[Pair, Finding] = {}
    faults: dict[Pair, str] = {}
    problems = []
    for path in sorted(folder.glob("findings-*.jsonl")):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            try:
                finding = _finding(line, cases)
            except RecordError as error:
                problems.append(f"{path.name}:{number}: {error}")
                continue
            if finding.asked:
                found[finding.pair] = finding
            else:
                faults[finding.pair] = finding.reason
    # Runs of before resuming do not say whom they asked.
    impls = document.get("impls") or dict.fromkeys(impl for impl, _ in [*found, *faults])
    left = {pair: why for pair, why in faults.items() if pair not in found}
    return Recorded(folder, cases, tuple(impls), list(found.values()), described, problems, reproducers, left)


def _finding(line: str, cases: Collection[str]) -> Finding:
    finding = Finding.from_json(unseal_json(line))
    if finding.case not in cases:
        raise RecordError(f"case {finding.case} is not in {CASES}")
    return finding
