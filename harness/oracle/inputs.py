"""Seeded inputs of a problem: the same values in every process on one kind of device, whatever the layout.

Values are always drawn in contiguous BSHD order, chunk by chunk, and then copied to where the layout wants
them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from attnbench.harness.oracle.chunks import row_major
from attnbench.harness.problem import Problem, Shape

KINDS = ("normal", "needle", "large", "equal", "negative", "overflow")
_LARGE = 8.0
"""Factor of ``large``: scores of standard deviation 64 overflow an exp without its maximum taken off, while
every result of ordinary shapes still fits fp16."""
_OVERFLOW = 1e5
"""Unscaled score of ``overflow``: beyond fp16's 65504, and within it once scaled (head_dim 4 and more)."""
_EDGE = 64
"""Needles stand at multiples of this key count, -1, 0 and +1: every common tile is a multiple of it."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a Problem's dtype name; KeyError for any other."""
    return _DTYPES[name]


@dataclass(frozen=True)
class Inputs:
    """Operands in the problem's dtype: q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv), dout (B, Sq, H,
    Dv)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor | None


def make_inputs(
    problem: Problem, seed: int, device: torch.device, *, dout: bool, kind: str = "normal"
) -> Inputs:
    """Draws the operands; each tensor's values follow from (seed, its name, kind) and its BSHD shape alone.

    kind: ``normal`` is N(0, 1). ``needle`` points each query at one key that the band lets it see, at a tile
    edge -1, 0, +1 or at an end of its band, so that one dropped key moves its row; a block pattern may still
    hide it. ``large`` is N(0, 1) times 8. The others change q and k alone: ``equal`` is 1 everywhere, so that all
    keys weigh the same; ``negative`` makes every score strongly negative, so that exp of any underflows without its
    maximum taken off; ``overflow`` has scores of about 1e5 before they are scaled. Along a dimension of stride 0 the
    values at its first index repeat. Gaps that ``strides`` leave between elements hold NaN, so reading one shows.
    Raises ValueError for an unknown kind and for strides that put two elements in one place.
    """
    if kind not in KINDS:
        raise ValueError(f"inputs kind {kind!r} is not one of {', '.join(KINDS)}")
    q, k, v = _operands(problem, device)
    factor, middle_q, middle_k = spread(kind, problem.head_dim)
    values_factor = _LARGE if kind == "large" else 1.0
    _draw(k, _generator(seed, "k", device), factor, middle_k)
    _draw(v, _generator(seed, "v", device), values_factor)
    if kind == "needle" and problem.seqlen_k:
        _point_at_needles(q, k, problem, seed)
    else:
        _draw(q, _generator(seed, "q", device), factor, middle_q)
    gradient = None
    if dout:
        gradient = _allocate(problem, "dout", problem.out_shape, device)
        _draw(gradient, _generator(seed, "dout", device), values_factor)
    return Inputs(q, k, v, gradient)


def spread(kind: str, head_dim: int) -> tuple[float, float, float]:
    """Standard deviation of the elements of q and k, the mean of q's, and the mean of k's."""
    match kind:
        case "large":
            return _LARGE, 0.0, 0.0
        case "equal":
            return 0.0, 1.0, 1.0
        case "negative":
            return 0.5, 6.0, -6.0  # scores of -36 sqrt(head_dim), give or take 4
        case "overflow":
            middle = math.sqrt(_OVERFLOW / head_dim)
            return middle / 2, middle, middle  # scores differ by a tenth of themselves
    return 1.0, 0.0, 0.0


def seed_of(seed: int, name: str) -> int:
    """Seed of the generator that draws one tensor."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_of(seed, name))


# ---- where the values lie ---------------------------------------------------------------------------------


def _operands(problem: Problem, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = {"q": problem.q_shape, "k": problem.k_shape, "v": problem.v_shape}
    views: dict[str, torch.Tensor] = {}
    if problem.layout == "packed":
        heads, kv_heads = problem.heads, problem.kv_heads
        packed = torch.empty(
            (problem.batch, problem.seqlen_q, heads + 2 * kv_heads, problem.head_dim),
            dtype=torch_dtype(problem.dtype),
            device=device,
        )
        views = dict(zip("qkv", packed.split([heads, kv_heads, kv_heads], dim=2), strict=True))
    overridden = dict(problem.strides)
    q, k, v = (
        views[name] if name in views and name not in overridden else _allocate(problem, name, shape, device)
        for name, shape in shapes.items()
    )
    return q, k, v


def _allocate(problem: Problem, name: str, shape: Shape, device: torch.device) -> torch.Tensor:
    dtype = torch_dtype(problem.dtype)
    strides = dict(problem.strides).get(name)
    if strides is not None:
        _refuse_overlap(name, shape, strides)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        memory = torch.full((max(extent, 0),), math.nan, dtype=dtype, device=device)
        return memory.as_strided(shape, strides)
    if problem.layout == "bhsd":
        batch, seqlen, heads, head_dim = shape
        return torch.empty((batch, heads, seqlen, head_dim), dtype=dtype, device=device).transpose(1, 2)
    return torch.empty(shape, dtype=dtype, device=device)


def _refuse_overlap(name: str, shape: Shape, strides: Shape) -> None:
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride:
            if stride <= reach:
                raise ValueError(f"strides {strides} of {name} {shape} put two elements in one place")
            reach += (size - 1) * stride


# ---- the values -------------------------------------------------------------------------------------------


def _draw(target: torch.Tensor, generator: torch.Generator, factor: float, middle: float = 0.0) -> None:
    """Fills ``target`` with middle + factor * N(0, 1), drawn in its own dtype in BSHD order."""
    for batch, rows in row_major(tuple(target.shape)):
        piece = target[batch, rows]
        values = torch.empty(piece.shape, dtype=target.dtype, device=target.device)
        values.normal_(generator=generator)
        if factor != 1.0:
            values.mul_(factor)
        _store(target, batch, rows, values.add_(middle) if middle else values)


def _store(target: torch.Tensor, batch: slice, rows: slice, values: torch.Tensor) -> None:
    """Copies a chunk to its place; of an expanded dimension only index 0 exists in memory and is written."""
    kept = [slice(0, 1) if stride == 0 else slice(None) for stride in target.stride()]
    first = [0 if start is None else start for start in (batch.start, rows.start)]
    if any(kept[dim].stop == 1 and first[dim] > 0 for dim in (0, 1)):
        return
    target[batch, rows][tuple(kept)].copy_(values[tuple(kept)])


def _point_at_needles(q: torch.Tensor, k: torch.Tensor, problem: Problem, seed: int) -> None:
    """Sets each query to a multiple of its needle key, large enough to hold most of the row's probability."""
    needles, gain = needle_keys(problem, seed, q.device)
    kv_head = torch.arange(problem.heads, device=q.device) // (problem.heads // problem.kv_heads)
    for batch, rows in row_major(tuple(q.shape)):
        keys = needles[rows]
        values = torch.stack([k[b][keys, kv_head] for b in range(batch.start, batch.stop)])
        _store(q, batch, rows, (values.float() * gain).to(q.dtype))


def needle_keys(problem: Problem, seed: int, device: torch.device) -> tuple[torch.Tensor, float]:
    """The key each query points at, int64 (Sq, H): an edge of its band or a tile edge -1, 0, +1 within it; and the
    factor that makes a query of it.

    A needle that scores log(seqlen_k) + 4 weighs e^4 times all the other keys at score 0 together.
    """
    scale = problem.softmax_scale
    gain = (math.log(problem.seqlen_k) + 4) / (scale * problem.head_dim) if scale else 1.0
    generator = _generator(seed, "q", device)
    seqlen_k, heads = problem.seqlen_k, problem.heads
    edges = torch.arange(0, seqlen_k + _EDGE, _EDGE, device=device)
    edges = (edges[:, None] + torch.arange(-1, 2, device=device)).flatten()
    edges = edges[(edges >= 0) & (edges < seqlen_k)].unique()
    bounds = problem.mask.row_bounds(problem.seqlen_q, seqlen_k)
    first, last = (torch.from_numpy(bound).to(device) for bound in bounds)
    final = torch.maximum(last - 1, first).clamp_(max=seqlen_k - 1)
    low, high = torch.searchsorted(edges, first), torch.searchsorted(edges, last)
    pick = torch.rand((problem.seqlen_q, heads), generator=generator, device=device, dtype=torch.float64)
    index = low[:, None] + (pick * (high - low)[:, None]).long()
    tile_edge = edges[index.clamp_(max=len(edges) - 1)]
    keys = torch.where((high > low)[:, None], tile_edge, final[:, None])
    # One query in four looks at each end of its own band, where an off-by-one of the mask would show.
    turn = (torch.arange(problem.seqlen_q, device=device)[:, None] + torch.arange(heads, device=device)) % 4
    keys = torch.where(turn == 0, final[:, None], keys)
    return torch.where(turn == 1, first[:, None].clamp(max=seqlen_k - 1), keys), gain


def judging_dout(inputs: Inputs, rows: torch.Tensor) -> torch.Tensor:
    """dout with every query row outside ``rows`` zeroed: dout itself when ``rows`` are all, else a copy.

    The copy keeps the layout, save that an expanded dout becomes contiguous. ValueError without a dout.
    """
    if inputs.dout is None:
        raise ValueError("these inputs were made without dout")
    if len(rows) == inputs.dout.shape[1]:
        return inputs.dout
    outside = torch.ones(inputs.dout.shape[1], dtype=torch.bool)
    outside[rows.cpu()] = False
    expanded = 0 in inputs.dout.stride()
    dout = inputs.dout.contiguous() if expanded else _copy_in_layout(inputs.dout)
    dout[:, outside.to(dout.device)] = 0
    return dout


def _copy_in_layout(tensor: torch.Tensor) -> torch.Tensor:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((max(extent, 0),), (1,)).clone()
    return memory.as_strided(tensor.shape, tensor.stride())
