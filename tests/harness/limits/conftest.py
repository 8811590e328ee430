"""``bench`` in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from attnbench.harness.cli import ceilings as ceilings_command
from attnbench.harness.cli import io as io_command
from attnbench.harness.cli.app import app


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls ``bench`` on a machine without a GPU."""
    for module in (ceilings_command, io_command):
        monkeypatch.setattr(module, "visible_gpus", list)
    return lambda *arguments: CliRunner().invoke(app, list(arguments), prog_name="bench")
