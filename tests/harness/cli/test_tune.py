"""``bench tune`` from its options to a table, by workers that run kernels under Triton's interpreter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnbench.harness.cli.app import app
from attnbench.harness.run.errors import Exit
from attnbench.harness.tune import search

PLUGIN = '''
"""flash-triton, where there is no GPU."""

from dataclasses import replace

from attnbench.impls.flash_triton.plugin import FlashTriton


class Interpreted(FlashTriton):
    capabilities = replace(FlashTriton.capabilities, devices=("cpu",))

    def prepare(self, problem, device):
        from triton.runtime import interpreter

        original = interpreter._patch_lang_tensor

        def patched(tensor, *scope):
            original(tensor, *scope)
            tensor.__index__ = lambda self: int(self.handle.data.item())

        interpreter._patch_lang_tensor = patched
        return super().prepare(problem, device)


interpreted = Interpreted("interpreted")
'''
SUITE = """
name = "tiny"
why = "small enough for an interpreter"

[[case]]
name = "tiny"
why = "a graph made under one candidate, gone through under another"
batch = 1
heads = 1
seqlen = 20
head_dim = 16
dtype = "fp16"
mask = "causal"
direction = "bwd"
"""


@pytest.fixture(scope="module", autouse=True)
def planted(register_plugins: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder: Path = tmp_path_factory.mktemp("plugins")
    (folder / "interpreted.py").write_text(PLUGIN)
    (folder / "broken.py").write_text("raise ImportError('half of it is missing')")
    (folder / "tiny.toml").write_text(SUITE)
    register_plugins({"interpreted": "interpreted:interpreted", "broken": "broken:Broken"}, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(search, "SCREENING_ROUNDS", 1)
        patch.setenv("TRITON_INTERPRET", "1")  # of the workers: this process does not import Triton
        yield folder


def tune(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["tune", "--device", "cpu", *map(str, arguments)], prog_name="bench")


def test_every_candidate_is_judged_and_the_table_says_where_it_holds(planted: Path, tmp_path: Path) -> None:
    path = tmp_path / "tables" / "cpu.json"
    done = tune(
        "--only",
        "interpreted",
        "--suite",
        planted / "tiny.toml",
        "--most",
        2,
        "--rounds",
        5,
        "--output",
        path,
    )
    assert done.exit_code == Exit.OK, done.stderr
    (line,) = (line.split("\t") for line in done.stdout.splitlines())
    assert line[0] == "interpreted/b1_h1_q20_d16_fp16_causal_bwd"
    assert line[1:3] == ["2", "2"], "two candidates, both right"
    assert done.stderr.count(": right") == 2
    document = json.loads(path.read_text())
    assert document["device"] == {"name": "cpu", "capability": [0, 0]}
    assert {"torch", "triton", "attnbench"} <= document["environment"].keys()
    assert len(document["choices"]) == (line[-1] == "yes")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["--only", "standard"],
            Exit.NOTHING,
            "none of these implementations lets its configurations be chosen",
        ),
        (["--only", "broken"], Exit.NOTHING, "half of it is missing"),
        (["--only", "interpreted", "--suite", "tiny.toml", "--mode", "bwrd"], Exit.USAGE, "bwd"),
        (
            ["--only", "interpreted", "--suite", "tiny.toml", "--output", "tiny.toml"],
            Exit.USAGE,
            "not a table",
        ),
    ],
)
def test_what_cannot_be_tuned(
    planted: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(planted)
    done = tune(*arguments)
    assert (done.exit_code, said in done.stderr) == (code, True), done.stderr
