"""Every configuration that a call can ask for, compiled into the cache that first calls look in; needs no GPU."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

from attnbench.harness.contract import Build, Compiled
from attnbench.impls.flash_cuda.build import CompileError, build, cached
from attnbench.impls.flash_cuda.configs import (
    BackwardKernel,
    ForwardKernel,
    Shape,
    backward_kernel,
    forward_kernel,
)

Kernel = ForwardKernel | BackwardKernel

DTYPES = ("BF16", "FP16")
DIMS = (64, 128, 192, 256)
LENGTHS = (1, 512, 4096)
"""One for each answer to what tile choice asks."""
MASK_BLOCK = (128, 128)


def every_kernel(deterministic: bool = False) -> list[Kernel]:
    """All kernels that a call can ask for, in a settled order; of block lists those of FlexAttention's blocks without
    dropout."""
    found: set[Kernel] = set()
    switches = itertools.product((False, True), repeat=3)
    for dtype, dim, dim_v, (left, right, dropout) in itertools.product(DTYPES, DIMS, DIMS, list(switches)):
        for length in LENGTHS:
            shape = Shape(dtype, 1, 2, 1, length, length, dim, dim_v, left, right, dropout)
            found.add(forward_kernel(shape, multiprocessors=1))
            if not dropout:
                found.add(
                    forward_kernel(dataclasses.replace(shape, mask_block=MASK_BLOCK), multiprocessors=1)
                )
        shape = Shape(dtype, 1, 1, 1, 512, 512, dim, dim_v, left, right, dropout)
        found.add(backward_kernel(shape, deterministic))
        if not (dropout or deterministic):
            found.add(backward_kernel(dataclasses.replace(shape, mask_block=MASK_BLOCK)))
    return sorted(found, key=str)


def builds(deterministic: bool = False) -> dict[str, Build]:
    """What compiles each of them, by its name."""
    return {name_of(kernel): partial(compile_one, kernel) for kernel in every_kernel(deterministic)}


def name_of(kernel: Kernel) -> str:
    """``backward-bf16-dim64-dim_v64-has_left``: the pass, then every word of the configuration that is set."""
    words = ["forward" if isinstance(kernel, ForwardKernel) else "backward"]
    for field in dataclasses.fields(kernel):
        value = getattr(kernel, field.name)
        if isinstance(value, bool):
            words += [field.name] if value else []
        else:
            words.append(value.lower() if isinstance(value, str) else f"{field.name}{value}")
    return "-".join(words)


def compile_one(kernel: Kernel) -> Compiled:
    """A kernel that spills, keeps a stack frame or draws a remark of the assembler is a problem. CacheError as in
    ``build``."""
    known = cached(kernel.source)
    try:
        built = build(kernel.source)
    except CompileError as error:
        return Compiled(problems=("NVRTC refused it",), log=str(error))
    used = built.resources
    return Compiled(
        used.registers,
        used.stack_bytes + used.spill_store_bytes + used.spill_load_bytes,
        len(built.cubin),
        known,
        tuple(used.problems),
        built.log,
    )
