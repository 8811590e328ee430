"""One side of a gate is a recording and the other is not: that one is recorded now, by the recording's plan and
method."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attnbench.harness import registry
from attnbench.harness.gate.sides import Side
from attnbench.harness.run import runner
from attnbench.harness.run.errors import RunError, unknown_word
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.progress import QuietProgress

METHOD = ("seed", "rounds", "samples", "hot", "cudagraph")


def record(
    side: Side, recording: Path, only: Sequence[str], device: str, output: Path, command: Sequence[str]
) -> Path:
    """The folder of a run of ``side`` on the groups of ``recording``. only: implementations, all if empty.

    RunError when the recording does not say how it was measured, or holds no such implementation.
    """
    try:
        document = json.loads((recording / "plan.json").read_text(encoding="utf-8"))
        plans = [GroupPlan.from_json(plan) for plan in document["plans"]]
        method = {name: document["options"][name] for name in METHOD}
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{recording}: plan.json does not say how it was measured: {error!r}") from None
    recorded = list(dict.fromkeys(name for plan in plans for name in plan.impls))
    for name in only:
        if name not in recorded:
            raise RunError(f"--only: {unknown_word('implementation', name, recorded)}")
    impls = tuple(only) or tuple(name for name in recorded if name in side.impls)
    if not impls:
        raise RunError(f"--{side.name}: registers none of what {recording} recorded; name one with --only")
    posed = [dataclasses.replace(plan, impls=impls) for plan in plans]
    options = runner.RunOptions((device,), output, memory=False, command=tuple(command), **method)
    with _found_first(side.folders, impls):
        runner.run(posed, options, QuietProgress())
    return output


@contextmanager
def _found_first(folders: Sequence[str], impls: Sequence[str]) -> Iterator[None]:
    """Has the workers of these implementations look there first (``registry.search_path``)."""
    names = [registry.path_variable(impl) for impl in impls]
    before = {name: os.environ.get(name) for name in names}
    for name in names:
        os.environ[name] = os.pathsep.join([*folders, *filter(None, [before[name]])])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
