"""``kernels.cu``, compiled for the GPU at hand and launched on torch's stream."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("kernels.cu")


class DeviceKernels:
    """The kernels of one GPU. ImportError where cuda.core is not installed; its own errors where NVRTC refuses."""

    def __init__(self, device: torch.device) -> None:
        from cuda.core import Device, Program, ProgramOptions

        card = Device(device.index or 0)
        card.set_current()
        major, minor = torch.cuda.get_device_capability(device)
        options = ProgramOptions(arch=f"sm_{major}{minor}", std="c++17")
        self._module = Program(SOURCE.read_text(), "c++", options).compile("cubin")
        self._kernel = cache(self._module.get_kernel)
        self.sm_count = torch.cuda.get_device_properties(device).multi_processor_count

    def launch(self, name: str, blocks: int, threads: int, *arguments: Any) -> None:
        """Queues the kernel on torch's current stream. arguments: tensors, and numpy scalars of the declared width."""
        from cuda.core import LaunchConfig, launch

        plain = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        launch(_TorchStream(), LaunchConfig(grid=blocks, block=threads), self._kernel(name), *plain)


class _TorchStream:
    """torch's current stream as cuda.core asks for a foreign one: protocol version and handle."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream
