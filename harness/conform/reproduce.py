"""Failing cases, each shrunk and shown by a script of its own, which is run to see that it shows the fault."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examination import Examination
from attnbench.harness.conform.shrink import shrink
from attnbench.harness.conform.verdict import Finding, Verdict, masked
from attnbench.harness.run.errors import RunError
from attnbench.harness.run.evidence import evidence
from attnbench.harness.run.process import environment_of
from attnbench.harness.run.waiting import LOOK_EVERY_S, wait_for_all

FOLDER = "reproducers"
RUN_LIMIT_S = 60.0
SHOWS_IT, RAISES = 3, 4
"""Exit codes of a script that got a wrong answer, and of one whose call raised; 1 is a fault of the script's own."""
ALONE, AFTER_PLAIN = "PLAIN_FIRST = False", "PLAIN_FIRST = True"
ASKING = "Asking."
"""What a script prints before its first call: an end before that shows nothing of the implementation."""


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
    *,
    budget_s: float = math.inf,
) -> None:
    """Shrinks each failure within ``seconds`` and writes a script into ``folder``, with what it printed beside it.

    One implementation's after one another, ``jobs`` implementations side by side. tell is called with each, one call at
    a time. budget_s: of all of them together; a failure that it does not reach is not told of. What is under way when
    it is spent is given up, so that all of it ends within budget_s and the start of a worker.
    """
    deadline = time.monotonic() + budget_s
    by_impl: dict[str, list[tuple[Finding, Case]]] = {}
    for pair in failures:
        by_impl.setdefault(pair[0].impl, []).append(pair)
    telling = threading.Lock()

    def work(own: Sequence[tuple[Finding, Case]]) -> None:
        for reproducer in _of_one(examination, own, folder, seconds, deadline):
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
    examination: Examination,
    failures: Sequence[tuple[Finding, Case]],
    folder: Path,
    seconds: float,
    deadline: float,
) -> Iterator[Reproducer]:
    shown: dict[tuple[str, str], str] = {}
    for found, case in failures:
        until = min(deadline, time.monotonic() + seconds)
        if deadline <= time.monotonic():
            return
        small, finding = case, found
        if (
            found.verdict is not Verdict.TIMEOUT
        ):  # every try that hangs as well would take the whole time limit
            ask = _asking(examination, found.impl, until)
            small, finding = shrink(case, found, ask, seconds=until - time.monotonic())
        first = shown.setdefault((small.check, small.problem.key), found.case)
        if first != found.case:
            yield Reproducer(found, small, finding, None, f"the same fault as {first}")
        elif reproducer := _shown(examination, found, case, small, finding, folder, deadline):
            yield reproducer


def _shown(
    examination: Examination,
    found: Finding,
    case: Case,
    small: Case,
    finding: Finding,
    folder: Path,
    deadline: float,
) -> Reproducer | None:
    """None where the time was spent before the script ended."""
    try:
        text = examination.script(found.impl, small, finding.reason, case.id)
    except RunError as error:
        return Reproducer(found, small, finding, None, str(error))
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{found.impl}-{case.suite}-{case.name}.py"
    for variant in variants(text):
        script.write_text(variant)
        limit_s = min(RUN_LIMIT_S, deadline - time.monotonic())
        code, said = run_script(script, found.impl, limit_s, lambda: examination.ended)
        if shows(finding, code, said):
            script.with_suffix(".txt").write_text(evidence(said))
            return Reproducer(found, small, finding, script, said)
    script.unlink()
    if code is None and limit_s < RUN_LIMIT_S:
        return None
    why = f"not shown: {_ending(code)}; it printed: {said[-500:]}"
    return Reproducer(found, small, finding, None, why)


def variants(text: str) -> list[str]:
    """The script, and where another layout is posed the same after a call in contiguous memory.

    The harness asks cases in a row, and what a library planned for one may stay for the next.
    """
    return [text, text.replace(ALONE, AFTER_PLAIN)] if ALONE in text else [text]


# ---- what the end of a script shows -----------------------------------------------------------------------


def shows(finding: Finding, code: int | None, said: str) -> bool:
    """Whether the script's end is the finding's: the implementation's doing, and the same thing done.

    code, said: as ``run_script`` returns them. A wrong answer shows a FAIL; the exception of the finding, raised by a
    call, an ERROR; the same death of the process a CRASHED; a call that does not return a TIMEOUT.
    """
    lines = said.splitlines()
    if ASKING not in lines:
        return False
    raised = next(
        (line.removeprefix("Raised ") for line in reversed(lines) if line.startswith("Raised ")), ""
    )
    answered = bool(raised) or any(line.startswith(("Wrong: ", "Nothing is wrong")) for line in lines)
    match finding.verdict:
        case Verdict.FAIL:  # a refusal that is not clear is one, too
            return code == SHOWS_IT or (code == RAISES and masked(raised) in masked(finding.reason))
        case Verdict.ERROR:
            return code == RAISES and masked(raised).startswith(masked(finding.reason.removesuffix("…")))
        case Verdict.CRASHED:
            return not answered and code is not None and _died_alike(finding.reason, code, lines)
        case Verdict.TIMEOUT:
            return not answered and code is None
    return False


def _died_alike(reason: str, code: int, lines: Sequence[str]) -> bool:
    """Whether a process that ended with ``code`` ended as the worker did. Python's own exit code 1 comes with a
    traceback; a library's without."""
    if code >= 0:
        raised = any(line.startswith("Traceback (most recent call last)") for line in lines)
        return reason.endswith(f"exited with code {code}") and not raised
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    return re.search(rf"\b{name}\b", reason) is not None


def _ending(code: int | None) -> str:
    """How a script that shows nothing ended."""
    endings = {
        None: "does not end",
        0: "finds nothing wrong",
        SHOWS_IT: "gets a wrong answer",
        RAISES: "meets another exception",
    }
    return f"by itself the script {endings[code]}" if code in endings else f"the script failed with {code}"


def run_script(
    script: Path,
    impl: str,
    limit_s: float = RUN_LIMIT_S,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[int | None, str]:
    """Exit code and output of the script in the implementation's own environment; it and all that it started are ended.

    The code is None where it had not ended within ``limit_s``, or when ``stopped`` said so.
    """
    deadline = time.monotonic() + limit_s
    # A pool of compilers would outnumber the cores, and inductor waits up to 300 s for it as the script exits.
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1"} | environment_of(impl)
    # Into a file: a pipe stays open for as long as any process that the script started.
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() < deadline and not stopped():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_EVERY_S)
            code = process.returncode
        finally:
            with contextlib.suppress(ProcessLookupError):  # the whole group may be gone already
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        text = said.read().decode(errors="replace")
    return code, text if code is not None else f"{text}no end within {limit_s:g} s\n"


def _asking(examination: Examination, impl: str, until: float) -> Callable[[Case], Finding]:
    def ask(case: Case) -> Finding:
        examination.forgive(impl)
        return examination.examine(impl, case, limit_s=max(1.0, until - time.monotonic()))

    return ask
