"""The published model of accesses is what the algorithms' closed forms say today, and what its runs counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnbench.harness.limits import io_model

PAGE = Path(__file__).parents[2] / "results" / "io-model" / "io.json"
PUBLISHED = json.loads(PAGE.read_text())
ALGORITHMS = io_model.with_a_model(sorted({point["impl"] for point in PUBLISHED["points"]}))


def test_every_count_equals_its_closed_form() -> None:
    counted = [point for point in PUBLISHED["points"] if point["counted"]]
    assert {point["impl"] for point in counted} == {"standard", "tiled-fa1", "tiled-fa2"}
    assert len({(p["seqlen"], p["head_dim"], p["memory"]) for p in counted}) >= 7
    assert all(point["counted"] == point["predicted"] for point in counted)


@pytest.mark.parametrize("implementation", ALGORITHMS, ids=lambda implementation: implementation.name)
def test_the_closed_forms_are_those_of_the_code(implementation) -> None:
    short = [p for p in PUBLISHED["points"] if p["impl"] == implementation.name and p["seqlen"] <= 4096]
    sizes = [(p["seqlen"], p["head_dim"], p["memory"], 1.0) for p in short if p["share"] == 1]
    found = {
        (p.direction, p.seqlen, p.head_dim, p.memory): vars(p.predicted)
        for p in io_model.sweep([implementation], sizes, count_up_to=0)
    }
    for p in short:
        if p["share"] == 1:
            assert found[p["direction"], p["seqlen"], p["head_dim"], p["memory"]] == p["predicted"]


def test_the_exponents_are_the_papers() -> None:
    """Standard grows with N^2; FlashAttention with N^2 d^2 / M, times the visible share."""
    value = {(e["impl"], e["direction"], e["axis"]): e["value"] for e in PUBLISHED["exponents"]}
    for direction in ("fwd", "bwd"):
        assert value["standard", direction, "seqlen"] == pytest.approx(2, abs=0.05)
        for name in ("tiled-fa1", "tiled-fa2"):
            found = [value[name, direction, axis] for axis in ("seqlen", "head_dim", "memory", "share")]
            assert found == pytest.approx([2, 2, -1, 1], abs=0.07)
