"""The plan of a run: every group that will be judged and timed, before anything is imported or measured.

A group is one problem in all its directions with all implementations, and a JSON document from end to end, so
that any executor can place it on a device. Nothing is dropped here for being hard: every implementation meets
every problem, and the runner answers each pair with a status. Only the user's own filters narrow a plan.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.harness.problem import DIRECTIONS, Problem
from attnbench.harness.run.errors import RunError, unknown_word
from attnbench.harness.run.suite import Case, Suite


class PlanError(RunError):
    """A selection that names nothing known, or leaves nothing to run."""


@dataclass(frozen=True)
class GroupPlan:
    """One group to run.

    group: the problems' ``group_key``. problems differ in direction alone, ordered fwd, bwd, fwd_bwd.
    seed: of the group's inputs and of the order of its rounds.
    """

    suite: str
    case: str
    why: str
    group: str
    problems: tuple[Problem, ...]
    impls: tuple[str, ...]
    inputs: str
    seed: int

    @property
    def cells(self) -> list[str]:
        """Ids of the group's cells (``record.Cell.id``), implementation by implementation."""
        return [f"{impl}/{problem.key}" for impl in self.impls for problem in self.problems]

    @property
    def longest(self) -> int:
        """The longer of the two sequences: what its cost grows with."""
        return max(self.problems[0].seqlen_q, self.problems[0].seqlen_k)

    def to_json(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        problems = [problem.to_json() for problem in self.problems]
        return fields | {"problems": problems, "impls": list(self.impls)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GroupPlan:
        """Inverse of ``to_json``; PlanError for a missing, unknown or malformed field."""
        try:
            problems = tuple(Problem.from_json(problem) for problem in data["problems"])
            return cls(**data | {"problems": problems, "impls": tuple(data["impls"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"malformed group in a plan: {error!r}") from None


@dataclass(frozen=True)
class Filters:
    """What the user asked to keep; an empty tuple or None keeps all. seqlens match the longer sequence."""

    dtypes: tuple[str, ...] = ()
    seqlens: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()
    causal: bool | None = None
    directions: tuple[str, ...] = ()

    def keep(self, cases: Sequence[Case], suite: str) -> list[Case]:
        """The cases that pass; PlanError names the filter that asks for what is absent."""
        kept = list(cases)
        for option, wanted, value_of in self._rules():
            if not wanted:
                continue
            # Asked of the whole suite: a value that no case has is a slip, even where the others have some.
            there = list(dict.fromkeys(value_of(case.problem) for case in cases))
            if absent := [value for value in wanted if value not in there]:
                raise PlanError(
                    f"{option} {_written(absent[0])}: suite {suite} has no such case; it has {_listed(there)}"
                )
            left = list(dict.fromkeys(value_of(case.problem) for case in kept))
            kept = [case for case in kept if value_of(case.problem) in wanted]
            if not kept:
                asked = ",".join(map(_written, wanted))
                raise PlanError(
                    f"{option} {asked} leaves nothing of suite {suite}; other filters leave {_listed(left)}"
                )
        return kept

    def _rules(self) -> Iterable[tuple[str, tuple[Any, ...], Callable[[Problem], Any]]]:
        yield "--dtype", self.dtypes, lambda problem: problem.dtype
        yield "--headdim", self.head_dims, lambda problem: problem.head_dim
        causal = () if self.causal is None else (self.causal,)
        yield "--causal", causal, lambda problem: problem.mask.right == 0
        yield "--mode", self.directions, lambda problem: problem.direction
        yield "--seqlen", self.seqlens, lambda problem: max(problem.seqlen_q, problem.seqlen_k)


def make_plan(
    suite: Suite, impls: Sequence[str], *, seed: int, only_filters: Filters | None = None
) -> list[GroupPlan]:
    """Every group of ``suite`` that the filters keep, with every implementation; short sequences come first.

    PlanError where nothing is left, naming what emptied it.
    """
    if not impls:
        raise PlanError("no implementation is left to run; see `bench list`")
    cases = (only_filters or Filters()).keep(suite.cases, suite.name)
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.problem.group_key, []).append(case)
    plans = [_group(suite, key, members, tuple(impls), seed) for key, members in groups.items()]
    # An early end (a limit on device time, Ctrl-C) then costs the expensive groups, not the many cheap ones.
    return sorted(plans, key=lambda plan: plan.longest)


def merge_plans(recorded: Sequence[GroupPlan], added: Sequence[GroupPlan]) -> list[GroupPlan]:
    """A run's plan with more groups; one that the run already has, with the same cells, is left as recorded.

    PlanError for a group that the run has with other cells. With more, ratios would come from different rounds; with
    fewer, the group could not be closed, and to measure all of it would pass over the user's choice.
    """
    known = {plan.group: plan for plan in recorded}
    for plan in added:
        if plan.group not in known:
            continue
        planned = known[plan.group]
        if more := set(plan.cells) - set(planned.cells):
            raise PlanError(
                f"{min(more)} would join a group of this run that is already planned; cells of a group are "
                "timed in the same rounds, so measure it in a new run"
            )
        if len(plan.cells) < len(planned.cells):
            raise PlanError(
                f"{plan.group} is planned already, with {len(planned.impls)} implementations and "
                f"{','.join(problem.direction for problem in planned.problems)}: {len(planned.cells)} cells, not "
                f"{len(plan.cells)}; --resume alone goes on with all of it, a new run measures less"
            )
    return [*recorded, *(plan for plan in added if plan.group not in known)]


def select_impls(
    names_available: Iterable[str], only: Sequence[str], skip: Sequence[str], option: str = "--only"
) -> tuple[str, ...]:
    """Names that match ``only`` (all if empty) and not ``skip``; globs such as ``sdpa-*`` are allowed.

    PlanError for a pattern that matches nothing, with its close matches, and for an empty selection. option: the one
    that ``only`` was given by.
    """
    available = list(dict.fromkeys(names_available))
    chosen = _matching(option, available, only) if only else available
    skipped = _matching("--skip", available, skip)
    if not (left := tuple(name for name in chosen if name not in skipped)):
        if skip:
            raise PlanError(f"--skip {','.join(skip)} leaves no implementation to run")
        raise PlanError("no implementation is registered: is attnbench installed here?")
    return left


def _matching(option: str, available: list[str], patterns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        names = fnmatch.filter(available, pattern)
        if not names:
            raise PlanError(f"{option}: {unknown_word('implementation', pattern, available)}")
        found += [name for name in names if name not in found]
    return found


def _group(suite: Suite, key: str, members: list[Case], impls: tuple[str, ...], seed: int) -> GroupPlan:
    problems = sorted(
        (case.problem for case in members), key=lambda problem: DIRECTIONS.index(problem.direction)
    )
    first = members[0]
    # Its own stream for every group, and the same one however the run is filtered or resumed.
    stream = zlib.crc32(f"{seed}/{key}".encode())
    return GroupPlan(suite.name, first.name, first.why, key, tuple(problems), impls, first.inputs, stream)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return (
        f"{value // 1024}k" if isinstance(value, int) and value >= 1024 and value % 1024 == 0 else str(value)
    )


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(_written, values))
