"""Layouts: what is known of a tensor's place in memory before there is one."""

from __future__ import annotations

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of a tensor, in elements."""


def contiguous(shape: tuple[int, ...]) -> Layout:
    """The layout of fresh memory; in strides a size of 0 counts as 1, as in torch."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return shape, tuple(reversed(strides))
