"""Problems are valid by construction, survive JSON, and count their own work exactly."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.masks import Mask
from attnbench.harness.problem import DIRECTIONS, DTYPE_BYTES, DTYPES, TENSORS, Problem

MASKS = ["full", "causal", "causal@top_left", "window(3,1)", "blocks(random,4x8,density=0.5,seed=2)"]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    kv_heads = draw(st.integers(1, 3))
    packed = draw(st.booleans())
    seqlen_q, head_dim = draw(st.integers(0, 30)), draw(st.integers(1, 20))
    strides = draw(
        st.dictionaries(st.sampled_from(TENSORS), st.tuples(*[st.integers(0, 10**6)] * 4), max_size=2)
    )
    return Problem(
        batch=draw(st.integers(0, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        seqlen_q=seqlen_q,
        head_dim=head_dim,
        kv_heads=kv_heads,
        seqlen_k=seqlen_q if packed else draw(st.integers(0, 30)),
        head_dim_v=head_dim if packed else draw(st.integers(1, 20)),
        dtype=draw(st.sampled_from(DTYPES)),
        mask=Mask.parse(draw(st.sampled_from(MASKS))),
        dropout_p=draw(st.sampled_from([0.0, 0.1])),
        scale=draw(st.none() | st.floats(-2, 2)),
        direction=draw(st.sampled_from(DIRECTIONS)),
        layout="packed" if packed else draw(st.sampled_from(["bshd", "bhsd"])),
        strides=tuple(sorted(strides.items())),
    )


@given(problems())
def test_json_keeps_the_problem(problem):
    assert Problem.from_json(json.loads(json.dumps(problem.to_json()))) == problem


@given(problems())
def test_a_key_is_the_groups_name_and_the_direction(problem):
    keys = {problem.with_direction(direction).key for direction in DIRECTIONS}
    assert len(keys) == 3
    assert all(key.startswith(problem.group_key) for key in keys)
    assert {problem.with_direction(direction).group_key for direction in DIRECTIONS} == {problem.group_key}


@given(problems(), st.data())
def test_a_problem_that_differs_in_one_field_has_another_key(problem, data):
    changes = {
        "batch": problem.batch + 1,
        "seqlen_q": problem.seqlen_q + 1,
        "seqlen_k": problem.seqlen_k + 1,
        "head_dim": problem.head_dim + 1,
        "head_dim_v": problem.head_dim_v + 1,
        "heads": problem.heads + problem.kv_heads,
        "dtype": "fp16" if problem.dtype != "fp16" else "bf16",
        "mask": Mask.window(17, 0),
        "dropout_p": 0.5,
        "scale": 3.0,
        "strides": (("q", (7, 7, 7, 7)),),
    }
    field = data.draw(st.sampled_from(sorted(changes)))
    plain = dataclasses.replace(problem, layout="bshd")
    other = dataclasses.replace(plain, **{field: changes[field]})
    assert other.group_key != plain.group_key


@given(problems())
def test_flops_are_two_a_multiply_add_over_visible_pairs(problem):
    pairs = problem.batch * problem.mask.visible_pairs(problem.heads, problem.seqlen_q, problem.seqlen_k)
    forward = problem.with_direction("fwd").flops
    backward = problem.with_direction("bwd").flops
    # QK^T and PV; then QK^T again, dO V^T, dS^T Q, dS K and P^T dO.
    assert forward == 2 * pairs * problem.head_dim + 2 * pairs * problem.head_dim_v
    assert backward == 3 * 2 * pairs * problem.head_dim + 2 * 2 * pairs * problem.head_dim_v
    assert problem.with_direction("fwd_bwd").flops == forward + backward


def test_flops_are_the_fields_own_for_full_attention():
    problem = Problem(2, 16, 1024, 64)
    assert problem.flops == 4 * 2 * 16 * 1024 * 1024 * 64
    assert problem.with_direction("bwd").flops == 2.5 * problem.flops


def test_bytes_of_a_small_problem_counted_by_hand():
    problem = Problem(1, 4, 10, 8, kv_heads=2, seqlen_k=6, head_dim_v=16, dtype="fp16")
    q, k, v, out, lse = 4 * 10 * 8, 2 * 6 * 8, 2 * 6 * 16, 4 * 10 * 16, 4 * 10
    assert problem.input_bytes == 2 * (q + k + v)
    assert problem.minimal_bytes == 2 * (q + k + v + out) + 4 * lse
    assert problem.minimal_result_bytes == 2 * out + 4 * lse
    backward = problem.with_direction("bwd")
    assert backward.input_bytes == 2 * (q + k + v + out)
    assert backward.minimal_bytes == 2 * (2 * (q + k + v) + 2 * out) + 4 * lse
    assert backward.minimal_result_bytes == 2 * (out + q + k + v) + 4 * lse
    both = problem.with_direction("fwd_bwd").minimal_bytes
    assert both == problem.minimal_bytes + backward.minimal_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_have_torchs_size(dtype):
    from attnbench.harness.oracle.inputs import torch_dtype

    assert torch_dtype(dtype).itemsize == DTYPE_BYTES[dtype]


def test_what_is_left_out_follows_the_query_side():
    problem = Problem(2, 8, 128, 64)
    assert problem == Problem(2, 8, 128, 64, kv_heads=8, seqlen_k=128, head_dim_v=64)
    assert problem.softmax_scale == 1 / 8
    assert dataclasses.replace(problem, scale=0.0).softmax_scale == 0.0
    assert (problem.q_shape, problem.out_shape) == ((2, 128, 8, 64),) * 2
    assert Problem(1, 2, 5, 4, seqlen_k=0).seqlen_k == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"batch": -1}, "batch is -1; it must be an integer of at least 0"),
        ({"heads": 0}, "heads is 0"),
        ({"seqlen_q": 1.5}, "seqlen_q is 1.5"),
        ({"head_dim": True}, "head_dim is True"),
        ({"kv_heads": 3}, "kv_heads is 3; it must divide heads = 4"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; it must be one of bf16, fp16"),
        ({"direction": "forward"}, "direction is 'forward'"),
        ({"layout": "sbhd"}, "layout is 'sbhd'"),
        ({"dropout_p": 1.0}, r"dropout_p is 1.0; it must lie in \[0, 1\)"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"layout": "packed", "seqlen_k": 9}, "layout packed needs seqlen_k = seqlen_q"),
        ({"strides": (("o", (1, 1, 1, 1)),)}, "strides of 'o'"),
        ({"strides": (("q", (1, 1, 1)),)}, "strides of 'q'"),
        ({"strides": (("q", (1, 1, 1, -1)),)}, "strides of 'q'"),
    ],
)
def test_what_is_wrong_with_a_problem_is_said(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        Problem(**({"batch": 1, "heads": 4, "seqlen_q": 8, "head_dim": 16} | change))


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="unknown problem field 'heads_q'"):
        Problem.from_json({"batch": 1, "heads": 4, "seqlen_q": 8, "head_dim": 16, "heads_q": 2})


def test_absent_fields_take_their_defaults():
    read = Problem.from_json({"batch": 1, "heads": 4, "seqlen_q": 8, "head_dim": 16})
    assert read == Problem(1, 4, 8, 16)


def test_posing_a_problem_imports_neither_torch_nor_numpy():
    code = "import sys; from attnbench.harness.problem import Problem; Problem(1, 1, 8, 8).key; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "attnbench.harness.masks" in modules
    assert not {"torch", "numpy"} & set(modules)
