"""pytest: ``pytest --pyargs attnbench.suites --benchmark-only --impl X --suite smoke`` times cells as benchmarks.

Every cell is an item that pytest-benchmark reports, saves and compares. What is measured is what ``bench run`` would:
the items of a session are one run of the harness's own runner, judged before timed, each implementation in a process
of its own, all of them in interleaved rounds. The samples are the device's: pytest-benchmark's timer is replaced by
one that reads them.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from attnbench.harness.conform.pytest_plugin import device, implementations, words

if TYPE_CHECKING:
    from attnbench.harness.run.plan import GroupPlan
    from attnbench.harness.run.record import Cell

DEFAULT_SUITE = "smoke"
ANSWERS = ("UNSUPPORTED", "UNAVAILABLE", "OOM")
"""Not a time, and not a defect: such an item is skipped with the reason."""
ENVIRONMENT = ("devices", "torch", "triton", "packages")
PLAN: pytest.StashKey[GroupPlan] = pytest.StashKey()
MEASURED: pytest.StashKey[Measured] = pytest.StashKey()


def pytest_collection(session: pytest.Session) -> None:
    """A mistake in ``--impl`` ends pytest at once, with one line."""
    implementations(session.config)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> SpeedFile | None:
    config = parent.config
    if file_path.suffix != ".toml" or not config.getoption("benchmark_only", default=False):
        return None
    if not (implementations(config) and _is_built_in(file_path)):
        return None
    wanted = words(config, "suite") or [DEFAULT_SUITE]
    return SpeedFile.from_parent(parent, path=file_path) if file_path.stem in wanted else None


@pytest.hookimpl(optionalhook=True)  # there is none under ``-p no:benchmark``
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds the device that was measured, which pytest-benchmark knows nothing of."""
    measured = config.stash.get(MEASURED, None)
    if measured is not None:
        machine_info["attnbench"] = measured.environment


def _is_built_in(path: Path) -> bool:
    from attnbench.harness.run.suite import suite_names

    return path.parent.name == "suites" and path.stem in suite_names()


class SpeedFile(pytest.File):
    """One suite, in the groups that ``bench run`` would pose; an item a cell."""

    def collect(self) -> Iterator[pytest.Function]:
        from attnbench.harness.run.errors import RunError
        from attnbench.harness.run.plan import make_plan
        from attnbench.harness.run.suite import load_suite

        kind = device(self.config).partition(":")[0]
        try:
            plans = make_plan(load_suite(str(self.path), kind), implementations(self.config), seed=0)
        except RunError as error:
            raise self.CollectError(str(error)) from None
        for plan in plans:
            for problem in plan.problems:
                for impl in plan.impls:
                    yield self._item(plan, f"{impl}/{problem.key}", problem.key)

    def _item(self, plan: GroupPlan, cell: str, group: str) -> pytest.Function:
        clock = SampleClock()
        test = _test_of(self, (plan.suite, cell), clock)
        item: pytest.Function = pytest.Function.from_parent(self, name=cell, callobj=test)
        item.stash[PLAN] = plan
        item.add_marker(pytest.mark.benchmark(timer=clock, group=group))
        return item


class SampleClock:
    """Stands in for pytest-benchmark's timer: its time is the device's, and passes one sample a call of ``advance``."""

    __name__ = "device_clock"

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: Iterator[float] = iter(())

    def load(self, samples: list[float]) -> None:
        self._samples = iter(samples)

    def advance(self) -> None:
        self._now += next(self._samples)

    def __call__(self) -> float:
        """Seconds of device time so far."""
        return self._now


def _test_of(file: SpeedFile, key: tuple[str, str], clock: SampleClock) -> Callable[..., None]:
    def test(benchmark: Any) -> None:
        from attnbench.harness.speed.benchmark import extra_info, fullname_of, group_of, seconds_of

        cell = measured(file.session).cells[key]
        if cell.status in ANSWERS:
            pytest.skip(f"{cell.status}: {'; '.join(cell.reasons)}")
        if not cell.timing:
            pytest.fail(f"{cell.status}: {'; '.join(cell.reasons)}\n{cell.evidence}".rstrip(), pytrace=False)
        samples = seconds_of(cell)
        clock.load(samples)
        benchmark.name, benchmark.fullname, benchmark.group = cell.id, fullname_of(cell), group_of(cell)
        benchmark.extra_info |= extra_info(cell)
        benchmark.pedantic(clock.advance, rounds=len(samples))

    return test


class Measured:
    """What a session's items ask about. cells: by suite and id. environment: of the device that was measured."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], Cell] = {}
        self.environment: dict[str, Any] = {}


def measured(session: pytest.Session) -> Measured:
    """Runs the groups of all items that pytest selected, with their implementations, when the first one asks."""
    found = session.config.stash.get(MEASURED, None)
    if found is None:
        found = session.config.stash[MEASURED] = _measure(session)
    return found


def _measure(session: pytest.Session) -> Measured:
    """One run a suite: a run holds a group once, and two suites may pose the same one."""
    from attnbench.harness.report.load import load_run
    from attnbench.harness.run.errors import RunError
    from attnbench.harness.run.progress import make_progress
    from attnbench.harness.run.runner import RunOptions, run

    found = Measured()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnbench-speed-")))
        progress = stack.enter_context(make_progress(quiet=True, verbose=False))
        for suite, plans in _selected(session).items():
            options = RunOptions((device(session.config),), folder / suite, memory=False, command=("pytest",))
            try:
                run(plans, options, progress)
            except RunError as error:
                raise pytest.UsageError(str(error)) from None
            done = load_run(folder / suite)
            found.cells |= {(cell.suite, cell.id): cell for cell in done.cells}
            found.environment = {name: done.environment.get(name) for name in ENVIRONMENT}
    return found


def _selected(session: pytest.Session) -> dict[str, list[GroupPlan]]:
    """By suite, the groups with the implementations and directions that pytest has not deselected."""
    found: dict[str, dict[str, tuple[GroupPlan, set[str]]]] = {}
    for item in session.items:
        if (plan := item.stash.get(PLAN, None)) is not None:
            found.setdefault(plan.suite, {}).setdefault(plan.group, (plan, set()))[1].add(item.name)
    return {
        suite: [_narrowed(plan, cells) for plan, cells in groups.values()] for suite, groups in found.items()
    }


def _narrowed(plan: GroupPlan, cells: set[str]) -> GroupPlan:
    """Without the implementations and the directions that no cell of ``cells`` has."""
    impls = tuple(impl for impl in plan.impls if any(cell.startswith(f"{impl}/") for cell in cells))
    problems = tuple(
        problem for problem in plan.problems if any(cell.endswith(f"/{problem.key}") for cell in cells)
    )
    return dataclasses.replace(plan, impls=impls, problems=problems)
