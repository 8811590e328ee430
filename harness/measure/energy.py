"""Joules of a call: the card's own energy counter over calls that follow one another for seconds.

The counter of a GPU (NVML, since Volta) moves in steps of tens of milliseconds, so a window holds many of them: two
seconds are known to about two percent. It counts the whole card, idle power included. A CPU has no such reading here.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnbench.harness.measure.clocks import ClockReader
from attnbench.harness.measure.timing import Call

WINDOW_S = 2.0
BATCH_S = 0.05
"""Calls are queued for about so long before the device is waited for: it is never idle, and the queue never fills."""


@dataclass(frozen=True)
class Energy:
    """What the counter moved by, over how many calls and seconds."""

    joules: float
    calls: int
    seconds: float


def energy_of(
    calls: Sequence[Call],
    call_ms: float,
    device: torch.device,
    reader: ClockReader | None,
    window_s: float = WINDOW_S,
) -> Energy | None:
    """Runs ``calls`` in turn for at least ``window_s``; None where the card counts no energy. call_ms: what one takes,
    about."""
    if reader is None or reader.energy_j() is None:
        return None
    batch = max(1, round(1e3 * BATCH_S / max(call_ms, 1e-3)))
    rotation = itertools.cycle(calls)
    torch.cuda.synchronize(device)
    first, begin, made = reader.energy_j(), time.perf_counter(), 0
    marker = torch.cuda.Event()
    while time.perf_counter() - begin < window_s:
        for _ in range(batch):
            next(rotation)()
        made += batch
        marker.synchronize()  # of the batch before: one is always queued behind the one that runs
        marker.record()
    torch.cuda.synchronize(device)
    seconds, last = time.perf_counter() - begin, reader.energy_j()
    return None if first is None or last is None else Energy(last - first, made, seconds)
