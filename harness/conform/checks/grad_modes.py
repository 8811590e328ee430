"""With gradients off, on, and in inference mode: the same out, which needs gradients only where they were asked for.

Off comes first, and each mode after another: what was found out about a call in one may not stay for the next.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from attnbench.harness.conform.posed import Posed

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
}
ORDER = ("no_grad", "enable_grad", "inference_mode", "enable_grad", "no_grad")


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    for name in ORDER:
        for leaves in (True, False):
            q, k, v = posed.leaves(inputs) if leaves else (inputs.q, inputs.k, inputs.v)
            with MODES[name]():
                out = posed.prepared.attend(q, k, v)
            wanted = leaves and name == "enable_grad"
            if out.requires_grad != wanted:
                asked = "inputs that need gradients" if leaves else "inputs that need none"
                posed.fail(f"under {name} with {asked}, out.requires_grad is {out.requires_grad}")
            posed.hold({"out": out.detach()}, f"under {name}, ")
