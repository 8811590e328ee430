"""A cell in the making: what has been learned of it so far, and the record that it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field

from attnbench.harness.problem import Problem
from attnbench.harness.run.channel import Message
from attnbench.harness.run.crew import Crew, Failure
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Cell, Energy, Judgement, Memory, Status, Timing

OWN_MASK = "dropout: judged under the mask recovered from its own answers, by an oracle in its own process"


@dataclass
class Draft:
    """``prepared_by`` is the pid of the worker that holds it ready. no_energy: why joules that were asked for are not
    there, where something failed.
    """

    impl: str
    problem: Problem
    failure: Failure | None = None
    prepared_by: int | None = None
    prepare_ms: float | None = None
    first_call_ms: float | None = None
    setup_mib: float | None = None
    judgement: Judgement | None = None
    memory: Memory | None = None
    energy: Energy | None = None
    no_energy: str = ""
    turns: list[Message] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.failure is None

    def cell(self, plan: GroupPlan, crew: Crew, run: str, mode: str) -> Cell:
        """The record of it as it is now. run, mode: as in ``group.Conditions``."""
        failure = self.failure
        timing = _timing(self.turns, mode) if self.turns and not failure else None
        return Cell(
            run=run,
            suite=plan.suite,
            case=plan.case,
            group=plan.group,
            impl=self.impl,
            impl_version=crew.versions.get(self.impl, "unknown"),
            device=crew.device,
            problem=self.problem,
            status=failure.status if failure else Status.OK,
            reasons=[failure.reason] if failure else [],
            evidence=failure.evidence if failure else "",
            judgement=self.judgement,
            prepare_ms=self.prepare_ms,
            first_call_ms=self.first_call_ms,
            timing=timing,
            memory=self.memory,
            energy=self.energy,
            warnings=_warnings(self) if timing else [],
            source=crew.sources.get(self.impl, ""),
            approximate=crew.approximate.get(self.impl, False),
        )


def describe(judgement: Judgement) -> str:
    """The first bad tensor of a failed judgement in one line."""
    name, bad = next((name, t) for name, t in judgement.tensors.items() if not t.ok)
    return (
        f"{name}{list(bad.first_bad or ())} is {_figure(bad.got)}, the oracle says {_figure(bad.want)}; "
        f"max error {_figure(bad.max_error)} (budget {_figure(bad.max_budget)}), "
        f"mean {_figure(bad.mean_error)} (budget {_figure(bad.mean_budget)})"
    )


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _timing(turns: list[Message], mode: str) -> Timing:
    renewed = [turn.get("renewed") for turn in turns]
    return Timing(
        rounds=[turn["ms"] for turn in turns],
        mode=mode,
        host_us=[turn["host_us"] for turn in turns],
        sm_mhz=[turn["clocks"]["sm_mhz"] for turn in turns],
        power_w=[turn["clocks"]["power_w"] for turn in turns],
        temperature_c=[turn["clocks"]["temperature_c"] for turn in turns],
        throttle=[turn["clocks"]["throttle"] for turn in turns],
        warmup_calls=sum(turn["warmup_calls"] for turn in turns),
        unheld=sum(turn["discarded"] for turn in turns),
        checked=sum(turn["judgement"] is not None for turn in turns),
        inputs=min((turn["inputs"] for turn in turns if turn.get("inputs")), default=None),
        renewed=None if None in renewed else all(renewed),
    )


def _warnings(draft: Draft) -> list[str]:
    turns, found = draft.turns, [OWN_MASK] if draft.problem.dropout_p else []
    if unheld := sum(not turn["held"] for turn in turns):
        why = (
            "the stream could not be held (the call synchronises, allocates, or launches more than the driver queues): "
            "host time is in these samples"
        )
        found.append(f"in {unheld} of {len(turns)} rounds {why}")
    if draft.no_energy:
        found.append(f"its energy was not counted: {draft.no_energy}")
    return found
