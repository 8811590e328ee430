"""What a call returned stays as it was: later calls do not write over it, and it shares no input's memory.

A workspace that is handed out as the result, or a result cached by shape, is right until the next call.
"""

from __future__ import annotations

import torch

from attnbench.harness.conform.posed import Posed, Tensors
from attnbench.harness.oracle.inputs import Inputs


def check(posed: Posed) -> None:
    inputs, others = posed.inputs(), posed.inputs(seed=1)
    posed.answer(others)
    got = posed.answer(inputs)
    posed.hold(got, "after a call with other inputs, ")
    copies = {name: tensor.clone() for name, tensor in got.items()}
    if shared := _shared(got, inputs):
        posed.fail(f"{shared[0]} lies in the memory of {shared[1]}")
    posed.answer(others)
    if posed.problem.direction == "fwd":
        posed.forward_with_lse(others)
    posed.synchronize()
    if changed := [name for name in got if not torch.equal(got[name], copies[name])]:
        posed.fail(
            f"a second call, with other inputs, writes over {changed[0]} of the first", tensor=changed[0]
        )
    posed.hold(posed.answer(posed.inputs()), "after a call with other inputs, ")


def _shared(got: Tensors, inputs: Inputs) -> tuple[str, str] | None:
    """A result and an input, or another result, of one storage."""
    places = {
        tensor.untyped_storage().data_ptr(): name
        for name in ("q", "k", "v", "dout")
        if (tensor := getattr(inputs, name)) is not None and tensor.numel()
    }
    for name, tensor in got.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in places:
            return name, places[tensor.untyped_storage().data_ptr()]
    return None
