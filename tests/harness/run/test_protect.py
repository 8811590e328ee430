"""What a worker does to itself, seen from outside: each in a process of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guards of the Linux kernel")

IMPORT = (
    "from attnbench.harness.run.protect import *; from attnbench.harness.run import protect; import os, sys\n"
)


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IMPORT + program],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


# A parent that starts a child which shares its stdout, and waits to be killed.
PARENT = """
import subprocess, sys
child = '''
import os, sys, time
from attnbench.harness.run.protect import die_with
{guard}
print(os.getpid(), flush=True)
time.sleep(3600)
'''
subprocess.Popen([sys.executable, "-c", child]).wait()
"""


@pytest.mark.parametrize("guarded", [True, False])
def test_a_worker_dies_with_its_parent(guarded: bool) -> None:
    program = PARENT.format(guard="die_with(os.getppid())" if guarded else "")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        if guarded:
            assert parent.stdout.read() == b""  # returns when the last holder of the pipe is gone
        else:  # the control: it would have lived on
            assert select.select([parent.stdout], [], [], 0.2) == ([], [], [])
            os.kill(child, signal.SIGKILL)


def test_a_worker_whose_parent_is_already_gone_leaves_at_once() -> None:
    done = python("protect.die_with(os.getppid() + 1); print('still here')")
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(("asked", "refused"), [(2**31, True), (2**26, False)])
def test_more_host_memory_than_allowed_is_refused_by_malloc(asked: int, refused: bool) -> None:
    program = f"limit_host_memory()\ntry: bytearray({asked})\nexcept MemoryError: print('refused')"
    done = python(program, ATTNBENCH_HOST_MEMORY_BYTES=str(2**30))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("refused\n" if refused else "")


def test_the_limit_is_a_share_of_the_machine_unless_told() -> None:
    done = python(
        "os.environ.pop('ATTNBENCH_HOST_MEMORY_BYTES', None); limit_host_memory()\n"
        "import resource; print(resource.getrlimit(resource.RLIMIT_DATA)[0])"
    )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0.5 * total < int(done.stdout) < total


def test_the_kernel_takes_a_worker_first() -> None:
    done = python("volunteer_for_oom_killer(); print(open('/proc/self/oom_score_adj').read().strip())")
    assert done.stdout == "1000\n"
    assert Path("/proc/self/oom_score_adj").read_text().strip() != "1000"  # the runner stays as it was


def test_a_fatal_signal_leaves_a_traceback() -> None:
    program = "def culprit(): os.abort()\ntrace_fatal_signals(); culprit()"
    done = python(program)
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr
    assert "in culprit" in done.stderr
    assert "culprit" not in python(program.replace("trace_fatal_signals(); ", "")).stderr
