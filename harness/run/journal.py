"""The record of a run on disk: append-only JSONL, one flushed line a record, each with a checksum of itself.

A group's cells are appended together, then the Group line that closes it. Opening a journal again repairs it: a
torn or corrupt line, and the cells of a group that was never closed, are moved to ``set-aside.jsonl`` with a word
on why, and the group is run again; nothing is dropped silently and nothing counts twice. A part is closed before
it reaches MOST_PART_BYTES, so that published runs stay small files.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.record import Cell, Group, Record, RecordError, from_json, to_json

MOST_PART_BYTES = 1_900_000
SET_ASIDE = "set-aside.jsonl"
_SEAL = re.compile(r',"crc":"([0-9a-f]{8})"}$')


def seal(record: Record) -> str:
    """The record's line; see ``seal_json``."""
    return seal_json(to_json(record))


def unseal(line: str) -> Record:
    """The record of a sealed line; RecordError says what is wrong with it."""
    return from_json(unseal_json(line))


def seal_json(data: dict[str, Any]) -> str:
    """An object's line, ending in the CRC-32 of all before it; still plain JSON."""
    body = json.dumps(data, separators=(",", ":"), allow_nan=False)[:-1]
    return f'{body},"crc":"{zlib.crc32(body.encode()):08x}"}}'


def unseal_json(line: str) -> dict[str, Any]:
    """The object of a sealed line; RecordError says what is wrong with it."""
    match = _SEAL.search(line)
    if not match:
        raise RecordError("the line is torn: it does not end in a checksum")
    body = line[: match.start()]
    if f"{zlib.crc32(body.encode()):08x}" != match.group(1):
        raise RecordError("the line is corrupt: its checksum does not match")
    try:
        data: dict[str, Any] = json.loads(body + "}")
    except ValueError as error:
        raise RecordError(f"the line is not JSON: {error}") from error
    return data


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("records*.jsonl"), key=_part_number)


def read(folder: Path) -> tuple[list[Record], list[str]]:
    """Every readable record of closed groups in order, and one line for each thing that is not one."""
    records: list[Record] = []
    problems: list[str] = []
    for where, outcome in _scan(folder):
        if isinstance(outcome, str):
            problems.append(f"{where}: {outcome}")
        else:
            records.append(outcome)
    return records, problems


class Journal:
    """Appends groups to a folder. One writer: the folder is locked until the process ends or ``close``."""

    def __init__(self, folder: Path) -> None:
        """Opens or creates the journal and repairs it; ``set_aside`` says what was moved away."""
        self.folder = folder
        self.set_aside: list[str] = []
        self.groups: dict[str, Group] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._repair()
        except BlockingIOError as error:
            raise RunError(f"another run is writing to {folder}", Exit.MACHINE) from error
        except OSError as error:
            raise RunError(f"cannot write to {folder}: {error.strerror}", Exit.MACHINE) from error

    def append(self, cells: Iterable[Cell], group: Group) -> None:
        """Writes the cells, then the group that closes them; RunError (nothing recorded is lost) when it cannot."""
        lines = [seal(cell) for cell in cells] + [seal(group)]
        part = self._part_for(sum(map(len, lines)) + len(lines))
        try:
            with part.open("a") as file:
                for line in lines:
                    file.write(line + "\n")
                    file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            done = len(self.groups)
            raise RunError(
                f"cannot write {part}: {error.strerror}; the {done} groups recorded so far are whole, "
                f"go on later with --resume {self.folder}",
                Exit.MACHINE,
            ) from error
        self.groups[group.group] = group

    def close(self) -> None:
        os.close(self._lock)

    def _part_for(self, size: int) -> Path:
        existing = parts(self.folder)
        if not existing:
            return self.folder / "records.jsonl"
        last = existing[-1]
        if last.stat().st_size + size <= MOST_PART_BYTES:
            return last
        return self.folder / f"records-{_part_number(last) + 1}.jsonl"

    def _repair(self) -> None:
        bad: dict[Path, dict[int, str]] = {}
        for where, outcome in _scan(self.folder):
            if isinstance(outcome, str):
                bad.setdefault(where.path, {})[where.line] = outcome
                self.set_aside.append(f"{where}: {outcome}")
            elif isinstance(outcome, Group):
                self.groups[outcome.group] = outcome
        for path in parts(self.folder):
            if path in bad or not path.read_bytes().endswith(b"\n"):
                _move_aside(path, bad.get(path, {}), self.folder / SET_ASIDE)


class Where:
    """A line of a part, for messages."""

    def __init__(self, path: Path, line: int) -> None:
        self.path, self.line = path, line

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"


def _scan(folder: Path) -> Iterator[tuple[Where, Record | str]]:
    """Each line of each part with its record, or with why it does not count.

    A cell counts when a later Group line lists it; the first such group wins, so no cell counts twice.
    """
    lines: list[tuple[Where, Record | str]] = []
    for path in parts(folder):
        text = path.read_bytes().decode(errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                outcome: Record | str = unseal(line)
            except RecordError as error:
                outcome = str(error)
            lines.append((Where(path, number), outcome))
    pending: dict[str, dict[str, int]] = {}
    closed: dict[str, set[int]] = {}
    for index, (_, outcome) in enumerate(lines):
        if isinstance(outcome, Cell):
            pending.setdefault(outcome.group, {})[outcome.id] = index
        elif isinstance(outcome, Group) and outcome.group not in closed:
            cells = pending.get(outcome.group, {})
            if set(outcome.cells) <= set(cells):
                closed[outcome.group] = {cells[cell] for cell in outcome.cells} | {index}
    counted = set().union(*closed.values()) if closed else set()
    for index, (where, outcome) in enumerate(lines):
        if isinstance(outcome, str) or index in counted:
            yield where, outcome
        else:
            state = (
                "recorded already"
                if outcome.group in closed
                else "not complete, and is run again on --resume"
            )
            yield where, f"its group {outcome.group} is {state}"


def _move_aside(path: Path, bad: dict[int, str], aside: Path) -> None:
    """Appends the bad lines to ``aside``, then replaces ``path`` by its good ones: in that order, nothing is lost."""
    lines = path.read_bytes().decode(errors="replace").splitlines()
    with aside.open("a") as file:
        for number, why in sorted(bad.items()):
            file.write(
                json.dumps({"from": f"{path.name}:{number}", "why": why, "line": lines[number - 1]}) + "\n"
            )
        file.flush()
        os.fsync(file.fileno())
    good = [line for number, line in enumerate(lines, 1) if number not in bad]
    replacement = path.with_suffix(".tmp")
    with replacement.open("w") as file:
        file.writelines(line + "\n" for line in good)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)


def _part_number(path: Path) -> int:
    match = re.fullmatch(r"records-(\d+)", path.stem)
    return int(match.group(1)) if match else 1
