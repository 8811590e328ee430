"""A conformance run on disk: ``cases.json`` (what was posed), ``findings-<impl>.jsonl`` (what came of it, one sealed
line a case) and ``environment.json``.

A file an implementation keeps each below 2 MiB, and lets runs of different machines lie in one folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.reproduce import Reproducer
from attnbench.harness.conform.verdict import Finding
from attnbench.harness.run import environment
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.journal import seal_json, unseal_json
from attnbench.harness.run.record import RecordError, to_plain

CASES = "cases.json"
REPRODUCERS = "reproducers.json"


class Recorder:
    """Writes a run into a folder that holds none yet; RunError where it cannot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}

    def open(self, cases: Iterable[Case], command: Sequence[str], facts: dict[str, Any]) -> None:
        """facts: what the device's referee said of it."""
        document = {"schema": 1, "kind": "cases", "cases": {case.id: case.to_json() for case in cases}}
        suites = sorted({case["suite"] for case in document["cases"].values()})  # type: ignore[attr-defined]
        described = environment.gather(
            run=self.folder.name, command=command, suites=suites, seed=0, mode="conform", devices=[facts]
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / CASES).exists():
                raise RunError(f"{self.folder} holds a conformance run already; name another --output-dir")
            (self.folder / CASES).write_text(json.dumps(document, separators=(",", ":")) + "\n")
            environment.write(self.folder, described)
        except OSError as error:
            raise RunError(f"cannot write to {self.folder}: {error.strerror}", Exit.MACHINE) from error

    def append(self, finding: Finding) -> None:
        path = self.files.setdefault(finding.impl, self.folder / f"findings-{finding.impl}.jsonl")
        try:
            with path.open("a") as file:
                file.write(seal_json(to_plain(finding.to_json())) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}", Exit.MACHINE) from error

    def reproducers(self, found: Sequence[Reproducer]) -> None:
        """Writes what the failures shrank to; their scripts lie in the folder already."""
        path = self.folder / REPRODUCERS
        document = {"schema": 1, "kind": "reproducers", "reproducers": [one.to_json() for one in found]}
        path.write_text(json.dumps(document, indent=1) + "\n")


@dataclass(frozen=True)
class Recorded:
    """cases by id; findings of them in the order found; problems: one line for each line that could not be read."""

    folder: Path
    cases: dict[str, Case]
    findings: list[Finding]
    environment: dict[str, Any]
    problems: list[str]


def read(folder: Path) -> Recorded:
    """The run in ``folder``; RunError when it holds none."""
    try:
        document = json.loads((folder / CASES).read_text(encoding="utf-8"))
        cases = {name: Case.from_json(case) for name, case in document["cases"].items()}
        described = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{folder} holds no conformance run (no {Path(error.filename).name})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder}/{CASES} cannot be read: {error}") from None
    findings, problems = [], []
    for path in sorted(folder.glob("findings-*.jsonl")):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            try:
                finding = Finding.from_json(unseal_json(line))
                if finding.case not in cases:
                    raise RecordError(f"case {finding.case} is not in {CASES}")
            except RecordError as error:
                problems.append(f"{path.name}:{number}: {error}")
            else:
                findings.append(finding)
    return Recorded(folder, cases, findings, described, problems)
