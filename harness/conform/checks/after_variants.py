"""The answer is right after neighbours of the problem, each with one option changed, have been compiled and run.

A cache of kernels or plans whose key leaves an option out hands a neighbour's to this problem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from attnbench.harness.conform.posed import Posed
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem


def check(posed: Posed) -> None:
    for neighbour in neighbours(posed.problem):
        if not posed.implementation.unsupported_reasons(neighbour, posed.where):
            case = dataclasses.replace(posed.case, problem=neighbour)
            near = Posed(case, posed.implementation, posed.where)
            near.answer(near.inputs())
    posed.hold(posed.answer(posed.inputs()), "after its neighbours, ")


def neighbours(problem: Problem) -> Iterator[Problem]:
    """The same problem with one option at a time changed."""
    other_mask = Mask.full() if problem.mask.banded else Mask.causal()
    changes: list[dict[str, object]] = [
        {"scale": 2 * problem.softmax_scale},
        {"mask": other_mask},
        {"mask": Mask.window(7, 0)},
        {"kv_heads": 1},
        {"seqlen_k": problem.seqlen_k + 1},
        {"dtype": "fp16" if problem.dtype != "fp16" else "bf16"},
    ]
    for change in changes:
        yield dataclasses.replace(problem, **change)  # type: ignore[arg-type]
