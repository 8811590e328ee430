"""What continuous integration runs, one session a question: ``nox -s lint``, ``nox -s tests-3.12 -- -k masks``."""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "tests", "package"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PROJECT = PYPROJECT["project"]


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's checks and format, and the import contracts."""
    session.install(*PROJECT["optional-dependencies"]["lint"])
    session.install("--no-deps", "-e.")  # the contracts are read from source, and need no dependency
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy over the package laid out as it is installed."""
    session.install("-e.[types]")
    # Mypy does not follow the editable finder, so it is shown the tree that a wheel would unpack to.
    tree = session.create_tmp()
    session.install("--no-deps", "--upgrade", "--target", tree, ".")
    session.run("mypy", "-p", "attnbench", *session.posargs, env={"MYPYPATH": tree})


@nox.session(python=nox.project.python_versions(PYPROJECT))
def tests(session: nox.Session) -> None:
    """The tests, on two cores; arguments go to pytest."""
    session.install("-e.[tests]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """The sdist, the wheel built from it, and the smoke suite from that wheel away from the checkout."""
    session.install("build")
    dist = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", dist)
    session.install(f"{dist}/attnbench-{PROJECT['version']}-py3-none-any.whl")
    session.chdir(dist)
    session.run("bench", "run", "--suite", "smoke", "--output-dir", "results")


@nox.session
def kernels(session: nox.Session) -> None:
    """Every CUDA kernel compiled for Hopper, which needs no GPU; fails on a spill; arguments go to ``bench build``."""
    session.install("-e.[tests]")
    session.run("bench", "build", "--only", "flash-cuda", *session.posargs)


@nox.session
def conform(session: nox.Session) -> None:
    """The larger selection of conformance cases, three draws each, on the CPU; arguments go to ``bench conform``."""
    session.install(".")
    arguments = session.posargs or ["--device", "cpu", "--nightly", "--seeds", "3"]
    session.run("bench", "conform", *arguments, "--output-dir", f"{session.create_tmp()}/conformance")


@nox.session
def bench(session: nox.Session) -> None:
    """``bench run``, installed: ``nox -s bench -- --suite long-seq``; the smoke suite without arguments."""
    session.install(".")
    session.run("bench", "run", *(session.posargs or ["--suite", "smoke"]))
