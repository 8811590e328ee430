"""Attention in plain torch, one method a step, forward and backward: right as it stands, and there to be broken.

Between the steps tensors are (batch, heads, rows, .) in fp32, fp64 for fp64. Scores are materialised.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attnbench.harness.contract import Capabilities, Device, Implementation, Prepared
from attnbench.harness.masks import ALIGNMENTS, KINDS, Mask
from attnbench.harness.problem import DTYPES, Problem


class Steps:
    """One prepared problem. ``backward`` tells a step that both passes take which of them it is in.

    shared: what all problems of one implementation have in common.
    """

    shared: ClassVar[dict[Any, Any]]

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        self.device = device
        self.group = problem.heads // problem.kv_heads
        self.calls = 0

    # ---- what both passes take ----------------------------------------------------------------------------

    def mask(self, backward: bool) -> Mask:
        return self.problem.mask

    def visible(self, backward: bool) -> Tensor:
        """bool (1 or heads, seqlen_q, seqlen_k)."""
        rows = torch.arange(self.problem.seqlen_q, device=self.device)
        return self.mask(backward).dense(
            rows, self.problem.heads, self.problem.seqlen_q, self.problem.seqlen_k
        )

    def scale(self, backward: bool) -> float:
        return self.problem.softmax_scale

    def kv_head(self, backward: bool) -> Tensor:
        """The head of K and V of each query head, (heads,)."""
        return torch.arange(self.problem.heads, device=self.device) // self.group

    def read(self, name: str, x: Tensor) -> Tensor:
        """An operand (q, k, v, dout, out) from BSHD as it lies in memory."""
        return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))

    def write(self, name: str, x: Tensor, like: Tensor) -> Tensor:
        """A result (out, dq, dk, dv) to BSHD in the dtype of ``like``."""
        return x.transpose(1, 2).to(like.dtype).contiguous()

    def scores(self, q: Tensor, k: Tensor, backward: bool) -> Tensor:
        s = (q @ k[:, self.kv_head(backward)].mT) * self.scale(backward)
        return s.masked_fill(~self.visible(backward), -torch.inf)

    def draw(self) -> Tensor:
        """What a call's dropout mask follows from, drawn from torch's generator."""
        return torch.randint(2**31, (1,), device=self.device)

    def keep(self, drawn: Tensor, backward: bool) -> Tensor:
        """What dropout keeps, bool (batch, heads, seqlen_q, seqlen_k)."""
        generator = torch.Generator(self.device).manual_seed(int(drawn))
        shape = (*self.problem.q_shape[:1], self.problem.heads, self.problem.seqlen_q, self.problem.seqlen_k)
        return torch.rand(shape, generator=generator, device=self.device) >= self.problem.dropout_p

    def drop(self, p: Tensor, drawn: Tensor | None, backward: bool) -> Tensor:
        return p if drawn is None else p * self.keep(drawn, backward) * self.kept_scale(backward)

    def kept_scale(self, backward: bool) -> float:
        """What kept weights are multiplied by."""
        return 1 / (1 - self.problem.dropout_p)

    # ---- forward ------------------------------------------------------------------------------------------

    def forward(self, q: Tensor, k: Tensor, v: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        """out BSHD, lse (batch, heads, seqlen_q)."""
        self.calls += 1
        wide = self.read("q", q), self.read("k", k), self.read("v", v)
        p, lse = self.softmax(self.scores(*wide[:2], backward=False))
        out = self.weigh(self.drop(p, drawn, backward=False), wide[2])
        return self.write("out", out, q), lse

    def softmax(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """P and lse of the rows; 0 and -inf where a row sees nothing."""
        lse = s.logsumexp(-1)
        return self.exp_minus(s, lse), lse

    def exp_minus(self, s: Tensor, lse: Tensor) -> Tensor:
        return (s - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()

    def weigh(self, p: Tensor, v: Tensor) -> Tensor:
        return p @ v[:, self.kv_head(backward=False)]

    def returned_lse(self, lse: Tensor) -> Tensor:
        """The lse as the caller is given it."""
        return lse

    def saved(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """What the graph keeps of q, k, v, out, lse and the dropout's draw."""
        return tensors

    # ---- backward -----------------------------------------------------------------------------------------

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, drawn: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv BSHD."""
        if torch.is_grad_enabled():
            raise RuntimeError("double backward is not implemented")
        wide_q, wide_k, wide_v = self.read("q", q), self.read("k", k), self.read("v", v)
        wide_dout = self.read("dout", dout)
        p = self.exp_minus(self.scores(wide_q, wide_k, backward=True), lse)
        dv = self.over_group(self.drop(p, drawn, backward=True).mT @ wide_dout, "dv")
        dp = wide_dout @ wide_v[:, self.kv_head(backward=True)].mT
        delta = self.delta(wide_dout, self.read("out", out))
        ds = p * (self.drop(dp, drawn, backward=True) - delta) * self.scale_of_ds()
        dq = ds @ wide_k[:, self.kv_head(backward=True)]
        dk = self.over_group(ds.mT @ wide_q, "dk")
        return self.write("dq", dq, q), self.write("dk", dk, k), self.write("dv", dv, v)

    def delta(self, dout: Tensor, out: Tensor) -> Tensor:
        return (dout * out).sum(-1, keepdim=True)

    def scale_of_ds(self) -> float:
        return self.scale(backward=True)

    def over_group(self, gradient: Tensor, name: str) -> Tensor:
        """The sum over the query heads that share one head of K and V."""
        return gradient.unflatten(1, (self.problem.kv_heads, self.group)).sum(2)

    # ---- the calls ----------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend_with_lse(q, k, v)[0]

    def attend_with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        drawn = self.draw() if self.problem.dropout_p else None
        with torch.autocast(self.device.type, enabled=False):
            out, lse = _Attention.apply(self, drawn, q, k, v)
        return out, self.returned_lse(lse)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, steps: Steps, drawn: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = steps.forward(q, k, v, drawn)
        ctx.save_for_backward(*steps.saved(q, k, v, out, lse, drawn))
        ctx.steps = steps
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, drawn = ctx.saved_tensors
        return None, None, *ctx.steps.backward(dout, q, k, v, out, lse, drawn)


class Plain(Implementation):
    """``Steps`` as an implementation that declares everything supported."""

    contract = 1
    capabilities = Capabilities(
        devices=("cpu", "cuda"),
        dtypes=DTYPES,
        masks=KINDS,
        alignments=ALIGNMENTS,
        head_dim_multiple=1,
        max_head_dim=65536,
        head_dim_v_differs=True,
        dropout=True,
        repeats=("fwd", "bwd"),
        min_seqlen=0,
    )

    def __init__(self, name: str = "plain", steps: type[Steps] = Steps) -> None:
        self.name = name
        self.steps = type(steps.__name__, (steps,), {"shared": {}})

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        steps = self.steps(problem, torch.device(str(device)))
        return Prepared(steps.attend, steps.attend_with_lse)
