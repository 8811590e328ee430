"""A made-up run with every status, a card that slows down by 15% over its rounds, and hostile text in its records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from attnbench.harness.masks import Mask
from attnbench.harness.problem import Direction, Problem
from attnbench.harness.run import journal
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Ceilings, Cell, Group, Judgement, Memory, Status, TensorError, Timing

HOSTILE = "<script>alert(1)</script>"
DEVICE = "cuda:0"
GEMM_TFLOPS, COPY_GBS = 750.0, 4300.0
# Share of the GEMM's rate each reaches on a long sequence, forward; the backward gets 0.8 of it.
EFFICIENCY = {"fused_a": 0.85, "fused_b": 0.85 * 0.9995, "compiled": 0.62, "older": 0.45, "eager": 0.06}
NEVER = {
    "other_vendor": (Status.UNAVAILABLE, ["module other_vendor is not installed"]),
    "forward_only": (Status.UNSUPPORTED, ["has no backward pass"]),
}
RIGHT = Judgement({"out": TensorError(1e-3, 1e-5, 4e-3, 1e-4, ok=True)}, rows=64, rows_total=64)
WRONG = Judgement(
    {"out": TensorError(0.5, 1e-5, 4e-3, 1e-4, ok=False, first_bad=(0, 17, 3, 5), got=1.5, want=1.0)}, 64, 64
)


def drift(rounds: int) -> np.ndarray:
    """Speed of the card in each round: it loses 15% from the first to the last."""
    return np.linspace(1.0, 0.85, rounds)


def timing(problem: Problem, efficiency: float, rounds: int = 8, seed: int = 0) -> Timing:
    """Samples at ``efficiency`` of a drifting GEMM rate, with 0.3% noise and a fixed 5 us of launch."""
    noise = np.random.default_rng(seed).normal(1.0, 0.003, (rounds, 5))
    ms = problem.flops / 1e9 / (GEMM_TFLOPS * efficiency * drift(rounds))
    return Timing(
        rounds=[[float(sample + 0.005) for sample in row] for row in ms[:, None] * noise],
        mode="events",
        host_us=[12.5] * rounds,
        sm_mhz=[int(1980 * speed) for speed in drift(rounds)],
        power_w=[690.0] * rounds,
        temperature_c=[60] * rounds,
        throttle=[0] * (rounds - 1) + [0x4],
        unheld=1,
        checked=rounds,
    )


def ok_cell(impl: str, problem: Problem, efficiency: float, case: str = "grid", rounds: int = 8) -> Cell:
    """A cell judged right and timed."""
    seed = sum(map(ord, impl + problem.key))
    least = problem.minimal_result_bytes / 2**20
    scores = problem.batch * problem.heads * problem.seqlen_q * problem.seqlen_k * 4 / 2**20
    return Cell(
        **_names(impl, problem, case),
        status=Status.OK,
        judgement=RIGHT,
        prepare_ms=3.0,
        first_call_ms=840.0,
        timing=timing(problem, efficiency, rounds, seed),
        memory=Memory(least + scores if efficiency < 0.1 else least * 1.05, None, least),
    )


def failed_cell(impl: str, problem: Problem, status: Status, reasons: list[str], case: str = "grid") -> Cell:
    judgement = WRONG if status is Status.INCORRECT else None
    return Cell(**_names(impl, problem, case), status=status, reasons=reasons, judgement=judgement)


def _names(impl: str, problem: Problem, case: str) -> dict[str, object]:
    return {
        "run": "run-1", "suite": "made-up", "case": case, "group": problem.group_key, "impl": impl,
        "impl_version": "1.2.3", "device": DEVICE, "problem": problem,
    }  # fmt: skip


def group_of(cells: list[Cell], rounds: int = 8, foreign: list[str] | None = None) -> Group:
    """Closes ``cells``, with ceilings that drift as the cells do."""
    first = cells[0]
    directions = {cell.problem.direction: None for cell in cells}
    ceilings = Ceilings(
        gemm_tflops=[[float(GEMM_TFLOPS * speed)] * 2 for speed in drift(rounds)],
        copy_gbs=[[COPY_GBS, COPY_GBS * 0.99] for _ in range(rounds)],
    )
    return Group(
        run=first.run, suite=first.suite, case=first.case, why="made up", group=first.group, device=first.device,
        cells=[cell.id for cell in cells], seed=1, oracle_ms=80.0,
        ceilings=dict.fromkeys(directions, ceilings),
        order={direction: [sorted({cell.impl for cell in cells})] * rounds for direction in directions},
        phases={"prepare": 1.5, "oracle": 0.2, "judge": 0.6, "time": 1.1, "idle": 0.3},
        foreign=foreign or [],
    )  # fmt: skip


def problems(
    lengths: tuple[int, ...] = (1024, 4096, 16384), head_dims: tuple[int, ...] = (64, 128),
    directions: tuple[Direction, ...] = ("fwd", "bwd"),
) -> list[list[Problem]]:  # fmt: skip
    """A grid of groups: each a problem in its directions, 16k tokens, hidden 2048, full and causal."""
    masks = (Mask.full(), Mask.causal())
    return [
        [
            Problem(16384 // length, 2048 // head_dim, length, head_dim, mask=mask, direction=direction)
            for direction in directions
        ]
        for head_dim in head_dims
        for mask in masks
        for length in lengths
    ]


def cells_of(problem: Problem) -> list[Cell]:
    """All implementations on one problem, with every status somewhere in the grid."""
    length, backward = problem.seqlen_q, problem.direction == "bwd"
    fill = (
        length / (length + 600) * (0.8 if backward else 1.0) * (0.9 if problem.mask.kind == "causal" else 1.0)
    )
    cells = []
    for impl, efficiency in EFFICIENCY.items():
        if impl == "eager" and length >= 16384:
            cells.append(
                failed_cell(impl, problem, Status.OOM, ["tried to allocate 128.00 GiB, 88 GiB were free"])
            )
        elif impl == "compiled" and problem.head_dim == 128 and backward and length == 4096:
            reasons = ["out[0, 17, 3, 5] is 1.5, the oracle says 1.0, budget 0.004"]
            cells.append(failed_cell(impl, problem, Status.INCORRECT, reasons))
        else:
            cells.append(ok_cell(impl, problem, efficiency * fill))
    if length == 1024 or backward:
        reasons = ["sequence length 1024 is below 4096" if not backward else "has no backward pass"]
        cells.append(failed_cell(HOSTILE, problem, Status.UNSUPPORTED, reasons))
    else:
        cells.append(ok_cell(HOSTILE, problem, 0.3 * fill))
    crash = {
        1024: (Status.CRASHED, ["killed by SIGSEGV"]),
        4096: (Status.TIMEOUT, ["no answer in 60 s"]),
        16384: (Status.ERROR, ["RuntimeError: 50% of $x_1 & {y} | z"]),
    }
    cells.append(
        failed_cell("unlucky", problem, *crash.get(length, (Status.ERROR, ["ValueError: odd length"])))
    )
    for impl, (status, reasons) in NEVER.items():
        cells.append(failed_cell(impl, problem, status, reasons))
    return cells


ENVIRONMENT = {
    "schema": 1, "run": "run-1", "started": "2026-11-20T12:00:00+00:00", "seed": 1, "mode": "cold", "suite": "made-up",
    "command": ["bench", "run", "--suite", "made-up", "--only", HOSTILE], "commit": "0123456789ab", "dirty": True,
    "attnbench": "0.1.0", "python": "3.12.3", "torch": "2.11.0+cu130", "triton": "3.6.0", "cuda": "13.0",
    "driver": "580.65.06", "warnings": ["flash-attn 2.8.3 declares torch<2.11, installed is 2.11.0"],
    "devices": [{"id": DEVICE, "name": "NVIDIA H200", "memory_mib": 143771, "sm_count": 132, "max_sm_mhz": 1980}],
    "host": {"cpu": "a CPU", "cores": 16, "os": "Linux"}, "packages": {"torch": "2.11.0+cu130", "numpy": "2.4.6"},
}  # fmt: skip


def write_plan(folder: Path, groups: list[list[Problem]]) -> None:
    """The plan of a run of ``groups``, with all implementations."""
    impls = tuple(dict.fromkeys(cell.impl for cell in cells_of(groups[0][0])))
    plans = [
        GroupPlan("made-up", "grid", "made up", g[0].group_key, tuple(g), impls, "normal", 1) for g in groups
    ]
    (folder / "plan.json").write_text(json.dumps({"plans": [plan.to_json() for plan in plans]}))


def write_run(
    folder: Path, groups: list[list[Problem]] | None = None, environment: dict[str, object] | None = None
) -> Path:
    """Writes a run of ``groups`` (default: the whole grid) and its environment (default: a full one; {}: none)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, group in enumerate(problems() if groups is None else groups):
        cells = [cell for problem in group for cell in cells_of(problem)]
        lines += map(
            journal.seal, [*cells, group_of(cells, foreign=["4242 someone_else"] if number == 0 else None)]
        )
    (folder / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    if environment != {}:
        (folder / "environment.json").write_text(json.dumps(environment or ENVIRONMENT))
    return folder
