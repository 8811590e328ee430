"""A script shows a finding only by the implementation's doing the same thing again, and never outlives its time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.reproduce import RAISES, SHOWS_IT, reproduce, run_script, shows
from attnbench.harness.conform.verdict import Finding, Verdict
from attnbench.harness.problem import Problem

CASE = Case(Problem(1, 1, 4, 8, dtype="fp32"), "c", "w", suite="s")
MISALIGNED = "AcceleratorError: CUDA error: misaligned address"
ASKED = "Asking.\n"


def found(verdict: Verdict, reason: str) -> Finding:
    return Finding(CASE.id, "x", "1", "cpu", verdict, reason)


@pytest.mark.parametrize(
    ("finding", "code", "said", "shown"),
    [
        (found(Verdict.FAIL, "out is off"), SHOWS_IT, ASKED + "Wrong: out is off", True),
        (found(Verdict.FAIL, "out is off"), 0, ASKED + "Nothing is wrong.", False),
        (found(Verdict.FAIL, "out is off"), RAISES, ASKED + "Raised ValueError: no", False),
        (found(Verdict.FAIL, "refuses (no) with an unclear error: KeyError: 7"), RAISES, ASKED + "Raised KeyError: 7",
         True),
        (found(Verdict.FAIL, "out is off"), SHOWS_IT, "it ended before it asked", False),
        (found(Verdict.ERROR, MISALIGNED), RAISES, f"{ASKED}Traceback ...\n\nRaised {MISALIGNED}", True),
        (found(Verdict.ERROR, "RuntimeError: 0x7f at 12"), RAISES, f"{ASKED}Raised RuntimeError: 0x9a at 3", True),
        (found(Verdict.ERROR, f"{MISALIGNED[:30]}…"), RAISES, f"{ASKED}Raised {MISALIGNED}", True),
        (found(Verdict.ERROR, MISALIGNED), RAISES, f"{ASKED}Raised RuntimeError: CUDA error: misaligned", False),
        (found(Verdict.ERROR, MISALIGNED), SHOWS_IT, f"{ASKED}Wrong: out is off", False),
        (found(Verdict.ERROR, MISALIGNED), 1, f"{ASKED}Traceback ...\n{MISALIGNED}", False),
        (found(Verdict.CRASHED, "its process died of SIGSEGV"), -11, ASKED, True),
        (found(Verdict.CRASHED, "its process died of SIGSEGV"), -6, ASKED, False),
        (found(Verdict.CRASHED, "its process died of SIGSEGV"), -11, "", False),
        (found(Verdict.CRASHED, "its process exited with code 1"), 1, ASKED + "illegal instruction", True),
        (found(Verdict.CRASHED, "its process exited with code 1"), 1,
         ASKED + "Traceback (most recent call last):\nNameError", False),
        (found(Verdict.TIMEOUT, "no answer within 5 s"), None, ASKED, True),
        (found(Verdict.TIMEOUT, "no answer within 5 s"), None, ASKED + "Nothing is wrong.", False),
        (found(Verdict.TIMEOUT, "no answer within 5 s"), None, "", False),
    ],
)  # fmt: skip
def test_a_script_shows_what_was_found_and_nothing_else(
    finding: Finding, code: int | None, said: str, shown: bool
) -> None:
    assert shows(finding, code, said) is shown


@pytest.mark.parametrize("text", ["def", "import no_such_module\n", "1 / 0\n", "raise SystemExit(3)\n"])
@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.ERROR, Verdict.CRASHED, Verdict.TIMEOUT])
def test_a_script_that_fails_by_itself_shows_nothing(verdict: Verdict, text: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    code, said = run_script(script, "x")
    assert code in {1, 3}
    assert not shows(found(verdict, "its process exited with code 1"), code, said)


LEAVES_A_CHILD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
"""


@pytest.mark.parametrize(("then", "code"), [("", 0), ("child.wait()", None)])
def test_what_a_script_started_ends_with_it(then: str, code: int | None, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LEAVES_A_CHILD + then)
    ended, said = run_script(script, "x", 60.0, lambda: code is None and bool(os.times()))
    assert ended == code
    if said[:1].isdigit():  # it came so far
        child = Path(f"/proc/{said.split()[0]}/status")
        while child.exists() and "zombie" not in child.read_text():
            time.sleep(0.01)


class Examining:
    """Answers as an Examination does. limits: of the cases that it was asked."""

    ended = False

    def __init__(self, script: str) -> None:
        self.text = script
        self.limits: list[float] = []

    def examine(self, impl: str, case: Case, limit_s: float) -> Finding:
        self.limits.append(limit_s)
        return Finding(case.id, impl, "1", "cpu", Verdict.PASS)

    def script(self, *_: Any) -> str:
        return self.text

    def forgive(self, impl: str) -> None: ...
    def close(self, impl: str) -> None: ...
    def kill(self) -> None: ...


FAILURES = [(found(Verdict.FAIL, "out is off"), CASE)]


def told_by(examining: Examining, folder: Path, seconds: float, **budget: float) -> list[Any]:
    told: list[Any] = []
    reproduce(examining, FAILURES, folder, seconds, 2, told.append, **budget)  # type: ignore[arg-type]
    return told


def test_a_failure_beyond_the_budget_is_not_told_of_nor_asked(tmp_path: Path) -> None:
    examining = Examining("")
    assert told_by(examining, tmp_path, 90.0, budget_s=0.0) == []
    assert examining.limits == []


def test_no_try_of_shrinking_has_longer_than_is_left(tmp_path: Path) -> None:
    examining = Examining("print('Asking.'); print('Wrong: out is off'); raise SystemExit(3)")
    (reproducer,) = told_by(examining, tmp_path, 5.0)
    assert reproducer.script == tmp_path / "x-s-c.py"
    assert examining.limits
    assert max(examining.limits) <= 5.0


def test_a_script_that_does_not_end_in_the_time_left_is_no_finding(tmp_path: Path) -> None:
    examining = Examining("import time; print('Asking.', flush=True); time.sleep(600)")
    assert told_by(examining, tmp_path, 0.0, budget_s=0.5) == []
    assert not list(tmp_path.glob("*.py"))


def test_why_there_is_no_script_says_how_it_ended(tmp_path: Path) -> None:
    (reproducer,) = told_by(Examining("print('Asking.'); print('Nothing is wrong.')"), tmp_path, 0.0)
    assert reproducer.script is None
    assert reproducer.said.startswith(
        "not shown: by itself the script finds nothing wrong; it printed: Asking."
    )
    assert SimpleNamespace(**reproducer.to_json()).why_none == reproducer.said
