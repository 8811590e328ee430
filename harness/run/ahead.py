"""Compiles ahead of a run, for implementations whose compilation is slow and outlives a process on disk.

A sweep that compiles problem by problem waits minutes for one compiler while the device and the other cores idle.
Here several processes of one implementation prepare the run's problems at once, before anything is timed; the
worker that is judged and timed later finds their code in the library's own cache. The times these processes took
are the cells' set-up and compile figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from attnbench.harness.problem import Problem
from attnbench.harness.run.channel import Message
from attnbench.harness.run.crew import Crew
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.process import Worker, WorkerLost

Prepared = dict[tuple[str, str], tuple[float, float]]
"""(implementation, problem key) -> (prepare_ms, first_call_ms)."""

START_LIMIT_S = 120.0


def prepare_ahead(
    processes: dict[str, int], plans: Sequence[GroupPlan], crew: Crew, time_limit_s: float
) -> Prepared:
    """processes: how many for each implementation. What fails here is left out: the run meets it again and says why."""
    shares = []
    for name, count in processes.items():
        posed = [(plan, problem) for plan in plans if name in plan.impls for problem in plan.problems]
        shares += [(crew.hire(name), posed[start::count]) for start in range(min(count, len(posed)))]
    if not shares:
        return {}
    with ThreadPoolExecutor(len(shares)) as pool:
        try:
            done = [pool.submit(_prepare_share, worker, share, time_limit_s) for worker, share in shares]
            return {key: times for part in done for key, times in part.result().items()}
        finally:
            for worker, _ in shares:  # on Ctrl-C too, or the pool would wait for every share to end
                worker.kill()


def _prepare_share(
    worker: Worker, share: Sequence[tuple[GroupPlan, Problem]], time_limit_s: float
) -> Prepared:
    times: Prepared = {}
    try:
        _answer(worker, START_LIMIT_S, "hello")
        for plan, problem in share:
            reply = _answer(worker, time_limit_s, "prepare", plan=plan.to_json(), problem=problem.key)
            if reply["ok"] and not reply["unsupported"]:
                times[worker.role, problem.key] = reply["prepare_ms"], reply["first_call_ms"]
    except WorkerLost:
        return times
    return times


def _answer(worker: Worker, time_limit_s: float, operation: str, **arguments: object) -> Message:
    worker.ask(operation, **arguments)
    return worker.answer(time_limit_s)
