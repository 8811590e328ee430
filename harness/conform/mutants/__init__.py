"""Implementations with one planted bug each: what the suites must see, and proof that they do.

A mutant is a ``plain.Steps`` with one step broken, named after its class and described by its docstring::

    @planted("causal/fewer-queries", control="causal/as-many", cites=("flash-attention#282",))
    class AlignsTopLeft(Steps):
        \"\"\"Aligns every band top left, whatever was asked.\"\"\"

``killed_by`` is the case that is there for the bug, ``control`` one beside it that the bug does not touch. Importing
this package imports no torch; ``catalogue`` does.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnbench.harness.conform.mutants.plain import Plain, Steps

MODULES = ("bands", "blocks", "softmax", "sizes", "backward", "memory", "operators", "dropped")
"""Where mutants are planted, one kind of bug a module."""

_PLANTED: dict[str, Mutant] = {}


@dataclass(frozen=True)
class Mutant:
    """killed_by, control: ``suite/case``. only: no case of another suite sees it. crashes: it takes its process along.
    steps: the broken class."""

    name: str
    breaks: str
    killed_by: str
    control: str
    cites: tuple[str, ...]
    only: bool
    crashes: bool
    steps: type[Steps]

    @property
    def suite(self) -> str:
        """The suite of the case that must kill it."""
        return self.killed_by.partition("/")[0]

    def implementation(self) -> Plain:
        from attnbench.harness.conform.mutants.plain import Plain

        return Plain(self.name, self.steps)


def planted(
    killed_by: str, *, control: str, cites: tuple[str, ...] = (), only: bool = False, crashes: bool = False
) -> Callable[[type[Steps]], type[Steps]]:
    """Enters a class of steps into the catalogue."""

    def enter(steps: type[Steps]) -> type[Steps]:
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", steps.__name__).lower()
        assert name not in _PLANTED, f"mutant {name} is planted twice"
        breaks = (steps.__doc__ or "").strip().splitlines()[0]
        _PLANTED[name] = Mutant(name, breaks, killed_by, control, cites, only, crashes, steps)
        return steps

    return enter


def catalogue() -> dict[str, Mutant]:
    """Every mutant by name, in the order planted. Imports torch."""
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return _PLANTED
