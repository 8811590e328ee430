"""One public call: its arguments checked, autocast applied, dropout drawn, and the operator run."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attnbench.impls.flash_api import settled
from attnbench.impls.flash_api.band import band_sides
from attnbench.impls.flash_api.block_mask import BlockMask
from attnbench.impls.flash_api.dropout import draw_dropout_state
from attnbench.impls.flash_api.interception import watched
from attnbench.impls.flash_api.operators import Operator
from attnbench.impls.flash_api.scale import LARGEST_SCALE, SMALLEST_SCALE

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_kinds(q: object, k: object, v: object) -> None:
    """Raise TypeError, naming the argument, unless q, k, v are tensors."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, allowed are torch tensors")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError or ValueError, naming the argument, unless q, k, v are one BSHD attention problem."""
    dtype, device, shapes = q.dtype, q.device, (q.shape, k.shape, v.shape)  # each costs 0.1 us to ask for
    for name, x, shape in zip("qkv", (q, k, v), shapes, strict=True):
        if len(shape) != 4:
            raise ValueError(
                f"{name}: got {x.ndim} dimensions, allowed is 4 (batch, seqlen, heads, head_dim)"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: got {x.dtype}, allowed are float16, bfloat16, float32")
        if x.dtype != dtype:
            raise TypeError(f"{name}: got {x.dtype}, must match q's {dtype}")
        if x.device != device:
            raise ValueError(f"{name}: on {x.device}, must be on q's device {device}")
        if shape[0] != shapes[0][0]:
            raise ValueError(f"{name}: batch {shape[0]}, must match q's {shapes[0][0]}")
        if not 16 <= shape[3] <= 256 or shape[3] % 8:
            raise ValueError(f"{name}: head_dim {shape[3]}, allowed are multiples of 8 from 16 to 256")
    (_, _, heads, head_dim), (_, *keys, key_dim), (_, *values, _) = shapes
    if key_dim != head_dim:
        raise ValueError(f"k: head_dim {key_dim}, must match q's {head_dim}")
    if values != keys:
        raise ValueError(f"v: (seqlen, heads) {tuple(values)}, must match k's {tuple(keys)}")
    kv_heads = keys[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: {kv_heads} heads, allowed are divisors of q's {heads}")


def check_scalars(scale: float, dropout_p: float) -> None:
    """Raise TypeError or ValueError unless scale and dropout_p are numbers in range."""
    given: tuple[tuple[str, object], ...] = (("scale", scale), ("dropout_p", dropout_p))
    for name, x in given:
        if not isinstance(x, (float, Real)):  # an abstract class is slow to ask
            raise TypeError(f"{name}: got {x!r}, allowed are numbers")
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:  # also false for NaN
        raise ValueError(
            f"scale: got {scale}, allowed is {SMALLEST_SCALE:.3g} <= scale <= {LARGEST_SCALE:.3g}"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p}, allowed is 0 <= dropout_p < 1")


def attend(
    op: Operator, q: Tensor, k: Tensor, v: Tensor, *, causal: bool,
    window: tuple[int | None, int | None] | None, alignment: str, dropout_p: float, block_mask: BlockMask | None,
    scale: float | None, return_lse: bool, deterministic: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Check the arguments of one public call, apply autocast, draw the dropout state, and run the operator.

    A call like an earlier one, but for a block mask, does so by what is `settled` of that one.
    """
    key = None
    if block_mask is None and not watched():
        key = _key(op, q, k, causal, window, alignment, dropout_p, scale, deterministic)
        planned = settled.find(key, q, k, v)
        if planned is not None:
            rng = draw_dropout_state(q.device) if dropout_p > 0 else None
            out, lse = op.again(planned, q, k, v, rng)
            return (out, lse) if return_lse else out
    check_kinds(q, k, v)
    kind = q.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        key = None  # of which the dtype is no part
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_tensors(q, k, v)
    left, right = band_sides(causal, window, alignment)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    check_scalars(scale, dropout_p)
    lists: list[Tensor] = []
    mask_block = (0, 0)
    if block_mask is not None:
        if not isinstance(block_mask, BlockMask):
            raise TypeError(
                f"block_mask: got {type(block_mask).__name__}, allowed is attnbench.impls.flash_api.BlockMask"
            )
        block_mask.check(q.shape[0], q.shape[2], q.shape[1], k.shape[1], q.device)
        lists = block_mask.by_query.tensors() + block_mask.by_key.tensors()
        mask_block = block_mask.block_size
    rng = draw_dropout_state(q.device) if dropout_p > 0 else None
    bottom_right = alignment == "bottom_right"
    options = left, right, bottom_right, float(scale), float(dropout_p), *mask_block, deterministic
    planned = op.plan(q, k, v, *options) if key is not None else None
    if planned is None:
        out, lse = op(q, k, v, rng, lists, *options)
    else:
        out, lse = op.again(planned, q, k, v, rng)
        settled.remember(key, planned, q, k, v)
    return (out, lse) if return_lse else out


def _key(
    op: object, q: Any, k: Any, causal: object, window: Any, alignment: object, dropout_p: object, scale: object,
    deterministic: object,
) -> Any:  # fmt: skip
    """What a call depends on beside the layouts of its tensors; None where it cannot be one that was checked.

    Guards know whether a tensor needs a gradient, and not whether gradients are enabled.
    """
    if type(causal) is not bool or type(deterministic) is not bool:
        return None
    try:
        # 1 and True are equal, as keys too, but not both allowed in every place.
        sides = None if window is None else (*window, *map(type, window))
        kinds = type(scale), type(dropout_p)
        grad = torch.is_grad_enabled()
        return op, q.shape, k.shape, causal, sides, alignment, dropout_p, scale, kinds, deterministic, grad
    except (AttributeError, TypeError):
        return None
