"""``bench build``: what is chosen, what runs beside what, and how it says that something is not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnbench.harness.cli.app import app
from attnbench.harness.run.errors import Exit

PLUGIN = '''
"""Compiles in ways that a compiler may."""

import os
import signal
from functools import partial

from attnbench.harness.contract import Capabilities, Compiled, Implementation, Unsupported


def fit(registers, cached=False):
    return Compiled(registers, 0, 1000, cached, log="used")


def spilled():
    return Compiled(255, 64, 2000, problems=("64 bytes of spill stores",), log="ptxas said so")


def refused():
    raise ValueError("no such instruction\\nand more")


def without_a_cache():
    raise OSError("cannot keep compiled kernels in /nowhere")


def taken_along():
    os.kill(os.getpid(), signal.SIGKILL)


class Planted(Implementation):
    contract = 1
    capabilities = Capabilities()

    def __init__(self, builds):
        self.found = builds

    def builds(self):
        return self.found

    def prepare(self, problem, device):
        raise NotImplementedError


class Absent(Planted):
    def builds(self):
        raise Unsupported("module nvcc is not installed (pip install nvcc)")


compiles = Planted(
    {"wide": partial(fit, 168), "narrow": partial(fit, 40, True), "spilled": spilled, "refused": refused}
)
others = Planted({"unwritable": without_a_cache, "dying": taken_along})
absent = Absent({})
'''
NAMES = ("compiles", "others", "absent")


@pytest.fixture(scope="module", autouse=True)
def planted(register_plugins: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder: Path = tmp_path_factory.mktemp("plugins")
    (folder / "compiling.py").write_text(PLUGIN)
    register_plugins({name: f"compiling:{name}" for name in NAMES}, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def build(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["build", *arguments], prog_name="bench")


def test_every_configuration_has_its_line_and_a_bad_one_its_log() -> None:
    done = build("--only", "compiles", "--processes", "2")
    assert done.exit_code == Exit.CELLS
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [f"compiles/{n}" for n in ("wide", "narrow", "spilled", "refused")]
    assert [line[2:] for line in lines] == [
        ["168", "0", "1000", "ok"],
        ["40", "0", "1000", "cached"],
        ["255", "64", "2000", "64 bytes of spill stores"],
        ["–", "–", "–", "ValueError: no such instruction"],
    ]
    assert all(float(line[1]) >= 0 for line in lines)
    assert "ptxas said so" in done.stderr
    assert "no such instruction\nand more" in done.stderr
    assert "4 configurations, 3 compiled" in done.stderr
    assert "2 not fit" in done.stderr


def test_what_is_fit_is_no_error_and_can_be_read_by_programs() -> None:
    done = build("--only", "compiles/*i*e,compiles/narrow", "--json")
    assert done.exit_code == Exit.OK
    document = json.loads(done.stdout)
    assert list(document) == ["compiles/wide", "compiles/narrow"]
    assert document["compiles/narrow"]["registers"] == 40
    assert document["compiles/narrow"]["cached"] is True


def test_a_compiler_that_takes_its_process_along_is_a_failure_and_no_hang() -> None:
    done = build("--only", "others/dying")
    assert done.exit_code == Exit.CELLS
    assert "BrokenProcessPool" in done.stdout


def test_a_cache_that_cannot_be_written_is_the_machine_s_fault() -> None:
    done = build("--only", "others/unwritable")
    assert done.exit_code == Exit.MACHINE
    assert done.stderr.splitlines()[-1] == "bench: cannot keep compiled kernels in /nowhere"


@pytest.mark.parametrize(
    ("only", "code", "said"),
    [
        ("compils", Exit.USAGE, "did you mean compiles?"),
        ("compiles/narow", Exit.USAGE, "no configuration matches 'compiles/narow'"),
        ("absent", Exit.MACHINE, "absent: module nvcc is not installed"),
        ("standard", Exit.NOTHING, "compile nothing ahead"),
    ],
)
def test_what_cannot_be_meant(only: str, code: int, said: str) -> None:
    done = build("--list", "--only", only)
    assert done.exit_code == code
    assert said in done.stderr


def test_listing_names_all_and_passes_over_what_is_not_installed() -> None:
    done = build("--list")
    assert done.exit_code == Exit.OK
    assert {"compiles/wide", "others/dying"} <= set(done.stdout.splitlines())
    assert "absent: module nvcc is not installed" in done.stderr
    assert any(line.startswith("flash-cuda/forward-bf16-dim64") for line in done.stdout.splitlines())
