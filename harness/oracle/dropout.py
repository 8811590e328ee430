"""Which weights an implementation dropped, read off its answers: no knowledge of its random numbers is needed.

With q = k = 0 every visible key of a row weighs 1 / n, n the keys that it sees. With columns of the identity as V, out
is P itself: kept weights read scale / n, dropped ones 0. Sk / Dv calls from one generator state give the whole mask,
provided that it depends on nothing but that state and the problem's shape; the answer to other values is then judged
under this mask, which shows where it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnbench.harness.contract import Dropout
from attnbench.harness.oracle.inputs import torch_dtype
from attnbench.harness.oracle.judge import WrongAnswer
from attnbench.harness.oracle.reference import Kept
from attnbench.harness.problem import Problem

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GeneratorState:
    """Torch's generators, of the CPU and of one GPU: an implementation may draw from either."""

    host: torch.Tensor
    device: torch.device
    on_device: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> GeneratorState:
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, on_device)

    @classmethod
    def at(cls, seed: int, device: torch.device) -> GeneratorState:
        """A state in the middle of a sequence, as a training step finds it; the generators are left in it."""
        torch.manual_seed(seed)
        for place in {torch.device("cpu"), device}:
            torch.rand(7, device=place)
        return cls.now(device)

    def restore(self) -> None:
        torch.set_rng_state(self.host)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)


def recover(
    problem: Problem,
    attend: Attend,
    state: GeneratorState,
    dropout: Dropout,
    rows: torch.Tensor | None = None,
) -> Kept:
    """The mask of a call from ``state``, of the given query rows (all when None); hidden pairs count as dropped.

    attend takes leaves that need gradients where the direction has a backward, as the judged call's do. WrongAnswer
    where out is neither 0 nor what a kept weight is, by ``dropout``.
    """
    device, dtype = state.device, torch_dtype(problem.dtype)
    backward = problem.direction != "fwd"
    at = torch.arange(problem.seqlen_q) if rows is None else rows
    at = at.to(device)
    q = torch.zeros(problem.q_shape, dtype=dtype, device=device, requires_grad=backward)
    k = torch.zeros(problem.k_shape, dtype=dtype, device=device, requires_grad=backward)
    visible = problem.mask.dense(at, problem.heads, problem.seqlen_q, problem.seqlen_k)
    seen = visible.sum(-1)[..., None].clamp(min=1)  # (1 or H, R, 1)
    keep = torch.zeros(
        (problem.batch, problem.heads, len(at), problem.seqlen_k), dtype=torch.bool, device=device
    )
    v = torch.zeros(problem.v_shape, dtype=dtype, device=device, requires_grad=backward)
    width = problem.head_dim_v
    identity = torch.eye(width, dtype=dtype, device=device)[None, :, None]
    for start in range(0, problem.seqlen_k, width):
        keys = slice(start, min(start + width, problem.seqlen_k))
        ones = v.detach()[:, keys]  # all that changes of V: a new one for each slice would be Sk^2 written
        ones.copy_(identity[:, : keys.stop - start])
        state.restore()
        out = attend(q, k, v).detach()
        weights = out.index_select(1, at).transpose(1, 2)[..., : keys.stop - start]
        keep[..., keys] = weights != 0
        _check(weights, seen, visible[..., keys], dropout, start)
        ones.zero_()
    return Kept(keep, dropout.scale)


def _check(
    weights: torch.Tensor, seen: torch.Tensor, visible: torch.Tensor, dropout: Dropout, start: int
) -> None:
    """Weights times the keys seen: 0, or the scale of what is kept; 0 where hidden."""
    dtype = torch.finfo(weights.dtype)
    # More keys than fp16 has numbers for are seen from 64k on.
    ratios = weights.to(torch.promote_types(weights.dtype, torch.float32)) * seen
    # Three roundings to dtype; in fp16, 1 / n is subnormal from 16k keys on, and known to fewer bits.
    allowed = 4 * dtype.eps * dropout.scale + dtype.smallest_normal * dtype.eps * seen
    bad = (ratios != 0) & (((ratios - dropout.scale).abs() > allowed) | ~visible)
    bad |= ~ratios.isfinite()
    if bad.any():
        place = [int(index) for index in torch.unravel_index(bad.int().argmax(), bad.shape)]
        got = ratios[tuple(place)].item()
        place[3] += start
        raise WrongAnswer(
            f"dropout: with equal scores the weight at (batch, head, row, key) {tuple(place)} is {got:.5g} of one "
            f"key's, neither 0 nor {dropout.scale:.5g}"
        )
