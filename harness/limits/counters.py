"""What an implementation really moves: DRAM and L2 bytes by the GPU's own counters, through Nsight Compute.

Each implementation runs in one process under ``ncu``, alone, and calls every problem once, from an L2 that holds other
data. The clock is left as it is, and so are the caches between the kernels of a call. What the call has written and L2
still holds at its end is written back by a read that follows, and counted as the call's.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnbench.harness.problem import Problem
from attnbench.harness.run.process import environment_of, python_module

READ, WRITE, L2 = "dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_bytes.sum"
METRICS = (READ, WRITE, L2)
MARKER = "FillFunctor<c10::complex"
"""In the name of the kernel that stands before and after each call."""
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
TIME_LIMIT_S = 180.0
PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute", "/usr/local/NVIDIA-Nsight-Compute")


class NoCounters(Exception):
    """Why nothing can be counted, and what would change that; one line."""


@dataclass(frozen=True)
class Counted:
    """One call: bytes by the counters, kernels in order. reason: why there are none."""

    impl: str
    version: str
    problem: Problem
    dram_read: float | None = None
    dram_write: float | None = None
    l2: float | None = None
    kernels: list[str] = field(default_factory=list)
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"problem": self.problem.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Counted:
        return cls(**data | {"problem": Problem.from_json(data["problem"])})


@dataclass(frozen=True)
class Kernel:
    name: str
    read: float
    write: float
    l2: float


def find_ncu() -> str:
    """Path of Nsight Compute's command; NoCounters where it is not installed."""
    if found := shutil.which("ncu"):
        return found
    for place in PLACES:
        for path in sorted(Path(place).rglob("ncu"), reverse=True) if Path(place).is_dir() else ():
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    raise NoCounters("hardware counters need Nsight Compute, and no ncu is on PATH (install nsight-compute)")


def count(
    impls: Sequence[str],
    problems: Sequence[Problem],
    device: str,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Counted]:
    """Counts every implementation on every problem, an implementation at a time; NoCounters where none can be."""
    ncu = find_ncu()
    for impl in impls:
        tell(impl)
        yield from _count_one(ncu, impl, problems, device)


def _count_one(ncu: str, impl: str, problems: Sequence[Problem], device: str) -> list[Counted]:
    with tempfile.TemporaryDirectory(prefix="attnbench-ncu-") as scratch:
        answers, log = Path(scratch, "answers.json"), Path(scratch, "ncu.csv")
        spec = {
            "impl": impl, "device": device, "answers": str(answers), "problems": [p.to_json() for p in problems],
        }  # fmt: skip
        command = [
            ncu, "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off",
            "--target-processes", "application-only", "--metrics", ",".join(METRICS),
            "--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "demangled",
            "--log-file", str(log),
            *python_module("attnbench.harness.limits.counted_call", json.dumps(spec)),
        ]  # fmt: skip
        said = _run(command, environment_of(impl))
        text = log.read_text(errors="replace") if log.exists() else ""
        found = json.loads(answers.read_text()) if answers.exists() else {}
    if "ERR_NVGPUCTRPERM" in text:
        raise NoCounters(
            "this user may not read the GPU's counters (ERR_NVGPUCTRPERM: run as root, or ask for it)"
        )
    if "refused" in found:
        return [Counted(impl, "unknown", problem, reason=found["refused"]) for problem in problems]
    return gather(impl, problems, found, read_csv(text.splitlines()), said)


def _run(command: list[str], environment: dict[str, str]) -> str:
    """Runs ``command`` in a session of its own; the last line it said, or that it ran into the time limit."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"did not end within {TIME_LIMIT_S:.0f} s"
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"ended with exit code {process.returncode}"


def gather(
    impl: str, problems: Sequence[Problem], found: dict[str, Any], kernels: Sequence[Kernel], said: str
) -> list[Counted]:
    """Kernels between markers to calls. found: the process's own answers, which may end early; said: its last words."""
    version, outcomes = found.get("version", "unknown"), found.get("problems", [])
    outcomes = [*outcomes, *[f"its process was lost: {said}"] * (len(problems) - len(outcomes))]
    calls = iter(between_markers(kernels))
    counted = []
    for problem, why in zip(problems, outcomes, strict=True):
        call = None if why else next(calls, None)
        if call is None:
            reason = why or f"ncu reported no kernels of this call: {said}"
            counted.append(Counted(impl, version, problem, reason=reason))
            continue
        own, after = call
        counted.append(
            Counted(
                impl,
                version,
                problem,
                dram_read=sum(kernel.read for kernel in own),
                dram_write=sum(kernel.write for kernel in (*own, *after)),
                l2=sum(kernel.l2 for kernel in own),
                kernels=[kernel.name for kernel in own],
            )
        )
    return counted


def between_markers(kernels: Iterable[Kernel]) -> Iterator[tuple[list[Kernel], list[Kernel]]]:
    """Of each call: the kernels between its two markers, and those after them, which write back what it left in L2."""
    parts: list[list[Kernel]] = []
    for kernel in kernels:
        if MARKER in kernel.name:
            parts.append([])
        elif parts:
            parts[-1].append(kernel)
    return iter(list(zip(parts[::2], parts[1::2], strict=False)))


def read_csv(lines: Iterable[str]) -> list[Kernel]:
    """ncu's raw page: names, units, then a line a kernel; whatever else it says starts without a quote."""
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(rows) < 3:
        return []
    names, units = rows[0], dict(zip(rows[0], rows[1], strict=True))
    found = []
    for row in rows[2:]:
        value = dict(zip(names, row, strict=True))
        read, write, l2 = (float(value[name].replace(",", "")) * UNITS[units[name]] for name in METRICS)
        found.append(Kernel(value["Kernel Name"], read, write, l2))
    return found
