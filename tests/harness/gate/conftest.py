"""Sides to gate: a small implementation in several states, as installed folders, and as revisions of a repository."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def _importable(name: str, file: str) -> None:
    """Makes a file beside this one importable by the tests of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    assert spec
    assert spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


_importable("gate_runs", "runs.py")

PLUGINS = Path(__file__).parent / "plugins"
METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
ENTRY_POINTS = "[attnbench.impls]\n{name} = {name}:{attribute}\n"
PYPROJECT = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "gated"
version = "{version}"

[project.entry-points."attnbench.impls"]
gated = "gated:Gated"

[tool.setuptools]
py-modules = ["gated"]
"""
SUITE = """name = "gate"
why = "Small enough for a gate on two cores."

[[case]]
name = "small"
why = "One problem, forward only."
dtype = "fp32"
batch = 1
heads = 2
head_dim = 32
seqlen = {seqlen}
direction = "fwd"
"""


@pytest.fixture
def installed(tmp_path: Path) -> Callable[..., str]:
    """A folder of installed packages that holds a plugin of ``plugins``, with these module variables changed."""

    def make(folder: str, plugin: str = "gated", **changed: object) -> str:
        site, version = tmp_path / "sites" / folder, f"1.{len(changed)}"
        information = site / f"{plugin}-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(METADATA.format(name=plugin, version=version))
        points = ENTRY_POINTS.format(name=plugin, attribute=plugin.title())
        (information / "entry_points.txt").write_text(points)
        (site / f"{plugin}.py").write_text(with_changes(changed, plugin))
        return str(site)

    return make


@pytest.fixture
def repository(tmp_path: Path) -> Callable[..., Path]:
    """A git repository with one tagged revision for each keyword: the module variables changed in it."""

    def make(**revisions: dict[str, object]) -> Path:
        repo = tmp_path / "plugin"
        repo.mkdir()
        git = ["git", "-C", str(repo), "-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run([*git, "init", "--quiet"], check=True)
        for number, (tag, changed) in enumerate(revisions.items()):
            (repo / "pyproject.toml").write_text(PYPROJECT.format(version=f"1.{number}"))
            (repo / "gated.py").write_text(with_changes(changed))
            subprocess.run([*git, "add", "."], check=True)
            subprocess.run([*git, "commit", "--quiet", "--message", tag], check=True)
            subprocess.run([*git, "tag", tag], check=True)
        return repo

    return make


@pytest.fixture
def suite(tmp_path: Path) -> str:
    path = tmp_path / "gate.toml"
    path.write_text(SUITE.format(seqlen=64))
    return str(path)


def with_changes(changed: dict[str, object], plugin: str = "gated") -> str:
    """The plugin's source with module variables set."""
    lines = (PLUGINS / f"{plugin}.py").read_text().splitlines()
    for name, value in changed.items():
        (place,) = [n for n, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[place] = f"{name} = {value!r}"
    return "\n".join(lines) + "\n"
