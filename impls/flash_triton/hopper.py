"""Launch of the warp-specialised Hopper kernels, kept apart because Gluon is an experimental part of Triton."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnbench.impls.flash_triton.configs import Hopper, HopperBackward, ceil_div

LOG2E = 1.4426950408889634


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this Triton has the Gluon that these kernels are written in; the portable ones serve otherwise."""
    try:
        from attnbench.impls.flash_triton.kernels import backward_hopper, forward_hopper  # noqa: F401
    except (ImportError, TypeError, AttributeError):
        return False
    return True


@lru_cache(maxsize=64)
def shared_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """Swizzled shared-memory layout of a (1, 1, rows, columns) tile."""
    from triton.experimental.gluon import language as gl

    element = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], element)


def describe(x: Tensor, rows: int) -> Any:
    """Tensor descriptor of (rows, head_dim) tiles of a BSHD tensor seen as (batch, head, row, column)."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, seqlen, heads, dim = x.shape
    unit = 16 // x.element_size()
    sb, ss, sh = (s if n > 1 else unit for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))
    layout = shared_layout(rows, dim, x.dtype)
    return TensorDescriptor(x, [batch, heads, seqlen, dim], [sb, sh, ss, 1], [1, 1, rows, dim], layout)


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor | None, threshold: int, config: Hopper,
    band: tuple[int, int, int], sides: tuple[bool, bool], scale: float, planes_per_wave: int, heavy_last: bool,
) -> None:  # fmt: skip
    """Fill out and lse. band is (shift, left, right), sides whether left and right bound it; rng the dropout state."""
    from attnbench.impls.flash_triton.kernels.forward_hopper import ROWS, hopper_forward_kernel

    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k = k.shape[1]
    rows = ROWS.value
    tiles = ceil_div(seqlen_q, rows * config.consumers)
    planes = batch * heads
    hopper_forward_kernel[(tiles * planes,)](
        describe(q, rows), describe(k, config.block_n), describe(v, config.block_n), describe(out, rows), lse,
        lse if rng is None else rng,
        seqlen_q, seqlen_k, *band, scale * LOG2E, threshold, tiles, planes, planes_per_wave,
        HEADS=heads, GROUP=heads // k.shape[2], D=head_dim, BLOCK_N=config.block_n,
        CONSUMERS=config.consumers, STAGES=config.stages, HAS_LEFT=sides[0], HAS_RIGHT=sides[1],
        EVEN_K=seqlen_k % config.block_n == 0, HEAVY_LAST=heavy_last,
        DROPOUT=rng is not None, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse_log2: Tensor, delta: Tensor,
    rng: Tensor | None, threshold: int,
    dq_acc: Tensor, dk: Tensor, dv: Tensor,
    config: HopperBackward, band: tuple[int, int, int], sides: tuple[bool, bool], scale: float, planes_per_wave: int,
) -> None:  # fmt: skip
    """Fill dk and dv, and add dQ / scale into dq_acc, fp32 contiguous BSHD."""
    from attnbench.impls.flash_triton.kernels.backward_hopper import CONSUMERS, KEYS, hopper_backward_kernel

    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    keys = KEYS.value * CONSUMERS.value
    tiles = ceil_div(seqlen_k, keys)
    planes = batch * kv_heads
    hopper_backward_kernel[(tiles * planes,)](
        describe(q, config.block_m), describe(k, keys), describe(v, keys), describe(d_out, config.block_m),
        describe(dk, KEYS.value), describe(dv, KEYS.value), lse_log2, delta,
        delta if rng is None else rng, dq_acc,
        seqlen_q, seqlen_k, delta.shape[2], *band, scale, scale * LOG2E, threshold, tiles, planes, planes_per_wave,
        HEADS=heads, GROUP=heads // kv_heads, D=head_dim, BLOCK_M=config.block_m, STAGES=config.stages,
        HAS_LEFT=sides[0], HAS_RIGHT=sides[1], EVEN_K=seqlen_k % keys == 0, DROPOUT=rng is not None,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
