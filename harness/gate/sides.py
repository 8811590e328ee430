"""The two sides of a gate: what a REF names, and the site folders that its processes find first.

A REF is looked for in this order: a recorded run's folder; a virtual environment; a source tree (built and installed);
a wheel; a folder of installed packages; and otherwise a git revision of ``--repo``, cloned, built and installed. Both
sides share everything else with this environment, torch above all, and the harness that measures them: one that comes
along with a side is kept out of its sight.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attnbench.harness import registry
from attnbench.harness.run import journal
from attnbench.harness.run.errors import RunError

SOURCES = ("pyproject.toml", "setup.py")
RULER = ("harness", "suites")
"""Packages of attnbench that both sides must share: what poses, judges and measures."""


@dataclass(frozen=True)
class Side:
    """name: ``base`` or ``head``. what: the REF in words. folders: first on its processes' path. recorded: the run's
    folder, where the side is one and nothing of it is executed.
    """

    name: str
    what: str
    folders: tuple[str, ...] = ()
    recorded: Path | None = None

    @property
    def impls(self) -> tuple[str, ...]:
        """Implementations that its folders register."""
        found = importlib.metadata.distributions(path=list(self.folders))
        points = (point for one in found for point in one.entry_points if point.group == registry.GROUP)
        return tuple(sorted({point.name for point in points}))


def resolve(name: str, ref: str, repo: Path, scratch: Path, pip: Sequence[str] = ()) -> Side:
    """The side that ``ref`` names. scratch: where clones and installs go. pip: more arguments for ``pip install``.

    RunError in one line when it names nothing, or what it names does not install.
    """
    path = Path(ref)
    if not path.exists():
        return _revision(name, ref, repo, scratch, pip)
    if path.is_dir() and journal.parts(path):
        return Side(name, f"recorded run {path}", recorded=path)
    if (path / "pyvenv.cfg").is_file():
        packages = _without_ruler(_site_packages(name, path), scratch / f"{name}-view")
        return Side(name, f"virtual environment {path}", (packages,))
    if any((path / source).is_file() for source in SOURCES):
        return Side(name, f"source tree {path}", (_install(name, ref, path, scratch, pip),))
    if path.suffix == ".whl":
        return Side(name, f"wheel {path.name}", (_install(name, ref, path, scratch, pip),))
    if path.is_dir() and any(path.glob("*.dist-info")):
        return Side(name, f"installed path {path}", (_without_ruler(path, scratch / f"{name}-view"),))
    raise RunError(
        f"--{name} {ref}: neither a recorded run (records.jsonl), a virtual environment (pyvenv.cfg), a source tree "
        f"({' or '.join(SOURCES)}), a wheel nor a folder of installed packages (*.dist-info)"
    )


def _revision(name: str, ref: str, repo: Path, scratch: Path, pip: Sequence[str]) -> Side:
    asked = f"--{name} {ref}"
    top = _run(["git", "-C", str(repo), "rev-parse", "--show-toplevel"])
    if top.returncode:
        raise RunError(
            f"{asked}: no such path, and {repo} is no git repository to find a revision in; see --repo"
        )
    found = _run(
        ["git", "-C", str(repo), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"]
    )
    if found.returncode:
        raise RunError(f"{asked}: no such path, and no such revision of {top.stdout.strip()}")
    commit, tree = found.stdout.strip(), scratch / f"{name}-source"
    for command in (
        ["git", "clone", "--quiet", "--shared", "--no-checkout", top.stdout.strip(), str(tree)],
        ["git", "-C", str(tree), "checkout", "--quiet", "--detach", commit],
        ["git", "-C", str(tree), "submodule", "--quiet", "update", "--init", "--recursive"],
    ):
        if (done := _run(command)).returncode:
            raise RunError(f"{asked}: cannot check it out: {_last_line(done.stderr)}")
    if not any((tree / source).is_file() for source in SOURCES):
        raise RunError(
            f"{asked}: {commit[:12]} has neither {' nor '.join(SOURCES)}, so it cannot be installed"
        )
    return Side(name, f"revision {ref} ({commit[:12]})", (_install(name, ref, tree, scratch, pip),))


def _install(name: str, ref: str, source: Path, scratch: Path, pip: Sequence[str]) -> str:
    """Installs without its dependencies, which are this environment's on both sides; returns the folder."""
    target = scratch / name
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = _run([*command, "--target", str(target), *pip, str(source)])
    if done.returncode:
        raise RunError(f"--{name} {ref}: does not install: {_last_line(done.stderr)}")
    return _without_ruler(target, scratch / f"{name}-view")


def _without_ruler(folder: Path, view: Path) -> str:
    """The folder as it is; where it brings a harness along, a view of links to all but that."""
    folder = folder.resolve()
    if not any((folder / "attnbench" / package).exists() for package in RULER):
        return str(folder)
    (view / "attnbench").mkdir(parents=True)
    for entry in folder.iterdir():
        if entry.name != "attnbench":
            (view / entry.name).symlink_to(entry)
    for entry in (folder / "attnbench").iterdir():
        if entry.name not in RULER:
            (view / "attnbench" / entry.name).symlink_to(entry)
    return str(view)


def _site_packages(name: str, environment: Path) -> Path:
    """Its packages, for this Python: compiled extensions of another version would not load."""
    wanted = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = environment / "lib" / wanted / "site-packages"
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in (environment / "lib").glob("python*"))) or "none"
        raise RunError(f"--{name} {environment}: this is {wanted}, the virtual environment has {there}")
    return folder


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)


def _last_line(text: str) -> str:
    """What a failed command said last; pip's hints and notices come after its error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "fatal"))]
    return (errors or lines or ["no message"])[-1]
