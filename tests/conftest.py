"""What every test runs under: settled randomness, one thread a process, no display, a Ctrl-C that is heard."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

# Before torch and matplotlib are imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

# A shell that starts the tests in the background has them ignore it, and what they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples everywhere, and no verdict that depends on how busy the machine is.
hypothesis.settings.register_profile("attnbench", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("attnbench")


@pytest.fixture(scope="session")
def load_module() -> Callable[[str, Path], ModuleType]:
    """``load_module(name, file)``: a module that tests share and that lies in no package."""

    def load(name: str, file: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked ``gpu`` on a machine without a CUDA device."""
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=needing_gpu)
        items[:] = [item for item in items if item not in needing_gpu]
