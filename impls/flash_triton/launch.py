"""Launch of the kernels: checked tensors in, results out. What is derived from layouts is derived once, and kept."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attnbench.impls.flash_api import Options, dropout_effective_p, layout, settled
from attnbench.impls.flash_api.operators import BackwardAgain, ForwardAgain
from attnbench.impls.flash_triton import hopper, tuned
from attnbench.impls.flash_triton.calls import Address, Call, Tiles, launch
from attnbench.impls.flash_triton.configs import (
    BackwardConfig,
    Device,
    ForwardConfig,
    Tile,
    backward_config,
    ceil_div,
    forward_config,
    wide,
)
from attnbench.impls.flash_triton.kernels.backward import delta_kernel, dkdv_kernel, dq_kernel
from attnbench.impls.flash_triton.kernels.forward import forward_kernel, merge_kernel
from attnbench.impls.flash_triton.kernels.sums import ROWS as SUMS_ROWS
from attnbench.impls.flash_triton.kernels.sums import dq_from_sums_kernel
from attnbench.impls.flash_triton.operands import (
    LIST_NAMES,
    Layout,
    Operands,
    by_plane,
    layout_of,
)

STATS_ROWS = 128
"""Rows of LSE and delta are padded to a multiple of this, so that every tile reads them without a mask."""


def device_for(device: torch.device, dtype: torch.dtype) -> Device:
    """What tile choice knows of a device, or an error if kernels cannot run there on this type."""
    if device.type == "cpu" and dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        raise TypeError(
            "q: got bfloat16 on the CPU, allowed are float16 and float32:"
            " Triton's interpreter multiplies bfloat16 wrongly"
        )
    return device_of(device.type, device.index)


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


def tiles(name: str, x: tuple[tuple[int, ...], tuple[int, ...]], rows: int, columns: int, itemsize: int,
          tma: bool) -> Tiles | Address:  # fmt: skip
    """(rows, columns) tiles of a BSHD tensor seen as (batch, head, row, column), or its address."""
    if not tma:
        return Address(name)
    shape, strides = by_plane(*x, itemsize)
    block = [1, 1, rows, columns]
    return Tiles(name, shape, strides, lambda t: TensorDescriptor(t, list(shape), list(strides), block))


def launch_options(tile: Tile) -> dict[str, Any]:
    """Compile options of a launch; x * scale - max must stay one fused multiply-add whatever the default is."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def settled_by(*layouts: Layout) -> bool:
    """Whether tensors need no copy, and have the alignment that the calls of a plan are kept for."""
    return all(strides[3] == 1 and aligned for _, strides, aligned in layouts)


def unit_last(x: Tensor) -> Tensor:
    """x, or a contiguous copy where its last stride is not 1."""
    return x if x.stride(3) == 1 else x.contiguous()


def forget_plans() -> None:
    """Choose anew: for tests and tuning, which change what the choice depends on."""
    settled.forget()
    for chosen in (forward_config, backward_config, forward_plan, backward_plan):
        getattr(chosen, "cache_clear", lambda: None)()


_HERE = nullcontext()


def on(device: torch.device) -> Any:
    """Make device current, at no cost where it is."""
    current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return _HERE if current else torch.cuda.device(device)


def named_lists(side: str, lists: list[Tensor]) -> dict[str, Tensor]:
    """Block lists by the names that `Operands.lists` gives them."""
    return {f"{side}_{name}": x for name, x in zip(LIST_NAMES, lists, strict=False)}


# --- forward ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForwardPlan:
    """The calls of a forward in order; with splits > 1 they go through "parts" and "lse_parts", one a split;
    with tickets, "tickets" is a zero at first."""

    calls: tuple[Call, ...]
    out: layout.Layout
    lse: layout.Layout
    splits: int = 1
    tickets: bool = False


@lru_cache(maxsize=4096)
def forward_plan(table: tuned.Table, *operands: Any) -> ForwardPlan | None:
    """How to compute a forward of `Operands`, None where there is nothing to compute."""
    p = Operands(*operands)
    device = device_for(p.device, p.dtype)
    if p.empty:
        return None
    config = table.forward_of(p.device, p.shape) or forward_config(device, p.shape)
    results = p.out, layout.contiguous((p.batch, p.heads, p.seqlen_q))
    if config.hopper is not None and hopper.available():
        return ForwardPlan((hopper.forward(p, config, device),), *results, tickets=True)
    calls = [_portable_forward(p, config)]
    if config.splits > 1:
        calls.append(_merge(p, config.splits))
    return ForwardPlan(tuple(calls), *results, config.splits)


def _portable_forward(p: Operands, config: ForwardConfig) -> Call:
    tile, itemsize = config.tile, p.dtype.itemsize
    mask_m, mask_n = p.mask_block
    row_tiles = ceil_div(p.seqlen_q * (p.group if config.pack else 1), tile.block_m)
    planes = p.batch * (p.kv_heads if config.pack else p.heads)
    split = config.splits > 1
    return Call(
        forward_kernel,
        (row_tiles * planes, config.splits),
        [
            Address("q"), tiles("k", p.k, tile.block_n, p.shape.block_d, itemsize, tile.tma),
            tiles("v", p.v, tile.block_n, p.shape.block_dv, itemsize, tile.tma),
            Address("parts" if split else "out"), Address("lse_parts" if split else "lse"), Address("rng"),
            *p.lists("query"),
            *p.q[1][:3], *p.k[1][:3], *p.v[1][:3], *p.out[1][:3], math.prod(p.out[0]),
            p.seqlen_q, p.seqlen_k, *p.band, p.scale_log2, p.threshold, *p.list_sizes("query"),
            row_tiles, planes, config.planes_per_wave,
        ],
        {
            "HEADS": p.heads, "GROUP": p.group, "D": p.head_dim, "DV": p.head_dim_v, "BLOCK_D": p.shape.block_d,
            "BLOCK_DV": p.shape.block_dv, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "HAS_LEFT": p.has_left,
            "HAS_RIGHT": p.has_right, "EVEN_K": p.seqlen_k % max(tile.block_n, mask_n) == 0, "DROPOUT": p.dropout,
            "MASK_M": mask_m, "MASK_N": mask_n, "PACK": config.pack, "SPLITS": config.splits,
            "HEAVY_LAST": config.heavy_last, "TMA": tile.tma, "PRECISION": "ieee",
        },
        launch_options(tile),
    )  # fmt: skip


def _merge(p: Operands, splits: int) -> Call:
    rows = p.batch * p.heads * p.seqlen_q
    return Call(
        merge_kernel,
        (rows,),
        [
            Address("parts"), Address("lse_parts"), Address("out"), Address("lse"), *p.out[1][:3],
            math.prod(p.out[0]), rows, p.seqlen_q, splits,
        ],
        {
            "HEADS": p.heads, "DV": p.head_dim_v, "BLOCK_DV": p.shape.block_dv,
            "BLOCK_S": triton.next_power_of_2(splits),
        },
        {"num_warps": 4, "enable_fp_fusion": True},
    )  # fmt: skip


def run_forward(
    plan: ForwardPlan, q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Out and LSE as planned for tensors with the layouts of these."""
    device = q.device
    out = q.new_empty_strided(*plan.out)
    lse = q.new_empty_strided(*plan.lse, dtype=torch.float32)
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "rng": lse if rng is None else rng}
    if plan.tickets:
        tensors["tickets"] = torch.zeros(1, dtype=torch.int32, device=device)
    if lists:
        tensors |= named_lists("query", lists)
    if plan.splits > 1:
        tensors["parts"] = torch.empty((plan.splits, *out.shape), dtype=torch.float32, device=device)
        tensors["lse_parts"] = torch.empty((plan.splits, *lse.shape), dtype=torch.float32, device=device)
    with on(device):
        launch(plan.calls, tensors)
    return out, lse


def forward(
    q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """Out and LSE; see `flash_api.Forward`."""
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    masks = (lists[1].shape, lists[1].shape) if lists else None
    layouts = layout_of(q), layout_of(k), layout_of(v)
    plan = forward_plan(tuned.active(), options, q.device, q.dtype, rng is not None, *layouts, None, masks)
    if plan is None:
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        return out, q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=torch.float32)
    return run_forward(plan, q, k, v, rng, lists)


def plan_forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> ForwardAgain | None:
    """See `flash_api.operators.PlanForward`."""
    layouts = layout_of(q), layout_of(k), layout_of(v)
    table = tuned.active()
    if not settled_by(*layouts):
        return None
    plan = forward_plan(table, options, q.device, q.dtype, options.dropout_p > 0, *layouts, None, None)
    if plan is None:
        return None

    def again(q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None) -> tuple[Tensor, Tensor]:
        if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 or tuned.active() is not table:
            return forward(q, k, v, rng, [], options)
        return run_forward(plan, q, k, v, rng, [])

    return again


# --- backward ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackwardPlan:
    """The calls of a backward in order; with dq_sums, dQ is summed in fp32 in "dq_acc", zeros of that shape at first,
    and with dq_scale multiplied by it last."""

    calls: tuple[Call, ...]
    gradients: tuple[layout.Layout, layout.Layout, layout.Layout]
    stats: layout.Layout
    dq_sums: tuple[int, ...] | None
    dq_scale: float | None


@lru_cache(maxsize=4096)
def backward_plan(
    table: tuned.Table, out_strides: tuple[int, ...], d_lse_strides: tuple[int, ...] | None, *operands: Any
) -> BackwardPlan | None:
    """How to compute a backward of `Operands`, None where there is nothing to compute."""
    p = Operands(*operands)
    if p.empty:
        return None
    device, deterministic = device_for(p.device, p.dtype), p.options.deterministic
    config = table.backward_of(p.device, p.shape, deterministic)
    config = config or backward_config(device, p.shape, deterministic)
    unit = math.lcm(STATS_ROWS, p.mask_block[0] or 1)
    rows_padded = ceil_div(p.seqlen_q, unit) * unit
    gradients = layout.contiguous(p.q[0]), layout.contiguous(p.k[0]), layout.contiguous(p.v[0])
    results = gradients, layout.contiguous((2, p.batch, p.heads, rows_padded))
    calls = [_delta(p, rows_padded, out_strides, d_lse_strides)]
    if config.hopper is not None and hopper.available():
        calls.append(hopper.backward(p, config, rows_padded))
        if config.hopper.fused:
            # These kernels leave the dropout factor of dP to dQ's last pass.
            factor = 1 / (1 - dropout_effective_p(p.options.dropout_p)) if p.dropout else 1
            if wide(p.head_dim):
                calls.append(_dq_from_sums(p, rows_padded, p.scale * factor))
                return BackwardPlan(tuple(calls), *results, (p.batch, p.heads, rows_padded, p.head_dim), None)
            return BackwardPlan(tuple(calls), *results, tuple(p.q[0]), p.scale * factor)
    else:
        calls.append(_dkdv(p, config, rows_padded))
    calls.append(_dq(p, config, rows_padded))
    return BackwardPlan(tuple(calls), *results, None, None)


def _delta(
    p: Operands, rows_padded: int, out_strides: tuple[int, ...], d_lse_strides: tuple[int, ...] | None
) -> Call:
    return Call(
        delta_kernel,
        (rows_padded // STATS_ROWS * p.batch * p.heads,),
        [
            Address("out"), Address("d_out"), Address("lse"), Address("lse" if d_lse_strides is None else "d_lse"),
            Address("stats"), Address("delta"), *out_strides[:3], *p.d_out[1][:3], *(d_lse_strides or (0, 0, 0)),
            p.seqlen_q, rows_padded,
        ],
        {
            "HEADS": p.heads, "DV": p.head_dim_v, "BLOCK_DV": p.shape.block_dv, "BLOCK_M": STATS_ROWS,
            "HAS_DLSE": d_lse_strides is not None,
        },
        {"num_warps": 8, "enable_fp_fusion": True},
    )  # fmt: skip


def _shared_arguments(p: Operands, rows_padded: int) -> tuple[list[int], list[Any], dict[str, Any]]:
    """Strides, numbers and constants that both backward kernels take."""
    strides = [*p.q[1][:3], *p.k[1][:3], *p.v[1][:3], *p.d_out[1][:3]]
    numbers = [p.seqlen_q, p.seqlen_k, rows_padded, *p.band, p.scale, p.scale_log2, p.threshold]
    constants = {
        "HEADS": p.heads, "GROUP": p.group, "D": p.head_dim, "DV": p.head_dim_v, "BLOCK_D": p.shape.block_d,
        "BLOCK_DV": p.shape.block_dv, "HAS_LEFT": p.has_left, "HAS_RIGHT": p.has_right, "DROPOUT": p.dropout,
        "MASK_M": p.mask_block[0], "MASK_N": p.mask_block[1], "PRECISION": "ieee",
    }  # fmt: skip
    return strides, numbers, constants


def _dkdv(p: Operands, config: BackwardConfig, rows_padded: int) -> Call:
    tile, itemsize = config.dkdv, p.dtype.itemsize
    strides, numbers, constants = _shared_arguments(p, rows_padded)
    key_tiles = ceil_div(p.seqlen_k, tile.block_n)
    planes = p.batch * p.kv_heads
    return Call(
        dkdv_kernel,
        (key_tiles * planes,),
        [
            tiles("q", p.q, tile.block_m, p.shape.block_d, itemsize, tile.tma), Address("k"), Address("v"),
            tiles("d_out", p.d_out, tile.block_m, p.shape.block_dv, itemsize, tile.tma),
            Address("stats"), Address("delta"), Address("rng"), *p.lists("key"), Address("dk"), Address("dv"),
            *strides, *p.dk_strides[:3], *p.dv_strides[:3], *numbers, *p.list_sizes("key"),
            key_tiles, planes, config.planes_per_wave,
        ],
        {
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "EVEN_Q": p.seqlen_q % max(tile.block_m, p.mask_block[0]) == 0, "TMA": tile.tma, **constants,
        },
        launch_options(tile),
    )  # fmt: skip


def _dq_from_sums(p: Operands, rows_padded: int, factor: float) -> Call:
    row_tiles = rows_padded // SUMS_ROWS.value
    return Call(
        dq_from_sums_kernel,
        (row_tiles * p.batch * p.heads,),
        [Address("dq_acc"), Address("dq"), *p.dq_strides[:3], factor, p.seqlen_q, row_tiles],
        {"HEADS": p.heads, "D": p.head_dim},
        {"num_warps": 8, "enable_fp_fusion": True},
    )


def _dq(p: Operands, config: BackwardConfig, rows_padded: int) -> Call:
    tile, itemsize = config.dq, p.dtype.itemsize
    strides, numbers, constants = _shared_arguments(p, rows_padded)
    row_tiles = ceil_div(p.seqlen_q, tile.block_m)
    planes = p.batch * p.heads
    return Call(
        dq_kernel,
        (row_tiles * planes,),
        [
            Address("q"), tiles("k", p.k, tile.block_n, p.shape.block_d, itemsize, tile.tma),
            tiles("v", p.v, tile.block_n, p.shape.block_dv, itemsize, tile.tma), Address("d_out"),
            Address("stats"), Address("delta"), Address("rng"), *p.lists("query"), Address("dq"),
            *strides, *p.dq_strides[:3], *numbers, *p.list_sizes("query"), row_tiles, planes, config.planes_per_wave,
        ],
        {
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "EVEN_K": p.seqlen_k % max(tile.block_n, p.mask_block[1]) == 0,
            "HEAVY_LAST": config.heavy_last, "TMA": tile.tma, **constants,
        },
        launch_options(tile),
    )  # fmt: skip


def run_backward(
    plan: BackwardPlan, d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rng: Tensor | None, lists: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v as planned for tensors with the layouts of these."""
    device = q.device
    dq, dk, dv = [x.new_empty_strided(*of) for x, of in zip((q, k, v), plan.gradients, strict=True)]
    stats = q.new_empty_strided(*plan.stats, dtype=torch.float32)
    tensors = {
        "q": q, "k": k, "v": v, "d_out": d_out, "out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv,
        "stats": stats, "delta": stats[1], "rng": lse if rng is None else rng,
    }  # fmt: skip
    if d_lse is not None:
        tensors["d_lse"] = d_lse
    if lists:
        tensors |= named_lists("query", lists[:4]) | named_lists("key", lists[4:])
    if plan.dq_sums is not None:
        tensors["dq_acc"] = torch.zeros(plan.dq_sums, dtype=torch.float32, device=device)
    with on(device):
        launch(plan.calls, tensors)
        if plan.dq_scale is not None:
            torch.mul(tensors["dq_acc"], plan.dq_scale, out=dq)
    return dq, dk, dv


def backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rng: Tensor | None, lists: list[Tensor], options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, contiguous; see `flash_api.Backward`."""
    q, k, v, d_out = unit_last(q), unit_last(k), unit_last(v), unit_last(d_out)
    masks = (lists[1].shape, lists[5].shape) if lists else None
    layouts = layout_of(q), layout_of(k), layout_of(v), layout_of(d_out)
    plan = backward_plan(
        tuned.active(), out.stride(), None if d_lse is None else d_lse.stride(),
        options, q.device, q.dtype, rng is not None, *layouts, masks,
    )  # fmt: skip
    if plan is None:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    return run_backward(plan, d_out, d_lse, q, k, v, out, lse, rng, lists)


def plan_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options
) -> BackwardAgain | None:
    """See `flash_api.operators.PlanBackward`."""
    layouts = layout_of(q), layout_of(k), layout_of(v), layout_of(d_out)
    table = tuned.active()
    if not settled_by(*layouts):
        return None
    dropout = options.dropout_p > 0
    plan = backward_plan(table, out.stride(), None, options, q.device, q.dtype, dropout, *layouts, None)
    if plan is None:
        return None

    def again(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        low_bits = d_out.data_ptr() | q.data_ptr() | k.data_ptr() | v.data_ptr()
        if low_bits % 16 or tuned.active() is not table:
            return backward(d_out, None, q, k, v, out, lse, rng, [], options)
        return run_backward(plan, d_out, None, q, k, v, out, lse, rng, [])

    return again
