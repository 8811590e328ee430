"""Where these kernels run and on what, shared by both passes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
DTYPES = {torch.bfloat16: "BF16", torch.float16: "FP16"}


@lru_cache(maxsize=64)
def check_device(device: torch.device) -> None:
    """Raise ValueError unless the device is a Hopper GPU."""
    allowed = "allowed are CUDA devices of compute capability 9.0 (Hopper)"
    if device.type != "cuda":
        raise ValueError(f"q: on a {device.type} device, {allowed}")
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise ValueError(f"q: on a device of compute capability {capability[0]}.{capability[1]}, {allowed}")


def check(q: Tensor) -> None:
    """Raise TypeError or ValueError for what these kernels do not compute."""
    if q.dtype not in DTYPES:
        raise TypeError(f"q: got {q.dtype}, allowed are float16 and bfloat16")
    check_device(q.device)


_HERE = nullcontext()


def on_device(device: int) -> AbstractContextManager[object]:
    """Make a device current; costs nothing when it is. CUDA has begun: there is a tensor of it."""
    return _HERE if torch._C._cuda_getDevice() == device else torch.cuda.device(device)  # noqa: SLF001 - torch.cuda.current_device without its checks


def stream_of(device: int) -> int:
    """The current stream of a device, without the object that torch.cuda.current_stream would make (2 us)."""
    return torch._C._cuda_getCurrentRawStream(device)  # noqa: SLF001 - what Triton's launcher calls
