"""The forward pass: tensors to one launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnbench.impls.flash_api import Band, Options, dropout_threshold
from attnbench.impls.flash_cuda.arguments import (
    FORWARD_FIELDS,
    Layout,
    grouped_map,
    head_map,
    readable,
)
from attnbench.impls.flash_cuda.configs import (
    Shape,
    ceil_div,
    forward_kernel,
    planes_per_wave,
)
from attnbench.impls.flash_cuda.driver import Kernel, TensorMap, load, multiprocessors, ticket
from attnbench.impls.flash_cuda.scope import DTYPES, LOG2E, check, on_device, stream_of


@dataclass(frozen=True, eq=False)
class ForwardPlan:
    """All of a forward launch but its addresses, worked out once for a problem and its layouts."""

    kernel: Kernel
    grid: int
    threads: int
    q: TensorMap
    k: TensorMap
    v: TensorMap
    out: TensorMap
    fields: tuple[float, ...]

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(
        options: Options, dtype: torch.dtype, device: int, q: Layout, k: Layout, v: Layout, out: Layout
    ) -> ForwardPlan:
        """The plan for tensors of these layouts."""
        (batch, seqlen_q, heads, head_dim), (_, seqlen_k, kv_heads, head_dim_v) = q[0], v[0]
        band = Band.of(options.left, options.right, options.bottom_right, seqlen_q, seqlen_k)
        shape = Shape(
            DTYPES[dtype], batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v,
            band.left is not None, band.right is not None, options.dropout_p > 0,
        )  # fmt: skip
        kernel = forward_kernel(shape)
        tiles, planes = ceil_div(seqlen_q, kernel.rows), batch * heads
        blocks = min(multiprocessors(device), tiles * planes)
        fields = (
            seqlen_q, seqlen_k, band.shift, band.left or 0, band.right or 0,
            tiles, planes, planes_per_wave(shape), tiles * planes, blocks,
            kv_heads, heads // kv_heads, options.scale * LOG2E, dropout_threshold(options.dropout_p),
        )  # fmt: skip
        return ForwardPlan(
            load(kernel.source, kernel.NAME, device),
            blocks,
            kernel.threads,
            grouped_map(q, dtype, kv_heads),
            head_map(k, dtype, kernel.keys),
            head_map(v, dtype, kernel.keys),
            grouped_map(out, dtype, kv_heads),
            fields,
        )

    def launch(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor | None) -> None:
        """Run on the current stream of the tensors' device."""
        device = q.get_device()
        with on_device(device):
            stream = stream_of(device)
            params = b"".join((
                self.q.at(q.data_ptr()), self.k.at(k.data_ptr()), self.v.at(v.data_ptr()), self.out.at(out.data_ptr()),
                FORWARD_FIELDS.pack(
                    lse.data_ptr(), 0 if rng is None else rng.data_ptr(), ticket(device, stream),
                    *self.fields,
                ),
            ))  # fmt: skip
            self.kernel.launch(self.grid, self.threads, params, stream)


def forward(
    q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """Out and LSE; see `flash_api.operators.Forward`."""
    check(q, lists)
    batch, seqlen_q, heads, _ = q.shape
    _, seqlen_k, _, head_dim_v = v.shape
    out = q.new_empty((batch, seqlen_q, heads, head_dim_v))
    lse = q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)
    if out.numel() == 0 or seqlen_k == 0:
        return out.zero_(), lse.fill_(-math.inf)
    (q, q_layout), (k, k_layout), (v, v_layout) = readable(q), readable(k), readable(v)
    plan = ForwardPlan.of(
        options, q.dtype, q.get_device(), q_layout, k_layout, v_layout, (out.shape, out.stride())
    )
    plan.launch(q, k, v, out, lse, rng)
    return out, lse
