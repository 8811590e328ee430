"""The journal: whatever happens to its file, every cell is there once or is named as missing."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.harness.problem import Problem
from attnbench.harness.run import journal
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.journal import SET_ASIDE, Journal, read, seal, unseal
from attnbench.harness.run.record import Cell, Group, Record, RecordError, Status

IMPLS = ("a", "b")


def group(number: int, impls: tuple[str, ...] = IMPLS) -> tuple[list[Cell], Group]:
    """A complete group with a cell for each of ``impls``."""
    problem = Problem(batch=1, heads=1, seqlen_q=number + 1, head_dim=8)
    names = {"run": "r", "suite": "s", "case": "c", "group": problem.group_key, "device": "cpu"}
    cells = [
        Cell(
            **names, impl=impl, impl_version="1", problem=problem, status=Status.OOM, reasons=["ümlaut\u2028"]
        )
        for impl in impls
    ]
    return cells, Group(**names, why="w", cells=[cell.id for cell in cells], seed=0)


def write(folder: Path, *numbers: int) -> Path:
    """A closed journal with these groups; its one part."""
    opened = Journal(folder)
    for number in numbers:
        opened.append(*group(number))
    opened.close()
    return folder / "records.jsonl"


def ids(records: list[Record]) -> list[str]:
    return [record.id if isinstance(record, Cell) else record.group for record in records]


def expected(*numbers: int) -> list[str]:
    return [name for number in numbers for name in ids([*group(number)[0], group(number)[1]])]


def aside(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SET_ASIDE).read_text().splitlines()]


# ---- one line ---------------------------------------------------------------------------------------------


def test_a_sealed_line_is_plain_json_with_a_checksum() -> None:
    (cell, _), _ = group(0)
    data = json.loads(seal(cell))
    assert data["kind"] == "cell"
    assert len(data["crc"]) == 8
    assert unseal(seal(cell)) == cell


LINE = seal(group(0)[0][0])


@given(st.integers(0, len(LINE) - 1), st.characters(max_codepoint=127))
def test_any_other_character_anywhere_is_noticed(where: int, character: str) -> None:
    spoiled = LINE[:where] + character + LINE[where + 1 :]
    if spoiled == LINE:
        assert unseal(spoiled)
        return
    with pytest.raises(RecordError, match=r"torn|corrupt"):
        unseal(spoiled)


@given(st.integers(0, len(LINE) - 1))
def test_any_torn_line_is_noticed(length: int) -> None:
    with pytest.raises(RecordError, match="torn"):
        unseal(LINE[:length])


# ---- a folder ---------------------------------------------------------------------------------------------


def test_what_is_appended_is_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "run", 0, 1)
    records, problems = read(tmp_path / "run")
    assert ids(records) == expected(0, 1)
    assert not problems
    assert records[:2] == group(0)[0]


def test_opening_again_knows_the_groups_and_goes_on(tmp_path: Path) -> None:
    part = write(tmp_path, 0)
    before = part.read_bytes()
    opened = Journal(tmp_path)
    assert set(opened.groups) == {group(0)[1].group}
    assert opened.set_aside == []
    opened.append(*group(1))
    opened.close()
    assert part.read_bytes().startswith(before)
    assert not (tmp_path / SET_ASIDE).exists()


@pytest.mark.parametrize("cut", [1, 2, 10, 200])
def test_a_torn_last_line_opens_its_group_again(tmp_path: Path, cut: int) -> None:
    part = write(tmp_path, 0, 1)
    whole = part.read_bytes()
    part.write_bytes(whole[:-cut])
    records, problems = read(tmp_path)
    if cut == 1:  # only the newline is gone: the record is whole
        assert ids(records) == expected(0, 1)
        assert not problems
    else:
        assert ids(records) == expected(0)
        assert len(problems) == 3
        assert "records.jsonl:6: the line is torn" in problems[2]
    write(tmp_path, *([] if cut == 1 else [1]))
    assert ids(read(tmp_path)[0]) == expected(0, 1)
    assert part.read_bytes() == whole


def test_a_whole_line_without_its_newline_is_not_glued_to_the_next(tmp_path: Path) -> None:
    part = write(tmp_path, 0)
    part.write_bytes(part.read_bytes()[:-1])
    write(tmp_path, 1)
    records, problems = read(tmp_path)
    assert ids(records) == expected(0, 1)
    assert not problems


def test_a_flipped_byte_costs_its_group_and_no_other(tmp_path: Path) -> None:
    part = write(tmp_path, 0, 1, 2)
    lines = part.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b'"OOM"', b'"O0M"')
    part.write_bytes(b"".join(lines))
    records, problems = read(tmp_path)
    assert ids(records) == expected(0, 2)
    assert [problem.partition(":")[2][:1] for problem in problems] == ["4", "5", "6"]
    assert "its checksum does not match" in problems[1]
    opened = Journal(tmp_path)
    assert set(opened.groups) == {group(0)[1].group, group(2)[1].group}
    assert opened.set_aside == problems
    opened.close()
    assert [entry["from"] for entry in aside(tmp_path)] == [f"records.jsonl:{n}" for n in (4, 5, 6)]
    assert [entry["line"] + "\n" for entry in aside(tmp_path)] == [line.decode() for line in lines[3:6]]
    assert part.read_bytes() == b"".join(lines[:3] + lines[6:])


@settings(max_examples=40)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_after_any_one_byte_nothing_counts_twice_and_the_rest_counts(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    part = write(folder, 0, 1, 2)
    text = bytearray(part.read_bytes())
    text[position % len(text)] = value
    part.write_bytes(text)
    records, _ = read(folder)
    names = ids(records)
    assert len(names) == len(set(names))
    assert sum(isinstance(record, Group) for record in records) >= 1  # a newline's loss costs two groups
    missing = [number for number in range(3) if group(number)[1].group not in names]
    write(folder, *missing)
    records, problems = read(folder)
    assert sorted(ids(records)) == sorted(expected(0, 1, 2))
    assert not problems


def test_a_group_without_its_closing_line_is_open(tmp_path: Path) -> None:
    part = write(tmp_path, 0)
    with part.open("a") as file:
        file.writelines(seal(cell) + "\n" for cell in group(1)[0])
    records, problems = read(tmp_path)
    assert ids(records) == expected(0)
    assert len(problems) == 2
    assert all("is not complete" in problem for problem in problems)
    opened = Journal(tmp_path)
    assert group(1)[1].group not in opened.groups
    assert opened.set_aside == problems
    opened.append(*group(1))
    opened.close()
    assert ids(read(tmp_path)[0]) == expected(0, 1)


def test_a_closing_line_without_one_of_its_cells_does_not_close(tmp_path: Path) -> None:
    part = write(tmp_path, 0)
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[1:]))
    records, problems = read(tmp_path)
    assert records == []
    assert len(problems) == 2


def test_a_group_written_twice_counts_once(tmp_path: Path) -> None:
    part = write(tmp_path, 0, 1)
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines + lines[:3]))
    records, problems = read(tmp_path)
    assert ids(records) == expected(0, 1)
    assert len(problems) == 3
    assert all("is recorded already" in problem for problem in problems)
    Journal(tmp_path).close()
    assert part.read_text() == "".join(lines)


def test_a_cell_that_no_group_lists_does_not_count(tmp_path: Path) -> None:
    part = write(tmp_path, 0)
    stray = group(0, ("stray",))[0][0]
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join([seal(stray) + "\n", *lines]))
    records, problems = read(tmp_path)
    assert ids(records) == expected(0)
    assert len(problems) == 1
    assert problems[0].startswith("records.jsonl:1: ")


def test_lines_that_are_no_records_are_each_named(tmp_path: Path) -> None:
    part = write(tmp_path, 0)
    part.write_bytes(b"hello\n{}\n\n\xff\xfe\n" + part.read_bytes())
    records, problems = read(tmp_path)
    assert ids(records) == expected(0)
    assert [problem[:16] for problem in problems] == [f"records.jsonl:{n}:" for n in (1, 2, 3, 4)]


def test_a_record_of_another_schema_is_named(tmp_path: Path) -> None:
    part = write(tmp_path, 0)
    import zlib

    body = '{"schema":99,"kind":"cell"'
    line = f'{body},"crc":"{zlib.crc32(body.encode()):08x}"}}'
    part.write_text(line + "\n" + part.read_text())
    records, problems = read(tmp_path)
    assert ids(records) == expected(0)
    assert "schema 99" in problems[0]


def test_an_empty_and_an_absent_folder_hold_nothing(tmp_path: Path) -> None:
    assert read(tmp_path) == ([], [])
    assert read(tmp_path / "absent") == ([], [])


# ---- parts ------------------------------------------------------------------------------------------------


def test_a_part_is_closed_before_it_grows_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write(tmp_path / "one", 10).stat().st_size
    most = 2 * size + 10
    monkeypatch.setattr(journal, "MOST_PART_BYTES", most)
    numbers = range(9)
    write(tmp_path / "run", *numbers)
    write(tmp_path / "run", *range(9, 24))
    found = journal.parts(tmp_path / "run")
    assert len(found) == 12
    assert [part.name for part in found[:3]] == ["records.jsonl", "records-2.jsonl", "records-3.jsonl"]
    assert found[9].name == "records-10.jsonl"  # by number, not by letter
    assert all(part.stat().st_size <= most for part in found)
    records, problems = read(tmp_path / "run")
    assert ids(records) == expected(*range(24))
    assert not problems


def test_a_group_larger_than_a_part_has_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MOST_PART_BYTES", 100)
    write(tmp_path, 0, 1)
    assert [part.name for part in journal.parts(tmp_path)] == ["records.jsonl", "records-2.jsonl"]
    assert ids(read(tmp_path)[0]) == expected(0, 1)


def test_a_repair_looks_at_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MOST_PART_BYTES", 100)
    write(tmp_path, 0, 1, 2)
    second = tmp_path / "records-2.jsonl"
    second.write_bytes(second.read_bytes()[:-30])
    opened = Journal(tmp_path)
    assert len(opened.groups) == 2
    opened.append(*group(1))
    opened.close()
    records, problems = read(tmp_path)
    assert sorted(ids(records)) == sorted(expected(0, 1, 2))
    assert not problems


# ---- writers ----------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    with pytest.raises(RunError, match="another run is writing to") as refused:
        Journal(tmp_path)
    assert refused.value.exit_code == Exit.MACHINE
    first.append(*group(0))
    first.close()
    Journal(tmp_path).close()
    assert ids(read(tmp_path)[0]) == expected(0)


def _hold(folder: str, ready: Any) -> None:
    Journal(Path(folder))
    ready.send(True)
    ready.recv()


def test_a_writer_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    holder = context.Process(target=_hold, args=(str(tmp_path), theirs))
    holder.start()
    assert ours.recv()
    with pytest.raises(RunError, match="another run"):
        Journal(tmp_path)
    holder.kill()
    holder.join()
    Journal(tmp_path).close()


def test_a_reader_needs_no_lock(tmp_path: Path) -> None:
    opened = Journal(tmp_path)
    opened.append(*group(0))
    assert ids(read(tmp_path)[0]) == expected(0)
    opened.close()


class FullDisk(io.StringIO):
    """A file that takes two lines and then has no space left."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._lines = path, 0

    def write(self, text: str) -> int:
        self._lines += 1
        with io.open(self._path, "a") as file:  # noqa: UP020 - Path.open is what the test replaces
            file.write(text if self._lines < 3 else text[:40])
        if self._lines >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(text)


def test_a_full_disk_ends_the_run_and_costs_the_open_group_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Journal(tmp_path)
    opened.append(*group(0))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: FullDisk(path))
        with pytest.raises(
            RunError, match="No space left on device; the 1 groups recorded so far are whole"
        ) as full:
            opened.append(*group(1))
    opened.close()
    assert full.value.exit_code == Exit.MACHINE
    assert f"--resume {tmp_path}" in str(full.value)
    assert set(opened.groups) == {group(0)[1].group}
    records, problems = read(tmp_path)
    assert ids(records) == expected(0)
    assert len(problems) == 3
    write(tmp_path, 1)
    assert ids(read(tmp_path)[0]) == expected(0, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_without_space_is_a_run_error(tmp_path: Path) -> None:
    opened = Journal(tmp_path)
    (tmp_path / "records.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match="No space left on device"):
        opened.append(*group(0))
    opened.close()


def test_a_folder_that_cannot_be_made_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write to") as refused:
        Journal(tmp_path / "file" / "run")
    assert refused.value.exit_code == Exit.MACHINE
