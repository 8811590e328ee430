"""The lock of a device: one run at a time, and none that outlives its holder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.lock import device_lock

HOLD = """
import sys
from attnbench.harness.run.lock import device_lock
with device_lock("GPU-1"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNBENCH_LOCK_DIR", str(tmp_path))


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds GPU-1 until its stdin is closed; before it, a run that is long gone did."""
    (tmp_path / "attnbench-GPU-1.lock").write_text("99999999")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_device_in_use_names_its_holder(holder: subprocess.Popen[str]) -> None:
    in_use = rf"GPU-1 is in use by another run \(pid {holder.pid}\)"
    with pytest.raises(RunError, match=in_use) as refused, device_lock("GPU-1"):
        pytest.fail("taken while held")
    assert refused.value.exit_code == Exit.MACHINE
    with device_lock("GPU-2"):  # another device is free
        pass


def test_a_refusal_leaves_the_holder_s_name_in_place(holder: subprocess.Popen[str]) -> None:
    for _ in range(2):
        with pytest.raises(RunError, match=str(holder.pid)), device_lock("GPU-1"):
            pytest.fail("taken while held")


def test_a_killed_holder_holds_nothing(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with device_lock("GPU-1"):
        pass


def test_it_is_released_on_leaving_and_on_an_error() -> None:
    with pytest.raises(ZeroDivisionError), device_lock("GPU-1"):
        raise ZeroDivisionError
    with device_lock("GPU-1"), pytest.raises(RunError), device_lock("GPU-1"):
        pytest.fail("taken twice")
    with device_lock("GPU-1"):
        pass


def test_a_lock_that_cannot_be_made_is_a_clear_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a shared /tmp, where the kernel refuses to open another user's file for writing.
    monkeypatch.setenv("ATTNBENCH_LOCK_DIR", str(tmp_path / "absent"))
    with pytest.raises(RunError, match="cannot lock GPU-1: ") as refused, device_lock("GPU-1"):
        pytest.fail("taken without a lock")
    assert refused.value.exit_code == Exit.MACHINE
