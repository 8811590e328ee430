"""What the launches of one call depend on, and nothing that changes between calls: sizes, strides, options."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from attnbench.impls.flash_api import Band, Options, dropout_threshold
from attnbench.impls.flash_api.layout import contiguous
from attnbench.impls.flash_triton.calls import Address
from attnbench.impls.flash_triton.configs import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOG2E = 1.4426950408889634
LIST_NAMES = ("partial_count", "partial_index", "full_count", "full_index")

Layout = tuple[tuple[int, ...], tuple[int, ...], bool]
"""Shape, strides and whether the address is a multiple of 16: what a launch depends on, of one tensor."""


def layout_of(x: Tensor) -> Layout:
    """The layout of x."""
    return x.shape, x.stride(), x.data_ptr() % 16 == 0


def by_plane(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A BSHD tensor seen as (batch, head, row, column), as the copy engine addresses it: shape and strides."""
    batch, seqlen, heads, dim = shape
    unit = 16 // itemsize
    # The stride of a size-1 dimension means nothing, and the copy engine refuses an unaligned one.
    sb, ss, sh = (s if n > 1 else unit for n, s in zip(shape[:3], strides[:3], strict=True))
    return (batch, heads, seqlen, dim), (sb, sh, ss, 1)


@dataclass(frozen=True)
class Operands:
    """The operands of a forward, and with d_out those of a backward. masks is the shape of the two index lists.

    Names in capitals in the kernels are these; a tensor is (shape, strides), as in ``p.q``.
    """

    options: Options
    device: torch.device
    dtype: torch.dtype
    dropout: bool
    q_layout: Layout
    k_layout: Layout
    v_layout: Layout
    d_out_layout: Layout | None = None
    masks: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @cached_property
    def q(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.q_layout[:2]

    @cached_property
    def k(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.k_layout[:2]

    @cached_property
    def v(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.v_layout[:2]

    @cached_property
    def d_out(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert self.d_out_layout is not None
        return self.d_out_layout[:2]

    @cached_property
    def out(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The result, which the launch allocates contiguous; so are dq, dk and dv, of the shapes of q, k and v."""
        shape = (*self.q[0][:3], self.v[0][3])
        return contiguous(shape)

    @cached_property
    def dq_strides(self) -> tuple[int, ...]:
        return contiguous(self.q[0])[1]

    @cached_property
    def dk_strides(self) -> tuple[int, ...]:
        return contiguous(self.k[0])[1]

    @cached_property
    def dv_strides(self) -> tuple[int, ...]:
        return contiguous(self.v[0])[1]

    @property
    def batch(self) -> int:
        return self.q[0][0]

    @property
    def seqlen_q(self) -> int:
        return self.q[0][1]

    @property
    def seqlen_k(self) -> int:
        return self.k[0][1]

    @property
    def heads(self) -> int:
        return self.q[0][2]

    @property
    def kv_heads(self) -> int:
        return self.k[0][2]

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def head_dim(self) -> int:
        return self.q[0][3]

    @property
    def head_dim_v(self) -> int:
        return self.v[0][3]

    @property
    def empty(self) -> bool:
        """Whether no query sees a key, or there is none."""
        return 0 in self.out[0] or self.seqlen_k == 0

    @cached_property
    def span(self) -> Band:
        """The band."""
        return Band.of(
            self.options.left, self.options.right, self.options.bottom_right, self.seqlen_q, self.seqlen_k
        )

    @property
    def band(self) -> tuple[int, int, int]:
        """(shift, left, right) as kernels take them; an unbounded side is compiled out and its value is ignored."""
        return self.span.shift, self.span.left or 0, self.span.right or 0

    @property
    def has_left(self) -> bool:
        return self.span.left is not None

    @property
    def has_right(self) -> bool:
        return self.span.right is not None

    @property
    def scale(self) -> float:
        return self.options.scale

    @property
    def scale_log2(self) -> float:
        return self.options.scale * LOG2E

    @property
    def threshold(self) -> int:
        return dropout_threshold(self.options.dropout_p)

    @property
    def mask_block(self) -> tuple[int, int]:
        return self.options.mask_block

    def lists(self, side: str) -> list[Address]:
        """The block lists by "query" or by "key"; without a mask any address will do, since none is read."""
        return [Address(f"{side}_{name}" if self.masks else "lse") for name in LIST_NAMES]

    def list_sizes(self, side: str) -> tuple[int, int, int]:
        """(rows a batch, rows a head, width) to find the lists of a (batch, head)."""
        if self.masks is None:
            return 0, 0, 0
        batch, heads, rows, width = self.masks[0 if side == "query" else 1]
        return heads * rows if batch > 1 else 0, rows if heads > 1 else 0, width

    @cached_property
    def shape(self) -> Shape:
        """What tile choice looks at."""
        layouts = [self.q_layout, self.k_layout, self.v_layout]
        layouts += [] if self.d_out_layout is None else [self.d_out_layout]
        causal = not self.has_left and self.has_right
        return Shape(
            self.batch, self.heads, self.kv_heads, self.seqlen_q, self.seqlen_k, self.head_dim, self.head_dim_v,
            self.dtype.itemsize, causal, self.span.banded, self.dropout, self.mask_block,
            all(tma_able(x, self.dtype.itemsize) for x in layouts),
        )  # fmt: skip


def tma_able(x: Layout, itemsize: int) -> bool:
    """Whether the copy engine can address a tensor: 16-byte aligned base and strides, nothing expanded."""
    shape, strides, aligned = x
    unit = 16 // itemsize
    return aligned and all(
        n <= 1 or (s > 0 and s % unit == 0) for n, s in zip(shape[:3], strides[:3], strict=True)
    )
