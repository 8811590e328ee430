"""Makes a failing case as small as it can be and still fail in the same way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.verdict import Finding
from attnbench.harness.conform.views import shapes, view_of, with_views
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem

MOST_TRIES = 400
MOST_SECONDS = 90.0

Examine = Callable[[Case], Finding]
Change = dict[str, Any]


def shrink(
    case: Case, finding: Finding, examine: Examine, *, seconds: float = MOST_SECONDS
) -> tuple[Case, Finding]:
    """The smallest case found that ends with the same verdict, and its finding.

    One respect at a time is made as simple as it can be, until none can be made simpler, or MOST_TRIES or ``seconds``
    are spent.
    """
    deadline = time.monotonic() + seconds
    seen = {case.id}

    def simpler(move: Move) -> bool:
        """Takes the first step of the move that still fails; False where there is none."""
        nonlocal case, finding
        for candidate in move(case):
            if candidate.id in seen:
                continue
            if len(seen) > MOST_TRIES or time.monotonic() > deadline:
                return False
            seen.add(candidate.id)
            found = examine(candidate)
            if found.asked and found.verdict is finding.verdict:
                case, finding = candidate, found
                return True
        return False

    moved = True
    while moved:
        moved = False
        for move in MOVES:
            while simpler(move):
                moved = True
    return case, finding


# ---- in which respects a case can be simpler --------------------------------------------------------------


def _asked(case: Case) -> Iterator[Case]:
    if case.inputs != "normal":
        yield dataclasses.replace(case, inputs="normal")
    for name in case.options:
        yield dataclasses.replace(case, options={n: v for n, v in case.options.items() if n != name})


def _of_problem(changes: Callable[[Problem], Iterator[Change]]) -> Move:
    def move(case: Case) -> Iterator[Case]:
        for change in changes(case.problem):
            if (problem := _changed(case.problem, change)) is not None:
                yield dataclasses.replace(case, problem=problem)

    return move


def _direction(problem: Problem) -> Iterator[Change]:
    if problem.direction != "fwd":
        yield {"direction": "fwd"}


def _layout(problem: Problem) -> Iterator[Change]:
    if problem.strides:
        yield {"strides": ()}
    for name, _ in problem.strides:
        yield {"strides": tuple((n, s) for n, s in problem.strides if n != name)}
    if problem.layout != "bshd":
        yield {"layout": "bshd"}


def _mask(problem: Problem) -> Iterator[Change]:
    mask = problem.mask
    if mask != Mask.full():
        yield {"mask": Mask.full()}
    if mask.blocks and mask.banded:
        yield {"mask": dataclasses.replace(mask, blocks=None)}
        yield {"mask": Mask(blocks=mask.blocks)}
    if mask.left is not None and mask.right is not None:
        yield {"mask": dataclasses.replace(mask, left=None, right=0)}
    if mask.alignment != "bottom_right":
        yield {"mask": dataclasses.replace(mask, alignment="bottom_right")}
    for side in ("left", "right"):
        width = getattr(mask, side)
        for size in (0, *_smaller(width)) if width else ():
            yield {"mask": Mask(**{**_sides(mask), side: size})}


def _dtype(problem: Problem) -> Iterator[Change]:
    if problem.dtype != "fp32":
        yield {"dtype": "fp32"}


def _sides(mask: Mask) -> Change:
    return {f.name: getattr(mask, f.name) for f in dataclasses.fields(mask)}


def _scale(problem: Problem) -> Iterator[Change]:
    if problem.scale is not None:
        yield {"scale": None}


def _equal_sizes(problem: Problem) -> Iterator[Change]:
    if problem.head_dim_v != problem.head_dim:
        yield {"head_dim_v": problem.head_dim}
        yield {"head_dim": problem.head_dim_v}
    if problem.seqlen_q != problem.seqlen_k:
        shorter = min(problem.seqlen_q, problem.seqlen_k)
        yield {"seqlen_q": shorter, "seqlen_k": shorter}


def _heads(problem: Problem) -> Iterator[Change]:
    group = problem.heads // problem.kv_heads
    for kv_heads in _smaller(problem.kv_heads):
        yield {"kv_heads": kv_heads, "heads": kv_heads * group}
    for size in _smaller(group):
        yield {"heads": problem.kv_heads * size}


def _together(*names: str) -> Callable[[Problem], Iterator[Change]]:
    """Sizes made smaller as one, where they are equal."""

    def changes(problem: Problem) -> Iterator[Change]:
        sizes = {getattr(problem, name) for name in names}
        for size in _smaller(sizes.pop()) if len(sizes) == 1 else ():
            yield dict.fromkeys(names, size)

    return changes


Move = Callable[[Case], Iterator[Case]]
MOVES: list[Move] = [
    _of_problem(_direction),
    _of_problem(_dtype),
    _of_problem(_layout),
    _of_problem(_together("batch")),
    _of_problem(_heads),
    _asked,
    _of_problem(_scale),
    _of_problem(_mask),
    _of_problem(_equal_sizes),
    _of_problem(_together("head_dim", "head_dim_v")),
    _of_problem(_together("seqlen_q", "seqlen_k")),
    _of_problem(_together("seqlen_q")),
    _of_problem(_together("seqlen_k")),
]
"""Those that make every later try cheaper come first."""


def _smaller(size: int) -> Iterator[int]:
    """1, 2, 3, 4, 5, 8, 9 ...: powers of two and their followers, where tiles end; then ever closer to ``size``."""
    power = 1
    while power < size:
        yield power
        if 1 < power < size - 1:
            yield power + 1
        power *= 2
    step = size // 4
    while step:
        yield size - step
        step //= 2


def _changed(problem: Problem, change: Change) -> Problem | None:
    """The problem with the change, its named views laid anew for its sizes; None where that makes none."""
    views = {name: view_of(shapes(problem)[name], strides) for name, strides in problem.strides}
    resized = "strides" not in change and any(name not in ("direction", "mask", "scale") for name in change)
    if resized and None in views.values():
        return None
    try:
        whole: Change = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
        changed = Problem(**whole | ({"strides": ()} if resized else {}) | change)
        if resized and views:
            changed = with_views(changed, ",".join(f"{name}={view}" for name, view in views.items()))
    except ValueError:
        return None
    return changed
