"""Runs a plan: places its groups on devices, keeps the journal, and leaves a folder that says everything.

One thread a device, each with a crew of worker processes; this process imports no torch and touches no device. A
group whose closing record is in the journal is done; any other is run, so that the same call completes a run that
was killed anywhere.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil

from attnbench.harness.measure.clocks import ClockReader
from attnbench.harness.run import environment
from attnbench.harness.run.ahead import Ahead, declared_unsupported, prepare_ahead
from attnbench.harness.run.crew import Crew
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.gpus import Gpu, visible_gpus
from attnbench.harness.run.group import Conditions, GroupRun, oracle_folder
from attnbench.harness.run.journal import Journal
from attnbench.harness.run.lock import device_lock
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Cell, Group, Status
from attnbench.harness.run.waiting import wait_for_all

SCRATCH = "attnbench-scratch-"
SHARED_MEMORY = Path("/dev/shm")
FAILURES = (Status.INCORRECT, Status.CRASHED, Status.TIMEOUT, Status.ERROR)


@dataclass(frozen=True)
class RunOptions:
    """devices: ``cpu`` or ``cuda:N`` each; groups are spread over them. output: the run's folder.

    time_limit_s: of one request to one worker (a preparation with its compilation, a judgement, a turn of samples).
    hot: leave the L2 as the last call, and the change of its inputs, left it. cudagraph: time replays of a captured
    graph. command: as typed.
    energy: count joules over two seconds of calls a cell.
    """

    devices: tuple[str, ...]
    output: Path
    seed: int = 0
    rounds: int = 5
    samples: int = 5
    time_limit_s: float = 120.0
    hot: bool = False
    cudagraph: bool = False
    memory: bool = True
    fail_fast: bool = False
    energy: bool = False
    command: tuple[str, ...] = ()

    @property
    def mode(self) -> str:
        return ("hot" if self.hot else "cold") + ("+graph" if self.cudagraph else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"output": str(self.output)}


class Progress(Protocol):
    """What a run tells while it goes; called from the devices' threads, one call at a time."""

    def group_started(self, plan: GroupPlan, index: int, total: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def cell_done(self, cell: Cell) -> None: ...
    def group_done(self, group: Group) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class RunSummary:
    """What this call did. counts: cells by status; phases: seconds by phase, over all devices; both without what an
    earlier call had recorded. skipped: groups that were already complete.
    """

    folder: Path
    counts: dict[str, int]
    phases: dict[str, float]
    wall_s: float
    groups: int
    skipped: int

    @property
    def failed(self) -> bool:
        return any(self.counts.get(status) for status in FAILURES)


@dataclass
class _State:
    """What the device threads share; every access holds the lock."""

    journal: Journal
    progress: Progress
    pending: queue.SimpleQueue[GroupPlan]
    total: int
    lock: threading.RLock = field(default_factory=threading.RLock)
    started: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    stop: bool = False


def run(plans: list[GroupPlan], options: RunOptions, progress: Progress) -> RunSummary:
    """Completes ``plans`` in ``options.output``. RunError when the run cannot start or go on; records stay whole."""
    begin = time.monotonic()
    with ExitStack() as stack:
        journal = Journal(options.output)
        stack.callback(journal.close)
        for line in journal.set_aside:
            progress.note(f"set aside: {line}")
        open_plans = [plan for plan in plans if plan.group not in journal.groups]
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnbench-logs-")))
        crews = [Crew(device, logs, options.time_limit_s) for device in options.devices]
        if open_plans:
            for crew in crews:
                stack.enter_context(crew)
            gpus = visible_gpus() if any(crew.device != "cpu" for crew in crews) else []
            devices = [_take_device(crew, _uuid(crew.device, gpus), stack) for crew in crews]
            _write_documents(plans, options, devices)
        state = _State(journal, progress, queue.SimpleQueue(), len(open_plans))
        for plan in open_plans:
            state.pending.put(plan)
        _work(crews, open_plans, options, state)
    return RunSummary(
        folder=options.output,
        counts=dict(state.counts),
        phases=dict(state.phases),
        wall_s=time.monotonic() - begin,
        groups=state.started,
        skipped=len(plans) - len(open_plans),
    )


def _uuid(device: str, gpus: list[Gpu]) -> str:
    kind, _, index = device.partition(":")
    return gpus[int(index or 0)].uuid if kind == "cuda" and int(index or 0) < len(gpus) else ""


def _take_device(crew: Crew, uuid: str, stack: ExitStack) -> dict[str, Any]:
    """Facts of the device; it is locked by the driver's word of its ``uuid`` before anything of this run touches it."""
    if uuid:
        stack.enter_context(device_lock(uuid))
    return {name: value for name, value in crew.start_referee().items() if name != "ok"}


def _write_documents(plans: list[GroupPlan], options: RunOptions, devices: list[dict[str, Any]]) -> None:
    document = {"plans": [plan.to_json() for plan in plans], "options": options.to_json()}
    described = environment.gather(
        run=options.output.name,
        command=options.command,
        suites=sorted({plan.suite for plan in plans}),
        seed=options.seed,
        mode=options.mode,
        devices=devices,
    )
    try:
        replacement = options.output / "plan.tmp"
        replacement.write_text(json.dumps(document) + "\n")
        replacement.replace(options.output / "plan.json")
        environment.write(options.output, described)
    except OSError as error:
        raise RunError(f"cannot write to {options.output}: {error.strerror}", Exit.MACHINE) from error


def _work(crews: list[Crew], plans: list[GroupPlan], options: RunOptions, state: _State) -> None:
    """One device in this thread, several in one thread each; an error or Ctrl-C ends them all."""
    if len(crews) == 1:
        _serve_device(crews[0], plans, options, state)
        return
    with ThreadPoolExecutor(len(crews)) as pool:
        try:  # from the first submission on: the pool waits for its threads before it lets an interrupt through
            wait_for_all([pool.submit(_serve_device, crew, plans, options, state) for crew in crews])
        except BaseException:
            state.stop = True
            for crew in crews:
                crew.kill()
            raise


def _serve_device(crew: Crew, plans: list[GroupPlan], options: RunOptions, state: _State) -> None:
    """Runs pending groups on the crew's device until none is left. plans: all that may come, to be compiled ahead."""
    facts = crew.device_facts
    reader = ClockReader(str(facts["uuid"])) if facts.get("uuid") else None
    begin = time.monotonic()
    _tell(state, "start")
    crew.start(list(dict.fromkeys(name for plan in plans for name in plan.impls)))
    started = time.monotonic()
    with _scratch_folder() as scratch:
        ready = _look_ahead(crew, plans, scratch, options, state)
        ahead = {"start": started - begin, "compile ahead": time.monotonic() - started}
        conditions = Conditions(
            run=options.output.name,
            rounds=options.rounds,
            samples=options.samples,
            mode=options.mode,
            memory=options.memory,
            memory_mib=facts.get("memory_mib"),
            scratch=scratch,
            energy=options.energy,
            ahead=ready,
            foreign=lambda: reader.foreign_processes(crew.pids | {os.getpid()}) if reader else None,
        )
        while not state.stop:
            try:
                plan = state.pending.get_nowait()
            except queue.Empty:
                return
            with state.lock:
                state.started += 1
                state.progress.group_started(plan, state.started, state.total)
            begin = time.monotonic()
            cells, group = GroupRun(plan, crew, conditions, lambda name: _tell(state, name)).execute()
            phases = group.phases | {"other": time.monotonic() - begin - sum(group.phases.values())}
            phases = {name: ahead.get(name, 0.0) + phases.get(name, 0.0) for name in {**ahead, **phases}}
            ahead = {}  # counted once, in the first group
            _record(cells, replace(group, phases=phases), options, state)


def _look_ahead(
    crew: Crew, plans: list[GroupPlan], scratch: Path, options: RunOptions, state: _State
) -> Ahead:
    _tell(state, "compile ahead")
    # Which device gets which group is open while there are several: each works out its own oracles as they come.
    folder_of = partial(oracle_folder, scratch) if len(options.devices) == 1 and _in_memory(scratch) else None
    unsupported = declared_unsupported(plans, crew)
    memory_mib = crew.device_facts.get("memory_mib")
    ready = prepare_ahead(plans, crew, options.time_limit_s, memory_mib, folder_of)
    return replace(ready, unsupported=unsupported)


def _tell(state: _State, phase: str) -> None:
    with state.lock:
        state.progress.phase(phase)


def _record(cells: list[Cell], group: Group, options: RunOptions, state: _State) -> None:
    with state.lock:
        state.journal.append(cells, group)
        for cell in cells:
            state.counts[cell.status] += 1
            state.progress.cell_done(cell)
        state.phases.update(group.phases)
        state.progress.group_done(group)
        if options.fail_fast and any(cell.status in FAILURES for cell in cells):
            state.stop = True


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Where the oracle's answers pass from the referee to the workers: shared memory if there is room, else a disk."""
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 8 * 2**30
    root = SHARED_MEMORY if roomy else Path(tempfile.gettempdir())
    _sweep(root)
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-", dir=root) as folder:
        yield Path(folder)


def _in_memory(scratch: Path) -> bool:
    return SHARED_MEMORY in scratch.parents


def _sweep(root: Path) -> None:
    """Removes the folders of runs that were killed: gigabytes of shared memory, otherwise held until a reboot."""
    for folder in root.glob(f"{SCRATCH}*-*"):
        owner = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
