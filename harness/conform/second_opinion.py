"""Whether what a worker raised is its case's own, or left over from an earlier case in the same process.

An exception may leave a library in any state: after one that a mode of torch's raised, a worker of FlexAttention raised
another in each of the 131 cases that it was asked from then on. So what is raised in a process that has been upset
before is no finding until a fresh one has been asked. A wrong answer needs no second opinion: nothing that came
before excuses it.
"""

from __future__ import annotations

import re
import threading
from collections import Counter

from attnbench.harness.conform.verdict import Verdict
from attnbench.harness.run.channel import Message

ENOUGH = 2
"""Fresh processes that raised the same, after which it is believed of any process: an implementation that raises
everywhere does not cost a start a case."""


def upsets(reply: Message) -> bool:
    """Whether something may have been raised while a worker made this answer: a refusal and a failure can be due to an
    exception that a check caught."""
    return not reply["ok"] or reply.get("verdict", Verdict.PASS) != Verdict.PASS


class SecondOpinions:
    """Of one implementation, whichever of its workers is asked; threads may share it."""

    def __init__(self) -> None:
        self._confirmed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def wanted(self, reply: Message) -> bool:
        """Whether this answer of a worker that was upset before is to be had of a fresh one too."""
        raised = not reply["ok"] and reply["status"] == Verdict.ERROR
        with self._lock:
            return raised and self._confirmed[_alike(reply["reason"])] < ENOUGH

    def given(self, first: Message, second: Message) -> None:
        """What a fresh worker said to the same case."""
        with self._lock:
            if not second["ok"] and _alike(second["reason"]) == _alike(first["reason"]):
                self._confirmed[_alike(first["reason"])] += 1


def _alike(reason: str) -> str:
    """The reason without its figures and addresses, which differ from case to case and process to process."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", reason)
