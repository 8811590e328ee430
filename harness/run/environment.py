"""What a run ran on: machine, software, commit and command line, as environment.json beside the records."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from attnbench.harness.registry import PATH_PREFIX

SCHEMA = 1
FILE = "environment.json"
PACKAGES = (
    "attnbench", "torch", "triton", "numpy", "xformers", "flash-attn", "fa3-fwd", "flash-attn-4", "nvidia-cudnn-cu13",
    "nvidia-cutlass-dsl", "cuda-core", "nvidia-ml-py",
)  # fmt: skip


def commit() -> tuple[str, bool | None]:
    """Commit of the source tree and whether it has uncommitted changes; ``unknown`` outside a checkout.

    ``ATTNBENCH_COMMIT`` (``HASH`` or ``HASH-dirty``) stands in where the sources travel without their .git.
    """
    stamped = os.environ.get("ATTNBENCH_COMMIT")
    if stamped:
        return stamped.removesuffix("-dirty"), stamped.endswith("-dirty")
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown", None
    try:
        revision = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None
    return revision, bool(changed)


def gather(
    *,
    run: str,
    command: Sequence[str],
    suites: Sequence[str],
    seed: int,
    mode: str,
    devices: list[dict[str, Any]],
) -> dict[str, Any]:
    """The environment document. devices: what each device's referee said of it and of the software."""
    revision, dirty = commit()
    packages = installed_versions()
    first = devices[0]
    return {
        "schema": SCHEMA,
        "run": run,
        "started": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "suite": ", ".join(suites),
        "seed": seed,
        "mode": mode,
        "commit": revision,
        "dirty": dirty,
        "attnbench": packages.get("attnbench", "unknown"),
        "python": platform.python_version(),
        "torch": first["torch"],
        "triton": packages.get("triton"),
        "cuda": first["cuda"],
        "driver": first.get("driver"),
        "devices": devices,
        "host": {"cpu": _cpu_name(), "cores": os.cpu_count(), "os": platform.platform()},
        "packages": packages,
        "warnings": out_of_range(),
    }


def write(folder: Path, environment: dict[str, Any]) -> None:
    """Writes environment.json; a resumed run keeps the first document and lists the later ones under ``resumed``, each
    with what ``differs`` from the first.
    """
    path = folder / FILE
    if path.exists():
        first = json.loads(path.read_text())
        differs = differences(ground(first), ground(environment))
        first.setdefault("resumed", []).append(environment | {"differs": differs})
        environment = first
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps(environment, indent=1) + "\n")
    replacement.replace(path)


def ground(environment: dict[str, Any]) -> dict[str, str]:
    """What the figures of a run stand on, by name: its devices' model, the commit, the packages."""
    devices, host = environment.get("devices") or [], environment.get("host") or {}
    names = {device.get("name") if device.get("name") != "cpu" else host.get("cpu") for device in devices}
    dirty = " with uncommitted changes" if environment.get("dirty") else ""
    packages: dict[str, str] = environment.get("packages") or {}
    return {
        "device": ", ".join(sorted(map(str, names))),
        "commit": f"{environment.get('commit')}{dirty}",
    } | packages


def ground_here(device_names: Sequence[str]) -> dict[str, str]:
    """The ``ground`` of a run on these devices, started now; ``cpu`` is the name of a CPU."""
    revision, dirty = commit()
    devices = [{"name": name} for name in device_names]
    here = {"devices": devices, "host": {"cpu": _cpu_name()}, "commit": revision, "dirty": dirty}
    return ground(here | {"packages": installed_versions()})


def differences(recorded: dict[str, str], now: dict[str, str]) -> list[str]:
    """Each thing of two grounds that is not the same, naming both."""
    names = dict.fromkeys([*recorded, *now])
    return [
        f"{name} was {recorded.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for name in names
        if recorded.get(name) != now.get(name)
    ]


def installed_versions() -> dict[str, str]:
    """Versions of the packages that can change a figure, of those installed; what stands in the site folders of one
    implementation alone (``registry.search_path``) bears its name.
    """
    return _installed() | {
        f"{dist.name} of {variable.removeprefix(PATH_PREFIX).lower().replace('_', '-')}": dist.version
        for variable in sorted(os.environ)
        if variable.startswith(PATH_PREFIX)
        for dist in importlib.metadata.distributions(path=os.environ[variable].split(os.pathsep))
        if canonicalize_name(dist.name) in PACKAGES
    }


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def out_of_range() -> list[str]:
    """Installed versions that a measured library declares it does not work with, one line each."""
    installed = _installed()
    warnings = []
    for name in installed:
        for text in importlib.metadata.requires(name) or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            version = installed.get(canonicalize_name(requirement.name))
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if version and applies and not requirement.specifier.contains(version, prereleases=True):
                wanted = f"{requirement.name}{requirement.specifier}"
                warnings.append(f"{name} {installed[name]} declares {wanted}, installed is {version}")
    return warnings


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
