"""Holds an implementation's answer against the oracle and says where it is first wrong."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from attnbench.harness.oracle.budget import Budget, Tally, budgets, stretches, widest
from attnbench.harness.oracle.chunks import row_major
from attnbench.harness.oracle.inputs import Inputs, torch_dtype
from attnbench.harness.oracle.reference import Kept, eager, reference
from attnbench.harness.problem import Problem
from attnbench.harness.run.record import Judgement, TensorError

ROW_TENSORS = ("out", "dq")
"""Tensors with one vector a query row: of these (and of lse) only the judged rows are compared."""


class WrongAnswer(Exception):
    """An answer of the wrong shape, dtype or device, for which there are no errors to measure; one line."""


@dataclass(frozen=True)
class Oracle:
    """A group's right answer and what may be missed of it.

    problem: the group_key it answers. rows (R,) int64 CPU, of rows_total. dtype: the problem's.
    tensors: out (B, R, H, Dv), lse (B, H, R), and with a backward dq (B, R, H, D), dk, dv (B, Sk, Hk, .);
    fp32 for a 16-bit problem, else fp64.
    """

    problem: str
    seed: int
    dtype: str
    rows: torch.Tensor
    rows_total: int
    tensors: dict[str, torch.Tensor]
    budgets: dict[str, Budget]

    @property
    def complete(self) -> bool:
        return len(self.rows) == self.rows_total

    def with_budgets_of(self, other: Oracle) -> Oracle:
        """The same oracle allowing each tensor the larger of its own budget and ``other``'s.

        For probes of a few rows, whose own eager errors may happen to be small.
        """
        wider = dict(self.budgets)
        for name in wider.keys() & other.budgets.keys():
            own, wide = self.budgets[name], other.budgets[name]
            maxima = tuple(max(error, wide.max_error) for error in own.max_errors)
            wider[name] = Budget(maxima, max(own.mean_error, wide.mean_error))
        return dataclasses.replace(self, budgets=wider)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes to ``path`` whole: the file appears under that name only once it is complete."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["budgets"] = {name: (b.max_errors, b.mean_error) for name, b in self.budgets.items()}
        partial = Path(f"{os.fspath(path)}.{os.getpid()}.partial")
        torch.save(data, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device, mmap: bool = True) -> Oracle:
        """Reads what ``save`` wrote, its tensors on ``device``; on a CPU mmap shares one copy between
        processes."""
        data = torch.load(path, map_location=device, mmap=mmap, weights_only=True)
        data["rows"] = data["rows"].cpu()
        data["budgets"] = {name: Budget(*budget) for name, budget in data["budgets"].items()}
        return cls(**data)


def build(
    problem: Problem,
    inputs: Inputs,
    seed: int,
    rows: torch.Tensor,
    backward: bool,
    *,
    columns: bool = True,
    kept: Kept | None = None,
) -> Oracle:
    """Reference, eager and budgets of one problem on ``rows``; ``columns=False`` leaves out dk and dv (for
    probes). kept: the mask of a problem with dropout.

    Raises as ``reference`` does.
    """
    right = reference(problem, inputs, rows, backward=backward, kept=kept)
    plain = eager(problem, inputs, rows, backward=backward, kept=kept)
    allowed = budgets(problem, inputs, right, plain)
    if backward and problem.dtype in ("bf16", "fp16"):
        other = eager(problem, inputs, rows, backward=True, kept=kept, of_softmax=True)
        allowed = widest(allowed, budgets(problem, inputs, right, other))
    if not columns:
        allowed = {name: budget for name, budget in allowed.items() if name not in ("dk", "dv")}
    store = torch.float32 if problem.dtype in ("bf16", "fp16") else torch.float64
    tensors = {name: getattr(right, name).to(store) for name in allowed}
    return Oracle(problem.group_key, seed, problem.dtype, rows, problem.seqlen_q, tensors, allowed)


def judge(oracle: Oracle, got: dict[str, torch.Tensor]) -> Judgement:
    """Compares any of out, lse, dq, dk, dv, each as the implementation returns it (all rows), on ``got``'s
    device.

    dq, dk and dv must come from ``judging_dout``. Raises WrongAnswer for a wrong shape or dtype.
    """
    for name, tensor in got.items():
        _check_form(oracle, name, tensor)
    errors = {name: _compare(oracle, name, tensor) for name, tensor in got.items()}
    return Judgement(errors, len(oracle.rows), oracle.rows_total)


def _check_form(oracle: Oracle, name: str, got: torch.Tensor) -> None:
    if name not in oracle.tensors:
        raise ValueError(f"the oracle of {oracle.problem} holds {', '.join(oracle.tensors)}, not {name}")
    shape = list(oracle.tensors[name].shape)
    if name in (*ROW_TENSORS, "lse"):
        shape[2 if name == "lse" else 1] = oracle.rows_total
    if list(got.shape) != shape:
        raise WrongAnswer(f"{name} has shape {tuple(got.shape)}, not {tuple(shape)}")
    allowed = {torch_dtype(oracle.dtype)}
    if name == "lse":
        allowed = {torch.float32} | (allowed & {torch.float64})
    if got.dtype not in allowed:
        wanted = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in allowed))
        raise WrongAnswer(f"{name} has dtype {str(got.dtype).removeprefix('torch.')}, not {wanted}")


@torch.no_grad()
def _compare(oracle: Oracle, name: str, got: torch.Tensor) -> TensorError:
    want, budget = oracle.tensors[name], oracle.budgets[name]
    row_dim = 1 if name in ROW_TENSORS else 2 if name == "lse" else None
    rows = oracle.rows.to(got.device) if row_dim is not None and not oracle.complete else None
    if not want.numel():
        return TensorError(0.0, 0.0, budget.max_error, budget.mean_error, ok=True)
    chunks = list(row_major(tuple(want.shape)))
    seen = Tally(want.shape[1], got.device)
    for chunk in chunks:
        seen.add(chunk, _error(_piece(got, chunk, rows, row_dim), want, chunk))
    mean_error = seen.mean(want)
    limits = torch.tensor(budget.max_errors, dtype=torch.float64, device=got.device)
    errors = seen.stretches() if len(limits) > 1 else seen.maxima.amax(0, keepdim=True)
    # The stretch that is nearest to its budget, or furthest over it, speaks for the tensor.
    worst = int(torch.where(errors > 0, errors / limits, 0).argmax())
    max_error, max_budget = errors[worst].item(), limits[worst].item()
    verdict = TensorError(
        max_error if math.isfinite(max_error) else None,
        mean_error if math.isfinite(mean_error) else None,
        max_budget,
        budget.mean_error,
        ok=True,
    )
    over = max_error > max_budget
    if not over and mean_error <= budget.mean_error:
        return verdict
    # Per position of dim 1 what counts as bad there: over its own budget, or else the largest error of all.
    local = len(limits) > 1
    limit = limits[stretches(want.shape[1], got.device)] if local else limits.expand(want.shape[1])
    if not over:
        limit = torch.full_like(limit, errors.max().item()).nextafter(torch.zeros_like(limit))
    for chunk in chunks:
        piece = _piece(got, chunk, rows, row_dim)
        bad = _error(piece, want, chunk) > limit[chunk[1]].view(-1, *[1] * (want.dim() - 2))
        if bad.any():
            break
    place = [int(index) for index in torch.unravel_index(bad.int().argmax(), bad.shape)]
    found = {"got": piece[tuple(place)].item(), "want": want[chunk][tuple(place)].item()}
    place[0] += chunk[0].start
    place[1] += chunk[1].start
    if row_dim is not None:
        place[row_dim] = int(oracle.rows[place[row_dim]])
    mean_want = want.abs().nan_to_num(posinf=0).mean(dtype=torch.float64).item()
    return dataclasses.replace(verdict, ok=False, first_bad=tuple(place), **found, mean_want=mean_want)


def _piece(
    got: torch.Tensor, chunk: tuple[slice, slice], rows: torch.Tensor | None, row_dim: int | None
) -> torch.Tensor:
    """The chunk of ``want``'s first two dimensions as it stands in the full tensor ``got``."""
    if rows is None:
        return got[chunk]
    if row_dim == 1:
        return got[chunk[0]].index_select(1, rows[chunk[1]])
    return got[chunk].index_select(2, rows)


def _error(got: torch.Tensor, want: torch.Tensor, chunk: tuple[slice, slice]) -> torch.Tensor:
    """|got - want| in want's dtype; 0 where both are the same infinity, inf where got is not finite
    otherwise."""
    right = want[chunk]
    if right.device != got.device:
        right = right.to(got.device)
    error = (got - right).abs_()
    error.masked_fill_(got == right, 0)
    return error.nan_to_num_(nan=torch.inf, posinf=torch.inf)
