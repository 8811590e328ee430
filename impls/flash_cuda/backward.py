"""The backward pass: statistics of the rows, the main kernel, and dQ from its fp32 sums."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnbench.impls.flash_api import Band, Options, dropout_effective_p, dropout_threshold
from attnbench.impls.flash_cuda.arguments import (
    BACKWARD_FIELDS,
    FINISH_FIELDS,
    NO_LISTS,
    ROW_FIELDS,
    ROWS,
    Layout,
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
from attnbench.impls.flash_cuda.driver import Kernel, TensorMap, load, multiprocessors, ticket
from attnbench.impls.flash_cuda.scope import DTYPES, LOG2E, check, on_device, stream_of


@dataclass(frozen=True, eq=False)
class BackwardPlan:
    """All of a backward's launches but their addresses, worked out once for a problem and its layouts."""

    config: BackwardKernel
    prepare: Kernel
    main: Kernel
    finish: Kernel
    grid: int
    prepare_grid: int
    shape: Shape
    row_blocks: int
    maps: tuple[TensorMap, ...]
    dq: TensorMap
    list_sizes: tuple[int, ...]
    fields: tuple[float, ...]
    scale: float

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(
        options: Options, dtype: torch.dtype, device: int, q: Layout, d_out: Layout, k: Layout, v: Layout, dq: Layout,
        dk: Layout, dv: Layout, lists: tuple[int, ...] | None,
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
        maps = (
            grouped_map(q, dtype, kv_heads, config.rows), grouped_map(d_out, dtype, kv_heads, config.rows),
            *(head_map(x, dtype, ROWS) for x in (k, v, dk, dv)),
        )  # fmt: skip
        fields = (
            seqlen_q, seqlen_k, band.shift, band.left or 0, band.right or 0, tiles, planes, wave, tiles * planes,
            clusters, kv_heads, heads // kv_heads, row_blocks, options.scale, options.scale * LOG2E,
            1 / (1 - dropout_effective_p(options.dropout_p)), dropout_threshold(options.dropout_p),
            keeps_rows(shape),
        )  # fmt: skip
        return BackwardPlan(
            config, load(config.source, config.PREPARE, device, shared=0), load(config.source, config.MAIN, device),
            load(config.source, config.FINISH, device, shared=0), clusters * config.cluster,
            config.PREPARE_BLOCKS * multiprocessors(device), shape, row_blocks, maps, grouped_map(dq, dtype, kv_heads),
            NO_LISTS if lists is None else list_sizes(lists, options.mask_block[::-1]), fields, options.scale,
        )  # fmt: skip

    def launch(
        self, d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        rng: Tensor | None, lists: list[Tensor], dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        """Three kernels on the current stream of the tensors' device."""
        device, shape, config = q.get_device(), self.shape, self.config
        planes = shape.batch * shape.heads
        rows = self.row_blocks * config.rows
        blocks = planes * self.row_blocks * config.units
        statistics = lse.new_empty((2, planes, rows))
        # A counter for each block of sums, whose tiles add in turn; it is zeroed with the sums.
        turns = ceil_div(blocks, 4) * 4 if config.deterministic else 0
        sums = lse.new_empty(blocks * ROWS * ROWS + turns)
        counters = sums.data_ptr() + 4 * blocks * ROWS * ROWS if config.deterministic else 0
        lse_log2, delta = statistics.data_ptr(), statistics.data_ptr() + statistics.nbytes // 2
        with on_device(device):
            stream = stream_of(device)
            counter = ticket(device, stream)
            row_params = ROW_FIELDS.pack(
                out.data_ptr(), d_out.data_ptr(), lse.data_ptr(), 0 if d_lse is None else d_lse.data_ptr(), lse_log2,
                delta, sums.data_ptr(), sums.numel() // 4, counter, *d_out.stride()[:3],
                *((0, 0, 0) if d_lse is None else d_lse.stride()), shape.batch, shape.heads, shape.seqlen_q, rows,
                shape.head_dim_v,
            )  # fmt: skip
            self.prepare.launch(self.prepare_grid, config.PREPARE_THREADS, row_params, stream, shared=0)
            tensors = (q, d_out, k, v, dk, dv)
            params = b"".join((
                *(known.at(x.data_ptr()) for known, x in zip(self.maps, tensors, strict=True)),
                BACKWARD_FIELDS.pack(
                    lse_log2, delta, sums.data_ptr(), 0 if rng is None else rng.data_ptr(), counter, counters,
                    *([x.data_ptr() for x in lists] or (0,) * 4), *self.list_sizes, *self.fields,
                ),
            ))  # fmt: skip
            self.main.launch(self.grid, config.THREADS, params, stream)
            finish_params = self.dq.at(dq.data_ptr()) + FINISH_FIELDS.pack(
                sums.data_ptr(), shape.kv_heads, shape.heads // shape.kv_heads, self.row_blocks, self.scale
            )
            self.finish.launch(blocks, config.FINISH_THREADS, finish_params, stream, shared=0)


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
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if out.numel() == 0 or k.shape[1] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    (q, q_layout), (k, k_layout), (v, v_layout) = readable(q), readable(k), readable(v)
    d_out, d_out_layout = readable(d_out)
    out, lse = out.contiguous(), lse.contiguous()  # a hook of saved tensors may have changed them
    results = ((x.shape, x.stride()) for x in (dq, dk, dv))
    plan = BackwardPlan.of(
        options, q.dtype, q.get_device(), q_layout, d_out_layout, k_layout, v_layout, *results,
        lists[5].shape if lists else None,
    )  # fmt: skip
    by_key = [x.contiguous() for x in lists[4:]]
    plan.launch(d_out, d_lse, q, k, v, out, lse, rng, by_key, dq, dk, dv)
    return dq, dk, dv
