"""What can be done before anything is timed, while slow compilers keep the cores busy.

A sweep that compiles problem by problem waits minutes for one compiler while the device and the other cores idle.
Here several processes of one implementation take the run's problems from one queue; the worker that is judged and
timed later finds their code in the library's own cache on disk. For as long as that lasts, every other worker
prepares problems too, so that what it compiles or loads into its own process is there when its group comes, and the
referee works out the oracle of the first groups. The times of these preparations are the cells' set-up and compile
figures.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from attnbench.harness.problem import Problem
from attnbench.harness.run.channel import Message
from attnbench.harness.run.crew import Crew, Failure
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.process import REFEREE, Worker, WorkerLost
from attnbench.harness.run.record import Status
from attnbench.harness.run.waiting import wait_for_all

Prepared = dict[tuple[str, str], tuple[float, float]]
"""(implementation, problem key) -> (prepare_ms, first_call_ms)."""

START_LIMIT_S = 120.0
# First calls run side by side here: a problem whose scores, materialised in fp32, exceed this share of the device's
# memory waits for its group.
SCORES_SHARE = 1 / 8
# Left free where the oracles are kept.
LEAST_FREE_BYTES = 8 * 2**30

_Posed = tuple[GroupPlan, Problem]


@dataclass(frozen=True)
class Ahead:
    """What is there before the first group. oracles: the referee's answer by group."""

    prepared: Prepared = field(default_factory=dict)
    oracles: dict[str, Message] = field(default_factory=dict)


def prepare_ahead(
    plans: Sequence[GroupPlan],
    crew: Crew,
    time_limit_s: float,
    memory_mib: float | None = None,
    oracle_folder: Callable[[GroupPlan], Path] | None = None,
) -> Ahead:
    """Prepares while there is a slow compiler; returns at once where there is none or only one group to come.

    oracle_folder: where a group's oracle is to be kept; None for no oracles. What fails here is left out: the run
    meets it again and says why.
    """
    processes = {name: count for name, count in crew.compile_processes.items() if count > 1}
    if len(plans) < 2 or not processes:
        return Ahead()
    found = Ahead()
    compiled = threading.Event()
    queues = {name: _problems(name, plans) for name in processes}
    hired = [(worker, queues[worker.role]) for worker in _hire(crew, processes)]
    others = [name for name in crew.versions if name not in processes and crew.pid(name)]
    with ThreadPoolExecutor(len(hired) + len(crew.versions) + 1) as pool, _ended(crew, hired, compiled):
        compiling = [pool.submit(_compile, worker, posed, time_limit_s, found) for worker, posed in hired]
        compiling += [pool.submit(_prepare, crew, name, queues[name], found, compiled) for name in processes]
        beside = [
            pool.submit(_prepare, crew, name, _problems(name, plans, memory_mib), found, compiled)
            for name in others
        ]
        if oracle_folder:
            beside.append(pool.submit(_solve, crew, plans, oracle_folder, found, compiled))
        wait_for_all(compiling)
        compiled.set()
        wait_for_all(beside)
    crew.release([*processes, *others])
    return found


def _hire(crew: Crew, processes: dict[str, int]) -> Iterator[Worker]:
    """One process fewer than may compile, since the implementation's own worker takes part; as many as can be had."""
    for name, count in processes.items():
        for _ in range(count - 1):
            with contextlib.suppress(WorkerLost):
                yield crew.hire(name)


@contextlib.contextmanager
def _ended(crew: Crew, hired: Sequence[tuple[Worker, object]], compiled: threading.Event) -> Iterator[None]:
    """On Ctrl-C too, or the pool would wait for every queue to end; then nor for the compilations in progress."""
    try:
        yield
    except BaseException:
        crew.kill()
        raise
    finally:
        compiled.set()
        for worker, _ in hired:
            worker.kill()


def _problems(
    name: str, plans: Sequence[GroupPlan], memory_mib: float | None = None
) -> queue.SimpleQueue[_Posed]:
    """Those of an implementation in the order of the run; within ``SCORES_SHARE`` of a memory if one is given."""
    posed: queue.SimpleQueue[_Posed] = queue.SimpleQueue()
    for plan in plans:
        for problem in plan.problems if name in plan.impls else ():
            scores_mib = problem.batch * problem.heads * problem.seqlen_q * problem.seqlen_k * 4 / 2**20
            if memory_mib is None or scores_mib <= SCORES_SHARE * memory_mib:
                posed.put((plan, problem))
    return posed


def _taken(posed: queue.SimpleQueue[_Posed], stop: threading.Event | None = None) -> Iterator[_Posed]:
    while not (stop and stop.is_set()):
        try:
            yield posed.get_nowait()
        except queue.Empty:
            return


def _compile(worker: Worker, posed: queue.SimpleQueue[_Posed], time_limit_s: float, found: Ahead) -> None:
    """One hired process."""

    def answer(limit_s: float, operation: str, **arguments: object) -> Message:
        worker.ask(operation, **arguments)
        return worker.answer(limit_s)

    try:
        answer(START_LIMIT_S, "hello")
        for plan, problem in _taken(posed):
            _keep(found, worker.role, problem, answer(time_limit_s, "prepare", **_request(plan, problem)))
    except WorkerLost:
        return


def _prepare(
    crew: Crew,
    name: str,
    posed: queue.SimpleQueue[_Posed],
    found: Ahead,
    stop: threading.Event,
) -> None:
    """The worker itself that is judged and timed later."""
    for plan, problem in _taken(posed, stop):
        try:
            _keep(found, name, problem, crew.call(name, "prepare", **_request(plan, problem)))
        except Failure as failure:
            if failure.status in (Status.TIMEOUT, Status.CRASHED) or not crew.pid(name):
                return


def _solve(
    crew: Crew,
    plans: Sequence[GroupPlan],
    folder_of: Callable[[GroupPlan], Path],
    found: Ahead,
    stop: threading.Event,
) -> None:
    """The oracles of the first groups, while there is room for them."""
    for plan in plans:
        if stop.is_set():
            return
        folder = folder_of(plan)
        if shutil.disk_usage(folder).free < LEAST_FREE_BYTES:
            return
        try:
            found.oracles[plan.group] = crew.call(REFEREE, "oracle", plan=plan.to_json(), folder=str(folder))
        except Failure:
            return


def _request(plan: GroupPlan, problem: Problem) -> Message:
    return {"plan": plan.to_json(), "problem": problem.key}


def _keep(found: Ahead, name: str, problem: Problem, reply: Message) -> None:
    if reply["ok"] and not reply["unsupported"]:
        found.prepared[name, problem.key] = reply["prepare_ms"], reply["first_call_ms"]
