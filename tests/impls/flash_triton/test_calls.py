"""Calls that repeat: the C function that launches a kernel is told the same, addresses aside, as Triton told it first.

Kernels are compiled for a Hopper GPU, which takes none; a recorder stands in for the C function. The interpreter that
the other tests run under has no such thing, so this happens in a process of its own.
"""

import os
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import contextlib
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel


class Driver:
    '''What Triton asks of a driver to compile for an H200 and to encode descriptors.'''

    def __init__(self):
        self.utils = self
        self.encoded = 0

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def fill_tma_descriptor(self, address, *rest):
        self.encoded += 1
        return ("encoded", address, *(tuple(x) if isinstance(x, list) else x for x in rest))


class Run:
    '''CudaLauncher, with a recorder for the C function.'''

    global_scratch_size = profile_scratch_size = launch_cooperative_grid = launch_pdl = 0

    def __init__(self, compiled):
        self.launch = lambda *told: TOLD.append(told)
        if calls.KNOWN:
            meta = getattr(compiled.metadata, "tensordesc_meta", None)
            signature = dict(enumerate(compiled.src.signature.values()))
            self.launch = nvidia.wrap_handle_tensordesc(self.launch, signature, meta)

    def __call__(self, x, y, z, stream, function, *rest):
        self.launch(x, y, z, stream, function, 0, 0, None, None, *rest)


TOLD, RUNS = [], {}
DRIVER = Driver()
triton.runtime.driver.set_active(DRIVER)
CompiledKernel.run = property(lambda self: RUNS.setdefault(id(self), Run(self)))
CompiledKernel._init_handles = lambda self: None
CompiledKernel.function = 5

from attnbench.impls.flash_api import Options
from attnbench.impls.flash_triton import calls, configs, launch, tuned

launch.device_for = lambda device, dtype: configs.Device((9, 0), 132)


def plain(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def told(run):
    TOLD.clear()
    run()
    return [tuple(map(plain, one)) for one in TOLD]


q, k, v = (torch.randn(1, 256, 2, 128).to(torch.bfloat16) for _ in range(3))
options = Options(None, 0, True, 0.1, 0.0, (0, 0), False)
"""

FORWARD = """
keep, zeros, make_zeros = [], [], torch.zeros
torch.zeros = lambda *of, **asked: zeros.append(make_zeros(*of, **asked)) or zeros[-1]  # the tickets


def run():
    keep.append(launch.forward(q, k, v, None, [], options))


first, second = told(run), told(run)
layouts = map(launch.layout_of, (q, k, v))
(call,) = launch.forward_plan(tuned.active(), options, q.device, q.dtype, False, *layouts, None, None).calls
if not calls.KNOWN:
    assert call.launcher is None and len(second) == 1, "another Triton's launches go the long way"
    raise SystemExit
assert call.launcher is not None, "the C function was not found"
assert len(first) == len(second) == 1
(a,), (b,) = first, second
assert len(a) == len(b)
replaced = {}
for (out, lse), other in zip(keep[:1], keep[1:]):
    replaced = {x.data_ptr(): y.data_ptr() for x, y in zip((out, lse, zeros[0]), (*other, zeros[1]))}
hooks = slice(9, 13)  # metadata, what hooks would be told, and two hooks
for i, (x, y) in enumerate(zip(a, b)):
    if i in range(*hooks.indices(len(a))):
        continue
    if isinstance(x, tuple):
        x = (x[0], replaced.get(x[1], x[1]), *x[2:])
    assert replaced.get(x, x) == y, (i, x, y)

again = launch.plan_forward(q, k, v, options)
third = told(lambda: keep.append(again(q, k, v, None)))
changing = {x.data_ptr() for made in (*keep, zeros) for x in made}


def lasting(of):
    '''What is told but for results, their descriptors, tickets and hooks.'''
    return [x for i, x in enumerate(of) if i not in range(9, 13) and x not in changing and not (
        isinstance(x, tuple) and x[1] in changing)]


assert lasting(second[0]) == lasting(third[0]) and len(second[0]) == len(third[0])

before = DRIVER.encoded
told(run)
assert DRIVER.encoded <= before + 1, "q, k and v were encoded again"
"""

MISALIGNED = """
kernel, seen = None, []


@triton.jit
def copy(x, y, N: triton.language.constexpr):
    at = triton.language.arange(0, N)
    triton.language.store(y + at, triton.language.load(x + at))


from attnbench.impls.flash_triton.calls import Address, Call
from attnbench.impls.flash_triton.calls import launch as launch_all

call = Call(copy, (1,), [Address("x"), Address("y")], {"N": 64}, {"num_warps": 1})
x, y = torch.zeros(2, 128)
launch_all((call,), {"x": x, "y": y})
compiled = dict(RUNS)
launch_all((call,), {"x": x, "y": y})
assert RUNS.keys() == compiled.keys()
launch_all((call,), {"x": x[1:], "y": y})
assert len(RUNS) == len(compiled) + 1, "an address that is no multiple of 16 needs another kernel"

from triton import knobs
knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata))
TOLD.clear()
launch_all((call,), {"x": x, "y": y})
assert TOLD[-1][11] is knobs.runtime.launch_enter_hook, "a hook was passed over"
"""


@pytest.mark.parametrize("body", [FORWARD, MISALIGNED], ids=["the same is told", "the long way is taken"])
def test_repeated_calls(body, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(PRELUDE + body))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
