"""The one meaning of every attention mask: which key each query row may see.

A mask is a band (how many keys left and right of the diagonal a row sees) and, optionally, a pattern of
visible blocks; a pair is visible when both allow it. Everything that asks "does row i see key j" asks here:
the FLOP count, the oracle, the implementations' dense fallbacks.

Band rule, with ``shift = seqlen_k - seqlen_q`` for ``bottom_right`` and ``0`` for ``top_left``::

    row i sees key j  iff  i + shift - left <= j <= i + shift + right

``left`` or ``right`` of None is unbounded. Causal is ``right = 0``. The alignments agree when the lengths do.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

Alignment = Literal["bottom_right", "top_left"]
ALIGNMENTS: tuple[Alignment, ...] = ("bottom_right", "top_left")
KINDS = ("full", "causal", "window", "block_sparse")
PATTERNS = ("full", "random", "banded", "strided", "butterfly")

_NUMBER = r"(\d+|inf)"
_WINDOW = re.compile(rf"window\({_NUMBER},{_NUMBER}\)")
_BLOCKS = re.compile(r"blocks\((\w+),(\d+)x(\d+)((?:,\w+=[\w.]+)*)\)")
GRAMMAR = (
    "full, causal, causal@top_left, window(LEFT,RIGHT), window(LEFT,RIGHT)@top_left, "
    "blocks(PATTERN,BQxBK[,density=D][,seed=N][,per_head=1]), or BAND&blocks(...)"
)


@dataclass(frozen=True)
class BlockPattern:
    """Which (block_q x block_k) tiles of the score matrix are visible.

    name: full, random (each block drawn with probability ``density``), banded (the diagonal band whose area is
    about ``density``), strided (the diagonal and every n-th column, n about 1/density) or butterfly (the fixed
    pattern of block-sparse FlashAttention: block i sees block j when their indices differ in at most one bit).
    per_head draws a different random pattern for each query head.
    """

    name: str
    block_q: int
    block_k: int
    density: float = 0.25
    seed: int = 0
    per_head: bool = False

    def __post_init__(self) -> None:
        if self.name not in PATTERNS:
            raise ValueError(f"block pattern {self.name!r} is not one of {', '.join(PATTERNS)}")
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(f"block size {self.block_q}x{self.block_k} must be at least 1x1")
        if not 0.0 <= self.density <= 1.0:
            raise ValueError(f"density {self.density} must lie in [0, 1]")
        if self.per_head and self.name != "random":
            raise ValueError(f"per_head needs the random pattern, got {self.name!r}")
        # What a pattern does not use has one value, so that equal patterns compare equal.
        if self.name != "random":
            object.__setattr__(self, "seed", 0)
        if self.name in ("full", "butterfly"):
            object.__setattr__(self, "density", 0.25)

    @property
    def label(self) -> str:
        parts = [self.name, f"{self.block_q}x{self.block_k}"]
        if self.name in ("random", "banded", "strided"):
            parts.append(f"density={self.density!r}")
        if self.name == "random":
            parts.append(f"seed={self.seed}")
        if self.per_head:
            parts.append("per_head=1")
        return f"blocks({','.join(parts)})"

    def blocks(self, heads: int, seqlen_q: int, seqlen_k: int) -> np.ndarray:
        """Visible blocks as bool (1 or heads, ceil(seqlen_q / block_q), ceil(seqlen_k / block_k)); read-only."""
        return _blocks(self, heads if self.per_head else 1, seqlen_q, seqlen_k)


@lru_cache(maxsize=32)
def _blocks(pattern: BlockPattern, heads: int, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    import numpy as np

    rows, cols = -(-seqlen_q // pattern.block_q), -(-seqlen_k // pattern.block_k)
    i, j = np.arange(rows)[:, None], np.arange(cols)[None, :]
    # Where a row of blocks crosses the diagonal of a score matrix that need not be square.
    diagonal = (i * cols) // max(rows, 1)
    if pattern.name == "full":
        visible = np.ones((heads, rows, cols), bool)
    elif pattern.name == "random":
        draws = np.random.default_rng(pattern.seed).random((heads, rows, cols))
        visible = draws < pattern.density
    elif pattern.name == "banded":
        # A band of half-width w covers about 2w/cols of a square; solve w from the density asked for.
        half = math.ceil(cols * (1 - math.sqrt(1 - pattern.density)) - 0.5)
        visible = (np.abs(j - diagonal) <= half)[None]
    elif pattern.name == "strided":
        step = max(1, round(1 / pattern.density)) if pattern.density else cols + 1
        visible = ((j == diagonal) | (j % step == step - 1))[None]
    else:
        difference = diagonal ^ j
        visible = ((difference & (difference - 1)) == 0)[None]
    visible.setflags(write=False)
    return visible


@dataclass(frozen=True)
class Mask:
    """A band and optionally a block pattern; see the module docstring for the rule."""

    left: int | None = None
    right: int | None = None
    alignment: Alignment = "bottom_right"
    blocks: BlockPattern | None = None

    def __post_init__(self) -> None:
        for side in ("left", "right"):
            value = getattr(self, side)
            if value is not None and value < 0:
                raise ValueError(f"mask {side} is {value}; it must be None or at least 0")
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"mask alignment {self.alignment!r} is not one of {', '.join(ALIGNMENTS)}")
        if not self.banded:  # nothing to align: one value, so that equal masks compare equal
            object.__setattr__(self, "alignment", "bottom_right")

    @classmethod
    def full(cls) -> Mask:
        return cls()

    @classmethod
    def causal(cls, alignment: Alignment = "bottom_right") -> Mask:
        return cls(right=0, alignment=alignment)

    @classmethod
    def window(cls, left: int | None, right: int | None, alignment: Alignment = "bottom_right") -> Mask:
        return cls(left=left, right=right, alignment=alignment)

    @classmethod
    def parse(cls, text: str) -> Mask:
        """The mask that ``label`` writes as ``text``; ValueError names what is wrong and the grammar."""
        band_text, _, block_text = text.replace(" ", "").rpartition("&")
        if not block_text.startswith("blocks("):
            band_text, block_text = block_text if not band_text else text, ""
        blocks = _parse_blocks(block_text, text) if block_text else None
        band, _, alignment = (band_text or "full").partition("@")
        alignment = alignment or "bottom_right"
        if alignment not in ALIGNMENTS:
            raise ValueError(f"mask {text!r}: alignment {alignment!r} is not one of {', '.join(ALIGNMENTS)}")
        if band == "full":
            return cls(blocks=blocks)
        if band == "causal":
            return cls(right=0, alignment=alignment, blocks=blocks)
        if match := _WINDOW.fullmatch(band):
            left, right = (None if side == "inf" else int(side) for side in match.groups())
            return cls(left, right, alignment, blocks)
        raise ValueError(f"mask {text!r} is not understood; masks are written {GRAMMAR}")

    @property
    def kind(self) -> str:
        """The coarsest word for this mask, one of KINDS: what a capability is declared for."""
        if self.blocks:
            return "block_sparse"
        if self.left is not None:
            return "window"
        if self.right is None:
            return "full"
        return "causal" if self.right == 0 else "window"

    @property
    def banded(self) -> bool:
        return self.left is not None or self.right is not None

    @property
    def label(self) -> str:
        """The text that ``parse`` reads back to an equal mask."""
        if not self.banded:
            band = "" if self.blocks else "full"
        elif self.left is None and self.right == 0:
            band = "causal"
        else:
            sides = ("inf" if side is None else str(side) for side in (self.left, self.right))
            band = f"window({','.join(sides)})"
        if self.banded and self.alignment != "bottom_right":
            band += f"@{self.alignment}"
        return "&".join(part for part in (band, self.blocks.label if self.blocks else "") if part)

    def shift(self, seqlen_q: int, seqlen_k: int) -> int:
        return seqlen_k - seqlen_q if self.alignment == "bottom_right" else 0

    def row_bounds(self, seqlen_q: int, seqlen_k: int) -> tuple[np.ndarray, np.ndarray]:
        """First and one-past-last key of the band for each row, int64 (seqlen_q,), with first <= last."""
        import numpy as np

        diagonal = np.arange(seqlen_q, dtype=np.int64) + self.shift(seqlen_q, seqlen_k)
        first = np.zeros_like(diagonal) if self.left is None else diagonal - self.left
        last = np.full_like(diagonal, seqlen_k) if self.right is None else diagonal + self.right + 1
        first = np.clip(first, 0, seqlen_k)
        return first, np.maximum(first, np.clip(last, 0, seqlen_k))

    def visible_pairs(self, heads: int, seqlen_q: int, seqlen_k: int) -> int:
        """Exact number of visible (query, key) pairs, summed over ``heads`` query heads of one batch entry."""
        import numpy as np

        first, last = self.row_bounds(seqlen_q, seqlen_k)
        if not self.blocks:
            return heads * int((last - first).sum())
        visible = self.blocks.blocks(heads, seqlen_q, seqlen_k)
        starts = np.arange(visible.shape[2], dtype=np.int64) * self.blocks.block_k
        ends = np.minimum(starts + self.blocks.block_k, seqlen_k)
        total = 0
        for block_row in range(visible.shape[1]):
            rows = slice(block_row * self.blocks.block_q, (block_row + 1) * self.blocks.block_q)
            low = np.maximum(first[rows, None], starts[None])
            high = np.minimum(last[rows, None], ends[None])
            per_block = np.maximum(high - low, 0).sum(axis=0)
            total += int((visible[:, block_row] * per_block).sum())
        return total * (heads // visible.shape[0])

    def tiles(
        self, heads: int, seqlen_q: int, seqlen_k: int, tile_q: int, tile_k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which (tile_q x tile_k) tiles may hold a visible pair, and which hold visible pairs only.

        Both bool (1 or heads, tiles of Q, tiles of K), from row bounds and blocks, never from a dense mask. With a
        block pattern, a tile must be whole blocks or a part of one.
        """
        import numpy as np

        starts_q, starts_k = np.arange(0, seqlen_q, tile_q), np.arange(0, seqlen_k, tile_k)
        first, last = self.row_bounds(seqlen_q, seqlen_k)
        # first and last never decrease from row to row, so a tile's top and bottom rows decide for all of it.
        top, bottom = starts_q[:, None], np.minimum(starts_q + tile_q, seqlen_q)[:, None] - 1
        visible = ((last[bottom] > starts_k) & (first[top] < np.minimum(starts_k + tile_k, seqlen_k)))[None]
        whole = ((first[bottom] <= starts_k) & (last[top] >= np.minimum(starts_k + tile_k, seqlen_k)))[None]
        pattern = self.blocks
        if not pattern:
            return visible, whole
        grid = pattern.blocks(heads, seqlen_q, seqlen_k)
        rows_of_tiles, columns_of_tiles = starts_q // pattern.block_q, starts_k // pattern.block_k

        def over_tiles(reduce: np.ufunc) -> np.ndarray:
            return reduce.reduceat(reduce.reduceat(grid, rows_of_tiles, axis=1), columns_of_tiles, axis=2)

        return visible & over_tiles(np.logical_or), whole & over_tiles(np.logical_and)

    def dense(self, rows: torch.Tensor, heads: int, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
        """Visibility of every key from the given rows: bool (1 or heads, len(rows), seqlen_k) on rows' device."""
        import torch

        device = rows.device
        keys = torch.arange(seqlen_k, device=device)
        diagonal = rows[:, None] + self.shift(seqlen_q, seqlen_k)
        visible = torch.ones((1, len(rows), seqlen_k), dtype=torch.bool, device=device)
        if self.left is not None:
            visible &= keys >= diagonal - self.left
        if self.right is not None:
            visible &= keys <= diagonal + self.right
        if self.blocks:
            blocks = torch.tensor(self.blocks.blocks(heads, seqlen_q, seqlen_k), device=device)
            visible = visible & blocks[:, rows // self.blocks.block_q][:, :, keys // self.blocks.block_k]
        return visible


def _parse_blocks(block_text: str, text: str) -> BlockPattern:
    match = _BLOCKS.fullmatch(block_text)
    if not match:
        raise ValueError(f"mask {text!r} is not understood; masks are written {GRAMMAR}")
    name, block_q, block_k, rest = match.groups()
    options = dict(part.split("=") for part in rest.split(",") if part)
    if unknown := set(options) - {"density", "seed", "per_head"}:
        raise ValueError(f"mask {text!r}: unknown block option {min(unknown)!r} (density, seed, per_head)")
    try:
        density, seed = float(options.get("density", 0.25)), int(options.get("seed", 0))
    except ValueError as error:
        raise ValueError(f"mask {text!r}: {error}") from None
    return BlockPattern(name, int(block_q), int(block_k), density, seed, options.get("per_head") == "1")
