"""Devices as they are asked for, and the folders that runs on them go to."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.cli.machine import choose_devices, default_output, slug
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.gpus import Gpu

TWO = [Gpu("NVIDIA H200", "GPU-a", (9, 0), "580"), Gpu("NVIDIA H200", "GPU-b", (9, 0), "580")]


@pytest.mark.parametrize(
    ("words", "gpus", "devices"),
    [
        ([], [], ("cpu",)),
        ([], TWO, ("cuda:0",)),
        (["cpu"], TWO, ("cpu",)),
        (["cuda"], TWO, ("cuda:0",)),
        (["cuda:1"], TWO, ("cuda:1",)),
        (["cuda:0", "cuda:1"], TWO, ("cuda:0", "cuda:1")),
        (["cuda", "cuda:0"], TWO, ("cuda:0",)),
    ],
)
def test_devices_are_chosen(words: list[str], gpus: list[Gpu], devices: tuple[str, ...]) -> None:
    assert choose_devices(words, gpus) == devices


@pytest.mark.parametrize(
    ("words", "gpus", "code", "message"),
    [
        (["cuda"], [], Exit.MACHINE, "cuda:0 is not there; GPUs visible: none"),
        (
            ["cuda:2"],
            TWO,
            Exit.MACHINE,
            "cuda:2 is not there; GPUs visible: cuda:0 NVIDIA H200, cuda:1 NVIDIA H200",
        ),
        (["cpu", "cuda"], TWO, Exit.USAGE, "do not mix"),
        (["cuda:x"], TWO, Exit.USAGE, "'cuda:x' is no device"),
        (["mps"], TWO, Exit.USAGE, "'mps' is no device"),
    ],
)
def test_a_device_that_is_not_there_is_named(
    words: list[str], gpus: list[Gpu], code: Exit, message: str
) -> None:
    with pytest.raises(RunError) as caught:
        choose_devices(words, gpus)
    assert message in str(caught.value)
    assert caught.value.exit_code == code


def test_the_default_folder_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTNBENCH_COMMIT", "abc123-dirty")
    first = default_output(["cpu"], [])
    assert first.parts[:2] == ("results", "cpu")
    assert first.name.endswith("-abc123-dirty")
    first.mkdir(parents=True)
    second = default_output(["cpu"], [])
    second.mkdir()
    third = default_output(["cpu"], [])
    assert (second.name, third.name) == (f"{first.name}-2", f"{first.name}-3")


@given(st.text(max_size=40))
def test_a_slug_is_safe_in_a_path(name: str) -> None:
    assert set(slug(name)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
