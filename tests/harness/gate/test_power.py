from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gate_runs import timed, written
from typer.testing import CliRunner

from attnbench.harness.cli.app import app
from attnbench.harness.gate.decision import Design
from attnbench.harness.gate.estimators import TYPICAL, UNDISTURBED, Estimator
from attnbench.harness.gate.pairs import CellKey, PairLogs, contrasts, mirrored
from attnbench.harness.gate.power import Bank, bank_document, power, read_bank
from attnbench.harness.run.errors import RunError

KEY = CellKey("k", "p")


def bench(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="bench")


def bank_of(spread: float, estimator: Estimator = TYPICAL) -> Bank:
    """Six calibrations of five pairs, with noise of the process and of the round."""
    rng = np.random.default_rng(0)
    times = rng.normal(0, spread, (6, 5, 1, 2, 1)) + rng.normal(0, spread, (6, 5, 8, 2, 2))
    return {KEY: [PairLogs(pairs, estimator) for pairs in times]}


def on_disk(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("estimator", [TYPICAL, UNDISTURBED])
def test_a_bank_survives_its_file(tmp_path: Path, estimator: Estimator) -> None:
    bank = bank_of(0.003, estimator)
    path = on_disk(tmp_path / "bank.json", bank_document(bank))
    again = read_bank([path, path])
    assert len(again[KEY]) == 2 * len(bank[KEY])
    assert again[KEY][0].estimator is estimator
    assert again[KEY][0].times == pytest.approx(bank[KEY][0].times, abs=1e-6)


def test_a_bank_of_log_ratios_alone_is_read_as_it_was_written(tmp_path: Path) -> None:
    ratios = np.random.default_rng(1).normal(0, 0.003, (5, 8))
    cell = {"impl": KEY.impl, "problem": KEY.problem, "calibrations": [ratios.tolist()]}
    (found,) = read_bank([on_disk(tmp_path / "bank.json", {"schema": 1, "cells": [cell]})])[KEY]
    assert found.values() == pytest.approx(np.median(ratios, axis=1))


def test_calibrations_of_a_cpu_and_of_a_gpu_are_not_one_bank(tmp_path: Path) -> None:
    paths = [
        on_disk(tmp_path / f"{estimator.name}.json", bank_document(bank_of(0.003, estimator)))
        for estimator in (TYPICAL, UNDISTURBED)
    ]
    with pytest.raises(RunError, match="read as typical and as undisturbed are not one bank"):
        read_bank(paths)


def test_a_quiet_bank_finds_what_it_should_and_calls_nothing_large_the_same() -> None:
    found = power(bank_of(0.003), Design(cells=1), gates=300)
    assert found.calibration.false_positives.count == 0
    assert found.calibration.unsure.share <= 0.1
    shares = {slowdown: (rates[0][0].share, rates[0][1].share) for slowdown, rates in found.table.items()}
    assert shares[0.05] == (1.0, 0.0)
    assert shares[0.03][0] >= 0.8
    assert shares[0.01][0] == 0.0


def test_the_command_reads_the_calibrations_of_gates(tmp_path: Path) -> None:
    for number in (1, 2):
        cells = [
            timed(f"k@{side}.{pair}", 1.0, seed=number * 100 + pair * 10 + place)
            for pair in (1, 2, 3)
            for place, side in enumerate(("base", "control"))
        ]
        written(tmp_path / f"gate-{number}" / "k" / "calibration", *cells)
    out = tmp_path / "out"
    done = bench("gate-power", tmp_path / "gate-1", tmp_path / "gate-2", "--json", "--output-dir", out)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["gates"] == 300
    assert found["drawn_from"] == "6 A/A pairs of 2 calibrations"
    assert found["cells"][0]["slowdowns"]["0.05"] == {"found": 300, "same": 0}
    assert {path.name for path in out.iterdir()} == {"bank.json", "power.json", "power.png", "power.svg"}
    assert bench("gate-power", out / "bank.json").stdout.startswith(
        "calibration: 0 false positives in 300 gates"
    )
    assert bench("gate-power", tmp_path).exit_code == 2
    assert bench("gate-power", out / "power.json").exit_code == 2


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_a_pair_is_free_of_the_advantage_of_going_first(device: str) -> None:
    """Whoever goes second is 5% slower; the order is mirrored each round, and no trace is left."""
    base, head = (
        dataclasses.replace(timed(f"k@{side}.1", 1.0, seed=n, rounds=8, noise=1e-6), device=device)
        for n, side in enumerate(("base", "head"))
    )
    for cell, second in ((base, 1), (head, 0)):
        assert cell.timing
        rounds = cell.timing.rounds
        rounds[:] = [
            [ms * (1.05 if n % 2 == second else 1.0) for ms in turn] for n, turn in enumerate(rounds)
        ]
    (contrast,) = contrasts([base, head], over="head", under="base").values()
    assert (contrast.logs.pairs, contrast.logs.flips) == (1, 4)
    assert contrast.logs.values() == pytest.approx([0.0], abs=1e-5)
    assert contrast.cycles
    assert contrast.cycles.values() == pytest.approx([0.0], abs=1e-5)


def test_every_second_round_is_the_first_one_backwards() -> None:
    members = [f"k@{side}.{n}" for side in ("base", "head") for n in (1, 2, 3)]
    orders = [mirrored(members, number) for number in range(8)]
    assert all(second == first[::-1] for first, second in zip(orders[::2], orders[1::2], strict=True))
    assert len({tuple(order) for order in orders[::2]}) > 1
