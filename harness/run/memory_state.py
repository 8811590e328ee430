"""Memory around a judged call: NaN where its results may land, and a sum of the bits of its inputs."""

from __future__ import annotations

import math

import torch

from attnbench.harness.oracle.inputs import Inputs, torch_dtype
from attnbench.harness.problem import Problem


def checksums(inputs: Inputs) -> dict[str, int]:
    """A sum of each tensor's bits: cheap, and no write that matters leaves it as it was."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = {name: getattr(inputs, name) for name in ("q", "k", "v", "dout")}
    return {
        name: int(tensor.contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64))
        for name, tensor in tensors.items()
        if tensor is not None
    }


def poison(problem: Problem, device: torch.device) -> None:
    """Leaves NaN in the memory that the next allocations are likely to be given, so that what is not written shows."""
    dtype = torch_dtype(problem.dtype)
    shapes = [problem.out_shape] if problem.direction == "fwd" else [
        problem.out_shape, problem.q_shape, problem.k_shape, problem.v_shape
    ]  # fmt: skip
    held = [torch.full((math.prod(shape),), math.nan, dtype=dtype, device=device) for shape in shapes]
    held.append(torch.full((problem.batch * problem.heads * problem.seqlen_q,), math.nan, device=device))
    del held
