"""Text out of a record made harmless for the document it is put into."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]|#~$])")


def markdown_escape(value: Any) -> str:
    """Text that GitHub's Markdown shows as it is, within one line of a table; a path is ours, and stays as it is."""
    if isinstance(value, PurePath):
        return value.as_posix()
    escaped = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(escaped.split()))
