"""Commands that write and commands that read: a place that cannot be written, and records that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

from attnbench.harness.cli.app import app
from attnbench.harness.run import journal
from attnbench.harness.run.errors import Exit, RunError, make_folder, writing

# A system's folder where none can be made, and what would lie under a file.
NOWHERE = ("/proc/none", "{here}/file/below")

# Each command with where it writes; {run} is a run's folder, {place} what it may not write to.
WRITERS = {
    "report": ("report {run} --format csv --output-dir {place}", "tables.csv"),
    "plot": ("plot {run} --metrics latency --output-dir {place}", "latency_fwd.svg"),
    "export": ("export {run} --format bmf --output {place}/run.json", "run.json"),
    "compare": ("compare {run} {run} --output-dir {place}", "compare.json"),
    "history": ("history {run} --output-dir {place}", "history.json"),
    "site": ("publish {run} --site {place}", "index.html"),
    "page": ("publish {run} --page {place}/page.md", "page.md"),
    "io": ("io --seqlen 64 --count-up-to 64 --output-dir {place}", "io.json"),
    "ceilings": ("ceilings --device cpu --seconds 0 --output-dir {place}", "ceilings.json"),
    "run": ("run --suite smoke --device cpu --only standard --output-dir {place}", ""),
}


def bench(words: str, **places: object) -> Result:
    arguments = [word.format(**places) for word in words.split()]
    return CliRunner().invoke(app, arguments, prog_name="bench")


@pytest.fixture(scope="module")
def run(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run to read; read only."""
    groups = builder.problems(lengths=(1024,), head_dims=(64,))
    folder: Path = builder.write_run(tmp_path_factory.mktemp("results") / "run", groups, builder.ENVIRONMENT)
    return folder


@pytest.mark.parametrize("command", WRITERS)
def test_a_place_that_cannot_be_written_is_one_line_and_its_exit_code(
    run: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    place = NOWHERE[list(WRITERS).index(command) % 2].format(here=tmp_path)
    done = bench(WRITERS[command][0], run=run, place=place)
    assert done.exit_code == Exit.MACHINE, (done.stderr, done.exception)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bench: ")]
    assert line.startswith("bench: cannot write")
    assert place.rpartition("/below")[0] in line
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["export", "page"])
def test_a_place_that_is_not_there_yet_is_made(run: Path, tmp_path: Path, command: str) -> None:
    words, file = WRITERS[command]
    done = bench(words, run=run, place=tmp_path / "new" / "deep")
    assert done.exit_code == Exit.OK, done.stderr
    assert (tmp_path / "new" / "deep" / file).stat().st_size


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="file: is not a folder"):
        make_folder(tmp_path / "file")


def test_what_is_no_fault_of_a_place_keeps_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        print(1 / 0)


# ---- records that cannot be read --------------------------------------------------------------------------


@pytest.fixture
def torn(run: Path, tmp_path: Path) -> Path:
    """The same run with two lines of rubbish in the middle and one at the end that is not what was written."""
    folder = tmp_path / "results" / "torn"
    folder.mkdir(parents=True)
    for name in ("environment.json", "records.jsonl"):
        (folder / name).write_bytes((run / name).read_bytes())
    lines = (folder / "records.jsonl").read_text().splitlines()
    lines = [lines[0], "rubbish", "rubbish", *lines[1:], lines[-1].replace("0", "1", 1)]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    assert len(journal.read(folder)[1]) == 3
    return folder


READERS: dict[str, Callable[[Path], str]] = {
    "export": lambda out: "export {run} --format csv",
    "publish": lambda out: f"publish {{run}} --page {out}/page.md",
    "history": lambda out: "history {run} --json",
    "compare": lambda out: "compare {run} {run} --json",
}


@pytest.mark.parametrize("command", READERS)
def test_lines_that_cannot_be_read_are_told_and_counted_and_no_failure(
    torn: Path, tmp_path: Path, command: str
) -> None:
    done = bench(READERS[command](tmp_path), run=torn)
    assert done.exit_code == Exit.OK, (done.stderr, done.exception)
    told = [line for line in done.stderr.splitlines() if "left out" in line]
    count = 2 if command == "compare" else 1  # which reads it twice
    no_seal = "it does not end in a checksum"
    last = len((torn / "records.jsonl").read_text().splitlines())
    assert (
        told
        == [
            f"{torn}: left out: 2 lines, records.jsonl:2 to records.jsonl:3: the line is torn: {no_seal}",
            f"{torn}: left out: records.jsonl:{last}: the line is corrupt: its checksum does not match",
        ]
        * count
    )
    if "json" in READERS[command](tmp_path):
        assert json.loads(done.stdout)


@pytest.mark.parametrize("command", ["export", "history"])
def test_nothing_is_told_of_a_whole_run(run: Path, tmp_path: Path, command: str) -> None:
    assert "left out" not in bench(READERS[command](tmp_path), run=run).stderr


def test_verify_tells_what_it_could_not_look_for_a_row_in(torn: Path) -> None:
    done = bench("verify nowhere --results {run}", run=torn)
    assert done.exit_code == Exit.USAGE
    assert "2 lines, records.jsonl:2 to records.jsonl:3: the line is torn" in done.stderr
