"""The memory of the FlashAttention paper: a slow one without limit, a fast one of M elements, and a count between.

An algorithm that runs on it says each time it brings a block to fast memory or writes one back. The unit is the
element, as in the paper; nothing here is about bytes, caches or time. Cheap to import.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accesses:
    """Elements read from slow memory and written to it."""

    reads: int = 0
    writes: int = 0

    @property
    def total(self) -> int:
        return self.reads + self.writes

    def __add__(self, other: Accesses) -> Accesses:
        return Accesses(self.reads + other.reads, self.writes + other.writes)

    def __sub__(self, other: Accesses) -> Accesses:
        return Accesses(self.reads - other.reads, self.writes - other.writes)


class TwoLevelMemory:
    """Counts what moves. size: M, elements of fast memory that one head has to itself (ValueError below 1)."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"fast memory of {size} elements; it must hold at least 1")
        self.size = size
        self.moved = Accesses()

    def read(self, elements: int) -> None:
        self.moved += Accesses(reads=elements)

    def write(self, elements: int) -> None:
        self.moved += Accesses(writes=elements)

    def block_rows(self, head_dim: int) -> tuple[int, int]:
        """Rows of the block that stays and of the blocks that stream past it: ceil(M / 4d) and min(that, d).

        FlashAttention's Bc and Br (arXiv 2205.14135, Algorithm 1, line 1): K and V blocks take half of M, Q and O at
        most as much, and a tile of scores at most a quarter.
        """
        stays = -(-self.size // (4 * head_dim))
        return stays, min(stays, head_dim)
