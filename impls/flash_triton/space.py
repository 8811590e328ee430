"""The configurations that `bench tune` tries for a problem: the rules' own choice, then others, the nearest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from attnbench.harness.contract import Candidate
from attnbench.harness.contract import Device as HarnessDevice
from attnbench.harness.oracle.inputs import make_inputs
from attnbench.harness.problem import Problem
from attnbench.impls.flash_api import Options
from attnbench.impls.flash_triton import tuned
from attnbench.impls.flash_triton.configs import (
    BackwardConfig,
    Device,
    ForwardConfig,
    Hopper,
    HopperBackward,
    Shape,
    Tile,
    backward_config,
    divide,
    fit,
    forward_config,
    specialisable,
    wide,
)
from attnbench.impls.flash_triton.launch import device_for, unit_last
from attnbench.impls.flash_triton.operands import Operands, layout_of

ROWS = (16, 32, 64, 128)
KEYS = (16, 32, 64, 128)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
HOPPER_FORWARDS = {64: (2, 3), 128: (2, 3), 256: (2,)}
"""Consumers by head_dim: ptxas gives up on three at 256."""
HOPPER_BACKWARDS = {
    64: ((128, 2, True), (64, 2, True), (64, 3, True)),
    128: ((64, 2, True), (64, 3, True)),
    256: ((64, 2, True), (64, 2, False), (32, 2, False)),
}
"""(query rows, stages, fused) by head_dim: what compiles for sm_90a, but 128 rows under dropout."""
REGISTERS = 224
"""Accumulators of a thread beyond which a tile would spill for certain: 255 less what addresses and rows take."""


def candidates(problem: Problem, device: HarnessDevice, deterministic: bool) -> list[Candidate]:
    """Those of a forward or of a backward; a call of both passes has none, since each is chosen by itself."""
    if problem.direction == "fwd_bwd":
        return []
    operands = operands_of(problem, torch.device(str(device)), deterministic)
    if operands.empty:
        return []
    where, shape = device_for(operands.device, operands.dtype), operands.shape
    if problem.direction == "fwd":
        return [_forward_candidate(shape, config) for config in forward_space(where, shape)]
    return [
        _backward_candidate(shape, deterministic, config)
        for config in backward_space(where, shape, deterministic)
    ]


def operands_of(problem: Problem, device: torch.device, deterministic: bool) -> Operands:
    """What the launch of a problem is made from, by tensors laid out as the harness lays them out."""
    inputs = make_inputs(problem, 0, device, dout=problem.direction != "fwd")
    q, k, v = map(unit_last, (inputs.q, inputs.k, inputs.v))
    d_out = None if inputs.dout is None else layout_of(unit_last(inputs.dout))
    mask, blocks = problem.mask, problem.mask.blocks
    options = Options(
        mask.left, mask.right, mask.alignment == "bottom_right", problem.softmax_scale, problem.dropout_p,
        (blocks.block_q, blocks.block_k) if blocks else (0, 0), deterministic,
    )  # fmt: skip
    layouts = layout_of(q), layout_of(k), layout_of(v)
    return Operands(options, q.device, q.dtype, problem.dropout_p > 0, *layouts, d_out)


def _forward_candidate(shape: Shape, config: ForwardConfig) -> Candidate:
    table = tuned.Table(forward={shape: config})
    return Candidate(_label(config), *tuned.forward_choice(shape, config), partial(tuned.using, table))


def _backward_candidate(shape: Shape, deterministic: bool, config: BackwardConfig) -> Candidate:
    table = tuned.Table(backward={(shape, deterministic): config})
    key, choice = tuned.backward_choice(shape, deterministic, config)
    return Candidate(_label(config), key, choice, partial(tuned.using, table))


# --- the space --------------------------------------------------------------------------------------------------------


def forward_space(device: Device, shape: Shape) -> list[ForwardConfig]:
    """Tiles, splits of the keys where the rules split them, and warp-specialised kernels where there are any."""
    unasked = forward_config(device, shape)
    portable = replace(unasked, hopper=None)
    found = [unasked, portable]
    if unasked.splits > 1:
        found += [replace(portable, splits=splits) for splits in _near(unasked.splits)]
    elif specialisable(device, shape):
        found += [replace(unasked, hopper=hopper) for hopper in _hopper_forwards(device, shape)]
    few = unasked.tile.block_m < 64  # the rules see to it that a tile is no taller than the queries
    tiles = [tile for tile in _tiles(device, shape, unasked.tile) if (tile.block_m < 64) == few]
    found += [replace(portable, tile=tile) for tile in tiles]
    return list(dict.fromkeys(found))


def backward_space(device: Device, shape: Shape, deterministic: bool) -> list[BackwardConfig]:
    """Tiles of either kernel beside the rules' own of the other, and warp-specialised kernels where there are any."""
    unasked = backward_config(device, shape, deterministic)
    portable = replace(unasked, hopper=None)
    found = [unasked, portable]
    found += [replace(unasked, hopper=hopper) for hopper in _hopper_backwards(device, shape, deterministic)]
    beside = portable if unasked.hopper and unasked.hopper.fused else unasked
    for dkdv, dq in itertools.zip_longest(
        _tiles(device, shape, unasked.dkdv), _tiles(device, shape, unasked.dq)
    ):
        found += [replace(portable, dkdv=dkdv)] if dkdv else []
        found += [replace(beside, dq=dq)] if dq else []
    return list(dict.fromkeys(found))


def _tiles(device: Device, shape: Shape, unasked: Tile) -> list[Tile]:
    """Tiles that may fit a multiprocessor, by how many words they differ in from the one chosen unasked."""
    with_tma = (False, True) if shape.tma_able and device.capability[0] >= 9 else (False,)
    every = {fit(Tile(*words), shape) for words in itertools.product(ROWS, KEYS, WARPS, STAGES, with_tma)}
    fitting = [tile for tile in every if _fits(device, shape, tile)]
    return sorted(fitting, key=lambda tile: (_distance(tile, unasked), str(tile)))


def _fits(device: Device, shape: Shape, tile: Tile) -> bool:
    """Whether queries and the stages of keys and values lie in shared memory, which is what Triton takes for a forward,
    and accumulators in registers; the compiler has the last word."""
    staged = tile.stages * tile.block_n * (shape.block_d + shape.block_dv)
    shared = (tile.block_m * shape.block_d + staged) * shape.itemsize
    registers = tile.block_m * (shape.block_dv + tile.block_n) / (32 * tile.warps)
    return shared <= device.smem and registers <= REGISTERS


def _distance(tile: Tile, other: Tile) -> int:
    words = ("block_m", "block_n", "warps", "stages", "tma")
    return sum(getattr(tile, word) != getattr(other, word) for word in words)


def _near(splits: int) -> Iterator[int]:
    yield from (max(1, splits // 2), splits * 2, max(1, splits // 4), splits * 4)


def _hopper_forwards(device: Device, shape: Shape) -> Iterator[Hopper]:
    consumers_of = HOPPER_FORWARDS.get(shape.head_dim, ())
    for consumers, keys, stages in itertools.product(consumers_of, (64, 128, 32), (2, 3)):
        rows = 64 * consumers
        shared = (rows + 2 * stages * keys) * shape.head_dim * shape.itemsize
        if shared < device.smem and divide(shape, rows, keys):
            yield Hopper(consumers, keys, stages)


def _hopper_backwards(device: Device, shape: Shape, deterministic: bool) -> Iterator[HopperBackward]:
    if not specialisable(device, shape):
        return
    for rows, stages, fused in HOPPER_BACKWARDS.get(shape.head_dim, ()):
        compiles = rows <= 64 or not shape.dropout
        if (
            compiles
            and divide(shape, rows, 64 if wide(shape.head_dim) else 128)
            and not (fused and deterministic)
        ):
            yield HopperBackward(rows, stages, fused)


# --- names ------------------------------------------------------------------------------------------------------------


def _label(config: ForwardConfig | BackwardConfig) -> str:
    """``64x128 w4 s2 tma``, ``hopper 3x64x128 s2``; a backward names dK/dV's and dQ's."""
    if isinstance(config, ForwardConfig):
        splits = f" splits{config.splits}" if config.splits > 1 else ""
        if config.hopper:
            return f"hopper {config.hopper.consumers}x64x{config.hopper.block_n} s{config.hopper.stages}"
        return _tile_label(config.tile) + splits
    if config.hopper is None:
        return f"{_tile_label(config.dkdv)} + {_tile_label(config.dq)}"
    special = f"hopper {config.hopper.block_m} s{config.hopper.stages}"
    return special if config.hopper.fused else f"{special} + {_tile_label(config.dq)}"


def _tile_label(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}{' tma' if tile.tma else ''}"
