"""What the project's own kernels share: argument checks, the dropout contract, block masks, torch.library operators.

A kernel family provides two functions, a forward and a backward launch over checked tensors, and
`define_ops` turns them into one differentiable `flash_attention` with identical arguments, errors and semantics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

ALIGNMENTS = ("bottom_right", "top_left")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DROPOUT_LEVELS = 256
PHILOX_ROUNDS = 7
LIBRARY = torch.library.Library("attnbench", "FRAGMENT")


# --- the band
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """Row i sees key j iff i + shift - left <= j <= i + shift + right; a side that is None is unbounded."""

    left: int | None
    right: int | None
    shift: int

    @staticmethod
    def of(left: int | None, right: int | None, bottom_right: bool, seqlen_q: int, seqlen_k: int) -> Band:
        """Sides clipped to the sequence, beyond which they mean the same, so that kernels can add them in 32 bits."""
        far = seqlen_q + seqlen_k
        shift = seqlen_k - seqlen_q if bottom_right else 0
        return Band(
            None if left is None else min(left, far), None if right is None else min(right, far), shift
        )

    @property
    def banded(self) -> bool:
        """Whether any side is bounded."""
        return self.left is not None or self.right is not None


# --- dropout
# ----------------------------------------------------------------------------------------------------------


def dropout_threshold(p: float) -> int:
    """An element is kept iff its random byte is below this: round(256 (1 - p)), at least 1."""
    return max(1, round(DROPOUT_LEVELS * (1.0 - p)))


def dropout_effective_p(p: float) -> float:
    """The probability that the kernels really drop with, a multiple of 1/256; kept elements are scaled by
    its complement."""
    return 1.0 - dropout_threshold(p) / DROPOUT_LEVELS


def dropout_keep_mask(
    seed: int, offset: int, batch: int, heads: int, seqlen_q: int, seqlen_k: int, p: float,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """The dropout mask of one call: bool (batch, heads, seqlen_q, seqlen_k), True where a probability is kept.

    This is the contract of all the project's kernels. One Philox4x32-7 call (Salmon et al., SC'11) gives 16
    bytes, which cover the elements (i0 + 8a, j0 + 8b), 0 <= a, b < 4, of a 32 x 32 patch: each lane of a
    tensor-core accumulator owns such elements, in S and in its transpose alike. For row i, key j:

        key      = (seed low 32 bits, seed high 32 bits)
        counter  = (8 (i // 32) + i % 8, 8 (j // 32) + j % 8, batch_index * heads + head, offset low 32 bits)
        word     = 2 ((i // 16) % 2) + (j // 16) % 2       of the four 32-bit outputs
        byte     = 2 ((i // 8) % 2) + (j // 8) % 2         of that word, 0 the least significant
        kept    <=> byte value < dropout_threshold(p)

    It does not depend on tiles, on the masks or on which pass asks. Memory: 8 bytes an element while it runs.
    """
    i = torch.arange(seqlen_q, device=device)
    j = torch.arange(seqlen_k, device=device)
    plane = torch.arange(batch * heads, device=device)
    words = philox4x32(
        ((8 * (i // 32) + i % 8)[None, :, None], (8 * (j // 32) + j % 8)[None, None, :],
         plane[:, None, None], torch.tensor(offset & 0xFFFFFFFF, device=device)),
        (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF),
    )  # fmt: skip
    word = (2 * (i // 16 % 2))[:, None] + (j // 16 % 2)[None, :]
    byte = (2 * (i // 8 % 2))[:, None] + (j // 8 % 2)[None, :]
    chosen = words[3]
    for index in range(3):
        chosen = torch.where(word == index, words[index], chosen)
    keep = (chosen >> (8 * byte)) & 0xFF < dropout_threshold(p)
    return keep.view(batch, heads, seqlen_q, seqlen_k)


def philox4x32(
    counter: tuple[Tensor, ...], key: tuple[int, int], rounds: int = PHILOX_ROUNDS
) -> tuple[Tensor, ...]:
    """Four 32-bit words per counter, in int64 tensors (Salmon et al., SC'11, Philox4x32)."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*(c.to(torch.int64) for c in counter))
    k0, k1 = key
    low = 0xFFFFFFFF
    for _ in range(rounds):
        # int64 products wrap modulo 2**64, which leaves the 32 high bits right once the sign extension is masked.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def draw_dropout_state(device: torch.device) -> Tensor:
    """int64 (seed, offset) from torch's generator, left on the device: a CUDA graph replay draws a fresh one."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


# --- block masks
# ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlockLists:
    """For each row of blocks, which blocks of the other side it visits: counts (B, H, rows), indices (B, H,
    rows, width)."""

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor

    def tensors(self) -> list[Tensor]:
        """The four tensors in a fixed order."""
        return [self.partial_count, self.partial_index, self.full_count, self.full_index]


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which blocks of the score matrix are visited; the rest count as masked.

    Names as in torch's FlexAttention: kv_num_blocks int32 (B or 1, H or 1, query blocks) and kv_indices int32
    (..., query blocks, width) list the *partial* blocks of each query block, where causal and window of the call apply
    element by element; full_kv_num_blocks and full_kv_indices list the *full* ones, whose every element is
    visible and to which causal and window do not apply. H counts query heads. block_size is (queries, keys)
    of a block.

    Raises ValueError if shapes disagree, or counts or indices are out of range, unsorted or repeated, or a
    block is in both lists. These checks read the tensors once, here, and never during attention.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None = None
    full_kv_indices: Tensor | None = None
    block_size: tuple[int, int] = (128, 128)
    by_query: BlockLists = field(init=False, repr=False)
    by_key: BlockLists = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.block_size) != 2 or any(b < 32 or b % 32 for b in self.block_size):
            raise ValueError(f"block_size: got {self.block_size}, allowed are two positive multiples of 32")
        partial = _dense_of_lists("kv", self.kv_num_blocks, self.kv_indices)
        if (self.full_kv_num_blocks is None) != (self.full_kv_indices is None):
            raise ValueError("full_kv_num_blocks and full_kv_indices: give both or neither")
        full = torch.zeros_like(partial)
        if self.full_kv_num_blocks is not None and self.full_kv_indices is not None:
            full = _dense_of_lists("full_kv", self.full_kv_num_blocks, self.full_kv_indices)
            if full.shape != partial.shape:
                raise ValueError(
                    f"full_kv_indices: got {tuple(full.shape)}, kv_indices has {tuple(partial.shape)}"
                )
        if bool((partial & full).any()):
            raise ValueError("full_kv_indices: a block is listed both as partial and as full")
        object.__setattr__(self, "by_query", _lists_of_dense(partial, full))
        object.__setattr__(self, "by_key", _lists_of_dense(partial.transpose(2, 3), full.transpose(2, 3)))

    @classmethod
    def from_dense(
        cls, blocks: Tensor, block_size: tuple[int, int] = (128, 128), *, full: Tensor | None = None
    ) -> BlockMask:
        """From bool matrices (query blocks, key blocks), optionally with leading (batch, heads): `blocks`
        are visited, and those also in `full` skip causal and window."""
        if blocks.ndim not in (2, 4) or blocks.dtype != torch.bool:
            raise ValueError(
                f"blocks: got {blocks.dtype} {tuple(blocks.shape)}, allowed is bool with 2 or 4 dimensions"
            )
        if full is not None and (full.shape != blocks.shape or full.dtype != torch.bool):
            raise ValueError(
                f"full: got {full.dtype} {tuple(full.shape)}, allowed is bool {tuple(blocks.shape)}"
            )
        lead = (1,) * (4 - blocks.ndim)
        visited = blocks.reshape(lead + blocks.shape)
        skip = torch.zeros_like(visited) if full is None else visited & full.reshape(visited.shape)
        lists = _lists_of_dense(visited & ~skip, skip)
        return cls(
            lists.partial_count,
            lists.partial_index,
            lists.full_count,
            lists.full_index,
            block_size=block_size,
        )

    @classmethod
    def from_bsr(
        cls, crow: Tensor, col: Tensor, key_blocks: int, block_size: tuple[int, int] = (128, 128)
    ) -> BlockMask:
        """From the row pointers and column indices of a block-sparse-row matrix, as torch's sparse BSR
        stores them."""
        rows = crow.numel() - 1
        counts = crow.diff()
        if rows < 1 or int(crow[0]) != 0 or bool((counts < 0).any()) or int(crow[-1]) != col.numel():
            raise ValueError(
                "crow: row pointers must start at 0, never fall, and end at the number of column indices"
            )
        if col.numel() and not (int(col.min()) >= 0 and int(col.max()) < key_blocks):
            raise ValueError(f"col: indices must lie in [0, {key_blocks})")
        dense = torch.zeros((rows, key_blocks), dtype=torch.int32, device=col.device)
        row_of = torch.repeat_interleave(torch.arange(rows, device=col.device), counts.to(col.device))
        dense.index_put_((row_of, col.long()), torch.ones_like(row_of, dtype=torch.int32), accumulate=True)
        if bool((dense > 1).any()):
            raise ValueError("col: a row lists a block twice")
        return cls.from_dense(dense.bool(), block_size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch or 1, heads or 1, query blocks, key blocks)."""
        batch, heads, rows, width = self.by_query.partial_index.shape
        return batch, heads, rows, width

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int, device: torch.device) -> None:
        """Raise ValueError unless this mask covers exactly a problem of these sizes."""
        rows, cols = (-(-n // b) for n, b in zip((seqlen_q, seqlen_k), self.block_size, strict=True))
        got = self.shape
        if got[0] not in (1, batch) or got[1] not in (1, heads) or got[2:] != (rows, cols):
            raise ValueError(
                f"block_mask: covers (batch, heads, query blocks, key blocks) {got}, allowed is"
                f" ({batch} or 1, {heads} or 1, {rows}, {cols}) for seqlen_q={seqlen_q}, seqlen_k={seqlen_k},"
                f" block_size={self.block_size}"
            )
        if self.by_query.partial_index.device != device:
            raise ValueError(f"block_mask: on {self.by_query.partial_index.device}, q is on {device}")


def _dense_of_lists(name: str, counts: Tensor, indices: Tensor) -> Tensor:
    """Bool (B, H, rows, width) of checked lists; the width of the index tensor is the number of key blocks."""
    if indices.ndim != 4 or counts.shape != indices.shape[:3]:
        raise ValueError(
            f"{name}_indices: got {tuple(indices.shape)} with {name}_num_blocks {tuple(counts.shape)},"
            " allowed is (B, H, query blocks, key blocks) with (B, H, query blocks)"
        )
    width = indices.shape[3]
    if bool(((counts < 0) | (counts > width)).any()):
        raise ValueError(f"{name}_num_blocks: counts must lie in [0, {width}]")
    listed = torch.arange(width, device=indices.device) < counts[..., None]
    if bool((listed & ((indices < 0) | (indices >= width))).any()):
        raise ValueError(f"{name}_indices: indices must lie in [0, {width})")
    if bool((listed[..., 1:] & (indices[..., 1:] <= indices[..., :-1])).any()):
        raise ValueError(f"{name}_indices: the indices of a row must be sorted and unique")
    at = torch.where(listed, indices, width).long()
    dense = torch.zeros((*indices.shape[:3], width + 1), dtype=torch.bool, device=indices.device)
    return dense.scatter_(3, at, True)[..., :width]


def _lists_of_dense(partial: Tensor, full: Tensor) -> BlockLists:
    """Counts and sorted indices of two bool block matrices (B, H, rows, cols)."""

    def of(dense: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort((~dense).to(torch.int8), dim=3, stable=True)
        return dense.sum(3, dtype=torch.int32).contiguous(), order.to(torch.int32).contiguous()

    return BlockLists(*of(partial), *of(full))


# --- arguments
# --------------------------------------------------------------------------------------------------------


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError or ValueError, naming the argument, unless q, k, v are one BSHD attention problem."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name}: got {x.ndim} dimensions, allowed is 4 (batch, seqlen, heads, head_dim)"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: got {x.dtype}, allowed are float16, bfloat16, float32")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got {x.dtype}, must match q's {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, must be on q's device {q.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: batch {x.shape[0]}, must match q's {q.shape[0]}")
        if not 16 <= x.shape[3] <= 256 or x.shape[3] % 8:
            raise ValueError(f"{name}: head_dim {x.shape[3]}, allowed are multiples of 8 from 16 to 256")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: head_dim {k.shape[3]}, must match q's {q.shape[3]}")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(f"v: (seqlen, heads) {tuple(v.shape[1:3])}, must match k's {tuple(k.shape[1:3])}")
    heads, kv_heads = q.shape[2], k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: {kv_heads} heads, allowed are divisors of q's {heads}")


def band_sides(
    causal: bool, window: tuple[int | None, int | None] | None, alignment: str
) -> tuple[int | None, int | None]:
    """(left, right) of the band that causal and window describe together."""
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment: got {alignment!r}, allowed are {' and '.join(ALIGNMENTS)}")
    left, right = (None, None) if window is None else window
    for side in (left, right):
        if side is not None and (not isinstance(side, int) or side < 0):
            raise ValueError(f"window: got {window}, allowed are two sides, each None or an int >= 0")
    return left, 0 if causal else right


def check_scalars(scale: float, dropout_p: float) -> None:
    """Raise ValueError unless scale and dropout_p are in range."""
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: got {scale}, allowed are positive finite numbers")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p}, allowed is 0 <= dropout_p < 1")


# --- operators
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Everything about a call but its tensors. mask_block is (0, 0) without block lists."""

    left: int | None
    right: int | None
    bottom_right: bool
    scale: float
    dropout_p: float
    mask_block: tuple[int, int]
    deterministic: bool


class Forward(Protocol):
    """Launch of a forward: (q, k, v, rng or None, by-query lists or [], options) -> out BSHD, lse (B, H, Sq) fp32."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], options: Options
    ) -> tuple[Tensor, Tensor]: ...


class Backward(Protocol):
    """Launch of a backward: adds d_out, d_lse (or None), out, lse; lists are by query then by key -> dq, dk, dv."""

    def __call__(
        self, d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        rng: Tensor | None, lists: list[Tensor], options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


_FORWARD_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? rng, Tensor[] lists, {}) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    "(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? rng,"
    " Tensor[] lists, {}) -> (Tensor, Tensor, Tensor)"
)
_OPTIONS_SCHEMA = (
    "int? left, int? right, bool bottom_right, float scale, float dropout_p,"
    " int mask_m, int mask_n, bool deterministic"
)


@lru_cache(maxsize=1024)
def _options(*values: Any) -> Options:
    left, right, bottom_right, scale, dropout_p, mask_m, mask_n, deterministic = values
    return Options(left, right, bottom_right, scale, dropout_p, (mask_m, mask_n), deterministic)


below_autograd = torch._C._AutoDispatchBelowAutograd  # noqa: SLF001 - no public name, and every C++ operator uses it


def define_ops(name: str, forward: Forward, backward: Backward) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register attnbench::{name}_forward and _backward with fake kernels and autograd; return the forward operator.

    Library.define with impl dispatches in a few microseconds; torch.library.custom_op adds tens.
    """
    LIBRARY.define(f"{name}_forward" + _FORWARD_SCHEMA.format(_OPTIONS_SCHEMA))
    LIBRARY.define(f"{name}_backward" + _BACKWARD_SCHEMA.format(_OPTIONS_SCHEMA))

    def run_forward(
        q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], *options: Any
    ) -> Any:
        return forward(q, k, v, rng, lists[:4], _options(*options))

    def run_backward(
        d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        rng: Tensor | None, lists: list[Tensor], *options: Any,
    ) -> Any:  # fmt: skip
        return backward(d_out, d_lse, q, k, v, out, lse, rng, lists, _options(*options))

    def fake_forward(
        q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], *options: Any
    ) -> Any:
        batch, seqlen_q, heads, _ = q.shape
        out = q.new_empty((batch, seqlen_q, heads, v.shape[3]))
        return out, q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)

    def fake_backward(
        d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    # torch.library.register_autograd would do this too, at several times the cost of a call (about 65 us).
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: Any, *options: Any
        ) -> Any:
            with below_autograd():
                out, lse = forward_op(q, k, v, rng, lists, *options)
            ctx.save_for_backward(q, k, v, out, lse, rng, *lists)
            ctx.options = options
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:
            q, k, v, out, lse, rng, *lists = ctx.saved_tensors
            nothing = (None,) * (2 + len(ctx.options))
            if d_out is None and d_lse is None:
                return None, None, None, *nothing
            d_out = torch.zeros_like(out) if d_out is None else d_out
            return *backward_op(d_out, d_lse, q, k, v, out, lse, rng, lists, *ctx.options), *nothing

    class AttentionBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:  # noqa: ARG004 - autograd fixes the signature
            with below_autograd():
                return backward_op(*arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:  # noqa: ARG004
            raise RuntimeError(
                "flash_attention: double backward is not implemented; its gradients cannot be differentiated"
            )

    def differentiable(function: type[torch.autograd.Function], op: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
                return function.apply(*arguments)
            with below_autograd():
                return op(*arguments)

        return run

    for op, run, fake in (("forward", run_forward, fake_forward), ("backward", run_backward, fake_backward)):
        LIBRARY.impl(f"{name}_{op}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"attnbench::{name}_{op}", fake, lib=LIBRARY)
    forward_op = getattr(torch.ops.attnbench, f"{name}_forward").default
    backward_op = getattr(torch.ops.attnbench, f"{name}_backward").default
    LIBRARY.impl(f"{name}_forward", differentiable(Attention, forward_op), "Autograd")
    LIBRARY.impl(f"{name}_backward", differentiable(AttentionBackward, backward_op), "Autograd")
    return forward_op


def attend(
    op: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, *, causal: bool,
    window: tuple[int | None, int | None] | None, alignment: str, dropout_p: float, block_mask: BlockMask | None,
    scale: float | None, return_lse: bool, deterministic: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Check the arguments of one public call, apply autocast, draw the dropout state, and run the operator."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_tensors(q, k, v)
    left, right = band_sides(causal, window, alignment)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
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
    out, lse = op(
        q, k, v, rng, lists, left, right, bottom_right, scale, float(dropout_p), *mask_block, deterministic
    )
    return (out, lse) if return_lse else out
