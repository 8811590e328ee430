"""What a device can do, sampled: matrix products, memory at each level, exponentials, the least time of a launch.

A card's clock moves with power and temperature, so a ceiling is a distribution: all of them are sampled in rounds of
random order, each sample with the clock it saw. Libraries are timed where they have the operation, the project's own
kernels where none has.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from attnbench.harness.limits.datasheet import Datasheet
from attnbench.harness.limits.device_kernels import DeviceKernels
from attnbench.harness.measure.ceilings import COPY_BYTES, GEMM_SIZE
from attnbench.harness.measure.clocks import ClockReader, Clocks
from attnbench.harness.measure.timing import Around, take_turn, warm_up
from attnbench.harness.oracle.inputs import torch_dtype

SAMPLES = 3
LEAST_ROUNDS = 3
SUSTAINED_CALLS = 50
BELIEVED = 1.02
"""Times the hardware's own bound; a figure beyond it was not measured but miscounted."""
LAUNCHES_IN_A_ROW = 50
READ_REPEATS = {"l2_read": 200, "hbm_read": 1}
SHARED_REPEATS = 2000
EXP_REPEATS = 2000


@dataclass(frozen=True)
class Ceiling:
    """One thing to sample. work: what a call does, in ``unit`` times milliseconds (0: the figure is the time itself, in
    µs, over ``parts`` launches)."""

    name: str
    title: str
    unit: str
    call: Callable[[], Any]
    work: float = 0.0
    parts: int = 1

    def figure(self, ms: float) -> float:
        return self.work / ms if self.work else 1e3 * ms / self.parts


@dataclass
class Sampled:
    """One ceiling's raw figures, a list a round, with the SM clock and power they saw. why: there is no figure."""

    name: str
    title: str
    unit: str
    rounds: list[list[float]] = field(default_factory=list)
    sm_mhz: list[int | None] = field(default_factory=list)
    power_w: list[float | None] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    datasheet: float | None = None
    why: str = ""

    def add(self, figures: list[float], clocks: Clocks, at_s: float) -> None:
        self.rounds.append(figures)
        self.sm_mhz.append(clocks.sm_mhz)
        self.power_w.append(clocks.power_w)
        self.at_s.append(round(at_s, 3))

    def judge(self) -> None:
        """Refuses what the hardware cannot do."""
        most = max(figure for figures in self.rounds for figure in figures)
        if self.datasheet and most > BELIEVED * self.datasheet:
            self.why = f"not believed: {most:.4g} {self.unit} is beyond the hardware's {self.datasheet:.4g}"


def measure(
    device: torch.device, seconds: float, tell: Callable[[str], None] = lambda _: None
) -> list[Sampled]:
    """Samples every ceiling of the device in rounds for about ``seconds``, at least ``LEAST_ROUNDS`` rounds; then, on a
    GPU, the first of them alone and without a pause for half as long, which is what heat and power leave of it."""
    ceilings, missing = _on_cuda(device) if device.type == "cuda" else (_on_cpu(), [])
    sheet, reader = _sheet_and_reader(device)
    found = {c.name: _empty(c, sheet) for c in ceilings}
    for ceiling in ceilings:
        tell(ceiling.title)
        warm_up(ceiling.call, device)
    order = random.Random(0)
    begin, round_number = time.monotonic(), 0
    while round_number < LEAST_ROUNDS or time.monotonic() - begin < seconds:
        round_number += 1
        tell(f"round {round_number}")
        for ceiling in order.sample(ceilings, len(ceilings)):
            around = Around(rewarm=ceiling.call)
            turn = take_turn([ceiling.call] * SAMPLES, device=device, keep=-1, around=around, clocks=reader)
            figures = [ceiling.figure(ms) for ms in turn.ms]
            found[ceiling.name].add(figures, turn.clocks, time.monotonic() - begin)
    sustained = [_sustained(ceilings[0], device, seconds / 2, sheet, reader)] if device.type == "cuda" else []
    sampled = [*found.values(), *sustained]
    for one in sampled:
        one.judge()
    return sampled + missing


def _empty(ceiling: Ceiling, sheet: Datasheet) -> Sampled:
    return Sampled(
        ceiling.name, ceiling.title, ceiling.unit, datasheet=sheet.figure(ceiling.name, ceiling.unit)
    )


def _sustained(
    ceiling: Ceiling, device: torch.device, seconds: float, sheet: Datasheet, reader: ClockReader | None
) -> Sampled:
    one = dataclasses.replace(_empty(ceiling, sheet), name=f"{ceiling.name}_sustained")
    one.title += f", without a pause for {seconds:.0f} s"
    begin = time.monotonic()
    while not one.rounds or time.monotonic() - begin < seconds:
        calls = [ceiling.call] * SUSTAINED_CALLS
        turn = take_turn(calls, device=device, keep=-1, clocks=reader)
        one.add([ceiling.figure(ms) for ms in turn.ms], turn.clocks, time.monotonic() - begin)
    return one


def to_json(sampled: Sequence[Sampled], environment: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "environment": environment,
        "ceilings": [dataclasses.asdict(one) for one in sampled],
    }


def _sheet_and_reader(device: torch.device) -> tuple[Datasheet, ClockReader | None]:
    if device.type != "cuda":
        return Datasheet(), None
    properties = torch.cuda.get_device_properties(device)
    reader = ClockReader(str(properties.uuid))
    sheet = Datasheet.of(
        properties.name,
        capability=(properties.major, properties.minor),
        sm_count=properties.multi_processor_count,
        max_sm_mhz=reader.facts().get("max_sm_mhz"),
    )
    return sheet, reader


# ---- what is sampled --------------------------------------------------------------------------------------------


def _on_cpu() -> list[Ceiling]:
    device = torch.device("cpu")
    return [_gemm("fp32", device), _gemm("fp64", device), _copy(device)]


def _on_cuda(device: torch.device) -> tuple[list[Ceiling], list[Sampled]]:
    library = [_gemm(name, device) for name in ("bf16", "fp16", "tf32", "fp32", "fp64")] + [_copy(device)]
    try:
        kernels = DeviceKernels(device)
    except ImportError:
        why = "cuda.core is not installed (pip install cuda-core)"
        return library, [Sampled(name, title, unit, why=why) for name, title, unit in OWN]
    return library + _own(kernels, device), []


def _gemm(name: str, device: torch.device) -> Ceiling:
    """torch.matmul of square random-normal matrices; tf32 is fp32 operands on tensor cores."""
    dtype = torch_dtype("fp32" if name == "tf32" else name)
    size = GEMM_SIZE[device.type] // (2 if name in ("fp64", "fp32") and device.type == "cuda" else 1)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(a)

    def call() -> None:
        torch.matmul(a, b, out=product)

    def call_tf32() -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.matmul(a, b, out=product)
        torch.backends.cuda.matmul.fp32_precision = before

    title = f"matrix product, {name}, {size}"
    return Ceiling(f"gemm_{name}", title, "TFLOP/s", call_tf32 if name == "tf32" else call, 2 * size**3 / 1e9)


def _copy(device: torch.device) -> Ceiling:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    title = "copy, bytes read and written" if device.type == "cpu" else "HBM copy, bytes read and written"
    return Ceiling("copy", title, "GB/s", lambda: target.copy_(source), 2 * source.nbytes / 1e6)


OWN = (
    ("hbm_read", "HBM read", "GB/s"),
    ("l2_read", "L2 read", "GB/s"),
    ("shared_read", "shared memory read", "GB/s"),
    ("exp", "exponentials", "Gexp/s"),
    ("launch", "least time of a kernel between events", "µs"),
    ("launch_queued", "kernel after kernel", "µs"),
)
"""Ceilings of the project's own kernels: name, title, unit."""


def _own(kernels: DeviceKernels, device: torch.device) -> list[Ceiling]:
    sms = kernels.sm_count
    sink = torch.zeros(1, dtype=torch.int32, device=device)
    lap = 8 * 2 * sms * 512  # what a grid of two blocks an SM reads in eight loads, in 16-byte words
    # One lap is 17 MB on 132 SMs: a third of the L2, and none of it stays in L1, which .cg passes by.
    buffers = {
        name: torch.zeros(laps * lap * 4, dtype=torch.int32, device=device)
        for name, laps in (("l2_read", 1), ("hbm_read", 64))
    }

    def read(name: str) -> tuple[Callable[[], None], float]:
        data, repeats = buffers[name], np.int32(READ_REPEATS[name])
        count = np.int64(data.nbytes // 16)
        return (
            lambda: kernels.launch("read_global", 2 * sms, 512, data, count, repeats, sink),
            data.nbytes * int(repeats) / 1e6,
        )

    def queued() -> None:
        for _ in range(LAUNCHES_IN_A_ROW):
            kernels.launch("empty", 1, 32)

    work: dict[str, tuple[Callable[[], None], float]] = {
        "hbm_read": read("hbm_read"),
        "l2_read": read("l2_read"),
        "shared_read": (
            lambda: kernels.launch("read_shared", 4 * sms, 256, np.int32(SHARED_REPEATS), sink),
            4 * sms * 256 * 8 * 16 * SHARED_REPEATS / 1e6,
        ),
        "exp": (
            lambda: kernels.launch("exponentials", 2 * sms, 512, np.int32(EXP_REPEATS), sink),
            2 * sms * 512 * 16 * EXP_REPEATS / 1e6,
        ),
        "launch": (lambda: kernels.launch("empty", 1, 32), 0.0),
        "launch_queued": (queued, 0.0),
    }
    parts = {"launch_queued": LAUNCHES_IN_A_ROW}
    return [Ceiling(name, title, unit, *work[name], parts.get(name, 1)) for name, title, unit in OWN]
