"""The project's FlashAttention-2 in Triton: forward, backward, decode, dropout, block-sparse; portable, fast on
Hopper.

`flash_attention` is imported when it is asked for, so that the plugin beside it can be read without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnbench.impls.flash_triton.op import flash_attention

__all__ = ["flash_attention"]


def __getattr__(name: str) -> Any:
    if name == "flash_attention":
        from attnbench.impls.flash_triton.op import flash_attention

        return flash_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
