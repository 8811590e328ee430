"""Conformance suites: TOML to cases, with the words of a speed suite and a few more.

A ``[[case]]`` has everything that a case of ``run/suite.py`` has, lists crossed alike, and::

    check = "agrees"                     the check, or a list of them (``checks.CHECKS``)
    inputs = ["normal", "needle"]        kinds of values, crossed as well
    cites = ["flash-attention#282"]      the issues of real libraries that it stands for
    with = { repeats = 200 }             what the check is told
    strides = ["k=transposed", "dout=expanded"]   where tensors lie in memory (``views.VIEWS``); ``q=a,k=b`` for two
    nightly = true                       in the larger selection only
    nightly = { dtype = "fp16" }         beside it the same so changed, in the larger selection only
    alone = true                         needs the device to itself
    cuda = { dtype = "bf16" }            what is different on that device (``cpu`` likewise)

The built-in ones are ``conformance/*.toml`` of attnbench.suites; a path that ends in ``.toml`` is the user's own.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attnbench.harness.conform.case import Case, Options
from attnbench.harness.conform.checks import CHECKS
from attnbench.harness.conform.views import with_views
from attnbench.harness.run import suite
from attnbench.harness.run.errors import RunError, unknown_word
from attnbench.harness.run.suite import (
    CASE_KEYS,
    DEVICES,
    INPUTS,
    PROBLEM_KEYS,
    Suite,
    SuiteError,
    SuiteParser,
)

MORE_KEYS = ("check", "cites", "with", "strides", "nightly", "alone", *DEVICES)
OVERRIDABLE = (*PROBLEM_KEYS, "inputs", "check", "with", "strides", "nightly", "alone")
_CITE = re.compile(r"[\w.-]+#\d+")


def suite_names() -> list[str]:
    """Names of the built-in conformance suites."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def read_suite(name_or_path: str) -> Suite:
    """The suite as written; SuiteError for an unknown name or a malformed file."""
    if not name_or_path.endswith(".toml") and name_or_path not in (names := suite_names()):
        raise SuiteError(
            f"{unknown_word('conformance suite', name_or_path, names)} (or the path of a .toml file)"
        )
    builtin = not name_or_path.endswith(".toml")
    source = f"{name_or_path}.toml" if builtin else name_or_path
    file = _folder() / source if builtin else Path(source)
    try:
        return parse_suite(file.read_text(encoding="utf-8"), source)
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"cannot read suite file {source}: {error}") from None


def parse_suite(text: str, source: str) -> Suite:
    """Reads a suite from TOML ``text``; SuiteError names ``source``, line and key."""
    return _ConformanceParser(text, source).suite()


def select(
    suites: Sequence[str],
    device_kind: str,
    *,
    nightly: bool = False,
    only: Sequence[str] = (),
    seeds: int = 1,
) -> list[Case]:
    """Cases of the named suites (all when none is named) on one kind of device, each with ``seeds`` draws of inputs.

    only: parts of case ids to keep. RunError where nothing is left.
    """
    read = [read_suite(name) for name in suites or suite_names()]
    found = [case for one in read for case in cases_on(one, device_kind, nightly=nightly)]
    for part in only:
        if not any(part in case.id for case in found):
            raise RunError(f"--case {part!r} is part of no case's name; `bench conform --list` shows them")
    kept = [case for case in found if not only or any(part in case.id for part in only)]
    if not kept:
        raise RunError(f"suite {', '.join(suites)} poses nothing on {device_kind}")
    return [case.with_seed(seed) for case in kept for seed in range(seeds)]


def cases_on(suite_read: Suite, device_kind: str, *, nightly: bool) -> list[Case]:
    """The cases that a suite poses on one kind of device; with ``nightly`` the larger selection."""
    cases = [case for case in suite_read.on(device_kind) if isinstance(case, Case)]
    return [case for case in cases if nightly or not case.nightly]


def _folder() -> Any:
    return importlib.resources.files("attnbench.suites") / "conformance"


class _ConformanceParser(SuiteParser):
    case_keys = (*CASE_KEYS, *MORE_KEYS)

    def cases(self, table: dict[str, Any], section: int) -> list[suite.Case]:
        given = [kind for kind in DEVICES if kind in table]
        if not given:
            return self._cases(table, section)
        if "device" in table:
            raise self.error(given[0], section, f"cannot differ: the case is on {table['device']} alone")
        shared = {key: value for key, value in table.items() if key not in given}
        found = []
        for kind in DEVICES:
            changes = table.get(kind, {})
            if not isinstance(changes, dict):
                raise self.error(kind, section, f"{changes!r} is not a table: {{ dtype = 'bf16' }}")
            if other := [key for key in changes if key not in OVERRIDABLE]:
                raise self.error(kind, section, unknown_word("key", other[0], OVERRIDABLE))
            found += self._cases(shared | changes | {"device": kind}, section)
        return found

    def _cases(self, table: dict[str, Any], section: int) -> list[suite.Case]:
        if isinstance(more := table.get("nightly"), dict):
            shared = {key: value for key, value in table.items() if key != "nightly"}
            if other := [key for key in more if key not in OVERRIDABLE]:
                raise self.error("nightly", section, unknown_word("key", other[0], OVERRIDABLE))
            return self._cases(shared, section) + self._cases(shared | more | {"nightly": True}, section)
        name, why = (self.word(table, key, section) for key in ("name", "why"))
        checks = self._words(table, "check", section, "check", CHECKS)
        kinds = self._words(table, "inputs", section, "kind of inputs", INPUTS)
        facts: dict[str, Any] = {
            "name": name,
            "why": why,
            "device": self.device(table, section),
            "suite": self.word(self.data, "name", None),
            "cites": self._cites(table, section),
            "options": self._options(table, checks, section),
            "nightly": self._flag(table, "nightly", section),
            "alone": self._flag(table, "alone", section),
        }
        problems = self._in_views(table, section)
        return [
            Case(problem=problem, check=check, inputs=inputs, **facts)
            for problem, inputs, check in itertools.product(problems, kinds, checks)
        ]

    def check_repeat(
        self, case: suite.Case, kind: str, section: int, section_of_group: Any, seen: set[Any]
    ) -> None:
        assert isinstance(case, Case)
        key = (case.id, kind)
        if key in seen:
            raise self.error(None, section, f"case {case.name!r} stands twice: {case.id}")
        seen.add(key)

    def _in_views(self, table: dict[str, Any], section: int) -> list[Any]:
        problems = self.problems(table, section)
        if "strides" not in table:
            return problems
        views = table["strides"] if isinstance(table["strides"], list) else [table["strides"]]
        try:
            return [with_views(problem, view) for problem in problems for view in views]
        except ValueError as error:
            raise self.error("strides", section, str(error)) from None

    def _words(
        self, table: dict[str, Any], key: str, section: int, kind: str, known: Iterable[str]
    ) -> list[str]:
        value = table.get(key, next(iter(known)))
        for word in (words := value if isinstance(value, list) else [value]):
            if word not in known:
                raise self.error(key, section, unknown_word(kind, str(word), known))
        if not words:
            raise self.error(key, section, "is an empty list, which would pose nothing")
        return words

    def _cites(self, table: dict[str, Any], section: int) -> tuple[str, ...]:
        cites = table.get("cites", [])
        if not isinstance(cites, list) or not all(isinstance(c, str) and _CITE.fullmatch(c) for c in cites):
            raise self.error(
                "cites", section, f"{cites!r} is not a list of issues, written 'flash-attention#282'"
            )
        return tuple(cites)

    def _options(self, table: dict[str, Any], checks: list[str], section: int) -> Options:
        options = table.get("with", {})
        if not isinstance(options, dict):
            raise self.error("with", section, f"{options!r} is not a table: {{ repeats = 200 }}")
        for check, name in itertools.product(checks, options):
            if name not in CHECKS[check].options:
                known = CHECKS[check].options
                raise self.error("with", section, f"check {check}: {unknown_word('option', name, known)}")
        return options

    def _flag(self, table: dict[str, Any], key: str, section: int) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, section, f"{value!r} is neither true nor false")
        return value


def sharing(cases: Iterable[Case]) -> list[Case]:
    """The same cases, those with one question next to each other, small problems first."""

    def size(case: Case) -> int:
        return case.problem.with_direction("fwd").input_bytes  # the same for both directions of a question

    return sorted(cases, key=lambda case: (case.alone, size(case), case.question))


def widest(cases: Iterable[Case]) -> dict[str, Case]:
    """For each question that a check needs the answer to, the case whose direction asks for most."""
    found: dict[str, Case] = {}
    for case in cases:
        if not CHECKS[case.check].oracle or case.problem.dropout_p:
            continue
        known = found.get(case.question)
        if known is None or known.problem.direction == "fwd":
            found[case.question] = dataclasses.replace(case)
    return found
