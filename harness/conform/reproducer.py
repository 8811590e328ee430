"""One self-contained script that shows a failing case: torch, the library, and nothing of the harness.

Imports torch; runs in the worker, where the implementation is.
"""

from __future__ import annotations

import re
import textwrap

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.checks import CHECKS
from attnbench.harness.conform.checks.after_variants import neighbours
from attnbench.harness.conform.checks.opcheck import TORCHS_OWN
from attnbench.harness.contract import Device, Implementation
from attnbench.harness.oracle.inputs import needle_keys, seed_of, spread, torch_dtype
from attnbench.harness.problem import Problem


def source(case: Case, implementation: Implementation, where: Device, reason: str, found_as: str) -> str:
    """Python source of the script. reason: what was found; found_as: id of the case before it was shrunk.

    It asks what the case's check asks (``templates/asked/<check>.py.j2``), of a problem that is declared unsupported
    what is asked of those: an answer that is right.
    """
    problem = case.problem
    own = implementation.standalone(problem, where)
    refused = implementation.unsupported_reasons(problem, where)
    check = _OF_UNSUPPORTED[problem.dropout_p > 0] if refused else case.check
    declared = implementation.repeats(where)
    results = ("out",) if problem.direction == "fwd" else ("out", "dq", "dk", "dv")
    environment = Environment(
        loader=PackageLoader("attnbench.harness.conform"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )  # no HTML: the template is a Python file, and what goes into it is quoted where it is text
    text = environment.get_template("reproducer.py.j2").render(
        title=_plain(f"{implementation.name} {implementation.version()}: {reason}"),
        about=[_plain(line) for line in _about(case, where, found_as)],
        asked=_asked(check),
        library=_library(implementation, own),
        device=str(where),
        dtype=_dtype(problem),
        p=problem,
        lay=bool(_laid(case)),
        draws=_draws(case, where),
        masks=_masks(problem),
        attend=_attend(problem, implementation, where),
        backward=problem.direction != "fwd",
        with_lse=_with_lse(own),
        check=check,
        options={**CHECKS[check].options, **(case.options if check == case.check else {})},
        other_values=check in _WITH_OTHER_VALUES,
        neighbours=[
            _constants(near, implementation, where) for near in _neighbours(case, implementation, where)
        ],
        dropout=implementation.dropout_effective(problem.dropout_p),
        state_seed=case.input_seed,
        exact=[name for name in results if ("fwd" if name == "out" else "bwd") in declared],
        torchs_own=sorted(TORCHS_OWN),
    )
    return _TOO_MANY_BLANKS.sub("\n\n\n", text)


_OF_UNSUPPORTED = {False: "agrees", True: "dropout_agrees"}
_WITH_OTHER_VALUES = ("backward_again", "checkpointing", "graph_replay", "own_results")
_TOO_MANY_BLANKS = re.compile(r"\n{4,}")


def _asked(check: str) -> str:
    return textwrap.fill(_plain(f"Check {check}: {CHECKS[check].claim}."), 116)


def _dtype(problem: Problem) -> str:
    return str(torch_dtype(problem.dtype)).removeprefix("torch.")


def _plain(text: str) -> str:
    return text.replace("\\", "/").replace('"""', "'''")


def _about(case: Case, where: Device, found_as: str) -> list[str]:
    machine = f"torch {torch.__version__} on {where.name or where}"
    lines = [f"Problem: {case.problem.key}, inputs {case.inputs}.", f"Asked because: {case.why}"]
    if case.cites:
        lines.append(f"Known as: {', '.join(case.cites)}.")
    return [*lines, f"Found as {found_as},", f"by {machine}."]


def _library(implementation: Implementation, own: str) -> str:
    if not own:
        return f"attnbench with {implementation.name}"
    return implementation.package if implementation.package not in ("", "torch") else "nothing else"


def _attend(problem: Problem, implementation: Implementation, where: Device) -> str:
    """What defines ``attend``; for an implementation that gives no source of its own, what attnbench calls.

    Set up in the first call, as its faults are the implementation's.
    """
    if own := implementation.standalone(problem, where):
        return own.strip()
    return (
        "from attnbench.harness.contract import Device\n"
        "from attnbench.harness.problem import Problem\n"
        "from attnbench.harness.registry import load\n\n"
        f"implementation = load({implementation.name!r})\n\n\n"
        "@functools.cache\n"
        "def prepared():\n"
        f"    problem = Problem.from_json({problem.to_json()!r})\n"
        f"    device = Device({where.kind!r}, {where.index}, {where.name!r}, {where.capability!r})\n"
        "    return implementation.prepare(problem, device)\n\n\n"
        "def attend(q, k, v):\n"
        "    return prepared().attend(q, k, v)"
    )


def _with_lse(own: str) -> str:
    """What the function that returns the lse as well is called; None where there is none."""
    if not own:
        return "prepared().attend_with_lse"
    return "attend_with_lse" if "def attend_with_lse" in own else "None"


def _neighbours(case: Case, implementation: Implementation, where: Device) -> list[Problem]:
    if case.check != "after_variants":
        return []
    return [near for near in neighbours(case.problem) if not implementation.unsupported_reasons(near, where)]


def _constants(problem: Problem, implementation: Implementation, where: Device) -> str:
    """A Python string that, executed, defines a problem's sizes, ``visible`` and ``attend``."""
    p = problem
    lines = [
        f"DTYPE, SCALE = torch.{_dtype(p)}, {p.softmax_scale!r}",
        f"BATCH, HEADS, KV_HEADS = {p.batch}, {p.heads}, {p.kv_heads}",
        f"SEQLEN_Q, SEQLEN_K, HEAD_DIM, HEAD_DIM_V = {p.seqlen_q}, {p.seqlen_k}, {p.head_dim}, {p.head_dim_v}",
        "row, key = torch.arange(SEQLEN_Q, device=DEVICE)[:, None], torch.arange(SEQLEN_K, device=DEVICE)[None]",
        "visible = torch.ones(1, SEQLEN_Q, SEQLEN_K, dtype=torch.bool, device=DEVICE)",
        *_masks(p),
        _attend(p, implementation, where),
    ]
    return repr("\n".join(lines))


# ---- inputs -----------------------------------------------------------------------------------------------


def _draws(case: Case, where: Device) -> list[str]:
    """Lines that make q, k, v and dout with the harness's own values."""
    problem, seed = case.problem, case.input_seed
    deviation, mean_q, mean_k = spread(case.inputs, problem.head_dim)
    values = 8.0 if case.inputs == "large" else 1.0

    def draw(name: str, sizes: str, deviation: float, mean: float = 0.0) -> str:
        more = f", {deviation!r}, {mean!r}" if (deviation, mean) != (1.0, 0.0) else ""
        return f"{name} = draw({seed_of(seed, name)}, {sizes}{more})"

    lines = [
        draw("k", "SEQLEN_K, KV_HEADS, HEAD_DIM", deviation, mean_k),
        draw("v", "SEQLEN_K, KV_HEADS, HEAD_DIM_V", values),
    ]
    if case.inputs == "needle" and problem.seqlen_k:
        needles, gain = needle_keys(problem, seed, torch.device(str(where)))
        lines += [
            f"needles = torch.tensor({needles.tolist()}, device=DEVICE)  # the key that each query and head points at",
            "kv_head = torch.arange(HEADS, device=DEVICE) // (HEADS // KV_HEADS)",
            f"q = (k[:, needles, kv_head].float() * {gain!r}).to(DTYPE)",
        ]
    else:
        lines.append(draw("q", "SEQLEN_Q, HEADS, HEAD_DIM", deviation, mean_q))
    names = ["q", "k", "v"]
    if problem.direction != "fwd":
        lines.append(draw("dout", "SEQLEN_Q, HEADS, HEAD_DIM_V", values))
        names.append("dout")
    if problem.layout == "packed":
        lines.append("q, k, v = torch.cat([q, k, v], dim=2).split([HEADS, KV_HEADS, KV_HEADS], dim=2)")
    if problem.layout == "bhsd":
        lines += [f"{name} = {name}.transpose(1, 2).contiguous().transpose(1, 2)" for name in names]
    return lines + [line for name, line in _laid(case).items() if name in names]


def _laid(case: Case) -> dict[str, str]:
    """Lines that lay tensors out in memory, by tensor."""
    strides, offset = dict(case.problem.strides), int(case.options.get("offset", 0))
    lines = {name: f"{name} = lay({name}, {at}, {offset})" for name, at in strides.items()}
    if offset:
        rest = (name for name in ("q", "k", "v", "dout") if name not in strides)
        lines |= {name: f"{name} = lay({name}, {name}.stride(), {offset})" for name in rest}
    return lines


def _masks(problem: Problem) -> list[str]:
    mask, lines = problem.mask, []
    shift = mask.shift(problem.seqlen_q, problem.seqlen_k)
    if mask.banded:
        lines.append(f"diagonal = row + {shift}  # aligned {mask.alignment.replace('_', ' ')}")
    if mask.left is not None:
        lines.append(f"visible = visible & (key >= diagonal - {mask.left})")
    if mask.right is not None:
        lines.append(f"visible = visible & (key <= diagonal + {mask.right})")
    if mask.blocks:
        grid = mask.blocks.blocks(problem.heads, problem.seqlen_q, problem.seqlen_k).astype(int).tolist()
        by_row = f"repeat_interleave({mask.blocks.block_q}, 1)"
        by_key = f"repeat_interleave({mask.blocks.block_k}, 2)"
        lines.append(f"blocks = torch.tensor({grid}, dtype=torch.bool, device=DEVICE)")
        lines.append(f"visible = visible & blocks.{by_row}.{by_key}[:, :SEQLEN_Q, :SEQLEN_K]")
    return lines
