"""Option values as they are typed, turned into what the harness takes; RunError names what is wrong with one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attnbench.harness.problem import DIRECTIONS, DTYPES
from attnbench.harness.report.metrics import METRICS
from attnbench.harness.run.errors import RunError, unknown_word
from attnbench.harness.run.plan import Filters
from attnbench.harness.run.suite import parse_size

CAUSAL = {"both": None, "true": True, "false": False}


def split(values: Sequence[str] | None) -> tuple[str, ...]:
    """Words of an option given as ``a,b``, several times, or both; in order, each once."""
    words = (word.strip() for value in values or () for word in value.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


def known(option: str, kind: str, values: Sequence[str] | None, allowed: Sequence[str]) -> tuple[str, ...]:
    """The words of ``values``, each one of ``allowed``."""
    words = split(values)
    for word in words:
        if word not in allowed:
            raise RunError(f"{option}: {unknown_word(kind, word, allowed)}")
    return words


def sizes(option: str, values: Sequence[str] | None) -> tuple[int, ...]:
    """Numbers such as ``64`` or ``8k``."""
    try:
        return tuple(parse_size(word) for word in split(values))
    except ValueError as error:
        raise RunError(f"{option}: {error}") from None


def share(option: str, text: str) -> float:
    """0.02 from ``2%`` or ``0.02``."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < value < 1:
        raise RunError(f"{option} {text}: write a share such as 2% or 0.02")
    return value


def metrics(values: Sequence[str] | None, baseline: str | None) -> tuple[str, ...] | None:
    """Metrics to report; None, which stands for the usual ones, when none is named."""
    chosen = known("--metrics", "metric", values, tuple(METRICS))
    if "speedup" in chosen and not baseline:
        raise RunError("--metrics: speedup is over a baseline; name it with --baseline")
    return chosen or None


def filters(
    dtype: Sequence[str] | None,
    seqlen: Sequence[str] | None,
    headdim: Sequence[str] | None,
    causal: str | None,
    mode: Sequence[str] | None,
) -> Filters:
    """What to keep of a suite."""
    word = (causal or "both").lower()
    if word not in CAUSAL:
        raise RunError(f"--causal: {unknown_word('value', word, CAUSAL)}")
    return Filters(
        dtypes=known("--dtype", "dtype", dtype, DTYPES),
        seqlens=sizes("--seqlen", seqlen),
        head_dims=sizes("--headdim", headdim),
        causal=CAUSAL[word],
        directions=known("--mode", "mode", mode, DIRECTIONS),
    )
