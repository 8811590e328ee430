"""The forward pass: tensors to one launch, and with split keys to another that merges the results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbench.impls.flash_api import Band, Options, dropout_threshold
from attnbench.impls.flash_api.layout import Layout, contiguous
from attnbench.impls.flash_cuda.arguments import (
    FORWARD_ADDRESSES,
    FORWARD_FIELDS,
    MERGE_FIELDS,
    NO_ADDRESSES,
    NO_LISTS,
    addressable,
    grouped_map,
    head_map,
    list_sizes,
    readable,
)
from attnbench.impls.flash_cuda.configs import (
    ForwardKernel,
    Shape,
    ceil_div,
    forward_kernel,
    planes_per_wave,
    queries_of,
    splits_of,
)
from attnbench.impls.flash_cuda.driver import Kernel, TensorMaps, load, multiprocessors, ticket
from attnbench.impls.flash_cuda.scope import DTYPES, LOG2E, check, on_device, stream_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnbench.impls.flash_api.operators import ForwardAgain


@dataclass(frozen=True, eq=False)
class ForwardPlan:
    """All of a forward's launches but their addresses, worked out once for a problem and its layouts."""

    options: Options
    config: ForwardKernel
    kernel: Kernel
    merge: Kernel | None
    grid: int
    out: Layout
    lse: Layout
    maps: TensorMaps
    """Of q, k, v, out."""
    splits: int
    numbers: bytes
    """Of forward::Params, what follows the addresses."""

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(
        options: Options, dtype: torch.dtype, device: int, q: Layout, k: Layout, v: Layout,
        lists: tuple[int, ...] | None,
    ) -> ForwardPlan:  # fmt: skip
        """The plan for tensors of these layouts; lists is the shape of their indices."""
        (batch, seqlen_q, heads, _), (_, seqlen_k, kv_heads, dim_v) = q[0], v[0]
        band = Band.of(options.left, options.right, options.bottom_right, seqlen_q, seqlen_k)
        shape = Shape.of(options, band, DTYPES[dtype], q[0], v[0])
        sms = multiprocessors(device)
        config = forward_kernel(shape, sms)
        queries, splits = queries_of(config, shape), splits_of(config, shape, band, sms)
        tiles = ceil_div(seqlen_q, queries)
        planes = splits * batch * (kv_heads if config.decode else heads)
        blocks = min(sms, tiles * planes)
        members = shape.group if config.decode else 1
        rows = queries // config.consumers
        out = contiguous((batch, seqlen_q, heads, dim_v))
        numbers = FORWARD_FIELDS.pack(
            *(0,) * 8, *(NO_LISTS if lists is None else list_sizes(lists, options.mask_block)),
            seqlen_q, seqlen_k, band.shift, band.left or 0, band.right or 0,
            tiles, planes, planes_per_wave(shape), tiles * planes, blocks,
            kv_heads, shape.group, batch, splits, queries, options.scale * LOG2E,
            dropout_threshold(options.dropout_p),
        )  # fmt: skip
        return ForwardPlan(
            options,
            config,
            load(config.source, config.NAME, device),
            load(config.source, config.MERGE, device, shared=0) if splits > 1 else None,
            blocks,
            out,
            contiguous((batch, heads, seqlen_q)),
            TensorMaps((
                grouped_map(q, dtype, kv_heads, rows, members), head_map(k, dtype, config.keys),
                head_map(v, dtype, config.keys), grouped_map(out, dtype, kv_heads, rows, members),
            )),
            splits,
            numbers[FORWARD_ADDRESSES.size :],
        )  # fmt: skip

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """Out and LSE, filled on the current stream of the tensors' device."""
        q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if (q_at | k_at | v_at) & 15:
            return forward(q, k, v, rng, list(lists), self.options)  # which copies them
        out = q.new_empty_strided(*self.out)
        lse = q.new_empty_strided(*self.lse, dtype=torch.float32)
        device = q.get_device()
        written, parts = lse, None
        if self.merge:
            written = lse.new_empty((self.splits, *lse.shape))
            parts = lse.new_empty((self.splits, *lse.shape, self.config.dim_v))
        with on_device(device):
            stream = stream_of(device)
            params = b"".join((
                self.maps.at(q_at, k_at, v_at, out.data_ptr()),
                FORWARD_ADDRESSES.pack(
                    written.data_ptr(), 0 if parts is None else parts.data_ptr(),
                    0 if rng is None else rng.data_ptr(), ticket(device, stream),
                    *([x.data_ptr() for x in lists] or NO_ADDRESSES),
                ),
                self.numbers,
            ))  # fmt: skip
            self.kernel.launch(self.grid, self.config.threads, params, stream)
            if self.merge and parts is not None:
                threads = self.config.MERGE_THREADS
                merge_params = MERGE_FIELDS.pack(
                    parts.data_ptr(), written.data_ptr(), out.data_ptr(), lse.data_ptr(),
                    self.splits, lse.numel(), lse.shape[1], lse.shape[2], v.shape[3],
                )  # fmt: skip
                self.merge.launch(
                    ceil_div(lse.numel(), threads // 32), threads, merge_params, stream, shared=0
                )
        return out, lse


def forward(
    q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """Out and LSE; see `flash_api.operators.Forward`."""
    check(q)
    batch, seqlen_q, heads, _ = q.shape
    _, seqlen_k, _, head_dim_v = v.shape
    if 0 in (batch, seqlen_q, heads, seqlen_k):
        out = q.new_zeros((batch, seqlen_q, heads, head_dim_v))
        return out, q.new_full((batch, heads, seqlen_q), -math.inf, dtype=torch.float32)
    (q, q_layout), (k, k_layout), (v, v_layout) = readable(q), readable(k), readable(v)
    plan = ForwardPlan.of(
        options, q.dtype, q.get_device(), q_layout, k_layout, v_layout, lists[1].shape if lists else None
    )
    return plan.run(q, k, v, rng, [x.contiguous() for x in lists])


def plan_forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> ForwardAgain | None:
    """See `flash_api.operators.PlanForward`."""
    check(q)
    layouts = [(x.shape, x.stride()) for x in (q, k, v)]
    if 0 in (*q.shape, *k.shape) or not all(addressable(x, q.element_size()) for x in layouts):
        return None
    return ForwardPlan.of(options, q.dtype, q.get_device(), *layouts, None).run
