"""Ceilings on a CPU, and what is shown of them; the GPU's own kernels compile wherever NVRTC is installed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from attnbench.harness.limits import ceiling_table, ceilings, device_kernels
from attnbench.harness.limits.ceilings import Ceiling, Sampled
from attnbench.harness.limits.datasheet import Datasheet
from attnbench.harness.run.errors import Exit

H200 = Datasheet.of("NVIDIA H200", capability=(9, 0), sm_count=132, max_sm_mhz=1980)


def test_a_figure_is_work_over_time_or_the_time_of_a_part() -> None:
    assert Ceiling("copy", "", "GB/s", lambda: None, work=2e3).figure(ms=4.0) == 500
    assert Ceiling("launch", "", "µs", lambda: None, parts=50).figure(ms=0.1) == pytest.approx(2)


def test_every_round_samples_every_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "GEMM_SIZE", {"cpu": 32})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**16})
    sampled = ceilings.measure(torch.device("cpu"), seconds=0)
    assert [one.name for one in sampled] == ["gemm_fp32", "gemm_fp64", "copy"]
    for one in sampled:
        assert len(one.rounds) == len(one.at_s) == ceilings.LEAST_ROUNDS
        assert all(len(samples) == ceilings.SAMPLES and min(samples) > 0 for samples in one.rounds)
        assert one.datasheet is None


def test_the_datasheet_is_in_the_ceilings_units() -> None:
    """16 exp and 128 bytes of shared memory an SM and clock: 4.18e12 exp/s, 33.5 TB/s at 1.98 GHz."""
    assert H200.figure("gemm_bf16", "TFLOP/s") == 989.5
    assert H200.figure("copy", "GB/s") == H200.figure("hbm_read", "GB/s") == 4800
    assert H200.figure("exp", "Gexp/s") == pytest.approx(16 * 132 * 1.98)
    assert H200.figure("shared_read", "GB/s") == pytest.approx(128 * 132 * 1.98)


def test_what_no_vendor_publishes_has_no_figure() -> None:
    assert H200.figure("l2_read", "GB/s") is None
    unknown = Datasheet.of("Some card", capability=(7, 0), sm_count=10, max_sm_mhz=None)
    assert unknown.figure("exp", "Gexp/s") is None
    assert unknown.figure("gemm_bf16", "TFLOP/s") is None


def test_a_row_shows_the_spread_the_clocks_and_the_share() -> None:
    one = Sampled(
        "copy", "HBM copy", "GB/s", [[4000.0, 4200.0], [4100.0]], [1500, 1980], [600.0, 500.0], [0, 1], 4800
    )
    assert ceiling_table.rows([one]) == [
        ("HBM copy", "GB/s", "4100", "4020 to 4180", "1500 to 1980", "4800", "85%")
    ]
    missing = Sampled("exp", "exponentials", "Gexp/s", why="cuda.core is not installed")
    assert ceiling_table.rows([missing])[0][3] == "cuda.core is not installed"
    assert ceiling_table.markdown([one, missing]).count("\n") == 4
    assert ceiling_table.draw([one, missing]).axes[0].get_xlabel() == "SM clock (MHz)"


def test_a_figure_beyond_the_hardwares_bound_is_not_believed() -> None:
    """What a read of shared memory gave whose loads the assembler had merged: 121 TB/s, of 33 at most."""
    one = Sampled("shared_read", "shared memory read", "GB/s", [[33000.0, 120929.0]], datasheet=33454)
    one.judge()
    assert ceiling_table.rows([one])[0][2:4] == (
        "–", "not believed: 1.209e+05 GB/s is beyond the hardware's 3.345e+04"
    )  # fmt: skip
    within = Sampled("exp", "exponentials", "Gexp/s", [[4138.0, 4170.0]], datasheet=4182)
    within.judge()
    assert not within.why


def test_the_command_writes_what_it_prints(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "GEMM_SIZE", {"cpu": 32})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**16})
    done = bench("ceilings", "--device", "cpu", "--seconds", "0", "--output-dir", str(tmp_path), "--json")
    assert done.exit_code == Exit.OK, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "ceilings.json").read_text())
    assert document["environment"]["devices"][0]["name"] == "cpu"
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"ceilings.json", "ceilings.md", "ceilings.png", "ceilings.svg"}


def test_a_gpu_that_is_not_there_is_said_in_one_line(bench: Any) -> None:
    done = bench("ceilings", "--device", "cuda:7")
    assert done.exit_code == Exit.MACHINE
    assert done.stderr.startswith("bench: --device cuda:7 is not there")


def test_the_kernels_compile_for_hopper_and_loads_survive(tmp_path: Path) -> None:
    """Loads that nothing uses must be in the machine code: eight of global memory, past L1, and eight of shared."""
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed here")
    import triton

    options = core.ProgramOptions(arch="sm_90", std="c++17")
    code = core.Program(device_kernels.SOURCE.read_text(), "c++", options).compile("cubin").code
    (tmp_path / "kernels.cubin").write_bytes(code)
    disassemble = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    command = [disassemble, "-c", tmp_path / "kernels.cubin"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kernels = dict(re.findall(r"^\.text\.(\w+):$(.*?)(?=^\.text\.|\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(kernels) == {"empty", "read_global", "read_shared", "exponentials"}
    assert kernels["read_global"].count("LDG.E.128.STRONG.GPU") >= 8
    loop = kernels["read_shared"].partition("BAR.SYNC")[2]
    assert loop.count("LDS.128") / loop.count("LOP3.LUT R") == pytest.approx(8 / 16, rel=0.1)  # none merged
    assert kernels["exponentials"].count("MUFU.EX2") >= 16
