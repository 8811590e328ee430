"""The band of a call: who sees whom under causal, window and alignment."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENTS = ("bottom_right", "top_left")
FARTHEST = 2**62
"""Sides beyond this mean the same; torch's schemas have 64 bits."""


@dataclass(frozen=True)
class Band:
    """Row i sees key j iff i + shift - left <= j <= i + shift + right; a side that is None is unbounded."""

    left: int | None
    right: int | None
    shift: int

    @staticmethod
    def of(left: int | None, right: int | None, bottom_right: bool, seqlen_q: int, seqlen_k: int) -> Band:
        """Sides clipped to the sequence, beyond which they mean the same, so that kernels can add them in 32 bits."""
        far = seqlen_q + seqlen_k
        shift = seqlen_k - seqlen_q if bottom_right else 0
        return Band(
            None if left is None else min(left, far), None if right is None else min(right, far), shift
        )

    @property
    def banded(self) -> bool:
        """Whether any side is bounded."""
        return self.left is not None or self.right is not None


def band_sides(
    causal: bool, window: tuple[int | None, int | None] | None, alignment: str
) -> tuple[int | None, int | None]:
    """(left, right) of the band that causal and window describe together."""
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment: got {alignment!r}, allowed are {' and '.join(ALIGNMENTS)}")
    if window is None:
        return None, 0 if causal else None
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(map(_is_side, window)):
        raise ValueError(f"window: got {window!r}, allowed are two sides, each None or an int >= 0")
    left, right = (None if side is None else min(side, FARTHEST) for side in window)
    return left, 0 if causal else right


def _is_side(side: object) -> bool:
    return side is None or (isinstance(side, int) and not isinstance(side, bool) and side >= 0)
