"""``bench`` as a process: what it imports, what listing says, and a reader that goes away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from attnbench.harness.cli import main
from attnbench.harness.run.errors import Exit
from attnbench.harness.run.suite import suite_names

HEAVY = ("torch", "numpy", "pandas", "matplotlib", "seaborn", "scipy", "triton", "jinja2")
CALL = "import sys\nfrom attnbench.harness.cli import main\nsys.argv = ['bench', *sys.argv[1:]]\n"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list"], ["list", "--json"]])
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    script = CALL + (
        "try:\n    main()\nfinally:\n"
        f"    print(*(name for name in {HEAVY!r} if name in sys.modules), sep=',', file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout
    assert done.stderr == "\n"


def test_the_check_above_can_fail() -> None:
    script = f"import numpy, sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert "numpy" in done.stdout


# rich prints the help, and ends with 1 of its own.
@pytest.mark.parametrize(("arguments", "code"), [(["list"], Exit.PIPE_CLOSED), (["--help"], 1)])
def test_a_reader_that_goes_away_is_no_defect(arguments: list[str], code: int) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"{CALL}main()", *arguments], stdout=write, stderr=subprocess.PIPE, text=True,
            check=False, timeout=60,
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (code, "")


def test_list_is_a_line_each_when_piped(bench: Any) -> None:
    lines = [line.split("\t") for line in bench("list").stdout.splitlines()]
    assert [line[0] for line in lines] == [*suite_names(), "standard", "sdpa-math", "sdpa-flash"]
    assert lines[-1] == ["sdpa-flash", "planted", "1.0"]
    assert all(len(line) == 4 for line in lines[:-3])


def test_list_json_says_the_same(bench: Any) -> None:
    document = json.loads(bench("list", "--json").stdout)
    assert [suite["name"] for suite in document["suites"]] == suite_names()
    assert all(suite["why"] and sum(suite["problems"].values()) for suite in document["suites"])
    assert document["implementations"][0] == {
        "name": "standard", "value": "plugins:standard", "distribution": "planted", "version": "1.0",
    }  # fmt: skip


def test_help_tells_every_exit_code(bench: Any) -> None:
    text = bench("--help").stdout
    assert all(f" {code.value} " in text for code in Exit)


def test_a_mistyped_command_exits_2(bench: Any) -> None:
    done = bench("lst")
    assert done.exit_code == Exit.USAGE
    assert "No such command" in done.stderr


def test_an_interrupt_before_a_command_begins_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["attnbench.harness.cli.app"], "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == Exit.INTERRUPTED


def test_an_interrupt_while_the_commands_are_imported_is_quiet() -> None:
    interrupts = """
        import os, signal, sys
        class Interrupting:
            def find_spec(self, name, *_):
                if name == "attnbench.harness.cli.run":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupting())
        from attnbench.harness.cli import main
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(interrupts)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (Exit.INTERRUPTED, "", "")
