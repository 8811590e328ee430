"""What the project's own kernels share: argument checks, the dropout contract, block masks, torch.library operators.

A kernel family provides two functions, a forward and a backward launch over checked tensors; `define_ops` turns them
into one differentiable operator, and `attend` calls it with identical arguments, errors and semantics. `plugin.py`
offers it to the harness.

Names are imported when they are asked for, so that a plugin can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnbench.impls.flash_api.band import Band
    from attnbench.impls.flash_api.block_mask import BlockMask
    from attnbench.impls.flash_api.call import attend
    from attnbench.impls.flash_api.dropout import (
        draw_dropout_state,
        dropout_effective_p,
        dropout_keep_mask,
        dropout_threshold,
        philox4x32,
    )
    from attnbench.impls.flash_api.operators import Options, define_ops

_MODULES = {
    "Band": "band",
    "BlockMask": "block_mask",
    "Options": "operators",
    "attend": "call",
    "define_ops": "operators",
    "draw_dropout_state": "dropout",
    "dropout_effective_p": "dropout",
    "dropout_keep_mask": "dropout",
    "dropout_threshold": "dropout",
    "philox4x32": "dropout",
}

__all__ = [
    "Band",
    "BlockMask",
    "Options",
    "attend",
    "define_ops",
    "draw_dropout_state",
    "dropout_effective_p",
    "dropout_keep_mask",
    "dropout_threshold",
    "philox4x32",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
