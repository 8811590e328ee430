"""The vendor's figures of a card, from ``datasheet.toml``; what is published per clock, at the highest clock."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("datasheet.toml")
HBM = ("copy", "hbm_read")


@dataclass(frozen=True)
class Datasheet:
    """figures: by ceiling, in its unit. per_clock: by ceiling, per SM and clock. clocks: SMs times highest clock in Hz,
    0 where unknown."""

    figures: dict[str, Any] = field(default_factory=dict)
    per_clock: dict[str, float] = field(default_factory=dict)
    clocks: float = 0.0

    @classmethod
    def of(
        cls, name: str, *, capability: tuple[int, int], sm_count: int, max_sm_mhz: float | str | None
    ) -> Datasheet:
        data = tomllib.loads(FILE.read_text(encoding="utf-8"))
        per_clock = data["per_sm_and_clock"].get(f"{capability[0]}.{capability[1]}", {})
        return cls(data.get(name, {}), per_clock, sm_count * float(max_sm_mhz or 0) * 1e6)

    def figure(self, ceiling: str, unit: str) -> float | None:
        """The published figure in ``unit`` (TFLOP/s, GB/s, Gexp/s), or None."""
        found = self.figures.get("hbm" if ceiling in HBM else ceiling)
        if found is None and self.clocks and ceiling in self.per_clock:
            found = self.per_clock[ceiling] * self.clocks / 1e9
        return None if found is None else float(found)
