"""Which kernel a problem gets: pure functions of the shape, with the reason beside each branch (figures: NOTES.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnbench.impls.flash_api import Options
    from attnbench.impls.flash_api.band import Band

L2_WORKING_SET = 32 * 2**20
"""Bytes of K and V that the blocks in flight may share: about 60% of Hopper's L2."""

PANEL = 64
"""Head dims in shared memory are multiples of this."""

SHARED_BYTES = 227 * 1024
"""Shared memory of a block: all that Hopper has, since every kernel here runs one block a multiprocessor."""

SHARED_RESERVE = 3072
"""What barriers, assignments and dropout's bits take of it, at most."""

WARPGROUP_ROWS = 64
"""Rows of a warpgroup's product."""


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
    mask_block: tuple[int, int] = (0, 0)
    """(queries, keys) of a block of the lists, (0, 0) without."""

    @staticmethod
    def of(options: Options, band: Band, dtype: str, q: Sequence[int], v: Sequence[int]) -> Shape:
        """The shape of a call whose q and v have these BSHD shapes."""
        (batch, seqlen_q, heads, head_dim), (_, seqlen_k, kv_heads, head_dim_v) = q, v
        return Shape(
            dtype, batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v,
            band.left is not None, band.right is not None, options.dropout_p > 0, options.mask_block,
        )  # fmt: skip

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads


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
    lists: bool = False
    decode: bool = False

    NAME, MERGE = "attention_forward", "attention_forward_merge"
    MERGE_THREADS = 128

    @property
    def rows(self) -> int:
        """Rows of a tile: queries, or with `decode` queries times heads of the group."""
        return WARPGROUP_ROWS * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (1 + self.consumers)

    @property
    def source(self) -> str:
        """CUDA source of this kernel alone, and with `decode` of what merges the splits."""
        arguments = [self.dtype, self.dim, self.dim_v, self.consumers, self.keys, self.slots, self.q_slots]
        flags = [self.has_left, self.has_right, self.dropout, self.out_in_q, self.lists, self.decode]
        words = ", ".join([*map(str, arguments), *(str(flag).lower() for flag in flags)])
        merge = (
            '#include "forward/merge.cuh"\n'
            'extern "C" __global__ void __launch_bounds__(forward::MERGE_THREADS)\n'
            f"{self.MERGE}(const __grid_constant__ forward::MergeParams params) {{\n"
            f"    forward::merge<{self.dtype}, {self.dim_v}>(params);\n"
            "}\n"
        )
        return (
            '#include "forward/kernel.cuh"\n'
            f"using Chosen = forward::Config<{words}>;\n"
            'extern "C" __global__ void __launch_bounds__(Chosen::THREADS, 1)\n'
            f"{self.NAME}(const __grid_constant__ forward::Params params) {{\n"
            "    forward::run<Chosen>(params);\n"
            "}\n"
            f"{merge if self.decode else ''}"
        )


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def padded(dim: int) -> int:
    """A head dim as it lies in shared memory; the copy engine fills the excess with zeros."""
    return ceil_div(dim, PANEL) * PANEL


@lru_cache(maxsize=4096)
def forward_kernel(shape: Shape, multiprocessors: int) -> ForwardKernel:
    """The forward kernel of a problem on a device of so many multiprocessors.

    ValueError if blocks of a mask are not made of tiles.
    """
    if shape.mask_block != (0, 0):
        return _list_kernel(shape)
    dense = _dense_kernel(shape)
    return _decode_kernel(shape) if _few_rows(shape, dense, multiprocessors) else dense


def _dense_kernel(shape: Shape) -> ForwardKernel:
    """Figures beside the branches: TFLOP/s as in NOTES.md."""
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


LIST_QUERIES, LIST_KEYS = 64, 32
"""Blocks of a mask are multiples of these: the rows of a warpgroup, and the smallest step of keys."""


def _list_kernel(shape: Shape) -> ForwardKernel:
    """The dense kernel with the largest tile that divides a block: for 128 x 128 blocks those of two consumers and 128
    keys up to hd128, 64 of the 80 or 96 keys above (not measured)."""
    block_q, block_k = shape.mask_block
    if block_q % LIST_QUERIES or block_k % LIST_KEYS:
        raise ValueError(
            f"block_mask: blocks of {block_q} x {block_k}, allowed are multiples of {LIST_QUERIES} x {LIST_KEYS}"
        )
    dense = _dense_kernel(shape)
    consumers = max(c for c in range(1, dense.consumers + 1) if block_q % (WARPGROUP_ROWS * c) == 0)
    keys = max(keys for keys in (32, 64, 96, 128) if keys <= dense.keys and block_k % keys == 0)
    return _fill(replace(dense, consumers=consumers, keys=keys, lists=True))


MAX_GROUP = WARPGROUP_ROWS
"""Query heads of a key head that a warpgroup's rows can hold."""

LEAST_STEPS = 4
"""Fewest steps of a split: its results cost about 4 us to write and merge, a step 1 to 2 (not measured)."""


def _few_rows(shape: Shape, dense: ForwardKernel, multiprocessors: int) -> bool:
    """Whether tiles of one warpgroup, which heads of a group share, are the better ones (not measured)."""
    if shape.dropout or shape.group > MAX_GROUP:
        return False
    tiles = ceil_div(shape.seqlen_q, dense.rows) * shape.heads
    packed = ceil_div(shape.seqlen_q, WARPGROUP_ROWS // shape.group) * shape.kv_heads
    long_keys = shape.seqlen_k >= 2 * LEAST_STEPS * dense.keys  # enough to split
    # K and V are read no more often, in the best case once for a group and not once for each of its heads. For a single
    # head and few keys the dense kernel is the better one, with its second slot for Q and its second warpgroup.
    if shape.seqlen_q <= WARPGROUP_ROWS and packed <= tiles and (shape.group > 1 or long_keys):
        return True
    return long_keys and 2 * tiles * shape.batch <= multiprocessors  # half of the device would idle


def _decode_kernel(shape: Shape) -> ForwardKernel:
    """One warpgroup, bound by reading K and V: shared memory full of them, and of 64 keys where 128 leave two slots."""
    dim, dim_v = padded(shape.head_dim), padded(shape.head_dim_v)
    keys = 128 if max(dim, dim_v) <= 128 else 64
    return _fill(
        ForwardKernel(
            shape.dtype, dim, dim_v, 1, keys, 1, 1, shape.has_left, shape.has_right, out_in_q=dim_v <= dim,
            decode=True,
        )
    )  # fmt: skip


def _fill(kernel: ForwardKernel) -> ForwardKernel:
    """With as many slots for K and V as fit, up to 4."""
    staged = 0 if kernel.out_in_q else kernel.dim_v
    rows = 2 * kernel.rows * (kernel.q_slots * kernel.dim + staged)
    slot = 2 * kernel.keys * (kernel.dim + kernel.dim_v)
    return replace(kernel, slots=min(4, (SHARED_BYTES - SHARED_RESERVE - rows) // slot))


def queries_of(kernel: ForwardKernel, shape: Shape) -> int:
    """Queries of a tile: with `decode` as many as fit with all heads of their group."""
    return kernel.rows // shape.group if kernel.decode else kernel.rows


def splits_of(kernel: ForwardKernel, shape: Shape, band: Band, multiprocessors: int) -> int:
    """Parts that a tile's keys are split into: one for every multiprocessor, if each has LEAST_STEPS or more."""
    if not kernel.decode:
        return 1
    queries = queries_of(kernel, shape)
    begin = 0 if band.left is None else max(0, band.shift - band.left)
    end = shape.seqlen_k
    if band.right is not None:
        end = min(end, shape.seqlen_q + band.shift + band.right)
    seen = end - begin
    if band.left is not None and band.right is not None:
        seen = min(seen, queries + band.left + band.right)
    tiles = ceil_div(shape.seqlen_q, queries) * shape.batch * shape.kv_heads
    return max(1, min(multiprocessors // tiles, seen // (LEAST_STEPS * kernel.keys)))


def planes_per_wave(shape: Shape) -> int:
    """How many (batch, head) planes are worked on at once. Without a mask one: neighbours then read the same K and V.

    Under a mask tiles differ in length, so that the longest of many planes go first: of as many as fit their K and V
    in L2.
    """
    planes = shape.batch * shape.heads
    if not (shape.has_left or shape.has_right or shape.mask_block != (0, 0)):
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
    keys: int
    rows: int
    has_left: bool = False
    has_right: bool = False
    dropout: bool = False
    deterministic: bool = False
    lists: bool = False
    cluster: int = 1

    PREPARE, MAIN, FINISH = "attention_backward_prepare", "attention_backward", "attention_backward_finish"
    THREADS = 384
    PREPARE_THREADS = 256
    PREPARE_BLOCKS = 6
    """Blocks a multiprocessor of the kernel that prepares rows: all that fit, with 42 registers a thread."""
    FINISH_THREADS = 128

    @property
    def tile_keys(self) -> int:
        """Keys of a tile, which the blocks of a cluster share."""
        return self.keys * self.cluster

    @property
    def units(self) -> int:
        """Fragments of 64 x 64 in a block of dQ."""
        return self.rows // WARPGROUP_ROWS * (self.dim // PANEL)

    @property
    def lanes(self) -> int:
        """Threads that share a row of out and d_out, 16 bytes each."""
        return min(32, self.dim_v // 8)

    @property
    def source(self) -> str:
        """CUDA source of the three."""
        switches = (self.has_left, self.has_right, self.dropout, self.deterministic, self.lists)
        flags = [str(switch).lower() for switch in switches]
        sizes = [self.dtype, self.dim, self.dim_v, self.keys, self.rows, self.cluster]
        words = ", ".join(map(str, [*sizes, *flags]))
        cluster = f"__cluster_dims__({self.cluster}, 1, 1) " if self.cluster > 1 else ""
        order = f"    backward::order_tiles<{self.keys}>(params.order);\n" if self.lists else ""
        return (
            '#include "backward/kernel.cuh"\n'
            '#include "backward/rows.cuh"\n'
            f"using Chosen = backward::Config<{words}>;\n"
            'extern "C" __global__ void __launch_bounds__(backward::PREPARE_THREADS,'
            f" {self.PREPARE_BLOCKS})\n"
            f"{self.PREPARE}(const __grid_constant__ backward::RowParams params) {{\n"
            f"{order}    backward::prepare<{self.dtype}, {self.lanes}>(params);\n"
            "}\n"
            f'extern "C" __global__ void {cluster}__launch_bounds__(backward::THREADS, 1)\n'
            f"{self.MAIN}(const __grid_constant__ backward::Params params) {{\n"
            "    backward::run<Chosen>(params);\n"
            "}\n"
            'extern "C" __global__ void __launch_bounds__(backward::WARPGROUP)\n'
            f"{self.FINISH}(const __grid_constant__ backward::FinishParams params) {{\n"
            f"    backward::finish<{self.dtype}, {self.rows}, {self.dim}>(params);\n"
            "}\n"
        )


def key_planes_per_wave(shape: Shape) -> int:
    """How many (batch, key head) planes the backward works on at once. Without a band one: neighbours then read the
    same rows, by lists too. Four heads of 16k rows at a time, as many as fit their K and V, moved 4.8 GB through DRAM
    at hd128 and density 0.25 of 0.66 that had to (Nsight Compute; FlashAttention-4, a head at a time, 0.66).

    Under a band as many as fit in L2 what each tile of keys reads again, Q and dO, and adds to, the sums of dQ. With
    as many as fit their K and V, twice as many, a causal backward of 8k rows moved 1.1 GB through DRAM at hd128 and
    1.6 GB at hd64, of 0.66 GB that had to (Nsight Compute).
    """
    if not (shape.has_left or shape.has_right):
        return 1
    row_bytes = 2 * (shape.head_dim + shape.head_dim_v) + 4 * shape.head_dim
    in_cache = L2_WORKING_SET // max(1, shape.group * shape.seqlen_q * row_bytes)
    return max(1, min(shape.batch * shape.kv_heads, in_cache))


def keeps_rows(shape: Shape) -> bool:
    """Whether Q and dO are to leave L2 last.

    Not those of long rows without a band or lists: from n 16384 to 32768 full, kernels that keep them fell (this one
    646 to 622 at hd128, 602 to 570 at hd64, FlashAttention-3 666 to 631 and 595 to 555), at hd128 those that do not
    rose (FlashAttention-4 688 to 704, the Triton kernel 619 to 629). Not kept, this one gained 3% at hd128 (NOTES.md).
    """
    banded, listed = shape.has_left or shape.has_right, shape.mask_block != (0, 0)
    return banded or listed or shape.seqlen_q <= 16384


LEAST_BACKWARD_KEYS = 64
"""Keys of the smaller one of the backward's two tiles."""


@lru_cache(maxsize=4096)
def backward_kernel(shape: Shape, deterministic: bool = False) -> BackwardKernel:
    """The backward kernels of a problem that is not refused. deterministic: gradients repeat bit for bit."""
    lists = shape.mask_block != (0, 0)
    dim, dim_v, keys = padded(shape.head_dim), padded(shape.head_dim_v), 128
    if max(dim, dim_v) > 128 or shape.mask_block[1] % keys:
        # Consumers share 64 keys and the columns, in halves of whole panels.
        dim, dim_v = (ceil_div(d, 2 * PANEL) * 2 * PANEL for d in (dim, dim_v))
        keys = LEAST_BACKWARD_KEYS
    # Half as many steps, each with what a step costs beside its products; dropout's bits are for 64 rows.
    tall = max(dim, dim_v) == 64 and not shape.dropout and shape.mask_block[0] % 128 == 0
    rows = 128 if tall else 64
    # Two blocks that share dQ have a panel of it for each consumer: four. Rows are listed for one block's keys.
    cluster = 2 if dim == 4 * PANEL and not lists else 1
    return BackwardKernel(
        shape.dtype, dim, dim_v, keys, rows, shape.has_left, shape.has_right, shape.dropout, deterministic, lists,
        cluster,
    )  # fmt: skip
