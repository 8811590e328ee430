"""What the device can do now: a large GEMM and a large copy, sampled in the same rounds as the implementations.

The GEMM rate of a GPU falls by 15% within a minute of load (power and temperature), so a ceiling measured once is
wrong by as much; a ceiling of the same round is not.
"""

from __future__ import annotations

import torch

from attnbench.harness.measure.timing import Around, Call, take_turn

# Large enough to fill the device, small enough for a few milliseconds: 1.1 TFLOP and 2 GiB moved on a GPU.
GEMM_SIZE = {"cuda": 8192, "cpu": 768}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**25}
HOLD_MS = 1.0
"""What queueing a few launches of libraries takes, with room to spare."""


class CeilingProbe:
    """Holds the operands of one dtype. Rates come out in TFLOP/s and GB/s, decimal."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        size = GEMM_SIZE[device.type]
        if dtype == torch.float64 and device.type == "cuda":
            size //= 2
        generator = torch.Generator(device).manual_seed(0)
        self._a, self._b = (
            torch.randn(size, size, device=device, generator=generator, dtype=torch.float32).to(dtype)
            for _ in range(2)
        )
        self._product = torch.empty_like(self._a)
        self._source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)

    def gemm_tflops(self, samples: int) -> list[float]:
        ms = self._timed(lambda: torch.matmul(self._a, self._b, out=self._product), samples)
        flops = 2 * self._a.shape[0] ** 3
        return [flops / each / 1e9 for each in ms]

    def copy_gbs(self, samples: int) -> list[float]:
        """Bytes read and written over time."""
        ms = self._timed(lambda: self._target.copy_(self._source), samples)
        return [2 * self._source.nbytes / each / 1e6 for each in ms]

    def _timed(self, call: Call, samples: int) -> list[float]:
        around = Around(rewarm=call)
        return take_turn([call] * samples, device=self.device, keep=-1, around=around, hold_ms=HOLD_MS).ms
