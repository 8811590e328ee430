"""xformers' memory_efficient_attention, one operator pair at a time.

Limits are those of xformers 0.0.34 and 0.0.35 (``not_supported_reasons`` of each operator): flash operators are aligned
bottom right only, cutlass either way, and split-k takes causal for at most 16 queries. Grouped heads are 5-d
(batch, seqlen, kv_heads, group, head_dim) with K and V expanded, not repeated, and forward only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnbench.harness.contract import (
    Capabilities,
    Device,
    Dropout,
    Implementation,
    Prepared,
    Unavailable,
    missing_module,
)
from attnbench.harness.masks import ALIGNMENTS
from attnbench.harness.problem import Problem

if TYPE_CHECKING:
    import torch

STRIDE_MULTIPLE = 8
SPLITK_CAUSAL_ROWS = 16
SPLITK_HEAD_DIMS = (16, 32, 64, 128, 256, 512)


class XformersOperator(Implementation):
    """One module of ``xformers.ops.fmha``: its FwOp and, where it has one, its BwOp."""

    contract = 1
    package = "xformers"

    def __init__(self, name: str, module: str, summary: str, capabilities: Capabilities) -> None:
        self.name = name
        self.module = module
        self.summary = summary
        self.capabilities = capabilities

    def unavailable(self, device: Device) -> Unavailable | None:
        if found := super().unavailable(device) or missing_module("xformers", "pip install xformers"):
            return found
        no_flash2 = missing_module("flash_attn.flash_attn_interface", "")
        if no_flash2 and missing_module("flash_attn", "") is None:
            return Unavailable(
                "xformers cannot be imported beside FlashAttention-4's flash_attn, which has no flash_attn_interface",
                "put one of the two on ATTNBENCH_PATH_<IMPL>",
            )
        if self.module == "flash3" and all(
            missing_module(name, "") for name in ("xformers.flash_attn_3._C", "flash_attn_3._C")
        ):
            return Unavailable("this xformers carries no FlashAttention-3", "pip install xformers==0.0.34")
        return None

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        found = super().unsupported_reasons(problem, device)
        grouped = problem.heads != problem.kv_heads
        if problem.batch == 0:
            found.append("batch 0 is not supported")
        if grouped and problem.direction != "fwd":
            found.append("grouped heads have no backward pass")
        empty_rows = problem.mask.alignment == "bottom_right" and problem.seqlen_q > problem.seqlen_k
        if self.module == "cutlass" and problem.mask.banded and empty_rows:
            found.append("a row with nothing to attend to is not defined by the kernel")
        if self.module == "flash3":
            least = 32 if problem.direction == "fwd" else 64
            if problem.head_dim < least:
                found.append(f"head_dim {problem.head_dim} is below {least}")
        if self.module == "triton_splitk":
            if problem.head_dim not in SPLITK_HEAD_DIMS:
                found.append(f"head_dim {problem.head_dim} not in {'/'.join(map(str, SPLITK_HEAD_DIMS))}")
            if problem.mask.banded and problem.seqlen_q > min(SPLITK_CAUSAL_ROWS, problem.seqlen_k):
                found.append(f"causal takes at most {SPLITK_CAUSAL_ROWS} queries and no more than keys")
        return found

    def dropout_effective(self, p: float) -> Dropout:
        return Dropout.by_bytes(p) if self.module == "flash" else super().dropout_effective(p)

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        self.require(problem, device)
        from xformers.ops import fmha

        operators = importlib.import_module(f"xformers.ops.fmha.{self.module}")
        operator_pair = (operators.FwOp, operators.BwOp if self.capabilities.backward else None)
        bias = self._bias(problem, device)
        # Masks with offsets are block-diagonal: all sequences of the batch lie behind one another.
        flat = self.module == "triton_splitk" and bias is not None
        group = problem.heads // problem.kv_heads

        def head_groups(x: torch.Tensor, shared: bool) -> torch.Tensor:
            if flat:
                x = x.flatten(0, 1)[None]
            if group == 1:
                return x
            if shared:
                return x.unsqueeze(3).expand(-1, -1, -1, group, -1)
            return x.unflatten(2, (problem.kv_heads, group))

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = fmha.memory_efficient_attention(
                head_groups(q, shared=False),
                head_groups(k, shared=True),
                head_groups(v, shared=True),
                attn_bias=bias,
                p=problem.dropout_p,
                scale=problem.softmax_scale,
                op=operator_pair,
            )
            return out.reshape(problem.out_shape)

        return Prepared(attend)

    def standalone(self, problem: Problem, device: Device) -> str:
        mask = problem.mask
        bias, flat = "None", ""
        if self.module == "triton_splitk" and mask.kind != "full":
            flat = "    q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))\n"
            bias = (
                "attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(q_seqlen=[SEQLEN_Q] * BATCH, "
                "kv_padding=SEQLEN_K, kv_seqlen=[SEQLEN_K] * BATCH, device=torch.device(DEVICE))"
            )
        elif mask.kind == "window":
            far = problem.seqlen_q + problem.seqlen_k
            left, right = (far if side is None else side for side in (mask.left, mask.right))
            bias = f"attn_bias.LocalAttentionFromBottomRightMask(window_left={left}, window_right={right})"
        elif mask.kind == "causal":
            same = problem.seqlen_q == problem.seqlen_k or mask.alignment == "top_left"
            bias = f"attn_bias.LowerTriangular{'' if same else 'FromBottomRight'}Mask()"
        return f"""
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias, {self.module}


def attend(q, k, v):
{flat}    group = HEADS // KV_HEADS
    if group > 1:
        q = q.unflatten(2, (KV_HEADS, group))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k, v))
    operators = ({self.module}.FwOp, {self.module + ".BwOp" if self.capabilities.backward else None})
    out = fmha.memory_efficient_attention(q, k, v, attn_bias={bias}, p={problem.dropout_p!r}, scale=SCALE, op=operators)
    return out.reshape(BATCH, SEQLEN_Q, HEADS, HEAD_DIM_V)
"""

    def _bias(self, problem: Problem, device: Device) -> Any:
        """The mask as this operator takes it."""
        import torch
        from xformers.ops.fmha import attn_bias

        mask, rows, keys = problem.mask, problem.seqlen_q, problem.seqlen_k
        if mask.kind == "full":
            return None
        if self.module == "triton_splitk":
            return attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
                q_seqlen=[rows] * problem.batch,
                kv_padding=keys,
                kv_seqlen=[keys] * problem.batch,
                device=torch.device(str(device)),
            )
        if mask.kind == "window":
            left, right = (rows + keys if side is None else side for side in (mask.left, mask.right))
            return attn_bias.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)
        if rows == keys or mask.alignment == "top_left":
            return attn_bias.LowerTriangularMask()
        return attn_bias.LowerTriangularFromBottomRightMask()


cutlass = XformersOperator(
    "xformers-cutlass",
    "cutlass",
    "xformers' CUTLASS operator",
    Capabilities(
        compute_capability=((5, 0), (9, 0)),
        dtypes=("fp16", "bf16", "fp32"),
        alignments=ALIGNMENTS,
        max_head_dim=65536,
        head_dim_v_differs=True,
        dropout=True,
        contiguous_head_dim=True,
        stride_multiple=STRIDE_MULTIPLE,
    ),
)
flash2 = XformersOperator(
    "xformers-flash2",
    "flash",
    "xformers' FlashAttention-2 operator, from flash_attn or torch",
    Capabilities(
        compute_capability=((8, 0), (99, 9)),
        masks=("full", "causal", "window"),
        dropout=True,
        contiguous_head_dim=True,
        stride_multiple=STRIDE_MULTIPLE,
    ),
)
flash3 = XformersOperator(
    "xformers-flash3",
    "flash3",
    "xformers' FlashAttention-3 operator",
    Capabilities(
        compute_capability=((9, 0), (9, 0)),
        masks=("full", "causal", "window"),
        contiguous_head_dim=True,
        stride_multiple=STRIDE_MULTIPLE,
    ),
)
splitk = XformersOperator(
    "xformers-splitk",
    "triton_splitk",
    "xformers' Triton split-k operator for few queries against many keys",
    Capabilities(
        compute_capability=((8, 0), (99, 9)),
        max_head_dim=512,
        backward=False,
        contiguous_head_dim=True,
        stride_multiple=STRIDE_MULTIPLE,
    ),
)
