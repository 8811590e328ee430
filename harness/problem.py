"""An attention problem: everything that must be fixed before two implementations can be compared.

Words and units are the field's: tensors are BSHD (batch, seqlen, heads, head_dim) wherever they are named;
FLOPs count exact visible pairs; bytes are the least that must move. Cheap to import: no torch, no numpy.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from attnbench.harness.masks import Mask

Direction = Literal["fwd", "bwd", "fwd_bwd"]
DIRECTIONS: tuple[Direction, ...] = ("fwd", "bwd", "fwd_bwd")
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
DTYPES = tuple(DTYPE_BYTES)
LAYOUTS = ("bshd", "bhsd", "packed")
TENSORS = ("q", "k", "v", "dout")

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Problem:
    """One attention problem, valid by construction (ValueError names the field, the value and what is allowed).

    layout: how the BSHD tensors lie in memory: ``bshd`` contiguous, ``bhsd`` a transposed view of contiguous
    (batch, heads, seqlen, head_dim), ``packed`` slices of one (batch, seqlen, heads + 2 kv_heads, head_dim).
    strides: element strides of named tensors (q, k, v, dout) in BSHD order, overriding the layout; 0 is expanded.
    scale: multiplies the scores; None means 1 / sqrt(head_dim).
    direction: ``bwd`` is the backward pass alone, ``fwd_bwd`` both.
    """

    batch: int
    heads: int
    seqlen_q: int
    head_dim: int
    kv_heads: int = 0
    seqlen_k: int = -1
    head_dim_v: int = 0
    dtype: str = "bf16"
    mask: Mask = Mask()
    dropout_p: float = 0.0
    scale: float | None = None
    direction: Direction = "fwd"
    layout: str = "bshd"
    strides: tuple[tuple[str, Shape], ...] = ()

    def __post_init__(self) -> None:
        # Zero and -1 stand for "as the query side has it"; resolved here so that equal problems compare equal.
        for name, value in (
            ("kv_heads", self.kv_heads or self.heads),
            ("seqlen_k", self.seqlen_q if self.seqlen_k < 0 else self.seqlen_k),
            ("head_dim_v", self.head_dim_v or self.head_dim),
        ):
            object.__setattr__(self, name, value)
        for name, least in (
            ("batch", 0), ("heads", 1), ("kv_heads", 1), ("seqlen_q", 0), ("seqlen_k", 0),
            ("head_dim", 1), ("head_dim_v", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}; it must divide heads = {self.heads}")
        for name, allowed in (("dtype", DTYPES), ("direction", DIRECTIONS), ("layout", LAYOUTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"dropout_p is {self.dropout_p!r}; it must lie in [0, 1)")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale!r}; it must be finite or None")
        if self.layout == "packed" and (self.seqlen_q, self.head_dim) != (self.seqlen_k, self.head_dim_v):
            raise ValueError("layout packed needs seqlen_k = seqlen_q and head_dim_v = head_dim")
        for name, strides in self.strides:
            if name not in TENSORS or len(strides) != 4 or min(strides) < 0:
                raise ValueError(
                    f"strides of {name!r} are {strides!r}; name q, k, v or dout and 4 integers >= 0"
                )

    # ---- shapes -------------------------------------------------------------------------------------------

    @property
    def q_shape(self) -> Shape:
        return (self.batch, self.seqlen_q, self.heads, self.head_dim)

    @property
    def k_shape(self) -> Shape:
        return (self.batch, self.seqlen_k, self.kv_heads, self.head_dim)

    @property
    def v_shape(self) -> Shape:
        return (self.batch, self.seqlen_k, self.kv_heads, self.head_dim_v)

    @property
    def out_shape(self) -> Shape:
        return (self.batch, self.seqlen_q, self.heads, self.head_dim_v)

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    # ---- work ---------------------------------------------------------------------------------------------

    @property
    def visible_pairs(self) -> int:
        """Exact visible (query, key) pairs over all batches and query heads."""
        return self.batch * self.mask.visible_pairs(self.heads, self.seqlen_q, self.seqlen_k)

    @property
    def flops(self) -> int:
        """Matrix FLOPs of ``direction``: forward 2A(D + Dv), backward 2A(3D + 2Dv), A the visible pairs."""
        forward = self.head_dim + self.head_dim_v
        backward = 3 * self.head_dim + 2 * self.head_dim_v
        per_pair = {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}[self.direction]
        return 2 * self.visible_pairs * per_pair

    @property
    def minimal_bytes(self) -> int:
        """Least HBM traffic of ``direction``: each operand read once, each result written once, lse in fp32."""
        element = DTYPE_BYTES[self.dtype]
        operands = element * self.batch * (self.head_dim + self.head_dim_v) * (
            self.heads * self.seqlen_q + self.kv_heads * self.seqlen_k
        )  # fmt: skip
        lse = 4 * self.batch * self.heads * self.seqlen_q
        forward, backward = operands + lse, 2 * operands + lse
        return {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}[self.direction]

    @property
    def input_bytes(self) -> int:
        """Bytes of q, k, v, and of dout where the direction needs it."""
        shapes = [self.q_shape, self.k_shape, self.v_shape]
        if self.direction != "fwd":
            shapes.append(self.out_shape)
        return DTYPE_BYTES[self.dtype] * sum(math.prod(shape) for shape in shapes)

    @property
    def minimal_result_bytes(self) -> int:
        """Least memory beyond the inputs: out and lse, and for a backward dq, dk and dv."""
        element = DTYPE_BYTES[self.dtype]
        result = element * math.prod(self.out_shape) + 4 * self.batch * self.heads * self.seqlen_q
        if self.direction != "fwd":
            result += element * sum(math.prod(s) for s in (self.q_shape, self.k_shape, self.v_shape))
        return result

    # ---- names --------------------------------------------------------------------------------------------

    @property
    def group_key(self) -> str:
        """Names the problem without its direction: what shares inputs, an oracle and the same rounds."""
        parts = [f"b{self.batch}", f"h{self.heads}"]
        if self.kv_heads != self.heads:
            parts.append(f"kv{self.kv_heads}")
        parts.append(f"q{self.seqlen_q}")
        if self.seqlen_k != self.seqlen_q:
            parts.append(f"k{self.seqlen_k}")
        parts.append(f"d{self.head_dim}")
        if self.head_dim_v != self.head_dim:
            parts.append(f"dv{self.head_dim_v}")
        parts += [self.dtype, self.mask.label]
        if self.dropout_p:
            parts.append(f"p{self.dropout_p!r}")
        if self.scale is not None:
            parts.append(f"scale{self.scale!r}")
        if self.layout != "bshd":
            parts.append(self.layout)
        parts += [f"{name}{'.'.join(map(str, strides))}" for name, strides in self.strides]
        return "_".join(parts)

    @property
    def key(self) -> str:
        """Unique, readable name of the problem."""
        return f"{self.group_key}_{self.direction}"

    def with_direction(self, direction: Direction) -> Problem:
        return dataclasses.replace(self, direction=direction)

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["mask"] = self.mask.label
        data["strides"] = {name: list(strides) for name, strides in self.strides}
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Problem:
        """Inverse of ``to_json``; absent optional fields take their defaults, an unknown one is a ValueError."""
        if unknown := set(data) - {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"unknown problem field {min(unknown)!r}")
        data = dict(data)
        data["mask"] = Mask.parse(data.get("mask", "full"))
        data["strides"] = tuple((name, tuple(s)) for name, s in sorted(data.get("strides", {}).items()))
        return cls(**data)
