"""Every planted bug is seen by the case that is there for it, and by nothing where it makes no difference."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.mutants import Mutant, catalogue
from attnbench.harness.conform.mutants.examine import Bench, of_case
from attnbench.harness.conform.mutants.plain import Plain
from attnbench.harness.conform.suite import select, suite_names
from attnbench.harness.conform.verdict import FAILURES

LEAST = 50
HERE = [mutant for mutant in catalogue().values() if not mutant.crashes]
"""Those that leave the process that they run in alive."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def cases() -> tuple[Case, ...]:
    return tuple(select([], "cpu"))


@cache
def bench() -> Bench:
    return Bench("cpu", cases())


@pytest.mark.parametrize("mutant", HERE, ids=lambda mutant: mutant.name)
def test_a_mutant_dies_by_the_case_named_for_it_and_passes_its_control(mutant: Mutant) -> None:
    seen = bench().sees(mutant.implementation(), of_case(cases(), mutant.killed_by))
    assert seen.killed, f"{mutant.breaks} Not one of the {seen.posed} variants of {mutant.killed_by} saw it."
    control = bench().sees(mutant.implementation(), of_case(cases(), mutant.control))
    assert not control.killed, f"its control fails too: {control.case}: {control.reason}"


@pytest.mark.parametrize("suite", suite_names())
def test_without_a_bug_every_case_passes(suite: str) -> None:
    """What the mutants are made of, whole: or they might die of something else than their bug."""
    outcomes = {case.id: bench().examine(Plain(), case) for case in cases() if case.suite == suite}
    assert outcomes
    assert {name: o.reason for name, o in outcomes.items() if o.verdict in FAILURES} == {}


@pytest.mark.parametrize("suite", suite_names())
def test_every_suite_sees_a_mutant_that_no_other_does(suite: str) -> None:
    """The first that says so, before every case of all the others: leave the suite out, and a bug gets through."""
    alone = next(mutant for mutant in HERE if mutant.only and mutant.suite == suite)
    others = [case for case in cases() if case.suite != suite]
    seen = bench().sees(alone.implementation(), others)
    assert not seen.killed, f"{alone.name} is seen by {seen.case} as well: {seen.reason}"


def test_the_catalogue_names_what_there_is() -> None:
    names = {f"{case.suite}/{case.name}" for case in cases()}
    planted = catalogue().values()
    assert len(planted) >= LEAST
    assert {case for mutant in planted for case in (mutant.killed_by, mutant.control)} <= names
    assert all(mutant.killed_by != mutant.control for mutant in planted)
    assert {mutant.suite for mutant in planted} == set(suite_names())
