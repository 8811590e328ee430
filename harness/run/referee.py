"""The process that knows the right answer and the device's limits: the oracle once a group, the ceilings each round."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from attnbench.harness.measure.ceilings import CeilingProbe
from attnbench.harness.measure.clocks import ClockReader
from attnbench.harness.measure.memory import MIB
from attnbench.harness.oracle.inputs import make_inputs, torch_dtype
from attnbench.harness.oracle.judge import Oracle, build
from attnbench.harness.oracle.reference import judged_rows, probe_rows
from attnbench.harness.problem import Problem
from attnbench.harness.run.channel import Message
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.slots import slot_count, slot_seed

# Score elements (batch x heads x rows x keys) judged in full; beyond, a sample of rows. Sized for under a second
# of fp64 work: a 16k-token problem of 2048 hidden has 4.3e9 at head_dim 128 on a GPU.
MOST_PAIRS = {"cuda": 9_000_000_000, "cpu": 20_000_000}


class Referee:
    """Operations are the ``do_`` methods; see worker.py."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._ceilings: tuple[str, CeilingProbe] | None = None

    def do_hello(self) -> Message:
        """Facts about the device and the software that the parent, which imports no torch, cannot know."""
        facts: dict[str, Any] = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "id": str(self._device),
        }
        if self._device.type != "cuda":
            waiting = os.environ.get("OMP_WAIT_POLICY")
            return facts | {"name": "cpu", "threads": torch.get_num_threads(), "omp_wait_policy": waiting}
        torch.cuda.set_device(self._device)
        properties = torch.cuda.get_device_properties(self._device)
        reader = ClockReader(str(properties.uuid))
        return facts | {
            "name": properties.name,
            "uuid": str(properties.uuid),
            "memory_mib": properties.total_memory / MIB,
            "sm_count": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / MIB,
            "shared_bytes": properties.shared_memory_per_multiprocessor,
            "capability": [properties.major, properties.minor],
            "cudnn": torch.backends.cudnn.version(),
            "nvml": reader.why or "ok",
        } | reader.facts()  # fmt: skip

    def do_oracle(self, plan: dict[str, Any], folder: str) -> Message:
        """The judged answer of slot 0 and the probes of every slot, written into ``folder``. With dropout there is none
        but under an implementation's own mask: files without a name.
        """
        posed = GroupPlan.from_json(plan)
        if posed.problems[0].dropout_p:
            return {"judged": "", "probes": [""] * slot_count(posed), "ms": 0.0, "mib": 0.0}
        # Every direction needs what the most demanding one does.
        backward = any(problem.direction != "fwd" for problem in posed.problems)
        problem = next(p for p in posed.problems if p.direction != "fwd") if backward else posed.problems[0]
        begin = time.perf_counter()
        rows = judged_rows(problem, MOST_PAIRS[self._device.type])
        judged = self._build(posed, problem, 0, rows, backward)
        judged.save(Path(folder) / "judged.pt")
        probes = []
        for slot in range(slot_count(posed)):
            probe = self._build(posed, problem, slot, probe_rows(problem), backward, columns=False)
            probes.append(str(Path(folder) / f"probe-{slot}.pt"))
            probe.with_budgets_of(judged).save(probes[-1])
        size = sum(tensor.nbytes for tensor in judged.tensors.values())
        del judged, probe
        self.do_release()
        spent_ms = (time.perf_counter() - begin) * 1e3
        return {
            "judged": str(Path(folder) / "judged.pt"),
            "probes": probes,
            "ms": spent_ms,
            "mib": size / MIB,
        }

    def _build(
        self,
        plan: GroupPlan,
        problem: Problem,
        slot: int,
        rows: torch.Tensor,
        backward: bool,
        *,
        columns: bool = True,
    ) -> Oracle:
        seed = slot_seed(plan, slot)
        inputs = make_inputs(problem, seed, self._device, dout=backward, kind=plan.inputs)
        return build(problem, inputs, seed, rows, backward, columns=columns)

    def do_ceilings(self, dtype: str, samples: int) -> Message:
        """GEMM TFLOP/s in ``dtype`` and copy GB/s."""
        if self._ceilings is None or self._ceilings[0] != dtype:
            self._ceilings = (dtype, CeilingProbe(torch_dtype(dtype), self._device))
        probe = self._ceilings[1]
        return {"gemm_tflops": probe.gemm_tflops(samples), "copy_gbs": probe.copy_gbs(samples)}

    def do_release(self) -> Message:
        self._ceilings = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return {}
