"""A call in a CUDA graph, replayed with other inputs."""

from __future__ import annotations

import gc

import torch

from attnbench.harness.conform.posed import Posed, Tensors
from attnbench.harness.oracle.inputs import Inputs

WARM_UPS = 3
"""As many as torch's make_graphed_callables makes: what is compiled, loaded or planned late is there by then."""


class CaptureFailed(Exception):
    """A capture that raised, for the reason that is its cause. The process is of no further use: torch leaves its
    current stream, and its generators, in a capture that never ends (pytorch#171263)."""


class Captured:
    """A forward, or with a ``dout`` a training step, on ``inputs``, which replays overwrite."""

    def __init__(self, posed: Posed, inputs: Inputs, dout: torch.Tensor | None) -> None:
        self._leaves = posed.leaves(inputs)
        self._dout = dout
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step(posed)
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()  # what dies in a cycle is given back before the capture, not in it
        self._graph = torch.cuda.CUDAGraph()
        first: Exception | None = None  # the end of a capture that failed raises as well, and says less
        try:
            with torch.cuda.graph(self._graph):
                try:
                    self._results = self._step(posed)
                except Exception as error:
                    first = error
                    raise
        except Exception as error:  # noqa: BLE001 - what an implementation does in a capture may raise anything
            raise CaptureFailed("cannot be captured in a CUDA graph") from first or error

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
