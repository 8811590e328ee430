"""What the model says of growth, and what ``bench io`` shows of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.limits import io_model, io_tables
from attnbench.harness.limits.io_model import Point
from attnbench.harness.problem import Problem
from attnbench.harness.run.errors import Exit
from attnbench.harness.two_level import Accesses

SMALL = ("--seqlen", "64,128,256", "--headdim", "8", "--memory", "256", "--count-up-to", "128")


def point(seqlen: int, total: int, **other: Any) -> Point:
    fields = {
        "head_dim": 64,
        "memory": 4096,
        "share": 1.0,
        "counted": None,
        "flops": 8 * total,
        "minimum": 1,
    } | other
    return Point("x", "fwd", seqlen, predicted=Accesses(total, 0), **fields)


def test_exponents_are_slopes_of_the_series_in_which_one_thing_varies() -> None:
    points = [point(n, 3 * n**2) for n in (256, 512, 1024)]
    points += [point(1024, 5 * 64**2 * d, head_dim=d) for d in (16, 32, 128)]
    points += [point(256, 7, share=0.5), point(512, 7, share=0.25)]
    found = {e.axis: e.value for e in io_model.exponents(points)}
    assert found["seqlen"] == pytest.approx(2)
    assert set(found) == {"seqlen", "head_dim"}  # two shares make no line
    assert "–" in io_tables.exponent_rows(io_model.exponents(points))[0]


def test_intensity_decides_which_limit_binds() -> None:
    one = point(1024, 10)
    assert one.intensity == 4  # 80 FLOP over 20 bytes
    assert io_model.verdict(one.intensity, balance=3.9) == "compute"
    assert io_model.verdict(one.intensity, balance=4.1) == "memory"


def test_only_implementations_with_a_model_are_asked() -> None:
    names = [i.name for i in io_model.with_a_model(["standard", "flex", "tiled-fa2", "no-such-thing"])]
    assert names == ["standard", "tiled-fa2"]


def test_bytes_are_of_the_direction_and_the_dtype() -> None:
    (standard,) = io_model.with_a_model(["standard"])
    problem = Problem(2, 4, 256, 64, dtype="bf16", direction="fwd")
    forward, backward, both = (
        io_model.bytes_by_algorithm([standard], problem.with_direction(d), 64 * 1024)["standard"]
        for d in ("fwd", "bwd", "fwd_bwd")
    )
    assert both == forward + backward
    assert forward > 2 * 5 * 2 * 4 * 256**2  # five passes over the scores, 2 bytes each
    in_fp32 = dataclasses.replace(problem, dtype="fp32")
    assert io_model.bytes_by_algorithm([standard], in_fp32, 2 * 64 * 1024)["standard"] == 2 * forward


def test_the_command_counts_short_lengths_and_computes_long_ones(bench: Any, tmp_path: Path) -> None:
    done = bench("io", *SMALL, "--output-dir", str(tmp_path), "--json")
    assert done.exit_code == Exit.OK, done.stderr
    points = json.loads(done.stdout)["points"]
    assert {p["seqlen"] for p in points if p["counted"]} == {64, 128}
    assert all(p["counted"] in (None, p["predicted"]) for p in points)
    assert {p["impl"] for p in points} == {"standard", "tiled-fa1", "tiled-fa2"}
    assert {path.name for path in tmp_path.iterdir()} == {"io.json", "io.md", "io.png", "io.svg"}
    assert "| equal |" in (tmp_path / "io.md").read_text()


def test_a_count_that_differs_from_its_closed_form_fails_the_command(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io_model, "run", lambda *_: (Accesses(1, 1), Accesses(1, 1)))
    done = bench("io", *SMALL, "--only", "standard")
    assert done.exit_code == 1
    assert "standard moved Accesses(reads=1, writes=1), its closed form says" in done.stderr


def test_implementations_without_a_model_are_refused_in_one_line(bench: Any) -> None:
    done = bench("io", *SMALL, "--only", "flex")
    assert done.exit_code == Exit.NOTHING
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seqlen", "0"), ("--seqlen", ","), ("--headdim", "64,0"), ("--memory", "0"), ("--balance", "-1")],
)
def test_a_size_of_nothing_is_refused_in_one_line(bench: Any, option: str, value: str) -> None:
    done = bench("io", option, value)
    assert done.exit_code == Exit.USAGE
    assert done.stderr.startswith(f"bench: {option}")
    assert done.stderr.count("\n") == 1


def test_lengths_too_short_to_hide_a_block_have_no_exponent_of_the_share(bench: Any) -> None:
    done = bench("io", "--seqlen", "64", "--headdim", "64", "--only", "standard", "--json")
    assert done.exit_code == Exit.OK, done.stderr
    document = json.loads(done.stdout)
    assert 0 in {point["share"] for point in document["points"]}
    assert "share" not in {exponent["axis"] for exponent in document["exponents"]}
