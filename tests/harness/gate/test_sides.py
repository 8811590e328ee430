from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attnbench.harness import contract
from attnbench.harness.gate.sides import resolve
from attnbench.harness.run.errors import RunError

OFFLINE = ("--no-build-isolation",)


def seen_from(folders: tuple[str, ...], statement: str) -> str:
    """What a worker of the side would print."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-P", "-c", statement]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_two_revisions_install_into_environments_of_their_own(
    repository: Callable[..., Path], tmp_path: Path
) -> None:
    repo = repository(one={}, two={"COST_MS": 7})
    sides = [
        resolve(name, ref, repo, tmp_path, OFFLINE) for name, ref in (("base", "one"), ("head", "two~0"))
    ]
    assert [side.impls for side in sides] == [("gated",), ("gated",)]
    assert [side.what.split(" (")[0] for side in sides] == ["revision one", "revision two~0"]
    assert [seen_from(s.folders, "import gated; print(gated.COST_MS)") for s in sides] == ["2", "7"]


def test_a_source_tree_a_wheel_and_an_installed_path(repository: Callable[..., Path], tmp_path: Path) -> None:
    repo = repository(one={"COST_MS": 9})
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        *OFFLINE,
        "--wheel-dir",
        tmp_path,
        repo,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    tree = resolve("base", str(repo), Path(), tmp_path, OFFLINE)
    packed = resolve("head", str(wheel), Path(), tmp_path)
    folder = resolve("base", packed.folders[0], Path(), tmp_path)
    assert folder.folders == packed.folders
    for side in (tree, packed, folder):
        assert side.impls == ("gated",)
        assert seen_from(side.folders, "import gated; print(gated.COST_MS)") == "9"


def test_a_virtual_environment_of_another_python_is_refused(tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    (environment / "lib" / "python3.4" / "site-packages").mkdir(parents=True)
    (environment / "pyvenv.cfg").touch()
    with pytest.raises(RunError, match=r"this is python3\.\d+, the virtual environment has python3\.4"):
        resolve("base", str(environment), Path(), tmp_path)


def test_both_sides_are_measured_by_this_harness(tmp_path: Path) -> None:
    """A side may be attnbench itself: its kernels are measured, by the harness that runs the gate."""
    site = tmp_path / "site"
    for package in ("harness", "suites", "impls"):
        (site / "attnbench" / package).mkdir(parents=True)
        (site / "attnbench" / package / "contract.py").write_text("MARK = 'of the side'\n")
    (site / "attnbench-9.dist-info").mkdir()
    side = resolve("head", str(site), Path(), tmp_path)
    imports = (
        "from attnbench.harness import contract as ruler; from attnbench.impls import contract as kernel"
    )
    statement = f"{imports}; print(ruler.__file__, kernel.MARK)"
    assert seen_from(side.folders, statement) == f"{contract.__file__} of the side"


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("no-such", r"--base no-such: no such path, and no such revision of .*plugin"),
        ("--version", r"--base --version: no such path, and no such revision"),
        ("bare", r"--base bare: [0-9a-f]{12} has neither pyproject.toml nor setup.py"),
    ],
)
def test_a_ref_that_cannot_be_a_side(
    ref: str, said: str, repository: Callable[..., Path], tmp_path: Path
) -> None:
    repo = repository(one={})
    git = ["git", "-C", str(repo), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "rm", "--quiet", "pyproject.toml"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "bare"], check=True)
    subprocess.run([*git, "tag", "bare"], check=True)
    with pytest.raises(RunError, match=said):
        resolve("base", ref, repo, tmp_path)
