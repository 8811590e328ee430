"""The gate on recorded runs: what two recordings can say of each other, and no more.

A recording holds one process of each implementation, and its card at its hour. Nothing of the other side was measured
beside it, so the rounds of the two are two samples, not pairs (Welch's interval), and no number of rounds tells how
another process, or another hour, would have differed. Where both know the SM clock, milliseconds and cycles must agree
before anything is said: a card at another clock is no change of a kernel.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats as scipy_stats

from attnbench.harness.gate.calibration import GATES, SEED, Replay, summarised
from attnbench.harness.gate.decision import Bounds, Design, Verdict
from attnbench.harness.gate.outcome import Answer, CellResult, GateResult, too_noisy
from attnbench.harness.gate.pairs import CellKey
from attnbench.harness.gate.rounds import RoundLogs
from attnbench.harness.report.load import LoadError, Run, load_run
from attnbench.harness.report.stats import Array
from attnbench.harness.run.errors import RunError
from attnbench.harness.run.record import Cell, Status

CAVEAT = (
    "the two sides were not measured side by side: how another process or another hour would differ is not in these "
    "intervals; pass revisions or paths on both sides for that"
)


def compare(
    base: Path,
    head: Path,
    *,
    only: Sequence[str] = (),
    words: tuple[str, str],
    threshold: float,
    alpha: float,
    command: Sequence[str] = (),
) -> GateResult:
    """The gate of two runs' folders. only: implementations, all that both hold if empty. words: the two sides.

    RunError when the two ran on different devices, or a folder holds no run.
    """
    begin = time.monotonic()
    try:
        runs = load_run(base), load_run(head)
    except LoadError as error:
        raise RunError(str(error)) from None
    device = _same_device(*runs)
    before, after = (_cells(run, only) for run in runs)
    results = {
        key: _unanswered(key, before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after])
    }
    comparable = [key for key, result in results.items() if result is None]
    samples = [(RoundLogs.of(before[key]), RoundLogs.of(after[key])) for key in comparable]
    calibration, unfit = None, []
    if comparable:
        design = Design(len(comparable), threshold, alpha, looks=1)
        least = min(len(own.ms) for own, _ in samples)
        calibration = summarised(
            _replayed(samples, design), design, f"{least} rounds of base against themselves"
        )
        for key, pair, detectable in zip(comparable, samples, calibration.detectable, strict=True):
            results[key] = dataclasses.replace(_compared(key, *pair, design), detectable=detectable)
        unfit = list(filter(None, [too_noisy(calibration)]))
    return GateResult(
        base=words[0],
        head=words[1],
        device=device,
        command=command,
        threshold=threshold,
        alpha=alpha,
        seconds=time.monotonic() - begin,
        cells=[result for result in results.values() if result],
        calibration=calibration,
        unfit=unfit,
        notes=[CAVEAT],
    )


def _compared(key: CellKey, base: RoundLogs, head: RoundLogs, design: Design) -> CellResult:
    said = _welch(base.ms, head.ms, design.level)
    verdict, reason, cycles = said.verdict(design.margin), "", None
    if base.cycles is not None and head.cycles is not None:
        clocked = _welch(base.cycles, head.cycles, design.level)
        cycles = math.expm1(clocked.value)
        in_cycles = clocked.verdict(design.margin)
        if in_cycles is not verdict:
            reason = f"{verdict} in ms, {in_cycles} in cycles: the clocks of the two runs differ"
            verdict = Verdict.UNSURE
    return CellResult(
        *key,
        Answer(verdict),
        reason,
        change=math.expm1(said.value),
        low=math.expm1(said.low),
        high=math.expm1(said.high),
        cycles=cycles,
        base_ms=math.exp(np.median(base.ms)),
        head_ms=math.exp(np.median(head.ms)),
        units=f"{len(base.ms)} and {len(head.ms)} rounds",
    )


def _welch(base: Array, head: Array, level: float) -> Bounds:
    """Of head's mean over base's, two samples of unequal variance."""
    value = float(head.mean() - base.mean())
    if min(len(base), len(head)) < 2:
        return Bounds(value, -math.inf, math.inf)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # rounds that are all alike: no spread, and no degrees of freedom
        found = scipy_stats.ttest_ind(head, base, equal_var=False).confidence_interval(1 - level)
    if math.isnan(found.low):
        return Bounds(value, value, value)
    return Bounds(value, float(found.low), float(found.high))


def _replayed(samples: Sequence[tuple[RoundLogs, RoundLogs]], design: Design) -> Replay:
    """Gates whose two sides are both drawn from base's rounds, as many as each side has."""
    rng = np.random.default_rng(SEED)
    means, halves = [], []
    for base, head in samples:
        one, other = (base.ms[rng.integers(0, len(base.ms), (GATES, len(side.ms)))] for side in (base, head))
        means.append(other.mean(axis=1) - one.mean(axis=1))
        halves.append(_welch_halves(one, other, design.level))
    return Replay(np.array(means).T[..., None], np.array(halves).T[..., None], design.margin)


def _welch_halves(base: Array, head: Array, level: float) -> Array:
    """Half of ``_welch``'s interval for (gates, rounds) at once; inf for a single round."""
    if min(base.shape[1], head.shape[1]) < 2:
        return np.full(len(base), math.inf)
    one, other = (side.var(axis=1, ddof=1) / side.shape[1] for side in (base, head))
    with np.errstate(invalid="ignore"):
        freedom = (one + other) ** 2 / (one**2 / (base.shape[1] - 1) + other**2 / (head.shape[1] - 1))
    half: Array = scipy_stats.t.ppf(1 - level / 2, np.nan_to_num(freedom, nan=1.0)) * np.sqrt(one + other)
    return half


def _cells(run: Run, only: Sequence[str]) -> dict[CellKey, Cell]:
    return {CellKey(cell.impl, cell.problem.key): cell for cell in run.cells if not only or cell.impl in only}


def _unanswered(key: CellKey, base: Cell | None, head: Cell | None) -> CellResult | None:
    """What to say of a cell that cannot be compared; None for one that can."""
    answered = {
        name: cell is not None and cell.timing is not None for name, cell in (("base", base), ("head", head))
    }
    if head and head.status is Status.INCORRECT:
        return CellResult(*key, Answer.WRONG, f"head: {head.reasons[0]}")
    if not answered["base"]:
        return CellResult(*key, Answer.SKIPPED, _why("base", base))
    if head is None:
        return CellResult(*key, Answer.SKIPPED, _why("head", head))
    if not answered["head"]:
        return CellResult(*key, Answer.LOST, _why("head", head))
    ways = [cell.timing.way for cell in (base, head) if cell and cell.timing]
    if ways[0] != ways[1]:
        return CellResult(*key, Answer.SKIPPED, f"timed in two ways: base {ways[0]}, head {ways[1]}")
    return None


def _why(side: str, cell: Cell | None) -> str:
    if cell is None:
        return f"not in the run of {side}"
    return f"{side} is {cell.status}: {cell.reasons[0] if cell.reasons else 'not timed'}"


def _same_device(base: Run, head: Run) -> str:
    one, other = ({str(d.get("name")) for d in run.environment.get("devices") or []} for run in (base, head))
    if one and other and one != other:
        raise RunError(
            f"base ran on {', '.join(sorted(one))}, head on {', '.join(sorted(other))}: not comparable"
        )
    return ", ".join(sorted(one or other)) or "unknown"
