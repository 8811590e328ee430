"""Compile every configuration ahead of time: `python -m attnbench.impls.flash_cuda.ahead [PROCESSES]`.

Fills the cache that the first calls would fill one by one, and exits with 1 if a kernel spills, keeps a stack frame or
draws a remark of the assembler. Needs no GPU.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from attnbench.impls.flash_cuda.build import CompileError, build
from attnbench.impls.flash_cuda.configs import (
    MAX_BACKWARD_HEAD_DIM,
    BackwardKernel,
    ForwardKernel,
    Shape,
    backward_kernel,
    forward_kernel,
)

Kernel = ForwardKernel | BackwardKernel

DTYPES = ("BF16", "FP16")
DIMS = (64, 128, 192, 256)
LENGTHS = (512, 4096)
"""One on each side of what tile choice asks."""


def every_kernel() -> list[Kernel]:
    """All kernels that a call can ask for, in a settled order."""
    found: set[Kernel] = set()
    switches = itertools.product((False, True), repeat=3)
    for dtype, dim, dim_v, (left, right, dropout) in itertools.product(DTYPES, DIMS, DIMS, list(switches)):
        for length in LENGTHS:
            found.add(forward_kernel(Shape(dtype, 1, 1, 1, length, length, dim, dim_v, left, right, dropout)))
        if max(dim, dim_v) <= MAX_BACKWARD_HEAD_DIM and not dropout:
            found.add(backward_kernel(Shape(dtype, 1, 1, 1, 512, 512, dim, dim_v, left, right)))
    return sorted(found, key=str)


def compile_one(kernel: Kernel) -> tuple[float, list[str]]:
    """Seconds it took, and what is wrong with the result."""
    begin = time.perf_counter()
    try:
        problems = build(kernel.source).resources.problems
    except CompileError as error:
        problems = [str(error)]
    return time.perf_counter() - begin, problems


def main(processes: int) -> int:
    """Compile all; one line for each on stdout."""
    kernels = every_kernel()
    bad = 0
    with ProcessPoolExecutor(processes) as pool:
        for kernel, (seconds, problems) in zip(kernels, pool.map(compile_one, kernels), strict=True):
            bad += bool(problems)
            print(f"{seconds:.1f} s  {kernel}  {'; '.join(problems) or 'ok'}", flush=True)  # noqa: T201
    print(f"{len(kernels)} kernels, {bad} with problems")  # noqa: T201
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count() or 1))
