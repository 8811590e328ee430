"""Tile shapes: pure functions of the device and the problem, with the reason beside each branch.

A figure beside a branch is measured: TFLOP/s on one H200 in bf16 at 16k tokens, heads x head_dim 2048 (NOTES.md).
A reason marked "predicted" is arithmetic on registers, shared memory and FLOPs, not yet timed. Nothing here
searches or measures at run time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

L2_WORKING_SET = 32 * 2**20
"""Bytes that the programs in flight may read again and again: about 60% of Hopper's L2."""

HOPPER_WHEREVER_POSSIBLE = False
"""Choose the Hopper kernels also where a portable one is faster: for tests on hardware, whose problems are small."""


@dataclass(frozen=True)
class Device:
    """What tile choice needs to know of a device. capability (0, 0) means unknown: an AMD GPU, or the interpreter."""

    capability: tuple[int, int]
    sms: int

    @property
    def smem(self) -> int:
        """Shared memory one program may use, in bytes."""
        return {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}.get(self.capability, 64 if
               self.capability == (0, 0) else 99) * 1024  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The part of a problem that decides tiles. mask_block is (0, 0) without block lists."""

    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    itemsize: int
    causal: bool
    banded: bool
    dropout: bool
    mask_block: tuple[int, int]
    tma_able: bool

    @property
    def block_d(self) -> int:
        """head_dim rounded up to what Triton can index; the excess is masked in registers, never copied."""
        return next_power_of_2(self.head_dim)

    @property
    def block_dv(self) -> int:
        """head_dim_v likewise."""
        return next_power_of_2(self.head_dim_v)

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Tile:
    """One kernel launch: block_m query rows, block_n keys, warps, load stages, and whether loads go through TMA."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False


@dataclass(frozen=True)
class Hopper:
    """Launch of the warp-specialised forward: warpgroups of 64 query rows, keys a tile, K and V buffers."""

    consumers: int
    block_n: int
    stages: int


@dataclass(frozen=True)
class ForwardConfig:
    """Tile plus schedule. pack: query heads of a key head share a tile; splits: programs that share one row's keys.

    hopper, if given, replaces the tile by the warp-specialised kernel.
    """

    tile: Tile
    hopper: Hopper | None = None
    planes_per_wave: int = 1
    heavy_last: bool = False
    pack: bool = False
    splits: int = 1


@dataclass(frozen=True)
class HopperBackward:
    """Launch of a warp-specialised backward: query rows a tile, Q and dO buffers, and whether dQ is fused into it."""

    block_m: int
    stages: int
    fused: bool


@dataclass(frozen=True)
class BackwardConfig:
    """Tiles of the dK/dV and the dQ kernel. hopper, if given, replaces the first, and if fused both."""

    dkdv: Tile
    dq: Tile
    planes_per_wave: int = 1
    heavy_last: bool = False
    hopper: HopperBackward | None = None


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, and >= 16, the smallest operand of tl.dot."""
    return max(16, 1 << (n - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


@lru_cache(maxsize=4096)
def forward_config(device: Device, shape: Shape) -> ForwardConfig:
    """Tile and schedule of the forward pass."""
    tile = _forward_tile(device, shape)
    packed_rows = shape.seqlen_q * shape.group
    # Few queries: pack the query heads of a key head into one tile, so that K and V are read once per group
    # (predicted: decode is bound by K and V bytes, and a tile row costs nothing while the tile is at least
    # 16 rows anyway).
    pack = shape.group > 1 and packed_rows <= 64 and not shape.dropout and shape.mask_block == (0, 0)
    rows = packed_rows if pack else shape.seqlen_q
    if rows <= 64:
        floor = 32 if shape.dropout else 16  # dropout patches are 32 x 32
        small = max(floor, next_power_of_2(rows))
        if shape.mask_block != (0, 0):
            small = math.gcd(small, shape.mask_block[0])
        if small < tile.block_m:
            tile = _decode_tile(device, shape, tile, small)
    planes = shape.batch * (shape.kv_heads if pack else shape.heads)
    splits = _splits(device, shape, ceil_div(rows, tile.block_m) * planes, tile)
    return ForwardConfig(
        tile,
        _hopper(device, shape) if rows > 64 and splits == 1 else None,
        _planes_per_wave(shape, planes),
        heavy_last=shape.causal,
        pack=pack,
        splits=splits,
    )


@lru_cache(maxsize=4096)
def backward_config(device: Device, shape: Shape, deterministic: bool) -> BackwardConfig:
    """Tiles and schedule of the backward pass."""
    dkdv, dq = _backward_tiles(device, shape)
    hopper = _hopper_backward(device, shape)
    return BackwardConfig(
        fit(dkdv, shape),
        fit(dq, shape),
        planes_per_wave=_planes_per_wave(shape, shape.batch * shape.heads, backward=True),
        heavy_last=shape.causal,
        hopper=_repeatable(hopper, shape) if deterministic else hopper,
    )


def _repeatable(hopper: HopperBackward | None, shape: Shape) -> HopperBackward | None:
    """The same without sums of dQ in memory, whose order differs from call to call, if there is such a kernel."""
    if hopper is None or not hopper.fused:
        return hopper
    return replace(hopper, fused=False) if wide(shape.head_dim) else None


def _forward_tile(device: Device, shape: Shape) -> Tile:
    d = max(shape.block_d, shape.block_dv)
    if shape.itemsize == 4:
        # IEEE fp32 products run on the FMA units from registers: small tiles; these do not spill (compiler's report).
        tile = Tile(64, 32, 4, 2) if d <= 64 else Tile(32, 32, 4, 2) if d <= 128 else Tile(32, 16, 8, 1)
    elif device.capability[0] == 9:
        # One warpgroup a program and several programs an SM: one's softmax runs under another's products.
        if d <= 64:
            # n 8192: 486 full, 450 causal; 128x128 over two warpgroups 354, 350.
            tile = Tile(64, 128, 4, 2, shape.tma_able)
        elif d <= 128:
            # 537 full, 539 causal; 128x128 over two warpgroups 434, 422, 64x128 383, 333.
            tile = Tile(64, 64, 4, 3, shape.tma_able)
        else:
            # O alone takes 128 registers a thread, so two warpgroups. Pointers 502 full, 581 causal; TMA 515, 404.
            tile = Tile(128, 64, 8, 2)
    elif device.smem >= 160 * 1024:
        # Ampere (and newer parts with as much shared memory): FlashAttention-2's tiles (predicted).
        tile = Tile(128, 64, 4, 3) if d <= 64 else Tile(128, 64, 8, 3) if d <= 128 else Tile(64, 64, 8, 2)
    else:
        # Ada, consumer Ampere and unknown devices: at most 99 (64) KB of shared memory (predicted).
        tile = Tile(128, 64, 4, 2) if d <= 64 else Tile(64, 32, 4, 2) if d <= 128 else Tile(64, 16, 4, 1)
    return fit(tile, shape)


def wide(head_dim: int) -> bool:
    """Whether dK and dV of 64 keys fill the registers of a warpgroup each, so that a program has no more keys."""
    return head_dim > 128


def specialisable(device: Device, shape: Shape) -> bool:
    """Whether the warp-specialised kernels apply: 16-bit, equal head dims."""
    hopper = device.capability[0] == 9 and shape.itemsize == 2 and shape.tma_able
    return hopper and shape.head_dim == shape.head_dim_v


def divide(shape: Shape, rows: int, keys: int) -> bool:
    """Whether tiles of these sizes divide the mask's blocks."""
    return shape.mask_block[0] % rows == 0 and shape.mask_block[1] % keys == 0


def _hopper(device: Device, shape: Shape) -> Hopper | None:
    if not specialisable(device, shape):
        return None
    chosen: Hopper | None
    if shape.head_dim == 64:
        # Three consumers hide each other's softmax: 574 full, 501 causal at n 8192, portable 486, 455. Of short rows
        # their 192 would be wasted (predicted; flash_cuda at n 1024: 128 rows 429, 324, 192 rows 404, 274); two reach
        # 453, 331 there, portable 404, 295. 192 divides no usual block. Under dropout 128 keys would spill (compiler's
        # report). Windows and n 2048: not timed.
        chosen = Hopper(3, 64, 3) if shape.dropout else Hopper(2 if shape.seqlen_q <= 1024 else 3, 128, 2)
    else:
        chosen = {
            # 735 full, 704 causal, portable 537, 539; n 1024: 662, 485, portable 476, 369. Dropout 439, portable 338.
            128: Hopper(2, 128, 2),
            # 787 full, 756 causal, portable 502, 581; n 1024: 660, 501, portable 430, 379. 32 keys and 3 stages,
            # when 64 were at 791, 739: 552, 561.
            256: Hopper(2, 64, 2),
        }.get(shape.head_dim)
    return chosen if chosen and divide(shape, 64 * chosen.consumers, chosen.block_n) else None


def _hopper_backward(device: Device, shape: Shape) -> HopperBackward | None:
    if not specialisable(device, shape):
        return None
    # dK, dV, S^T, dP^T and dQ take 64 + 64 + 32 + 32 + 32 registers at head_dim 128. At 256 dK and dV take a warpgroup
    # each.
    if shape.head_dim == 64:
        # 128 query rows: 32 + 32 + 64 + 64 registers and no spill but under dropout (compiler's report). Beside the
        # portable kernels 6% full, 1% causal faster at n 1024, 16%, 18% at n 8192 (64 rows were at n 8192: 354, 336,
        # portable 367, 323; dropout 320, 298, where the portable kernel computes Philox twice).
        whole = shape.mask_block[0] % 128 == 0 and not shape.dropout
        chosen = HopperBackward(128, 2, True) if whole else HopperBackward(64, 3, True)
        faster = shape.dropout or (whole and shape.seqlen_k >= 1024)
    elif shape.head_dim == 128:
        # n 16384: 560 full, 510 causal, portable 433, 355. n 4096: 457, 406, portable 384, 311. n 1024: at least 360,
        # 276, the portable kernels' own times 368, 274; n 512: at least 240, 158, portable 299, 198 (NOTES.md).
        chosen = HopperBackward(64, 2, True)
        faster = shape.dropout or shape.seqlen_k >= 1024
    elif shape.head_dim == 256:
        # n 8192: 442 full, 432 causal, with a kernel for dQ 330, 347, portable 231, 205. n 1024: 348, 279, with that
        # kernel 295, 252, portable 199, 146. Dropout and block lists: not timed.
        chosen = HopperBackward(64, 2, True)
        faster = True
    else:
        return None
    fits = divide(shape, chosen.block_m, 64 if wide(shape.head_dim) else 128)
    return chosen if fits and (faster or HOPPER_WHEREVER_POSSIBLE) else None


def _backward_tiles(device: Device, shape: Shape) -> tuple[Tile, Tile]:
    """(dK/dV tile, dQ tile). On Hopper each was timed beside a fixed tile of the other kernel, not both together."""
    d = max(shape.block_d, shape.block_dv)
    if shape.itemsize == 4:
        # As in the forward: what does not spill.
        tile = Tile(32, 32, 4, 1) if d <= 64 else Tile(32, 32, 8, 1) if d <= 128 else Tile(16, 16, 4, 1)
        return tile, tile
    if device.capability[0] == 9:
        if d <= 64:
            # dK/dV, ms at n 8192, 1024, 512: 3.53, 0.55, 0.33 full and 2.07, 0.37, 0.26 causal; 64x64 4.23, 0.61, 0.35
            # and 2.47, 0.42, 0.27. dQ: 2.43 full, 1.29 causal; 128x64 over two warpgroups 2.64, 1.59.
            return Tile(128, 64, 4, 2, shape.tma_able), Tile(64, 64, 4, 3, shape.tma_able)
        if d <= 128:
            # dK/dV, ms at n 8192, 1024, 512: 64x64 3.22, 0.50, 0.30 full, 2.20, 0.39, 0.27 causal; 32x64 3.81, 0.54,
            # 0.32 full, 2.13, 0.35, 0.23 causal. dQ: 2.46 full, 1.34 causal; 128x64 over two warpgroups 3.00, 1.64.
            tile = Tile(64, 64, 4, 2, shape.tma_able)
            return replace(tile, block_m=32, stages=3) if shape.causal else tile, tile
        # dK/dV: 249 full, 213 causal through pointers; with TMA and one stage, all that fits, 163, 181. None of nine
        # others comes near. dQ, ms at n 8192: 3.87 full, 1.82 causal; 128x32 and 2 stages 3.78, 2.42.
        return Tile(64, 64, 8, 2), Tile(128, 64, 8, 1, shape.tma_able)
    if device.smem >= 160 * 1024:
        if d <= 128:
            return Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)
        return Tile(32, 64, 8, 1), Tile(64, 32, 8, 1)
    if d <= 64:
        return Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)
    return Tile(32, 32 if d > 128 else 64, 4, 1), Tile(32, 32, 4, 1)


def _decode_tile(device: Device, shape: Shape, tile: Tile, block_m: int) -> Tile:
    """Tile for a few query rows: bound by reading K and V, so what matters is bytes in flight, not products."""
    if shape.itemsize == 4:
        return replace(tile, block_m=block_m)
    # 16-bit: 64 keys a stage and 4 warps; more than two stages gain 1 to 3%. Pointers read 1906 GB/s of K and V at
    # batch 1 and 2403 at batch 8, TMA 1694 and 2106 (32 heads on 8, 64k and 16k keys).
    d = max(shape.block_d, shape.block_dv)
    per_stage = 64 * (shape.block_d + shape.block_dv) * shape.itemsize
    stages = max(1, min(4, (device.smem // (2 if d <= 128 else 1) - 8192) // per_stage))
    return fit(Tile(block_m, 64, 4, stages), shape)


def fit(tile: Tile, shape: Shape) -> Tile:
    """Grow a tile to whole dropout patches of 32 x 32, and shrink it until it divides the mask's blocks."""
    if shape.dropout:
        tile = replace(tile, block_m=max(32, tile.block_m), block_n=max(32, tile.block_n))
    mask_m, mask_n = shape.mask_block
    if (mask_m, mask_n) == (0, 0):
        return tile
    return replace(tile, block_m=math.gcd(tile.block_m, mask_m), block_n=math.gcd(tile.block_n, mask_n))


def _planes_per_wave(shape: Shape, planes: int, *, backward: bool = False) -> int:
    """How many (batch, head) planes share a wave. Without a mask one: neighbours then read the same K and V.

    Under a mask tiles differ in length, so a wave takes tiles of several planes, longest first: as many planes as fit
    what they read again in L2, K and V, in backward Q and dO too. No more than are in flight at once: 1 to 4% slower in
    the forward at head_dim 128, no difference in the backward.
    """
    if not shape.banded:
        return 1
    rows = shape.seqlen_k + (shape.seqlen_q if backward else 0)
    plane_bytes = rows * (shape.head_dim + shape.head_dim_v) * shape.itemsize
    planes_in_l2 = L2_WORKING_SET // max(1, plane_bytes) * shape.group
    return max(1, min(planes, planes_in_l2))


def _splits(device: Device, shape: Shape, programs: int, tile: Tile) -> int:
    """Key splits of decode: enough programs for two an SM, each with at least four tiles to amortise the merge.

    A program alone reads 40 GB/s (8 read 328, 64 read 2544), programs that share rows 2403 in all: from 60 programs on
    the 132 SMs of an H200, one a row is faster.
    """
    if shape.mask_block != (0, 0) or shape.seqlen_q > 64 or programs >= 0.45 * device.sms:
        return 1
    wanted = ceil_div(2 * device.sms, max(1, programs))
    return max(1, min(wanted, shape.seqlen_k // (4 * tile.block_n), 128))
