"""Measured choices in the place of rules: which calls go by them, and which tables are refused."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from attnbench.harness.contract import TUNED_VARIABLE, Device
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.impls.flash_triton import configs, flash_attention, launch, space, tuned
from attnbench.impls.flash_triton.plugin import FlashTriton

H200 = configs.Device((9, 0), 132)
USUAL = configs.Shape(2, 8, 4, 1000, 1000, 128, 128, 2, False, False, False, (0, 0), True)
PROBLEM = Problem(1, 2, 70, 16, dtype="fp16", mask=Mask.parse("causal"))


@pytest.fixture(autouse=True)
def no_table(monkeypatch):
    monkeypatch.setattr(tuned, "_active", None)
    monkeypatch.delenv(TUNED_VARIABLE, raising=False)
    launch.forget_plans()


def table_file(path, *, device="cpu", schema=1, impl="flash-triton"):
    """What `bench tune` would write of 16 rows a tile, in place of more, for `PROBLEM` in both passes."""
    entries = []
    for direction in ("fwd", "bwd"):
        candidates = space.candidates(PROBLEM.with_direction(direction), Device("cpu"), False)
        chosen = next(one for one in candidates[1:] if one.choice != candidates[0].choice)
        entries.append({"impl": impl, "key": chosen.key, "choice": chosen.choice})
    path.write_text(json.dumps({"schema": schema, "device": {"name": device}, "choices": entries}))
    return path


def test_calls_go_by_the_table_that_the_variable_names(tmp_path, monkeypatch, make, wrong):
    rules = tuned.Table()
    monkeypatch.setenv(TUNED_VARIABLE, str(table_file(tmp_path / "table.json")))
    table = tuned.active()
    problem = make(70, 70, 2, right=0)
    asked = []
    for name in ("forward_config", "backward_config"):
        monkeypatch.setattr(launch, name, lambda *_, name=name: asked.append(name))
    assert wrong(problem, flash_attention, causal=True) == []
    assert asked == [], "the rules were asked"
    (shape,) = table.forward
    assert table.forward[shape] != configs.forward_config(launch.device_of("cpu", None), shape)
    assert rules.forward_of(torch.device("cpu"), shape) is None


def out_and_gradients(*tensors):
    """Of a call that is settled; sums repeat bit for bit."""
    for x in tensors:
        x.requires_grad_()
    out = flash_attention(*tensors, causal=True, deterministic=True)
    return out, *torch.autograd.grad(out, tensors, torch.ones_like(out))


def test_calls_like_an_earlier_one_go_by_the_table_of_now(tmp_path, monkeypatch, make):
    """Forward and backward, in the middle of calls that were settled without one."""
    went_by = []
    for name in ("run_forward", "run_backward"):
        run = getattr(launch, name)
        monkeypatch.setattr(
            launch, name, lambda plan, *of, run=run: went_by.append(id(plan)) or run(plan, *of)
        )
    problem = make(70, 70, 2, right=0)
    table = tuned.read(table_file(tmp_path / "table.json"))
    for chosen in (None, None, table, table, None):
        with contextlib.nullcontext() if chosen is None else tuned.using(chosen):
            out_and_gradients(problem.q, problem.k, problem.v)
    rules, by_table = went_by[:2], went_by[4:6]
    assert went_by == rules * 2 + by_table * 2 + rules
    assert not set(rules) & set(by_table)


def test_a_call_like_an_earlier_one_that_begins_elsewhere_is_planned_anew(make):
    """At an address that is no multiple of 16."""
    problem, plans = make(40, 40, 2), (launch.forward_plan, launch.backward_plan)
    expected = out_and_gradients(problem.q, problem.k, problem.v)
    for name in "qkv":
        x = getattr(problem, name)
        placed = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
        assert placed.data_ptr() % 16
        known = [plan.cache_info().misses for plan in plans]
        moved = replace(problem, **{name: placed.copy_(x)})
        got = out_and_gradients(moved.q, moved.k, moved.v)
        assert all(map(torch.equal, got, expected))
        assert [plan.cache_info().misses for plan in plans] == [n + 1 for n in known]


def test_other_shapes_go_by_the_rules(tmp_path, monkeypatch, make, wrong):
    monkeypatch.setenv(TUNED_VARIABLE, str(table_file(tmp_path / "table.json")))
    assert wrong(make(70, 71, 2, right=0), flash_attention, causal=True) == []


def test_a_table_of_another_device_is_refused(tmp_path, monkeypatch, make):
    monkeypatch.setenv(TUNED_VARIABLE, str(table_file(tmp_path / "table.json", device="NVIDIA H200")))
    problem = make(20, 20)
    with pytest.raises(tuned.TableError, match=r"\$ATTNBENCH_TUNED: .* NVIDIA H200, and this is cpu"):
        flash_attention(problem.q, problem.k, problem.v)


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"schema": 2}', '{"schema": 1, "choices": [{"impl": "flash-triton"}]}']
)
def test_what_is_no_table_is_refused(tmp_path, monkeypatch, damage):
    path = tmp_path / "table.json"
    path.write_text(damage)
    monkeypatch.setenv(TUNED_VARIABLE, str(path))
    with pytest.raises(tuned.TableError, match=r"table\.json is not a table that bench tune wrote"):
        tuned.active()


def test_entries_of_other_implementations_are_passed_over(tmp_path):
    assert tuned.read(table_file(tmp_path / "table.json", impl="other")).forward == {}


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_what_is_written_is_what_is_read(tmp_path, which):
    shape = replace(USUAL, dropout=True, mask_block=(128, 128))
    if which == "forward":
        found = space.forward_space(H200, shape)
        entries = [tuned.forward_choice(shape, config) for config in found]
    else:
        found = space.backward_space(H200, shape, False)
        entries = [tuned.backward_choice(shape, False, config) for config in found]
    assert len(found) > 10
    assert any(config.hopper for config in found[::5])
    assert not all(config.hopper for config in found[::5])
    path = tmp_path / "table.json"
    for config, (key, choice) in list(zip(found, entries, strict=True))[::5]:
        listed = [{"impl": "flash-triton", "key": key, "choice": choice}]
        path.write_text(json.dumps({"schema": 1, "device": {"name": "NVIDIA H200"}, "choices": listed}))
        table = tuned.read(path)
        assert (table.forward or table.backward) == {
            (shape if which == "forward" else (shape, False)): config
        }


def test_the_version_says_by_which_table(tmp_path, monkeypatch):
    plain = FlashTriton().version()
    monkeypatch.setenv(TUNED_VARIABLE, str(table_file(tmp_path / "table.json")))
    marked = FlashTriton().version()
    assert marked.startswith(f"{plain}+tuned.")
    (tmp_path / "table.json").write_text("other")
    assert FlashTriton().version() not in (plain, marked)
    (tmp_path / "table.json").unlink()
    assert FlashTriton().version() == f"{plain}+tuned.unreadable"


@pytest.mark.parametrize(
    "changes",
    [{}, {"dropout": True}, {"mask_block": (64, 96)}, {"head_dim": 64, "head_dim_v": 64}, {"seqlen_q": 1, "batch": 1},
     {"itemsize": 4, "tma_able": False}, {"head_dim": 256, "head_dim_v": 256, "causal": True, "banded": True}],
    ids=str,
)  # fmt: skip
def test_the_first_candidate_is_the_rules_own_and_none_comes_twice(changes):
    shape = replace(USUAL, **changes)
    forward, backward = space.forward_space(H200, shape), space.backward_space(H200, shape, False)
    assert forward[0] == configs.forward_config(H200, shape)
    assert backward[0] == configs.backward_config(H200, shape, False)
    for found in (forward, backward):
        assert len(found) == len(set(found))
        assert len(found) > 3
    for tile in [config.tile for config in forward] + [t for c in backward for t in (c.dkdv, c.dq)]:
        assert tile == configs.fit(tile, shape), "a tile that dropout or the mask's blocks do not allow"


def test_a_deterministic_backward_is_offered_nothing_that_adds_in_memory():
    assert not any(c.hopper and c.hopper.fused for c in space.backward_space(H200, USUAL, True))


def test_candidates_are_what_calls_then_do(make, wrong):
    """Each is right, and a graph made under one may be gone through under another."""
    for direction in ("fwd", "bwd"):
        found = space.candidates(PROBLEM.with_direction(direction), Device("cpu"), False)
        assert len({one.label for one in found}) == len(found)
        for one in found[:2]:
            with one.using():
                assert wrong(make(70, 70, 2, right=0), flash_attention, causal=True) == []
    assert space.candidates(PROBLEM.with_direction("fwd_bwd"), Device("cpu"), False) == []


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_nearest_candidates_of_a_gpu_are_right_or_do_not_fit(make, wrong, direction, head_dim):
    """On a Hopper GPU the warp-specialised ones come first."""
    posed = Problem(1, 2, 600, head_dim, dtype="bf16", mask=Mask.parse("causal"), direction=direction)
    found = space.candidates(posed, Device("cuda"), False)[:8]
    problem = make(600, 600, 2, head_dim=head_dim, dtype=torch.bfloat16, right=0)
    fitting = 0
    for one in found:
        with one.using(), contextlib.suppress(OutOfResources):
            assert wrong(problem, flash_attention, causal=True) == [], one.label
            fitting += 1
    assert fitting > 1
