"""A mask follows from torch's generator: one state, one mask; the next call, another."""

from __future__ import annotations

import torch

from attnbench.harness.conform.posed import Posed


def check(posed: Posed) -> None:
    inputs = posed.inputs()

    def call() -> torch.Tensor:
        return posed.forward(inputs)["out"]

    state = posed.state()
    first, second = call(), call()
    state.restore()
    again = call()
    if not torch.equal(first, again):
        posed.fail(
            "two calls from one generator state differ: their dropout does not follow torch's generator"
        )
    if torch.equal(first, second):
        posed.fail("two calls in a row drop the same weights: the generator's state is not advanced")
    posed.state(seed=1)
    if torch.equal(first, call()):
        posed.fail("two generator states give the same mask")
