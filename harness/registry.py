"""Finds implementations by the entry-point group ``attnbench.impls`` and loads one at a time.

Those of the group ``attnbench.approximations`` do not compute attention exactly, and are met only where they are asked
for: by name, or by a suite that says so.

Names come from package metadata alone, so listing imports no plugin. Loading happens in the process that needs
the plugin, and every way it can go wrong is a PluginError with the plugin's name and distribution in it.
"""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass

from attnbench.harness.contract import CONTRACT_VERSION, Capabilities, Implementation

GROUP = "attnbench.impls"
APPROXIMATE_GROUP = "attnbench.approximations"
PATH_PREFIX = "ATTNBENCH_PATH_"


class PluginError(Exception):
    """A plugin that cannot be used; the message says which, from where, and what to do."""


@dataclass(frozen=True)
class Entry:
    """A registered name. value is ``module:attribute``; distribution and version say who registered it."""

    name: str
    value: str
    distribution: str
    version: str

    @property
    def origin(self) -> str:
        return f"{self.name} ({self.value}, from {self.distribution} {self.version})"


def entries(*, approximate: bool = False) -> dict[str, list[Entry]]:
    """Every registered name in order, with its registrations; more than one is a conflict that ``load`` refuses.

    approximate: those of the approximations in place of the exact implementations.
    """
    found: dict[str, dict[tuple[str, str], Entry]] = {}
    for point in importlib.metadata.entry_points(group=APPROXIMATE_GROUP if approximate else GROUP):
        distribution = point.dist.name if point.dist else "unknown"
        version = point.dist.version if point.dist else "unknown"
        entry = Entry(point.name, point.value, distribution, version)
        # An editable install can be seen twice, through its folder and through site-packages: that is one entry.
        found.setdefault(point.name, {})[(entry.value, distribution)] = entry
    return {name: list(found[name].values()) for name in sorted(found)}


def registered_name(role: str) -> str:
    """``flash-triton`` from ``flash-triton@head.2``: what follows ``@`` tells copies of one implementation apart."""
    return role.partition("@")[0]


def search_path(name: str) -> list[str]:
    """Extra import folders for one implementation's process, from the variable ``ATTNBENCH_PATH_<NAME>``.

    For libraries that cannot share one site-packages (FlashAttention 2 and 4 both ship ``flash_attn``): NAME in
    upper case with ``-`` as ``_``, folders separated as in PYTHONPATH.
    """
    value = os.environ.get(path_variable(registered_name(name)), "")
    return [folder for folder in value.split(os.pathsep) if folder]


def path_variable(name: str) -> str:
    return f"{PATH_PREFIX}{name.upper().replace('-', '_')}"


def load(name: str) -> Implementation:
    """The implementation registered as ``name``; PluginError if unknown, registered twice, broken or too old.

    A name may carry a mark (see ``registered_name``), which says nothing to the plugin.
    """
    name = registered_name(name)
    exact, approximate = entries().get(name, []), entries(approximate=True).get(name, [])
    registered = exact + approximate
    if not registered:
        raise PluginError(f"no implementation is registered as {name!r}")
    if len(registered) > 1:
        origins = " and ".join(entry.origin for entry in registered)
        raise PluginError(f"{name!r} is registered twice: {origins}; uninstall one or rename it")
    entry = registered[0]
    try:
        found = importlib.metadata.EntryPoint(name, entry.value, GROUP).load()
        implementation = found() if isinstance(found, type) else found
    except Exception as error:  # a plugin may raise anything at import
        raise PluginError(f"{entry.origin} does not import: {type(error).__name__}: {error}") from error
    _check(implementation, entry)
    implementation.name = name
    implementation.approximate = bool(approximate)
    return implementation


def _check(implementation: object, entry: Entry) -> None:
    if not isinstance(implementation, Implementation):
        kind = type(implementation).__name__
        raise PluginError(f"{entry.origin} is a {kind}, not an attnbench.harness.contract.Implementation")
    contract = getattr(implementation, "contract", None)
    if contract != CONTRACT_VERSION:
        age = "an older" if isinstance(contract, int) and contract < CONTRACT_VERSION else "another"
        raise PluginError(
            f"{entry.origin} is written for {age} plugin contract ({contract!r}); this attnbench speaks version "
            f"{CONTRACT_VERSION}: update the plugin (CONTRIBUTING.md lists what changed)"
        )
    if not isinstance(getattr(implementation, "capabilities", None), Capabilities):
        raise PluginError(f"{entry.origin} declares no capabilities (a Capabilities instance)")
