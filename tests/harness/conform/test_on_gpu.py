"""On a GPU: the checks that need one pass a right implementation, and a failed capture costs its own case alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attnbench.harness.conform.dealing import examine_all
from attnbench.harness.conform.examination import Examination
from attnbench.harness.conform.suite import select
from attnbench.harness.conform.verdict import Finding, Verdict

pytestmark = pytest.mark.gpu
SUITES = ["autograd", "determinism", "dropout", "memory_safety"]
ONLY_THERE = ["autograd/graph-replay", "determinism/side-streams", "dropout/graph-replays"]
DEVICE = "cuda:0"


@pytest.fixture(scope="module")
def waits(register_plugins: Callable[..., None]) -> str:
    register_plugins({"waits": "wrong:waits"}, Path(__file__).parent / "plugins")
    return "waits"


def test_standard_attention_passes_what_only_a_gpu_can_be_asked() -> None:
    cases = select(SUITES, "cuda", only=ONLY_THERE)
    told: list[Finding] = []
    with Examination(DEVICE, cases) as examination:
        examine_all(examination, ["standard"], cases, 1, told.append)
    assert {case.check for case in cases} == {"graph_replay", "side_streams", "dropout_graphs"}
    assert [finding.reason for finding in told] == [""] * len(cases)


def test_a_worker_whose_capture_failed_is_replaced(waits: str) -> None:
    captured, after = (
        select(["autograd"], "cuda", only=[name])[0] for name in ("graph-replay", "plain-step")
    )
    with Examination(DEVICE, [captured, after]) as examination:
        examination.examine(waits, after)
        failed, answered = (examination.examine(waits, case) for case in (captured, after))
    assert failed.verdict is Verdict.ERROR
    assert "captur" in failed.reason
    assert answered.verdict is Verdict.PASS


def test_a_share_of_the_memory_is_all_that_a_worker_takes(waits: str) -> None:
    (case,) = select(["scale"], "cuda", only=["past-2-31-elements-ungrouped"])
    share = case.problem.input_bytes / 2 / torch.cuda.get_device_properties(0).total_memory
    with Examination(DEVICE, [case]) as examination:
        found = examination.examine("sdpa-flash", case, memory_share=share)
        whole = examination.examine("sdpa-flash", case)
    assert (found.verdict, whole.verdict) == (Verdict.OOM, Verdict.PASS)
