"""Call after call with the same inputs: bit for bit the same where that is declared, within the budget everywhere.

A race, or memory read before it is written, shows in one call of hundreds. Between calls the allocator is kept busy: a
call that leans on what happens to lie in fresh memory meets other values each time.
"""

from __future__ import annotations

import torch

from attnbench.harness.conform.posed import Posed, Tensors

FILLS = (float("nan"), float("inf"), 0.0, -3e4, 1.0)
"""What fresh memory holds in turn."""
PIECES = 6


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    first = posed.answer(inputs)
    posed.hold(first)
    declared = posed.implementation.repeats(posed.where)
    exact = [name for name in first if ("fwd" if name == "out" else "bwd") in declared]
    for number in range(1, posed.option("repeats")):
        if posed.option("pressure"):
            _disturb(posed, number)
        again = posed.answer(inputs)
        for name in exact:
            if not torch.equal(again[name], first[name]):
                _differs(posed, name, first, again, number)
        if rest := {name: tensor for name, tensor in again.items() if name not in exact}:
            posed.hold(rest, f"in call {number + 1}, ")


def _differs(posed: Posed, name: str, first: Tensors, again: Tensors, number: int) -> None:
    difference = (again[name].double() - first[name].double()).abs().nan_to_num(nan=torch.inf)
    place = [int(index) for index in torch.unravel_index(difference.argmax(), difference.shape)]
    changed = int((again[name] != first[name]).sum())
    posed.fail(
        f"{name} of call {number + 1} differs from that of call 1 in {changed} elements, most at {place}: "
        f"{again[name][tuple(place)].item():.6g} after {first[name][tuple(place)].item():.6g}",
        tensor=name,
        call=number + 1,
        changed=changed,
    )


def _disturb(posed: Posed, number: int) -> None:
    """Leaves blocks of the results' sizes, and of odd ones between, full of one value in the allocator's hands."""
    fill, problem = FILLS[number % len(FILLS)], posed.problem
    elements = problem.batch * problem.seqlen_q * problem.heads * problem.head_dim_v
    held = [
        torch.full((max(1, elements * (1 + (number + piece) % 3) + piece),), fill, device=posed.device)
        for piece in range(PIECES)
    ]
    del held[::2]
    del held
