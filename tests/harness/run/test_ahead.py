"""Before the first group: who prepares what beside the slow compilers, and what of it the groups find."""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.problem import Problem
from attnbench.harness.run import ahead, process
from attnbench.harness.run.ahead import Ahead, declared_unsupported, prepare_ahead
from attnbench.harness.run.crew import Crew
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.process import REFEREE


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    monkeypatch.setattr(sys, "executable", str(Path(__file__).parent / "stand_in_worker.py"))
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    made = Crew("cpu", tmp_path, 30.0)
    made.start_referee()
    yield made
    made.kill()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, str]]:
    """(pid, operation, problem or group) of every request."""
    seen: list[tuple[int, str, str]] = []
    ask, lock = process.Worker.ask, threading.Lock()

    def noting(worker: process.Worker, operation: str, **arguments: Any) -> None:
        with lock:
            seen.append((worker.pid, operation, arguments.get("problem", "")))
        ask(worker, operation, **arguments)

    monkeypatch.setattr(process.Worker, "ask", noting)
    return seen


def plans(impls: Sequence[str], lengths: Sequence[int] = (8, 16, 32)) -> list[GroupPlan]:
    problems = [Problem(batch=1, heads=1, seqlen_q=length, head_dim=8) for length in lengths]
    return [GroupPlan("s", "c", "w", p.group_key, (p,), tuple(impls), "normal", 3) for p in problems]


def look_ahead(crew: Crew, posed: list[GroupPlan], **options: Any) -> Ahead:
    crew.start(list(posed[0].impls))
    return prepare_ahead(posed, crew, 30.0, **options)


def test_each_that_is_there_declares_what_it_refuses(crew: Crew) -> None:
    crew.start(["declines", "a", "leaves_in_declare", "absent"])
    found = declared_unsupported(plans(["leaves_in_declare", "declines", "a", "absent"]), crew)
    assert found == {("declines", "planted"): ["planted"]}


def test_nothing_is_done_where_no_compiler_is_slow(crew: Crew) -> None:
    assert look_ahead(crew, plans(["a"])) == Ahead()
    assert look_ahead(crew, plans(["compiles"], lengths=[8])) == Ahead()


def test_a_slow_compiler_s_processes_share_its_problems(
    crew: Crew, asked: list[tuple[int, str, str]]
) -> None:
    posed = plans(["compiles"], range(8, 88, 8))
    found = look_ahead(crew, posed)
    assert set(found.prepared) == {("compiles", plan.problems[0].key) for plan in posed}
    prepared = [(pid, key) for pid, operation, key in asked if operation == "prepare"]
    keys, own = Counter(plan.problems[0].key for plan in posed), crew.pid("compiles")
    assert Counter(key for pid, key in prepared if pid == own) == keys
    assert Counter(key for pid, key in prepared if pid != own) <= keys
    assert len({pid for pid, operation, _ in asked if operation == "hello"}) == 2  # its own and a hired one
    assert found.first_calls == {}


def test_what_others_compiled_is_prepared_before_what_nobody_took_and_to_the_last() -> None:
    posed = plans(["a"], range(8, 48, 8))
    shared = ahead._Shared(ahead._problems("a", posed))
    quick, failed, slow = (shared.take() for _ in range(3))
    own = shared.compiled_or_left()
    assert next(own)[0] == posed[3]  # nobody's yet
    assert quick
    assert failed
    assert slow
    shared.done(quick, compiled=True)
    shared.done(failed, compiled=False)
    assert next(own)[0] == posed[0]
    assert next(own)[0] == posed[4]
    later = threading.Timer(0.05, partial(shared.done, slow, compiled=True))
    later.start()
    assert next(own)[0] == posed[2]
    later.join()
    assert next(own, None) is None
    assert shared.take() is None


def test_the_others_prepare_and_the_referee_solves_for_as_long_as_that_lasts(
    crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posed = plans(["compiles", "a"])
    beside = threading.Event()
    compile_, solve = ahead._compile, ahead._solve

    def solving(*arguments: Any) -> None:
        solve(*arguments)
        beside.set()

    def compiling(*arguments: Any) -> None:
        beside.wait(30)
        compile_(*arguments)

    monkeypatch.setattr(ahead, "_compile", compiling)
    monkeypatch.setattr(ahead, "_solve", solving)
    found = look_ahead(crew, posed, oracle_folder=lambda plan: tmp_path)
    assert set(found.oracles) == {plan.group for plan in posed}
    assert found.oracles[posed[0].group]["judged"] == "judged.pt"
    assert {name for name, _ in found.prepared} == {"compiles", "a"}
    assert {(name, call.pid) for (name, _), call in found.first_calls.items()} == {("a", crew.pid("a"))}


def test_no_oracle_is_kept_where_room_is_short(
    crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "LEAST_FREE_BYTES", 1 << 62)
    assert look_ahead(crew, plans(["compiles"]), oracle_folder=lambda plan: tmp_path).oracles == {}


def test_a_problem_too_large_to_share_the_device_waits_for_its_group() -> None:
    posed = plans(["a"], [1024, 2048])
    assert ahead._problems("a", posed).qsize() == 2
    assert ahead._problems("a", posed, memory_mib=4 / ahead.SCORES_SHARE).qsize() == 1


@pytest.mark.parametrize("name", ["raises_in_prepare", "leaves_in_prepare"])
def test_what_fails_is_left_for_its_group(crew: Crew, name: str) -> None:
    posed = plans(["compiles", name])
    found = look_ahead(crew, posed)
    assert set(found.prepared) == {("compiles", plan.problems[0].key) for plan in posed}
    assert crew.call("compiles", "judge")["ok"]
    assert crew.call(REFEREE, "ceilings")["ok"]


def test_ctrl_c_waits_for_no_compiler(crew: Crew, asked: list[tuple[int, str, str]]) -> None:
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.wait(0.01):
            if sum(operation == "prepare" for _, operation, _ in asked) == 2:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            look_ahead(crew, plans(["sleeps_compiles_in_prepare"]))
    finally:
        ended.set()
    assert sum(operation == "prepare" for _, operation, _ in asked) == 2  # one a process, and no second
    assert crew._losses == {}  # nor was the limit of their time waited for
