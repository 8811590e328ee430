"""What a conformance worker does: one implementation, one case a request. Imports torch; served by run/worker.py."""

from __future__ import annotations

import time

import torch

from attnbench.harness import registry
from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examine import examine
from attnbench.harness.conform.reproducer import source
from attnbench.harness.contract import Implementation
from attnbench.harness.oracle.judge import Oracle
from attnbench.harness.run.channel import Message
from attnbench.harness.run.solver import device_of

LARGE_BYTES = 256 << 20
"""Inputs beyond this have their memory given back at once: the neighbours on the device need it."""


class Examiner:
    """Operations are the ``do_`` methods; each takes JSON values and returns a JSON object."""

    def __init__(self, name: str, device: str) -> None:
        self._name = name
        self._device = torch.device(device)
        one_thread(self._device)
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

    def do_examine(self, case: Message, oracle: str) -> Message:
        """Puts one case to the implementation. oracle: file of the right answer, empty for none."""
        assert self._implementation is not None, "examine before hello"
        posed = Case.from_json(case)
        judge = self._load(oracle) if oracle else None
        begin = time.perf_counter()
        try:
            outcome = examine(self._implementation, posed, device_of(self._device), judge)
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
