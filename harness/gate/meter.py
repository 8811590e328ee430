"""Measures processes of both sides with the harness's own workers, each side from its own folders."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from attnbench.harness.gate.pairs import Role, mirrored
from attnbench.harness.measure.clocks import ClockReader
from attnbench.harness.registry import search_path
from attnbench.harness.run.crew import Crew
from attnbench.harness.run.group import Conditions, GroupRun
from attnbench.harness.run.lock import device_lock
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Cell, Group

MODE = "cold"


class Meter:
    """A device and the sides that may be measured on it; a context, which ends every process that it started.

    sides: by name, the site folders that a side's processes find first. samples: at most, of a turn.
    """

    def __init__(
        self, device: str, sides: Mapping[str, Sequence[str]], samples: int, time_limit_s: float
    ) -> None:
        self.facts: dict[str, Any] = {}
        self._device, self._sides = device, sides
        self._samples, self._time_limit_s = samples, time_limit_s
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnbench-gate-")))
            self._scratch = folder / "oracle"
            self._scratch.mkdir()
            self._crew = Crew(self._device, folder, self._time_limit_s, self._path_of)
            stack.callback(self._crew.close)
            self.facts = {name: value for name, value in self._crew.start_referee().items() if name != "ok"}
            uuid = self.facts.get("uuid")
            if uuid:
                stack.enter_context(device_lock(str(uuid)))
            self._clocks = ClockReader(str(uuid)) if uuid else None
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(self, roles: Iterable[Role]) -> None:
        """Starts the processes that are not there, all at once."""
        self._crew.start([str(role) for role in roles])

    def measure(
        self, plan: GroupPlan, roles: Iterable[Role], run: str, rounds: int, tell: Callable[[str], None]
    ) -> tuple[list[Cell], Group]:
        """Judges the roles on one group of problems, then times them in mirrored rounds, if any. run: as in the
        records. tell: called with the name of each phase.
        """
        # An even seed, so that rounds 0 and 1 are each other's mirror.
        posed = dataclasses.replace(plan, impls=tuple(map(str, roles)), seed=plan.seed - plan.seed % 2)
        conditions = Conditions(
            run=run,
            rounds=rounds,
            samples=self._samples,
            mode=MODE,
            memory=False,
            memory_mib=self.facts.get("memory_mib"),
            scratch=self._scratch,
            order=mirrored,
            ceilings=False,
        )
        cells, group = GroupRun(posed, self._crew, conditions, tell).execute()
        if self._clocks:
            foreign = self._clocks.foreign_processes(self._crew.pids | {os.getpid()})
            group = dataclasses.replace(group, foreign=foreign)
        return cells, group

    def dismiss(self, roles: Iterable[Role]) -> None:
        """Ends the processes of these roles."""
        self._crew.dismiss([str(role) for role in roles])

    def _path_of(self, name: str) -> Sequence[str]:
        own = self._sides[Role.parse(name).side] if "@" in name else ()
        return [*own, *search_path(name)]
