"""Operators that a call registers with torch pass torch.library.opcheck: schema, fake kernel, autograd registration.

Which they are is seen by watching what is dispatched; an implementation without one of its own declines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from attnbench.harness.conform.posed import Declined, Posed

TORCHS_OWN = frozenset(  # a list of them would be a page long
    "_c10d_functional _c10d_functional_autograd _dtensor _inductor_test _native _quantized _test aten c10d "  # noqa: SIM905
    "c10d_functional debug_mode_ops debugprims export flex_lib fsdp higher_order inductor inductor_prims mkl mkldnn "
    "mkldnn_prepacked onednn onnx onnx_symbolic prim prims profiler quantization quantized rngprims sparse "
    "static_runtime streams symm_mem".split()
)
"""Namespaces that torch 2.13 fills by itself, its compiler included."""


class _Watch(TorchDispatchMode):
    """The first call of every operator that is not torch's, with its arguments."""

    supports_higher_order_operators = True  # torch's own, such as FlexAttention's, which are let through

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload) and func.namespace not in TORCHS_OWN:  # noqa: SLF001 - no public name
            self.seen.setdefault(str(func), (func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    posed.answer(inputs)
    registered = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}  # noqa: SLF001
    if registered <= TORCHS_OWN:  # a mode of the dispatcher costs seconds of imports
        raise Declined("registers no operator of its own")
    with _Watch() as watch:
        posed.answer(inputs)
    if not watch.seen:
        raise Declined("registers no operator of its own")
    for name, (operator, args, kwargs) in watch.seen.items():
        gradients = _has_gradients(operator, args, kwargs)
        try:
            torch.library.opcheck(operator, _fresh(args, gradients=gradients), kwargs)
        except Exception as error:  # noqa: BLE001 - opcheck raises many kinds, and each is its verdict
            text = " ".join(str(error).split())
            posed.fail(f"opcheck of {name}: {text[:240]}", operator=name)


def _has_gradients(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it can be differentiated by itself, eagerly: called below an autograd.Function, or in a backward, it need
    not be, and opcheck would take the error that it raises for a fault."""
    given = _fresh(args, gradients=True)
    try:
        results = [x for x in tree_leaves(operator(*given, **kwargs)) if isinstance(x, torch.Tensor)]
        wanted = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor) and x.requires_grad]
        if sums := [x.sum() for x in results if x.requires_grad]:
            torch.autograd.grad(sums, wanted, allow_unused=True)
    except RuntimeError:
        return False
    return True


def _fresh(args: tuple[Any, ...], *, gradients: bool) -> tuple[Any, ...]:
    """The arguments as a caller would pass them, needing gradients where that is said and they can have one."""

    def fresh(x: Any) -> Any:
        return x.detach().clone().requires_grad_(gradients and x.is_floating_point())

    return tuple(tree_map_only(torch.Tensor, fresh, args))
