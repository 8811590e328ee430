"""`csrc` without a GPU: its arithmetic by NVRTC, which lists the values in PTX, and all of it emulated on a CPU."""

import os
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from attnbench.impls.flash_cuda.build import CSRC, OPTIONS, compile_source

Evaluate = Callable[..., list[int]]


def compiler() -> str | None:
    """The C++ compiler here, None where there is none."""
    return shutil.which("g++")


def compiler_required() -> bool:
    """Set where a missing compiler is a defect of the set-up, as in continuous integration, and not of the machine."""
    return bool(os.environ.get("ATTNBENCH_COMPILER"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked ``emulated`` where nothing compiles for the host; where that is required, they fail.

    With a GPU its own tests pose these problems, and the tensors are made there.
    """
    needing = [item for item in items if item.get_closest_marker("emulated")]
    if not needing:
        return
    import torch

    if torch.cuda.is_available() or not (compiler() or compiler_required()):
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not compiler() and not compiler_required():
        terminalreporter.write_line("deselected: tests of the CUDA kernels emulated on the CPU (no g++ here)")


@pytest.fixture(scope="session")
def emulate(load_module: Callable[[str, Path], ModuleType]) -> ModuleType:
    """The emulator's front, `emulator/emulate.py`."""
    return load_module("flash_cuda_emulate", Path(__file__).parent / "emulator" / "emulate.py")


@pytest.fixture(scope="session")
def evaluate() -> Evaluate:
    """Called with (header, expressions, declarations before them): their values as signed 32-bit integers."""

    def values(header: str, expressions: Sequence[str], declared: str = "") -> list[int]:
        end = 1  # PTX leaves zeros at the end out
        listed = ",\n".join(f"static_cast<i32>({expression})" for expression in (*expressions, end))
        source = (
            f'#include "{header}"\n'
            "namespace attn {}\n"
            "using namespace attn;\n"
            f"{declared}\n"
            f'extern "C" __device__ i32 values[] = {{\n{listed}}};\n'
        )
        ptx, _ = compile_source(source, [o for o in OPTIONS if "ptxas" not in o], kind="PTX")
        (found,) = re.findall(r"values\[\d+\] = \{([^}]*)\}", ptx.decode())
        data = bytes(int(value) for value in found.split(",")).ljust(4 * len(expressions) + 4, b"\0")
        *answers, mark = struct.unpack(f"<{len(expressions) + 1}i", data)
        assert mark == end
        return answers

    return values


@pytest.fixture
def broken(tmp_path):
    """Called with a file of the kernels' sources, what stands there once or more, and what then stands in its place: a
    copy of the sources with that bug."""

    def plant(file, old, new):
        csrc = shutil.copytree(CSRC, tmp_path / "csrc")
        text = (csrc / file).read_text()
        assert old in text, f"{file} has no {old!r} to break"
        (csrc / file).write_text(text.replace(old, new))
        return csrc

    return plant
