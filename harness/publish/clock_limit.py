"""The fastest that matrix units could go at the card's highest clock: a time below it was not measured honestly.

FLOPs an SM starts in one clock, dense, one multiply-add as two, by compute capability. Each was checked against the
vendor's peak: SMs x clock x this figure is what the data sheet says (H100 SXM: 132 x 1.83 GHz x 4096 = 989 TFLOP/s).
Where sheets differ by accumulator, the faster stands here: the limit must never accuse a real kernel.
"""

from __future__ import annotations

from typing import Any

from attnbench.harness.problem import Problem

HALF = {
    (7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192,
    (12, 0): 1024,
}  # fmt: skip
# fp32 problems may be answered on TF32 units where the card has them; that is the judge's business, not the clock's.
SINGLE = {
    (7, 0): 128, (7, 5): 128, (8, 0): 1024, (8, 6): 512, (8, 9): 512, (9, 0): 2048, (10, 0): 4096, (10, 3): 4096,
    (12, 0): 512,
}  # fmt: skip
DOUBLE = {(7, 0): 64, (8, 0): 128, (9, 0): 256}
FLOPS_PER_CLOCK_PER_SM = {"bf16": HALF, "fp16": HALF, "fp32": SINGLE, "fp64": DOUBLE}


def least_ms(problem: Problem, device: dict[str, Any]) -> float | None:
    """The shortest time ``problem`` can take on ``device`` (an entry of the environment), in ms; None if unknown."""
    capability = tuple(device.get("capability") or ())
    per_clock = FLOPS_PER_CLOCK_PER_SM[problem.dtype].get(capability)
    sms, mhz = device.get("sm_count"), device.get("max_sm_mhz")
    if not (per_clock and sms and mhz):
        return None
    return problem.flops / (per_clock * sms * mhz * 1e3)
