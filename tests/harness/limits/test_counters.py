"""Counters as ncu reports them, from a page written down here; that ncu is asked rightly needs a GPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.limits import counters, io_tables
from attnbench.harness.limits.counters import MARKER, Counted, Kernel, NoCounters
from attnbench.harness.problem import Problem
from attnbench.harness.run.errors import Exit

MARK = f"void at::native::vectorized_elementwise_kernel<4, at::native::{MARKER}<float>>>(int)"
PROBLEMS = [Problem(1, 1, n, 64, dtype="bf16") for n in (128, 256, 512)]

PAGE = """==PROF== Connected to process 7
"ID","Kernel Name","Block Size","dram__bytes_read.sum","dram__bytes_write.sum","lts__t_bytes.sum"
"","","","byte","Kbyte","byte"
"0","flash, fwd","(128,1,1)","1,024","2","4096"
==PROF== Disconnected
"""


def kernel(name: str, read: float = 0, write: float = 0, l2: float = 0) -> Kernel:
    return Kernel(name, read, write, l2)


def calls() -> list[Kernel]:
    """Two calls: one kernel, then two; what each left in L2 is written back by the read that follows."""
    return [
        kernel(MARK, 9), kernel("a", 100, 10, 1000), kernel(MARK, 9), kernel("reduce", 7777, 5, 7777),
        kernel(MARK, 9), kernel("b", 1, 2, 3), kernel("c", 10, 20, 30), kernel(MARK, 9), kernel("reduce", 7777, 4),
    ]  # fmt: skip


def test_a_page_is_read_in_its_own_units() -> None:
    assert counters.read_csv(PAGE.splitlines()) == [Kernel("flash, fwd", 1024, 2000, 4096)]
    assert counters.read_csv(["==ERROR== nothing"]) == []


def test_calls_stand_between_markers_and_pay_for_what_they_leave_in_l2() -> None:
    found = {"version": "1", "problems": ["", "does not fit", ""]}
    first, second, third = counters.gather("x", PROBLEMS, found, calls(), "")
    assert (first.dram_read, first.dram_write, first.l2, first.kernels) == (100, 15, 1000, ["a"])
    assert second.reason == "does not fit"
    assert second.dram_read is None
    assert (third.dram_read, third.dram_write, third.l2, third.kernels) == (11, 26, 33, ["b", "c"])


def test_a_process_that_is_lost_says_so_for_what_was_left() -> None:
    counted = counters.gather("x", PROBLEMS, {"version": "1", "problems": [""]}, calls()[:4], "Killed")
    assert [one.reason for one in counted] == ["", *["its process was lost: Killed"] * 2]


def test_a_call_that_ncu_did_not_see_has_no_figures() -> None:
    (one,) = counters.gather("x", PROBLEMS[:1], {"version": "1", "problems": [""]}, [], "==ERROR== no")
    assert one.dram_read is None
    assert one.reason == "ncu reported no kernels of this call: ==ERROR== no"


def test_rows_compare_with_the_least_and_with_each_model() -> None:
    least = PROBLEMS[0].minimal_bytes
    one = Counted("x", "1", PROBLEMS[0], 0.75 * least, 0.25 * least, 10.0 * least, ["a"])
    (row,) = io_tables.counted_rows([one], {PROBLEMS[0].key: {"model": 5.0 * least}}, ["model", "other"])
    assert row[6:] == ("1.00×", io_tables.figure(10 * least / 1e6), "10.0×", "2.00×", "–")
    assert Counted.from_json(json.loads(json.dumps(one.to_json()))) == one


def stand_in(folder: Path, body: str) -> None:
    """An ``ncu`` that does what ``body`` says with its arguments."""
    script = folder / "ncu"
    script.write_text(f"#!{sys.executable}\nimport json, sys\narguments = sys.argv[1:]\n{body}\n")
    script.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all there is on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(counters, "PLACES", ())
    return tmp_path


def test_each_implementation_is_asked_in_one_process(path: Path) -> None:
    stand_in(
        path,
        f"""
spec = json.loads(arguments[-1])
open(spec["answers"], "w").write(json.dumps({{"version": spec["impl"], "problems": [""] * len(spec["problems"])}}))
assert arguments[arguments.index("--clock-control") + 1] == "none"
rows = [["Kernel Name", *arguments[arguments.index("--metrics") + 1].split(",")], ["", "byte", "byte", "byte"]]
for number in range(len(spec["problems"])):
    rows += [[{MARK!r}, "0", "0", "0"], ["own", "1", "2", str(number)], [{MARK!r}, "0", "0", "0"]]
log = open(arguments[arguments.index("--log-file") + 1], "w")
for row in rows:
    print(",".join('"' + text + '"' for text in row), file=log)
""",
    )
    counted = list(counters.count(["a", "b"], PROBLEMS, "cuda:0"))
    assert [(one.impl, one.version, one.l2) for one in counted] == [
        (name, name, number) for name in "ab" for number in range(3)
    ]


def test_counters_that_the_user_may_not_read_are_said_so(path: Path) -> None:
    stand_in(
        path, 'open(arguments[arguments.index("--log-file") + 1], "w").write("==ERROR== ERR_NVGPUCTRPERM")'
    )
    with pytest.raises(NoCounters, match="may not read the GPU's counters"):
        list(counters.count(["a"], PROBLEMS, "cuda:0"))


def test_a_process_that_hangs_is_ended(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "TIME_LIMIT_S", 0.5)
    stand_in(path, "import time; time.sleep(60)")
    assert {one.reason for one in counters.count(["a"], PROBLEMS, "cuda:0")} == {
        "its process was lost: did not end within 0 s"
    }


def test_without_ncu_the_reason_is_one_line(path: Path, bench: Any) -> None:
    assert not (path / "ncu").exists()
    assert os.environ["PATH"] == str(path)
    with pytest.raises(NoCounters, match="no ncu is on PATH"):
        counters.find_ncu()
    done = bench("io", "--counters")
    assert done.exit_code == Exit.MACHINE
    assert done.stderr.count("\n") == 1


def test_recorded_counters_are_shown_again_and_nothing_is_counted(bench: Any, tmp_path: Path) -> None:
    least = PROBLEMS[0].minimal_bytes
    counted = Counted("x", "1", PROBLEMS[0], 1.5 * least, 0.5 * least, 8.0 * least, ["a"])
    refused = Counted("y", "1", PROBLEMS[0], reason="does not fit")
    document = {
        "counted": [counted.to_json(), refused.to_json()],
        "models": {PROBLEMS[0].key: {"m": 4.0 * least}},
    }
    (tmp_path / "counters.json").write_text(json.dumps(document))
    done = bench("io", "--recorded", str(tmp_path / "counters.json"), "--output-dir", str(tmp_path / "out"))
    assert done.exit_code == Exit.OK, done.stderr
    assert "2.00×" in done.stdout
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".png", ".svg"}
    (tmp_path / "other.json").write_text("{}")
    other = bench("io", "--recorded", str(tmp_path / "other.json"))
    assert other.exit_code == Exit.USAGE
    assert other.stderr.count("\n") == 1
