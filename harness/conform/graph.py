"""A call in a CUDA graph, replayed with other inputs."""

from __future__ import annotations

from functools import partial

import torch

from attnbench.harness.conform.posed import Posed, Tensors
from attnbench.harness.measure.capture import record
from attnbench.harness.oracle.inputs import Inputs


class Captured:
    """A forward, or with a ``dout`` a training step, on ``inputs``, which replays overwrite."""

    def __init__(self, posed: Posed, inputs: Inputs, dout: torch.Tensor | None) -> None:
        self._leaves = posed.leaves(inputs)
        self._dout = dout
        self._graph, self._results = record(lambda: partial(self._step, posed))

    def _step(self, posed: Posed) -> Tensors:
        if self._dout is None:
            with torch.no_grad():
                return {"out": posed.prepared.attend(*self._leaves)}
        out = posed.prepared.attend(*self._leaves)
        gradients = torch.autograd.grad(out, self._leaves, self._dout)
        return {"out": out.detach()} | {f"d{n}": g for n, g in zip("qkv", gradients, strict=True)}

    def replay(self, *tensors: torch.Tensor) -> Tensors:
        """The results, copied out, of a replay with q, k and v set to these values."""
        with torch.no_grad():
            for leaf, tensor in zip(self._leaves, tensors, strict=True):
                leaf.copy_(tensor)
        self._graph.replay()
        torch.cuda.synchronize()
        return {name: result.clone() for name, result in self._results.items()}
