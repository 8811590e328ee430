"""What a device is called where results of several machines stand together."""

from __future__ import annotations

from typing import Any

CPU = "CPU: "


def device_title(environment: dict[str, Any]) -> str:
    """The model of the environment's first device; of a CPU, ``CPU:`` and its model."""
    entries = environment.get("devices") or []
    names = [str(entry.get("name") or "") for entry in entries if isinstance(entry, dict)]
    name = next(filter(None, names), "")
    host = environment.get("host")
    if name == "cpu" and isinstance(host, dict) and host.get("cpu"):
        return f"{CPU}{host['cpu']}"
    return name or "unknown device"
