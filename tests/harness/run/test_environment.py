"""environment.json: the commit, the versions and what of them does not go together."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.run import environment

DEVICE = {"id": "cpu", "name": "cpu", "torch": "2.99", "cuda": None, "driver": "123"}


def gather(**changes: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "run": "r", "command": ("bench", "run"), "suites": ["a", "b"], "seed": 7, "mode": "cold", "devices": [DEVICE],
    }  # fmt: skip
    return environment.gather(**told | changes)


# ---- commit -----------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit, in which the module believes to lie."""
    monkeypatch.delenv("ATTNBENCH_COMMIT", raising=False)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    module = tmp_path / "harness" / "run" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("source\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    monkeypatch.setattr(environment, "__file__", str(module))
    return tmp_path


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    revision, dirty = environment.commit()
    assert git(checkout, "rev-parse", "HEAD").startswith(revision)
    assert len(revision) == 12
    assert dirty is False


def test_a_changed_source_is_dirty_and_a_new_file_is_not(checkout: Path) -> None:
    (checkout / "results.jsonl").write_text("new")
    assert environment.commit()[1] is False
    (checkout / "harness" / "run" / "environment.py").write_text("changed\n")
    assert environment.commit()[1] is True
    git(checkout, "add", ".")
    assert environment.commit()[1] is True


def test_a_stamp_stands_in(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNBENCH_COMMIT", "abc123")
    assert environment.commit() == ("abc123", False)
    monkeypatch.setenv("ATTNBENCH_COMMIT", "abc123-dirty")
    assert environment.commit() == ("abc123", True)


def test_outside_a_checkout_it_is_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment, "__file__", str(checkout / "harness" / "run" / "deeper" / "environment.py")
    )
    assert environment.commit() == ("unknown", None)


def test_without_git_it_is_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert environment.commit() == ("unknown", None)


def test_a_repository_without_a_commit_is_unknown(checkout: Path) -> None:
    git(checkout, "update-ref", "-d", "HEAD")
    assert environment.commit() == ("unknown", None)


# ---- versions ---------------------------------------------------------------------------------------------


class Installed:
    """Stands in for package metadata: {name: (version, requirements)}."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **packages: tuple[str, list[str] | None]) -> None:
        self.packages = {name.replace("_", "-"): found for name, found in packages.items()}
        monkeypatch.setattr(importlib.metadata, "version", self.version)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: self.packages[name][1])

    def version(self, name: str) -> str:
        if name not in self.packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.packages[name][0]


def test_versions_that_go_together_are_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [
        "torch>=2.10",
        "numpy",
        "einops>=99",
        "torch<1; extra == 'old'",
        "triton<1; sys_platform == 'never'",
    ]
    Installed(
        monkeypatch,
        torch=("2.11.0+cu130", None),
        numpy=("2.0", []),
        triton=("3.6", []),
        xformers=("0.0.35", needs),
    )
    assert environment.out_of_range() == []
    assert environment.installed_versions() == {
        "torch": "2.11.0+cu130", "triton": "3.6", "numpy": "2.0", "xformers": "0.0.35",
    }  # fmt: skip


def test_a_version_outside_what_a_library_declares_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    Installed(
        monkeypatch,
        torch=("2.11.0+cu130", ["triton==3.6.0; python_version >= '3'"]),
        triton=("3.7.1", []),
        xformers=("0.0.35", ["torch==2.10.0"]),
    )
    assert environment.out_of_range() == [
        "torch 2.11.0+cu130 declares triton==3.6.0, installed is 3.7.1",
        "xformers 0.0.35 declares torch==2.10.0, installed is 2.11.0+cu130",
    ]


@pytest.mark.parametrize("torch", ["2.11.0+cu130", "2.11.0.dev20260101"])
def test_local_builds_and_nightlies_count_as_their_version(
    monkeypatch: pytest.MonkeyPatch, torch: str
) -> None:
    Installed(monkeypatch, torch=(torch, []), xformers=("0.0.35", ["torch>=2.10,<2.12"]))
    assert environment.out_of_range() == []


def test_a_requirement_is_found_under_any_spelling_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    Installed(monkeypatch, nvidia_cutlass_dsl=("4.0", []), flash_attn_4=("4.0.1", ["NVIDIA_cutlass.dsl>=5"]))
    assert len(environment.out_of_range()) == 1


def test_a_requirement_that_no_one_can_read_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    Installed(monkeypatch, torch=("2.11", ["@@ not a requirement @@", "triton<3"]), triton=("3.6", []))
    assert len(environment.out_of_range()) == 1


# ---- the document -----------------------------------------------------------------------------------------


def test_the_document_holds_what_it_was_told_and_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNBENCH_COMMIT", "abc-dirty")
    document = json.loads(json.dumps(gather()))
    assert (document["run"], document["suite"], document["seed"], document["mode"]) == (
        "r",
        "a, b",
        7,
        "cold",
    )
    assert (document["commit"], document["dirty"]) == ("abc", True)
    assert (document["torch"], document["cuda"], document["driver"]) == ("2.99", None, "123")
    assert document["command"] == ["bench", "run"]
    assert document["devices"] == [DEVICE]
    assert document["packages"]["torch"]
    assert document["host"]["cpu"]
    assert document["host"]["cores"] >= 1


def test_a_resumed_run_keeps_the_first_document_and_lists_the_later_ones(tmp_path: Path) -> None:
    first, second, third = gather(seed=1), gather(seed=2), gather(seed=3)
    for document in (first, second, third):
        environment.write(tmp_path, document)
    assert json.loads((tmp_path / "environment.json").read_text()) == json.loads(
        json.dumps(first | {"resumed": [later | {"differs": []} for later in (second, third)]})
    )
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


# ---- what a run stands on ---------------------------------------------------------------------------------


def test_a_resumed_run_says_what_differs_from_its_first_part(tmp_path: Path) -> None:
    first = gather(devices=[DEVICE | {"name": "NVIDIA H200"}]) | {
        "commit": "aaa",
        "packages": {"torch": "2.11.0"},
    }
    same = first | {"started": "later", "seed": 8}
    other = first | {
        "devices": [{"name": "NVIDIA H100"}],
        "dirty": True,
        "packages": {"torch": "2.13.0", "new": "1"},
    }
    for document in (first | {"dirty": False}, same | {"dirty": False}, other):
        environment.write(tmp_path, document)
    resumed = json.loads((tmp_path / "environment.json").read_text())["resumed"]
    assert resumed[0]["differs"] == []
    assert resumed[1]["differs"] == [
        "device was NVIDIA H200 and is NVIDIA H100",
        "commit was aaa and is aaa with uncommitted changes",
        "torch was 2.11.0 and is 2.13.0",
        "new was absent and is 1",
    ]


def test_the_ground_here_is_that_of_a_run_started_here() -> None:
    assert environment.ground_here(["cpu"]) == environment.ground(gather())
    assert environment.ground_here(["NVIDIA H200"])["device"] == "NVIDIA H200"


def test_a_library_of_one_implementation_alone_has_its_version_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "flash_attn_4-4.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0\n")
    monkeypatch.setenv("ATTNBENCH_PATH_FLASH_ATTN_4", str(tmp_path))
    assert environment.installed_versions()["flash-attn-4 of flash-attn-4"] == "4.0"
