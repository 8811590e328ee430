"""Which kernel a problem gets: pure functions of the shape, with the reason beside each branch (figures: NOTES.md)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

L2_WORKING_SET = 32 * 2**20
"""Bytes of K and V that the blocks in flight may share: about 60% of Hopper's L2."""

MAX_BACKWARD_HEAD_DIM = 128
"""What the backward offers. `csrc/backward/wide.cuh` is written for up to 256, and compiles, but no GPU has run it."""

PANEL = 64
"""Head dims in shared memory are multiples of this."""


@dataclass(frozen=True)
class Shape:
    """The part of a problem that decides kernels. dtype: "BF16" or "FP16"."""

    dtype: str
    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    has_left: bool
    has_right: bool
    dropout: bool = False


@dataclass(frozen=True)
class ForwardKernel:
    """One compiled forward; the words are those of `csrc/forward/plan.cuh`."""

    dtype: str
    dim: int
    dim_v: int
    consumers: int
    keys: int
    slots: int
    q_slots: int = 1
    has_left: bool = False
    has_right: bool = False
    dropout: bool = False
    out_in_q: bool = False

    NAME = "attention_forward"

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (1 + self.consumers)

    @property
    def source(self) -> str:
        """CUDA source of this kernel alone."""
        arguments = [self.dtype, self.dim, self.dim_v, self.consumers, self.keys, self.slots, self.q_slots]
        flags = [self.has_left, self.has_right, self.dropout, self.out_in_q]
        words = ", ".join([*map(str, arguments), *(str(flag).lower() for flag in flags)])
        return (
            '#include "forward/kernel.cuh"\n'
            f"using Chosen = forward::Config<{words}>;\n"
            'extern "C" __global__ void __launch_bounds__(Chosen::THREADS, 1)\n'
            f"{self.NAME}(const __grid_constant__ forward::Params params) {{\n"
            "    forward::run<Chosen>(params);\n"
            "}\n"
        )


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def padded(dim: int) -> int:
    """A head dim as it lies in shared memory; the copy engine fills the excess with zeros."""
    return ceil_div(dim, PANEL) * PANEL


@lru_cache(maxsize=4096)
def forward_kernel(shape: Shape) -> ForwardKernel:
    """The forward kernel of a problem. Figures beside the branches: TFLOP/s as in NOTES.md."""
    dim, dim_v = padded(shape.head_dim), padded(shape.head_dim_v)
    widest = max(dim, dim_v)
    # Two slots for Q where there is room: the next tile's arrives while this one ends, which short rows feel most.
    q_slots, out_in_q = 2, False
    if widest == 64:
        # exp2 takes as long as the products: three consumers keep both units busy (n 8192: 521 for 486 of two, causal
        # 502 for 404). Short rows waste less of a tile of 128 rows (n 1024: 413 for 391, causal 299 for 270).
        # Both sides of a window cost registers: 128 keys spill.
        long_rows = shape.seqlen_q > 1024 and not shape.dropout
        consumers, keys, slots = (3, 96 if shape.has_left else 128, 3) if long_rows else (2, 128, 3)
    elif widest == 128:
        # n 8192: 668 full, 612 causal; 2x176 677, 606; 3x80 642, 626. n 1024: 579, 404; 2x176 525, 332; 3x80 515, 340.
        consumers, keys, slots = 2, 128, 2
    elif widest == 192:
        # Shared memory: 48 + 2 * (36 + 36) KB at 96 keys.
        consumers, keys, slots, q_slots, out_in_q = 2, 96, 2, 1, dim_v <= dim
    else:
        # O takes 128 registers a thread; Q 64 KB, so that 80 keys fill shared memory and O is staged in Q's place.
        # n 8192: 788 full, 676 causal; 64 keys 723, 645.
        consumers, keys, slots, q_slots, out_in_q = 2, 80 if dim_v <= dim else 64, 2, 1, dim_v <= dim
    if shape.dropout:
        keys = keys // 32 * 32  # Philox draws for patches of 32 keys
    return ForwardKernel(
        shape.dtype, dim, dim_v, consumers, keys, slots, q_slots, shape.has_left, shape.has_right, shape.dropout,
        out_in_q,
    )  # fmt: skip


def planes_per_wave(shape: Shape) -> int:
    """How many (batch, head) planes are worked on at once. Without a mask one: neighbours then read the same K and V.

    Under a mask tiles differ in length, so that the longest of many planes go first: of as many as fit their K and V
    in L2.
    """
    planes = shape.batch * shape.heads
    if not (shape.has_left or shape.has_right):
        return 1
    plane_bytes = shape.seqlen_k * (shape.head_dim + shape.head_dim_v) * 2
    in_cache = L2_WORKING_SET // max(1, plane_bytes) * (shape.heads // shape.kv_heads)
    return max(1, min(planes, in_cache))


@dataclass(frozen=True)
class BackwardKernel:
    """The three compiled kernels of a backward; the words are those of `csrc/backward/plan.cuh`."""

    dtype: str
    dim: int
    dim_v: int
    has_left: bool = False
    has_right: bool = False
    dropout: bool = False

    PREPARE, MAIN, FINISH = "attention_backward_prepare", "attention_backward", "attention_backward_finish"
    ROWS = 64
    THREADS = 384
    PREPARE_THREADS = 256
    FINISH_THREADS = 128

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return 64 if max(self.dim, self.dim_v) > 128 else 128

    @property
    def units(self) -> int:
        """Fragments of 64 x 64 in a block of dQ."""
        return self.dim // PANEL

    @property
    def lanes(self) -> int:
        """Threads that share a row of out and d_out, 16 bytes each."""
        return min(32, self.dim_v // 8)

    @property
    def source(self) -> str:
        """CUDA source of the three."""
        flags = [str(flag).lower() for flag in (self.has_left, self.has_right, self.dropout)]
        words = ", ".join(map(str, [self.dtype, self.dim, self.dim_v, *flags]))
        return (
            '#include "backward/kernel.cuh"\n'
            '#include "backward/rows.cuh"\n'
            f"using Chosen = backward::Config<{words}>;\n"
            'extern "C" __global__ void __launch_bounds__(backward::PREPARE_THREADS)\n'
            f"{self.PREPARE}(const __grid_constant__ backward::RowParams params) {{\n"
            f"    backward::prepare<{self.dtype}, {self.lanes}>(params);\n"
            "}\n"
            'extern "C" __global__ void __launch_bounds__(backward::THREADS, 1)\n'
            f"{self.MAIN}(const __grid_constant__ backward::Params params) {{\n"
            "    backward::run<Chosen>(params);\n"
            "}\n"
            'extern "C" __global__ void __launch_bounds__(backward::WARPGROUP)\n'
            f"{self.FINISH}(const __grid_constant__ backward::FinishParams params) {{\n"
            f"    backward::finish<{self.dtype}, {self.ROWS}, {self.dim}>(params);\n"
            "}\n"
        )


@lru_cache(maxsize=4096)
def backward_kernel(shape: Shape) -> BackwardKernel:
    """The backward kernels of a problem."""
    dim, dim_v = padded(shape.head_dim), padded(shape.head_dim_v)
    if max(dim, dim_v) > 128:
        # Consumers share the columns, in halves of whole panels.
        dim, dim_v = (ceil_div(d, 2 * PANEL) * 2 * PANEL for d in (dim, dim_v))
    return BackwardKernel(shape.dtype, dim, dim_v, shape.has_left, shape.has_right, shape.dropout)
