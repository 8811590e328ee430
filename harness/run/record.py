"""What a run leaves behind: one record a cell, one a group. Illegal records cannot be built.

A *cell* is one implementation on one problem. A *group* is one problem, in all its directions, with all its
implementations: judged against one oracle result and timed in the same interleaved rounds. A missing figure is
None, never 0. Samples are raw: no statistic is stored, so none can disagree with the samples.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from attnbench.harness.problem import Problem

SCHEMA = 1


class Status(StrEnum):
    """How a cell ended; a closed set."""

    OK = "OK"
    UNSUPPORTED = "UNSUPPORTED"  # the implementation declares it cannot; reasons are its own
    UNAVAILABLE = "UNAVAILABLE"  # it cannot run on this machine at all
    INCORRECT = "INCORRECT"  # judged wrong; never timed, never ranked
    OOM = "OOM"  # device or host memory ran out, alone on the device
    TIMEOUT = "TIMEOUT"  # did not answer within the time limit; its worker was killed
    CRASHED = "CRASHED"  # its worker died
    ERROR = "ERROR"  # raised an exception


class RecordError(ValueError):
    """A record that breaks an invariant, or a line that is none."""


@dataclass(frozen=True)
class TensorError:
    """One judged tensor against the oracle, absolute errors; bad when an error exceeds its budget.

    first_bad is the first coordinate over the max budget (BSHD; lse: batch, head, row), or where the error is largest
    when only the mean is over; got and want are the values there. mean_want: of a bad tensor, the mean size of what the
    oracle says, which makes its mean error relative.
    """

    max_error: float | None
    mean_error: float | None
    max_budget: float
    mean_budget: float
    ok: bool
    first_bad: tuple[int, ...] | None = None
    got: float | None = None
    want: float | None = None
    mean_want: float | None = None

    def __post_init__(self) -> None:
        if not self.ok and self.first_bad is None:
            raise RecordError("a tensor judged bad names its first bad coordinate")


@dataclass(frozen=True)
class Judgement:
    """tensors: out, lse, dq, dk, dv as judged. rows: how many query rows of each head were judged, of rows_total."""

    tensors: dict[str, TensorError]
    rows: int
    rows_total: int

    @property
    def ok(self) -> bool:
        return all(tensor.ok for tensor in self.tensors.values())

    @property
    def finite(self) -> bool:
        """Whether every error is a number: what is asked of an approximation."""
        return all(tensor.max_error is not None for tensor in self.tensors.values())


@dataclass(frozen=True)
class Timing:
    """Raw samples, one list a round (round r of every cell of the group saw the same card), in ms.

    host_us: host time to queue one call, per round (None where host and device time are one, on a CPU).
    clocks: per round, as read while the samples ran: SM MHz, watts, degrees C, throttle reason bits; None unread.
    unheld: samples thrown away because the stream could not be held until all launches were queued.
    checked: timed calls whose own outputs were compared with the oracle after the round.
    inputs: sets of inputs that the timed calls rotated through; renewed: whether each set was changed after every call,
    so that no two calls had the same inputs; None in records that do not say. Of a ``bwd`` call dout alone is changed:
    it goes back over the graph of a forward that was run once, and what that kept may be used again.
    """

    rounds: list[list[float]]
    mode: str
    host_us: list[float | None] = field(default_factory=list)
    sm_mhz: list[int | None] = field(default_factory=list)
    power_w: list[float | None] = field(default_factory=list)
    temperature_c: list[int | None] = field(default_factory=list)
    throttle: list[int | None] = field(default_factory=list)
    warmup_calls: int = 0
    unheld: int = 0
    checked: int = 0
    inputs: int | None = None
    renewed: bool | None = None

    def __post_init__(self) -> None:
        if not self.rounds or not all(turn and all(0 < ms < math.inf for ms in turn) for turn in self.rounds):
            raise RecordError("a timing holds at least one round and every sample is finite and above 0 ms")

    @property
    def way(self) -> str:
        """How it was timed; times of two ways are not compared."""
        return f"{self.mode}, on inputs that {'were new for every call' if self.renewed else 'came back'}"


@dataclass(frozen=True)
class Memory:
    """Measured alone on the device, in MiB: peak beyond the inputs by torch's allocator, the driver's own figure for
    the same call (None where there is none), and the analytic least (results only). setup_mib: what set-up and first
    call left held by torch's allocator, which stands beneath the peak and not in it; None where it was not measured.
    """

    peak_mib: float | None
    driver_mib: float | None
    minimum_mib: float
    setup_mib: float | None = None


@dataclass(frozen=True)
class Energy:
    """What the card's own counter moved by while calls followed one another, idle power included."""

    joules: float
    calls: int
    seconds: float

    def __post_init__(self) -> None:
        if not (self.calls > 0 and self.seconds > 0 and self.joules >= 0):
            raise RecordError("energy is of at least one call and some time, and not negative")


@dataclass(frozen=True)
class Cell:
    """One implementation on one problem. reasons: why it is not OK, one line each. evidence: longer text (a
    traceback's end). judgement: None where none was reached, and for an answer of the wrong form (shape, dtype,
    inputs written to), which is INCORRECT without figures. prepare_ms, first_call_ms: set-up, and the first call
    with any compilation. source: the hash of ``run.source``; empty in records that do not say. approximate: the errors
    in its judgement are a figure and not a verdict.
    """

    run: str
    suite: str
    case: str
    group: str
    impl: str
    impl_version: str
    device: str
    problem: Problem
    status: Status
    reasons: list[str] = field(default_factory=list)
    evidence: str = ""
    judgement: Judgement | None = None
    prepare_ms: float | None = None
    first_call_ms: float | None = None
    timing: Timing | None = None
    memory: Memory | None = None
    warnings: list[str] = field(default_factory=list)
    source: str = ""
    approximate: bool = False
    energy: Energy | None = None

    def __post_init__(self) -> None:
        if (self.status is Status.OK) == bool(self.reasons):
            raise RecordError(
                f"{self.id}: {self.status} with reasons {self.reasons!r}; all but OK need one, OK none"
            )
        if self.timing and self.status is not Status.OK:
            raise RecordError(f"{self.id}: {self.status} carries samples; only OK may")
        right = self.judgement and (self.judgement.finite if self.approximate else self.judgement.ok)
        if self.status is Status.OK and not right:
            raise RecordError(f"{self.id}: OK without having been judged right")
        if self.status is Status.INCORRECT and self.judgement and self.judgement.ok:
            raise RecordError(f"{self.id}: INCORRECT with a judgement that passed")

    @property
    def id(self) -> str:
        return f"{self.impl}/{self.problem.key}"


@dataclass(frozen=True)
class Ceilings:
    """What the card could do in the same rounds: GEMM TFLOP/s in the group's dtype, copy GB/s (read + written)."""

    gemm_tflops: list[list[float]]
    copy_gbs: list[list[float]]


@dataclass(frozen=True)
class Group:
    """Closes a group: written after its cells, so that a group without it is open and is run again on resume.

    cells: ids of all its cells. ceilings, order: by direction, since each direction has rounds of its own; order
    holds per round the implementations (and the referee, for the ceilings) as they were measured.
    oracle_ms: cost of the reference. phases: seconds of wall time by phase: start, prepare, oracle, judge, ``time``
    and the direction, other; and in the first group of a device, compile ahead.
    foreign: other processes seen on the GPU while it was timed, as ``pid name``; None where nobody could tell (no
    GPU, no NVML, a container that hides the pids).
    """

    run: str
    suite: str
    case: str
    why: str
    group: str
    device: str
    cells: list[str]
    seed: int
    oracle_ms: float | None = None
    ceilings: dict[str, Ceilings] = field(default_factory=dict)
    order: dict[str, list[list[str]]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    foreign: list[str] | None = None


Record = Cell | Group


def to_json(record: Record) -> dict[str, Any]:
    """A JSON-able dict with ``schema`` and ``kind``."""
    kind = "cell" if isinstance(record, Cell) else "group"
    fields: dict[str, Any] = to_plain(record)
    return {"schema": SCHEMA, "kind": kind} | fields


def from_json(data: dict[str, Any]) -> Record:
    """Inverse of ``to_json``; RecordError for an unknown schema or kind, a missing field, a broken invariant."""
    schema, kind = data.get("schema"), data.get("kind")
    if schema != SCHEMA:
        raise RecordError(
            f"record schema {schema!r} is not {SCHEMA}, the one this version of attnbench reads"
        )
    if kind not in ("cell", "group"):
        raise RecordError(f"record kind {kind!r} is neither cell nor group")
    data = {name: value for name, value in data.items() if name not in ("schema", "kind")}
    try:
        if kind == "group":
            ceilings = {name: Ceilings(**value) for name, value in data.get("ceilings", {}).items()}
            return Group(**data | {"ceilings": ceilings})
        data["problem"] = Problem.from_json(data["problem"])
        data["status"] = Status(data["status"])
        if judgement := data.get("judgement"):
            data["judgement"] = judgement_from_json(judgement)
        for name, cls in (("timing", Timing), ("memory", Memory), ("energy", Energy)):
            data[name] = cls(**data[name]) if data.get(name) else None
        return Cell(**data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"malformed {kind} record: {error}") from error


def judgement_from_json(data: dict[str, Any]) -> Judgement:
    """Inverse of ``to_plain`` for a Judgement."""
    return Judgement(**(data | {"tensors": {name: _tensor_error(t) for name, t in data["tensors"].items()}}))


def _tensor_error(data: dict[str, Any]) -> TensorError:
    first_bad = data.get("first_bad")
    return TensorError(**(data | {"first_bad": None if first_bad is None else tuple(first_bad)}))


def to_plain(value: Any) -> Any:
    """JSON values of a record's field: dataclasses as objects, floats to five digits, not-a-number as None."""
    if isinstance(value, Problem):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        # Five significant digits of a sample are a hundredth of its noise; records stay a third smaller.
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
