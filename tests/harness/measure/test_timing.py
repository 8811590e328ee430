"""Timing: what a sample holds and what it does not, on a CPU and on a simulated CUDA stream."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnbench.harness.measure import timing
from attnbench.harness.measure.clocks import Clocks
from attnbench.harness.measure.timing import (
    CYCLES_PER_MS,
    HOLD_ATTEMPTS,
    LONGEST_HOLD_MS,
    Around,
    CacheFlush,
    Turn,
    first_hold_ms,
    take_turn,
    warm_up,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def numbered(count: int, made: list[int]) -> list[Callable[[], int]]:
    """Calls that note their number in ``made`` and return it."""

    def call(number: int) -> int:
        made.append(number)
        return number

    return [lambda number=number: call(number) for number in range(count)]


# ---- on a CPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 2, -1])
def test_every_call_is_a_sample_after_one_untimed_call(keep: int) -> None:
    made: list[int] = []
    turn = take_turn(numbered(3, made), device=CPU, keep=keep, around=Around(rewarm=lambda: made.append(7)))
    assert made == [7, 0, 1, 2]
    assert len(turn.ms) == 3
    assert all(ms > 0 for ms in turn.ms)
    assert turn.kept == (None if keep < 0 else keep)
    assert (turn.held, turn.discarded, turn.host_us, turn.clocks) == (True, 0, [], Clocks())


def around_noting(order: list[str]) -> Around:
    """What happens around three samples, each part noting that it did."""
    renew = [lambda number=number: order.append(f"renew {number}") for number in range(3)]

    def look(result: int) -> str:
        order.append(f"look {result}")
        return f"seen {result}"

    return Around(lambda: order.append("rewarm"), lambda: order.append("flush"), renew, look)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_look_is_taken_behind_the_sample_and_then_its_inputs_are_renewed(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    Stream(monkeypatch)
    order: list[str] = []
    calls = [lambda number=number: (order.append(f"call {number}"), number)[1] for number in range(3)]
    turn = take_turn(calls, device=device, keep=1, around=around_noting(order))
    assert (turn.kept, turn.seen) == (1, "seen 1")
    flush = ["flush"] if device == CUDA else []
    assert order == [
        "rewarm", *flush, "call 0", "renew 0", *flush, "call 1", "look 1", "renew 1", *flush, "call 2", "renew 2",
    ]  # fmt: skip


def test_a_host_sample_is_the_time_of_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch)
    turn = take_turn([lambda ms=ms: host.spend(ms) for ms in (1.0, 4.0, 2.5)], device=CPU, keep=-1)
    assert turn.ms == pytest.approx([1.0, 4.0, 2.5])


def test_an_exception_of_a_call_passes() -> None:
    with pytest.raises(ZeroDivisionError):
        take_turn([lambda: 1 / 0], device=CPU, keep=-1)


# ---- warm-up ----------------------------------------------------------------------------------------------


class Host:
    """Stands in for the clock: time passes only when it is spent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms = 0.0
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now_ms / 1e3)

    def spend(self, ms: float) -> None:
        self.now_ms += ms


def warmed(monkeypatch: pytest.MonkeyPatch, costs_ms: Iterator[float], **options: float) -> int:
    host = Host(monkeypatch)
    warm = warm_up(lambda: host.spend(next(costs_ms)), CPU, **options)
    assert warm.call_ms == warm.queue_ms > 0
    return warm.calls


def test_warm_up_stops_when_three_calls_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert warmed(monkeypatch, itertools.repeat(1.0)) == 3
    assert warmed(monkeypatch, itertools.chain([4.0, 2.0, 1.5], itertools.repeat(1.0))) == 6
    assert warmed(monkeypatch, itertools.chain([1.0, 1.02, 1.04], itertools.repeat(1.05))) == 4


def test_warm_up_ends_with_its_budget_when_calls_never_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert warmed(monkeypatch, itertools.cycle([1.0, 2.0]), budget_ms=30.0) == 20
    assert warmed(monkeypatch, itertools.repeat(1000.0), budget_ms=150.0) == 1


def test_warm_up_with_a_looser_bound_stops_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    assert warmed(monkeypatch, itertools.cycle([1.0, 1.2]), settle=0.3) == 3


def test_what_a_call_takes_to_queue_is_without_the_device_s_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)
    warm = warm_up(lambda: stream.queue(0.5, 2.0), CUDA)
    assert (warm.queue_ms, warm.call_ms) == pytest.approx((0.5, 2.5))
    assert first_hold_ms(warm.call_ms, 6 * warm.queue_ms) == pytest.approx(6.0)
    assert first_hold_ms(warm.call_ms, 100 * warm.queue_ms) == LONGEST_HOLD_MS


# ---- on a simulated stream --------------------------------------------------------------------------------


class Stream(Host):
    """CUDA streams, of which ``main`` is current: the host queues work and goes on, the device does each in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mhz: float = CYCLES_PER_MS / 1e3) -> None:
        super().__init__(monkeypatch)
        self.idle_from_ms: defaultdict[str, float] = defaultdict(float)
        self.current = "main"
        self.holds_ms: list[float] = []
        stream, cycles_per_ms = self, mhz * 1e3

        class Event:
            at_ms = 0.0

            def __init__(self, enable_timing: bool = False) -> None: ...

            def record(self, on: str | None = None) -> None:
                self.at_ms = stream.reached_ms(on)

            def query(self) -> bool:
                return stream.now_ms >= self.at_ms

            def elapsed_time(self, end: Event) -> float:
                return end.at_ms - self.at_ms

        def sleep(cycles: int) -> None:
            self.holds_ms.append(cycles / CYCLES_PER_MS)
            self.queue(0.0, cycles / cycles_per_ms)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait())
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: "main")
        monkeypatch.setattr(torch.cuda, "set_stream", lambda name: setattr(self, "current", name))
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)

    def reached_ms(self, name: str | None = None) -> float:
        """When a stream gets to what is queued on it next."""
        return max(self.idle_from_ms[name or self.current], self.now_ms)

    def queue(self, host_ms: float, device_ms: float) -> None:
        """A launch on the current stream: the host spends ``host_ms`` on it, then the device ``device_ms``."""
        self.now_ms += host_ms
        self.idle_from_ms[self.current] = self.reached_ms() + device_ms

    def wait(self) -> None:
        self.now_ms = max([self.now_ms, *self.idle_from_ms.values()])

    def kernels(self, count: int, host_ms: float, device_ms: float) -> list[Callable[[], Any]]:
        """Calls of three kernels each."""

        def call() -> None:
            for _ in range(3):
                self.queue(host_ms / 3, device_ms / 3)

        return [call] * count


def turn_of(
    calls: list[Callable[[], Any]], *, flush: Callable[[], Any] | None = None, keep: int = -1, **options: Any
) -> Turn:
    return take_turn(calls, device=CUDA, keep=keep, around=Around(rewarm=calls[0], flush=flush), **options)


def test_a_sample_is_device_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)
    turn = turn_of(stream.kernels(5, host_ms=0.3, device_ms=0.01))
    assert turn.ms == pytest.approx([0.01] * 5)
    assert turn.host_us == pytest.approx([300.0] * 5)
    assert (turn.held, turn.discarded) == (True, 0)


def test_without_the_hold_a_sample_would_be_host_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # The control of the test above: the same calls on a stream that nothing holds.
    stream = Stream(monkeypatch)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    turn = turn_of(stream.kernels(5, host_ms=0.3, device_ms=0.01))
    assert min(turn.ms) > 0.2
    assert not turn.held


def test_a_slow_host_is_held_longer_and_its_first_samples_are_thrown_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Stream(monkeypatch)
    turn = turn_of(stream.kernels(5, host_ms=6.0, device_ms=0.5))
    assert turn.ms == pytest.approx([0.5] * 5)
    assert turn.held
    assert turn.discarded == 5
    assert len(stream.holds_ms) == 2
    assert stream.holds_ms[1] > 36.0  # what queueing six calls takes


def test_the_next_turn_of_the_same_calls_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)
    calls = stream.kernels(5, host_ms=6.0, device_ms=0.5)
    first = turn_of(calls)
    second = turn_of(calls, hold_ms=first.next_hold_ms)
    assert (first.discarded, second.discarded, second.held) == (5, 0, True)


def test_a_quick_host_is_not_held_longer_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)
    calls = stream.kernels(5, host_ms=0.02, device_ms=0.5)
    second = turn_of(calls, hold_ms=turn_of(calls).next_hold_ms)
    assert second.held
    assert second.ms == pytest.approx([0.5] * 5)
    assert stream.holds_ms[1] < stream.holds_ms[0]


def test_a_card_below_its_highest_clock_is_held_longer_and_never_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Stream(monkeypatch, mhz=CYCLES_PER_MS / 1e3 / 2)
    assert turn_of(stream.kernels(5, host_ms=0.6, device_ms=0.01)).ms == pytest.approx([0.01] * 5)


def test_a_call_that_synchronises_cannot_be_held_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)

    def synchronising() -> None:
        stream.queue(0.1, 0.5)
        stream.wait()

    turn = turn_of([synchronising] * 4)
    assert not turn.held
    assert len(turn.ms) == 4
    assert turn.ms == pytest.approx([0.6] * 4)  # host time and all
    assert turn.discarded == 4 * (HOLD_ATTEMPTS - 1)
    assert max(stream.holds_ms) <= LONGEST_HOLD_MS


def test_no_hold_is_endless_however_slow_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)
    turn = turn_of(stream.kernels(3, host_ms=1000.0, device_ms=1.0))
    assert not turn.held
    assert max(stream.holds_ms) <= LONGEST_HOLD_MS
    assert turn.next_hold_ms <= LONGEST_HOLD_MS


def test_the_flush_is_outside_the_sample_and_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)
    order: list[str] = []

    def call() -> None:
        order.append("call")
        stream.queue(0.01, 0.5)

    def flush() -> None:
        order.append("flush")
        stream.queue(0.01, 3.0)

    turn = turn_of([call] * 3, flush=flush)
    assert turn.ms == pytest.approx([0.5] * 3)
    assert order == ["call", *["flush", "call"] * 3]


def test_the_result_kept_is_that_of_the_call_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Stream(monkeypatch)
    made: list[int] = []
    assert turn_of(numbered(4, made), keep=2).kept == 2
    assert made == [0, 0, 1, 2, 3]


def test_a_sample_ends_on_the_default_stream_whatever_calls_leave_current(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Stream(monkeypatch)
    stream.current = "idle"

    def call() -> None:
        stream.current = "main"
        stream.queue(0.01, 0.5)
        stream.current = "idle"  # where an event would be reached at once

    assert turn_of([call] * 3).ms == pytest.approx([0.5] * 3)
    assert stream.current == "main"


class Driver(Stream):
    """A stream whose driver keeps 1024 launches: with so many ahead of it, the host waits for the first to end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends_ms: deque[float] = deque(maxlen=1024)
        super().__init__(monkeypatch)

    def queue(self, host_ms: float, device_ms: float) -> None:
        if len(self.ends_ms) == self.ends_ms.maxlen:
            self.now_ms = max(self.now_ms, self.ends_ms[0])
        super().queue(host_ms, device_ms)
        self.ends_ms.append(self.idle_from_ms[self.current])


@pytest.mark.parametrize("at_once", [None, 18])
def test_more_samples_than_the_driver_queues_need_several_holds(
    monkeypatch: pytest.MonkeyPatch, at_once: int | None
) -> None:
    stream = Driver(monkeypatch)
    made: list[int] = []

    def call(number: int) -> int:
        made.append(number)
        stream.queue(0.01, 0.5)
        return number

    def renew() -> None:
        for _ in range(21):
            stream.queue(0.002, 0.01)

    calls = [lambda number=number: call(number) for number in range(50)]
    around = Around(rewarm=lambda: made.append(-1), renew=[renew] * 50, look=lambda result: f"seen {result}")
    turn = take_turn(calls, device=CUDA, keep=40, around=around, at_once=at_once)
    assert turn.held == (at_once is not None)
    assert (turn.kept, turn.seen) == (40, "seen 40")
    if at_once:
        assert turn.ms == pytest.approx([0.5] * 50)
        assert turn.host_us == pytest.approx([10.0] * 50)
        assert made == [-1, *range(18), -1, *range(18, 36), -1, *range(36, 50)]


@pytest.mark.parametrize("place", ["main", "side"])
def test_a_look_sees_what_is_there_when_the_sample_ends(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    stream = Stream(monkeypatch)

    def call() -> float:
        """Waits for the main stream, as it must for its inputs, and answers when its result is there."""
        stream.idle_from_ms[place] = max(stream.idle_from_ms[place], stream.reached_ms("main"))
        stream.current = place
        stream.queue(0.01, 0.5)
        return stream.idle_from_ms[place]

    around = Around(look=lambda ready_ms: stream.reached_ms() >= ready_ms)
    turn = take_turn([call] * 3, device=CUDA, keep=1, around=around)
    assert turn.ms == pytest.approx([0.5] * 3 if place == "main" else [0.0] * 3)
    assert turn.seen == (place == "main")


def test_clocks_are_read_while_the_samples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)
    seen: list[bool] = []

    def read_during(done: Callable[[], bool]) -> Clocks:
        seen.append(done())
        stream.wait()
        seen.append(done())
        return Clocks(sm_mhz=1700)

    turn = turn_of(stream.kernels(3, 0.01, 0.5), clocks=SimpleNamespace(read_during=read_during))
    assert turn.clocks.sm_mhz == 1700
    assert seen == [False, True]


def test_a_flush_overwrites_twice_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**16)
    )
    flush = CacheFlush(CPU)
    flush._buffer.fill_(7)
    flush()
    assert flush._buffer.nbytes == 2**17
    assert not flush._buffer.any()
