"""Nothing outside of what a call was given or allocates is read or written.

Inputs are slices of storages whose other elements hold NaN; what is read from there spoils the answer. Every tensor
that Python code asks torch for is such a slice too, and its own elements begin as NaN, so that what is never
written shows on every run, not on an unlucky one. After the call the bands must hold what they held.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import Any, Self
from unittest import mock

import torch

from attnbench.harness.conform.posed import Posed
from attnbench.harness.oracle.inputs import Inputs

BAND = 256
"""Elements before and after: wider than a vector load and than most rows, and a multiple of every alignment."""
_BY_NAME = {
    torch: ("empty", "empty_like", "empty_strided", "zeros", "zeros_like"),
    torch.Tensor: ("new_empty", "new_empty_strided", "new_zeros"),
}


class Guarded:
    """A tensor in the middle of a storage of NaN; of a storage of its own, if ``apart``, which ends where it does."""

    def __init__(
        self, name: str, shape: Any, strides: Any, dtype: torch.dtype, device: torch.device, *, apart: bool
    ) -> None:
        self.name = name
        spread = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        self._inside = 0 if 0 in shape else 1 + spread
        self._memory = torch.full((self._inside + 2 * BAND,), math.nan, dtype=dtype, device=device)
        self.tensor = self._memory.as_strided(tuple(shape), tuple(strides), BAND)
        if apart:
            # Fresh memory begins at offset 0 of its storage: torch's own formulas rely on it.
            size = self._memory.element_size()
            inside = self._memory.untyped_storage()[BAND * size : (BAND + self._inside) * size]
            self.tensor = torch.empty(0, dtype=dtype, device=device).set_(
                inside, 0, tuple(shape), tuple(strides)
            )

    def written(self) -> int | None:
        """The first element outside that is no longer NaN, counted from the tensor's start; None if there is none."""
        outside = torch.cat([self._memory[:BAND], self._memory[BAND + self._inside :]])
        changed = (~outside.isnan()).nonzero()
        if not len(changed):
            return None
        first = int(changed[0])
        return first - BAND if first < BAND else first - BAND + self._inside


class _Allocations:
    """As a context, guards the floating-point memory that Python code asks for, inside of registered operators too.

    By name: a mode of torch's dispatcher is off inside an operator that is written in Python, and costs seconds of
    imports. What C++ code allocates is for the check ``fresh_memory``.
    """

    def __init__(self) -> None:
        self.guarded: list[Guarded] = []
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        for owner, names in _BY_NAME.items():
            for name in names:
                guarding = self._guarding(getattr(owner, name))
                self._patches.enter_context(mock.patch.object(owner, name, guarding))
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def _guarding(self, allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        initialised = "zeros" in allocate.__name__

        @wraps(allocate)
        def guarding(*args: Any, **kwargs: Any) -> torch.Tensor:
            result = allocate(*args, **kwargs)
            # A compiler's stand-ins have no memory, and an empty tensor is there to be resized.
            stand_in = type(result) is not torch.Tensor or result.is_meta
            if stand_in or not result.dtype.is_floating_point or not result.numel():
                return result
            like = result.shape, result.stride(), result.dtype, result.device
            band = Guarded("memory it allocated", *like, apart=True)
            self.guarded.append(band)
            return band.tensor.copy_(result) if initialised else band.tensor

        return guarding


def _as_compiled() -> AbstractContextManager[object]:
    """What was compiled before runs as it is: dynamo would see that torch's functions are others, and trace through the
    guards, which it cannot."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance(skip_guard_eval_unsafe=True)


def check(posed: Posed) -> None:
    inputs, originals = posed.inputs(), posed.inputs()
    bands = []
    tensors = {}
    for field in dataclasses.fields(inputs):
        tensor = getattr(inputs, field.name)
        tensors[field.name] = tensor
        if tensor is not None:
            like = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
            band = Guarded(field.name, *like, apart=False)
            band.tensor.copy_(tensor)
            bands.append(band)
            tensors[field.name] = band.tensor
    guarded = Inputs(**tensors)
    # What it sets up, compiles and imports is not a call's; dynamo takes torch's functions for what they are when it is
    # imported, and knew none of them in any later case.
    posed.answer(inputs)
    with _as_compiled(), _Allocations() as allocations:
        got = posed.answer(guarded)
        posed.synchronize()
    for band in [*bands, *allocations.guarded]:
        if (where := band.written()) is not None:
            posed.fail(
                f"writes outside of {band.name}, at element {where} of it", tensor=band.name, element=where
            )
    for field in dataclasses.fields(inputs):
        given, now = getattr(originals, field.name), getattr(guarded, field.name)
        if given is not None and not torch.equal(given, now):
            posed.fail(f"writes into its input {field.name}", tensor=field.name)
    posed.hold(got, "with NaN around its inputs and in what it allocates, ")
