"""The checks that need CUDA graphs and streams, before stand-ins of them on a CPU: what can be tried without a GPU.

A capture runs the operators and notes them, each with its arguments and results; a replay runs them again in order and
writes what they return into the results of the first time. So what Python computed from a value is kept as it was,
random numbers are drawn anew from torch's generator, and memory stays where it is: as in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnbench.harness.conform import examiner as examiners
from attnbench.harness.conform.case import Case
from attnbench.harness.conform.checks import load
from attnbench.harness.conform.examiner import Examiner
from attnbench.harness.conform.posed import Posed, Wrong
from attnbench.harness.conform.referee import solve
from attnbench.harness.contract import Device, Implementation, Prepared
from attnbench.harness.masks import Mask
from attnbench.harness.measure.capture import WARM_UPS, CaptureFailed, record
from attnbench.harness.problem import DIRECTIONS, Direction, Problem
from attnbench.impls.standard import Standard
from attnbench.impls.tiled import fa2

CPU = Device("cpu")
PROBLEM = Problem(1, 2, 20, 8, seqlen_k=24, dtype="fp32", mask=Mask.causal())
DIRECTIONS_ASKED = [direction for direction in DIRECTIONS if direction != "bwd"]


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.recording = _Recording()

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.recording.calls:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


class Stream:
    """Stands in for torch.cuda.Stream. on: those that are current, the innermost last."""

    on: list[Stream] = []  # noqa: RUF012 - one for all

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    Stream.on.append(stream)
    try:
        yield
    finally:
        Stream.on.pop()


class Capture:
    """Stands in for torch.cuda.graph. ends_badly: an error that ends a capture in which something raised, as CUDA's."""

    ends_badly = "CUDA error: operation failed due to a previous error during capture"
    streams: list[Stream] = []  # noqa: RUF012 - one for all: on which captures were made

    def __init__(self, graph: Graph, stream: Stream) -> None:
        self._graph = graph
        self.streams.append(stream)

    def __enter__(self) -> None:
        self._graph.recording.__enter__()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._graph.recording.__exit__(kind, error, trace)
        if error is not None:
            raise RuntimeError(self.ends_badly)


def install(patch: pytest.MonkeyPatch) -> None:
    """Puts the stand-ins where torch.cuda has the real ones."""
    for name, value in {
        "CUDAGraph": Graph, "graph": Capture, "Stream": Stream, "stream": _stream, "current_stream": Stream,
        "synchronize": lambda *_: None, "_sleep": lambda *_: None,
    }.items():  # fmt: skip
        patch.setattr(torch.cuda, name, value)


class OnCuda:
    """A case posed on the CPU that tells a check it is on a GPU."""

    def __init__(self, posed: Posed) -> None:
        self._posed = posed
        self.device = SimpleNamespace(type="cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._posed, name)


# ---- the checks ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def case(check: str, direction: Direction, dropout_p: float = 0.0) -> Case:
    problem = dataclasses.replace(PROBLEM, direction=direction, dropout_p=dropout_p)
    return Case(problem, "c", "a test", suite="s", check=check)


def put(implementation: Implementation, asked: Case) -> None:
    """Raises what the check raises."""
    oracle = None if asked.problem.dropout_p else solve(asked, torch.device("cpu"))
    load(asked.check)(OnCuda(Posed(asked, implementation, CPU, oracle)))  # type: ignore[arg-type]


class Changed(Standard):
    """``standard``, whose q, k and v go through ``change`` first."""

    def change(self, q: Any, k: Any, v: Any) -> Any:
        return q, k, v

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        right = super().prepare(problem, device)
        return Prepared(lambda q, k, v: right.attend(*self.change(q, k, v)))


class KeepsANumber(Changed):
    """Right when called; in a graph, what it read from V at the capture stays."""

    def change(self, q: Any, k: Any, v: Any) -> Any:
        return q, k, v + (float(v.detach().sum()) - v.detach().sum())


class ReadsLate(Changed):
    """Right on the default stream alone."""

    def change(self, q: Any, k: Any, v: Any) -> Any:
        return q, k, v * (0.5 if Stream.on else 1.0)


class SeedOnTheHost(Standard):
    """Draws a seed as a number, and from it a mask by arithmetic: another at every call, but not at every replay."""

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        seen = problem.mask.dense(
            torch.arange(problem.seqlen_q), problem.heads, problem.seqlen_q, problem.seqlen_k
        )

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            seed = int(torch.randint(1 << 20, ()))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.softmax_scale
            p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            noise = ((torch.arange(p.numel()) + seed) * 2654435761 % 1000).view(p.shape)
            kept = (noise >= 1000 * problem.dropout_p) / (1 - problem.dropout_p)
            return torch.einsum("bhqk,bkhd->bqhd", p * kept, v)

        return Prepared(attend)


class Synchronises(Changed):
    """Does in a capture what none allows."""

    def change(self, q: Any, k: Any, v: Any) -> Any:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise ValueError("operation not permitted when stream is capturing")
        return q, k, v


@pytest.mark.parametrize("direction", DIRECTIONS_ASKED)
@pytest.mark.parametrize("check", ["graph_replay", "side_streams"])
@pytest.mark.parametrize("implementation", [Standard(), fa2], ids=lambda one: one.name)
def test_right_ones_pass(implementation: Implementation, check: str, direction: Direction) -> None:
    put(implementation, case(check, direction))


@pytest.mark.parametrize("direction", DIRECTIONS_ASKED)
def test_a_replay_with_a_number_of_the_capture_is_seen(direction: Direction) -> None:
    put(KeepsANumber(), case("agrees", direction))
    with pytest.raises(Wrong, match=r"^in a replay of a CUDA graph, out\["):
        put(KeepsANumber(), case("graph_replay", direction))


def test_a_kernel_on_the_wrong_stream_is_seen() -> None:
    put(ReadsLate(), case("agrees", "fwd"))
    with pytest.raises(Wrong, match=r"^on a side stream, in round 1, out\["):
        put(ReadsLate(), case("side_streams", "fwd"))


@pytest.mark.parametrize("direction", DIRECTIONS_ASKED)
def test_replays_that_draw_anew_pass(direction: Direction) -> None:
    put(Standard(), case("dropout_graphs", direction, 0.3))


@pytest.mark.parametrize("direction", DIRECTIONS_ASKED)
def test_a_seed_that_stays_in_the_graph_is_seen(direction: Direction) -> None:
    put(SeedOnTheHost(), case("dropout_agrees", direction, 0.3))
    with pytest.raises(Wrong, match="two replays of a CUDA graph drop the same weights"):
        put(SeedOnTheHost(), case("dropout_graphs", direction, 0.3))


def test_what_is_recorded_is_made_and_warmed_up_on_the_stream_of_the_recording() -> None:
    seen: list[list[Stream]] = []

    def make() -> Any:
        seen.append(list(Stream.on))
        return lambda: seen.append(list(Stream.on))

    record(make)
    assert len(seen) == 1 + WARM_UPS + 1
    assert all(on == [Capture.streams[-1]] for on in seen[: 1 + WARM_UPS])


def test_a_capture_that_fails_tells_its_first_error() -> None:
    with pytest.raises(CaptureFailed) as caught:
        put(Synchronises(), case("graph_replay", "fwd_bwd"))
    assert str(caught.value.__cause__) == "operation not permitted when stream is capturing"


def test_a_process_whose_capture_failed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = case("graph_replay", "fwd")

    def examine(*_: Any) -> None:
        put(Synchronises(), asked)

    monkeypatch.setattr(examiners, "examine", examine)
    examiner = Examiner("standard", "cpu")
    examiner._implementation = Synchronises()
    reply = examiner.do_examine(asked.to_json(), oracle="")
    assert (reply["verdict"], reply["fatal"]) == ("ERROR", True)
    assert reply["reason"] == "ValueError: operation not permitted when stream is capturing"
