"""``bench run``: what reaches the runner, what is printed where, and what it exits with."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.cli.run import exit_code
from attnbench.harness.run import environment
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.gpus import Gpu
from attnbench.harness.run.record import Status
from attnbench.harness.run.runner import RunOptions

H200 = Gpu("NVIDIA H200", "GPU-1", (9, 0), "580")


def test_a_run_prints_paths_on_stdout_and_talks_on_stderr(bench: Any) -> None:
    done = bench("run", "--suite", "smoke", "--output-dir", "out")
    assert done.exit_code == Exit.OK
    assert done.stdout.splitlines() == ["out/records.jsonl", "out/environment.json", "out/tables.md"]
    assert "[1/6] b1_h4_q128_d64_fp32_full: 6 OK" in done.stderr
    assert "36 OK in 4.0 s (judge 75%, time 25%)" in done.stderr


def test_json_is_one_document(bench: Any) -> None:
    done = bench("run", "--suite", "smoke", "--output-dir", "out", "--json", "-q")
    document = json.loads(done.stdout)
    assert document["folder"] == "out"
    assert document["counts"] == {"OK": 36}
    assert document["exit_code"] == 0
    assert document["files"][-1] == "out/tables.md"
    assert document["this_call"]["groups"] == 6
    assert done.stderr == ""


def test_options_left_out_are_the_runners_own(bench: Any) -> None:
    bench("run", "--suite", "smoke", "--output-dir", "out")
    given = dataclasses.replace(bench.options, command=())
    assert given == RunOptions(("cpu",), Path("out"))


def test_the_help_tells_the_runners_defaults(bench: Any) -> None:
    text = " ".join(re.sub(r"[│\n]", " ", bench("run", "--help").stdout).split())
    defaults = RunOptions(("cpu",), Path())
    for words, value in (
        ("Interleaved rounds", defaults.rounds),
        ("Samples a round", defaults.samples),
        ("Of inputs and order", defaults.seed),
    ):
        assert f"{words} (default {value})" in text
    assert f"(default {defaults.time_limit_s:g})" in text


def test_graphs_are_refused_where_there_are_none(bench: Any) -> None:
    outcome = bench("run", "--suite", "smoke", "--output-dir", "out", "--cudagraph")
    assert outcome.exit_code == 2
    assert "--cudagraph needs a CUDA device" in outcome.stderr


def test_every_measuring_option_reaches_the_runner(bench: Any, gpus: list[Gpu]) -> None:
    gpus.append(H200)
    bench(
        "run", "--suite", "smoke", "--output-dir", "out", "--rounds", "7", "--samples", "3", "--time-limit", "9",
        "--hot", "--cudagraph", "--no-memory", "--fail-fast", "--seed", "4",
    )  # fmt: skip
    assert dataclasses.replace(bench.options, command=()) == RunOptions(
        ("cuda:0",), Path("out"), seed=4, rounds=7, samples=3, time_limit_s=9.0, hot=True, cudagraph=True,
        memory=False, fail_fast=True,
    )  # fmt: skip


def test_filters_and_choices_narrow_the_plan(bench: Any) -> None:
    bench(
        "run", "--suite", "smoke", "--output-dir", "out", "--only", "sdpa-*", "--skip", "sdpa-math",
        "--seqlen", "128,384", "--causal", "true", "--mode", "bwd", "--headdim", "64", "--dtype", "fp32",
    )  # fmt: skip
    assert [cell for plan in bench.plans for cell in plan.cells] == [
        "sdpa-flash/b1_h4_q128_d64_fp32_causal_bwd",
        "sdpa-flash/b1_h4_q384_d64_fp32_causal_bwd",
    ]


def test_the_users_own_suite_has_the_same_words(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        'name = "my"\nwhy = "mine"\n'
        '[[case]]\nname = "a"\nwhy = "b"\nbatch = 1\nheads = 2\nseqlen = "1k"\nhead_dim = 8\n'
    )
    assert bench("run", "--suite", "my.toml", "--output-dir", "out").exit_code == 0
    assert [plan.group for plan in bench.plans] == ["b1_h2_q1024_d8_bf16_full"]


def test_baseline_and_metrics_reach_the_report(bench: Any) -> None:
    bench(
        "run",
        "--suite",
        "smoke",
        "--output-dir",
        "out",
        "--baseline",
        "standard",
        "--metrics",
        "speedup,memory",
    )
    assert bench.reported == {"folder": Path("out"), "baseline": "standard", "metrics": ("speedup", "memory")}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--suite", "smok"], Exit.USAGE, "unknown suite 'smok'; did you mean smoke"),
        ([], Exit.USAGE, "name a suite: --suite block-sparse"),
        (["--suite", "gone.toml"], Exit.USAGE, "cannot read suite file gone.toml"),
        (["--suite", "smoke", "--only", "sdpa-mth"], Exit.USAGE, "did you mean sdpa-math"),
        (["--suite", "smoke", "--baseline", "standart"], Exit.USAGE, "--baseline: unknown implementation 'standart'"),
        (["--suite", "smoke", "--dtype", "bf61"], Exit.USAGE, "--dtype: unknown dtype 'bf61'; did you mean bf16"),
        (["--suite", "smoke", "--metrics", "tflop"], Exit.USAGE, "unknown metric 'tflop'; did you mean tflops"),
        (["--suite", "smoke", "--metrics", "speedup"], Exit.USAGE, "name it with --baseline"),
        (["--suite", "smoke", "--mode", "forward"], Exit.USAGE, "--mode: unknown mode 'forward'"),
        (["--suite", "smoke", "--causal", "yes"], Exit.USAGE, "--causal: unknown value 'yes'; known: both, true"),
        (["--suite", "smoke", "--seqlen", "1q"], Exit.USAGE, "--seqlen: '1q' is not a size"),
        (["--suite", "smoke", "--seqlen", "3k"], Exit.USAGE, "--seqlen 3k: suite smoke has no such case"),
        (["--suite", "smoke", "--device", "gpu"], Exit.USAGE, "--device: 'gpu' is no device"),
        (["--suite", "smoke", "--device", "cuda"], Exit.MACHINE, "--device cuda:0 is not there; GPUs visible: none"),
        (["--suite", "long-seq"], Exit.MACHINE, "suite long-seq needs a cuda device, and this run is on cpu"),
        (["--suite", "smoke", "--resume-anyway"], Exit.USAGE, "--resume-anyway: name the run's folder with --resume"),
        (["--resume", "gone"], Exit.USAGE, "--resume gone: no run is there (no plan.json)"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_its_exit_code(
    bench: Any, arguments: list[str], code: Exit, message: str
) -> None:
    done = bench("run", *arguments)
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stderr.startswith("bench: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert bench.options is None


@pytest.mark.parametrize("option", ["--suit", "--round"])
def test_a_mistyped_option_exits_2_with_the_likely_ones(bench: Any, option: str) -> None:
    done = bench("run", option, "1")
    assert done.exit_code == Exit.USAGE
    assert f"{option[:-1]}" in done.stderr.split("No such option", 1)[1]


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_rounds_are_at_least_one(bench: Any, value: str) -> None:
    assert bench("run", "--suite", "smoke", "--rounds", value).exit_code == Exit.USAGE
    assert bench.options is None


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (RunError("GPU-1 is in use by another run (pid 7)", Exit.MACHINE), Exit.MACHINE, "in use by another run"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), Exit.MACHINE,
         "cannot write out/x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), Exit.MACHINE, "cannot write: No space left on device"),
        (KeyboardInterrupt(), Exit.INTERRUPTED, "interrupted; nothing was recorded yet"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_go_on_is_one_line(
    bench: Any, failure: BaseException, code: Exit, message: str
) -> None:
    bench.failure = failure
    done = bench("run", "--suite", "smoke", "--output-dir", "out")
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stderr.startswith("bench: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_an_interrupted_run_says_how_to_go_on(bench: Any) -> None:
    bench("run", "--suite", "smoke", "--output-dir", "out")
    bench.failure = KeyboardInterrupt()
    done = bench("run", "--resume", "out")
    assert done.exit_code == Exit.INTERRUPTED
    assert done.stderr == "bench: interrupted; go on with: bench run --resume out\n"


def test_an_interrupt_while_the_report_is_written_says_that_the_run_is_whole(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, **_: Any) -> list[Path]:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["attnbench.harness.report.write"], "write_report", interrupted)
    done = bench("run", "--suite", "smoke", "--output-dir", "out", "-q")
    assert done.exit_code == Exit.INTERRUPTED
    assert done.stderr == "bench: interrupted; all is recorded, and told by: bench report out\n"


def test_a_defect_keeps_its_traceback(bench: Any) -> None:
    bench.failure = ZeroDivisionError("a defect")
    assert isinstance(bench("run", "--suite", "smoke", "--output-dir", "out").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ({"OK": 3}, Exit.OK),
        ({"OK": 1, "UNSUPPORTED": 1, "UNAVAILABLE": 1, "OOM": 1}, Exit.OK),
        ({"OK": 9, "INCORRECT": 1}, Exit.CELLS),
        ({"OK": 9, "CRASHED": 1}, Exit.CELLS),
        ({"OK": 9, "TIMEOUT": 1}, Exit.CELLS),
        ({"ERROR": 1}, Exit.CELLS),
        ({"UNSUPPORTED": 4, "OOM": 1}, Exit.NOTHING),
        ({}, Exit.NOTHING),
    ],
)
def test_exit_codes_follow_the_cells(counts: dict[str, int], code: Exit) -> None:
    assert exit_code(counts) == code


@pytest.mark.parametrize("status", [Status.INCORRECT, Status.UNSUPPORTED])
def test_the_exit_code_is_of_the_whole_run(bench: Any, status: Status) -> None:
    """Resuming a finished run measures nothing more, and exits as the run did."""
    bench.answer = lambda cell: status if cell.startswith("sdpa-math") else Status.OK
    first = bench("run", "--suite", "smoke", "--output-dir", "out")
    again = bench("run", "--resume", "out")
    assert first.exit_code == again.exit_code == (Exit.CELLS if status is Status.INCORRECT else Exit.OK)
    assert ("INCORRECT sdpa-math/" in first.stderr) == (status is Status.INCORRECT)
    assert "6 groups were complete already" in again.stderr


def test_resume_goes_on_as_recorded(bench: Any) -> None:
    given = ("--rounds", "7", "--only", "sdpa-*", "--seed", "3", "--energy")
    bench("run", "--suite", "smoke", "--output-dir", "out", *given)
    assert bench.options.energy
    plans, options = bench.plans, bench.options
    assert bench("run", "--resume", "out").exit_code == 0
    assert bench.plans == plans
    assert dataclasses.replace(bench.options, command=()) == dataclasses.replace(options, command=())


def test_resume_adds_groups_with_the_runs_implementations_and_seed(bench: Any) -> None:
    bench(
        "run", "--suite", "smoke", "--seqlen", "128", "--output-dir", "out", "--only", "sdpa-*", "--seed", "3"
    )
    before = bench.plans
    bench("run", "--resume", "out", "--suite", "smoke", "--seqlen", "384", "--json")
    assert bench.plans[: len(before)] == before
    added = bench.plans[len(before) :]
    assert [plan.longest for plan in added] == [384, 384]
    assert {plan.impls for plan in added} == {("sdpa-math", "sdpa-flash")}
    bench("run", "--suite", "smoke", "--output-dir", "whole", "--only", "sdpa-*", "--seed", "3")
    assert {plan.group: plan.seed for plan in added}.items() <= {p.group: p.seed for p in bench.plans}.items()


def test_resume_with_filters_alone_takes_the_runs_suite(bench: Any) -> None:
    bench("run", "--suite", "smoke", "--seqlen", "128", "--output-dir", "out")
    bench("run", "--resume", "out", "--seqlen", "384")
    assert {plan.longest for plan in bench.plans} == {128, 384}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "6"], "the run was started with rounds = 5, not 6; a run is measured in one way"),
        (["--hot"], "the run was started with hot = False, not True"),
        (["--no-memory"], "the run was started with memory = True, not False"),
        (["--device", "cuda"], "the run is on cpu, not cuda:0"),
        (["--output-dir", "elsewhere"], "a resumed run stays in its folder"),
        (["--suite", "smoke", "--only", "standard,sdpa-*"], "would join a group of this run"),
        (
            ["--seqlen", "128", "--only", "sdpa-math"],
            "is planned already, with 2 implementations and fwd,bwd",
        ),
    ],
)
def test_resume_refuses_to_measure_otherwise(
    bench: Any, gpus: list[Gpu], arguments: list[str], message: str
) -> None:
    bench("run", "--suite", "smoke", "--output-dir", "out", "--only", "sdpa-*")
    gpus.append(H200)
    bench.options = None
    done = bench("run", "--resume", "out", *arguments)
    assert done.exit_code == Exit.USAGE
    assert message in done.stderr
    assert bench.options is None


def test_resume_on_other_ground_is_refused_by_name_and_goes_on_when_told(bench: Any) -> None:
    bench("run", "--suite", "smoke", "--output-dir", "out", "--seqlen", "128", "--only", "sdpa-math")
    here = environment.gather(
        run="r",
        command=(),
        suites=[],
        seed=0,
        mode="cold",
        devices=[{"name": "cpu", "torch": "", "cuda": None}],
    )
    Path("out/environment.json").write_text(json.dumps(here))
    assert bench("run", "--resume", "out").exit_code == 0
    torch = here["packages"]["torch"]
    Path("out/environment.json").write_text(
        json.dumps(here | {"packages": here["packages"] | {"torch": "2.9.1"}})
    )
    bench.options = None
    done = bench("run", "--resume", "out")
    assert done.exit_code == Exit.USAGE
    assert f"torch was 2.9.1 and is {torch}; --resume-anyway goes on" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert bench.options is None
    assert bench("run", "--resume", "out", "--resume-anyway").exit_code == 0


@pytest.mark.parametrize("option", ["--only", "--skip"])
def test_resume_does_not_pass_over_a_choice_of_implementations(bench: Any, option: str) -> None:
    bench("run", "--suite", "smoke", "--output-dir", "out")
    done = bench("run", "--resume", "out", option, "standard")
    assert done.exit_code == Exit.USAGE
    assert "the groups of out keep their implementations" in done.stderr


def test_resume_may_say_again_what_was_said(bench: Any) -> None:
    bench("run", "--suite", "smoke", "--output-dir", "out", "--rounds", "6")
    arguments = ["--suite", "smoke", "--rounds", "6", "--output-dir", "out", "--time-limit", "3"]
    assert bench("run", "--resume", "out", *arguments).exit_code == 0
    assert bench.options.time_limit_s == 3.0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"plans": [], "options": {}}', '{"plans": [{}], "options": {}}']
)
def test_a_torn_plan_is_one_line(bench: Any, text: str) -> None:
    Path("out").mkdir()
    Path("out/plan.json").write_text(text)
    done = bench("run", "--resume", "out")
    assert done.exit_code == Exit.USAGE
    assert len(done.stderr.splitlines()) == 1
    assert "plan" in done.stderr


def test_a_folder_that_holds_a_run_is_not_written_over(bench: Any) -> None:
    bench("run", "--suite", "smoke", "--output-dir", "out")
    done = bench("run", "--suite", "smoke", "--output-dir", "out")
    assert done.exit_code == Exit.USAGE
    assert "out holds a run already; go on with --resume out" in done.stderr


def test_a_gpu_run_is_kept_under_its_gpus_name(bench: Any, gpus: list[Gpu]) -> None:
    gpus.append(H200)
    bench("run", "--suite", "smoke")
    assert bench.options.devices == ("cuda:0",)
    assert re.fullmatch(r"results/nvidia-h200/\d{4}-\d\d-\d\d-\w+(-dirty)?", str(bench.options.output))
    assert {problem.dtype for plan in bench.plans for problem in plan.problems} == {"bf16"}
