"""The copy engine's two operations, whose names differ between the Gluon of Triton 3.6 and of 3.9."""

from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):
    load_async, store_async = tma.async_load, tma.async_store
else:
    load_async, store_async = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
store_wait = tma.store_wait
