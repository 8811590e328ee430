"""A case posed to one implementation on one device: what a check works with. Imports torch; lives in the worker."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NoReturn

import torch

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.checks import CHECKS
from attnbench.harness.contract import Device, Implementation, Prepared
from attnbench.harness.oracle.dropout import GeneratorState, recover
from attnbench.harness.oracle.inputs import Inputs, judging_dout, make_inputs
from attnbench.harness.oracle.judge import Oracle, WrongAnswer, build, judge
from attnbench.harness.oracle.reference import Kept
from attnbench.harness.problem import Problem
from attnbench.harness.run.draft import describe
from attnbench.harness.run.memory_state import poison
from attnbench.harness.run.record import to_plain

Tensors = dict[str, torch.Tensor]


class Wrong(Exception):
    """The check does not hold: one line that names the place and the figures, and the figures as data."""

    def __init__(self, reason: str, **facts: Any) -> None:
        super().__init__(reason)
        self.facts = facts


class Declined(Exception):
    """The implementation says that it does not offer what the check asks for; the reason is its own."""


# What a slip inside a library raises; a refusal that says what is not supported is none of these.
_UNCLEAR = (AttributeError, NameError, LookupError, UnboundLocalError)


def is_clear(error: Exception) -> bool:
    """Whether an error that an implementation raised is a refusal that a user can act on."""
    return not isinstance(error, _UNCLEAR) and bool(str(error).strip())


def said_by(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '(no message)').splitlines()[0]}"


class Posed:
    """One case before one implementation. Every method that calls the implementation leaves NaN in free memory first.

    oracle: the right answer to ``inputs()``, for the checks that declare one.
    """

    def __init__(
        self, case: Case, implementation: Implementation, where: Device, oracle: Oracle | None = None
    ) -> None:
        self.case = case
        self.problem: Problem = case.problem
        self.implementation = implementation
        self.where = where
        self.device = torch.device(str(where))
        self._oracle = oracle

    # ---- what is posed ------------------------------------------------------------------------------------

    def option(self, name: str) -> Any:
        """What the case tells the check, or the check's default; KeyError for an option that it does not declare."""
        return {**CHECKS[self.case.check].options, **self.case.options}[name]

    def inputs(self, seed: int = 0) -> Inputs:
        """New tensors with the same values at every call; dout where the direction has a backward.

        seed 0: those that the oracle answers; any other number other values.
        """
        drawn = make_inputs(
            self.problem,
            self.case.input_seed + seed,
            self.device,
            dout=self.problem.direction != "fwd",
            kind=self.case.inputs,
        )
        return _moved(drawn, int(self.case.options.get("offset", 0)))

    @property
    def can_judge(self) -> bool:
        """Whether the right answer is at hand, or follows from the dropout mask that the implementation draws."""
        return self._oracle is not None or self.problem.dropout_p > 0

    @property
    def oracle(self) -> Oracle:
        """The right answer; LookupError where the check does not declare that it needs one."""
        if self._oracle is None:
            raise LookupError(f"check {self.case.check} declares no oracle")
        return self._oracle

    # ---- what it says -------------------------------------------------------------------------------------

    @cached_property
    def prepared(self) -> Prepared:
        """Set up once for the case; ``prepare`` sets up anew."""
        return self.prepare()

    def prepare(self) -> Prepared:
        return self.implementation.prepare(self.problem, self.where)

    def forward(self, inputs: Inputs) -> Tensors:
        """``out`` of a call without gradients."""
        poison(self.problem, self.device)
        with torch.no_grad():
            return {"out": self._tensor(self.prepared.attend(inputs.q, inputs.k, inputs.v))}

    def forward_with_lse(self, inputs: Inputs) -> Tensors:
        """``out`` and ``lse`` of a call without gradients; nothing where it returns no lse."""
        if self.prepared.attend_with_lse is None:
            return {}
        poison(self.problem, self.device)
        with torch.no_grad():
            out, lse = self.prepared.attend_with_lse(inputs.q, inputs.k, inputs.v)
        return {"out": self._tensor(out), "lse": self._tensor(lse)}

    def backward(self, inputs: Inputs) -> Tensors:
        """``out``, ``dq``, ``dk`` and ``dv`` of a training step."""
        leaves = self.leaves(inputs)
        poison(self.problem, self.device)
        out = self._tensor(self.prepared.attend(*leaves))
        if out.shape != self.problem.out_shape:  # autograd would raise, and say less
            raise Wrong(f"out has shape {tuple(out.shape)}, not {self.problem.out_shape}")
        dout = self.dout(inputs)
        poison(self.problem, self.device)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
        return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}

    def answer(self, inputs: Inputs) -> Tensors:
        """All that the direction asks for."""
        return self.forward(inputs) if self.problem.direction == "fwd" else self.backward(inputs)

    @staticmethod
    def leaves(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as leaves of a graph, in the same memory."""
        q, k, v = (tensor.detach().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v))
        return q, k, v

    def dout(self, inputs: Inputs) -> torch.Tensor:
        """dout as the oracle judges it: zero outside the rows that it sampled."""
        assert inputs.dout is not None
        return inputs.dout if self._oracle is None else judging_dout(inputs, self._oracle.rows)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @staticmethod
    def _tensor(value: object) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise Wrong(f"it returned a {type(value).__name__}, not a Tensor")
        return value

    # ---- dropout ------------------------------------------------------------------------------------------

    def state(self, seed: int = 0) -> GeneratorState:
        """A state of torch's generators to make a call from; another for another number."""
        return GeneratorState.at(self.case.input_seed + seed, self.device)

    def kept(self, state: GeneratorState) -> Kept:
        """The dropout mask of a call from ``state``, recovered from what it answers to an identity as V."""
        dropout = self.implementation.dropout_effective(self.problem.dropout_p)
        try:
            return recover(self.problem, self.prepared.attend, state, dropout)
        except WrongAnswer as wrong:
            raise Wrong(str(wrong)) from None

    def oracle_under(self, kept: Kept) -> Oracle:
        """The right answer to ``inputs()`` under a dropout mask."""
        inputs, backward = self.inputs(), self.problem.direction != "fwd"
        rows = torch.arange(self.problem.seqlen_q)
        return build(self.problem, inputs, self.case.input_seed, rows, backward, kept=kept)

    # ---- what is made of it -------------------------------------------------------------------------------

    def hold(self, got: Tensors, what: str = "", oracle: Oracle | None = None) -> None:
        """Holds tensors of ``inputs()`` against the oracle; Wrong with the first bad place of the first bad one.

        what: which call they came from, said before the place. oracle: another than the case's own.
        """
        try:
            judgement = judge(oracle or self.oracle, got)
        except WrongAnswer as wrong:
            raise Wrong(f"{what}{wrong}") from None
        if not judgement.ok:
            bad = {name: to_plain(error) for name, error in judgement.tensors.items() if not error.ok}
            raise Wrong(what + describe(judgement), tensors=bad)

    def hold_answer(self) -> None:
        """Asks for all that the direction does and holds it against the oracle, of its own mask where it drops."""
        state = self.state()
        oracle = self.oracle_under(self.kept(state)) if self.problem.dropout_p else None
        state.restore()
        self.hold(self.answer(self.inputs()), oracle=oracle)

    def fail(self, reason: str, **facts: Any) -> NoReturn:
        raise Wrong(reason, **facts)


def _moved(inputs: Inputs, offset: int) -> Inputs:
    """The same values and strides, every tensor ``offset`` elements behind the start of an allocation."""
    if not offset:
        return inputs

    def move(tensor: torch.Tensor) -> torch.Tensor:
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if extent < 1 or 0 in tensor.shape:
            return tensor
        memory = tensor.new_full((extent + offset,), torch.nan)
        memory[offset:] = tensor.as_strided((extent,), (1,), tensor.storage_offset())
        return memory.as_strided(tensor.shape, tensor.stride(), offset)

    dout = None if inputs.dout is None else move(inputs.dout)
    return Inputs(move(inputs.q), move(inputs.k), move(inputs.v), dout)
