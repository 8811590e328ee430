"""What the approximate implementations share: a plugin around one function on (batch, heads, seqlen, dim)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attnbench.harness.contract import Capabilities, Device, Implementation, Prepared
from attnbench.harness.problem import DTYPES, Problem

if TYPE_CHECKING:
    import torch

Attention = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""q, k, v (batch, heads, seqlen, dim) to out."""

SEED = 7


class Approximation(Implementation):
    """One method in plain torch. ``method(problem, device)`` makes its function, with whatever it draws or lays out."""

    contract = 1

    def __init__(
        self,
        name: str,
        summary: str,
        method: Callable[[Problem, torch.device], Attention],
        masks: tuple[str, ...],
    ) -> None:
        self.name = name
        self.summary = summary
        self._method = method
        self.capabilities = Capabilities(
            devices=("cpu", "cuda"),
            dtypes=DTYPES,
            masks=masks,
            head_dim_multiple=1,
            max_head_dim=65536,
            gqa=False,
        )

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        found = super().unsupported_reasons(problem, device)
        if problem.seqlen_q != problem.seqlen_k:
            found.append("is self-attention only: seqlen_q must equal seqlen_k")
        return found

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        import torch

        attention = self._method(problem, torch.device(str(device)))

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        return Prepared(attend)
