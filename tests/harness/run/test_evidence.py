"""What of a traceback goes into a record."""

from __future__ import annotations

import sys
from pathlib import Path

import attnbench.harness.run.evidence as module
from attnbench.harness.run.evidence import MOST_CHARACTERS, evidence


def test_file_names_are_relative_to_where_they_are_imported_from() -> None:
    here, there = Path(module.__file__), Path(sys.prefix) / "lib" / "site.py"
    told = evidence(f'File "{here}", line 3\nFile "{there}", line 4\nFile "/elsewhere/x.py", line 5\n')
    assert (
        told
        == 'File "harness/run/evidence.py", line 3\nFile "lib/site.py", line 4\nFile "/elsewhere/x.py", line 5\n'
    )


def test_the_end_is_kept() -> None:
    assert evidence("x" * 5000 + "end") == "x" * (MOST_CHARACTERS - 3) + "end"
