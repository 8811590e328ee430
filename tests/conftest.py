"""What every test runs under: settled randomness, one thread a process, no display, a Ctrl-C that is heard."""

from __future__ import annotations

import os
import signal

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked ``gpu`` on a machine without a CUDA device."""
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=needing_gpu)
        items[:] = [item for item in items if item not in needing_gpu]
