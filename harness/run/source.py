"""Which source an implementation was measured from: one hash over its files, and over those of the library it wraps.

A version names a release; a kernel under development has the same version all day. The hash covers the plugin's own
package (or its module, where the package is shared with other plugins), every module of the same namespace that
these import, and what the wrapped distribution's RECORD says of its installed files. The harness is left out: the
run's commit names it. Nothing is imported but parent packages; the files are read.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from attnbench.harness import registry
from attnbench.harness.registry import Entry

HARNESS = "attnbench.harness"
DIGITS = 16


def source_hash(name: str, package: str = "") -> str:
    """The first ``DIGITS`` hex digits of the hash for the implementation registered as ``name``, in this process.

    package: the distribution that ships the kernels (``Implementation.package``). Empty where the files cannot be read.
    """
    name = registry.registered_name(name)
    entries = registry.entries() | registry.entries(approximate=True)
    if not (own := entries.get(name)):
        return ""
    others = {_module(entry) for found in entries.values() for entry in found} - {_module(own[0])}
    digest = hashlib.sha256()
    try:
        for label, path in sorted(_files(_module(own[0]), others).items()):
            digest.update(f"{label} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    except (ImportError, OSError, SyntaxError, ValueError):
        return ""
    for line in _installed(package):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()[:DIGITS]


def _module(entry: Entry) -> str:
    return entry.value.partition(":")[0].strip()


def _files(module: str, others: set[str]) -> dict[str, Path]:
    """Every file that ``module`` is made of, by a name that does not depend on where it is installed."""
    found: dict[str, Path] = {}
    namespace = module.partition(".")[0]
    package = _own_package(module, others)
    waiting = [module]
    for folder in map(Path, _folders(package)):
        for path in filter(_counts, folder.rglob("*")):
            place = path.relative_to(folder)
            found[f"{package}/{place.as_posix()}"] = path
            if path.suffix == ".py":
                waiting += _imports(path, ".".join([package, *place.parts[:-1]]), namespace)
    known = [HARNESS, *filter(None, [package])]
    while waiting:
        name = waiting.pop()
        if name in found or any(name == top or name.startswith(f"{top}.") for top in known):
            continue
        spec = _spec(name)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        found[name] = Path(spec.origin)
        parent = name if spec.submodule_search_locations else name.rpartition(".")[0]
        waiting += _imports(found[name], parent, namespace)
    return found


def _counts(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"


def _folders(package: str) -> list[str]:
    spec = _spec(package) if package else None
    return list(spec.submodule_search_locations or ()) if spec else []


def _own_package(module: str, others: set[str]) -> str:
    """The largest package around ``module`` that holds no other plugin's module, nor the harness; empty if none."""
    parts = module.split(".")
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        if not any(name.startswith(f"{package}.") for name in (*others, HARNESS)):
            return package
    return ""


def _imports(path: Path, package: str, namespace: str) -> Iterator[str]:
    """Dotted names within ``namespace`` that the file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            names = [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == namespace)


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Where ``name`` lies; None for what is no module, as the function in ``from module import function``."""
    parent = name.rpartition(".")[0]
    if parent and not ((above := _spec(parent)) and above.submodule_search_locations):
        return None  # found without importing the module that holds the function
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _installed(package: str) -> list[str]:
    """Paths and hashes of a distribution's files, from its RECORD; nothing of one that is not installed."""
    if not package:
        return []
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return []
    lines = (distribution.read_text("RECORD") or "").splitlines()
    return sorted(line for line in lines if "sha256=" in line and ".dist-info/" not in line)
