"""Draws figures side by side: each takes a second or two of one core, and none needs another.

The processes come from a server that imports what figures need while the caller still reads the records. Where cores
are few, starting them costs what they save: figures are then drawn here, one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnbench.harness.report.plots import Plot

FEW_CORES = 3
MOST_PROCESSES = 8

Encoded = list[dict[str, bytes]]
"""The bytes of each figure by format."""
Drawing = Callable[[], Encoded]
"""Waits for figures that were begun."""


@contextmanager
def drawing(processes: int | None = None) -> Iterator[Callable[[Sequence[Plot]], Drawing]]:
    """Gives a function that begins to draw figures as SVG and PNG. processes: None for as many as there are cores to
    spare; with one or none, figures are drawn here, when they are waited for.
    """
    if processes is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = min(cores - 1, MOST_PROCESSES) if cores > FEW_CORES else 1
    if processes <= 1:
        yield lambda figures: lambda: [_encoded(figure) for figure in figures]
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attnbench.harness.report.plots"])
    pool = ProcessPoolExecutor(processes, context, _leave_interrupts)
    try:
        pool.submit(os.getpid)  # starts the server

        def begin(figures: Sequence[Plot]) -> Drawing:
            begun = [pool.submit(_encoded, figure) for figure in figures]
            return lambda: [future.result() for future in begun]

        yield begin
    finally:
        pool.shutdown(cancel_futures=True)


def _encoded(figure: Plot) -> dict[str, bytes]:
    return figure.encode("svg", "png")


def _leave_interrupts() -> None:
    """Ctrl-C is for the process that waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
