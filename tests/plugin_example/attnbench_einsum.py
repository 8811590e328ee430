"""Attention as two einsums and a softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.harness.contract import Capabilities, Device, Implementation, Prepared
from attnbench.harness.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor


class Einsum(Implementation):
    contract = 1
    summary = "two einsums and a softmax, same dtype"
    capabilities = Capabilities(devices=("cpu", "cuda"), dtypes=("bf16", "fp32"), masks=("full",), gqa=False)

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        import torch

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.softmax_scale
            return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

        return Prepared(attend)
