"""Launch of the kernels: checked tensors in, results out. Everything here is host code that runs once a call."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attnbench.impls.flash_api import Band, Options, dropout_threshold
from attnbench.impls.flash_triton import hopper
from attnbench.impls.flash_triton.configs import (
    Device,
    Shape,
    Tile,
    backward_config,
    ceil_div,
    forward_config,
)
from attnbench.impls.flash_triton.kernels.backward import delta_kernel, dkdv_kernel, dq_kernel
from attnbench.impls.flash_triton.kernels.forward import forward_kernel, merge_kernel

LOG2E = 1.4426950408889634
STATS_ROWS = 128
"""Rows of LSE and delta are padded to a multiple of this, so that every tile reads them without a mask."""


def device_for(q: Tensor) -> Device:
    """The device of q, or an error if kernels cannot run there."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        raise TypeError(
            "q: got bfloat16 on the CPU, allowed are float16 and float32:"
            " Triton's interpreter multiplies bfloat16 wrongly"
        )
    return device_of(q.device.type, q.device.index)


@lru_cache(maxsize=64)
def device_of(kind: str, index: int | None) -> Device:
    """Capability and SM count of a torch device; a CPU passes only for Triton's interpreter."""
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index)
        nvidia = torch.version.hip is None
        return Device(
            (properties.major, properties.minor) if nvidia else (0, 0), properties.multi_processor_count
        )
    if kind == "cpu" and triton.knobs.runtime.interpret:
        return Device((0, 0), 4)
    raise ValueError(
        f"q: on a {kind} device, allowed are CUDA and ROCm GPUs, and the CPU under TRITON_INTERPRET=1"
    )


Layout = tuple[tuple[int, ...], tuple[int, ...], bool]
"""Shape, strides and whether the address is 16-byte aligned: what a plan depends on, of one tensor."""


def layout_of(x: Tensor) -> Layout:
    """The layout of x."""
    return x.shape, x.stride(), x.data_ptr() % 16 == 0


@lru_cache(maxsize=4096)
def plan(
    options: Options, itemsize: int, q: Layout, k: Layout, v: Layout, *more: Layout
) -> tuple[Band, Shape]:
    """Band and shape of a call, remembered: `more` are the other tensors that descriptors would address."""
    (batch, seqlen_q, heads, head_dim), (_, seqlen_k, kv_heads, head_dim_v) = q[0], v[0]
    band = Band.of(options.left, options.right, options.bottom_right, seqlen_q, seqlen_k)
    causal = band.left is None and band.right is not None
    shape = Shape(
        batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v, itemsize, causal, band.banded,
        options.dropout_p > 0, options.mask_block, all(tma_able(x, itemsize) for x in (q, k, v, *more)),
    )  # fmt: skip
    return band, shape


def tma_able(x: Layout, itemsize: int) -> bool:
    """Whether the copy engine can address a tensor: 16-byte aligned base and strides, nothing expanded."""
    shape, strides, aligned = x
    unit = 16 // itemsize
    return aligned and all(
        n <= 1 or (s > 0 and s % unit == 0) for n, s in zip(shape[:3], strides[:3], strict=True)
    )


def describe(x: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """Tensor descriptor of (rows, columns) tiles of a BSHD tensor seen as (batch, head, row, column), or x itself."""
    if not tma:
        return x
    batch, seqlen, heads, dim = x.shape
    unit = 16 // x.element_size()
    # The stride of a size-1 dimension means nothing, and the copy engine refuses an unaligned one.
    sb, ss, sh = (s if n > 1 else unit for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))
    return TensorDescriptor(x, [batch, heads, seqlen, dim], [sb, sh, ss, 1], [1, 1, rows, columns])


def unit_last(x: Tensor) -> Tensor:
    """x, or a contiguous copy where its last stride is not 1."""
    return x if x.stride(3) == 1 else x.contiguous()


def launch_options(tile: Tile) -> dict[str, int]:
    """Compile options of a launch; x * scale - max must stay one fused multiply-add whatever the default is."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def band_arguments(band: Band) -> tuple[int, int, int]:
    """(shift, left, right) as kernels take them; an unbounded side is compiled out and its value is ignored."""
    return band.shift, band.left or 0, band.right or 0


def list_arguments(lists: list[Tensor], fallback: Tensor) -> tuple[list[Tensor], tuple[int, int, int]]:
    """The four block-list tensors, and (rows a batch, rows a head, width) to find a (batch, head) in them."""
    if not lists:
        return [fallback] * 4, (0, 0, 0)
    batch, heads, rows, width = lists[1].shape
    return lists, (heads * rows if batch > 1 else 0, rows if heads > 1 else 0, width)


def forward(
    q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """Out and LSE; see `flash_api.Forward`."""
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, head_dim_v = v.shape[1], v.shape[3]
    device = device_for(q)
    out = torch.empty((batch, seqlen_q, heads, head_dim_v), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or seqlen_k == 0:
        return out.zero_(), lse.fill_(float("-inf"))

    band, shape = plan(options, q.element_size(), layout_of(q), layout_of(k), layout_of(v))
    config = forward_config(device, shape)
    if config.hopper is not None and hopper.available():
        sides = (band.left is not None, band.right is not None)
        with torch.cuda.device_of(q):
            hopper.forward(
                q, k, v, out, lse, rng, dropout_threshold(options.dropout_p), config.hopper, band_arguments(band),
                sides, options.scale, config.planes_per_wave, config.heavy_last,
            )  # fmt: skip
        return out, lse
    tile, splits = config.tile, config.splits
    parts, lse_parts = out, lse
    if splits > 1:
        parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        lse_parts = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
    o_strides = out.stride()[:3]

    mask_m, mask_n = options.mask_block
    list_tensors, list_sizes = list_arguments(lists, lse)
    group = heads // k.shape[2]
    tiles = ceil_div(seqlen_q * (group if config.pack else 1), tile.block_m)
    planes = batch * (k.shape[2] if config.pack else heads)
    with torch.cuda.device_of(q):
        forward_kernel[(tiles * planes, splits)](
            q, describe(k, tile.block_n, shape.block_d, tile.tma), describe(v, tile.block_n, shape.block_dv, tile.tma),
            parts, lse_parts, lse if rng is None else rng, *list_tensors,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o_strides, out.numel(),
            seqlen_q, seqlen_k, *band_arguments(band), options.scale * LOG2E, dropout_threshold(options.dropout_p),
            *list_sizes, tiles, planes, config.planes_per_wave,
            HEADS=heads, GROUP=group, D=head_dim, DV=head_dim_v, BLOCK_D=shape.block_d, BLOCK_DV=shape.block_dv,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HAS_LEFT=band.left is not None,
            HAS_RIGHT=band.right is not None, EVEN_K=seqlen_k % max(tile.block_n, mask_n) == 0, DROPOUT=rng is not None,
            MASK_M=mask_m, MASK_N=mask_n, PACK=config.pack, SPLITS=splits, HEAVY_LAST=config.heavy_last,
            TMA=tile.tma, PRECISION="ieee", **launch_options(tile),
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(batch * heads * seqlen_q,)](
                parts, lse_parts, out, lse, *o_strides, out.numel(), lse.numel(), seqlen_q, splits,
                HEADS=heads, DV=head_dim_v, BLOCK_DV=shape.block_dv, BLOCK_S=triton.next_power_of_2(splits),
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rng: Tensor | None, lists: list[Tensor], options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, contiguous; see `flash_api.Backward`."""
    q, k, v, d_out = unit_last(q), unit_last(k), unit_last(v), unit_last(d_out)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads, head_dim_v = v.shape[1:]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if out.numel() == 0 or seqlen_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()

    band, shape = plan(options, q.element_size(), *map(layout_of, (q, k, v, d_out)))
    config = backward_config(device_for(q), shape, options.deterministic)
    mask_m, mask_n = options.mask_block
    unit = math.lcm(STATS_ROWS, mask_m or 1)
    rows_padded = ceil_div(seqlen_q, unit) * unit
    lse_log2, delta = torch.empty((2, batch, heads, rows_padded), dtype=torch.float32, device=q.device)
    # Fused: dQ is summed in fp32 by atomics and rounded once at the end.
    specialised = config.hopper if config.hopper is not None and hopper.available() else None
    fused = config.fused or specialised is not None
    dq_acc = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if fused else dq

    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    numbers = (
        seqlen_q, seqlen_k, rows_padded, *band_arguments(band), options.scale, options.scale * LOG2E,
        dropout_threshold(options.dropout_p),
    )  # fmt: skip
    constants = {
        "HEADS": heads, "GROUP": heads // kv_heads, "D": head_dim, "DV": head_dim_v,
        "BLOCK_D": shape.block_d, "BLOCK_DV": shape.block_dv,
        "HAS_LEFT": band.left is not None, "HAS_RIGHT": band.right is not None, "DROPOUT": rng is not None,
        "MASK_M": mask_m, "MASK_N": mask_n, "PRECISION": "ieee",
    }  # fmt: skip
    state = lse if rng is None else rng
    by_query, query_sizes = list_arguments(lists[:4], lse)
    by_key, key_sizes = list_arguments(lists[4:], lse)
    with torch.cuda.device_of(q):
        delta_kernel[(rows_padded // STATS_ROWS * batch * heads,)](
            out, d_out, lse, lse if d_lse is None else d_lse, lse_log2, delta,
            *out.stride()[:3], *d_out.stride()[:3], *(lse if d_lse is None else d_lse).stride(), seqlen_q, rows_padded,
            HEADS=heads, DV=head_dim_v, BLOCK_DV=shape.block_dv, BLOCK_M=STATS_ROWS,
            HAS_DLSE=d_lse is not None, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        if specialised is not None:
            sides = (band.left is not None, band.right is not None)
            hopper.backward(
                d_out, q, k, v, lse_log2, delta, rng, dropout_threshold(options.dropout_p), dq_acc, dk, dv, specialised,
                band_arguments(band), sides, options.scale, config.planes_per_wave,
            )  # fmt: skip
            return torch.mul(dq_acc, options.scale, out=dq), dk, dv
        tile = config.dkdv
        tiles = ceil_div(seqlen_k, tile.block_n)
        planes = batch * kv_heads
        dkdv_kernel[(tiles * planes,)](
            describe(q, tile.block_m, shape.block_d, tile.tma), k, v,
            describe(d_out, tile.block_m, shape.block_dv, tile.tma), lse_log2, delta, state, *by_key, dk, dv,
            describe(dq_acc, tile.block_m, shape.block_d, tile.tma and fused),
            *strides, *dk.stride()[:3], *dv.stride()[:3], *dq.stride()[:3],
            *numbers, *key_sizes, tiles, planes, config.planes_per_wave,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, EVEN_Q=seqlen_q % max(tile.block_m, mask_m) == 0,
            EVEN_K=seqlen_k % tile.block_n == 0, FUSED_DQ=fused, TMA=tile.tma, **constants, **launch_options(tile),
        )  # fmt: skip
        if fused:
            return torch.mul(dq_acc, options.scale, out=dq), dk, dv
        tile = config.dq
        tiles = ceil_div(seqlen_q, tile.block_m)
        planes = batch * heads
        dq_kernel[(tiles * planes,)](
            q, describe(k, tile.block_n, shape.block_d, tile.tma),
            describe(v, tile.block_n, shape.block_dv, tile.tma), d_out, lse_log2, delta, state,
            *by_query, dq, *strides, *dq.stride()[:3],
            *numbers, *query_sizes, tiles, planes, config.planes_per_wave,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, EVEN_K=seqlen_k % max(tile.block_n, mask_n) == 0,
            HEAVY_LAST=config.heavy_last, TMA=tile.tma, **constants, **launch_options(tile),
        )  # fmt: skip
    return dq, dk, dv
