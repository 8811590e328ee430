"""What FlashAttention-4 is told of a block mask, against the dense mask; a stand-in takes the call."""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple

import pytest
import torch

from attnbench.harness.contract import Device, Implementation
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.impls.flash_attn import FlashAttention4

CPU, HOPPER = Device("cpu"), Device("cuda", name="NVIDIA H200", capability=(9, 0))


class Lists(NamedTuple):
    """The fields of flash_attn/cute/block_sparsity.py that are used, under its names."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


def convert(lists: Lists) -> None:
    """Raises as ``to_cute_tensor`` does (flash_attn/cute/cute_dsl_utils.py), which marks the last dimension dense."""
    for tensor in lists[:4]:
        if tensor.stride(-1) != 1:
            raise RuntimeError(f"Expected strides[leading_dim] == 1, but got {tensor.stride(-1)}.")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call that the stand-in library took; no problem is refused."""
    taken: list[dict[str, Any]] = []

    def flash_attn_func(q: object, k: object, v: object, **options: Any) -> object:
        taken.append(options)
        for name in options.keys() & {"block_sparse_tensors", "block_sparse_tensors_bwd"}:
            convert(options[name])
        return q

    contents = {
        "flash_attn": {},
        "flash_attn.cute": {"flash_attn_func": flash_attn_func},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": Lists},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Implementation, "require", lambda *_: None)
    return taken


def posed(mask: str, head_dim: int = 64, seqlen_q: int = 300, seqlen_k: int = 700) -> Problem:
    return Problem(2, 4, seqlen_q, head_dim, kv_heads=2, seqlen_k=seqlen_k, mask=Mask.parse(mask))


def tiles_of(lists: Lists) -> torch.Tensor:
    """Bool (1 or heads, rows, columns): the tiles that the kernels would visit, as they read a list."""
    counts, indices = lists.full_block_cnt, lists.full_block_idx
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.shape[0] == 1
    assert not lists.mask_block_cnt.any()
    assert lists.mask_block_idx.shape == indices.shape
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    follows = indices.diff(dim=-1) > 0  # the last one listed must be the last of the sequence
    assert (follows | ~listed[..., 1:]).all()
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), listed)[0]


def seen(tiles: torch.Tensor, tile_q: int, tile_k: int, problem: Problem) -> torch.Tensor:
    pairs = tiles.repeat_interleave(tile_q, 1).repeat_interleave(tile_k, 2)
    rows, columns = -(-problem.seqlen_q // tile_q), -(-problem.seqlen_k // tile_k)
    assert tiles.shape[1:] == (rows, columns)
    return pairs[:, : problem.seqlen_q, : problem.seqlen_k]


@pytest.mark.parametrize("seqlen_q", [300, 100])  # 100 are one tile: a dimension of size 1, of any stride
@pytest.mark.parametrize("through", ["contract", "script"])
@pytest.mark.parametrize(
    ("mask", "head_dim", "tile"),
    [
        ("blocks(random,128x128,density=0.4)", 64, (128, 128)),
        ("blocks(random,128x128,density=0.4,per_head=1)", 128, (128, 128)),
        ("blocks(random,128x128,density=0)", 64, (128, 128)),
        ("blocks(strided,256x128,density=0.3)", 96, (128, 128)),
        ("blocks(random,128x192,density=0.5)", 256, (128, 64)),
        ("blocks(full,128x128)", 64, (128, 128)),
    ],
)
def test_both_passes_are_told_of_the_visible_tiles(
    mask: str,
    head_dim: int,
    tile: tuple[int, int],
    through: str,
    seqlen_q: int,
    calls: list[dict[str, Any]],
) -> None:
    problem = posed(mask, head_dim, seqlen_q)
    visible = problem.mask.dense(
        torch.arange(problem.seqlen_q), problem.heads, problem.seqlen_q, problem.seqlen_k
    )
    if through == "contract":
        attend = FlashAttention4().prepare(problem, CPU).attend
    else:
        script = {"torch": torch, "visible": visible, "SCALE": problem.softmax_scale}
        exec(FlashAttention4().standalone(problem, CPU), script)
        attend = script["attend"]
    attend("q", "k", "v")  # type: ignore[arg-type]
    (told,) = calls
    forward, backward = told.pop("block_sparse_tensors"), told.pop("block_sparse_tensors_bwd")
    assert told == {"softmax_scale": problem.softmax_scale, "causal": False}
    assert forward.block_size == backward.block_size == tile
    assert torch.equal(seen(tiles_of(forward), *tile, problem), visible)
    assert torch.equal(seen(tiles_of(backward).transpose(1, 2), *tile, problem), visible)


def test_a_mask_without_blocks_is_told_without_lists(calls: list[dict[str, Any]]) -> None:
    FlashAttention4().prepare(posed("causal"), CPU).attend("q", "k", "v")  # type: ignore[arg-type]
    assert calls == [{"softmax_scale": 0.125, "causal": True}]


@pytest.mark.parametrize(
    ("mask", "head_dim", "capability", "reason"),
    [
        ("blocks(butterfly,128x128)", 128, (9, 0), None),
        ("blocks(butterfly,128x128)", 256, (9, 0), None),
        ("blocks(butterfly,128x64)", 256, (9, 0), None),
        ("blocks(butterfly,64x128)", 64, (9, 0), "blocks of 64x128 are not multiples of its tile, 128x128"),
        ("blocks(butterfly,128x64)", 64, (9, 0), "blocks of 128x64 are not multiples of its tile, 128x128"),
        ("blocks(butterfly,128x128)", 192, (9, 0), "block masks at head_dim 192, neither up to 128 nor 256"),
        ("causal&blocks(butterfly,128x128)", 64, (9, 0), "a band beside blocks needs a mask_mod"),
        ("blocks(butterfly,128x128)", 64, (10, 0), "block masks are passed on to its Hopper kernels alone"),
    ],
)
def test_what_is_refused(mask: str, head_dim: int, capability: tuple[int, int], reason: str | None) -> None:
    device = Device("cuda", capability=capability)
    found = FlashAttention4().unsupported_reasons(posed(mask, head_dim), device)
    assert found == ([] if reason is None else [reason])
