"""Memory around a judged call: NaN where its results may land, and a sum of the bits of its inputs."""

from __future__ import annotations

import functools
import math

import torch

from attnbench.harness.oracle.chunks import row_major
from attnbench.harness.oracle.inputs import Inputs, torch_dtype
from attnbench.harness.problem import Problem

PIECE_ELEMENTS = 1 << 21
"""Elements that are summed at a time: their weighted bits, 16 MiB, are still in the L2 of a GPU when they are added."""
MODULUS = 2**64
STEP = 6364136223846793005
"""Odd, so that sums of pieces in another order make another sum (Knuth's multiplier of a linear generator)."""


def checksums(inputs: Inputs) -> dict[str, int]:
    """A sum of each tensor's bits, each weighted by where it stands, modulo 2^64; in one pass, a piece at a time.

    Any single change shows for sure. Several, exchanged elements among them, cancel by accident alone, once in 2^32.
    """
    tensors = {name: getattr(inputs, name) for name in ("q", "k", "v", "dout")}
    return {name: _checksum(tensor) for name, tensor in tensors.items() if tensor is not None}


@torch.no_grad()
def _checksum(tensor: torch.Tensor) -> int:
    # Elements of 8 bytes as two of 4: a change of sign moves the topmost bit, of 64 beyond what any weight can tell.
    kind = torch.int16 if tensor.element_size() == 2 else torch.int32
    sums = [
        torch.mul(bits, _weights(bits.numel(), tensor.device)).sum()
        for batch, rows in row_major(tuple(tensor.shape), PIECE_ELEMENTS)
        for bits in (tensor[batch, rows].contiguous().view(kind).flatten(),)
    ]
    total = 0
    for part in torch.stack(sums).tolist() if sums else ():
        total = (total * STEP + part) % MODULUS
    return total


def _weights(count: int, device: torch.device) -> torch.Tensor:
    """Random odd integers, int64 (count,), the same ones every time."""
    return _all_weights(1 << (count - 1).bit_length(), device)[:count]


@functools.lru_cache(maxsize=2)
def _all_weights(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, device=device) | 1


def poison(problem: Problem, device: torch.device) -> None:
    """Leaves NaN in the memory that the next allocations are likely to be given, so that what is not written shows."""
    dtype = torch_dtype(problem.dtype)
    shapes = [problem.out_shape] if problem.direction == "fwd" else [
        problem.out_shape, problem.q_shape, problem.k_shape, problem.v_shape
    ]  # fmt: skip
    held = [torch.full((math.prod(shape),), math.nan, dtype=dtype, device=device) for shape in shapes]
    held.append(torch.full((problem.batch * problem.heads * problem.seqlen_q,), math.nan, device=device))
    del held
