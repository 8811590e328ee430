"""The made-up run that the report's tests read."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    """The module builder.py beside this file."""
    spec = importlib.util.spec_from_file_location("report_builder", Path(__file__).with_name("builder.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_folder(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole made-up run; read only."""
    return builder.write_run(tmp_path_factory.mktemp("run"))
