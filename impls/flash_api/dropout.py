"""The dropout contract: which weights every kernel of the project drops, as a function that torch can evaluate."""

from __future__ import annotations

import torch
from torch import Tensor

DROPOUT_LEVELS = 256
PHILOX_ROUNDS = 7


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
