"""Failing cases, each shrunk and shown by a script of its own, which is run to see that it shows the fault."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examination import Examination
from attnbench.harness.conform.shrink import shrink
from attnbench.harness.conform.verdict import Finding, Verdict
from attnbench.harness.run.errors import RunError
from attnbench.harness.run.evidence import evidence
from attnbench.harness.run.process import environment_of
from attnbench.harness.run.waiting import wait_for_all

FOLDER = "reproducers"
RUN_LIMIT_S = 60.0
SHOWS_IT = 3
"""Exit code of a script that shows its fault; 1 is a fault of the script's own."""


@dataclass(frozen=True)
class Reproducer:
    """found: before it was shrunk. case, finding: the smallest that fails alike.

    script: run by itself, it ended as one that shows the fault; None where there is none. said: what it printed, or
    why there is none.
    """

    found: Finding
    case: Case
    finding: Finding
    script: Path | None
    said: str

    def to_json(self) -> dict[str, Any]:
        return {
            "impl": self.found.impl,
            "found": self.found.case,
            "smallest": self.case.to_json(),
            "verdict": self.finding.verdict,
            "reason": self.finding.reason,
            "script": self.script and self.script.name,
            "why_none": "" if self.script else self.said,
        }


def worst_first(
    findings: Iterable[Finding], by_id: Mapping[str, Case], most: int
) -> list[tuple[Finding, Case]]:
    """At most ``most`` failures of each implementation, one a named case, in the order found."""
    chosen: dict[tuple[str, str], tuple[Finding, Case]] = {}
    for finding in findings:
        if finding.failed:
            case = by_id[finding.case]
            chosen.setdefault((finding.impl, f"{case.suite}/{case.name}"), (finding, case))
    taken: dict[str, int] = {}
    kept = []
    for (impl, _), pair in chosen.items():
        taken[impl] = taken.get(impl, 0) + 1
        if taken[impl] <= most:
            kept.append(pair)
    return kept


def reproduce(
    examination: Examination,
    failures: Sequence[tuple[Finding, Case]],
    folder: Path,
    seconds: float,
    jobs: int,
    tell: Callable[[Reproducer], None],
) -> None:
    """Shrinks each failure within ``seconds`` and writes a script into ``folder``, with what it printed beside it.

    One implementation's after one another, ``jobs`` implementations side by side. tell is called with each, one call at
    a time.
    """
    by_impl: dict[str, list[tuple[Finding, Case]]] = {}
    for pair in failures:
        by_impl.setdefault(pair[0].impl, []).append(pair)
    telling = threading.Lock()

    def work(own: Sequence[tuple[Finding, Case]]) -> None:
        for reproducer in _of_one(examination, own, folder, seconds):
            with telling:
                tell(reproducer)
        examination.close(own[0][0].impl)

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            wait_for_all([pool.submit(work, own) for own in by_impl.values()])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            examination.kill()
            raise


def _of_one(
    examination: Examination, failures: Sequence[tuple[Finding, Case]], folder: Path, seconds: float
) -> Iterator[Reproducer]:
    shown: dict[tuple[str, str], str] = {}
    for found, case in failures:
        small, finding = case, found
        if (
            found.verdict is not Verdict.TIMEOUT
        ):  # every try that hangs as well would take the whole time limit
            small, finding = shrink(case, found, _asking(examination, found.impl), seconds=seconds)
        first = shown.setdefault((small.check, small.problem.key), found.case)
        if first == found.case:
            yield _shown(examination, found, case, small, finding, folder)
        else:
            yield Reproducer(found, small, finding, None, f"the same fault as {first}")


def _shown(
    examination: Examination, found: Finding, case: Case, small: Case, finding: Finding, folder: Path
) -> Reproducer:
    if small.problem.dropout_p:
        why = "a script does not know which weights were dropped, which the harness recovers"
        return Reproducer(found, small, finding, None, why)
    try:
        text = examination.script(found.impl, small, finding.reason, case.id)
    except RunError as error:
        return Reproducer(found, small, finding, None, str(error))
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{found.impl}-{case.suite}-{case.name}.py"
    script.write_text(text)
    code, said = run_script(script, found.impl)
    if code not in _SHOWS[finding.verdict]:
        script.unlink()
        why = f"seen by check {small.check} in the harness alone; by itself the script ended with {code}: {said[-500:]}"
        return Reproducer(found, small, finding, None, why)
    script.with_suffix(".txt").write_text(evidence(said))
    return Reproducer(found, small, finding, script, said)


_SHOWS: dict[Verdict, tuple[int | None, ...]] = {
    Verdict.FAIL: (SHOWS_IT,),
    Verdict.ERROR: (SHOWS_IT,),
    Verdict.CRASHED: tuple(range(-64, 0)),  # killed by a signal
    Verdict.TIMEOUT: (None,),
}


def run_script(script: Path, impl: str) -> tuple[int | None, str]:
    """Exit code (None: no end within RUN_LIMIT_S) and output of the script in the implementation's own environment."""
    command = [sys.executable, "-P", str(script)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
            check=False,
            env=environment_of(impl),
        )
    except subprocess.TimeoutExpired:
        return None, f"no end within {RUN_LIMIT_S:g} s\n"
    return done.returncode, done.stdout + done.stderr


def _asking(examination: Examination, impl: str) -> Callable[[Case], Finding]:
    def ask(case: Case) -> Finding:
        examination.forgive(impl)
        return examination.examine(impl, case)

    return ask
