"""Where a BSHD tensor may lie in memory, by name: the strides that real callers pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from attnbench.harness.problem import TENSORS, Problem, Shape
from attnbench.harness.run.errors import unknown_word


def _bhsd(shape: Shape) -> Shape:
    _, s, h, d = shape
    return (h * s * d, d, s * d, 1)


def _dense(shape: Shape) -> Shape:
    _, s, h, d = shape
    return (s * h * d, h * d, d, 1)


def _sliced(shape: Shape) -> Shape:
    """A slice of the first head_dim columns of twice as many."""
    b, s, h, d = shape
    return _dense((b, s, h, 2 * d))


def _odd_rows(shape: Shape) -> Shape:
    """One element between rows: no row but the first is aligned to more than an element."""
    b, s, h, d = shape
    return _dense((b, s, h, d + 1))


def _transposed(shape: Shape) -> Shape:
    """A transpose of (batch, heads, head_dim, seqlen): the last dimension is not contiguous."""
    _, s, h, d = shape
    return (h * d * s, 1, d * s, s)


def _every_other_row(shape: Shape) -> Shape:
    _, s, h, d = shape
    return (2 * s * h * d, 2 * h * d, d, 1)


def _expanded(_: Shape) -> Shape:
    """One element for all: what autograd passes as dO for ``out.sum()``."""
    return (0, 0, 0, 0)


def _expanded_batch(shape: Shape) -> Shape:
    return (0, *_dense(shape)[1:])


def _expanded_heads(shape: Shape) -> Shape:
    """One head for all, as K and V of multi-query attention are often passed."""
    _, s, _, d = shape
    return (s * d, d, 0, 1)


def _far_batches(shape: Shape) -> Shape:
    """More than 2^31 elements from one batch entry to the next."""
    return ((1 << 31) + 64, *_dense(shape)[1:])


VIEWS: dict[str, Callable[[Shape], Shape]] = {
    "dense": _dense,
    "bhsd": _bhsd,
    "sliced": _sliced,
    "odd-rows": _odd_rows,
    "transposed": _transposed,
    "every-other-row": _every_other_row,
    "expanded": _expanded,
    "expanded-batch": _expanded_batch,
    "expanded-heads": _expanded_heads,
    "far-batches": _far_batches,
}


def view_of(shape: Shape, strides: Shape) -> str | None:
    """The name of the view with these strides, or None."""
    return next((name for name, view in VIEWS.items() if view(shape) == strides), None)


def shapes(problem: Problem) -> dict[str, Shape]:
    """BSHD shapes by tensor name."""
    return {"q": problem.q_shape, "k": problem.k_shape, "v": problem.v_shape, "dout": problem.out_shape}


def with_views(problem: Problem, text: str) -> Problem:
    """``problem`` with tensors laid out as ``text`` says: ``k=transposed,v=sliced``; ValueError for an unknown word."""
    shape_of = shapes(problem)
    strides = dict(problem.strides)
    for part in text.split(","):
        name, _, view = part.strip().partition("=")
        if name not in TENSORS:
            raise ValueError(unknown_word("tensor", name, TENSORS))
        if view not in VIEWS:
            raise ValueError(unknown_word("view", view, VIEWS))
        strides[name] = VIEWS[view](shape_of[name])
    return dataclasses.replace(problem, strides=tuple(sorted(strides.items())))
