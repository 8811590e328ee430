from __future__ import annotations

import _thread
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from attnbench.harness.run.waiting import wait_for_all


def test_all_have_ended() -> None:
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(abs, number) for number in (-1, -2, -3)]
        wait_for_all(futures)
        assert [future.result() for future in futures] == [1, 2, 3]


def test_nothing_to_wait_for() -> None:
    wait_for_all([])


def test_a_failure_comes_before_the_others_end() -> None:
    others = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(others.wait, 60)
        with pytest.raises(ZeroDivisionError):
            wait_for_all([waiting, pool.submit(divmod, 1, 0)])
        assert not waiting.done()
        others.set()


def test_an_interrupt_that_wakes_no_thread_is_heard() -> None:
    # interrupt_main marks the signal as come and interrupts no system call, as one that comes at the wrong moment.
    others, done_before = threading.Event(), True
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(others.wait, 60)
        threading.Timer(0.3, _thread.interrupt_main).start()
        try:
            with pytest.raises(KeyboardInterrupt):
                wait_for_all([waiting])
            done_before = waiting.done()
        finally:
            others.set()
    assert not done_before
