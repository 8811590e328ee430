"""What a worker does to itself before it loads a plugin, so that no plugin can outlive or starve the run."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
HOST_MEMORY_SHARE = 0.8


def die_with(parent: int) -> None:
    """Asks the kernel for SIGKILL when the parent dies (Linux), and leaves at once if it is already gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def limit_host_memory() -> None:
    """A CPU worker that wants more memory than the machine has is refused by malloc, not shot by the kernel.

    Not for CUDA workers: the driver reserves address space far beyond any memory.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = int(os.environ.get("ATTNBENCH_HOST_MEMORY_BYTES", total * HOST_MEMORY_SHARE))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def volunteer_for_oom_killer() -> None:
    """If the machine does run out, the kernel takes a worker before it takes the runner."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return  # not Linux, or not allowed: the kernel then chooses by size alone


def trace_fatal_signals() -> None:
    """A segfault or abort leaves a Python traceback on stderr, which becomes the cell's evidence."""
    faulthandler.enable(all_threads=False)
