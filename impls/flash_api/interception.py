"""Whether anything of torch takes part between a call and its kernels.

An operator goes through torch's dispatcher so that modes, transforms, tracers and subclasses of tensors can intercept
it. Where none is about, that way costs 10 to 15 us and ends at the functions that the operator was defined by. Asked
here is what the dispatcher would ask: which of its keys the tensors carry, and which the thread has added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import (  # what has no public name
    DispatchKey,
    DispatchKeySet,
    _dispatch_tls_is_dispatch_key_included,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

_KEYS_WITHOUT_EFFECT = (
    "CPU", "CUDA",  # where the kernels are
    "AutogradCPU", "AutogradCUDA",  # records a gradient: what `operators` does either way
    "AutocastCPU", "AutocastCUDA", "BackendSelect", "ADInplaceOrView",  # the operators have nothing there
)  # fmt: skip


def _without_effect() -> int:
    keys = DispatchKeySet(DispatchKey.Undefined)
    for name in _KEYS_WITHOUT_EFFECT:
        keys |= DispatchKeySet(getattr(DispatchKey, name))
    return keys.raw_repr()


_OTHERS = ~_without_effect()
_PYTHON_DISPATCHER = DispatchKey.PythonDispatcher


def watched() -> bool:
    """Whether a compiler, a profiler, a mode or forward-mode differentiation is about, which tensors need not show.

    A profiler counts: it shall see the operator.
    """
    return (
        torch.compiler.is_compiling()
        or _profiler_enabled()
        or _len_torch_function_stack() > 0
        or _len_torch_dispatch_stack() > 0
        or _dispatch_tls_is_dispatch_key_included(_PYTHON_DISPATCHER)
        or forward_ad._current_level >= 0  # noqa: SLF001 - no public name
    )


def intercepted(*tensors: Tensor) -> bool:
    """Whether to call the operator, and not what it leads to."""
    if watched() or has_torch_function(tensors):
        return True
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()  # noqa: SLF001 - no public name
    for x in tensors:
        keys |= torch._C._dispatch_keys(x).raw_repr()  # noqa: SLF001 - no public name
    return keys & _OTHERS != 0


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd records a call on these tensors; not in inference mode, nor below autograd's own kernels."""
    return (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in tensors)
        and not torch._C._dispatch_tls_is_dispatch_key_excluded(DispatchKey.AutogradFunctionality)  # noqa: SLF001 - no public name
    )
