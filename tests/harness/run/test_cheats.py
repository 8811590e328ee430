"""Ways to be fast without attending: whoever tries one is judged wrong, or its samples are those of the work.

The implementations live in this process. Work takes a sleep, so a sample shorter than that is one without work.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnbench.harness import registry
from attnbench.harness.contract import Capabilities, Device, Implementation, Prepared
from attnbench.harness.measure import timing
from attnbench.harness.problem import Direction, Problem
from attnbench.harness.run import solver as solver_module
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.referee import Referee
from attnbench.harness.run.solver import Solver
from attnbench.harness.run.symmetry import Renewed
from attnbench.harness.run.worker import Refusal

WORK_MS = 3.0
ROUNDS, SAMPLES = 4, 5
Tensors = tuple[torch.Tensor, ...]


class Cheat:
    """An implementation by the book, for others to depart from: all of its work is in three methods."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return Attend.apply(self, q, k, v)

    def out(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bhij,bjhd->bihd", self.weights(q, k), v)

    def weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        time.sleep(WORK_MS / 1e3)
        return torch.einsum("bihd,bjhd->bhij", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)

    def grads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> Tensors:
        p = self.weights(q, k)
        dp = torch.einsum("bihd,bjhd->bhij", dout, v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        dq, dk = torch.einsum("bhij,bjhd->bihd", ds, k), torch.einsum("bhij,bihd->bjhd", ds, q)
        return dq, dk, torch.einsum("bhij,bihd->bjhd", p, dout)


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cheat: Cheat, *operands: torch.Tensor) -> torch.Tensor:
        ctx.cheat = cheat
        ctx.save_for_backward(*operands)
        return cheat.out(*operands)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        return (None, *ctx.cheat.grads(*ctx.saved_tensors, dout))


class Remembers(Cheat):
    """Answers from memory where ``key`` of the operands is one that it has seen; most: how many it remembers."""

    def __init__(self, key: Callable[[Tensors], Any], most: int = 1000) -> None:
        self._key, self._most, self._known = key, most, {}  # type: ignore[var-annotated]

    def _recalled(self, operands: Tensors, work: Callable[[], Any]) -> Any:
        key = len(operands), self._key(operands)
        if key not in self._known:
            self._known[key] = work(), operands  # held, so that their addresses are not given to others
            while len(self._known) > self._most:
                del self._known[next(iter(self._known))]
        return self._known[key][0]

    def out(self, *operands: torch.Tensor) -> torch.Tensor:
        return self._recalled(operands, lambda: Cheat.out(self, *operands)).clone()

    def grads(self, *operands: torch.Tensor) -> Tensors:
        grads = self._recalled(operands, lambda: Cheat.grads(self, *operands))
        return tuple(grad.clone() for grad in grads)


class RemembersWeights(Remembers):
    def weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return self._recalled((q, k), lambda: Cheat.weights(self, q, k))

    out, grads = Cheat.out, Cheat.grads


def address(operands: Tensors) -> Any:
    return tuple(operand.data_ptr() for operand in operands)


def version(operands: Tensors) -> Any:
    return address(operands), tuple(operand._version for operand in operands)


def contents(operands: Tensors) -> Any:
    return tuple(operand.numpy().tobytes() for operand in operands)


class Lazy(torch.Tensor):
    """Works its elements out when somebody asks for them."""

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            done = [one.work() if isinstance(one, Lazy) else one for one in arguments]
            return function(*done, **options or {})


class AnswersWhenAsked(Cheat):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        operands = q.clone(), k.clone(), v.clone()  # which may be others by then
        lazy = torch.empty_like(q).as_subclass(Lazy)
        lazy.work = functools.cache(lambda: self.out(*operands))  # type: ignore[attr-defined]
        return lazy


class AnswersLater(Cheat):
    """Gives back memory that it fills in when it is called again, or from a thread of its own."""

    def __init__(self, *, thread: bool) -> None:
        self._thread, self._due = thread, lambda: None  # type: ignore[var-annotated]

    def out(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self._due()
        given, operands = torch.zeros_like(q), (q.clone(), k.clone(), v.clone())
        self._due = lambda: given.copy_(Cheat.out(self, *operands))  # type: ignore[assignment, return-value]
        if self._thread:
            threading.Thread(target=self._due).start()
            self._due = lambda: None
        return given


class SumsOverRowsLater(Cheat):
    """dK and dV, of which no timed call's are compared with the oracle, are left to the next call; dQ is there."""

    def __init__(self) -> None:
        self._due: list[Tensors] = []

    def grads(self, *operands: torch.Tensor) -> Tensors:
        for place, due in self._due:
            place.copy_(due)
        dq, *others = super().grads(*operands)
        given = [torch.zeros_like(one) for one in others]
        self._due = list(zip(given, others, strict=True))
        return dq, *given


class WritesOverItsAnswer(Cheat):
    """Saves itself the memory of a new result."""

    def out(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = super().out(q, k, v)
        self.place = getattr(self, "place", torch.empty_like(found)).copy_(found)
        return self.place


class Spins(Cheat):
    """Its work is on the device: a spin of about ``WORK_MS``, and no sleep of the host."""

    def weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(int(WORK_MS * timing.CYCLES_PER_MS))
        return torch.einsum("bihd,bjhd->bhij", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)


class LeavesWorkToAStream(Spins):
    """Waits for its inputs on a stream of its own, and lets nobody wait for its results."""

    def out(self, *operands: torch.Tensor) -> torch.Tensor:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            return super().out(*operands)


class LeavesAnotherStreamCurrent(Spins):
    def out(self, *operands: torch.Tensor) -> torch.Tensor:
        torch.cuda.set_stream(torch.cuda.default_stream())
        found = super().out(*operands)
        torch.cuda.set_stream(torch.cuda.Stream())
        return found


class SetsTheClockBack(Cheat):
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = time.perf_counter
        monkeypatch.setattr(time, "perf_counter", lambda: real() / 100)


class Posed(Implementation):
    contract = 1
    capabilities = Capabilities(devices=("cpu", "cuda"), dtypes=("fp32",), masks=("full",))

    def __init__(self, cheat: Cheat) -> None:
        self.name, self._cheat = "cheat", cheat

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        return Prepared(self._cheat.attend)


def plan(direction: Direction) -> GroupPlan:
    problem = Problem(batch=1, heads=8, seqlen_q=64, head_dim=16, dtype="fp32", direction=direction)
    return GroupPlan("s", "c", "w", problem.group_key, (problem,), ("cheat",), "normal", 3)


def probes_on(device: str, folder: Path) -> list[str]:
    found: list[str] = Referee(device).do_oracle(plan("fwd_bwd").to_json(), str(folder))["probes"]
    return found


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return probes_on("cpu", tmp_path_factory.mktemp("oracle"))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, probes: list[str]) -> Callable[..., tuple[bool, list[float]]]:
    def timed(
        cheat: Cheat,
        direction: Direction = "fwd",
        slots: int = 3,
        device: str = "cpu",
        probes: list[str] = probes,
        mode: str = "cold",
    ) -> tuple[bool, list[float]]:
        """Whether every answer that was looked at is right, and the samples of all rounds."""
        monkeypatch.setattr(registry, "load", lambda name: Posed(cheat))
        posed, solver, samples = plan(direction), Solver("cheat", device), []
        solver.do_hello()
        try:
            solver.do_prepare(posed.to_json(), posed.problems[0].key)
            for _ in range(ROUNDS):
                turn = solver.do_turn(posed.problems[0].key, probes[:slots], SAMPLES, 1e9, mode, True)
                samples += turn["ms"]
                if not all(tensor["ok"] for tensor in turn["judgement"]["tensors"].values()):
                    return False, samples
        except Refusal:
            return False, samples
        return True, samples

    return timed


def honest(answers: tuple[bool, list[float]]) -> bool:
    right, samples = answers
    return right and min(samples) >= WORK_MS


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd_bwd"])
def test_work_that_is_done_is_right_and_takes_its_time(timed: Any, direction: Direction, slots: int) -> None:
    assert honest(timed(Cheat(), direction, slots))


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd_bwd"])
def test_a_memory_by_address_is_judged_wrong(timed: Any, direction: Direction, slots: int) -> None:
    right, _ = timed(Remembers(address), direction, slots)
    assert not right


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("key", [version, contents])
@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd_bwd"])
def test_a_memory_that_looks_closer_never_has_the_answer(
    timed: Any, key: Any, direction: Direction, slots: int
) -> None:
    assert honest(timed(Remembers(key), direction, slots))


def test_the_last_answer_is_not_that_of_the_next_sample(timed: Any) -> None:
    assert honest(timed(Remembers(address, most=1)))


def test_where_one_set_of_inputs_fits_the_last_answer_is_wrong(timed: Any) -> None:
    right, _ = timed(Remembers(address, most=1), slots=1)
    assert not right


def test_remembered_weights_belong_to_another_plane(timed: Any) -> None:
    right, _ = timed(RemembersWeights(address))
    assert not right


@pytest.mark.parametrize("key", [address, version, contents])
def test_without_new_inputs_a_memory_would_be_right_and_fast(
    timed: Any, monkeypatch: pytest.MonkeyPatch, key: Any
) -> None:
    monkeypatch.setattr(Renewed, "renew", lambda renewed: None)
    right, samples = timed(Remembers(key))
    assert right
    assert min(samples) < WORK_MS


@pytest.mark.parametrize(
    "cheat",
    [AnswersWhenAsked(), AnswersLater(thread=False), AnswersLater(thread=True)],
    ids=["lazy", "call", "thread"],
)
def test_an_answer_that_is_not_there_when_its_sample_ends_is_refused(timed: Any, cheat: Cheat) -> None:
    right, _ = timed(cheat)
    assert not right


@pytest.mark.parametrize(
    ("cheat", "direction"), [(SumsOverRowsLater(), "bwd"), (WritesOverItsAnswer(), "fwd")]
)
def test_results_that_change_after_their_sample_are_refused(
    timed: Any, monkeypatch: pytest.MonkeyPatch, cheat: Cheat, direction: Direction
) -> None:
    assert not timed(cheat, direction)[0]
    monkeypatch.setattr(solver_module, "refuse_unfinished", lambda *_: None)
    assert timed(cheat, direction)[
        0
    ]  # nothing else sees it: each answer was right when it was looked at, or not compared


def test_a_clock_that_a_plugin_sets_back_is_not_ours(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert honest(timed(SetsTheClockBack(monkeypatch)))
    assert timing.perf_counter is not time.perf_counter


def test_calls_that_are_weighed_for_energy_look_like_new_ones_too(
    timed: Any, monkeypatch: pytest.MonkeyPatch, probes: list[str]
) -> None:
    made: list[float] = []

    def energy_of(calls: list[Callable[[], Any]], *_: Any) -> None:
        for call in calls * 2:
            begin = time.perf_counter()
            call()
            made.append((time.perf_counter() - begin) * 1e3)

    monkeypatch.setattr(solver_module, "energy_of", energy_of)
    for direction in ("fwd", "bwd", "fwd_bwd"):
        cheat = Remembers(version)
        monkeypatch.setattr(registry, "load", lambda name, cheat=cheat: Posed(cheat))
        posed, solver = plan(direction), Solver("cheat", "cpu")
        solver.do_hello()
        solver.do_prepare(posed.to_json(), posed.problems[0].key)
        solver.do_energy(posed.problems[0].key, probes, "cold")
    assert len(made) == 18
    assert min(made) >= WORK_MS


def test_the_record_of_a_turn_says_that_its_inputs_were_new(
    monkeypatch: pytest.MonkeyPatch, probes: list[str]
) -> None:
    monkeypatch.setattr(registry, "load", lambda name: Posed(Cheat()))
    posed, solver = plan("fwd"), Solver("cheat", "cpu")
    solver.do_hello()
    solver.do_prepare(posed.to_json(), posed.problems[0].key)
    turn = solver.do_turn(posed.problems[0].key, probes[:1], SAMPLES, 100.0, "cold", False)
    assert (turn["inputs"], turn["renewed"]) == (1, True)


# ---- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cold", "hot", "cold+graph"])
def test_on_a_gpu_work_takes_its_time_and_a_memory_is_wrong(timed: Any, tmp_path: Path, mode: str) -> None:
    here = {"device": "cuda:0", "probes": probes_on("cuda:0", tmp_path), "mode": mode}
    for direction in ("fwd", "bwd", "fwd_bwd"):
        right, samples = timed(Spins(), direction, **here)
        assert right
        assert (
            min(samples) > WORK_MS / 2
        )  # the spin counts cycles of a clock that may be higher than was assumed
        assert not timed(Remembers(address), direction, **here)[0]


@pytest.mark.gpu
def test_on_a_gpu_work_is_in_the_sample_or_not_in_the_answer(timed: Any, tmp_path: Path) -> None:
    here = {"device": "cuda:0", "probes": probes_on("cuda:0", tmp_path)}
    assert not timed(LeavesWorkToAStream(), **here)[0]
    right, samples = timed(LeavesAnotherStreamCurrent(), **here)
    assert right
    assert min(samples) > WORK_MS / 2
