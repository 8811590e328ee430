"""CUDA_VISIBLE_DEVICES, read as CUDA reads it."""

from __future__ import annotations

import pytest

from attnbench.harness.run.gpus import Gpu, left_visible

FOUND = [Gpu(f"gpu{i}", f"GPU-{letter}0", (9, 0), "580") for i, letter in enumerate("abc")]


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, ["gpu0", "gpu1", "gpu2"]),
        ("", []),
        ("-1", []),
        ("2", ["gpu2"]),
        ("2,0", ["gpu2", "gpu0"]),
        (" 1 , 0", ["gpu1", "gpu0"]),
        ("GPU-b", ["gpu1"]),
        ("GPU-", []),  # no single GPU is meant
        ("0,9,1", ["gpu0"]),  # everything after what is none is hidden
    ],
)
def test_the_gpus_left(chosen: str | None, names: list[str]) -> None:
    assert [gpu.name for gpu in left_visible(FOUND, chosen)] == names
