"""Runs made up for comparisons: an implementation at a given speed, with the noise and clock of a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from attnbench.harness.problem import Problem
from attnbench.harness.run.journal import Journal
from attnbench.harness.run.record import Cell, Group, Judgement, Status, TensorError, Timing

PROBLEM = Problem(batch=1, heads=2, seqlen_q=64, head_dim=32, dtype="fp32")
RIGHT = Judgement({"out": TensorError(1e-3, 1e-5, 4e-3, 1e-4, ok=True)}, rows=64, rows_total=64)
WRONG = Judgement({"out": TensorError(2.0, 1.0, 1.0, 1.0, ok=False, first_bad=(0, 0, 0, 0))}, 64, 64)


def timed(
    impl: str, ms: float, *, seed: int, rounds: int = 12, noise: float = 0.003, mhz: float | None = 1500
) -> Cell:
    """An OK cell. mhz: clock of the SMs, which the time is scaled by; None for a device without one."""
    spread = np.random.default_rng(seed).normal(1.0, noise, (rounds, 5))
    speed = 1.0 if mhz is None else mhz / 1500
    samples = [[float(sample) for sample in row] for row in ms / speed * spread]
    clocks = [] if mhz is None else [round(mhz)] * rounds
    return Cell(
        **_names(impl), status=Status.OK, judgement=RIGHT, timing=Timing(samples, mode="cold", sm_mhz=clocks)
    )


def failed(impl: str, status: Status) -> Cell:
    judgement = WRONG if status is Status.INCORRECT else None
    return Cell(**_names(impl), status=status, reasons=["planted"], judgement=judgement)


def written(folder: Path, *cells: Cell, device: str = "card", **environment: str) -> Path:
    """A run's folder with these cells of one group."""
    journal = Journal(folder)
    group = Group("run", "s", "c", "why", PROBLEM.group_key, device, [cell.id for cell in cells], 0)
    journal.append(cells, group)
    journal.close()
    described: Mapping[str, object] = {
        "schema": 1,
        "devices": [{"id": "cuda:0", "name": device}],
        **environment,
    }
    (folder / "environment.json").write_text(json.dumps(described))
    return folder


def _names(impl: str) -> dict[str, object]:
    return {
        "run": "run", "suite": "s", "case": "c", "group": PROBLEM.group_key, "impl": impl, "impl_version": "1",
        "device": "cuda:0", "problem": PROBLEM,
    }  # fmt: skip
