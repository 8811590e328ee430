"""A case: one problem, the check that it is put to, and the bug or question that is the reason for it."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass, field
from typing import Any

from attnbench.harness.problem import Problem
from attnbench.harness.run import suite

Options = dict[str, Any]


@dataclass(frozen=True)
class Case(suite.Case):
    """A conformance suite's case; problem, name, why, inputs and device are as in every suite.

    suite: the suite it is of. check: a name in ``checks.CHECKS``. cites: issues of real libraries, as
    ``flash-attention#282``. options: what the check may be told (``repeats = 200``). nightly: in the larger selection
    only. alone: needs the device to itself. seed: which draw of the inputs.
    """

    suite: str = ""
    check: str = "agrees"
    cites: tuple[str, ...] = ()
    options: Options = field(default_factory=dict, hash=False)
    nightly: bool = False
    alone: bool = False
    seed: int = 0

    @property
    def id(self) -> str:
        """Unique and readable: ``causal/short-queries[agrees,normal,b1_h2_..._fwd]``, a second seed as ``#1``."""
        told = [f"{name}={value}" for name, value in sorted(self.options.items())]
        point = ",".join([self.check, self.inputs, *told, self.problem.key])
        return f"{self.family}[{point}]{f'#{self.seed}' if self.seed else ''}"

    @property
    def family(self) -> str:
        """``causal/short-queries``: what its directions, dtypes and kinds of inputs share."""
        return f"{self.suite}/{self.name}"

    @property
    def question(self) -> str:
        """What its inputs and its right answer depend on: cases with the same one share an oracle."""
        return f"{self.problem.group_key}_{self.inputs}_{self.seed}"

    @property
    def input_seed(self) -> int:
        """Of the inputs: the same for all checks of one question."""
        return zlib.crc32(self.question.encode())

    def with_seed(self, seed: int) -> Case:
        return dataclasses.replace(self, seed=seed)

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"problem": self.problem.to_json(), "cites": list(self.cites)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        """Inverse of ``to_json``."""
        given = {"problem": Problem.from_json(data["problem"]), "cites": tuple(data.get("cites", ()))}
        return cls(**data | given)
