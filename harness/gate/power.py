"""A bank of A/A rounds, out of the calibrations that gates left, and what gates drawn from it would find."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attnbench.harness.gate.calibration import (
    SAME,
    SLOWER,
    Calibration,
    Rate,
    Replay,
    replay_pairs,
    summarised,
)
from attnbench.harness.gate.decision import Design
from attnbench.harness.gate.estimators import BY_NAME
from attnbench.harness.gate.pairs import CellKey, PairLogs, contrasts
from attnbench.harness.gate.procedure import BASE, CALIBRATION, CONTROL
from attnbench.harness.report.load import load_run
from attnbench.harness.report.stats import Array
from attnbench.harness.run.errors import RunError

SCHEMA = 2
"""1 had no more than flips' log-ratios (pairs x flips), and is read still."""
SLOWDOWNS = (0.01, 0.02, 0.03, 0.05, 0.10)
FINE = tuple(step / 400 for step in range(41))  # 0 to 10%, for the curve

Bank = dict[CellKey, list[PairLogs]]
"""By cell, the A/A pairs of each calibration."""


@dataclass(frozen=True)
class PowerCurve:
    """Of one cell, by slowdown: the share of gates that find it SLOWER, with its 95% interval, and that say SAME."""

    name: str
    slowdowns: Sequence[float]
    found: Sequence[float]
    found_low: Sequence[float]
    found_high: Sequence[float]
    same: Sequence[float]


def read_bank(paths: Sequence[Path]) -> Bank:
    """Out of gates' folders, and files that ``bank_document`` was written to; RunError where there is none, or where
    calibrations of a cell are read in two ways, as on a CPU and on a GPU.
    """
    bank: Bank = {}
    for path in paths:
        found = _from_file(path) if path.is_file() else _from_gate(path)
        if not found:
            raise RunError(f"{path}: no gate's folder with a calibration, nor a bank of A/A rounds")
        for key, calibrations in found.items():
            bank.setdefault(key, []).extend(calibrations)
    for key, recorded in bank.items():
        if len(ways := {logs.estimator.name for logs in recorded}) > 1:
            raise RunError(f"{key.id}: calibrations read as {' and as '.join(sorted(ways))} are not one bank")
    least = max(map(len, bank.values()))
    return {key: calibrations for key, calibrations in bank.items() if len(calibrations) == least}


def bank_document(bank: Bank) -> dict[str, Any]:
    """The bank as JSON values; logs to a millionth."""
    cells = [
        {
            "impl": key.impl,
            "problem": key.problem,
            "estimator": found[0].estimator.name,
            "calibrations": [np.round(logs.times, 6).tolist() for logs in found],
        }
        for key, found in bank.items()
    ]
    return {
        "schema": SCHEMA,
        "what": "logs of ms of A/A process pairs, by calibration: pairs x flips x sides x rounds of the flip",
        "cells": cells,
    }


@dataclass(frozen=True)
class Power:
    """Gates of ``design`` drawn from a bank. table: by slowdown of SLOWDOWNS, per cell the gates that say SLOWER and
    those that say SAME.
    """

    calibration: Calibration
    cells: Sequence[CellKey]
    table: dict[float, list[tuple[Rate, Rate]]]
    curves: Sequence[PowerCurve]


def power(bank: Bank, design: Design, gates: int) -> Power:
    """``design.cells`` is the bank's number of cells."""
    pooled = [PairLogs.stacked(found) for found in bank.values()]
    replay = replay_pairs(pooled, design, gates)
    pairs, calibrations = min(logs.pairs for logs in pooled), max(map(len, bank.values()))
    shares = {slowdown: _rates(replay, slowdown) for slowdown in sorted({*SLOWDOWNS, *FINE})}
    curves = [
        PowerCurve(
            key.id,
            FINE,
            found=[shares[s][cell][0].share for s in FINE],
            found_low=[shares[s][cell][0].interval[0] for s in FINE],
            found_high=[shares[s][cell][0].interval[1] for s in FINE],
            same=[shares[s][cell][1].share for s in FINE],
        )
        for cell, key in enumerate(bank)
    ]
    return Power(
        calibration=summarised(replay, design, f"{pairs} A/A pairs of {calibrations} calibrations"),
        cells=list(bank),
        table={slowdown: shares[slowdown] for slowdown in SLOWDOWNS},
        curves=curves,
    )


def _rates(replay: Replay, slowdown: float) -> list[tuple[Rate, Rate]]:
    verdicts = replay.verdicts(slowdown)
    gates = len(verdicts)
    return [
        (Rate(int((cell == SLOWER).sum()), gates), Rate(int((cell == SAME).sum()), gates))
        for cell in verdicts.T
    ]


def _from_gate(folder: Path) -> Bank:
    found: Bank = {}
    for calibration in sorted(folder.glob(f"*/{CALIBRATION}")):
        for key, contrast in contrasts(load_run(calibration).cells, over=CONTROL, under=BASE).items():
            found.setdefault(key, []).append(contrast.logs)
    return found


def _from_file(path: Path) -> Bank:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] not in (1, SCHEMA):
            raise RunError(f"{path}: bank schema {data['schema']!r} is not {SCHEMA}")
        return {
            CellKey(cell["impl"], cell["problem"]): [
                _pairs(np.array(logs, dtype=float), cell.get("estimator")) for logs in cell["calibrations"]
            ]
            for cell in data["cells"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not a bank of A/A rounds: {error}") from None


def _pairs(logs: Array, estimator: str | None) -> PairLogs:
    """estimator: by name; None in schema 1, of log-ratios alone."""
    return PairLogs.of_ratios(logs) if estimator is None else PairLogs(logs, BY_NAME[estimator])
