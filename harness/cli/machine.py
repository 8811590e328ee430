"""On which devices a run goes, and where it is kept by default."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from pathlib import Path

from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.gpus import Gpu


def choose_devices(words: Sequence[str], gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """Devices to run on, as ``cpu`` or ``cuda:N``, from what was asked for and the GPUs there are.

    The first GPU where none is named, the CPU where there is no GPU. RunError with Exit.USAGE for a word that names
    no device, with Exit.MACHINE for a GPU that is not there.
    """
    if not words:
        return ("cuda:0",) if gpus else ("cpu",)
    devices = []
    for word in words:
        match = re.fullmatch(r"(cpu)|cuda(?::(\d+))?", word)
        if not match:
            raise RunError(f"--device: {word!r} is no device; write cpu, cuda, cuda:0 or cuda:0,cuda:1")
        devices.append("cpu" if match[1] else f"cuda:{int(match[2] or 0)}")
    devices = list(dict.fromkeys(devices))
    if len(devices) > 1 and "cpu" in devices:
        raise RunError("--device: cpu and cuda do not mix in one run; run twice")
    for device in devices:
        kind, _, index = device.partition(":")
        if kind == "cuda" and int(index) >= len(gpus):
            there = ", ".join(f"cuda:{i} {gpu.name}" for i, gpu in enumerate(gpus)) or "none"
            raise RunError(f"--device {device} is not there; GPUs visible: {there}", Exit.MACHINE)
    return tuple(devices)


def default_output(devices: Sequence[str], gpus: Sequence[Gpu], root: Path = Path("results")) -> Path:
    """``root``/<device>/<date>-<commit>, with -2, -3 ... where that is taken."""
    from attnbench.harness.run.environment import commit

    kind, _, index = devices[0].partition(":")
    device = slug(gpus[int(index)].name) if kind == "cuda" else "cpu"
    today = datetime.datetime.now().astimezone().date()
    revision, dirty = commit()
    folder = Path(root, device, f"{today:%Y-%m-%d}-{revision}{'-dirty' if dirty else ''}")
    number = 2
    free = folder
    while free.exists():
        free = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return free


def slug(name: str) -> str:
    """``nvidia-h200`` from ``NVIDIA H200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
