"""Implementations that misbehave, each in the one way its name says; ``steady`` is the control beside them."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from attnbench.harness.contract import Capabilities, Device, Implementation, Prepared
from attnbench.harness.problem import Problem

if TYPE_CHECKING:
    import torch


def right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn import functional

    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Faulty(Implementation):
    """Right but for what ``spoil`` does around the answer."""

    contract = 1
    capabilities = Capabilities(devices=("cpu",), dtypes=("fp32",), masks=("full",))

    def __init__(self, spoil: Callable[..., object] | None = None) -> None:
        self.spoil = spoil

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = right(q, k, v)
            spoiled = self.spoil(q, k, v, out) if self.spoil else None
            return out if spoiled is None else spoiled  # type: ignore[return-value]

        return Prepared(attend)


def _segfault(*_: object) -> None:
    ctypes.string_at(0)


def _abort(*_: object) -> None:
    os.abort()


def _leave(*_: object) -> None:
    os._exit(7)


def _sleep(*_: object) -> None:
    time.sleep(3600)


def _sleep_holding_the_lock(*_: object) -> None:
    # A C call that keeps the interpreter lock: no Python thread of the worker can run, no signal handler either.
    ctypes.PyDLL(None).sleep(3600)


def _exhaust(*_: object) -> None:
    import torch

    held = []
    while True:
        held.append(torch.empty(2**26))


def _raise(*_: object) -> None:
    raise ZeroDivisionError("planted\nsecond line")


def _exit(*_: object) -> None:
    sys.exit("planted")


def _nan(*tensors: torch.Tensor) -> torch.Tensor:
    out = tensors[3].clone()
    out[0, 5, 1, 3] = float("nan")
    return out


def _wrong_shape(*tensors: torch.Tensor) -> torch.Tensor:
    return tensors[3][:, :-1]


def _wrong_dtype(*tensors: torch.Tensor) -> torch.Tensor:
    return tensors[3].double()


def _not_a_tensor(*_: object) -> str:
    return "not a tensor"


def _write_into_inputs(*tensors: torch.Tensor) -> None:
    tensors[1].mul_(2)


def _print(*_: object) -> None:
    print('{"ok": true, "judgement": "garbage"}', flush=True)
    os.write(1, b"\x00\xff not json\n")


def _fork(*_: object) -> None:
    if os.fork() == 0:
        return  # the child goes on as if it were the worker


def _be_killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class WrongWhenTimed:
    """Right for the first calls, which are judged in full; off by 10% after them."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return tensors[3] * (1.1 if self.calls > 6 else 1.0)


class Replaying:
    """Answers every call with the first answer it gave."""

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        if self.first is None or self.first.shape != tensors[3].shape:
            self.first = tensors[3]
        return self.first


class Old(Faulty):
    contract = 0


class ForwardOnly(Faulty):
    capabilities = dataclasses.replace(Faulty.capabilities, backward=False)


steady = Faulty()
segfaults = Faulty(_segfault)
aborts = Faulty(_abort)
leaves = Faulty(_leave)
sleeps = Faulty(_sleep)
hangs = Faulty(_sleep_holding_the_lock)
exhausts = Faulty(_exhaust)
raises = Faulty(_raise)
exits = Faulty(_exit)
returns_nan = Faulty(_nan)
wrong_shape = Faulty(_wrong_shape)
wrong_dtype = Faulty(_wrong_dtype)
no_tensor = Faulty(_not_a_tensor)
writes_inputs = Faulty(_write_into_inputs)
prints = Faulty(_print)
forks = Faulty(_fork)
be_killed = Faulty(_be_killed)
wrong_when_timed = Faulty(WrongWhenTimed())
replays = Faulty(Replaying())
old = Old()
segfaults_forward = ForwardOnly(_segfault)
