"""The project's FlashAttention in CUDA C++ for Hopper: wgmma, TMA and warp specialisation, compiled at first use.

`flash_attention` is imported when it is asked for, so that the plugin beside it can be read without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnbench.impls.flash_cuda.op import flash_attention

__all__ = ["flash_attention"]


def __getattr__(name: str) -> Any:
    if name == "flash_attention":
        from attnbench.impls.flash_cuda.op import flash_attention

        return flash_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
