"""A backend from a distribution of its own, as the README tells users to write one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench.harness import registry
from attnbench.harness.contract import Device
from attnbench.harness.problem import Problem

EXAMPLE = Path(__file__).parent / "plugin_example"
CPU = Device("cpu")


def pip_install(source: Path, target: Path) -> None:
    """Installs a distribution into a folder of its own, from the machine alone."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", target, source],
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example was installed to; built from a copy, since a build writes beside its source."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip_install(folder / "source", folder / "site")
    return folder / "site"


def test_example_is_registered_and_computes_attention(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.syspath_prepend(site)
    (entry,) = registry.entries()["einsum"]
    assert (entry.value, entry.distribution) == ("attnbench_einsum:Einsum", "attnbench-einsum")

    einsum = registry.load("einsum")
    problem = Problem(batch=2, heads=3, seqlen_q=5, seqlen_k=7, head_dim=8, dtype="fp32")
    assert einsum.unavailable(CPU) is None
    assert einsum.unsupported_reasons(problem, CPU) == []

    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator)
        for shape in (problem.q_shape, problem.k_shape, problem.v_shape)
    )
    out = einsum.prepare(problem, CPU).attend(q, k, v)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 8**0.5
    want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    torch.testing.assert_close(out, want.float())


def test_example_declines_what_it_does_not_declare(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)
    grouped = Problem(batch=1, heads=4, kv_heads=2, seqlen_q=16, head_dim=8, dtype="fp16")
    reasons = registry.load("einsum").unsupported_reasons(grouped, CPU)
    assert reasons == ["dtype fp16 not in bf16/fp32", "kv_heads differs from heads (GQA)"]


def test_without_the_distribution_the_name_is_unknown() -> None:
    with pytest.raises(registry.PluginError, match="no implementation is registered as 'einsum'"):
        registry.load("einsum")


def test_older_contract_is_refused_with_a_clear_word(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(site, tmp_path / "site", ignore=shutil.ignore_patterns("__pycache__"))
    module = tmp_path / "site" / "attnbench_einsum.py"
    module.write_text(module.read_text().replace("contract = 1", "contract = 0"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "attnbench_einsum", raising=False)
    with pytest.raises(
        registry.PluginError, match=r"attnbench-einsum .* older plugin contract \(0\).* update"
    ):
        registry.load("einsum")


@pytest.mark.parametrize("installed", [True, False])
def test_bench_list_shows_it(installed: bool, site: Path) -> None:
    bench = Path(sys.executable).with_name("bench")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if installed:
        environment["PYTHONPATH"] = str(site)
    answer = subprocess.run(
        [bench, "list", "--json"], check=False, capture_output=True, text=True, env=environment
    )
    assert answer.returncode == 0, answer.stderr
    assert ('"einsum"' in json.dumps(json.loads(answer.stdout))) is installed
