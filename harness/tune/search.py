"""Which of an implementation's own choices is fastest on this device: judged right first, then timed in rounds.

Every candidate is judged against the oracle as ``bench run`` judges. Those that are right take turns of samples in
rounds of random order, in one worker process, on inputs that rotate. A few rounds choose the finalists, fresh ones the
best of these, and fresh ones again, of the best and of what the implementation chooses unasked, decide: what was chosen
for being fast looks faster than it is in the rounds that chose it. A candidate takes the unasked choice's place only
where it is faster beyond the interval of their ratio within the deciding rounds. One for which the stream could not be
held, so that the host's time is in its samples, is out: its launches would be compared, not its kernels.
"""

from __future__ import annotations

import contextlib
import queue
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnbench.harness.conform.candidate import Candidate as Asked
from attnbench.harness.problem import Problem
from attnbench.harness.report.stats import Estimate, ratio, round_medians
from attnbench.harness.run.channel import Message
from attnbench.harness.run.crew import shuffled
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.process import REFEREE, WorkerLost
from attnbench.harness.run.record import to_plain
from attnbench.harness.run.waiting import wait_for_all

SERVES = "attnbench.harness.tune.tuner:Tuner"
SCREENING_ROUNDS = 3
FINALISTS = 4
UNHELD = (
    "UNHELD: the stream could not be held (the call synchronises or allocates): host time is in its samples"
)

Tell = Callable[[str], None]


@dataclass
class Trial:
    """One candidate of one problem. why: it is out, and for what reason. Times in ms, a list a round: screened, of the
    rounds that chose the finalists; compared, of those that chose the best of them; rounds, of those that decide.
    """

    index: int
    label: str
    key: Mapping[str, Any]
    choice: Mapping[str, Any]
    why: str = ""
    screened: list[list[float]] = field(default_factory=list)
    compared: list[list[float]] = field(default_factory=list)
    rounds: list[list[float]] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """Median of the deciding rounds' medians; of those that compared the finalists, where there was nothing to
        decide."""
        return _median(self.rounds or self.compared)


@dataclass(frozen=True)
class Tuned:
    """What came of one problem. trials: the unasked choice first. best: a finalist. gain: how many times as fast as the
    unasked choice; without a value where that is itself the best. why: nothing could be tuned."""

    impl: str
    problem: Problem
    trials: Sequence[Trial] = ()
    best: Trial | None = None
    gain: Estimate = Estimate(None)
    why: str = ""

    @property
    def faster(self) -> bool:
        """Whether the best is faster than the unasked choice beyond doubt."""
        return self.gain.low is not None and self.gain.low > 1

    def to_json(self) -> dict[str, Any]:
        """An entry of the table: ``key`` and ``choice`` are the implementation's own; the rest says why."""
        assert self.best is not None
        return {
            "impl": self.impl, "problem": self.problem.key, "key": dict(self.best.key),
            "choice": dict(self.best.choice), "gain": list(self.gain),
            "trials": [
                {
                    "label": t.label, "why": t.why, "screened": to_plain(t.screened),
                    "compared": to_plain(t.compared), "rounds": to_plain(t.rounds),
                }
                for t in self.trials
            ],
        }  # fmt: skip


def _median(rounds: Sequence[Sequence[float]]) -> float:
    return statistics.median(map(statistics.median, rounds))


def tune(
    impl: str, plans: Sequence[GroupPlan], device: str, folder: Path, *, rounds: int, most: int, limit_s: float,
    compilers: int = 0, tell: Tell = lambda _: None,
) -> Iterator[Tuned]:  # fmt: skip
    """Each problem of the plans, as it is done. folder: for oracles and logs. rounds: that choose the best of the
    finalists, and as many fresh ones that decide. most: candidates a problem, at most.

    limit_s: of one request, a compilation with its first call included. compilers: processes that compile candidates
    side by side before the one that judges and times them meets them. RunError where no worker comes up.
    """
    solver = Asked(impl, SERVES, device, folder, limit_s)
    helpers = [Asked(impl, SERVES, device, folder, limit_s) for _ in range(compilers)]
    referee = Asked(REFEREE, "", device, folder, limit_s)
    try:
        try:
            absent = solver.hello().get("unavailable")
        except WorkerLost as lost:
            raise RunError(f"no worker of {impl} comes up: {lost}", Exit.MACHINE) from None
        for plan in plans:
            oracle: Message | None = None
            for problem in plan.problems:
                search = _Search(solver, plan, problem, tell)
                try:
                    if absent:
                        raise _Failed(absent)
                    trials = search.candidates(most)
                    search.compile(trials, helpers)
                    oracle = oracle or _answered(referee, "oracle", plan=plan.to_json(), folder=str(folder))
                    yield _decide(impl, search, trials, oracle, rounds)
                except _Failed as failed:
                    yield Tuned(impl, problem, why=str(failed))
    finally:
        for asked in (solver, referee, *helpers):
            asked.close()


def _decide(impl: str, search: _Search, trials: list[Trial], oracle: Message, rounds: int) -> Tuned:
    unasked = trials[0]
    for trial in trials:
        search.judge(trial, oracle["judged"])
    for trial, found in search.rounds(trials, oracle["probes"], SCREENING_ROUNDS):
        trial.screened.append(found)
    others = sorted((t for t in trials[1:] if not t.why), key=lambda trial: _median(trial.screened))
    finalists = [unasked, *others[:FINALISTS]]
    for trial, found in search.rounds(finalists, oracle["probes"], rounds):
        trial.compared.append(found)
    while not unasked.why:
        unasked.rounds.clear()  # those beside one that failed in them
        best = min((trial for trial in finalists if not trial.why), key=lambda trial: _median(trial.compared))
        if best is unasked:
            return Tuned(impl, search.problem, trials, best)
        for trial, found in search.rounds([unasked, best], oracle["probes"], rounds):
            trial.rounds.append(found)
        if not (unasked.why or best.why):
            gain = ratio(round_medians(unasked.rounds), round_medians(best.rounds))
            return Tuned(impl, search.problem, trials, best, gain)
    return Tuned(impl, search.problem, trials, why=f"{unasked.label}, its own choice: {unasked.why}")


class _Search:
    """The requests about one problem."""

    def __init__(self, solver: Asked, plan: GroupPlan, problem: Problem, tell: Tell) -> None:
        self.problem = problem
        self._solver = solver
        self._plan = plan.to_json()
        self._tell = tell
        self._rounds = 0

    def candidates(self, most: int) -> list[Trial]:
        """At most ``most``, the unasked choice first; _Failed where there are none."""
        reply = _answered(self._solver, "candidates", plan=self._plan, problem=self.problem.key)
        if reply["unsupported"]:
            raise _Failed(f"UNSUPPORTED: {'; '.join(reply['unsupported'])}")
        if not reply["candidates"]:
            raise _Failed("there is nothing to choose")
        return [Trial(index, **one) for index, one in enumerate(reply["candidates"][:most])]

    def compile(self, trials: Sequence[Trial], helpers: Sequence[Asked]) -> None:
        """Has the helpers make a call of each; what fails here fails again where it is judged, and is told there."""
        if not helpers:
            return
        waiting: queue.SimpleQueue[Trial] = queue.SimpleQueue()
        for trial in trials:
            waiting.put(trial)

        def work(helper: Asked) -> None:
            with contextlib.suppress(queue.Empty):
                while trial := waiting.get_nowait():
                    with contextlib.suppress(_Failed):
                        _answered(
                            helper,
                            "compile_one",
                            plan=self._plan,
                            problem=self.problem.key,
                            index=trial.index,
                        )

        self._tell(f"{self.problem.key}: compiling {len(trials)} candidates")
        with ThreadPoolExecutor(len(helpers)) as pool:
            try:
                wait_for_all([pool.submit(work, helper) for helper in helpers])
            except BaseException:
                for helper in helpers:
                    helper.kill()
                raise

    def judge(self, trial: Trial, oracle: str) -> None:
        reply = self._ask(trial, "judge_one", oracle=oracle)
        if reply:
            self._take_judgement(trial, reply["judgement"])
        self._tell(f"{self.problem.key} {trial.label}: {trial.why or 'right'}")

    def rounds(
        self, trials: Sequence[Trial], probes: list[str], count: int
    ) -> Iterator[tuple[Trial, list[float]]]:
        """(trial, ms) of each turn in rounds of random order; a trial that fails in one is out."""
        by_name = {str(trial.index): trial for trial in trials}
        for _ in range(count):
            self._rounds += 1
            for name in shuffled(list(by_name), self._plan["seed"] + self._rounds):
                trial = by_name[name]
                reply = None if trial.why else self._ask(trial, "turn_one", probes=probes)
                if reply and reply["judgement"]:
                    self._take_judgement(trial, reply["judgement"])
                if reply and not reply["held"]:
                    trial.why = trial.why or UNHELD
                if reply and not trial.why:
                    yield trial, reply["ms"]

    def _ask(self, trial: Trial, operation: str, **arguments: Any) -> Message | None:
        try:
            return _answered(
                self._solver,
                operation,
                plan=self._plan,
                problem=self.problem.key,
                index=trial.index,
                **arguments,
            )
        except _Failed as failed:
            trial.why = str(failed)
            return None

    @staticmethod
    def _take_judgement(trial: Trial, judgement: dict[str, Any]) -> None:
        wrong = [name for name, error in judgement["tensors"].items() if not error["ok"]]
        if wrong:
            trial.why = f"INCORRECT: {', '.join(wrong)}"


class _Failed(Exception):
    """A request without a good answer; one line."""


def _answered(asked: Asked, operation: str, **arguments: Any) -> Message:
    try:
        reply = asked.ask(operation, **arguments)
    except WorkerLost as lost:
        raise _Failed(f"{lost.status}: {lost}") from None
    if not reply["ok"]:
        raise _Failed(f"{reply['status']}: {reply['reason']}")
    return reply
