"""What a run found, in few lines: verdicts by implementation, what is known, and each failing case once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from attnbench.harness.conform.families import families
from attnbench.harness.conform.known import Known, explained, is_new, no_longer_seen
from attnbench.harness.conform.matrix import Total, totals
from attnbench.harness.conform.records import Recorded
from attnbench.harness.conform.verdict import FAILURES, NOT_EXAMINED, UPSET, Verdict, masked

COLUMNS = (Verdict.PASS, *FAILURES, Verdict.OOM, Verdict.REFUSED, Verdict.UNAVAILABLE, NOT_EXAMINED)
MOST_REASON = 160


def summary(run: Recorded, known: Collection[Known] = ()) -> Iterator[str]:
    """Lines, the table first."""
    found = totals([run], known)
    yield from _aligned(verdict_rows(found))
    yield from _absent(run, [total.impl for total in found if not total.there])
    for impl in run.impls:
        if upset := [str(f.facts[UPSET]) for f in run.findings if f.impl == impl and UPSET in f.facts]:
            # Told, for what stays from one call to the next may be the implementation's own.
            said = "; ".join({masked(line): line[:MOST_REASON] for line in upset}.values())
            told = "errors of processes that an earlier case had upset were not those of fresh ones"
            yield f"{impl}: {len(upset)} {told}: {said}"
    for fault, seen in explained(run.findings, known).items():
        if seen:
            yield f"known, and not among the failures: {len(seen)} of {fault}"
    for fault in no_longer_seen(run.findings, known):
        yield f"no longer seen, so to be taken off the list: {fault}"
    for family in families(run.findings, run.cases):
        if new := [finding for finding in family.failed if is_new(finding, known)]:
            example = new[0].case.removeprefix(family.name)
            yield f"{family.impl} {family.name}: {family.counts}, as {example}: {new[0].reason[:MOST_REASON]}"


def _absent(run: Recorded, impls: Collection[str]) -> Iterator[str]:
    """Who cannot run here, with those that cannot for the same reason."""
    reasons: dict[str, list[str]] = {}
    for impl in impls:
        reason = next(finding.reason for finding in run.findings if finding.impl == impl)
        reasons.setdefault(reason, []).append(impl)
    for reason, names in reasons.items():
        yield f"{', '.join(names)}: unavailable, {reason}"


def verdict_rows(found: Sequence[Total]) -> list[list[str]]:
    """Header and a row an implementation that is there, with the device where there are several; nothing where nobody
    is. Columns are the verdicts that occur."""
    there = [total for total in found if total.there]
    columns = [name for name in COLUMNS if any(total.counts.get(name) for total in there)]
    devices, known = len({total.device for total in there}) > 1, any(total.known for total in there)
    head = [
        *(["device"] if devices else []),
        "implementation",
        *columns,
        *(["KNOWN"] if known else []),
        "failed",
        "at 95% below",
    ]
    rows = [
        [
            *([total.device] if devices else []),
            total.impl,
            *(str(total.counts.get(name, 0)) for name in columns),
            *([str(total.known)] if known else []),
            f"{total.failed} of {total.answered}",
            f"{100 * total.bound:.3g}%" if total.answered else "-",
        ]
        for total in there
    ]
    return [head, *rows] if rows else []


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells)
