"""Problem families: what a ranking speaks of. Problems of one family differ in their lengths, batch and heads alone."""

from __future__ import annotations

from dataclasses import dataclass

from attnbench.harness.masks import KINDS
from attnbench.harness.problem import DIRECTIONS, Problem
from attnbench.harness.report.tables import DIRECTION_TITLES

MOST_DECODE_QUERIES = 16
"""With so few queries against many more keys, a call is bound by reading K and V, whatever the kernel does."""


@dataclass(frozen=True)
class Family:
    """direction, mask kind, head_dim and dtype of its problems. more: what else sets them apart, in words."""

    direction: str
    mask: str
    head_dim: int
    dtype: str
    more: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A name that may stand in an address."""
        words = [self.direction, self.mask, f"d{self.head_dim}", self.dtype, *self.more]
        return "-".join("".join(c if c.isalnum() else "-" for c in word).strip("-") for word in words)

    @property
    def short(self) -> str:
        """The head of a column, where the direction is told already."""
        return " ".join([self.mask.replace("_", "-"), str(self.head_dim), *self.more])

    @property
    def title(self) -> str:
        mask = self.mask.replace("_", "-")
        words = [DIRECTION_TITLES[self.direction], mask, f"head_dim {self.head_dim}", self.dtype, *self.more]
        return ", ".join(words)

    @property
    def order(self) -> tuple[object, ...]:
        """Sorts as a reader expects: forward first, full before causal, plain before special, small before large."""
        mask = KINDS.index(self.mask)
        return (DIRECTIONS.index(self.direction), self.more, mask, self.head_dim, self.dtype)


def capitalize_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def family_of(problem: Problem) -> Family:
    """The family that ``problem`` belongs to."""
    decode = problem.seqlen_q <= MOST_DECODE_QUERIES < problem.seqlen_k
    more = {
        "decode": decode,
        "unequal lengths": not decode and problem.seqlen_q != problem.seqlen_k,
        f"{problem.heads // problem.kv_heads} heads a kv head": problem.heads != problem.kv_heads,
        f"head_dim_v {problem.head_dim_v}": problem.head_dim_v != problem.head_dim,
        "dropout": bool(problem.dropout_p),
        "top-left": problem.mask.banded
        and problem.seqlen_q != problem.seqlen_k
        and problem.mask.alignment == "top_left",
        problem.layout: problem.layout != "bshd",
        "strided": bool(problem.strides),
    }
    return Family(
        direction=problem.direction,
        mask=problem.mask.kind,
        head_dim=problem.head_dim,
        dtype=problem.dtype,
        more=tuple(word for word, holds in more.items() if holds),
    )
