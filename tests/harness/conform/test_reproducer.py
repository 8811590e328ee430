"""The script poses what the harness posed, and says of a right implementation that nothing is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.posed import Posed
from attnbench.harness.conform.reproducer import source
from attnbench.harness.conform.suite import select
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
