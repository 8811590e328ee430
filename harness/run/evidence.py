"""Evidence of a failure as it goes into a record: the end of a text, without this machine's folders."""

from __future__ import annotations

import sys
from pathlib import Path

MOST_CHARACTERS = 2000
SOURCE = Path(__file__).resolve().parents[2]


def evidence(text: str) -> str:
    """The last MOST_CHARACTERS of ``text``, its file names relative to the folder they are imported from.

    Records are published: a traceback needs the file and the line, and nobody's home folder.
    """
    folders = {str(SOURCE), sys.prefix, *filter(None, sys.path)}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder.rstrip("/") + "/", "") if folder != "/" else text
    return text[-MOST_CHARACTERS:]
