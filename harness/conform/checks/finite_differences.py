"""Gradients against differences of the implementation's own forward: no oracle, no shared formula."""

from __future__ import annotations

import torch

from attnbench.harness.conform.posed import Posed
from attnbench.harness.oracle.inputs import Inputs

STEP = 1e-3
"""Along a direction of unit variance. The five-point rule is wrong by STEP^4 of a fifth derivative, 1e-12, and by
eps / STEP, 1e-13, of the sum that it differences."""
TOLERANCE = 1e-7
"""Of the gradient's norm: five decades above both, and far below any planted or real fault."""


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    if inputs.q.dtype != torch.float64:
        raise ValueError(f"finite differences need fp64, and {posed.case.id} poses {posed.problem.dtype}")
    got = posed.backward(inputs)
    generator = torch.Generator(posed.device).manual_seed(posed.case.input_seed)
    for name in ("q", "k", "v"):
        gradient = got[f"d{name}"]
        for number in range(posed.option("directions")):
            drawn = torch.randn(gradient.shape, generator=generator, dtype=torch.float64, device=posed.device)
            slope = _slope(posed, inputs, name, drawn)
            claimed = float((gradient * drawn).sum())
            allowed = TOLERANCE * (1 + float(torch.linalg.vector_norm(gradient)))
            if not abs(claimed - slope) <= allowed:
                posed.fail(
                    f"d{name} along random direction {number} is {claimed:.6g}, the forward's own slope is "
                    f"{slope:.6g} (off by {abs(claimed - slope):.2g}, {allowed:.2g} allowed)",
                    tensor=f"d{name}",
                    claimed=claimed,
                    slope=slope,
                )


def _slope(posed: Posed, inputs: Inputs, name: str, direction: torch.Tensor) -> float:
    """Derivative of <out, dout> along ``direction`` of one input."""

    def value(step: float) -> float:
        moved = {n: getattr(inputs, n) for n in ("q", "k", "v")}
        moved[name] = moved[name] + step * direction
        out = posed.forward(Inputs(**moved, dout=inputs.dout))["out"]
        return float((out * posed.dout(inputs)).sum())

    near, far = value(STEP) - value(-STEP), value(2 * STEP) - value(-2 * STEP)
    return (8 * near - far) / (12 * STEP)
