"""Real gates on a GPU: equal sides, and slowdowns planted in the work of a call."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SUITE = """name = "four-cells"
why = "Two problems, forward and backward, of a size that a kernel team gates on."

[[case]]
name = "head-64"
why = "Causal at head size 64."
dtype = "bf16"
batch = 4
heads = 16
head_dim = 64
mask = "causal"
seqlen = "4k"
direction = ["fwd", "bwd"]

[[case]]
name = "head-128"
why = "Full at head size 128."
dtype = "bf16"
batch = 2
heads = 16
head_dim = 128
seqlen = "4k"
direction = ["fwd", "bwd"]
"""

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300), pytest.mark.xdist_group("gpu")]


@pytest.fixture
def gated(tmp_path: Path, installed: Callable[..., str]) -> Callable[[float], tuple[int, dict[str, Any]]]:
    """Gates an unchanged base against a head that does so much more; exit code and document."""

    def run(share: float) -> tuple[int, dict[str, Any]]:
        (tmp_path / "suite.toml").write_text(SUITE)
        sides = [
            installed(name, plugin="planted", SHARE=more) for name, more in (("base", 0.0), ("head", share))
        ]
        words = [
            Path(sys.executable).with_name("bench"),
            "gate",
            "--base",
            sides[0],
            "--head",
            sides[1],
            "--quiet",
        ]
        words += ["--suite", tmp_path / "suite.toml", "--device", "cuda:0", "--output-dir", tmp_path / "out"]
        done = subprocess.run(list(map(str, words)), check=False, capture_output=True, text=True)
        print(done.stdout)
        assert done.returncode in (0, 1, 5, 6), done.stderr
        return done.returncode, json.loads((tmp_path / "out" / "gate.json").read_text())

    return run


@pytest.mark.parametrize("repeat", range(5))
def test_equal_sides_are_no_regression(
    repeat: int, gated: Callable[[float], tuple[int, dict[str, Any]]]
) -> None:
    code, found = gated(0.0)
    assert code == 0, found["unfit"]
    assert {cell["answer"] for cell in found["cells"]} == {"SAME"}


@pytest.mark.parametrize("share", [0.03, 0.05])
def test_a_planted_slowdown_is_found(
    share: float, gated: Callable[[float], tuple[int, dict[str, Any]]]
) -> None:
    code, found = gated(share)
    assert code == 1, found["unfit"]
    assert all(cell["low"] < share < cell["high"] for cell in found["cells"])


@pytest.mark.parametrize("share", [0.01, 0.02])
def test_a_slowdown_within_the_threshold_is_measured_and_does_not_fail(
    share: float, gated: Callable[[float], tuple[int, dict[str, Any]]]
) -> None:
    code, found = gated(share)
    assert code in (0, 6)
    assert all(cell["low"] < share < cell["high"] for cell in found["cells"])
