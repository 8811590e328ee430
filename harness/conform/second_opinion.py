"""Whether what a worker raised is its case's own, or left over from an earlier case in the same process.

An exception may leave a library in any state: after one that a mode of torch's raised, a worker of FlexAttention raised
another in each of the 131 cases that it was asked from then on. So what is raised in a process that has been upset
before is no finding until a fresh one has been asked. A wrong answer needs no second opinion: nothing that came
before excuses it.
"""

from __future__ import annotations

import threading
from collections import Counter

from attnbench.harness.conform.verdict import Verdict, masked
from attnbench.harness.run.channel import Message

ENOUGH = 2
"""Processes that nothing had upset and that raised the same, after which it is believed of any: an implementation that
raises everywhere does not cost a start a case."""


def upsets(reply: Message) -> bool:
    """Whether something may have been raised while a worker made this answer: a refusal and a failure can be due to an
    exception that a check caught."""
    return not reply["ok"] or reply.get("verdict", Verdict.PASS) != Verdict.PASS


class SecondOpinions:
    """Of one implementation, whichever of its workers is asked; threads may share it."""

    def __init__(self) -> None:
        self._confirmed: Counter[str] = Counter()
        self._denied: set[str] = set()
        self._lock = threading.Lock()

    def wanted(self, reply: Message) -> bool:
        """Whether this answer of a worker that was upset before is to be had of a fresh one too: until it has been
        confirmed often enough, and always where a fresh one once had it otherwise."""
        said = _said(reply)
        with self._lock:
            return bool(said) and (said in self._denied or self._confirmed[said] < ENOUGH)

    def heard(self, reply: Message, instead_of: Message | None = None) -> None:
        """What a worker that nothing had upset said, ``instead_of`` an upset one if there was one."""
        said, first = _said(reply), _said(instead_of) if instead_of else ""
        with self._lock:
            if said:
                self._confirmed[said] += 1
            if first and first != said:
                self._denied.add(first)


def _said(reply: Message) -> str:
    """What was raised, without its numbers; empty where nothing was."""
    if reply["ok"] or reply["status"] != Verdict.ERROR:
        return ""
    return masked(reply["reason"])
