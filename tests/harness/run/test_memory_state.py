"""Checksums of inputs: what is written into them shows, wherever it lands and whatever it is exchanged for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from attnbench.harness.oracle.inputs import Inputs, make_inputs
from attnbench.harness.problem import Problem
from attnbench.harness.run import memory_state
from attnbench.harness.run.memory_state import checksums, poison

CPU = torch.device("cpu")


def inputs(dtype: str = "fp32", layout: str = "bshd") -> Inputs:
    problem = Problem(2, 3, 17, 8, dtype=dtype, layout=layout, direction="fwd_bwd")
    return make_inputs(problem, 1, CPU, dout=True)


def seen(change: Callable[[torch.Tensor], object], dtype: str = "fp32", layout: str = "bshd") -> list[str]:
    """Names of the tensors that look changed after k was."""
    posed = inputs(dtype, layout)
    before = checksums(posed)
    change(posed.k)
    after = checksums(posed)
    return [name for name in before if before[name] != after[name]]


def exchange(x: torch.Tensor, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    x[one], x[other] = x[other].clone(), x[one].clone()


def step(x: torch.Tensor, place: int, by: int) -> None:
    """The bits of one element, as an integer, up or down."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    x.view(bits).view(-1)[place] += by


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "one element": lambda k: k[1, 3, 2, 5].add_(1),
    "one sign": lambda k: k[0, 0, 0, 0].neg_(),
    "two signs": lambda k: k[0, 0, 0, :2].neg_(),
    "all signs": lambda k: k.neg_(),
    "two elements exchanged": lambda k: exchange(k, (0, 0, 0, 0), (1, 16, 2, 7)),
    "neighbours exchanged": lambda k: exchange(k, (0, 4, 1, 3), (0, 4, 1, 4)),
    "rows exchanged": lambda k: k.copy_(k.roll(1, 1)),
    "heads exchanged": lambda k: k.copy_(k.flip(2)),
    "batches exchanged": lambda k: k.copy_(k.flip(0)),
    "one up, one down": lambda k: (step(k, 0, 1), step(k, 9, -1)),
    "scaled": lambda k: k.mul_(0.5),
    "zeroed": lambda k: k.zero_(),
}  # fmt: skip


@pytest.mark.parametrize("pieces", [1 << 21, 50], ids=["whole", "pieces"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_shows_in_its_tensor_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, pieces: int
) -> None:
    monkeypatch.setattr(memory_state, "PIECE_ELEMENTS", pieces)
    assert seen(CHANGES[name], dtype) == ["k"]


def test_a_plain_sum_would_not_see_an_exchange() -> None:
    posed = inputs()
    before = posed.k.view(torch.int32).sum()
    CHANGES["two elements exchanged"](posed.k)
    assert posed.k.view(torch.int32).sum() == before


def test_nothing_written_nothing_seen() -> None:
    for layout in ("bshd", "bhsd", "packed"):
        assert seen(lambda k: None, layout=layout) == []
        assert seen(CHANGES["two elements exchanged"], layout=layout) == ["k"]


def test_what_a_tensor_holds_counts_and_not_how_it_lies() -> None:
    assert checksums(inputs()) == checksums(inputs(layout="bhsd"))


def test_empty_tensors_have_a_sum_too() -> None:
    problem = Problem(1, 1, 4, 8, seqlen_k=0, dtype="fp32")
    assert checksums(make_inputs(problem, 1, CPU, dout=False))["k"] == 0


def test_poison_leaves_nan_for_the_next_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    full = torch.full

    def noting(*arguments: object, **options: object) -> torch.Tensor:
        made.append(full(*arguments, **options))  # type: ignore[call-overload]
        return made[-1]

    monkeypatch.setattr(torch, "full", noting)
    problem = Problem(2, 3, 17, 8, dtype="fp32", direction="bwd")
    poison(problem, CPU)
    assert sorted(x.numel() for x in made) == sorted([2 * 3 * 17, *[math.prod(problem.q_shape)] * 4])
    assert all(x.isnan().all() for x in made)
