"""One self-contained script that shows a failing case: torch, the library, and nothing of the harness.

Imports torch; runs in the worker, where the implementation is.
"""

from __future__ import annotations

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from attnbench.harness.conform.case import Case
from attnbench.harness.contract import Device, Implementation
from attnbench.harness.oracle.inputs import needle_keys, seed_of, spread, torch_dtype
from attnbench.harness.problem import Problem


def source(case: Case, implementation: Implementation, where: Device, reason: str, found_as: str) -> str:
    """Python source of the script. reason: what was found; found_as: id of the case before it was shrunk."""
    problem = case.problem
    attend = implementation.standalone(problem, where)
    environment = Environment(
        loader=PackageLoader("attnbench.harness.conform"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )  # no HTML: the template is a Python file, and what goes into it is quoted where it is text
    return environment.get_template("reproducer.py.j2").render(
        title=_plain(f"{implementation.name} {implementation.version()}: {reason}"),
        about=[_plain(line) for line in _about(case, where, found_as)],
        library=_library(implementation, attend),
        device=str(where),
        dtype=str(torch_dtype(problem.dtype)).removeprefix("torch."),
        p=problem,
        lay=bool(_laid(case)),
        draws=_draws(case, where),
        masks=_masks(problem),
        attend=(attend or _through_attnbench(problem, implementation.name, where)).strip(),
        backward=problem.direction != "fwd",
        with_lse="attend_with_lse" if not attend or "def attend_with_lse" in attend else "None",
    )


def _plain(text: str) -> str:
    return text.replace("\\", "/").replace('"""', "'''")


def _about(case: Case, where: Device, found_as: str) -> list[str]:
    machine = f"torch {torch.__version__} on {where.name or where}"
    lines = [f"Problem: {case.problem.key}, inputs {case.inputs}.", f"Asked because: {case.why}"]
    if case.cites:
        lines.append(f"Known as: {', '.join(case.cites)}.")
    return [*lines, f"Found as {found_as},", f"by {machine}."]


def _library(implementation: Implementation, attend: str) -> str:
    if not attend:
        return f"attnbench with {implementation.name}"
    return implementation.package if implementation.package not in ("", "torch") else "nothing else"


def _through_attnbench(problem: Problem, name: str, where: Device) -> str:
    """For an implementation that gives no source of its own: what is measured is what attnbench calls."""
    return (
        "from attnbench.harness.contract import Device\n"
        "from attnbench.harness.problem import Problem\n"
        "from attnbench.harness.registry import load\n\n"
        f"problem = Problem.from_json({problem.to_json()!r})\n"
        f"device = Device({where.kind!r}, {where.index}, {where.name!r}, {where.capability!r})\n"
        f"prepared = load({name!r}).prepare(problem, device)\n"
        "attend, attend_with_lse = prepared.attend, prepared.attend_with_lse\n"
    )


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
