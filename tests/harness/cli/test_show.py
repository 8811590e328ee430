"""``bench doctor`` and the tables of ``bench list`` on a terminal."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from attnbench.harness import doctor
from attnbench.harness.cli.show import print_table
from attnbench.harness.doctor import Finding
from attnbench.harness.run.errors import Exit

FOUND = [Finding("good", "1", "usable"), Finding("bad", "2", "broken", "does not import", "mend it")]


@pytest.fixture
def examined(bench: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that were examined."""
    devices: list[str] = []
    monkeypatch.setattr(doctor, "examine", lambda device: devices.append(device) or FOUND)
    monkeypatch.setattr(doctor, "machine_facts", lambda: {"python": "3.11"})
    return devices


def test_doctor_is_a_line_each_and_exits_0_whatever_it_finds(bench: Any, examined: list[str]) -> None:
    done = bench("doctor")
    assert done.exit_code == Exit.OK
    assert done.stdout.splitlines() == [
        "python\t3.11",
        "good\t1\tusable",
        "bad\t2\tbroken\tdoes not import\tmend it",
    ]
    assert examined == ["cpu"]


def test_doctor_json_says_the_same(bench: Any, examined: list[str]) -> None:
    document = json.loads(bench("doctor", "--json").stdout)
    assert document["machine"] == {"python": "3.11"}
    assert [found["state"] for found in document["implementations"]] == ["usable", "broken"]


@pytest.mark.parametrize(
    ("device", "code"), [("gpu", Exit.USAGE), ("cuda", Exit.MACHINE), ("cpu,cpu", Exit.OK), ("", Exit.OK)]
)
def test_doctor_minds_its_device(bench: Any, examined: list[str], device: str, code: Exit) -> None:
    assert bench("doctor", "--device", device).exit_code == code


def test_on_a_terminal_a_table_has_its_head(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table("Things", ("name", "why"), [("[a]", "because")])
    title, head, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (title, head, row) == (["Things"], ["name", "why"], ["[a]", "because"])
