"""The same verdicts on a GPU: torch's kernels are right there, TF32 is not fp32, and every process sees one input."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnbench.harness.masks import Mask
from attnbench.harness.oracle.inputs import judging_dout, make_inputs
from attnbench.harness.oracle.judge import Oracle, build, judge
from attnbench.harness.oracle.reference import judged_rows, probe_rows, reference
from attnbench.harness.problem import Problem

pytestmark = pytest.mark.gpu
MAX_PAIRS = 1 << 28


def solve(inputs, dout, causal, backend):
    q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        ).transpose(1, 2)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("kind", ["normal", "needle", "large"])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_torchs_kernels_are_right(backend, dtype, mask, kind):
    device = torch.device("cuda")
    for seqlen, seed in ((200, 0), (4096, 1)):
        problem = Problem(1, 8, seqlen, 128, dtype=dtype, mask=Mask.parse(mask), direction="fwd_bwd")
        inputs = make_inputs(problem, seed, device, dout=True, kind=kind)
        rows = judged_rows(problem, MAX_PAIRS // 4)
        oracle = build(problem, inputs, seed, rows, True)
        got = solve(inputs, judging_dout(inputs, rows), mask == "causal", getattr(SDPBackend, backend))
        judgement = judge(oracle, got)
        assert judgement.ok, judgement
        probe = build(problem, inputs, seed, probe_rows(problem), True, columns=False).with_budgets_of(oracle)
        timed = solve(inputs, inputs.dout, mask == "causal", getattr(SDPBackend, backend))
        assert judge(probe, {"out": timed["out"], "dq": timed["dq"]}).ok


def test_tf32_products_do_not_pass_for_fp32(monkeypatch):
    problem = Problem(1, 4, 1024, 64, dtype="fp32")
    inputs = make_inputs(problem, 0, torch.device("cuda"), dout=True)
    oracle = build(problem, inputs, 0, judged_rows(problem, MAX_PAIRS), True)
    assert judge(oracle, solve(inputs, inputs.dout, False, SDPBackend.MATH)).ok
    torch.set_float32_matmul_precision("high")
    try:
        wrong = judge(oracle, solve(inputs, inputs.dout, False, SDPBackend.MATH))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not any(error.ok for error in wrong.tensors.values())


def test_the_reference_is_the_cpus_and_an_oracle_loads_to_the_device(tmp_path):
    problem = Problem(2, 4, 300, 32, kv_heads=2, dtype="bf16", mask=Mask.parse("window(70,0)"))
    inputs = make_inputs(problem, 0, torch.device("cuda"), dout=True)
    rows = judged_rows(problem, MAX_PAIRS)
    oracle = build(problem, inputs, 0, rows, True)
    there = type(inputs)(*(x.cpu() for x in (inputs.q, inputs.k, inputs.v, inputs.dout)))
    want = reference(problem, there, rows, backward=True)
    for name, x in oracle.tensors.items():
        torch.testing.assert_close(x.cpu(), getattr(want, name).float(), rtol=1e-6, atol=1e-7)
    oracle.save(tmp_path / "oracle.pt")
    again = Oracle.load(tmp_path / "oracle.pt", torch.device("cuda"))
    assert all(x.is_cuda and torch.equal(x, oracle.tensors[name]) for name, x in again.tensors.items())
