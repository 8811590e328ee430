"""Tables of choices: JSON that implementations read in place of their own rules, on the device it was measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnbench.harness.run.errors import RunError
from attnbench.harness.tune.search import Tuned

SCHEMA = 1
COLUMNS = ("problem", "candidates", "right", "its own choice", "ms", "fastest", "ms", "times as fast", "kept")


def updated(path: Path | None, tuned: Sequence[Tuned], environment: dict[str, Any]) -> dict[str, Any]:
    """The table at ``path``, if there is one, with what was found now. A problem tuned again loses its old entry.

    environment: as a run's; its first device is what the table is for. RunError for a file that is no table, or of
    another device.
    """
    facts = environment["devices"][0]
    device = {"name": facts["name"], "capability": list(facts.get("capability", (0, 0)))}
    before: dict[str, Any] = {"device": device, "choices": []}
    if path and path.exists():
        before = _read(path)
    if before["device"] != device:
        raise RunError(
            f"--output {path}: tuned on {before['device']['name']}, and this is {device['name']}; name another file"
        )
    again = {(one.impl, one.problem.key) for one in tuned if one.best}
    kept = [entry for entry in before["choices"] if (entry["impl"], entry["problem"]) not in again]
    return {
        "schema": SCHEMA, "device": device, "environment": environment,
        "choices": kept + [one.to_json() for one in tuned if one.faster],
    }  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}, and this attnbench writes {SCHEMA}")
        return {"device": dict(found["device"]), "choices": list(found["choices"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"--output {path}: not a table that bench tune wrote ({error!r})") from None


def rows(tuned: Sequence[Tuned]) -> list[tuple[str, ...]]:
    """A line a problem, under ``COLUMNS``."""
    return [_row(one) for one in tuned]


def _row(one: Tuned) -> tuple[str, ...]:
    name = f"{one.impl}/{one.problem.key}"
    right = sum(not trial.why for trial in one.trials)
    counts = (name, str(len(one.trials)), str(right))
    if one.best is None:
        return (*counts, one.why, "", "", "", "", "")
    unasked = one.trials[0]
    gain = (
        "1" if one.gain.value is None else f"{one.gain.value:.3f} ({one.gain.low:.3f} to {one.gain.high:.3f})"
    )
    return (
        *counts, unasked.label, f"{unasked.ms:.4f}", one.best.label, f"{one.best.ms:.4f}", gain,
        "yes" if one.faster else "no",
    )  # fmt: skip
