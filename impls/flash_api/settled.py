"""Calls like an earlier one: what was found out about that one is not asked again.

A call's arguments are checked, and its launches planned, from types, shapes, strides, devices and flags. Where a later
call has the same, nothing is left to do but to launch. Whether it has is one question: torch's own guards, by which
compiled code is chosen, compare the types, shapes, strides, dtypes and devices of tensors, whether they need gradients,
and the dispatcher's keys as tensors and thread have them: inference mode, autocast, functorch's levels, views that
negate. Whether gradients are enabled is for the key to say; what else those do not see, `interception.watched` does.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

from torch._C._dynamo.guards import TensorGuards

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

KEPT = 2048
"""Keys that are kept, some kilobytes each: of a forward and its backward one each."""
KEPT_EACH = 4
"""Calls of one key that are kept: those that differ in strides, in v, or in what needs a gradient."""

_known: dict[Any, tuple[tuple[Callable[..., bool], Any], ...]] = {}
_remembering = Lock()


def find(key: Any, *tensors: object) -> Any:
    """What was remembered of a call with this key and tensors like these, None if nothing was; nobody `watched`."""
    try:
        known = _known.get(key, ())
    except TypeError:  # an argument without a hash: no call with it was remembered
        return None
    for fits, found in known:
        if fits(*tensors):
            return found
    return None


def remember(key: Any, found: Any, *tensors: Tensor) -> None:
    """Keep `found` for calls with this key and tensors like these, of which none is kept alive.

    Not for calls with one tensor in two places: guards of compiled code hold that for another call.
    """
    if len(set(map(id, tensors))) < len(tensors):
        return
    fits = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    with _remembering:
        if key not in _known and len(_known) >= KEPT:
            del _known[next(iter(_known))]
        _known[key] = ((fits, found), *_known.get(key, ())[: KEPT_EACH - 1])


def forget() -> None:
    """As if no call had been made: for tests and tuning, which change what plans depend on."""
    with _remembering:
        _known.clear()
