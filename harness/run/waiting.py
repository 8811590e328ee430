"""Waiting for other threads so that Ctrl-C is heard at once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

# A signal that comes after the main thread last looked for one and before it sleeps on a lock is not seen until the
# lock is free: in tests on two busy cores that was the whole 30 s limit of a request. A system may also hand the
# signal of a terminal to another thread, which wakes nobody. So whoever waits here, or for a message, sleeps in short
# pieces.
LOOK_EVERY_S = 0.1


def wait_for_all(futures: Iterable[Future[Any]]) -> None:
    """Returns when all have ended; raises the first exception among them when it comes, without waiting for others."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=LOOK_EVERY_S, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
