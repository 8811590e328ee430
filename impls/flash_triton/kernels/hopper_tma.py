"""The copy engine's operations, whose names differ between the Gluon of Triton 3.6 and of 3.9."""

# mypy: disable-error-code="no-untyped-def"

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):
    load_async, store_async = tma.async_load, tma.async_store
else:
    load_async, store_async = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
store_wait = tma.store_wait

if hasattr(tma, "async_atomic_add"):
    add_async = tma.async_atomic_add
else:

    @builtin
    def add_async(descriptor, place, tile, _semantic=None):
        """Add a shared-memory tile to memory; `store_wait` waits until the tile has been read. New in Triton 3.7."""
        place = _semantic._convert_to_ir_values(place, require_i64=False)  # noqa: SLF001
        _semantic.builder.create_async_tma_reduce(
            ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, place, tile.handle
        )
