"""What a run wrote down about itself, read back to go on with it: its groups and how they are measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.harness.run.errors import RunError
from attnbench.harness.run.gpus import Gpu
from attnbench.harness.run.plan import GroupPlan

# One run is measured in one way, or its cells cannot stand in one table.
METHOD = ("seed", "rounds", "samples", "hot", "cudagraph", "memory")
# These change what is waited for, not what is measured; the recorded ones hold where nothing else is said.
PATIENCE = ("time_limit_s", "fail_fast")


@dataclass(frozen=True)
class Recorded:
    """plan.json of the run in ``folder``."""

    folder: Path
    plans: tuple[GroupPlan, ...]
    options: dict[str, Any]

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self.options["devices"])

    def options_with(self, given: dict[str, Any]) -> dict[str, Any]:
        """How to go on: as recorded, with ``given`` on top, where None is not said.

        RunError where that would measure in another way.
        """
        for name in METHOD:
            if given[name] is not None and given[name] != self.options[name]:
                raise RunError(
                    f"--resume {self.folder}: the run was started with {name} = {self.options[name]}, "
                    f"not {given[name]}; a run is measured in one way"
                )
        recorded = {name: self.options[name] for name in (*METHOD, *PATIENCE)}
        recorded["energy"] = self.options.get("energy", False)  # added to what is measured, at any time
        return recorded | {name: value for name, value in given.items() if value is not None}

    def check_device(self, devices: tuple[str, ...]) -> None:
        """RunError where the run is on another kind of device; another card of the same kind is the runner's call."""
        kinds = {device.partition(":")[0] for device in self.devices}
        if kinds != {device.partition(":")[0] for device in devices}:
            raise RunError(
                f"--resume {self.folder}: the run is on {', '.join(self.devices)}, not {devices[0]}"
            )

    def check_ground(self, devices: tuple[str, ...], gpus: Sequence[Gpu]) -> None:
        """RunError where the figures to come would stand on another card, commit or library than those there are."""
        check_ground(self.folder, devices, gpus)

    def only_suite(self) -> str:
        """The suite that filters apply to when none is named; RunError when the run holds several."""
        suites = list(dict.fromkeys(plan.suite for plan in self.plans))
        if len(suites) > 1:
            raise RunError(f"--resume {self.folder} holds suites {', '.join(suites)}: name one with --suite")
        return suites[0]


def check_ground(folder: Path, devices: tuple[str, ...], gpus: Sequence[Gpu]) -> None:
    """RunError where the run in ``folder`` was begun on another kind of card, commit or library than there are here."""
    from attnbench.harness.run.environment import FILE, differences, ground, ground_here

    try:
        recorded = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # ended before it was written: nothing was measured yet
    names = [gpus[int(device.partition(":")[2])].name if device != "cpu" else "cpu" for device in devices]
    if found := differences(ground(recorded), ground_here(names)):
        raise RunError(f"--resume {folder}: {'; '.join(found)}; --resume-anyway goes on, and the run says so")


def read_recorded(folder: Path) -> Recorded:
    """The run in ``folder``; RunError when it holds none that can be gone on with."""
    path = folder / "plan.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        plans = tuple(GroupPlan.from_json(plan) for plan in data["plans"])
        options = data["options"]
        if missing := [name for name in ("devices", *METHOD, *PATIENCE) if name not in options]:
            raise RunError(f"--resume {folder}: plan.json does not say {missing[0]}")
    except FileNotFoundError:
        raise RunError(f"--resume {folder}: no run is there (no plan.json)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"--resume {folder}: plan.json cannot be read: {error}") from None
    if not plans:
        raise RunError(f"--resume {folder}: its plan holds no group")
    return Recorded(folder, plans, options)
