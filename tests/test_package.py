"""What users receive: the wheel, the README's commands, the architecture page, the arrows between packages."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from attnbench.harness.run.errors import Exit
from attnbench.harness.run.record import Status

ROOT = Path(__file__).parent.parent
FOLDERS = ("harness", "impls", "suites")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()


def copy_package(target: Path) -> Path:
    """The three folders under ``target``, as they are in the checkout."""
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    return target


# ---- the distributions ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build reads, and its ``dist``; apart from the real checkout, since a build leaves files behind."""
    tree = copy_package(tmp_path_factory.mktemp("checkout"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    # Builds the sdist, then the wheel from the sdist.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", tree]
    build = subprocess.run(command, check=False, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return tree


def source_files(checkout: Path) -> set[str]:
    files = (path for folder in FOLDERS for path in (checkout / folder).rglob("*") if path.is_file())
    return {path.relative_to(checkout).as_posix() for path in files}


def test_wheel_holds_every_file_and_nothing_generic(checkout: Path) -> None:
    (wheel,) = (checkout / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in held if name.startswith("attnbench/")}
    assert package == {f"attnbench/{name}" for name in source_files(checkout)}
    metadata = f"attnbench-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in held} == {"attnbench", metadata}


def test_sdist_holds_every_file(checkout: Path) -> None:
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert source_files(checkout) | {"pyproject.toml", "README.md", "LICENSE"} <= held


@pytest.mark.parametrize(
    "point", PROJECT["entry-points"]["attnbench.impls"].items(), ids=lambda point: point[0]
)
def test_entry_point_names_a_module_of_the_package(point: tuple[str, str]) -> None:
    module = point[1].partition(":")[0].removeprefix("attnbench.").replace(".", "/")
    assert (ROOT / f"{module}.py").is_file() or (ROOT / module / "__init__.py").is_file()


# ---- the pages -----------------------------------------------------------------------------------------------


def readme_block(name: str) -> str:
    """The fenced block that follows the README's marker ``name``."""
    found = re.findall(rf"<!-- {re.escape(name)} -->\n+```\w*\n(.*?)\n```\n", README, re.DOTALL)
    assert len(found) == 1, f"README.md holds {len(found)} blocks marked {name}"
    return found[0]


@pytest.mark.parametrize("name", ["command: smoke", "command: tests"])
def test_readme_command_is_one_line_that_starts_from_nothing(name: str) -> None:
    command = readme_block(name)
    assert "\n" not in command
    steps = " ".join(shlex.split(command)).split(" && ")
    assert steps[0] == "python3 -m venv .venv"
    assert steps[1].startswith(".venv/bin/pip install ")
    assert all(step.startswith(".venv/bin/") for step in steps[1:])
    extras = re.findall(r"\.\[([\w,-]+)\]", command)
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    for suite in re.findall(r"--suite (\S+)", command):
        assert (ROOT / "suites" / f"{suite}.toml").is_file()


def test_readme_shows_the_example_that_the_tests_install() -> None:
    example = ROOT / "tests" / "plugin_example"
    assert readme_block("example: module") == (example / "attnbench_einsum.py").read_text().rstrip()
    assert readme_block("example: entry point") in (example / "pyproject.toml").read_text()


def test_readme_documents_every_exit_code_status_and_suite() -> None:
    first_cells = set(re.findall(r"^\| `?([\w-]+)`? \|", README, re.MULTILINE))
    suites = {path.stem for path in (ROOT / "suites").glob("*.toml")}
    assert {str(code.value) for code in Exit} | set(Status) | suites <= first_cells


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_path_and_module_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    paths = re.findall(r"`((?:harness|impls|suites|tests|\.ci|\.github)/[\w./-]*)`", text)
    modules = re.findall(r"`attnbench\.((?:harness|impls|suites)[\w.]*)`", text)
    missing = [path for path in paths if not (ROOT / path).exists()]
    missing += [name for name in modules if not module_exists(name)]
    assert not missing


def module_exists(dotted: str) -> bool:
    """Whether ``dotted``, or what it is an attribute of, is a module or a package of the checkout."""
    path = ROOT / dotted.replace(".", "/")
    return any(p.is_dir() or p.with_suffix(".py").is_file() for p in (path, path.parent) if p != ROOT)


@pytest.mark.parametrize("folder", ["harness", "impls"])
def test_architecture_names_every_module(folder: str) -> None:
    modules = [path for path in (ROOT / folder).rglob("*.py") if path.stem != "__init__"]
    unnamed = [path.name for path in modules if path.name not in ARCHITECTURE]
    assert not unnamed


# ---- the arrows ----------------------------------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Checks the contracts on the packages that are found from ``folder``."""
    command = [
        Path(sys.executable).with_name("lint-imports"),
        "--no-cache",
        "--config",
        ROOT / "pyproject.toml",
    ]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)


def test_import_contracts_hold() -> None:
    answer = lint_imports(ROOT)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("harness/problem.py", "attnbench.harness.contract"),
        ("harness/measure/timing.py", "attnbench.harness.run.record"),
        ("harness/registry.py", "attnbench.impls.standard"),
        ("harness/report/__init__.py", "attnbench.harness.run.worker"),
        ("impls/standard.py", "attnbench.impls.tiled"),
        ("impls/tiled.py", "attnbench.harness.run.record"),
        ("suites/__init__.py", "attnbench.impls.standard"),
    ],
)
def test_import_against_an_arrow_is_seen(module: str, imported: str, tmp_path: Path) -> None:
    # Laid out as installed, so that the copy shadows the package under test.
    copy_package(tmp_path / "attnbench")
    with (tmp_path / "attnbench" / module).open("a") as file:
        file.write(f"\nimport {imported}\n")
    answer = lint_imports(tmp_path)
    assert answer.returncode == 1
    assert "BROKEN" in answer.stdout
