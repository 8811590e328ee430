"""Which implementations can run on this machine, and for each that cannot: why, and what would mend it.

Every plugin is loaded in a short process of its own (this module, run with -m), so that one that crashes, hangs or
prints on import is a finding and not the end of the examination.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from attnbench.harness.contract import Device
from attnbench.harness.registry import Entry, PluginError, entries, load
from attnbench.harness.run.gpus import visible_gpus
from attnbench.harness.run.process import environment_of, python_module

State = Literal["usable", "unavailable", "broken"]
LOAD_LIMIT_S = 30.0


@dataclass(frozen=True)
class Finding:
    """usable: it can be run here. unavailable: not on this machine, by its own word. broken: it does not load."""

    name: str
    version: str
    state: State
    reason: str = ""
    fix: str = ""


def examine(device: str, *, limit_s: float = LOAD_LIMIT_S) -> list[Finding]:
    """One finding for each registered implementation, then for each approximation, on ``cpu`` or ``cuda:N``; never
    raises for a plugin's sake.
    """
    posed = describe_device(device)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(lambda entry: _examine_apart(entry, posed, limit_s), _registered().values()))


def _registered() -> dict[str, Entry]:
    """The first registration of every name; ``load`` refuses a name that has two."""
    return {name: found[0] for name, found in (entries() | entries(approximate=True)).items()}


def describe_device(device: str) -> Device:
    """The device with its name and compute capability, as the driver tells them."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return Device("cpu", name=platform.processor())
    gpu = visible_gpus()[int(index or 0)]
    return Device("cuda", int(index or 0), gpu.name, gpu.capability)


def machine_facts() -> dict[str, str]:
    """What the implementations stand on, without importing any of it; ``none`` for what is not there."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    nvrtc = [
        f"{dist.name} {dist.version}"
        for dist in importlib.metadata.distributions()
        if dist.name and dist.name.lower().replace("_", "-").startswith("nvidia-cuda-nvrtc")
    ]
    gpus = visible_gpus()
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "nvrtc": ", ".join(sorted(set(nvrtc))) or "none",
        "C compiler": compiler or "none",
        "GPU": ", ".join(gpu.name for gpu in gpus) or "none",
        "driver": gpus[0].driver if gpus else "none",
    }


def _examine_apart(entry: Entry, device: Device, limit_s: float) -> Finding:
    command = python_module("attnbench.harness.doctor", entry.name, json.dumps(dataclasses.asdict(device)))
    by_hand = f"import {entry.value.partition(':')[0]} by hand"
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True, env=environment_of(entry.name),
    )  # fmt: skip
    try:
        answer, talk = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        # The whole session: a plugin may have started processes that hold the pipes open.
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return Finding(entry.name, entry.version, "broken", f"did not load within {limit_s:g} s", by_hand)
    try:
        return Finding(**json.loads(answer))
    except (ValueError, TypeError):
        last = talk.strip().splitlines()[-1:] or ["no word of why"]
        reason = f"its process {_ending(child.returncode)} on load: {last[0]}"
        return Finding(entry.name, entry.version, "broken", reason, by_hand)


def _examine_here(name: str, device: Device) -> Finding:
    version = _registered()[name].version
    try:
        implementation = load(name)
    except PluginError as error:
        return Finding(name, version, "broken", _one_line(str(error)), "mend or uninstall its distribution")
    try:
        version = implementation.version()
        absent = implementation.unavailable(device)
    except Exception as error:  # noqa: BLE001  a plugin may raise anything; that is the finding
        reason = _one_line(f"its version() or unavailable() raises {type(error).__name__}: {error}")
        return Finding(name, version, "broken", reason, "mend it: the contract says that it must not raise")
    if absent:
        return Finding(name, version, "unavailable", _one_line(absent.reason), _one_line(absent.fix))
    return Finding(name, version, "usable")


def _ending(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _child() -> None:
    name, device = sys.argv[1], json.loads(sys.argv[2])
    # The answer has a stream to itself: whatever the plugin prints goes to stderr.
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        posed = Device(**device | {"capability": tuple(device["capability"])})
        answer.write(json.dumps(dataclasses.asdict(_examine_here(name, posed))))


if __name__ == "__main__":
    _child()
