"""Who is chosen, by replies of a worker that a stand-in gives."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from attnbench.harness.problem import Problem
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.process import WorkerLost
from attnbench.harness.run.record import Status
from attnbench.harness.tune import search

PROBLEM = Problem(1, 2, 64, 16, dtype="fp32")
PLAN = GroupPlan("suite", "case", "why", PROBLEM.group_key, (PROBLEM,), ("planted",), "normal", 7)


class StandIn:
    """A worker: candidates with the ms that their calls take, or what becomes of asking for them."""

    ms: tuple[float | str, ...] = ()
    hello_says: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed
    spoiled_after: int = 10**9
    noise = random.Random(1)

    def __init__(self, role: str, *_: Any) -> None:
        self.role = role
        self.asked: list[tuple[str, int]] = []
        made.append(self)

    def hello(self) -> dict[str, Any]:
        if self.hello_says.get("lost"):
            raise WorkerLost(Status.CRASHED, "its process exited with code 1", "")
        return self.hello_says

    def close(self) -> None:
        self.asked.append(("close", -1))

    def ask(self, operation: str, index: int = -1, **_: Any) -> dict[str, Any]:
        self.asked.append((operation, index))
        if operation == "oracle":
            return {"ok": True, "judged": "judged.pt", "probes": ["probe.pt"]}
        if operation == "compile_one" and self.ms[index] == "dies":
            raise WorkerLost(Status.CRASHED, "its process died of SIGSEGV", "")
        if operation == "compile_one":
            return {"ok": True}
        if operation == "candidates":
            found = [{"label": f"c{i}", "key": {"n": 64}, "choice": {"c": i}} for i in range(len(self.ms))]
            return {"ok": True, "unsupported": [], "candidates": found}
        is_right = {"tensors": {"out": {"ok": True}}}
        match self.ms[index]:
            case "dies":
                raise WorkerLost(Status.CRASHED, "its process died of SIGSEGV", "")
            case "raises":
                return {"ok": False, "status": "ERROR", "reason": "OutOfResources: shared memory"}
            case "wrong":
                return {"ok": True, "judgement": {"tensors": {"out": {"ok": True}, "dq": {"ok": False}}}}
            case "wrong later" if operation == "turn_one" and len(self.asked) > self.spoiled_after:
                judgement = {"tensors": {"out": {"ok": False}}}
                return {"ok": True, "ms": [0.1], "held": True, "judgement": judgement}
            case ms:
                took = (ms if isinstance(ms, float) else 0.1) * self.noise.uniform(1, 1.01)
                return {"ok": True, "ms": [took] * 3, "held": ms != "unheld", "judgement": is_right}


made: list[StandIn] = []


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def run(
        *ms: float | str, most: int = 32, compilers: int = 0, rounds: int = 6, **changes: Any
    ) -> search.Tuned:
        made.clear()
        worker = type("Worker", (StandIn,), {"ms": ms, "noise": random.Random(1)} | changes)
        monkeypatch.setattr(search, "Asked", worker)
        (one,) = search.tune(
            "planted", [PLAN], "cpu", tmp_path, rounds=rounds, most=most, limit_s=1, compilers=compilers
        )
        return one

    return run


def test_the_fastest_that_is_right_takes_the_place_of_the_rules(tuned: Any) -> None:
    one = tuned(1.0, 0.8, "wrong", 0.5, "raises", "dies", 0.9)
    assert one.best.label == "c3"
    assert one.faster
    assert one.gain.value == pytest.approx(2, rel=0.02)
    assert [trial.why for trial in one.trials] == [
        "", "", "INCORRECT: dq", "", "ERROR: OutOfResources: shared memory",
        "CRASHED: its process died of SIGSEGV", "",
    ]  # fmt: skip
    assert one.to_json()["choice"] == {"c": 3}
    assert one.to_json()["key"] == {"n": 64}


def test_helpers_compile_each_candidate_once_and_decide_nothing(tuned: Any) -> None:
    one = tuned(1.0, "dies", 0.8, "raises", compilers=3)
    compiled = [index for worker in made for operation, index in worker.asked if operation == "compile_one"]
    assert sorted(compiled) == [0, 1, 2, 3]
    assert not any(operation == "compile_one" for operation, _ in made[0].asked), "by the one that times"
    assert one.best.label == "c2"
    assert one.trials[1].why == "CRASHED: its process died of SIGSEGV"
    assert {worker.asked[-1] for worker in made} == {("close", -1)}


def test_what_is_out_is_not_timed(tuned: Any) -> None:
    tuned(1.0, "wrong", "raises", 0.9)
    turns = {index for operation, index in made[0].asked if operation == "turn_one"}
    assert turns == {0, 3}


@pytest.mark.parametrize("ms", [(0.5, 0.8, 0.9), (1.0, 1.0, 1.0), (1.0,)])
def test_the_rules_keep_their_place_where_nothing_is_faster_beyond_doubt(
    tuned: Any, ms: tuple[float]
) -> None:
    assert not tuned(*ms).faster


def test_only_fresh_rounds_decide(tuned: Any) -> None:
    one = tuned(1.0, *(0.9 + i / 20 for i in range(8)))
    assert [len(trial.screened) for trial in one.trials] == [search.SCREENING_ROUNDS] * 9
    assert [len(trial.compared) for trial in one.trials] == [6] * (1 + search.FINALISTS) + [0] * 4
    assert [len(trial.rounds) for trial in one.trials] == [6, 6] + [0] * 7


def test_equal_candidates_enter_the_table_no_more_often_than_an_interval_misses(tuned: Any) -> None:
    """By chance the fastest of many is chosen; rounds that chose it would say it is faster in 1 of 10 tunings."""
    tunings = 400
    kept = sum(tuned(*[1.0] * 9, rounds=20, noise=random.Random(seed)).faster for seed in range(tunings))
    assert kept <= stats.binom.ppf(0.999, tunings, 0.025)


def test_where_the_fastest_fails_as_it_is_measured_anew_the_next_is(tuned: Any) -> None:
    one = tuned(1.0, "wrong later", 0.9, spoiled_after=32)  # screened and compared: 2 + 3 + 9 + 18 requests
    assert len(one.trials[1].compared) == 6
    assert one.trials[1].why == "INCORRECT: out"
    assert (one.best.label, one.faster) == ("c2", True)
    assert [len(trial.rounds) for trial in (one.trials[0], one.best)] == [6, 6]


def test_every_round_has_an_order_of_its_own(tuned: Any) -> None:
    tuned(1.0, 0.9, 0.8, 0.7)
    turns = [index for operation, index in made[0].asked if operation == "turn_one"]
    of_all, of_two = turns[: 4 * (search.SCREENING_ROUNDS + 6)], turns[4 * (search.SCREENING_ROUNDS + 6) :]
    orders = {tuple(of_all[i : i + 4]) for i in range(0, len(of_all), 4)}
    assert len(orders) > 3
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert {tuple(of_two[i : i + 2]) for i in range(0, len(of_two), 2)} == {(0, 3), (3, 0)}


def test_a_timed_call_that_answers_wrongly_puts_its_candidate_out(tuned: Any) -> None:
    one = tuned(1.0, "wrong later", 0.9, spoiled_after=12)
    assert one.trials[1].why == "INCORRECT: out"
    assert one.best.label == "c2"


UNHELD = (
    "UNHELD: the stream could not be held (the call synchronises or allocates): host time is in its samples"
)


def test_a_candidate_with_host_time_in_its_samples_is_out(tuned: Any) -> None:
    one = tuned(1.0, "unheld", 0.9)
    assert one.trials[1].why == UNHELD
    assert (one.trials[1].screened, one.best.label) == ([], "c2")
    of_rules = tuned("unheld", 0.05)
    assert (of_rules.best, of_rules.why) == (None, f"c0, its own choice: {UNHELD}")


def test_nothing_is_chosen_where_the_rules_own_choice_fails(tuned: Any) -> None:
    one = tuned("raises", 0.5)
    assert one.best is None
    assert one.why == "c0, its own choice: ERROR: OutOfResources: shared memory"


def test_no_more_candidates_than_asked_for(tuned: Any) -> None:
    assert len(tuned(1.0, 0.9, 0.8, 0.1, most=3).trials) == 3


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"hello_says": {"unavailable": "runs on cuda"}}, "runs on cuda"), ({}, "there is nothing to choose")],
)
def test_why_nothing_was_tuned(tuned: Any, changes: dict[str, Any], why: str) -> None:
    one = tuned(**changes)
    assert (one.why, one.trials, one.faster) == (why, (), False)


def test_workers_are_sent_home_whatever_happens(tuned: Any) -> None:
    with pytest.raises(RunError, match="no worker of planted comes up") as error:
        tuned(1.0, hello_says={"lost": True})
    assert error.value.exit_code == Exit.MACHINE
    assert {worker.asked[-1][0] for worker in made} == {"close"}
