"""How wrong an answer may be: as wrong as the same computation in the same dtype, never a fixed tolerance.

With e = |eager - reference|, an answer o passes when

    max |o - reference|  <=  2 luck max e + atol + floor     (flash-attention's hopper tests, its issue 1136)
    mean |o - reference| <=  1.3 luck mean e + floor         (FlexAttention's tests allow 1.1 to 1.3)

The mean rule sees a small error everywhere: at 32k keys a scale off by 5% or 64 dropped keys hide under any
fixed 1e-2. The max rule sees one wrong place, and holds in every stretch of 64 rows (keys, for dk and dv) by
itself: results of a causal mask shrink along the sequence, and under one maximum for all of them a whole
missing tile at 8k would pass, both hidden under the errors of the first rows and diluted in the mean.

atol is 2 max |(reference + c - c) - reference| in the output's dtype, and at least one ulp of the largest
value, since eager can be exact. flash-attention has c = 0.3 for values around 1; here c = 0.3 min(1, max
|reference|), which stays as sharp where values are small.

Of a 16-bit problem there are two eager backwards, the flash kernels' and softmax's own, which round in other places;
an answer may be as wrong as the worse of them (``reference.eager``).

luck = 1 + 3 / sqrt(vectors): the error of few elements is itself a noisy yardstick. Those of one head_dim
vector share their softmax row, so vectors count as draws; |error| has a relative standard deviation of about
1, and 3 of them are allowed.

Where softmax saturates, dS = P (dP - delta) is a small difference of large terms. What is lost there follows
from the terms, and eager may be lucky, so max e is never taken below half an ulp of them. Their size is at
hand: delta = rowsum(dO O), so dq's terms go as |O| of the row, and dk's as |dV| of the key.

floor is what two right computations in one accumulator differ by: a score s is a sum of D products, known to
about eps sqrt(D) / 2 |s|, and P inherits that as a relative error; exponentials in use are wrong by up to 20
ulp (SLEEF u20, in torch's CPU kernels), and the rest are a few roundings. So P is known to
eps (16 + sqrt(D) / 2 s_max) of itself, eps being the accumulator's (fp32; fp64 for fp64), and results to that
much of their terms. For fp32 it is about 1e-5 relative, a thirtieth of what TF32 products lose; beside a
16-bit eager it is nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attnbench.harness.oracle.chunks import row_major
from attnbench.harness.oracle.inputs import Inputs
from attnbench.harness.oracle.reference import Answer
from attnbench.harness.problem import Problem

STRETCH = 64
MAX_FACTOR = 2.0
MEAN_FACTOR = 1.3
_EXP_AND_SUMS = 16.0
_EXP_16BIT = 2.0**-13
"""Relative error allowed to an exponential whose result is rounded to 16 bits, an eighth of fp16's eps: what
FlashAttention-4's polynomial exp2 (9e-5) keeps within. Seen in lse alone."""


@dataclass(frozen=True)
class Budget:
    """Absolute errors a tensor may have: at most, in each stretch of dim 1 (``stretches``), and on average.

    A single figure in ``max_errors`` holds for the whole tensor.
    """

    max_errors: tuple[float, ...]
    mean_error: float

    @property
    def max_error(self) -> float:
        """The most allowed anywhere."""
        return max(self.max_errors, default=0.0)


def budgets(problem: Problem, inputs: Inputs, reference: Answer, eager: Answer) -> dict[str, Budget]:
    """Budget of each tensor that both answers, of the same rows, hold; and of lse."""
    scale = abs(problem.softmax_scale)
    largest_score = scale * _largest_norm(inputs.q) * _largest_norm(inputs.k)
    accumulator = torch.promote_types(inputs.q.dtype, torch.float32)
    score_roundings = math.sqrt(problem.head_dim) / 2 * largest_score
    relative = torch.finfo(accumulator).eps * (_EXP_AND_SUMS + score_roundings)
    found = {"out": tensor_budget(reference.out, eager.out, relative)}
    if reference.lse is not None:
        found["lse"] = lse_budget(problem, reference.lse, relative)
    if inputs.dout is not None and reference.dq is not None and eager.dq is not None:
        ds_per_out = scale * _rms(inputs.dout) * math.sqrt(problem.head_dim_v)
        terms = (reference.out, ds_per_out * _rms(inputs.k))
        found["dq"] = tensor_budget(reference.dq, eager.dq, relative, *terms)
    if (
        reference.dk is not None
        and reference.dv is not None
        and eager.dk is not None
        and eager.dv is not None
    ):
        found["dv"] = tensor_budget(reference.dv, eager.dv, relative)
        ds_per_dv = scale * _rms(inputs.v) * math.sqrt(problem.head_dim_v)
        terms = (reference.dv, ds_per_dv * _rms(inputs.q))
        found["dk"] = tensor_budget(reference.dk, eager.dk, relative, *terms)
    return found


def widest(one: dict[str, Budget], other: dict[str, Budget]) -> dict[str, Budget]:
    """The larger of two budgets of the same tensors, figure by figure."""
    return {
        name: Budget(
            tuple(map(max, budget.max_errors, other[name].max_errors)),
            max(budget.mean_error, other[name].mean_error),
        )
        for name, budget in one.items()
    }


def tensor_budget(
    reference: torch.Tensor,
    eager: torch.Tensor,
    relative: float,
    partner: torch.Tensor | None = None,
    terms_per_partner: float = 0.0,
) -> Budget:
    """Budget of out, dq, dk or dv from the fp64 reference and eager's answer in the output's dtype, same shape.

    relative: how well P is known. The terms of a gradient are ``terms_per_partner`` times |partner|, which has
    the same positions in dim 1. Where eager itself overflows it sets no budget; the finite rest does.
    """
    if not reference.numel():
        return Budget((), 0.0)
    batch, length, heads, _ = reference.shape
    magnitude, loss = Tally(length, reference.device), Tally(length, reference.device)
    for chunk in row_major(tuple(reference.shape)):
        magnitude.add(chunk, reference[chunk].abs())
        error = (eager[chunk] - reference[chunk]).abs()
        loss.add(chunk, error.masked_fill_(~error.isfinite(), 0))
    largest, mean = magnitude.stretches(), magnitude.mean(reference)
    terms, mean_terms = largest, mean
    if partner is not None:
        sizes = Tally(length, partner.device)
        for chunk in row_major(tuple(partner.shape)):
            sizes.add(chunk, partner[chunk].abs())
        terms = torch.maximum(largest, terms_per_partner * sizes.stretches())
        mean_terms = max(mean, terms_per_partner * sizes.mean(partner))
    lost = torch.maximum(loss.stretches(), torch.finfo(eager.dtype).eps / 2 * terms)
    maxima = MAX_FACTOR * _luck(batch * min(length, STRETCH) * heads) * lost
    maxima += rounding_atol(reference, largest, eager.dtype) + relative * terms
    mean_error = MEAN_FACTOR * _luck(batch * length * heads) * loss.mean(reference) + relative * mean_terms
    return Budget(tuple(maxima.tolist()), mean_error)


def lse_budget(problem: Problem, reference: torch.Tensor, relative: float) -> Budget:
    """Budget of the lse, computed in fp32 from inputs of any dtype: eager's, of rounded scores, is too wide.

    An error of every P is the same absolute error of lse; lse itself is rounded to fp32.
    """
    eps = torch.finfo(torch.float32).eps
    finite = reference[reference.isfinite()].abs()
    largest, mean = (finite.max().item(), finite.mean().item()) if finite.numel() else (0.0, 0.0)
    shared = max(relative, eps) + (_EXP_16BIT if problem.dtype in ("bf16", "fp16") else 0.0)
    return Budget((shared + eps * largest,), shared + eps * mean)


def rounding_atol(reference: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2 max |(reference + c - c) - reference| in ``dtype`` per stretch, but at least an ulp of ``largest``.

    c = 0.3 min(1, largest), with the largest |reference| of each stretch, fp64; so is the result.
    """
    shift = 0.3 * largest.clamp(max=1.0)
    shift = shift[stretches(reference.shape[1], reference.device), None, None].to(dtype)
    change = Tally(reference.shape[1], reference.device)
    for outer, inner in row_major(tuple(reference.shape)):
        rounded = reference[outer, inner].to(dtype)
        change.add((outer, inner), ((rounded + shift[inner] - shift[inner]) - rounded).abs())
    # frexp has largest = m 2^e with m in [1/2, 1): an ulp there is eps 2^(e - 1).
    ulp = torch.finfo(dtype).eps * torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    return torch.maximum(2 * change.stretches(), torch.where(largest > 0, ulp, 0))


# ---- stretches --------------------------------------------------------------------------------------------


def stretches(length: int, device: torch.device) -> torch.Tensor:
    """The stretch of each of ``length`` positions: 64 of them make one, and the last takes in what is left."""
    return (torch.arange(length, device=device) // STRETCH).clamp(max=max(0, length // STRETCH - 1))


class Tally:
    """Maximum of each position of dim 1, and mean of all, of a non-negative tensor seen chunk by chunk."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.maxima = torch.zeros(length, dtype=torch.float64, device=device)
        self.sum = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, chunk: tuple[slice, slice], values: torch.Tensor) -> None:
        """Takes in the values that stand at ``chunk`` of the first two dimensions."""
        here = self.maxima[chunk[1]]
        torch.maximum(here, values.flatten(2).amax(2).amax(0).to(here.dtype), out=here)
        self.sum += values.sum(dtype=torch.float64)

    def stretches(self) -> torch.Tensor:
        """Maximum of each stretch."""
        stretch_of = stretches(len(self.maxima), self.maxima.device)
        count = max(1, len(self.maxima) // STRETCH)
        return self.maxima.new_zeros(count).scatter_reduce_(0, stretch_of, self.maxima, "amax")

    def mean(self, of: torch.Tensor) -> float:
        return self.sum.item() / of.numel()


def _luck(vectors: int) -> float:
    return 1 + 3 / math.sqrt(vectors)


def _largest_norm(x: torch.Tensor) -> float:
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return float(norms.max()) if norms.numel() else 0.0


def _rms(x: torch.Tensor) -> float:
    if not x.numel():
        return 0.0
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return float(norm) / math.sqrt(x.numel())
