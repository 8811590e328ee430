"""Memory that torch hands out uninitialised, to compiled libraries as well, holds NaN: what is not written shows.

By torch's own switch (``torch.utils.deterministic.fill_uninitialized_memory``), which fills inside the allocation, so
that extensions which allocate in C++ meet it too. It comes with deterministic algorithms, where torch has them.
"""

from __future__ import annotations

import warnings

import torch

from attnbench.harness.conform.posed import Posed


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    was, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    posed.prepared  # noqa: B018 - what it sets up is not a call's
    try:
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = posed.answer(inputs)
            with_lse = posed.forward_with_lse(inputs) if posed.problem.direction == "fwd" else {}
            posed.synchronize()
    finally:
        torch.use_deterministic_algorithms(mode=was, warn_only=warned)
    posed.hold(got, "with NaN in uninitialised memory, ")
    if with_lse:
        posed.hold(with_lse, "with NaN in uninitialised memory, of the call with lse, ")
