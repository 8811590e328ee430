"""A known failure is counted apart; anything else that goes wrong in its place is new, and what is mended is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnbench.harness.conform.known import Known, explained, is_new, no_longer_seen, read_known
from attnbench.harness.conform.verdict import NOT_ASKED, Finding, Verdict
from attnbench.harness.run.errors import RunError

FAULT = Known("a", "numerics/scales[", "is nan", "a negative scale", "pytorch#1")
TEXT = """
[[known]]
impl = "a"
case = "numerics/scales["
says = "is nan"
why = "a negative scale"
issue = "pytorch#1"
"""


def finding(
    impl: str = "a", case: str = "numerics/scales[x]", verdict: str = "FAIL", reason: str = "out is nan"
) -> Finding:
    return Finding(case, impl, "1", "cpu", Verdict(verdict), "" if verdict == "PASS" else reason)


@pytest.mark.parametrize(
    ("other", "new"),
    [
        (finding(), False),
        (finding(verdict="ERROR"), False),
        (finding(impl="b"), True),
        (finding(case="numerics/scales-of-v[x]"), True),
        (finding(reason="out is 3, the oracle says 4"), True),
        (finding(verdict="PASS"), False),
        (finding(verdict="REFUSED"), False),
    ],
)
def test_a_failure_is_known_by_its_implementation_case_and_reason(other: Finding, new: bool) -> None:
    assert is_new(other, [FAULT]) == new
    assert is_new(other, []) == other.failed


def test_each_failure_is_accounted_for_once_and_what_is_mended_is_told() -> None:
    again = Known("a", "numerics", "nan", "the same, said otherwise", "pytorch#2")
    found = [finding(), finding(case="numerics/scales[y]")]
    assert explained(found, [FAULT, again]) == {FAULT: found, again: []}
    passes = finding(verdict="PASS")
    assert no_longer_seen([passes], [FAULT]) == [FAULT]
    assert no_longer_seen([passes, finding()], [FAULT]) == []
    assert no_longer_seen([finding(impl="b", verdict="PASS")], [FAULT]) == []  # not asked in this run
    unasked = Finding(passes.case, "a", "1", "cpu", Verdict.ERROR, "no worker", facts=NOT_ASKED)
    assert no_longer_seen([unasked], [FAULT]) == []


def test_a_file_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "known.toml").write_text(TEXT + TEXT.replace('"a"', '"b"'))
    assert [fault.impl for fault in read_known(tmp_path / "known.toml")] == ["a", "b"]
    assert read_known(tmp_path / "known.toml")[0] == FAULT


def test_one_that_several_share_is_each_ones(tmp_path: Path) -> None:
    shared = TEXT.replace('impl = "a"', 'impl = ["a", "b"]').replace(
        f'case = "{FAULT.case}"', 'case = ["s/c[", "s/d["]'
    )
    (tmp_path / "known.toml").write_text(shared)
    found = read_known(tmp_path / "known.toml")
    assert [(fault.impl, fault.case) for fault in found] == [(i, c) for i in "ab" for c in ("s/c[", "s/d[")]
    assert {(fault.says, fault.why, fault.issue) for fault in found} == {(FAULT.says, FAULT.why, FAULT.issue)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no [[known]]"),
        ("known = 3", "has no [[known]]"),
        ("[[known]", "cannot read known failures"),
        (TEXT.replace("why =", "reason ="), "known failure 1: why is missing, empty or no text"),
        (
            TEXT + "reason = 'x'",
            "known failure 1: unknown key 'reason' (known: impl, case, says, why, issue)",
        ),
        (TEXT + TEXT.replace('"is nan"', '""'), "known failure 2: says is missing, empty or no text"),
        (TEXT.replace('"is nan"', '["is nan"]'), "known failure 1: says is missing, empty or no text"),
        (TEXT.replace('"a"', "[]"), "known failure 1: impl is missing, empty or no text"),
    ],
)
def test_a_slip_in_it_is_told_in_a_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "known.toml").write_text(text)
    with pytest.raises(RunError) as caught:
        read_known(tmp_path / "known.toml")
    assert said in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot read known failures"):
        read_known(tmp_path / "none.toml")
