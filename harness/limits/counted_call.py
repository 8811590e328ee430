"""The process that Nsight Compute watches: calls one implementation on each problem, once, between two markers.

python -m attnbench.harness.limits.counted_call SPEC, a JSON object of impl, device, problems and answers (the file that
the outcome of each problem goes to, in order). Only what stands between the markers of a problem is its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from attnbench.harness.contract import Device, Implementation
from attnbench.harness.oracle.inputs import make_inputs
from attnbench.harness.problem import Problem
from attnbench.harness.registry import PluginError, load
from attnbench.harness.run.calls import make_call

WARM_CALLS = 2


class Watched:
    """Where the counters are read: L2 holds other data before, and what it holds of the call is written back after."""

    def __init__(self, device: torch.device) -> None:
        self._marker = torch.zeros(1, dtype=torch.complex64, device=device)
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._others = torch.zeros(size, dtype=torch.float32, device=device)  # four times the L2

    def count(self, call: Any) -> None:
        self._read_others()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        self._mark()
        result = call()
        self._mark()
        self._read_others()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del result

    def _mark(self) -> None:
        self._marker.fill_(1)  # the only kernel on complex numbers, found by counters.MARKER

    def _read_others(self) -> None:
        """Leaves clean lines in L2: a buffer that is written would be written back during the call that follows."""
        self._others.sum()


def main() -> None:
    spec = json.loads(sys.argv[1])
    device = torch.device(spec["device"])
    torch.cuda.set_device(device)
    answers = Path(spec["answers"])
    try:
        implementation, watched = load(spec["impl"]), Watched(device)
    except PluginError as error:
        answers.write_text(json.dumps({"refused": str(error)}))
        return
    capability = torch.cuda.get_device_capability(device)
    where = Device("cuda", device.index or 0, torch.cuda.get_device_name(device), capability)
    if absence := implementation.unavailable(where):
        answers.write_text(json.dumps({"refused": absence.line}))
        return
    found: dict[str, Any] = {"version": implementation.version(), "problems": []}
    for data in spec["problems"]:
        found["problems"].append(_count(implementation, Problem.from_json(data), where, device, watched))
        answers.write_text(json.dumps(found))
        torch.cuda.empty_cache()


def _count(
    implementation: Implementation, problem: Problem, where: Device, device: torch.device, watched: Watched
) -> str:
    """Empty where the call was counted, else why not."""
    if reasons := implementation.unsupported_reasons(problem, where):
        return "; ".join(reasons)
    try:
        inputs = make_inputs(problem, 0, device, dout=problem.direction != "fwd")
        call = make_call(problem, implementation.prepare(problem, where), inputs, again=True)
        for _ in range(WARM_CALLS):
            call()
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything, and the next problem is still to come
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    watched.count(call)
    return ""


if __name__ == "__main__":
    main()
