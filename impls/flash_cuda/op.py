"""The public `flash_attention`, and its operators in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.impls.flash_api import BlockMask, attend, define_ops
from attnbench.impls.flash_cuda.backward import backward, plan_backward, refuse
from attnbench.impls.flash_cuda.forward import forward, plan_forward

if TYPE_CHECKING:
    from torch import Tensor

_forward_op = define_ops("flash_cuda", forward, backward, refuse, plan_forward, plan_backward)


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
    """As `attnbench.impls.flash_triton.flash_attention`, on Hopper GPUs, but with less on offer.

    float16 and bfloat16; blocks of a block_mask are multiples of 64 queries x 32 keys. With gradients: of 64 x 64, and
    not together with deterministic (gradients repeat bit for bit, as out and lse always do). The call raises ValueError
    or TypeError for the rest, also when its forward alone would have been possible; torch.no_grad() asks for that.

    Tensors that the copy engine cannot address (a base or a stride not a multiple of 16 bytes, a last stride other
    than 1) are copied first.

    Memory beyond results, linear in the rows but padded: in backward two fp32 values a row and an fp32 copy of dq, the
    rows of each head in multiples of 64 and the columns of 64, or of 128 where a head dim exceeds 128 or blocks are not
    of multiples of 128 keys; in decode an fp32 out and lse for each key split.
    """
    return attend(
        _forward_op, q, k, v, causal=causal, window=window, alignment=alignment, dropout_p=dropout_p,
        block_mask=block_mask, scale=scale, return_lse=return_lse, deterministic=deterministic,
    )  # fmt: skip
