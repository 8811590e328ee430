"""Runs with real worker processes and planted plugins, found like any installed one: by their entry points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from attnbench.harness.problem import Direction, Problem
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Cell, Group

PLUGINS = Path(__file__).parent / "plugins"


class Quiet:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.cells: list[Cell] = []

    def group_started(self, plan: GroupPlan, index: int, total: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def cell_done(self, cell: Cell) -> None:
        self.cells.append(cell)

    def group_done(self, group: Group) -> None: ...
    def note(self, text: str) -> None:
        self.notes.append(text)


class Planted:
    """Plugins of the folder ``plugins``, registered for this process and for the workers it starts."""

    def __init__(self, register: Callable[[dict[str, str], Path], None]) -> None:
        self._register = register

    def register(self, points: dict[str, str]) -> None:
        """points: ``{name: "module:attribute"}``."""
        self._register(points, PLUGINS)

    @staticmethod
    def group(
        impls: Sequence[str], *, seqlen: int = 32, directions: Sequence[Direction] = ("fwd",)
    ) -> GroupPlan:
        """One tiny fp32 group."""
        problem = Problem(batch=1, heads=2, seqlen_q=seqlen, head_dim=16, dtype="fp32")
        problems = tuple(problem.with_direction(direction) for direction in directions)
        return GroupPlan("planted", "case", "a test", problem.group_key, problems, tuple(impls), "normal", 5)

    @staticmethod
    def workers_of(parent: int) -> list[int]:
        """Pids of live workers that were started by ``parent``."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    command = (folder / "cmdline").read_bytes()
                    zombie = b"State:\tZ" in (folder / "status").read_bytes()
                except OSError:
                    continue
                if b"attnbench.harness.run.worker" in command and f'"parent": {parent}'.encode() in command:
                    found += [] if zombie else [int(folder.name)]
        return found


@pytest.fixture(scope="module")
def planted(register_plugins: Callable[[dict[str, str], Path], None]) -> Planted:
    return Planted(register_plugins)


@pytest.fixture(scope="module")
def quiet() -> Quiet:
    return Quiet()
