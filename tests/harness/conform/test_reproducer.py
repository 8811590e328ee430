"""The script poses what the harness posed, asks what its check asked, and says of a right implementation that nothing
is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attnbench.harness import registry
from attnbench.harness.conform.case import Case
from attnbench.harness.conform.checks import CHECKS
from attnbench.harness.conform.mutants import Mutant, catalogue
from attnbench.harness.conform.mutants.examine import Bench, of_case
from attnbench.harness.conform.posed import Posed
from attnbench.harness.conform.reproduce import run_script, shows, variants
from attnbench.harness.conform.reproducer import source
from attnbench.harness.conform.suite import select
from attnbench.harness.conform.verdict import Finding, Verdict
from attnbench.harness.contract import Device, Implementation
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Direction, Problem
from attnbench.impls import flash_attn, flex, sdpa, xformers_fmha
from attnbench.impls.standard import Standard
from attnbench.impls.tiled import fa2

CPU = Device("cpu")
SUITES = ["causal", "gqa", "shapes", "layout", "numerics", "block_sparse"]


def chosen() -> list[Case]:
    """One case of each name, and every kind of inputs, view and pattern that is posed with it; short ones."""
    found: dict[tuple[str, ...], Case] = {}
    for case in select(SUITES, "cpu"):
        p = case.problem
        if case.check != "agrees" or max(p.seqlen_q, p.seqlen_k) > 300:
            continue
        blocks = p.mask.blocks.name if p.mask.blocks else ""
        views = ",".join(name for name, _ in p.strides)
        found.setdefault((case.suite, case.name, case.inputs, p.direction, p.mask.kind, blocks, views), case)
    return list(found.values())


def run(text: str) -> tuple[int, dict[str, Any]]:
    """Exit code and variables of a script, run here."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(text, "script.py", "exec"), scope)
    except SystemExit as ended:
        return int(ended.code or 0), scope
    return 0, scope


@pytest.fixture(autouse=True)
def deterministic_algorithms_as_they_were() -> Iterator[None]:
    """A script has a process of its own, and leaves what it switched on."""
    yield
    torch.use_deterministic_algorithms(mode=False)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.id)
def test_it_draws_the_harnesss_own_inputs_and_mask(case: Case) -> None:
    text = source(case, Standard(), CPU, "a reason", "found as")
    _, scope = run(text.split("# ---- the library")[0])
    inputs, p = Posed(case, Standard(), CPU).inputs(), case.problem
    for name in ("q", "k", "v", "dout") if p.direction != "fwd" else ("q", "k", "v"):
        assert same(scope[name], getattr(inputs, name)), name
        assert scope[name].storage_offset() % 2 == case.options.get("offset", 0) % 2
    dense = p.mask.dense(torch.arange(p.seqlen_q), p.heads, p.seqlen_q, p.seqlen_k)
    assert torch.equal(scope["visible"].expand_as(dense), dense)


SMALL = Problem(2, 4, 40, 16, kv_heads=2, seqlen_k=70, dtype="fp32", direction="fwd_bwd")


class Named(Standard):
    """``standard`` under another name: the script calls it through attnbench."""


@pytest.mark.parametrize(
    "mask", ["full", "causal", "causal@top_left", "window(3,2)", "blocks(butterfly,16x16)"]
)
@pytest.mark.parametrize("impl", [Named(), fa2, sdpa.math, sdpa.flash], ids=lambda impl: impl.name)
def test_it_finds_nothing_wrong_with_a_right_one(impl: Implementation, mask: str, capsys: Any) -> None:
    problem = Problem.from_json(SMALL.to_json() | {"mask": mask})
    for inputs in ("normal", "needle"):
        case = Case(problem, "c", "w", inputs=inputs, suite="s")
        code, _ = run(source(case, impl, CPU, "a reason", "found as"))
        said = capsys.readouterr().out
        assert code == 0, said
        assert "Nothing is wrong." in said


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("out * 1.01", "out"),
        ("torch.where(torch.arange(SEQLEN_Q)[:, None, None] == 33, out + 0.01, out)", "out "),
        ("out.masked_fill(torch.arange(SEQLEN_Q)[:, None, None] == 5, math.nan)", "out "),
    ],
)
def test_it_shows_where_a_wrong_one_is_wrong(change: str, named: str, capsys: Any) -> None:
    text = source(Case(SMALL, "c", "w", suite="s"), sdpa.math, CPU, "a reason", "found as")
    text = text.replace("# ---- plain attention", f"right = attend\n\n\ndef attend(q, k, v):\n    out = right(q, k, v)\n    return {change}\n\n\n# ---- plain attention")  # fmt: skip  # noqa: E501
    code, _ = run(text)
    said = capsys.readouterr().out
    assert code == 3
    table = [line for line in said.splitlines() if "is " in line and "not" in line]
    assert table[0].startswith(named)
    grid = [line for line in said.splitlines() if line.startswith("batch ")]
    assert len(grid) == 2 * 4
    if "== 33" in change:
        assert all(line.split()[-1] == "." * 33 + line.split()[-1][33] + "." * 6 for line in grid)


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
def test_it_says_the_same_however_many_batch_entries_fit(direction: Direction, capsys: Any) -> None:
    problem = Problem(20, 4, 8, 16, kv_heads=2, dtype="fp32", mask=Mask.causal(), direction=direction)
    text = source(Case(problem, "c", "w", suite="s"), sdpa.math, CPU, "a reason", "found as")
    broken = (
        "at = torch.arange(BATCH)[:, None, None, None] == 17\n    return torch.where(at, out + 0.01, out)"
    )
    text = text.replace("# ---- plain attention", f"right = attend\n\n\ndef attend(q, k, v):\n    out = right(q, k, v)\n    {broken}\n\n\n# ---- plain attention")  # fmt: skip  # noqa: E501
    said = []
    for entries in ("2**25", "3 * HEADS * SEQLEN_Q * SEQLEN_K", "1"):
        assert run(text.replace("2**25", entries))[0] == 3
        lines = capsys.readouterr().out.splitlines()
        # What is allowed follows from plain attention, whose roundings depend on how many entries it takes at a time.
        errors = [[word for n, word in enumerate(line.split()) if n not in {2, 4}] for line in lines[1:]]
        said.append(errors)
        assert [line[:17] for line in lines if line.startswith("batch ")] == [
            f"batch 17 head   {head}" for head in range(4)
        ]
        assert "[17, 0, 0, 0] is" in next(line for line in lines if line.startswith("out "))
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize(
    ("impl", "mask"),
    [
        (flash_attn.FlashAttention2(), "causal"),
        (flash_attn.FlashAttention4(), "window(5,inf)"),
        (flex.Flex(), "causal&blocks(butterfly,128x128)"),
        (xformers_fmha.cutlass, "causal@top_left"),
        (xformers_fmha.flash3, "window(5,0)"),
        (xformers_fmha.splitk, "full"),
        (xformers_fmha.splitk, "causal"),
        (sdpa.cudnn, "causal@top_left"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_peers_script_is_python_without_the_harness(impl: Implementation, mask: str) -> None:
    problem = dataclasses.replace(Problem.from_json(SMALL.to_json() | {"mask": mask}), dtype="bf16")
    where = Device("cuda", 0, "NVIDIA H200", (9, 0))
    text = source(
        Case(problem, "c", "w", cites=("a#1",), suite="s"), impl, where, 'a """reason""" \\', "found"
    )
    compile(text, "script.py", "exec")
    assert "attnbench" not in text
    assert "def attend(q, k, v):" in text


# ---- what a check asks ---------------------------------------------------------------------------------------

NEEDS_CUDA = {"graph_replay", "side_streams", "dropout_graphs"}
POSED = {"autocast": {"dtype": "bf16"}, "finite_differences": {"dtype": "fp64"}}


def of_check(check: str) -> Case:
    dropout_p = 0.3 if check.startswith("dropout") else 0.0
    problem = dataclasses.replace(SMALL, dropout_p=dropout_p, **POSED.get(check, {}))  # type: ignore[arg-type]
    return Case(problem, "c", "w", suite="s", check=check)


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_has_a_script_without_the_harness(check: str) -> None:
    where = Device("cuda", 0, "NVIDIA H200", (9, 0))
    for direction in ("fwd", "fwd_bwd"):
        case = of_check(check)
        case = dataclasses.replace(case, problem=case.problem.with_direction(direction))  # type: ignore[arg-type]
        text = source(case, sdpa.math, where, "a reason", "found as")
        compile(text, "script.py", "exec")
        assert "attnbench" not in text
        assert "def asked():" in text


@pytest.mark.parametrize("check", [check for check in CHECKS if check not in NEEDS_CUDA])
def test_what_a_check_asks_of_a_right_one_is_right(check: str, capsys: Any) -> None:
    code, _ = run(source(of_check(check), sdpa.math, CPU, "a reason", "found as"))
    assert (code, "Nothing is wrong." in capsys.readouterr().out) == (0, True)


def of_each_check() -> list[Mutant]:
    """One mutant for every check that any is planted for."""
    cases = {f"{case.suite}/{case.name}": case.check for case in select([], "cpu")}
    return list({cases[m.killed_by]: m for m in catalogue().values() if m.killed_by in cases}.values())


@pytest.mark.parametrize("mutant", of_each_check(), ids=lambda mutant: mutant.name)
def test_what_a_check_sees_its_script_shows(
    mutant: Mutant, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = mutant.implementation()  # a process has one, with what its calls share
    monkeypatch.setattr(registry, "load", lambda _: planted)
    cases = of_case(select([mutant.suite], "cpu"), mutant.killed_by)
    seen = Bench("cpu", cases).sees(mutant.implementation(), cases)
    finding = Finding(seen.case, mutant.name, "1", "cpu", Verdict(seen.verdict), seen.reason)
    case = next(case for case in cases if case.id == seen.case)
    code, _ = run(source(case, planted, CPU, seen.reason, case.id))
    said = capsys.readouterr().out
    assert shows(finding, code, said), said


def attending(text: str, function: str) -> str:
    """The script with another ``attend``, which may call the right one."""
    planted = f"right = attend\n\n\n{function}\n\n\n"
    return text.replace("# ---- plain attention", f"{planted}# ---- plain attention", 1)


def test_a_compiled_layer_that_is_wrong_is_shown(capsys: Any) -> None:
    text = source(of_check("compiled"), sdpa.math, CPU, "a reason", "found as")
    compiling = (
        "def attend(q, k, v):\n    return right(q, k, v) * (1.1 if torch.compiler.is_compiling() else 1)"
    )
    assert run(attending(text, compiling))[0] == 3
    assert "Wrong: under torch.compile, out[" in capsys.readouterr().out


def test_a_layout_that_is_taken_from_the_call_before_is_shown(capsys: Any) -> None:
    """As a cache of plans does whose key leaves the strides of dout out."""
    problem = dataclasses.replace(SMALL, strides=(("dout", (0, 64, 16, 1)),))
    text = source(Case(problem, "c", "w", suite="s"), sdpa.math, CPU, "a reason", "found as")
    keeping = """
class Kept(torch.autograd.Function):
    strides = []

    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, dout):
        Kept.strides.append(dout.stride())
        return dout if dout.stride() == Kept.strides[0] else dout + 1


def attend(q, k, v):
    return Kept.apply(right(q, k, v))
"""
    alone, after_another = variants(text)
    assert [run(one)[0] for one in (alone, after_another, attending(alone, keeping))] == [0, 0, 0]
    capsys.readouterr()
    assert run(attending(after_another, keeping))[0] == 3
    assert "Wrong: dq[0, " in capsys.readouterr().out


def test_memory_is_poisoned_before_a_forward_and_before_its_backward() -> None:
    text = source(Case(SMALL, "c", "w", suite="s"), sdpa.math, CPU, "a reason", "found as")
    telling = """
class Told(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        order.append("forward")
        return out.clone()

    @staticmethod
    def backward(ctx, dout):
        order.append("backward")
        return dout


def attend(q, k, v):
    return Told.apply(right(q, k, v))
"""
    poisoning = """
order, poisons = [], poison


def poison():
    order.append("poison")
    poisons()


print("Asking."
"""
    _, scope = run(attending(text, telling).replace('print("Asking."', poisoning.rstrip()))
    assert scope["order"] == ["poison", "forward", "poison", "backward"]


def test_what_a_call_raises_is_told_apart_from_what_the_script_does(capsys: Any) -> None:
    text = source(Case(SMALL, "c", "w", suite="s"), sdpa.math, CPU, "a reason", "found as")
    raising = "def attend(q, k, v):\n    raise ValueError('not today\\nand more')"
    assert run(attending(text, raising))[0] == 4
    assert "Raised ValueError: not today\n" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):  # of what is compared with, not of the call
        run(text.replace("def of_plain(dtype, part):", "def of_plain(dtype, part):\n    1 / 0"))


def test_what_is_declared_unsupported_is_asked_for_an_answer() -> None:
    problem = dataclasses.replace(SMALL, mask=Mask.window(3, 2))
    where = Device("cuda", 0, "NVIDIA H200", (9, 0))
    assert sdpa.cudnn.unsupported_reasons(problem, where)
    text = source(Case(problem, "c", "w", suite="s", check="opcheck"), sdpa.cudnn, where, "r", "f")
    assert "opcheck" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("check", sorted(NEEDS_CUDA))
def test_what_a_check_asks_of_a_gpu_is_right_of_a_right_one(check: str, tmp_path: Path) -> None:
    where = Device("cuda", 0, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    script = tmp_path / "script.py"
    script.write_text(source(of_check(check), sdpa.math, where, "a reason", "found as"))
    code, said = run_script(script, sdpa.math.name)
    assert code == 0, said
