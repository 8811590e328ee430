"""The support matrix: what each implementation does of each feature, by dtype and device, from findings alone.

A cell is made of the findings of all cases that have the feature; nothing in it comes from a declaration that was not
put to the test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.known import Known
from attnbench.harness.conform.records import Recorded
from attnbench.harness.conform.verdict import FAILURES, NOT_EXAMINED, Finding, Verdict
from attnbench.harness.problem import DTYPES, Problem

MOST_REASONS = 3
Holds = Callable[[Problem], bool]


def _unequal(p: Problem) -> bool:
    return p.seqlen_q != p.seqlen_k


def _empty_rows(p: Problem) -> bool:
    first, last = p.mask.row_bounds(p.seqlen_q, p.seqlen_k)
    return bool((first == last).any())


SPECIAL: dict[str, Holds] = {
    "nothing to do (a size of 0)": lambda p: 0 in (p.batch, p.seqlen_q, p.seqlen_k),
    "head_dim above 128": lambda p: p.head_dim > 128,
    "head_dim no multiple of 8": lambda p: p.head_dim % 8 != 0 or p.head_dim_v % 8 != 0,
    "head_dim_v differs": lambda p: p.head_dim_v != p.head_dim,
    "scale of its own": lambda p: p.scale is not None and p.scale > 0,
    "negative scale": lambda p: p.scale is not None and p.scale < 0,
    "BHSD views, packed QKV": lambda p: p.layout != "bshd",
    "other strides": lambda p: bool(p.strides),
    "dropout": lambda p: p.dropout_p > 0,
    "past 65535 batch entries and heads": lambda p: p.batch * p.heads > 65535,
    "past 2^31 elements": lambda p: p.batch * p.seqlen_q * p.heads * p.head_dim >= 1 << 31,
}
"""What a case is there for when it has it: it says nothing then of its mask or its heads."""
ORDINARY: dict[str, Holds] = {
    "no mask": lambda p: p.mask.kind == "full",
    "causal, equal lengths": lambda p: p.mask.kind == "causal" and not _unequal(p),
    "causal, aligned bottom right": lambda p: (
        p.mask.kind == "causal" and _unequal(p) and p.mask.alignment == "bottom_right"
    ),
    "causal, aligned top left": lambda p: (
        p.mask.kind == "causal" and _unequal(p) and p.mask.alignment == "top_left"
    ),
    "window": lambda p: p.mask.kind == "window",
    "block-sparse": lambda p: p.mask.kind == "block_sparse",
    "rows that see nothing": _empty_rows,
    "grouped heads": lambda p: p.kv_heads != p.heads,
    "one query": lambda p: p.seqlen_q == 1,
}
UNALIGNED = "a start that is not aligned"
OF_SUITE = {
    "determinism": "repeats bit by bit",
    "memory_safety": "keeps to its memory",
    "autograd": "autograd, compile, graphs",
}
LSE_GRADIENT = "differentiable lse"


def features(case: Case) -> list[str]:
    """Rows that the case is evidence for; those of its problem name the pass."""
    if case.suite in OF_SUITE:
        return [OF_SUITE[case.suite]]
    if case.check == "lse_gradient":
        return [LSE_GRADIENT]
    found = [name for name, holds in SPECIAL.items() if holds(case.problem)]
    if case.options.get("offset"):
        found.append(UNALIGNED)
    found = found or [name for name, holds in ORDINARY.items() if holds(case.problem)]
    which = "forward" if case.problem.direction == "fwd" else "backward"
    return [f"{name}, {which}" for name in found]


def all_features() -> list[str]:
    """Every row, in order."""
    names = [*ORDINARY, *SPECIAL, UNALIGNED]
    of_problem = [f"{name}, {which}" for name in names for which in ("forward", "backward")]
    return [*of_problem, LSE_GRADIENT, *OF_SUITE.values()]


@dataclass
class Cell:
    """Findings of one implementation for one feature in one dtype on one device."""

    passed: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    failed: list[Finding] = field(default_factory=list)
    other: dict[str, int] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        if finding.failed:
            self.failed.append(finding)
        elif finding.verdict is Verdict.PASS:
            self.passed += 1
        elif finding.verdict is Verdict.REFUSED:
            self.refused[finding.reason] = self.refused.get(finding.reason, 0) + 1
        else:
            reason = f"{finding.verdict}: {finding.reason}"
            self.other[reason] = self.other.get(reason, 0) + 1

    @property
    def word(self) -> str:
        """FAIL, yes, part (some cases refused), no (all refused), or absent."""
        if self.failed:
            return "FAIL"
        if self.passed:
            return "part" if self.refused else "yes"
        return "no" if self.refused else "absent"

    @property
    def evidence(self) -> str:
        """One line: how many cases, and the reason for whatever is not a pass."""
        parts = [f"{self.passed} cases pass"] if self.passed else []
        if self.failed:
            first = self.failed[0]
            parts.append(f"{len(self.failed)} fail, first {first.case}: {first.verdict} {first.reason}")
        reasons = sorted({**self.refused, **self.other}.items(), key=lambda item: -item[1])
        parts += [f"{count} refused ({reason})" for reason, count in reasons[:MOST_REASONS]]
        if more := len(reasons) - MOST_REASONS:
            parts += [f"and {more} other reasons"] if more > 0 else []
        return "; ".join(parts)


@dataclass(frozen=True)
class Table:
    """One device and dtype. rows: feature to the cells of ``impls``, None where no case asked."""

    device: str
    dtype: str
    impls: list[str]
    rows: dict[str, list[Cell | None]]

    @property
    def notes(self) -> list[tuple[str, str, str, str]]:
        """implementation, feature, word and evidence of every cell that is not a plain yes."""
        return [
            (impl, feature, cell.word, cell.evidence)
            for feature, cells in self.rows.items()
            for impl, cell in zip(self.impls, cells, strict=True)
            if cell and cell.word != "yes"
        ]


def tables(runs: Sequence[Recorded]) -> list[Table]:
    """One table a device and dtype, of all runs; implementations that are nowhere available are left out."""
    cells: dict[tuple[str, str], dict[tuple[str, str], Cell]] = {}
    present: dict[str, dict[str, None]] = {}
    for run in runs:
        device = _device(run)
        for finding in run.findings:
            if finding.verdict is Verdict.UNAVAILABLE:
                continue
            case = run.cases[finding.case]
            present.setdefault(device, {})[finding.impl] = None
            table = cells.setdefault((device, case.problem.dtype), {})
            for feature in features(case):
                table.setdefault((feature, finding.impl), Cell()).add(finding)
    found = []
    for (device, dtype), table in sorted(
        cells.items(), key=lambda item: (item[0][0], DTYPES.index(item[0][1]))
    ):
        impls = sorted(present[device])
        asked = {feature for feature, _ in table}
        rows = {
            feature: [table.get((feature, impl)) for impl in impls]
            for feature in all_features()
            if feature in asked
        }
        found.append(Table(device, dtype, impls, rows))
    return found


def _device(run: Recorded) -> str:
    described: list[dict[str, Any]] = run.environment.get("devices") or [{}]
    return str(described[0].get("name", "unknown"))


def false_alarm_bound(passed: int, failed: int, confidence: float = 0.95) -> float:
    """The highest rate of failures that ``failed`` of ``passed + failed`` still allow (Clopper-Pearson, one-sided)."""
    from scipy.special import betaincinv

    return float(betaincinv(failed + 1, passed, confidence)) if passed else 1.0


@dataclass(frozen=True)
class Total:
    """One implementation on one device: how many cases ended in which verdict, how many were not examined, and how many
    of the failures are known."""

    device: str
    impl: str
    verdicts: dict[str, int]
    unexamined: int
    known: int = 0

    @property
    def there(self) -> bool:
        """Whether it can run on the device at all, as far as anything is known of it."""
        return set(self.verdicts) != {Verdict.UNAVAILABLE}

    @property
    def passed(self) -> int:
        return self.verdicts.get(Verdict.PASS, 0)

    @property
    def failed(self) -> int:
        """Without those that are known."""
        return sum(self.verdicts.get(verdict, 0) for verdict in FAILURES) - self.known

    @property
    def answered(self) -> int:
        """Cases that passed or failed: those that the bound is of."""
        return self.passed + self.failed

    @property
    def bound(self) -> float:
        """``false_alarm_bound`` of them: where the implementation is right, every failure is a false alarm."""
        return false_alarm_bound(self.passed, self.failed)

    @property
    def counts(self) -> dict[str, int]:
        """By verdict, in alphabetical order, what was not examined among them; none of 0."""
        counts = {**self.verdicts, NOT_EXAMINED: self.unexamined}
        return {verdict: count for verdict, count in sorted(counts.items()) if count}


def totals(runs: Sequence[Recorded], known: Collection[Known] = ()) -> list[Total]:
    """One a device and implementation, of all runs; in the order that they were asked."""
    verdicts: dict[tuple[str, str], Counter[str]] = {}
    unexamined: Counter[tuple[str, str]] = Counter()
    excused: Counter[tuple[str, str]] = Counter()
    for run in runs:
        device = _device(run)
        for impl in run.impls:
            verdicts.setdefault((device, impl), Counter())
        for finding in run.findings:
            verdicts.setdefault((device, finding.impl), Counter())[finding.verdict] += 1
            excused[device, finding.impl] += any(fault.explains(finding) for fault in known)
        unexamined.update((device, impl) for impl, _ in run.unexamined)
    return [
        Total(
            *place,
            {str(verdict): count for verdict, count in counts.items()},
            unexamined[place],
            excused[place],
        )
        for place, counts in verdicts.items()
    ]
