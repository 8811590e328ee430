"""torch.nn.functional.scaled_dot_product_attention with one backend allowed at a time.

``sdpa_kernel`` with a single backend makes torch raise rather than fall back, so what is measured is what is named.
``is_causal`` is aligned top left. Bottom right goes through ``torch.nn.attention.bias.causal_lower_right``, which
the CUDA flash and efficient kernels run themselves. Every other mask is a dense bool ``attn_mask`` of
(1 or heads, seqlen_q, seqlen_k), built while preparing: math, efficient and the CPU's flash kernel take one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnbench.harness.contract import Capabilities, Device, Dropout, Implementation, Prepared, Unsupported
from attnbench.harness.masks import ALIGNMENTS, KINDS
from attnbench.harness.problem import DTYPES, Problem

if TYPE_CHECKING:
    import torch


class Sdpa(Implementation):
    """One backend of SDPA. ``on_cpu`` are the limits of its CPU kernel, where it has one."""

    contract = 1
    package = "torch"

    def __init__(
        self,
        name: str,
        backend: str,
        summary: str,
        capabilities: Capabilities,
        on_cpu: Capabilities | None = None,
    ) -> None:
        self.name = name
        self.backend = backend
        self.summary = summary
        self.capabilities = capabilities
        self.on_cpu = on_cpu

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        if device.kind == "cpu" and self.on_cpu:
            found = self.on_cpu.reasons(problem, device) + self._undefined(problem, device)
            if problem.direction != "fwd" and problem.dtype in ("fp16", "bf16"):
                # Seen with torch 2.13: errors 2 to 4 times those of the materialised form, growing with the rows.
                found.append(f"the CPU kernel sums dk and dv in {problem.dtype}, beyond the error budget")
            return found
        found = self.capabilities.reasons(problem, device)
        if device.kind == "cpu" or self.backend == "MATH":
            return found
        if problem.batch == 0:
            found.append("batch 0 is refused by the kernel")
        return found + self._undefined(problem, device)

    def _undefined(self, problem: Problem, device: Device) -> list[str]:
        """What torch would answer all the same, wrongly."""
        if self.backend == "MATH":
            return []
        if device.kind == "cuda":
            found = (
                ["a row with nothing to attend to is not defined by the kernel"]
                if has_empty_row(problem)
                else []
            )
            if problem.batch == 0 and self.backend == "CUDNN_ATTENTION":
                found.append("a batch of none comes back as None")
            return found
        if problem.mask.kind == "causal" and problem.softmax_scale <= 0:
            # Seen with torch 2.13: the -inf of a hidden pair is multiplied by the scale. With attn_mask it is right.
            return [f"the CPU kernel's is_causal returns NaN for scale {problem.softmax_scale:g}"]
        return []

    def repeats(self, device: Device) -> tuple[str, ...]:
        fixed_order = device.kind == "cpu" or self.backend == "MATH"
        return ("fwd", "bwd") if fixed_order else super().repeats(device)

    def dropout_effective(self, p: float) -> Dropout:
        return Dropout.by_bytes(p) if self.backend == "FLASH_ATTENTION" else super().dropout_effective(p)

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        if undefined := self._undefined(problem, device):
            raise Unsupported("; ".join(undefined))
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        backend = getattr(SDPBackend, self.backend)
        arguments = {
            **self._mask_arguments(problem, device),
            "scale": problem.softmax_scale,
            "enable_gqa": problem.heads != problem.kv_heads,
            "dropout_p": problem.dropout_p,
        }

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return scaled_dot_product_attention(q, k, v, **arguments).transpose(1, 2)

        return Prepared(attend)

    def standalone(self, problem: Problem, device: Device) -> str:
        written = {
            "full": "",
            "is_causal": "is_causal=True, ",
            "lower_right": "attn_mask=causal_lower_right(SEQLEN_Q, SEQLEN_K), ",
            "dense": "attn_mask=visible[None], ",
        }
        arguments = written[self._mask_form(problem, device)]
        return f"""
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


def attend(q, k, v):
    with sdpa_kernel(SDPBackend.{self.backend}):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(
            q, k, v, {arguments}scale=SCALE, enable_gqa=HEADS != KV_HEADS, dropout_p={problem.dropout_p!r}
        ).transpose(1, 2)
"""

    def _mask_arguments(self, problem: Problem, device: Device) -> dict[str, Any]:
        """The mask as SDPA takes it: nothing, is_causal, or an attn_mask."""
        import torch
        from torch.nn.attention.bias import causal_lower_right

        rows, keys = problem.seqlen_q, problem.seqlen_k
        match self._mask_form(problem, device):
            case "full":
                return {}
            case "is_causal":
                return {"is_causal": True}
            case "lower_right":
                return {"attn_mask": causal_lower_right(rows, keys)}
        every_row = torch.arange(rows, device=str(device))
        return {"attn_mask": problem.mask.dense(every_row, problem.heads, rows, keys)[None]}

    def _mask_form(self, problem: Problem, device: Device) -> str:
        mask = problem.mask
        if mask.kind == "full":
            return "full"
        if mask.kind == "causal" and (problem.seqlen_q == problem.seqlen_k or mask.alignment == "top_left"):
            return "is_causal"
        if mask.kind == "causal" and device.kind == "cuda" and self.backend != "MATH":
            return "lower_right"
        return "dense"


def has_empty_row(problem: Problem) -> bool:
    """Whether some query row of some head may see no key."""
    import numpy as np

    mask, keys = problem.mask, problem.seqlen_k
    first, last = mask.row_bounds(problem.seqlen_q, keys)
    if not mask.blocks:
        return bool((first == last).any())
    visible = mask.blocks.blocks(problem.heads, problem.seqlen_q, keys)
    starts = np.arange(visible.shape[2]) * mask.blocks.block_k
    ends = np.minimum(starts + mask.blocks.block_k, keys)
    for block_row in range(visible.shape[1]):
        rows = slice(block_row * mask.blocks.block_q, (block_row + 1) * mask.blocks.block_q)
        reached = np.maximum(first[rows, None], starts) < np.minimum(last[rows, None], ends)
        if not (visible[:, block_row, None] & reached).any(axis=2).all():
            return True
    return False


_ANY_SHAPE = Capabilities(
    devices=("cpu", "cuda"),
    dtypes=DTYPES,
    masks=KINDS,
    alignments=ALIGNMENTS,
    head_dim_multiple=1,
    max_head_dim=65536,
    head_dim_v_differs=True,
    dropout=True,
    min_seqlen=0,
)

math = Sdpa(
    "sdpa-math",
    "MATH",
    "SDPA's unfused backend: S and P materialised, K and V repeated for GQA, 16-bit inputs computed in fp32",
    _ANY_SHAPE,
)

flash = Sdpa(
    "sdpa-flash",
    "FLASH_ATTENTION",
    "SDPA's FlashAttention-2 on CUDA, its blocked flash kernel on CPU",
    Capabilities(
        devices=("cpu", "cuda"),
        compute_capability=((8, 0), (12, 1)),
        head_dim_multiple=1,
        contiguous_head_dim=True,
        dropout=True,
    ),
    on_cpu=Capabilities(
        devices=("cpu",),
        dtypes=DTYPES,
        masks=KINDS,
        alignments=ALIGNMENTS,
        head_dim_multiple=1,
        max_head_dim=65536,
        min_seqlen=0,
        contiguous_head_dim=True,
    ),
)

efficient = Sdpa(
    "sdpa-efficient",
    "EFFICIENT_ATTENTION",
    "SDPA's memory-efficient CUTLASS kernel, from xformers",
    Capabilities(
        compute_capability=((5, 0), (12, 1)),
        dtypes=("fp16", "bf16", "fp32"),
        masks=KINDS,
        alignments=ALIGNMENTS,
        max_head_dim=65536,
        head_dim_v_differs=True,
        gqa=False,
        contiguous_head_dim=True,
        stride_multiple=8,
        dropout=True,
    ),
)

cudnn = Sdpa(
    "sdpa-cudnn",
    "CUDNN_ATTENTION",
    "SDPA's cuDNN graph kernels",
    Capabilities(
        compute_capability=((8, 0), (12, 1)),
        alignments=("top_left",),
        head_dim_v_differs=True,
        dropout=True,
        min_seqlen=2,
        contiguous_head_dim=True,
    ),
)
