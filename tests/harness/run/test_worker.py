"""The worker's side: what a failed request leaves behind."""

from __future__ import annotations

import gc
import socket
import weakref
from pathlib import Path

from attnbench.harness.measure.capture import CaptureFailed
from attnbench.harness.run.channel import Channel, Message
from attnbench.harness.run.process import Worker
from attnbench.harness.run.worker import failure, serve


class Buffer:
    """Stands for a tensor: seen by weak reference, so that it is known when it is gone."""


def test_what_a_failed_request_held_is_given_back_before_the_answer() -> None:
    held: list[weakref.ref[Buffer]] = []

    def operation() -> Message:
        buffer = Buffer()
        held.append(weakref.ref(buffer))
        error = RuntimeError("out of memory")
        cycle = [error, buffer]  # the frame holds the exception whose traceback holds the frame
        raise error from RuntimeError(str(len(cycle)))

    here, there = socket.socketpair()
    with here, there:
        asking = Channel(here)
        asking.send({"op": "fail"})
        asking.send({"op": "quit"})
        gc.disable()  # so that only the worker's own collection can free the cycle
        try:
            serve(Channel(there), lambda _: operation)
            given_back = held[0]() is None
        finally:
            gc.enable()
        reply = asking.receive(1)
    assert (reply["ok"], reply["status"]) == (False, "OOM")
    assert given_back


def test_a_failure_says_its_kind_in_one_line_and_keeps_the_end_of_the_traceback() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        told = failure(error)
    assert (told["status"], told["reason"], told["fatal"]) == ("ERROR", "ValueError: first", False)
    assert told["evidence"].endswith("ValueError: first\nsecond\n")


def test_a_torch_that_does_not_import_is_an_error_and_no_word_of_the_plugin_s(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    worker = Worker("standard", "cpu", tmp_path, path=[str(tmp_path)])
    try:
        worker.ask("hello")
        reply = worker.answer(60)
    finally:
        worker.kill()
    assert (reply["ok"], reply["status"]) == (False, "ERROR")
    assert reply["reason"].startswith("ImportError: libcudart.so.13")
    assert "torch.py" in reply["evidence"]


def test_a_process_whose_capture_failed_is_of_no_further_use() -> None:
    assert failure(CaptureFailed("cannot be captured in a CUDA graph: why"))["fatal"]
    assert not failure(RuntimeError("why"))["fatal"]
