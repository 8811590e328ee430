"""Walks a large tensor in pieces, so that no step needs a second copy of it."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_ELEMENTS = 1 << 24
"""Elements a piece holds at most (unless one row is larger): 64 MiB as fp32, 128 MiB as fp64."""


def row_major(shape: tuple[int, ...], limit: int = CHUNK_ELEMENTS) -> Iterator[tuple[slice, slice]]:
    """Slices of the first two dimensions that cover ``shape`` once, in row-major order, at most ``limit``
    each."""
    outer, inner = shape[:2]
    row = 1
    for size in shape[2:]:
        row *= size
    if 0 in shape:
        return
    inner_step = max(1, min(inner, limit // row))
    outer_step = max(1, limit // (row * inner)) if inner_step == inner else 1
    for start in range(0, outer, outer_step):
        for begin in range(0, inner, inner_step):
            yield slice(start, min(start + outer_step, outer)), slice(begin, min(begin + inner_step, inner))
