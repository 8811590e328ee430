"""The made-up run that the report's tests read."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def run_folder(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole made-up run; read only."""
    return builder.write_run(tmp_path_factory.mktemp("run"))
