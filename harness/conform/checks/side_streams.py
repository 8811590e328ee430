"""On streams other than the default, several at once, beside work on the default one: the same answers.

A kernel launched on the wrong stream reads inputs before they are there, or leaves its answer late.
"""

from __future__ import annotations

import torch

from attnbench.harness.conform.posed import Declined, Posed

STREAMS = 3
BUSY_CYCLES = 50_000_000
"""The default stream spins for some 30 ms: all calls are over before it is."""


def check(posed: Posed) -> None:
    if posed.device.type != "cuda":
        raise Declined("there are no streams on this device")
    source = posed.inputs()
    posed.hold(posed.answer(source))  # compiled, and right on the default stream
    posed.synchronize()
    streams = [torch.cuda.Stream(posed.device) for _ in range(STREAMS)]
    for number in range(posed.option("rounds")):
        torch.cuda._sleep(BUSY_CYCLES)  # noqa: SLF001 - torch's own spin kernel, used by its tests
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(BUSY_CYCLES // 50)  # noqa: SLF001 - inputs are written late on this stream
                found.append(posed.answer(posed.inputs()))
        for stream in streams:
            stream.synchronize()
        for got in found:
            posed.hold(got, f"on a side stream, in round {number + 1}, ")
        posed.synchronize()
