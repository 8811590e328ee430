"""The public `flash_attention`, and its operators in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.impls.flash_api import BlockMask, attend, define_ops
from attnbench.impls.flash_triton.launch import backward, forward, plan_backward, plan_forward

if TYPE_CHECKING:
    from torch import Tensor

_forward_op = define_ops(
    "flash_triton", forward, backward, plan_forward=plan_forward, plan_backward=plan_backward
)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str = "bottom_right",
    dropout_p: float = 0.0,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v, differentiable, in memory linear in the sequence.

    q: (batch, seqlen_q, heads, head_dim). k: (batch, seqlen_k, kv_heads, head_dim). v: (batch, seqlen_k, kv_heads,
        head_dim_v). float16, bfloat16 or float32 (products in IEEE fp32); head dims multiples of 8 from 16 to 256; any
        lengths, 0 included. Query head h reads key head h // (heads // kv_heads). Any strides with a unit last one; a
        tensor whose last stride is not 1 is copied.
    causal: row i sees key j only if j <= i + shift; shift is seqlen_k - seqlen_q for alignment "bottom_right" and 0
        for "top_left".
    window: (left, right) in keys, each None or >= 0: i + shift - left <= j <= i + shift + right. With causal, right
        is 0.
    dropout_p: probability in [0, 1) of dropping a softmax weight, rounded to a multiple of 1/256
        (`flash_api.dropout_effective_p`). The mask is `flash_api.dropout_keep_mask` of a state drawn from torch's
        generator.
    block_mask: visit only these blocks; causal and window apply within its partial blocks.
    scale: positive; 1 / sqrt(head_dim) if None.
    return_lse: also return lse (batch, heads, seqlen_q), float32, natural log, differentiable.
    deterministic: bitwise repeatable gradients.

    Returns out (batch, seqlen_q, heads, head_dim_v) in q's dtype. A row that sees no key has out 0, lse -inf and
    gradients 0. Under autocast q, k and v are cast to its dtype. Memory beyond results: in backward two fp32 values a
    row, and an fp32 copy of dq unless deterministic; in decode an fp32 out and lse for each key split.
    Raises TypeError or ValueError naming the argument, what was given and what is allowed; RuntimeError on double
    backward. Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithms 1 and 2.
    """
    return attend(
        _forward_op, q, k, v, causal=causal, window=window, alignment=alignment, dropout_p=dropout_p,
        block_mask=block_mask, scale=scale, return_lse=return_lse, deterministic=deterministic,
    )  # fmt: skip
