"""What a conformance worker does: one implementation, one case a request. Imports torch; served by run/worker.py."""

from __future__ import annotations

import os
import time

import torch

from attnbench.harness import registry
from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examine import Outcome, examine
from attnbench.harness.conform.reproducer import source
from attnbench.harness.conform.verdict import Verdict
from attnbench.harness.contract import Implementation
from attnbench.harness.measure.capture import CaptureFailed
from attnbench.harness.oracle.judge import Oracle
from attnbench.harness.run.calls import device_of
from attnbench.harness.run.channel import Message
from attnbench.harness.run.worker import failure

LARGE_BYTES = 256 << 20
"""Inputs beyond this have their memory given back at once: the neighbours on the device need it."""


class Examiner:
    """Operations are the ``do_`` methods; each takes JSON values and returns a JSON object."""

    def __init__(self, name: str, device: str) -> None:
        self._name = name
        self._device = torch.device(device)
        one_thread(self._device)
        # A worker compiles one thing at a time; a pool of compilers for each would outnumber the cores many times.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        self._implementation: Implementation | None = None
        self._oracle: tuple[str, Oracle] | None = None

    def do_hello(self) -> Message:
        """Loads the plugin. Answers its version, and why it is unavailable here, if it is."""
        try:
            self._implementation = registry.load(self._name)
        except registry.PluginError as error:
            return {"version": "unknown", "unavailable": str(error)}
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        found = self._implementation.unavailable(device_of(self._device))
        return {
            "version": self._implementation.version(),
            "unavailable": found.line if found else "",
            "compile_processes": self._implementation.compile_processes,
        }

    def do_examine(self, case: Message, oracle: str, memory_share: float = 1.0) -> Message:
        """Puts one case to the implementation. oracle: file of the right answer, empty for none. memory_share: of the
        GPU's memory, what this process may take."""
        assert self._implementation is not None, "examine before hello"
        if self._device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(memory_share, self._device)
        posed = Case.from_json(case)
        judge = self._load(oracle) if oracle else None
        lost = False
        begin = time.perf_counter()
        try:
            outcome = examine(self._implementation, posed, device_of(self._device), judge)
        except CaptureFailed as error:
            told, lost = failure(error.__cause__ or error), True
            outcome = Outcome(Verdict(told["status"]), told["reason"], told["evidence"])
        finally:
            if posed.alone or posed.problem.input_bytes > LARGE_BYTES:
                del judge
                self._give_back()
        spent_ms = (time.perf_counter() - begin) * 1e3
        return {
            "verdict": outcome.verdict,
            "reason": outcome.reason,
            "evidence": outcome.evidence,
            "facts": outcome.facts,
            "ms": spent_ms,
            "fatal": lost,
        }

    def do_script(self, case: Message, reason: str, found_as: str) -> Message:
        """Source of a script that shows the case without the harness."""
        assert self._implementation is not None, "script before hello"
        where = device_of(self._device)
        return {"source": source(Case.from_json(case), self._implementation, where, reason, found_as)}

    def _load(self, path: str) -> Oracle:
        if self._oracle is None or self._oracle[0] != path:
            self._oracle = (path, Oracle.load(path, self._device))
        return self._oracle[1]

    def _give_back(self) -> None:
        self._oracle = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def one_thread(device: torch.device) -> None:
    """Cases are small: on a CPU, threads of one operation would wait for each other, and the workers for them."""
    if device.type == "cpu":
        torch.set_num_threads(1)
