"""What an upset worker raises is asked of a fresh one, until it is known not to come of the upset."""

from __future__ import annotations

from typing import Any

import pytest

from attnbench.harness.conform.second_opinion import ENOUGH, SecondOpinions, upsets

PASS: dict[str, Any] = {"ok": True, "verdict": "PASS"}


def raised(reason: str, status: str = "ERROR") -> dict[str, Any]:
    return {"ok": False, "status": status, "reason": reason}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (PASS, False),
        ({"ok": True, "source": "of a script"}, False),
        ({"ok": True, "verdict": "REFUSED"}, True),
        ({"ok": True, "verdict": "FAIL"}, True),
        (raised("x"), True),
        (raised("x", "OOM"), True),
    ],
)
def test_all_but_a_pass_may_leave_something_behind(reply: dict[str, Any], expected: bool) -> None:
    assert upsets(reply) == expected


def test_what_was_raised_in_clean_processes_often_enough_is_believed() -> None:
    opinions = SecondOpinions()
    for number in range(ENOUGH):
        assert opinions.wanted(raised("no kernel for 7 keys at 0x7f31"))
        opinions.heard(raised(f"no kernel for {number} keys at 0x{number}ab"))
    assert not opinions.wanted(raised("no kernel for 7 keys at 0x7f31"))
    assert opinions.wanted(raised("no kernel at all"))


def test_what_a_fresh_process_once_had_otherwise_is_asked_again_every_time() -> None:
    opinions = SecondOpinions()
    opinions.heard(PASS, instead_of=raised("left over from 7 keys"))
    for _ in range(ENOUGH + 1):
        opinions.heard(raised("left over from 9 keys"))
    assert opinions.wanted(raised("left over from 11 keys"))


def test_only_what_was_raised_is_asked_again() -> None:
    """A wrong answer is a fault wherever it came from; a lack of memory has its own second asking."""
    opinions = SecondOpinions()
    assert not opinions.wanted({"ok": True, "verdict": "FAIL", "reason": "out is nan"})
    assert not opinions.wanted(raised("out of memory", "OOM"))
    opinions.heard({"ok": True, "verdict": "FAIL", "reason": "same"}, instead_of=raised("same"))
    assert opinions.wanted(raised("same"))
