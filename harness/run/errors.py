"""Why a run cannot go on: one clear line and a stable exit code, never a traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path


class Exit(IntEnum):
    """Exit codes of ``bench``; documented in its help and never renumbered."""

    OK = 0  # the run is complete; OOM, UNSUPPORTED and UNAVAILABLE are answers
    CELLS = 1  # some cell is INCORRECT, CRASHED, TIMEOUT or ERROR, whether the run is complete or --fail-fast ended it
    USAGE = 2  # bad option, name or suite file
    NOTHING = 3  # not one cell was measured
    MACHINE = 5  # the machine is unfit: no GPU, GPU locked by another run, output unwritable, disk full
    INTERRUPTED = 130  # Ctrl-C; what was recorded stays, --resume goes on
    PIPE_CLOSED = 141  # the reader of stdout went away, as a shell reports SIGPIPE


# What a user can mend; any other OSError is a defect and keeps its traceback.
MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}


class RunError(Exception):
    """Ends the run with ``message``, one line for the user, and ``exit_code``."""

    def __init__(self, message: str, exit_code: int = Exit.USAGE) -> None:
        super().__init__(message)
        self.exit_code = int(exit_code)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """What the system says against writing at ``place`` is RunError's one line: whatever its reason, a user's path."""
    try:
        yield
    except OSError as error:
        refused = Path(error.filename) if error.filename else place
        why = "is not a folder" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise RunError(f"cannot write {refused}: {why}", Exit.MACHINE) from error


def make_folder(folder: Path) -> Path:
    """``folder``, there from now on: called before the work whose results go there. RunError where it cannot be."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Writes each content under its name into ``folder``, which is there; their paths. RunError where it cannot."""
    with writing(folder):
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return [folder / name for name in files]


def unknown_word(kind: str, word: str, known: Iterable[str]) -> str:
    """``unknown suite 'smok'; did you mean smoke?``, or every known word when none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known) or 'none'}"
    return f"unknown {kind} {word!r}; {hint}"
