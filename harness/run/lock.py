"""Keeps two runs off one GPU: an advisory lock per device, dropped by the kernel when its holder dies."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnbench.harness.run.errors import Exit, RunError


@contextmanager
def device_lock(name: str) -> Iterator[None]:
    """Holds the lock of the device called ``name`` (a GPU's UUID); RunError at once when another run holds it."""
    folder = Path(os.environ.get("ATTNBENCH_LOCK_DIR", tempfile.gettempdir()))
    path = folder / f"attnbench-{name}.lock"
    try:
        opened = path.open("a+")
    except OSError as error:  # another user's file in a shared /tmp, or no such folder
        why = f"{path}: {error.strerror}; ATTNBENCH_LOCK_DIR names another folder"
        raise RunError(f"cannot lock {name}: {why}", Exit.MACHINE) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RunError(
                f"{name} is in use by another run (pid {holder}); wait for it or pass another --device",
                Exit.MACHINE,
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
