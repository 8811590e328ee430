"""Dropout drawn tile by tile, so that no mask is ever stored: the backward draws a tile's again from the same seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileDropout:
    """What one call drops. seed: from torch's generator; the mask of tile (i, j) follows from it alone."""

    seed: int
    p: float

    @classmethod
    def draw(cls, p: float) -> TileDropout:
        """A new one, advancing torch's generator of the CPU; without dropout it is left alone."""
        return cls(int(torch.randint(2**31, ())) if p else 0, p)

    def __call__(self, x: Tensor, i: int, j: int) -> Tensor:
        """x, a tile of P or of dP, with the dropped weights 0 and the kept ones scaled (FA1 Algorithm 2, line 14)."""
        if not self.p:
            return x
        # Seeds next to each other would be those of the next call: a tile's are 2^31 apart.
        generator = torch.Generator(x.device).manual_seed(self.seed + ((i << 16 | j) << 31))
        drop = torch.empty_like(x, dtype=torch.bool).bernoulli_(self.p, generator=generator)
        return x.masked_fill(drop, 0).mul_(1 / (1 - self.p))
