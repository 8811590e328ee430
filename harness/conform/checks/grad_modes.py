"""With gradients on, off, and in inference mode: the same out, which needs gradients only where they were asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from attnbench.harness.conform.posed import Posed

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "enable_grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    for name, mode in MODES.items():
        for leaves in (True, False):
            q, k, v = posed.leaves(inputs) if leaves else (inputs.q, inputs.k, inputs.v)
            with mode():
                out = posed.prepared.attend(q, k, v)
            wanted = leaves and name == "enable_grad"
            if out.requires_grad != wanted:
                asked = "inputs that need gradients" if leaves else "inputs that need none"
                posed.fail(f"under {name} with {asked}, out.requires_grad is {out.requires_grad}")
            posed.hold({"out": out.detach()}, f"under {name}, ")
