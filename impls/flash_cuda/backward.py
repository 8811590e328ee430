"""The backward pass: statistics of the rows, the main kernel, and dQ from its fp32 sums."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from attnbench.impls.flash_api import Band, Options, dropout_effective_p, dropout_threshold
from attnbench.impls.flash_api.layout import Layout, contiguous
from attnbench.impls.flash_cuda.arguments import (
    BACKWARD_ADDRESSES,
    BACKWARD_FIELDS,
    FINISH_FIELDS,
    NO_ADDRESSES,
    NO_LISTS,
    ROW_FIELDS,
    ROWS,
    addressable,
    grouped_map,
    head_map,
    list_sizes,
    readable,
)
from attnbench.impls.flash_cuda.configs import (
    LEAST_BACKWARD_KEYS,
    LIST_QUERIES,
    BackwardKernel,
    Shape,
    backward_kernel,
    ceil_div,
    keeps_rows,
    key_planes_per_wave,
)
from attnbench.impls.flash_cuda.driver import Kernel, TensorMap, TensorMaps, load, multiprocessors, ticket
from attnbench.impls.flash_cuda.scope import DTYPES, LOG2E, check, on_device, stream_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from attnbench.impls.flash_api.operators import BackwardAgain


@dataclass(frozen=True, eq=False)
class BackwardPlan:
    """All of a backward's launches but their addresses, worked out once for a problem and its layouts."""

    options: Options
    config: BackwardKernel
    prepare: Kernel
    main: Kernel
    finish: Kernel
    grid: int
    prepare_grid: int
    shape: Shape
    results: tuple[Layout, Layout, Layout]
    """Of dq, dk, dv."""
    statistics: Layout
    """Of lse in base 2 and delta, whose rows are padded."""
    blocks: int
    """Of 64 x 64 in the sums of dQ."""
    turns: int
    """Counters behind those: one for each of them, whose tiles add in turn."""
    order: int
    """Numbers behind those: the tiles of keys of every plane, where they follow lists."""
    order_sizes: tuple[int, ...]
    """Of backward::OrderParams, the sizes of the lists, and all that follows the address."""
    maps: TensorMaps
    """Of q, d_out, k, v, dk, dv."""
    dq: TensorMap
    numbers: bytes
    """Of backward::Params, what follows the addresses."""
    finish_numbers: tuple[float, ...]

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(
        options: Options, dtype: torch.dtype, device: int, q: Layout, d_out: Layout, k: Layout, v: Layout,
        lists: tuple[int, ...] | None,
    ) -> BackwardPlan:  # fmt: skip
        """The plan for tensors of these layouts; lists is the shape of the indices by key."""
        (batch, seqlen_q, heads, _), (_, seqlen_k, kv_heads, _) = q[0], v[0]
        band = Band.of(options.left, options.right, options.bottom_right, seqlen_q, seqlen_k)
        shape = Shape.of(options, band, DTYPES[dtype], q[0], v[0])
        config = backward_kernel(shape, options.deterministic)
        row_blocks = ceil_div(seqlen_q, config.rows)
        tiles, planes = ceil_div(seqlen_k, config.tile_keys), batch * kv_heads
        clusters = min(max(1, multiprocessors(device) // config.cluster), tiles * planes)
        wave = key_planes_per_wave(shape)
        dq, dk, dv = results = contiguous(q[0]), contiguous(k[0]), contiguous(v[0])
        maps = (
            grouped_map(q, dtype, kv_heads, config.rows), grouped_map(d_out, dtype, kv_heads, config.rows),
            *(head_map(x, dtype, ROWS) for x in (k, v, dk, dv)),
        )  # fmt: skip
        blocks = batch * heads * row_blocks * config.units
        listed = NO_LISTS if lists is None else list_sizes(lists, options.mask_block[::-1])
        numbers = BACKWARD_FIELDS.pack(
            *(0,) * 11, *listed, seqlen_q,
            seqlen_k, band.shift, band.left or 0, band.right or 0, tiles, planes, wave, tiles * planes, clusters,
            kv_heads, heads // kv_heads, row_blocks, options.scale, options.scale * LOG2E,
            1 / (1 - dropout_effective_p(options.dropout_p)), dropout_threshold(options.dropout_p),
            keeps_rows(shape),
        )  # fmt: skip
        return BackwardPlan(
            options, config, load(config.source, config.PREPARE, device, shared=0),
            load(config.source, config.MAIN, device), load(config.source, config.FINISH, device, shared=0),
            clusters * config.cluster, config.PREPARE_BLOCKS * multiprocessors(device), shape, results,
            contiguous((2, batch * heads, row_blocks * config.rows)), blocks,
            ceil_div(blocks, 4) * 4 if config.deterministic else 0, tiles * planes if config.lists else 0,
            (*listed, tiles, planes, kv_heads, heads // kv_heads), TensorMaps(maps), grouped_map(dq, dtype, kv_heads),
            numbers[BACKWARD_ADDRESSES.size :], (kv_heads, heads // kv_heads, row_blocks, options.scale),
        )  # fmt: skip

    def run(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor | None,
        d_lse: Tensor | None = None, lists: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk, dv, filled by three kernels on the current stream of the tensors' device.

        out and lse are contiguous. lists are by key; with lists the others begin at multiples of 16 bytes.
        """
        d_out_at, q_at, k_at, v_at = d_out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()
        if (d_out_at | q_at | k_at | v_at) & 15:
            return backward(d_out, d_lse, q, k, v, out, lse, rng, [], self.options)  # which copies them
        dq, dk, dv = [x.new_empty_strided(*layout) for x, layout in zip((q, k, v), self.results, strict=True)]
        device, shape, config = q.get_device(), self.shape, self.config
        count = self.blocks * ROWS * ROWS
        sums = lse.new_empty_strided((count + self.turns + self.order,), (1,))  # all but the order zeroed
        statistics = lse.new_empty_strided(*self.statistics)
        lse_log2, summed = statistics.data_ptr(), sums.data_ptr()
        delta = lse_log2 + statistics.nbytes // 2
        order = summed + 4 * (count + self.turns) if self.order else 0
        listed = [x.data_ptr() for x in lists] or NO_ADDRESSES
        with on_device(device):
            stream = stream_of(device)
            counter = ticket(device, stream)
            row_params = ROW_FIELDS.pack(
                out.data_ptr(), d_out_at, lse.data_ptr(), 0 if d_lse is None else d_lse.data_ptr(), lse_log2,
                delta, summed, (count + self.turns) // 4, counter, *d_out.stride()[:3],
                *((0, 0, 0) if d_lse is None else d_lse.stride()), shape.batch, shape.heads, shape.seqlen_q,
                self.statistics[0][2], shape.head_dim_v, *listed, *self.order_sizes[:5], order, *self.order_sizes[5:],
            )  # fmt: skip
            self.prepare.launch(self.prepare_grid, config.PREPARE_THREADS, row_params, stream, shared=0)
            params = b"".join((
                self.maps.at(q_at, d_out_at, k_at, v_at, dk.data_ptr(), dv.data_ptr()),
                BACKWARD_ADDRESSES.pack(
                    lse_log2, delta, summed, 0 if rng is None else rng.data_ptr(), counter,
                    summed + 4 * count if self.turns else 0, order, *listed,
                ),
                self.numbers,
            ))  # fmt: skip
            self.main.launch(self.grid, config.THREADS, params, stream)
            finish_params = self.dq.at(dq.data_ptr()) + FINISH_FIELDS.pack(summed, *self.finish_numbers)
            self.finish.launch(self.blocks, config.FINISH_THREADS, finish_params, stream, shared=0)
        return dq, dk, dv


def refuse(q: Tensor, v: Tensor, options: Options) -> None:
    """Raise ValueError for what this backward does not compute; see `flash_api.operators.Refuse`."""
    rows, keys = options.mask_block
    if rows % LIST_QUERIES or keys % LEAST_BACKWARD_KEYS:
        raise ValueError(
            f"block_mask: blocks of {rows} x {keys}, allowed with gradients are multiples of"
            f" {LIST_QUERIES} x {LEAST_BACKWARD_KEYS}"
        )
    if options.deterministic and options.mask_block != (0, 0):
        raise ValueError(
            "deterministic: got True, allowed with gradients and a block_mask is False: the turns in which tiles add to"
            " dq are not counted in lists"
        )


def backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rng: Tensor | None, lists: list[Tensor], options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, contiguous; see `flash_api.operators.Backward`."""
    check(q)
    refuse(q, v, options)
    if 0 in q.shape or k.shape[1] == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    (q, q_layout), (k, k_layout), (v, v_layout) = readable(q), readable(k), readable(v)
    d_out, d_out_layout = readable(d_out)
    out, lse = out.contiguous(), lse.contiguous()  # a hook of saved tensors may have changed them
    plan = BackwardPlan.of(
        options, q.dtype, q.get_device(), q_layout, d_out_layout, k_layout, v_layout, lists[5].shape if lists else None
    )  # fmt: skip
    return plan.run(d_out, q, k, v, out, lse, rng, d_lse, [x.contiguous() for x in lists[4:]])


def plan_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options
) -> BackwardAgain | None:
    """See `flash_api.operators.PlanBackward`."""
    check(q)
    refuse(q, v, options)
    layouts = [(x.shape, x.stride()) for x in (q, d_out, k, v)]
    able = all(addressable(x, q.element_size()) for x in layouts)
    if 0 in (*q.shape, *k.shape) or not (able and out.is_contiguous() and lse.is_contiguous()):
        return None
    return BackwardPlan.of(options, q.dtype, q.get_device(), *layouts, None).run
