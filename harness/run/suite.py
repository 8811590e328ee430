"""Suites: which problems are posed and why, read from TOML.

A suite file has ``name``, ``why``, an optional ``device`` that the whole suite needs, ``approximations = true`` where
approximate implementations belong in it, and ``[[case]]`` tables. A case has its own ``name``, ``why``, optional
``device`` (posed only there) and ``inputs`` (how
values are drawn); every other key is a field of Problem, or one of three conveniences::

    seqlen = ["1k", "2k"]    seqlen_q and seqlen_k at once; sizes may be written with a binary k (1k = 1024)
    tokens = "16k"           batch = max(1, tokens // the longer sequence)
    hidden = 2048            heads = hidden // head_dim

A list is crossed with every other list of its case. The built-in suites are the data files of
attnbench.suites; a path that ends in ``.toml`` is the user's own, with the same words.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.harness.run.errors import Exit, RunError, unknown_word

SIZES = ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v")
CONVENIENCES = ("seqlen", "tokens", "hidden")
NUMBERS = ("dropout_p", "scale")
WORDS = ("dtype", "mask", "direction", "layout")
PROBLEM_KEYS = SIZES + CONVENIENCES + NUMBERS + WORDS
CASE_KEYS = ("name", "why", "device", "inputs", *PROBLEM_KEYS)
SUITE_KEYS = ("name", "why", "device", "approximations", "case")
DEVICES = ("cpu", "cuda")
# As oracle.inputs draws them; written out here because that module imports torch.
INPUTS = ("normal", "needle", "large", "equal", "negative", "overflow")

# A problem's field may have been given by another key: where an error about it is reported.
_GIVEN_BY = {"batch": "tokens", "heads": "hidden", "seqlen_q": "seqlen", "seqlen_k": "seqlen"}
_SIZE = re.compile(r"(\d+)(k?)", re.IGNORECASE)


class SuiteError(RunError):
    """A suite that cannot be used; names the file, the line and the key."""


@dataclass(frozen=True)
class Case:
    """One problem of a suite. name and why are its ``[[case]]``'s; device None is any device."""

    problem: Problem
    name: str
    why: str
    inputs: str = "normal"
    device: str | None = None


@dataclass(frozen=True)
class Suite:
    """source: the file it was read from. device: the kind of device that it needs, or None. approximations: whether
    approximate implementations are measured beside the exact ones."""

    name: str
    why: str
    cases: tuple[Case, ...]
    source: str
    device: str | None = None
    approximations: bool = False

    def on(self, device_kind: str) -> tuple[Case, ...]:
        """The cases posed on ``device_kind``; none where the suite needs another device."""
        if self.device not in (None, device_kind):
            return ()
        return tuple(case for case in self.cases if case.device in (None, device_kind))


def suite_names() -> list[str]:
    """Names of the built-in suites."""
    return sorted(f.name.removesuffix(".toml") for f in _built_in().iterdir() if f.name.endswith(".toml"))


def load_suite(name_or_path: str, device_kind: str) -> Suite:
    """The suite with the cases it poses on ``device_kind``.

    SuiteError as ``read_suite``'s, and with Exit.MACHINE for a suite that needs another device.
    """
    suite = read_suite(name_or_path)
    if suite.device not in (None, device_kind):
        message = f"suite {suite.name} needs a {suite.device} device, and this run is on {device_kind}"
        raise SuiteError(message, Exit.MACHINE)
    if not (cases := suite.on(device_kind)):
        raise SuiteError(f"suite {suite.name} poses nothing on {device_kind} ({suite.source})")
    return dataclasses.replace(suite, cases=cases)


def read_suite(name_or_path: str) -> Suite:
    """The suite as written, the cases of every device; SuiteError: unknown name or malformed file."""
    if name_or_path.endswith(".toml"):
        source, file = name_or_path, Path(name_or_path)
    else:
        if name_or_path not in (names := suite_names()):
            raise SuiteError(f"{unknown_word('suite', name_or_path, names)} (or the path of a .toml file)")
        source = f"{name_or_path}.toml"
        file = _built_in() / source
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SuiteError(f"cannot read suite file {source}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise SuiteError(
            f"suite file {source} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    return parse_suite(text, source)


def parse_suite(text: str, source: str) -> Suite:
    """Reads a suite from TOML ``text``; SuiteError names ``source``, line and key."""
    return SuiteParser(text, source).suite()


def parse_size(value: int | str) -> int:
    """4096 from 4096, "4096" or "4k"; ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(match[1]) * (1024 if match[2] else 1)
    raise ValueError(f"{value!r} is not a size: write 4096 or '4k'")


def _built_in() -> Any:
    return importlib.resources.files("attnbench.suites")


class SuiteParser:
    """One suite file. ``section`` is None for the file's top and the number of a ``[[case]]`` below it.

    A kind of suite with more words subclasses it: ``case_keys``, ``cases`` and ``check_repeat``.
    """

    case_keys: tuple[str, ...] = CASE_KEYS

    def __init__(self, text: str, source: str) -> None:
        self.lines = text.splitlines()
        self.source = source
        try:
            self.data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise self._syntax_error(error) from None

    def suite(self) -> Suite:
        self._check_keys(self.data, SUITE_KEYS, None)
        name, why = (self.word(self.data, key, None) for key in ("name", "why"))
        device = self.device(self.data, None)
        approximations = self.data.get("approximations", False)
        if not isinstance(approximations, bool):
            raise self.error("approximations", None, f"{approximations!r} is neither true nor false")
        tables = self.data.get("case", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables) or not tables:
            raise self.error("case", None, "a suite holds at least one [[case]] table")
        cases: list[Case] = []
        section_of_group: dict[tuple[str, str], int] = {}
        seen: set[tuple[str, str]] = set()
        for section, table in enumerate(tables):
            self._check_keys(table, self.case_keys, section)
            for case in self.cases(table, section):
                for kind in DEVICES if case.device is None else (case.device,):
                    self.check_repeat(case, kind, section, section_of_group, seen)
                cases.append(case)
        return Suite(name, why, tuple(cases), self.source, device, approximations)

    def cases(self, table: dict[str, Any], section: int) -> list[Case]:
        """The cases that one ``[[case]]`` table stands for."""
        name, why = (self.word(table, key, section) for key in ("name", "why"))
        inputs = self.word(table, "inputs", section, default="normal")
        if inputs not in INPUTS:
            raise self.error("inputs", section, unknown_word("kind of inputs", inputs, INPUTS))
        device = self.device(table, section)
        return [Case(problem, name, why, inputs, device) for problem in self.problems(table, section)]

    def problems(self, table: dict[str, Any], section: int) -> list[Problem]:
        """The problems of a table: its lists crossed, the last one written varying fastest."""
        for short, longs in (
            ("seqlen", ("seqlen_q", "seqlen_k")),
            ("tokens", ("batch",)),
            ("hidden", ("heads",)),
        ):
            if short in table and (both := [key for key in longs if key in table]):
                raise self.error(
                    short, section, f"stands for {' and '.join(longs)}; {both[0]} is given as well"
                )
        axes = {key: self._values(key, table[key], section) for key in PROBLEM_KEYS if key in table}
        axes = {key: axes[key] for key in table if key in axes}
        points = (dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values()))
        return [self._problem(point, section) for point in points]

    def _problem(self, point: dict[str, Any], section: int) -> Problem:
        fields = dict(point)
        if (seqlen := fields.pop("seqlen", None)) is not None:
            fields |= {"seqlen_q": seqlen, "seqlen_k": seqlen}
        for short, needed in (("tokens", "seqlen_q"), ("hidden", "head_dim")):
            if short in fields and fields.get(needed, 0) < 1:
                raise self.error(short, section, f"needs a {needed} of at least 1")
        if (tokens := fields.pop("tokens", None)) is not None:
            fields["batch"] = max(1, tokens // max(fields["seqlen_q"], fields.get("seqlen_k", 0)))
        if (hidden := fields.pop("hidden", None)) is not None:
            if hidden % fields["head_dim"]:
                message = f"{hidden} is not a multiple of head_dim {fields['head_dim']}"
                raise self.error("hidden", section, message)
            fields["heads"] = hidden // fields["head_dim"]
        if missing := [key for key in ("batch", "heads", "seqlen_q", "head_dim") if key not in fields]:
            key = missing[0]
            alternative = f" (or {_GIVEN_BY[key]})" if key in _GIVEN_BY else ""
            raise self.error(None, section, f"key {key!r}{alternative} is missing")
        try:
            return Problem(**fields)
        except ValueError as error:
            # Problem's messages begin with the field they are about.
            key = str(error).split(" ", 1)[0]
            key = key if key in point else _GIVEN_BY.get(key, key)
            raise self.error(key if key in point else None, section, str(error)) from None

    def _values(self, key: str, value: Any, section: int) -> list[Any]:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise self.error(key, section, "is an empty list, which would pose nothing")
        return [self._scalar(key, item, section) for item in values]

    def _scalar(self, key: str, value: Any, section: int) -> Any:
        try:
            if key in NUMBERS:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ValueError(f"{value!r} is not a number")
                return float(value)
            if key in WORDS:
                if not isinstance(value, str):
                    raise ValueError(f"{value!r} is not a string")
                return Mask.parse(value) if key == "mask" else value
            return parse_size(value)
        except ValueError as error:
            raise self.error(key, section, str(error)) from None

    def word(self, table: dict[str, Any], key: str, section: int | None, default: str | None = None) -> str:
        """The text of a key, its white space settled; SuiteError where it is missing or says nothing."""
        if key not in table and default is None:
            raise self.error(None, section, f"key {key!r} is missing")
        value = table.get(key, default)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, section, f"{value!r} is not a string that says something")
        return " ".join(value.split())

    def device(self, table: dict[str, Any], section: int | None) -> str | None:
        """The kind of device that the table asks for, or None."""
        if "device" not in table:
            return None
        device = self.word(table, "device", section)
        if device not in DEVICES:
            raise self.error("device", section, unknown_word("device", device, DEVICES))
        return device

    def _check_keys(self, table: dict[str, Any], known: tuple[str, ...], section: int | None) -> None:
        for key in table:
            if key not in known:
                raise self.error(key, section, unknown_word("key", key, known))

    def check_repeat(
        self,
        case: Case,
        kind: str,
        section: int,
        section_of_group: dict[tuple[str, str], int],
        seen: set[tuple[str, str]],
    ) -> None:
        """SuiteError for a case that stands in the suite already, on one kind of device."""
        # A group is judged and timed as one, so all directions of a problem belong to one case.
        key = (case.problem.key, kind)
        first = section_of_group.setdefault((case.problem.group_key, kind), section)
        if key in seen or first != section:
            place = f"the case on line {self._line(None, first)}" if first != section else "this very case"
            hint = "" if key in seen else "; give all directions of a problem in one case"
            message = f"case {case.name!r} repeats {case.problem.group_key} of {place}{hint}"
            raise self.error(None, section, message)
        seen.add(key)

    def error(self, key: str | None, section: int | None, message: str) -> SuiteError:
        """An error that names the file, the line and the key."""
        where = f"{self.source}:{self._line(key, section)}"
        return SuiteError(
            f"{where}: {message}" if key is None or key in message else f"{where}: {key} {message}"
        )

    def _syntax_error(self, error: tomllib.TOMLDecodeError) -> SuiteError:
        match = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", str(error))
        if not match:  # "at end of document": the last line was left open
            reason, line, place = str(error), len(self.lines), ""
        else:
            reason, line, place = match[1], int(match[2]), f" at column {match[3]}"
        written = self.lines[line - 1].strip() if 0 < line <= len(self.lines) else ""
        return SuiteError(f"{self.source}:{line}: not valid TOML: {reason}{place}, in `{written}`")

    def _line(self, key: str | None, section: int | None) -> int:
        """Number of the line that sets ``key`` in its section, or that opens the section."""
        heads = [n for n, line in enumerate(self.lines, 1) if re.match(r"\s*\[\[\s*case\s*\]\]", line)]
        bounds = [1, *heads, len(self.lines) + 1]
        place = 0 if section is None else section + 1
        if place + 1 >= len(bounds):  # cases written as an inline array have no header of their own
            return self._first(r"case\b", range(1, len(self.lines) + 1)) or 1
        first, end = bounds[place], bounds[place + 1]
        if key is None:
            return first
        name = rf"[\"']?{re.escape(key)}[\"']?"
        set_here = self._first(rf"{name}\s*[=.]", range(first, end))
        # A table belongs to the file's top wherever its header stands.
        own_table = (
            self._first(rf"\[+\s*{name}\s*[\].]", range(1, len(self.lines) + 1)) if section is None else None
        )
        return set_here or own_table or first

    def _first(self, pattern: str, numbers: range) -> int | None:
        return next((n for n in numbers if re.match(rf"\s*{pattern}", self.lines[n - 1])), None)
