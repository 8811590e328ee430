"""Sharpness and fairness of the verdict: planted errors are caught, right computations by other routes pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnbench.harness.masks import Mask
from attnbench.harness.oracle import judge as module
from attnbench.harness.oracle.chunks import row_major
from attnbench.harness.oracle.inputs import Inputs, judging_dout, make_inputs
from attnbench.harness.oracle.judge import Oracle, WrongAnswer, build, judge
from attnbench.harness.oracle.reference import judged_rows, probe_rows
from attnbench.harness.problem import Problem

CPU = torch.device("cpu")
ALL = 1 << 40


def posed(
    dtype: str, mask: str, seqlen: int = 256, kind: str = "normal", seed: int = 0, max_pairs: int = ALL
) -> tuple[Problem, Inputs, Oracle]:
    problem = Problem(1, 4, seqlen, 64, kv_heads=2, dtype=dtype, mask=Mask.parse(mask), direction="fwd_bwd")
    inputs = make_inputs(problem, seed, CPU, dout=True, kind=kind)
    return problem, inputs, build(problem, inputs, seed, judged_rows(problem, max_pairs), True)


def by_torch(inputs: Inputs, causal: bool, backend: SDPBackend) -> dict[str, torch.Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
        ).transpose(1, 2)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), inputs.dout)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def failures(oracle: Oracle, got: dict[str, torch.Tensor]) -> dict[str, object]:
    return {name: error for name, error in judge(oracle, got).tensors.items() if not error.ok}


# ---- right answers pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "needle", "large"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_right_answers_pass_whatever_the_seed(flashlike, dtype, kind):
    """50 seeds, two masks, three routes each: torch's math and flash, and tiles accumulated in fp32."""
    alarms = []
    for seed in range(50):
        mask = ("full", "causal")[seed % 2]
        problem = Problem(1, 2, 96 + 5 * seed % 64, 32, dtype=dtype, mask=Mask.parse(mask))
        inputs = make_inputs(problem, seed, CPU, dout=True, kind=kind)
        oracle = build(problem, inputs, seed, judged_rows(problem, ALL), True)
        answers = {
            "tiles": flashlike(problem, inputs),
            "math": by_torch(inputs, mask == "causal", SDPBackend.MATH),
            "flash": by_torch(inputs, mask == "causal", SDPBackend.FLASH_ATTENTION),
        }
        alarms += [
            (seed, route, failures(oracle, got)) for route, got in answers.items() if failures(oracle, got)
        ]
    assert not alarms


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (1, 40), (3, 2), (65, 300), (130, 60), (5, 0)])
@pytest.mark.parametrize(
    "mask", ["full", "causal", "window(7,3)", "blocks(random,16x16,density=0.3,per_head=1)"]
)
def test_right_answers_pass_at_odd_shapes(flashlike, dtype, seqlen_q, seqlen_k, mask):
    problem = Problem(2, 4, seqlen_q, 8, 2, seqlen_k, head_dim_v=24, dtype=dtype, mask=Mask.parse(mask))
    for seed, kind in enumerate(("normal", "needle")):
        inputs = make_inputs(problem, seed, CPU, dout=True, kind=kind)
        oracle = build(problem, inputs, seed, judged_rows(problem, ALL), True)
        assert not failures(oracle, flashlike(problem, inputs, tile=16))


# ---- wrong answers do not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("mistake", "mask", "kind", "seen_in"),
    [
        ({"scale": 0.125 * 1.01}, "full", "normal", {"out", "lse", "dq", "dk", "dv"}),
        ({"keys": 448}, "full", "normal", {"out", "lse", "dq", "dk", "dv"}),
        ({"keys": 511}, "full", "needle", {"out", "dq", "dk", "dv"}),
        ({"shift": 1}, "causal", "normal", {"out", "lse", "dq", "dk", "dv"}),
        ({"shift": -1}, "causal", "normal", {"out", "lse", "dq", "dk", "dv"}),
        ({"shift": 1}, "window(100,0)", "needle", {"out", "dq", "dk", "dv"}),
        ({"swap_kv_heads": True}, "causal", "normal", {"dk"}),
    ],
    ids=[
        "scale 1% off",
        "last tile dropped",
        "one key dropped",
        "causal +1",
        "causal -1",
        "window +1",
        "dk's head",
    ],
)
def test_planted_errors_are_caught(flashlike, dtype, mistake, mask, kind, seen_in):
    problem, inputs, oracle = posed(dtype, mask, 512, kind)
    assert not failures(oracle, flashlike(problem, inputs))
    assert set(failures(oracle, flashlike(problem, inputs, **mistake))) >= seen_in


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_lse_in_base_2_is_caught(flashlike, dtype):
    problem, inputs, oracle = posed(dtype, "causal")
    got = flashlike(problem, inputs)
    assert set(failures(oracle, got | {"lse": got["lse"] / torch.log(torch.tensor(2.0))})) == {"lse"}


def test_tf32_products_do_not_pass_for_fp32(flashlike):
    problem, inputs, oracle = posed("fp32", "causal")

    def tf32(x: torch.Tensor) -> torch.Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    rounded = Inputs(*(tf32(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout)))
    assert set(failures(oracle, flashlike(problem, rounded))) >= {"out", "dq", "dk", "dv"}


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_one_wrong_row_late_in_a_long_causal_sequence_is_caught(name):
    problem = Problem(1, 1, 4096, 32, dtype="bf16", mask=Mask.causal())
    inputs = make_inputs(problem, 0, CPU, dout=True)
    oracle = build(problem, inputs, 0, judged_rows(problem, ALL), True)
    got = oracle.tensors[name].bfloat16()
    assert judge(oracle, {name: got}).ok
    got[0, 4000] = 0
    error = judge(oracle, {name: got}).tensors[name]
    assert not error.ok
    assert error.first_bad[:2] == (0, 4000)


# ---- what the verdict says --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1 << 24, 64 * 7, 1])
def test_first_bad_is_the_first_in_bshd_order(monkeypatch, flashlike, chunk):
    problem, inputs, oracle = posed("bf16", "causal", 130)
    monkeypatch.setattr(module, "row_major", lambda shape: row_major(shape, chunk))
    got = flashlike(problem, inputs)
    for place in ((0, 99, 1, 2), (0, 77, 3, 63), (0, 100, 0, 0)):
        got["out"][place] += 2.0
    error = judge(oracle, got).tensors["out"]
    assert error.first_bad == (0, 77, 3, 63)
    assert error.got == got["out"][0, 77, 3, 63].item()
    assert error.want == pytest.approx(error.got - 2.0, abs=0.05)
    assert error.max_error == pytest.approx(2.0, abs=0.05)
    assert error.max_error > error.max_budget


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["out", "lse", "dk"])
def test_what_is_not_finite_is_bad_where_it_stands(flashlike, name, poison):
    problem, inputs, oracle = posed("bf16", "causal")
    got = flashlike(problem, inputs)
    place = (0, 3, 70) if name == "lse" else (0, 70, 1, 5)
    got[name][place] = poison
    error = judge(oracle, got).tensors[name]
    assert (error.ok, error.first_bad, error.max_error, error.mean_error) == (False, place, None, None)


def test_an_empty_rows_lse_must_be_minus_infinity(flashlike):
    problem = Problem(1, 2, 40, 8, seqlen_k=10, dtype="bf16", mask=Mask.causal())
    inputs = make_inputs(problem, 0, CPU, dout=True)
    oracle = build(problem, inputs, 0, judged_rows(problem, ALL), True)
    got = flashlike(problem, inputs)
    assert judge(oracle, got).ok
    for wrong in (torch.inf, -1e30, torch.nan):
        lse = got["lse"].clone()
        lse[0, 1, 4] = wrong
        assert judge(oracle, {"lse": lse}).tensors["lse"].first_bad == (0, 1, 4)


def test_a_mean_that_is_over_alone_names_the_largest_error(flashlike):
    problem, inputs, oracle = posed("bf16", "full")
    got = flashlike(problem, inputs)
    budget = oracle.budgets["out"]
    tight = dataclasses.replace(oracle, budgets={"out": dataclasses.replace(budget, mean_error=1e-9)})
    error = judge(tight, {"out": got["out"]}).tensors["out"]
    difference = (got["out"].float() - oracle.tensors["out"]).abs()
    assert not error.ok
    assert difference[error.first_bad] == difference.max()


def test_rows_of_a_sample_are_named_as_in_the_full_sequence(flashlike):
    problem, inputs, oracle = posed("bf16", "causal", 512, max_pairs=4 * 512 * 40)
    assert (len(oracle.rows), oracle.complete) == (40, False)
    got = flashlike(problem, inputs, judging_dout(inputs, oracle.rows))
    judgement = judge(oracle, got)
    assert judgement.ok
    assert (judgement.rows, judgement.rows_total) == (40, 512)
    row = int(oracle.rows[17])
    got["dq"][0, row, 2, 9] += 5
    got["lse"][0, 2, row] += 5
    tensors = judge(oracle, got).tensors
    assert tensors["dq"].first_bad == (0, row, 2, 9)
    assert tensors["lse"].first_bad == (0, 2, row)
    outside = next(row for row in range(512) if row not in set(oracle.rows.tolist()))
    clean = flashlike(problem, inputs, judging_dout(inputs, oracle.rows))
    clean["out"][0, outside] = torch.nan
    assert judge(oracle, clean).ok


def test_wrong_shapes_and_dtypes_are_told_apart_from_wrong_values(flashlike):
    problem, inputs, oracle = posed("bf16", "full")
    got = flashlike(problem, inputs)
    with pytest.raises(WrongAnswer, match=r"out has shape \(1, 4, 256, 64\), not \(1, 256, 4, 64\)"):
        judge(oracle, {"out": got["out"].transpose(1, 2)})
    with pytest.raises(WrongAnswer, match="dq has dtype float32, not bfloat16"):
        judge(oracle, {"dq": got["dq"].float()})
    with pytest.raises(WrongAnswer, match="lse has dtype bfloat16, not float32"):
        judge(oracle, {"lse": got["lse"].bfloat16()})
    with pytest.raises(ValueError, match="not delta"):
        judge(oracle, {"delta": got["lse"]})


def test_an_oracle_survives_its_file(tmp_path, flashlike):
    problem, inputs, oracle = posed("bf16", "causal", max_pairs=4 * 256 * 40)
    oracle.save(tmp_path / "oracle.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["oracle.pt"]
    for mmap in (True, False):
        again = Oracle.load(tmp_path / "oracle.pt", CPU, mmap=mmap)
        assert again.budgets == oracle.budgets
        assert (again.problem, again.seed, again.dtype, again.rows_total) == (
            problem.group_key,
            0,
            "bf16",
            256,
        )
        assert torch.equal(again.rows, oracle.rows)
        assert {name: x.dtype for name, x in again.tensors.items()} == dict.fromkeys(
            oracle.tensors, torch.float32
        )
        assert judge(again, flashlike(problem, inputs, judging_dout(inputs, oracle.rows))).ok


# ---- timed calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_timed_calls_answer_is_checked_on_the_probe_rows(flashlike, mask):
    problem, _, judged = posed("bf16", mask, 512)
    fresh = make_inputs(problem, 1, CPU, dout=True)
    probe = build(problem, fresh, 1, probe_rows(problem), True, columns=False).with_budgets_of(judged)
    assert set(probe.tensors) == {"out", "lse", "dq"}
    got = flashlike(problem, fresh)
    timed = {"out": got["out"], "dq": got["dq"]}
    assert judge(probe, timed).ok
    stale = flashlike(problem, make_inputs(problem, 0, CPU, dout=True))
    wrong = judge(probe, timed | {"out": stale["out"]}).tensors
    assert (wrong["out"].ok, wrong["out"].first_bad, wrong["dq"].ok) == (False, (0, 0, 0, 0), True)
    assert not judge(probe, timed | {"dq": torch.full_like(got["dq"], torch.nan)}).ok
    with pytest.raises(WrongAnswer, match="shape"):
        judge(probe, {"out": got["out"][:, 1:]})


def test_the_wider_of_two_budgets_is_taken():
    _, _, one = posed("bf16", "full", 64)
    _, _, two = posed("bf16", "full", 256, seed=1)
    both = one.with_budgets_of(two)
    for name, budget in both.budgets.items():
        assert budget.mean_error == max(one.budgets[name].mean_error, two.budgets[name].mean_error)
        assert budget.max_error == max(one.budgets[name].max_error, two.budgets[name].max_error)
        assert len(budget.max_errors) == len(one.budgets[name].max_errors)
