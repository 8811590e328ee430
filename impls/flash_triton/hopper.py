"""Calls of the warp-specialised Hopper kernels, kept apart because Gluon is an experimental part of Triton."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from attnbench.impls.flash_triton.calls import Address, Call, Tiles
from attnbench.impls.flash_triton.configs import ceil_div, wide
from attnbench.impls.flash_triton.operands import by_plane

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.impls.flash_triton.configs import BackwardConfig, Device, ForwardConfig
    from attnbench.impls.flash_triton.operands import Operands


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this Triton has the Gluon that these kernels are written in; the portable ones serve otherwise."""
    try:
        from attnbench.impls.flash_triton.kernels import (  # noqa: F401
            backward_hopper,
            backward_hopper_wide,
            forward_hopper,
        )
    except (ImportError, TypeError, AttributeError):  # Gluon changes between releases
        return False
    return True


@lru_cache(maxsize=64)
def shared_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """Swizzled shared-memory layout of a (1, 1, rows, columns) tile."""
    from triton.experimental.gluon import language as gl

    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], element)


def tiles(name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, rows: int,
          columns: int | None = None) -> Tiles:  # fmt: skip
    """(rows, columns or head_dim) tiles of a BSHD tensor seen as (batch, head, row, column)."""
    columns = columns or shape[3]
    layout = shared_layout(rows, columns, dtype)
    return _tiles(name, *by_plane(shape, strides, dtype.itemsize), [1, 1, rows, columns], layout)


def row_tiles(name: str, rows: int, length: int, columns: int) -> Tiles:
    """Runs of `columns` of one row of a contiguous fp32 (rows, length)."""
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return _tiles(name, (rows, length), (length, 1), [1, columns], layout)


def _tiles(
    name: str, shape: tuple[int, ...], strides: tuple[int, ...], block: list[int], layout: Any
) -> Tiles:
    def make(x: Tensor) -> Any:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        return TensorDescriptor(x, list(shape), list(strides), block, layout)

    return Tiles(name, shape, strides, make)


def forward(p: Operands, config: ForwardConfig, device: Device) -> Call:
    """The call that fills out and lse; tickets is one zero."""
    from attnbench.impls.flash_triton.kernels.forward_hopper import ROWS, hopper_forward_kernel

    assert config.hopper is not None
    chosen = config.hopper
    rows = ROWS.value
    row_tiles_of_plane = ceil_div(p.seqlen_q, rows * chosen.consumers)
    planes = p.batch * p.heads
    return Call(
        hopper_forward_kernel,
        (min(row_tiles_of_plane * planes, device.sms),),
        [
            tiles("q", *p.q, p.dtype, rows), tiles("k", *p.k, p.dtype, chosen.block_n),
            tiles("v", *p.v, p.dtype, chosen.block_n), tiles("out", *p.out, p.dtype, rows),
            Address("lse"), Address("rng"), Address("tickets"), *p.lists("query"),
            p.seqlen_q, p.seqlen_k, *p.band, p.scale_log2, p.threshold, *p.list_sizes("query"),
            row_tiles_of_plane, planes, config.planes_per_wave,
        ],
        {
            "HEADS": p.heads, "GROUP": p.group, "D": p.head_dim, "BLOCK_N": chosen.block_n,
            "CONSUMERS": chosen.consumers, "STAGES": chosen.stages, "HAS_LEFT": p.has_left, "HAS_RIGHT": p.has_right,
            "EVEN_K": p.seqlen_k % max(chosen.block_n, p.mask_block[1]) == 0, "HEAVY_LAST": config.heavy_last,
            "SLOTS": 1 if wide(p.head_dim) else 2, "DROPOUT": p.dropout, "MASK_M": p.mask_block[0],
            "MASK_N": p.mask_block[1],
        },
        {"num_warps": 4, "enable_fp_fusion": True},
    )  # fmt: skip


def backward(p: Operands, config: BackwardConfig, rows_padded: int) -> Call:
    """The call that fills dk and dv and, if fused, adds dQ / scale into dq_acc, fp32.

    stats holds LSE in base 2 and delta: (2, batch, heads, rows_padded). dq_acc is contiguous BSHD, or of `wide` heads
    (batch, heads, rows_padded, head_dim) in the order of `kernels.sums`.
    """
    from attnbench.impls.flash_triton.kernels.backward_hopper import (
        CONSUMERS,
        KEYS,
        PART,
        hopper_backward_kernel,
    )
    from attnbench.impls.flash_triton.kernels.backward_hopper_wide import hopper_wide_kernel

    assert config.hopper is not None
    chosen = config.hopper
    keys = KEYS.value * (1 if wide(p.head_dim) else CONSUMERS.value)
    key_tiles = ceil_div(p.seqlen_k, keys)
    planes = p.batch * p.kv_heads
    dq: Tiles | Address
    if wide(p.head_dim):
        kernel, fused, row_tiles_of_plane = (
            hopper_wide_kernel,
            {"FUSED": chosen.fused},
            [rows_padded // chosen.block_m],
        )
        dq = Address("dq_acc" if chosen.fused else "dq")
    else:
        kernel, fused, row_tiles_of_plane = hopper_backward_kernel, {}, []
        # A consumer's half: 64 rows of 128, or of 64 half the columns.
        columns = p.head_dim * chosen.block_m // (CONSUMERS.value * PART.value)
        dq = tiles("dq_acc", p.q[0], p.dq_strides, torch.float32, PART.value, columns)
    return Call(
        kernel,
        (key_tiles * planes,),
        [
            tiles("q", *p.q, p.dtype, chosen.block_m), tiles("k", *p.k, p.dtype, keys),
            tiles("v", *p.v, p.dtype, keys), tiles("d_out", *p.d_out, p.dtype, chosen.block_m),
            row_tiles("stats", 2 * p.batch * p.heads, rows_padded, chosen.block_m),
            tiles("dk", p.k[0], p.dk_strides, p.dtype, KEYS.value),
            tiles("dv", p.v[0], p.dv_strides, p.dtype, KEYS.value),
            dq, Address("rng"), *p.lists("key"),
            p.seqlen_q, p.seqlen_k, *p.band, p.scale, p.scale_log2, p.threshold, *p.list_sizes("key"),
            *row_tiles_of_plane, key_tiles, planes, config.planes_per_wave,
        ],
        {
            "HEADS": p.heads, "GROUP": p.group, "D": p.head_dim, "BLOCK_M": chosen.block_m, "STAGES": chosen.stages,
            "HAS_LEFT": p.has_left, "HAS_RIGHT": p.has_right, "EVEN_K": p.seqlen_k % keys == 0, "DROPOUT": p.dropout,
            "MASK_M": p.mask_block[0], "MASK_N": p.mask_block[1], **fused,
        },
        {"num_warps": 4, "enable_fp_fusion": True},
    )  # fmt: skip
