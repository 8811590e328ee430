"""What runs in continuous integration: its scripts, executed, and what keeps a fork's code off a self-hosted runner."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from gate_runs import timed, written

GITHUB = Path(__file__).parents[3] / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
ACTION = yaml.safe_load((GITHUB / "actions" / "gate" / "action.yml").read_text())
# What the author of a pull request writes: never to be pasted into a script.
UNTRUSTED = re.compile(r"\$\{\{[^}]*(github\.event|github\.head_ref|inputs\.)")


def loaded(path: Path) -> dict[str, Any]:
    found: dict[Any, Any] = yaml.safe_load(path.read_text())
    found["on"] = found.pop(True)  # YAML 1.1 reads the key `on` as a truth value
    return found


def scripts() -> list[Any]:
    """Every script of every workflow and action, with where it stands."""
    found = [pytest.param(step["run"], id=f"action:{n}") for n, step in enumerate(ACTION["runs"]["steps"])]
    for path in WORKFLOWS:
        for name, job in loaded(path)["jobs"].items():
            found += [
                pytest.param(step["run"], id=f"{path.stem}:{name}:{number}")
                for number, step in enumerate(job["steps"])
                if "run" in step
            ]
    return found


@pytest.mark.parametrize("script", scripts())
def test_a_script_is_bash_and_holds_nothing_that_a_pull_request_writes(script: str) -> None:
    assert not UNTRUSTED.search(script)
    plain = re.sub(r"\$\{\{.*?\}\}", "x", script)
    done = subprocess.run(["bash", "-n"], input=plain, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_code_of_a_fork_never_runs_on_a_self_hosted_runner_without_approval(path: Path) -> None:
    workflow = loaded(path)
    for name, job in workflow["jobs"].items():
        hosted = "self-hosted" not in job["runs-on"]
        targets_base = "pull_request_target" in workflow["on"]
        checks_out = [
            step for step in job["steps"] if str(step.get("uses", "")).startswith("actions/checkout")
        ]
        if hosted:
            # Where the token may write, none of the pull request's code is fetched.
            writes = "write" in (job.get("permissions") or workflow.get("permissions") or {}).values()
            assert not (writes and checks_out), name
            assert not (targets_base and checks_out), name
            continue
        # The file of the default branch decides, not the pull request's own; a person approves a fork's run; the
        # token reads; and no secret is there to be read.
        assert "pull_request" not in workflow["on"]
        assert "guard" in job["needs"]
        assert job["environment"] == "${{ needs.guard.outputs.environment }}"
        assert job["permissions"] == {"contents": "read"}
        assert all(step["with"]["persist-credentials"] is False for step in checks_out)
        assert "secrets." not in path.read_text()


def run_script(script: str, folder: Path, **environment: str) -> tuple[int, dict[str, str], str]:
    """Exit code, outputs and summary of a step's script, as the runner executes it."""
    outputs, summary = folder / "outputs", folder / "summary"
    outputs.touch()
    files = {"GITHUB_OUTPUT": str(outputs), "GITHUB_STEP_SUMMARY": str(summary), "GITHUB_REPOSITORY": "a/b"}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        env=os.environ | files | environment, cwd=folder, check=False, capture_output=True, text=True,
    )  # fmt: skip
    found = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
    return done.returncode, found, summary.read_text() if summary.exists() else done.stdout + done.stderr


@pytest.mark.parametrize(("allow", "step"), [("", 1), ("5 6", 1), ("1", 0)])
def test_the_action_runs_the_gate_and_fails_or_allows(tmp_path: Path, allow: str, step: int) -> None:
    written(tmp_path / "a", timed("k", 1.0, seed=1))
    written(tmp_path / "b", timed("k", 1.2, seed=2))
    bin_folder = Path(sys.executable).parent
    inputs = {name.upper(): str(value.get("default", "")) for name, value in ACTION["inputs"].items()}
    inputs |= {"BASE": "a", "HEAD": "b", "ALLOW": allow, "ARGUMENTS": "--junit=junit.xml\n--alpha=0.01\n"}
    inputs["PATH"] = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    code, outputs, summary = run_script(ACTION["runs"]["steps"][0]["run"], tmp_path, **inputs)
    assert (code, outputs) == (step, {"exit-code": "1"}), summary
    assert "### Kernel gate: regression: 1 SLOWER" in summary
    assert (tmp_path / "junit.xml").exists()
    assert (tmp_path / "gate" / "gate.json").exists()


@pytest.mark.parametrize(
    ("fork", "rules", "code", "environment"),
    [
        ("false", "", 0, "gpu"),
        ("true", "required_reviewers", 0, "gpu-fork"),
        ("true", "branch_policy required_reviewers", 0, "gpu-fork"),
        ("true", "branch_policy", 1, None),
        ("true", "", 1, None),
    ],
)
def test_the_guard_lets_a_fork_in_only_where_reviewers_are_required(
    tmp_path: Path, fork: str, rules: str, code: int, environment: str | None
) -> None:
    stand_in = tmp_path / "bin" / "gh"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/bin/sh\necho '{rules}'\n")
    stand_in.chmod(0o755)
    (step,) = loaded(GITHUB / "workflows" / "gate-gpu.yml")["jobs"]["guard"]["steps"]
    path = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
    found, outputs, said = run_script(step["run"], tmp_path, FORK=fork, PATH=path)
    assert (found, outputs.get("environment")) == (code, environment), said


def test_continuous_integration_deselects_no_test_for_want_of_a_browser_or_a_compiler() -> None:
    (check,) = loaded(GITHUB / "workflows" / "ci.yml")["jobs"].values()
    assert any(session.startswith("tests") for session in check["strategy"]["matrix"]["session"])
    assert check["env"]["ATTNBENCH_BROWSER"] == 1
    assert check["env"]["ATTNBENCH_COMPILER"] == 1
