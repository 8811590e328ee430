"""The suites as pytest items, in pytest processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnbench.harness.conform import pytest_plugin
from attnbench.harness.conform.suite import select
from attnbench.harness.conform.verdict import NOT_ASKED, Finding, Verdict


def run_pytest(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-q",
        *map(str, arguments),
    ]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)


def test_pytest_poses_the_same_cases_with_the_same_verdicts(suite: str, tmp_path: Path) -> None:
    (tmp_path / "conformance").mkdir()
    (tmp_path / "conformance" / "planted.toml").write_text(Path(suite).read_text())
    answer = run_pytest("--impl", "last-key,sdpa-cudnn", "-rs", "conformance", folder=tmp_path)
    assert answer.returncode == 1, answer.stdout
    assert "1 failed, 2 passed, 3 skipped" in answer.stdout
    assert "FAIL: last-key: out[0, 0, 0, 0] is" in answer.stdout
    assert "why: one key more than a tile" in answer.stdout
    assert "UNAVAILABLE: runs on cuda" in answer.stdout


def test_a_fault_of_the_machine_is_no_skip_to_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    case = select(["causal"], "cpu")[0]
    unasked = Finding(case.id, "right", "1", "cpu", Verdict.ERROR, "not judged", facts=NOT_ASKED)
    examination = SimpleNamespace(examine=lambda *_: unasked)
    monkeypatch.setattr(pytest_plugin, "examination", lambda _: examination)
    item: Any = SimpleNamespace(impl="right", case=case, session=None, user_properties=[])
    with pytest.raises(pytest_plugin.NotConformingError, match="not judged"):
        pytest_plugin.CaseItem.runtest(item)
    assert item.user_properties == [("verdict", "NOT EXAMINED")]


def test_pytest_finds_the_built_in_suites_by_their_package(tmp_path: Path) -> None:
    arguments = (
        "--pyargs",
        "attnbench.suites",
        "--impl",
        "standard",
        "--suite",
        "gradients",
        "--collect-only",
    )
    answer = run_pytest(*arguments, folder=tmp_path)
    assert answer.returncode == 0, answer.stdout
    assert "standard:gradients/finite-differences[" in answer.stdout
    unknown = run_pytest("--pyargs", "attnbench.suites", "--impl", "standrd", folder=tmp_path)
    assert unknown.returncode == 4
    assert "did you mean standard?" in unknown.stderr


def test_without_an_implementation_pytest_collects_nothing(tmp_path: Path) -> None:
    answer = run_pytest("--pyargs", "attnbench.suites", folder=tmp_path)
    assert answer.returncode == 5
