"""Times calls on a device and returns raw samples.

On CUDA the stream is held by a spin kernel until every launch of the turn is queued, so that host time between
launches never enters a device sample; whether the spin outlasted the queueing is verified, and a turn where it did
not is thrown away and repeated with a longer spin. A call that synchronises or allocates device memory waits on
the spin itself: it can never be held, and its samples say so. The spin counts clock cycles, so it always ends.

A sample begins and ends on the default stream, whichever a call leaves current. What a call left to another stream,
to a thread or to a later call is not in its sample: so a look is taken at its result in that very place, right behind
the end of the sample, and whoever asks for the turn compares that with what stands there afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Bound here, before any plugin is loaded that might put another clock in its place.
from time import perf_counter
from typing import Any, Self

import torch

from attnbench.harness.measure.clocks import ClockReader, Clocks

Call = Callable[[], Any]

# Spin length: what the host needs to queue the turn, with room to spare. torch.cuda._sleep counts SM cycles;
# at most 1.98e6 of them pass in a millisecond on the fastest card this was written for.
CYCLES_PER_MS = 1_980_000
FIRST_HOLD_MS = 4.0
LONGEST_HOLD_MS = 60.0
HOLD_ATTEMPTS = 2


def first_hold_ms(call_ms: float, queue_ms: float = 0.0) -> float:
    """How long to hold the stream for calls that were never held. queue_ms: what queueing them all may take.

    A long call's launches may take long to queue, and a hold that is a fifth of the call costs less than a second
    attempt; one that is twice what queueing takes costs less than that as well.
    """
    return min(max(FIRST_HOLD_MS, call_ms / 5, 2 * queue_ms), LONGEST_HOLD_MS)


@dataclass(frozen=True)
class Turn:
    """One implementation's samples of one round.

    ms: device time of each call (host time on a CPU). host_us: host time to queue each call; empty on a CPU.
    held: whether every launch was queued before the first sample began. discarded: samples thrown away for that.
    next_hold_ms: twice what queueing took, for the next turn of the same calls; 0 once they proved not to be held.
    kept: what the call numbered ``keep`` returned; seen: what ``look`` made of it when its sample ended.
    """

    ms: list[float]
    host_us: list[float] = field(default_factory=list)
    held: bool = True
    discarded: int = 0
    next_hold_ms: float = FIRST_HOLD_MS
    clocks: Clocks = Clocks()
    kept: Any = None
    seen: Any = None


def _not_looked(_: object) -> None: ...


@dataclass(frozen=True)
class Around:
    """What happens around the samples and in none of them.

    rewarm: a call that brings back caches and clocks before the first sample, never the one that is timed next: whoever
    remembers a last answer would have it ready. flush: run before each call. renew: one for each call, run after it.
    look: called with the result of the call that is kept, in the stream's order, before anything else comes after it.
    """

    rewarm: Call | None = None
    flush: Call | None = None
    renew: Sequence[Call] = ()
    look: Callable[[Any], Any] = _not_looked

    def after(self, index: int) -> None:
        if self.renew:
            self.renew[index]()


def take_turn(
    calls: Sequence[Call],
    *,
    device: torch.device,
    keep: int,
    around: Around = Around(),
    clocks: ClockReader | None = None,
    hold_ms: float = FIRST_HOLD_MS,
    at_once: int | None = None,
) -> Turn:
    """Times ``calls`` one after another.

    keep: index of the call whose result is returned for checking. hold_ms: length of the spin; 0 for none. at_once:
    most calls behind one spin, where what they launch could fill the driver's queue; the others go behind the next.
    """
    if device.type != "cuda":
        return _time_on_host(calls, keep, around)
    at_once = at_once or max(len(calls), 1)
    turns: list[Turn] = []
    for first in range(0, max(len(calls), 1), at_once):
        part = slice(first, first + at_once)
        own = dataclasses.replace(around, renew=around.renew[part])
        turns.append(_take_held(calls[part], keep - first, own, clocks, hold_ms, device))
        hold_ms = turns[-1].next_hold_ms
    return _joined(turns)


def _joined(turns: Sequence[Turn]) -> Turn:
    """Turns of the same calls as one: clocks and the next hold are those of the last."""
    kept = next((turn for turn in turns if turn.kept is not None or turn.seen is not None), turns[-1])
    return dataclasses.replace(
        turns[-1],
        ms=[ms for turn in turns for ms in turn.ms],
        host_us=[us for turn in turns for us in turn.host_us],
        held=all(turn.held for turn in turns),
        discarded=sum(turn.discarded for turn in turns),
        kept=kept.kept,
        seen=kept.seen,
    )


def _take_held(
    calls: Sequence[Call],
    keep: int,
    around: Around,
    clocks: ClockReader | None,
    hold_ms: float,
    device: torch.device,
) -> Turn:
    """Behind one spin; behind another, longer one where that did not outlast the queueing."""
    discarded = 0
    for attempt in range(HOLD_ATTEMPTS):
        turn, queue_ms = _time_held(calls, keep, around, clocks, hold_ms, device)
        if turn.held:
            next_hold_ms = min(2 * queue_ms + 0.2, LONGEST_HOLD_MS)
            return dataclasses.replace(turn, discarded=discarded, next_hold_ms=next_hold_ms)
        if hold_ms in (0.0, LONGEST_HOLD_MS) or attempt == HOLD_ATTEMPTS - 1:
            break
        discarded += len(calls)
        turn = dataclasses.replace(turn, kept=None, seen=None)  # memory that the next attempt's calls need
        hold_ms = min(max(2 * queue_ms, 4 * hold_ms), LONGEST_HOLD_MS)
    # Not even the longest hold outlasts the queueing: the call waits on the stream itself, and always will.
    next_hold_ms = 0.0 if hold_ms in (0.0, LONGEST_HOLD_MS) else LONGEST_HOLD_MS
    return dataclasses.replace(turn, discarded=discarded, next_hold_ms=next_hold_ms)


def _time_on_host(calls: Sequence[Call], keep: int, around: Around) -> Turn:
    if around.rewarm:
        around.rewarm()
    samples, kept, seen = [], None, None
    for index, call in enumerate(calls):
        begin = perf_counter()
        result = call()
        samples.append((perf_counter() - begin) * 1e3)
        if index == keep:
            kept, seen = result, around.look(result)
        around.after(index)
    return Turn(samples, kept=kept, seen=seen)


def _time_held(
    calls: Sequence[Call],
    keep: int,
    around: Around,
    clocks: ClockReader | None,
    hold_ms: float,
    device: torch.device,
) -> tuple[Turn, float]:
    """One attempt; also returns how long the host took to queue everything, in ms."""
    starts = [torch.cuda.Event(enable_timing=True) for _ in calls]
    ends = [torch.cuda.Event(enable_timing=True) for _ in calls]
    released = torch.cuda.Event()
    host_us: list[float] = []
    kept = seen = None
    torch.cuda.synchronize()
    stream = torch.cuda.default_stream(device)
    torch.cuda.set_stream(stream)
    queued_from = perf_counter()
    torch.cuda._sleep(  # noqa: SLF001 - torch's own spin kernel, used by its tests; bounded by cycles
        int(hold_ms * CYCLES_PER_MS)
    )
    released.record(stream)
    if around.rewarm:
        around.rewarm()
        torch.cuda.set_stream(stream)
    for index, call in enumerate(calls):
        if around.flush:
            around.flush()
        starts[index].record(stream)
        begin = perf_counter()
        result = call()
        host_us.append((perf_counter() - begin) * 1e6)
        ends[index].record(stream)
        torch.cuda.set_stream(stream)
        if index == keep:
            kept, seen = result, around.look(result)
        del result
        around.after(index)
    held = not released.query()
    queue_ms = (perf_counter() - queued_from) * 1e3
    # The kernels run now or in a moment: this is when the clock they see can be read.
    reading = clocks.read_during(ends[-1].query) if clocks else Clocks()
    torch.cuda.synchronize()
    samples = [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]
    return Turn(samples, host_us, held, clocks=reading, kept=kept, seen=seen), queue_ms


class CacheFlush:
    """Overwrites a buffer twice the L2's size, so that the next call finds none of its operands there."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(2 * size, dtype=torch.uint8, device=device)
        self()  # loads its kernel, which waits for the device: in a turn, for the very spin that holds the stream

    def __call__(self) -> None:
        self._buffer.zero_()


@dataclass(frozen=True)
class Warm:
    """calls: how many were made. Of the last one in ms, by the host: call_ms until the device was done, queue_ms until
    it was queued.
    """

    calls: int
    call_ms: float
    queue_ms: float


def warm_up(call: Call, device: torch.device, *, budget_ms: float = 10.0, settle: float = 0.03) -> Warm:
    """Calls until three calls in a row differ by less than ``settle`` or the budget is spent, at least once."""
    times: list[float] = []
    while not times or sum(times) < budget_ms:
        begin = perf_counter()
        call()
        queue_ms = (perf_counter() - begin) * 1e3
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((perf_counter() - begin) * 1e3)
        last = times[-3:]
        if len(last) == 3 and max(last) - min(last) <= settle * min(last):
            break
    return Warm(len(times), times[-1], queue_ms)


@dataclass(frozen=True)
class Pace:
    """How long a call took last, and how long the stream must be held to queue a turn of them; both in ms. queue_ms:
    where none was queued yet, what queueing one call took while it was warmed up.
    """

    call_ms: float
    hold_ms: float
    queue_ms: float = 0.0

    @classmethod
    def of(cls, warm: Warm) -> Self:
        return cls(warm.call_ms, first_hold_ms(warm.call_ms), warm.queue_ms)

    def hold_for(self, calls: int) -> float:
        """How long to hold the stream for a turn of so many calls."""
        return first_hold_ms(self.call_ms, calls * self.queue_ms) if self.queue_ms else self.hold_ms
