"""pytest: ``pytest --pyargs attnbench.suites --impl X`` makes every conformance case an item.

Registered as ``attnbench`` in the group pytest11, so a plugin author gets it by installing attnbench. Without
``--impl`` it collects nothing. The workers of one pytest process serve all of its items.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from attnbench.harness.conform.case import Case
    from attnbench.harness.conform.examination import Examination
    from attnbench.harness.conform.verdict import Finding

FOLDER = "conformance"
EXAMINATION: pytest.StashKey[Examination] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attnbench", "attention implementations")
    group.addoption(
        "--impl", action="append", default=[], metavar="NAME", help="implementation to hold to its word"
    )
    group.addoption(
        "--suite", action="append", default=[], metavar="NAME", help="suite to pose (default all)"
    )
    group.addoption(
        "--attnbench-device", metavar="DEVICE", help="cpu or cuda:N (default the first GPU, else cpu)"
    )
    group.addoption(
        "--attnbench-nightly", action="store_true", help="the larger selection of conformance cases"
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> SuiteFile | None:
    config = parent.config
    if file_path.suffix != ".toml" or file_path.parent.name != FOLDER or not implementations(config):
        return None
    if config.getoption("benchmark_only", default=False):
        return None
    wanted = words(config, "suite")
    return SuiteFile.from_parent(parent, path=file_path) if not wanted or file_path.stem in wanted else None


def pytest_unconfigure(config: pytest.Config) -> None:
    examination = config.stash.get(EXAMINATION, None)
    if examination is not None:
        examination.__exit__(None, None, None)


def words(config: pytest.Config, option: str) -> list[str]:
    """Values of an option given as ``a,b``, several times, or both."""
    return [word for value in config.getoption(option) for word in value.split(",") if word]


def implementations(config: pytest.Config) -> tuple[str, ...]:
    """The implementations that ``--impl`` names; UsageError for one that is not registered."""
    wanted = words(config, "impl")
    if not wanted:
        return ()
    from attnbench.harness.registry import entries
    from attnbench.harness.run.errors import RunError
    from attnbench.harness.run.plan import select_impls

    try:
        return select_impls(entries(), wanted, (), "--impl")
    except RunError as error:
        raise pytest.UsageError(str(error)) from None


def device(config: pytest.Config) -> str:
    """The device that was asked for, else the first GPU, else the CPU."""
    if chosen := config.getoption("attnbench_device"):
        return str(chosen)
    from attnbench.harness.run.gpus import visible_gpus

    return "cuda:0" if visible_gpus() else "cpu"


class SuiteFile(pytest.File):
    """One conformance suite."""

    def collect(self) -> Iterator[CaseItem]:
        from attnbench.harness.conform.suite import cases_on, read_suite
        from attnbench.harness.run.errors import RunError

        try:
            suite = read_suite(str(self.path))
        except RunError as error:
            raise self.CollectError(str(error)) from None
        kind = device(self.config).partition(":")[0]
        cases = cases_on(suite, kind, nightly=self.config.getoption("attnbench_nightly"))
        for impl in implementations(self.config):
            for case in cases:
                yield CaseItem.from_parent(self, name=f"{impl}:{case.id}", impl=impl, case=case)


class CaseItem(pytest.Item):
    """One case for one implementation."""

    def __init__(self, *, impl: str, case: Case, **rest: Any) -> None:
        super().__init__(**rest)
        self.impl, self.case = impl, case

    def runtest(self) -> None:
        from attnbench.harness.conform.verdict import Verdict

        finding = examination(self.session).examine(self.impl, self.case)
        self.user_properties.append(("verdict", finding.word))
        if finding.failed or not finding.asked:  # a fault of the machine is not to look like a skip
            raise NotConformingError(finding)
        if finding.verdict is not Verdict.PASS:
            pytest.skip(f"{finding.verdict}: {finding.reason}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        if not isinstance(excinfo.value, NotConformingError):
            return str(super().repr_failure(excinfo))
        finding = excinfo.value.finding
        lines = [f"{finding.word}: {finding.impl}: {finding.reason}", f"case: {self.case.id}"]
        lines += [f"why: {self.case.why}", *(f"cites: {cite}" for cite in self.case.cites), finding.evidence]
        return "\n".join(line for line in lines if line)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name


class NotConformingError(Exception):
    """Carries a finding that failed, or that the machine kept from being made, to the report."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.reason)
        self.finding = finding


def examination(session: pytest.Session) -> Examination:
    """The examination of this pytest process, begun with the first item and told of all that were collected."""
    found = session.config.stash.get(EXAMINATION, None)
    if found is not None:
        return found
    from attnbench.harness.conform.examination import Examination
    from attnbench.harness.run.errors import RunError

    cases = [item.case for item in session.items if isinstance(item, CaseItem)]
    try:
        begun = Examination(device(session.config), cases).__enter__()
    except RunError as error:
        raise pytest.UsageError(str(error)) from None
    session.config.stash[EXAMINATION] = begun
    return begun
