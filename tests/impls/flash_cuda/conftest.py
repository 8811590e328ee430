"""The arithmetic of `csrc` without a GPU: NVRTC evaluates it as constant expressions, and its PTX lists the values."""

import re
import struct
from collections.abc import Callable, Sequence

import pytest

from attnbench.impls.flash_cuda.build import OPTIONS, compile_source

Evaluate = Callable[[str, Sequence[str]], list[int]]


@pytest.fixture(scope="session")
def evaluate() -> Evaluate:
    """Called with (header, expressions): their values as signed 32-bit integers."""

    def values(header: str, expressions: Sequence[str]) -> list[int]:
        end = 1  # PTX leaves zeros at the end out
        listed = ",\n".join(f"static_cast<i32>({expression})" for expression in (*expressions, end))
        source = (
            f'#include "{header}"\n'
            "namespace attn {}\n"
            "using namespace attn;\n"
            f'extern "C" __device__ i32 values[] = {{\n{listed}}};\n'
        )
        ptx, _ = compile_source(source, [o for o in OPTIONS if "ptxas" not in o], kind="PTX")
        (found,) = re.findall(r"values\[\d+\] = \{([^}]*)\}", ptx.decode())
        data = bytes(int(value) for value in found.split(",")).ljust(4 * len(expressions) + 4, b"\0")
        *answers, mark = struct.unpack(f"<{len(expressions) + 1}i", data)
        assert mark == end
        return answers

    return values
