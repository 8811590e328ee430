"""What an implementation can be held to: one module a check, named as the check is.

``CHECKS`` is what is known of each without importing torch. A check's module defines ``check(posed)``: it returns when
the implementation passes, raises ``posed.Wrong`` with the evidence when it does not, and ``posed.Declined`` where the
implementation says that it does not offer what is asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnbench.harness.conform.posed import Posed

    Check = Callable[["Posed"], None]


@dataclass(frozen=True)
class About:
    """claim: what holds of an implementation that passes. oracle: whether the right answer is needed. options: what a
    case may tell it, with its default."""

    claim: str
    oracle: bool = True
    options: dict[str, object] = field(default_factory=dict)


CHECKS: dict[str, About] = {
    "agrees": About(
        "out, lse and, with a backward, dq, dk and dv are within the error budget of the fp64 oracle; results are "
        "written whole and inputs left alone",
        options={"offset": 0},
    ),
    "after_variants": About(
        "the answer is right after neighbours with one option changed have been compiled and run"
    ),
    "autocast": About("under autocast fp32 leaves give 16-bit accuracy, and gradients in their own dtype"),
    "backward_again": About(
        "a kept graph gives its gradients again, whatever was called since; an input written over is refused"
    ),
    "checkpointing": About("under torch.utils.checkpoint gradients are what they are without it"),
    "compiled": About("under torch.compile the answer is the eager one", options={"backend": "aot_eager"}),
    "double_backward": About("gradients of gradients are right, or raise", oracle=False),
    "dropout_agrees": About(
        "out, dq, dk and dv are within the error budget of the fp64 oracle under the mask that was recovered, with "
        "and without checkpointing",
        oracle=False,
        options={"checkpoint": "none"},
    ),
    "dropout_graphs": About(
        "replays of a CUDA graph draw new masks, and each one's forward and backward agree", oracle=False
    ),
    "dropout_rate": About(
        "weights are dropped at the declared rate, in every position, row, column and head, and independently",
        oracle=False,
        options={"calls": 16},
    ),
    "dropout_state": About(
        "one generator state gives one mask, and calls in a row, as other states, give others", oracle=False
    ),
    "finite_differences": About(
        "gradients are the slopes of the implementation's own forward",
        oracle=False,
        options={"directions": 2},
    ),
    "fresh_memory": About("nothing of a result is left as it was in uninitialised memory"),
    "grad_modes": About(
        "out is the same with and without gradients, and asks for them only where they were asked for"
    ),
    "graph_replay": About("captured in a CUDA graph, forward and backward answer rightly to other inputs"),
    "guard_bands": About("nothing outside of the inputs and of what is allocated is read or written"),
    "lse_gradient": About("an lse that is returned as differentiable has the right gradient", oracle=False),
    "one_gradient": About("the gradient of one of q, k and v is right where the others need none"),
    "opcheck": About("operators that it registers with torch pass torch.library.opcheck", oracle=False),
    "own_results": About("a result shares no memory with an input, and later calls do not write over it"),
    "repeats": About(
        "call after call answers the same: bit for bit where that is declared, within the budget everywhere",
        options={"repeats": 20, "pressure": False},
    ),
    "side_streams": About(
        "on other streams than the default the answers are the same", options={"rounds": 4}
    ),
}


def load(name: str) -> Check:
    """The function of a check; imports torch."""
    found: Check = importlib.import_module(f"{__name__}.{name}").check
    return found
