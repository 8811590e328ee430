"""What can be done before anything is timed, while slow compilers keep the cores busy.

A sweep that compiles problem by problem waits minutes for one compiler while the device and the other cores idle.
Here several processes of one implementation take the run's problems from one queue. The worker that is judged and
timed later prepares after them what they have compiled, out of the library's own cache on disk (a torch.compile
traces anew in each process, for a second a problem), and takes its part of the queue while there is nothing of that.
For as long as that lasts, every other worker prepares problems too, so that what it compiles or loads into its own
process is there when its group comes, and the referee works out the oracle of the first groups. The times of the
first preparations are the cells' set-up and compile figures.

Before all of that each implementation says which of its problems it declares unsupported: by the time their group
comes, its worker may have been lost for good over others, and nobody could be asked.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
from collections import deque
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
from attnbench.harness.run.waiting import LOOK_EVERY_S, wait_for_all

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
class FirstCall:
    """One that the worker of that pid has made: it need not make it again when its group comes. setup_mib: as in a
    Memory."""

    pid: int
    setup_mib: float | None


@dataclass(frozen=True)
class Ahead:
    """What is there before the first group. first_calls: by implementation and problem key, where no compiler is slow
    (a guard of torch.compile may yet refuse a second preparation). oracles: the referee's answer by group.
    unsupported: the reasons declared, by implementation and problem key.
    """

    prepared: Prepared = field(default_factory=dict)
    first_calls: dict[tuple[str, str], FirstCall] = field(default_factory=dict)
    oracles: dict[str, Message] = field(default_factory=dict)
    unsupported: dict[tuple[str, str], list[str]] = field(default_factory=dict)


def declared_unsupported(plans: Sequence[GroupPlan], crew: Crew) -> dict[tuple[str, str], list[str]]:
    """As in an ``Ahead``, of the implementations whose workers are there; what fails here is asked again later."""
    posed: dict[str, list[Message]] = {}
    for plan in plans:
        for name in filter(crew.pid, plan.impls):
            posed.setdefault(name, []).extend(problem.to_json() for problem in plan.problems)
    asked = {name: {"problems": problems} for name, problems in posed.items()}
    return {
        (name, key): reasons
        for name, reply in crew.call_all("declare", asked)
        if not isinstance(reply, Failure)
        for key, reasons in reply["unsupported"].items()
    }


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
    queues = {name: _Shared(_problems(name, plans)) for name in processes}
    hired = [(worker, queues[worker.role]) for worker in _hire(crew, processes)]
    others = [name for name in crew.versions if name not in processes and crew.pid(name)]
    with ThreadPoolExecutor(len(hired) + len(crew.versions) + 1) as pool, _ended(crew, hired, compiled):
        compiling = [pool.submit(_compile, worker, posed, time_limit_s, found) for worker, posed in hired]
        compiling += [
            pool.submit(_prepare, crew, name, queues[name].compiled_or_left(), found) for name in processes
        ]
        beside = [
            pool.submit(_prepare, crew, name, _taken(_problems(name, plans, memory_mib), compiled), found)
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


class _Shared:
    """One implementation's problems, shared by the processes that compile them."""

    def __init__(self, posed: queue.SimpleQueue[_Posed]) -> None:
        self._posed = posed
        self._compiled: deque[_Posed] = deque()
        self._in_progress = 0
        self._changed = threading.Condition()

    def take(self) -> _Posed | None:
        """One that nobody has taken; whoever takes it says when it is done."""
        with self._changed:
            posed = next(_taken(self._posed), None)
            self._in_progress += posed is not None
            return posed

    def done(self, posed: _Posed, *, compiled: bool) -> None:
        with self._changed:
            self._in_progress -= 1
            if compiled:
                self._compiled.append(posed)
            self._changed.notify()

    def compiled_or_left(self) -> Iterator[_Posed]:
        """Those that others have compiled, in turn; while there is none, those that nobody has taken; to the last."""
        while True:
            with self._changed:
                posed = self._compiled.popleft() if self._compiled else next(_taken(self._posed), None)
                if posed is None:
                    if not self._in_progress:
                        return
                    self._changed.wait(LOOK_EVERY_S)
                    continue
            yield posed


def _compile(worker: Worker, shared: _Shared, time_limit_s: float, found: Ahead) -> None:
    """One hired process."""

    def answer(limit_s: float, operation: str, **arguments: object) -> Message:
        worker.ask(operation, **arguments)
        return worker.answer(limit_s)

    with contextlib.suppress(WorkerLost):
        answer(START_LIMIT_S, "hello")
        while posed := shared.take():
            compiled = False
            try:
                reply = answer(time_limit_s, "prepare", **_request(*posed))
                compiled = _keep(found, worker.role, posed[1], reply)
            finally:
                shared.done(posed, compiled=compiled)


def _prepare(crew: Crew, name: str, posed: Iterator[_Posed], found: Ahead) -> None:
    """The worker itself that is judged and timed later."""
    for plan, problem in posed:
        try:
            reply = crew.call(name, "prepare", **_request(plan, problem))
        except Failure as failure:
            if failure.status in (Status.TIMEOUT, Status.CRASHED) or not crew.pid(name):
                return
        else:
            pid = crew.pid(name)
            if _keep(found, name, problem, reply) and pid and crew.compile_processes[name] == 1:
                found.first_calls[name, problem.key] = FirstCall(pid, reply.get("setup_mib"))


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


def _keep(found: Ahead, name: str, problem: Problem, reply: Message) -> bool:
    """Keeps the times of a first preparation; returns whether there was one at all."""
    if not reply["ok"] or reply["unsupported"]:
        return False
    found.prepared.setdefault((name, problem.key), (reply["prepare_ms"], reply["first_call_ms"]))
    return True
