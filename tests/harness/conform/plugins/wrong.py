"""Implementations that are wrong, or end badly, each in one way; ``right`` is the control beside them."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from attnbench.harness.contract import Device, Implementation, Prepared
from attnbench.harness.problem import Problem
from attnbench.impls.sdpa import Sdpa, flash
from attnbench.impls.standard import Standard

if TYPE_CHECKING:
    import torch

WHERE = "longer than 64 keys"


class LastKeyDropped(Standard):
    """Ignores the last key of sequences longer than 64: a tail that a loop over tiles leaves out."""

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        right = super().prepare(problem, device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if problem.seqlen_k <= 64:
                return right.attend(q, k, v)
            # As if it scored -inf: taken out of the softmax and of the sum.
            p = (q.transpose(1, 2) @ _shared(k, q).permute(0, 2, 3, 1)) * problem.softmax_scale
            p[..., -1] = float("-inf")
            return (p.softmax(-1) @ _shared(v, q).transpose(1, 2)).transpose(1, 2)

        return Prepared(attend)


def _shared(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(q.shape[2] // x.shape[2], dim=2)


class Ends(Standard):
    """Right, but for what ``act`` does when it is called with an odd number of keys."""

    def __init__(self, act: object) -> None:
        self.act = act

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        right = super().prepare(problem, device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if problem.seqlen_k % 2:
                self.act()  # type: ignore[operator]
            return right.attend(q, k, v)

        return Prepared(attend)


class TorchOnTheCpu(Sdpa):
    """torch's flash kernel on the CPU with all that it takes: its faults are not declared away."""

    def __init__(self) -> None:
        super().__init__("torch-cpu-flash", flash.backend, "", flash.capabilities, flash.on_cpu)

    def _undefined(self, problem: Problem, device: Device) -> list[str]:
        return []


class Waits(Standard):
    """Waits for the device in every call, which no capture of a CUDA graph allows."""

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        import torch

        right = super().prepare(problem, device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            torch.cuda.synchronize()
            return right.attend(q, k, v)

        return Prepared(attend)


class Poisoned(Standard):
    """Raises at an odd number of keys, and in that process at everything from then on."""

    def __init__(self) -> None:
        self.spoilt = ""

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        right = super().prepare(problem, device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if self.spoilt:
                raise RuntimeError(self.spoilt)
            if problem.seqlen_k % 2:
                self.spoilt = f"left over from {problem.seqlen_k} keys"
                raise ZeroDivisionError("planted")
            return right.attend(q, k, v)

        return Prepared(attend)


class Never(Standard):
    """Raises at everything, whatever came before."""

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"no kernel for {problem.seqlen_k} keys at 0x{id(q):x}")

        return Prepared(attend)


right: Implementation = Standard()
last_key = LastKeyDropped()
aborts = Ends(os.abort)
hangs = Ends(lambda: time.sleep(3600))
poisoned = Poisoned()
never = Never()
waits = Waits()
torch_on_the_cpu = TorchOnTheCpu()
