"""Puts one case to one implementation in this process, and says what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.checks import load
from attnbench.harness.conform.posed import Declined, Posed, Wrong, is_clear, said_by
from attnbench.harness.conform.verdict import Verdict
from attnbench.harness.contract import Device, Implementation
from attnbench.harness.oracle.judge import Oracle
from attnbench.harness.run.worker import failure


@dataclass(frozen=True)
class Outcome:
    """The part of a Finding that the worker knows."""

    verdict: Verdict
    reason: str = ""
    evidence: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def examine(implementation: Implementation, case: Case, where: Device, oracle: Oracle | None) -> Outcome:
    """PASS, FAIL or REFUSED. What the implementation raises on a problem that it declares supported goes through.

    oracle: the right answer to the case, needed where the check declares it.
    """
    posed = Posed(case, implementation, where, oracle)
    outcome = _outcome(posed)
    # A fault of the device that comes late, or that a check took for a refusal, is this case's and not the next one's.
    posed.synchronize()
    return outcome


def _outcome(posed: Posed) -> Outcome:
    reasons = posed.implementation.unsupported_reasons(posed.problem, posed.where)
    try:
        if reasons:
            return _refusal(posed, "; ".join(reasons))
        load(posed.case.check)(posed)
    except Wrong as wrong:
        return Outcome(Verdict.FAIL, str(wrong), facts=wrong.facts)
    except Declined as declined:
        return Outcome(Verdict.REFUSED, str(declined))
    return Outcome(Verdict.PASS)


def examine_here(implementation: Implementation, case: Case, where: Device, oracle: Oracle | None) -> Outcome:
    """``examine``, and what it raises as OOM or ERROR: for callers that have no process to lose."""
    try:
        return examine(implementation, case, where, oracle)
    except Exception as error:  # noqa: BLE001 - an implementation may raise anything
        told = failure(error)
        return Outcome(Verdict(told["status"]), told["reason"], told["evidence"])


def _refusal(posed: Posed, declared: str) -> Outcome:
    """Asks for what is declared unsupported all the same: it may raise, with a clear word, or be right, never wrong."""
    if not posed.can_judge:
        return Outcome(Verdict.REFUSED, declared)
    try:
        posed.hold_answer()
        posed.synchronize()
    except Wrong as wrong:
        raise Wrong(f"declares that it cannot ({declared}), yet answers: {wrong}", **wrong.facts) from None
    except Exception as error:
        posed.synchronize()  # a lost device is no refusal, and shows here
        if not is_clear(error):
            raise Wrong(f"refuses ({declared}) with an unclear error: {said_by(error)}") from error
        return Outcome(Verdict.REFUSED, declared, evidence=said_by(error))
    return Outcome(Verdict.REFUSED, declared, evidence="asked all the same, it answered rightly")
