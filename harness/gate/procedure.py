"""The gate on two sides that can be executed: judge, calibrate, look, and look again while unsure.

1. Conformance: one process of each side is judged on every cell. What head answers wrongly ends the gate.
2. Calibration: base against a second base. What this machine cannot tell now, it is not asked.
3. Looks: fresh pairs of base and head. Each look adds pairs to the cells that are still UNSURE, while time remains.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnbench.harness.gate.calibration import Calibration, calibrate
from attnbench.harness.gate.decision import Bounds, Design, Verdict, bootstrap, bounds
from attnbench.harness.gate.estimators import estimator_on
from attnbench.harness.gate.meter import MODE, Meter
from attnbench.harness.gate.outcome import Answer, CellResult, GateResult, calibration_in_words, too_noisy
from attnbench.harness.gate.pairs import CellKey, Contrast, Role, contrasts
from attnbench.harness.gate.rounds import RoundLogs
from attnbench.harness.gate.sides import Side
from attnbench.harness.run import environment
from attnbench.harness.run.journal import Journal
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Cell, Group, Status

BASE, CONTROL, HEAD = "base", "control", "head"
CHECK, CALIBRATION = "check", "calibration"
CHECKING = 0  # number of the processes that are judged alone
STARTS_PER_CORE = 2

# NVML's reasons that mean heat or a fault: hardware slowdown 0x08, thermal 0x20 and 0x40, power brake 0x80. The power
# cap (0x04) is where a large kernel runs all day, and both sides of a round run there.
UNFIT_THROTTLE = 0xE8
MOST_THROTTLED = 0.1  # of the rounds


@dataclass(frozen=True)
class GateOptions:
    """pairs: process pairs that a look adds. rounds: of a look, half in each order. samples: at most, of a turn.

    budget_s: no look begins that would end after this many seconds, if it took as long as the last.
    time_limit_s: of one request to one worker. command: as typed.
    """

    device: str
    output: Path
    rounds: int
    threshold: float = 0.02
    alpha: float = 0.05
    looks: int = 3
    pairs: int = 5
    samples: int = 5
    budget_s: float = 600.0
    time_limit_s: float = 120.0
    seed: int = 0
    command: tuple[str, ...] = ()


class Procedure:
    """One gate. ``run`` returns its result, and leaves the records of every phase under ``options.output``."""

    def __init__(
        self,
        plans: Sequence[GroupPlan],
        impls: Sequence[str],
        base: Side,
        head: Side,
        options: GateOptions,
        tell: Callable[[str], None],
    ) -> None:
        """tell: called with a line of progress."""
        self._plans, self._impls, self._base, self._head = plans, impls, base, head
        self._options, self._tell = options, tell
        self._results: dict[CellKey, CellResult] = {}
        self._comparable: list[CellKey] = []
        self._seen: dict[CellKey, Contrast] = {}
        self._log_ms: dict[CellKey, dict[str, list[float]]] = {}
        self._unfit: dict[str, None] = {}  # in order, each once
        self._calibration: Calibration | None = None

    def run(self) -> GateResult:
        begin = time.monotonic()
        options, folders = self._options, {BASE: self._base.folders, CONTROL: self._base.folders}
        folders[HEAD] = self._head.folders
        with Meter(options.device, folders, options.samples, options.time_limit_s) as self._meter:
            self._write_environment()
            self._check()
            if self._comparable and not any(result.broken for result in self._results.values()):
                self._calibrate()
            if self._calibration and not self._unfit:
                self._look(deadline=begin + options.budget_s)
        for key in self._comparable:
            self._results.setdefault(key, self._timed(key, Answer.UNSURE))
        return GateResult(
            base=self._base.what,
            head=self._head.what,
            device=str(self._meter.facts.get("name", options.device)),
            command=options.command,
            threshold=options.threshold,
            alpha=options.alpha,
            seconds=time.monotonic() - begin,
            cells=[self._results[key] for key in self._keys()],
            calibration=self._calibration,
            unfit=list(self._unfit),
        )

    # ---- phases -------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """One process of each side, judged on every cell; nothing is timed."""
        if len(self._impls) == 1:
            self._start_ahead(self._impls[0])
        cells = self._measure(CHECK, list(self._keys()), (BASE, HEAD), [CHECKING], rounds=0)
        for key in self._keys():
            if broken := _unanswered(key, cells):
                self._results[key] = broken
            else:
                self._comparable.append(key)
        total = len(self._comparable) + len(self._results)
        self._tell(f"conformance: {len(self._comparable)} of {total} cells are right on both sides")

    def _start_ahead(self, impl: str) -> None:
        """Starts the processes of check, calibration and first look side by side, where there are cores for it."""
        roles = _roles(impl, (BASE, HEAD), [CHECKING, *self._numbers(1)])
        roles += _roles(impl, (BASE, CONTROL), self._numbers(0))
        if len(roles) <= STARTS_PER_CORE * (os.cpu_count() or 1):
            self._meter.start(roles)

    def _calibrate(self) -> None:
        cells = self._measure(CALIBRATION, self._comparable, (BASE, CONTROL), self._numbers(0))
        found = contrasts(cells, over=CONTROL, under=BASE)
        for key in self._comparable:
            if failed := _unanswered(key, cells):
                self._unfit[f"{key.id}: base fails on and off: {failed.reason}"] = None
        if self._unfit:
            return
        design = self._design
        self._calibration = calibrate([found[key].logs for key in self._comparable], design)
        for key in self._comparable:
            same = bounds(found[key].logs.values(), design)
            if same.verdict(design.margin) in (Verdict.SLOWER, Verdict.FASTER):
                self._unfit[f"{key.id}: two equal sides differ by {math.expm1(same.value):+.1%}"] = None
        if noise := too_noisy(self._calibration):
            self._unfit[noise] = None
        self._tell(calibration_in_words(self._calibration))

    def _look(self, deadline: float) -> None:
        design = self._design
        for look in range(design.looks):
            begin = time.monotonic()
            undecided = [key for key in self._comparable if key not in self._results]
            cells = self._measure(f"look-{look + 1}", undecided, (BASE, HEAD), self._numbers(look + 1))
            found = contrasts(cells, over=HEAD, under=BASE)
            for key in undecided:
                if failed := _unanswered(key, cells):
                    self._results[key] = failed
                    continue
                before = self._seen.get(key)
                self._seen[key] = before.joined(found[key]) if before else found[key]
                verdict = bounds(self._seen[key].logs.values(), design).verdict(design.margin)
                if verdict is not Verdict.UNSURE:
                    self._results[key] = self._timed(key, Answer(verdict))
            left = sum(key not in self._results for key in self._comparable)
            counts = Counter(self._results[key].answer for key in self._comparable if key in self._results)
            said = ", ".join(f"{count} {answer}" for answer, count in sorted(counts.items()))
            self._tell(f"look {look + 1} of {design.looks}: {said or 'nothing decided'}; {left} UNSURE")
            now = time.monotonic()
            if not left or self._unfit or now + (now - begin) > deadline:
                return

    def _measure(
        self,
        phase: str,
        wanted: Sequence[CellKey],
        sides: Sequence[str],
        numbers: Sequence[int],
        rounds: int = -1,
    ) -> list[Cell]:
        """Cells of these processes on every group that holds a wanted cell; recorded as they come."""
        found: list[Cell] = []
        for impl in self._impls:
            roles = _roles(impl, sides, numbers)
            posed = [
                dataclasses.replace(plan, problems=problems)
                for plan in self._plans
                if (problems := tuple(p for p in plan.problems if CellKey(impl, p.key) in wanted))
            ]
            if not posed:
                continue
            journal = Journal(self._options.output / impl / phase)
            try:
                for plan in posed:
                    self._tell(f"{phase}: {impl} on {plan.group}")
                    used = self._options.rounds if rounds < 0 else rounds
                    cells, group = self._meter.measure(plan, roles, f"{impl}/{phase}", used, lambda _: None)
                    journal.append(cells, group)
                    found += cells
                    self._watch(cells, group)
            finally:
                journal.close()
            self._meter.dismiss(roles)
        return found

    # ---- pieces -------------------------------------------------------------------------------------------

    @property
    def _design(self) -> Design:
        options = self._options
        return Design(len(self._comparable), options.threshold, options.alpha, options.looks, options.pairs)

    def _numbers(self, batch: int) -> list[int]:
        """Numbers of the pairs of the calibration (0) or of a look (1, 2 ...): none comes twice, so all are fresh."""
        return [batch * self._options.pairs + pair + 1 for pair in range(self._options.pairs)]

    def _keys(self) -> Iterable[CellKey]:
        return (
            CellKey(i, problem.key) for i in self._impls for plan in self._plans for problem in plan.problems
        )

    def _watch(self, cells: Sequence[Cell], group: Group) -> None:
        """Notes what makes the machine unfit, and the times that a reader wants to see."""
        for process in group.foreign or ():
            self._unfit[f"another process is on the GPU: {process}"] = None
        bits = [bits for cell in cells if cell.timing for bits in cell.timing.throttle if bits is not None]
        throttled = sum(bool(read & UNFIT_THROTTLE) for read in bits)
        if bits and throttled > MOST_THROTTLED * len(bits):
            self._unfit[f"throttled by heat or a fault in {throttled} of {len(bits)} turns"] = None
        for cell in cells:
            if cell.timing:
                role = Role.parse(cell.impl)
                ms = self._log_ms.setdefault(CellKey(role.impl, cell.problem.key), {})
                ms.setdefault(role.side, []).extend(RoundLogs.of(cell).ms)

    def _timed(self, key: CellKey, answer: Answer) -> CellResult:
        says = estimator_on(self._options.device).side
        ms = {side: math.exp(says(np.array(logs))) for side, logs in self._log_ms.get(key, {}).items()}
        result = CellResult(key.impl, key.problem, answer, base_ms=ms.get(BASE), head_ms=ms.get(HEAD))
        if self._calibration:
            place = self._comparable.index(key)
            result = dataclasses.replace(result, detectable=self._calibration.detectable[place])
        seen = self._seen.get(key)
        if seen is None:
            return dataclasses.replace(result, reason="not timed")
        said: Bounds = bounds(seen.logs.values(), self._design)
        low, high = bootstrap(seen.logs)
        return dataclasses.replace(
            result,
            change=math.expm1(said.value),
            low=math.expm1(said.low),
            high=math.expm1(said.high),
            spread=(math.expm1(low), math.expm1(high)),
            cycles=None if seen.cycles is None else math.expm1(seen.cycles.values().mean()),
            units=f"{seen.logs.pairs} pairs",
        )

    def _write_environment(self) -> None:
        options = self._options
        options.output.mkdir(parents=True, exist_ok=True)
        environment.write(
            options.output,
            environment.gather(
                run=options.output.name,
                command=options.command,
                suites=sorted({plan.suite for plan in self._plans}),
                seed=options.seed,
                mode=MODE,
                devices=[self._meter.facts],
            ),
        )


def _roles(impl: str, sides: Iterable[str], numbers: Iterable[int]) -> list[Role]:
    return [Role(impl, side, number) for number in numbers for side in sides]


def _unanswered(key: CellKey, cells: Iterable[Cell]) -> CellResult | None:
    """What to say of a cell that some process of some side did not answer rightly; None if all did."""
    found: Mapping[str, Cell] = {
        role.side: cell
        for cell in cells
        if cell.status is not Status.OK
        and cell.problem.key == key.problem
        and (role := Role.parse(cell.impl)).impl == key.impl
    }
    head, base = found.get(HEAD), found.get(BASE) or found.get(CONTROL)
    if head and head.status is Status.INCORRECT:
        return CellResult(*key, Answer.WRONG, f"head: {head.reasons[0]}")
    if base:
        return CellResult(*key, Answer.SKIPPED, f"base is {base.status}: {base.reasons[0]}")
    if head:
        return CellResult(*key, Answer.LOST, f"head is {head.status}: {head.reasons[0]}")
    return None
