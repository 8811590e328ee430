"""What an implementation is: data about what it can do, and one function that prepares it for a problem.

A plugin module should import nothing heavy at its top (torch, its own library): the harness reads capabilities
in processes that never run a kernel. ``prepare`` runs in the implementation's own worker process.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from attnbench.harness.problem import Problem
from attnbench.harness.two_level import Accesses, TwoLevelMemory

if TYPE_CHECKING:
    import torch

CONTRACT_VERSION = 1
"""Raised when a plugin written for the previous version could misbehave; the registry refuses older plugins."""

TUNED_VARIABLE = "ATTNBENCH_TUNED"
"""Names the table of ``bench tune`` that an implementation with ``candidates`` reads in place of its own rules."""

Attend = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
AttendWithLse = Callable[
    ["torch.Tensor", "torch.Tensor", "torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]
]


@dataclass(frozen=True)
class Device:
    """Where a problem is posed. kind is ``cuda`` or ``cpu``; capability is CUDA's, (0, 0) elsewhere."""

    kind: str
    index: int = 0
    name: str = ""
    capability: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.kind != "cpu" else "cpu"


@dataclass(frozen=True)
class Unavailable:
    """Why an implementation cannot run on this machine at all, and what would change that; one line each."""

    reason: str
    fix: str = ""

    @property
    def line(self) -> str:
        return f"{self.reason} ({self.fix})" if self.fix else self.reason


@dataclass(frozen=True)
class Capabilities:
    """What an implementation declares it computes rightly. Conformance holds it to this in both directions.

    masks are ``Mask.kind`` words. alignments matter only where a band meets seqlen_q != seqlen_k.
    compute_capability is the (lowest, highest) allowed on CUDA, inclusive. contiguous_head_dim and stride_multiple
    (of elements) are about q, k and v: whether head_dim must be the dense dimension, and what divides other strides.
    """

    devices: tuple[str, ...] = ("cuda",)
    compute_capability: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (99, 9))
    dtypes: tuple[str, ...] = ("fp16", "bf16")
    masks: tuple[str, ...] = ("full", "causal")
    alignments: tuple[str, ...] = ("bottom_right",)
    head_dim_multiple: int = 8
    max_head_dim: int = 256
    head_dim_v_differs: bool = False
    gqa: bool = True
    dropout: bool = False
    backward: bool = True
    repeats: tuple[str, ...] = ("fwd",)
    min_seqlen: int = 1
    contiguous_head_dim: bool = False
    stride_multiple: int = 1

    def reasons(self, problem: Problem, device: Device) -> list[str]:
        """Every declared limit that ``problem`` on ``device`` breaks, one sentence each; empty if none."""
        found = []

        def need(ok: bool, reason: str) -> None:
            if not ok:
                found.append(reason)

        mask = problem.mask
        low, high = self.compute_capability
        need(device.kind in self.devices, f"runs on {'/'.join(self.devices)}, not {device.kind}")
        if device.kind == "cuda" and "cuda" in self.devices:
            need(
                low <= device.capability <= high,
                f"needs compute capability {_dotted(low)} to {_dotted(high)}, this is {_dotted(device.capability)}",
            )
        need(problem.dtype in self.dtypes, f"dtype {problem.dtype} not in {'/'.join(self.dtypes)}")
        need(mask.kind in self.masks, f"mask {mask.kind} not in {'/'.join(self.masks)}")
        need(
            not mask.banded or problem.seqlen_q == problem.seqlen_k or mask.alignment in self.alignments,
            f"{mask.kind} alignment {mask.alignment} with seqlen_q != seqlen_k not in {'/'.join(self.alignments)}",
        )
        for name in ("head_dim", "head_dim_v"):
            size = getattr(problem, name)
            need(size <= self.max_head_dim, f"{name} {size} exceeds {self.max_head_dim}")
            multiple = self.head_dim_multiple
            need(size % multiple == 0, f"{name} {size} is not a multiple of {multiple}")
        need(
            self.head_dim_v_differs or problem.head_dim == problem.head_dim_v,
            f"head_dim_v {problem.head_dim_v} differs from head_dim {problem.head_dim}",
        )
        need(self.gqa or problem.heads == problem.kv_heads, "kv_heads differs from heads (GQA)")
        need(self.dropout or problem.dropout_p == 0, f"dropout_p {problem.dropout_p:g} is not supported")
        need(self.backward or problem.direction == "fwd", "has no backward pass")
        for name, strides in problem.strides:
            if name != "dout":
                need(
                    not self.contiguous_head_dim or strides[3] == 1,
                    f"last dimension of {name} is not contiguous",
                )
                uneven = any(stride % self.stride_multiple for stride in strides[:3])
                need(not uneven, f"strides of {name} are not multiples of {self.stride_multiple} elements")
        shortest = min(problem.seqlen_q, problem.seqlen_k)
        need(shortest >= self.min_seqlen, f"sequence length {shortest} is below {self.min_seqlen}")
        return found


class Unsupported(NotImplementedError):
    """A problem outside of what the implementation declares; the message holds its reasons."""


@dataclass(frozen=True)
class Dropout:
    """What an implementation really does when it is asked for dropout: what recovered masks are held against.

    probability: that a weight is dropped. scale: what the kept ones are multiplied by.
    """

    probability: float
    scale: float

    @classmethod
    def by_bytes(cls, p: float) -> Dropout:
        """FlashAttention-2's rule: a weight is kept where a random byte is at most 255 (1 - p), rounded down, and is
        scaled by 1 / (1 - p) whatever share that is."""
        return cls(1 - (math.floor(255 * (1 - p)) + 1) / 256, 1 / (1 - p))


@dataclass(frozen=True)
class Prepared:
    """An implementation made ready for one problem on one device.

    attend(q, k, v) -> out, all BSHD, differentiable by torch.autograd in q, k and v when the problem's direction
    is not ``fwd``; it is what gets timed. It must leave its inputs alone and may be called any number of times.
    attend_with_lse(q, k, v) -> (out, lse), lse fp32 (batch, heads, seqlen_q) in natural log: judged where given.
    """

    attend: Attend
    attend_with_lse: AttendWithLse | None = None


@dataclass(frozen=True)
class Modelled:
    """An implementation's algorithm on a modelled two-level memory, whose every access is counted while it runs.

    attend: as in ``Prepared``. forward, backward: closed forms of what each pass will have moved.
    """

    attend: Attend
    forward: Accesses
    backward: Accesses


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of one configuration.

    registers: of the kernel that takes most. spill_bytes: stored and loaded for want of registers, and stack frames.
    code_bytes: of machine code. cached: it was there, and nothing was compiled. problems: why it is not fit for use,
    a line each; empty where it is. log: the compiler's. None is what the compiler does not tell.
    """

    registers: int | None = None
    spill_bytes: int | None = None
    code_bytes: int | None = None
    cached: bool = False
    problems: tuple[str, ...] = ()
    log: str = ""


Build = Callable[[], Compiled]
"""Compiles one configuration to where first calls look for it, or raises. It is pickled, to run in another process."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a problem, of those that an implementation chooses among.

    label: as tables show it. key: what the choice depends on, choice: what it is; both plain JSON objects, which
    ``bench tune`` keeps for the implementation to read. using(): while it is entered, every call of this process, a
    backward included, computes in this way.
    """

    label: str
    key: Mapping[str, Any]
    choice: Mapping[str, Any]
    using: Callable[[], AbstractContextManager[object]]


class Implementation(ABC):
    """One attention implementation. Subclass it, or instantiate one class several times for variants.

    name: as registered. contract: the CONTRACT_VERSION the plugin was written for, as a literal number.
    package: the distribution that ships the kernels, for availability and version; empty for plain code.
    compile_processes: how many processes may compile its problems side by side before a run; more than 1 only where
    compilation is slow and compiled code passes from process to process through a cache on disk.
    approximate: registered as an approximation: its error is reported, and no answer but a malformed one is wrong.
    """

    name: str
    contract: ClassVar[int]
    capabilities: Capabilities
    package: str = ""
    summary: str = ""
    compile_processes: int = 1
    approximate: bool = False

    def unavailable(self, device: Device) -> Unavailable | None:
        """Why it cannot run on this machine, or None. Must not import anything heavy or raise."""
        if device.kind not in self.capabilities.devices:
            kinds = "/".join(self.capabilities.devices)
            return Unavailable(
                f"runs on {kinds}, and this run is on {device.kind}", f"run with --device {kinds}"
            )
        return None

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        """Why this problem cannot be posed to it on this device; empty means it must be answered rightly."""
        return self.capabilities.reasons(problem, device)

    def repeats(self, device: Device) -> tuple[str, ...]:
        """The directions (``fwd``, ``bwd``) whose results repeat bit for bit from equal inputs on ``device``."""
        return self.capabilities.repeats

    def dropout_effective(self, p: float) -> Dropout:
        """Its dropout when asked for probability ``p``, where its random numbers have fewer levels than ``p`` has."""
        return Dropout(p, 1 / (1 - p))

    def require(self, problem: Problem, device: Device) -> None:
        """Raises Unsupported with the reasons, for a problem outside of what is declared.

        The first line of a ``prepare`` whose library would not refuse the problem by itself: conformance asks for
        what is declared unsupported all the same, and takes an error or a right answer.
        """
        if reasons := self.unsupported_reasons(problem, device):
            raise Unsupported("; ".join(reasons))

    @abstractmethod
    def prepare(self, problem: Problem, device: Device) -> Prepared:
        """Set up for one problem: imports, plans, block masks. Compilation may happen here or in a first call.

        Called in the worker process on the right device; its time is reported apart and never charged to the kernel.
        """

    def builds(self) -> Mapping[str, Build]:
        """Every configuration that a call may need compiled, by a name without spaces; needs no GPU, imports no torch.

        Empty where what is compiled is only known when it is called. Raises Unsupported where the compiler is missing.
        """
        return {}

    def candidates(self, problem: Problem, device: Device) -> Sequence[Candidate]:
        """The ways to compute ``problem`` on ``device`` that are worth a try, the one that it chooses unasked first.

        Called in the worker process, as ``prepare`` is. Empty where there is nothing to choose.
        """
        return ()

    def modelled(self, problem: Problem, memory: TwoLevelMemory) -> Modelled | None:
        """The algorithm in plain torch on a CPU, counting into ``memory``; None where there is no such form of it."""
        return None

    def standalone(self, problem: Problem, device: Device) -> str:
        """Python source that defines ``attend(q, k, v)`` for the problem with torch and the library alone; or nothing.

        It goes into scripts that show a failing case to the library's authors. It may use ``visible``, bool (1 or
        heads, seqlen_q, seqlen_k), and define ``attend_with_lse`` as well.
        """
        return ""

    def version(self) -> str:
        """Version of what is measured: the package's, or attnbench's own for plain code."""
        try:
            return importlib.metadata.version(self.package or "attnbench")
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def missing_module(module: str, fix: str) -> Unavailable | None:
    """Unavailable when the dotted name ``module`` cannot be found; nothing is imported, not even its parents."""
    path = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:depth]), path)
        if spec is None:
            return Unavailable(f"module {module} is not installed", fix)
        path = spec.submodule_search_locations
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
