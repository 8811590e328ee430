"""Choices that were measured, in the place of the rules in `configs`: tables that `bench tune` wrote.

A table is for one kind of device and is refused on any other. It speaks of exactly the shapes that were measured; the
rules serve for all others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnbench.harness.contract import TUNED_VARIABLE
from attnbench.impls.flash_triton.configs import (
    BackwardConfig,
    ForwardConfig,
    Hopper,
    HopperBackward,
    Shape,
    Tile,
)

SCHEMA = 1


class TableError(ValueError):
    """A table that cannot be read, or was tuned on another device; the message names it and the variable."""


@dataclass(frozen=True, eq=False)
class Table:
    """Configurations by what they depend on. device: the name of the one it was measured on; empty for any."""

    forward: Mapping[Shape, ForwardConfig] = field(default_factory=dict)
    backward: Mapping[tuple[Shape, bool], BackwardConfig] = field(default_factory=dict)
    device: str = ""

    def forward_of(self, device: torch.device, shape: Shape) -> ForwardConfig | None:
        """What was chosen for a forward; TableError on another device."""
        self._check(device)
        return self.forward.get(shape)

    def backward_of(self, device: torch.device, shape: Shape, deterministic: bool) -> BackwardConfig | None:
        """Likewise for a backward."""
        self._check(device)
        return self.backward.get((shape, deterministic))

    def _check(self, device: torch.device) -> None:
        if self.device and self.device != (here := name_of(device)):
            raise TableError(f"${TUNED_VARIABLE}: this table was tuned on {self.device}, and this is {here}")


def name_of(device: torch.device) -> str:
    """What a table calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def forward_choice(shape: Shape, config: ForwardConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(key, choice) as a table keeps them."""
    return {"pass": "forward", "shape": asdict(shape)}, asdict(config)


def backward_choice(
    shape: Shape, deterministic: bool, config: BackwardConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(key, choice) as a table keeps them."""
    return {"pass": "backward", "shape": asdict(shape), "deterministic": deterministic}, asdict(config)


def read(path: Path) -> Table:
    """The table in a file; TableError if it is none. Entries of other implementations are passed over."""
    forward: dict[Shape, ForwardConfig] = {}
    backward: dict[tuple[Shape, bool], BackwardConfig] = {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']}")
        for entry in document["choices"]:
            if not entry["impl"].startswith("flash-triton"):
                continue
            key, choice = entry["key"], entry["choice"]
            shape = Shape(**key["shape"] | {"mask_block": tuple(key["shape"]["mask_block"])})
            if key["pass"] == "forward":
                parts = {"tile": Tile(**choice["tile"]), "hopper": _or_none(Hopper, choice["hopper"])}
                forward[shape] = ForwardConfig(**choice | parts)
            else:
                tiles = {name: Tile(**choice[name]) for name in ("dkdv", "dq")}
                chosen = BackwardConfig(
                    **choice | tiles | {"hopper": _or_none(HopperBackward, choice["hopper"])}
                )
                backward[shape, key["deterministic"]] = chosen
        return Table(forward, backward, document["device"]["name"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableError(
            f"${TUNED_VARIABLE}: {path} is not a table that bench tune wrote ({error!r})"
        ) from None


def _or_none(kind: Any, fields: dict[str, Any] | None) -> Any:
    return None if fields is None else kind(**fields)


_active: Table | None = None


def active() -> Table:
    """The table that calls go by: of the innermost `using`, else of the variable as it was at the first call."""
    global _active  # noqa: PLW0603 - one table a process, read once
    if _active is None:
        named = os.environ.get(TUNED_VARIABLE)
        _active = read(Path(named)) if named else Table()
    return _active


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Every call of this process goes by `table`, also on autograd's threads."""
    global _active  # noqa: PLW0603
    before, _active = _active, table
    try:
        yield
    finally:
        _active = before
