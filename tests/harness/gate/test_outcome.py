from __future__ import annotations

import json
from xml.etree import ElementTree

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from attnbench.harness.gate.calibration import calibrate
from attnbench.harness.gate.decision import Design
from attnbench.harness.gate.outcome import BROKEN, TIMED, Answer, CellResult, GateExit, GateResult
from attnbench.harness.gate.pairs import PairLogs
from attnbench.harness.gate.write import document, junit_xml, markdown, plain

ANSWERS = st.lists(st.sampled_from(list(Answer)), max_size=6)
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


def result(answers: list[Answer], unfit: tuple[str, ...] = (), name: str = "impl") -> GateResult:
    cells = [
        CellResult(name, f"problem-{n}", answer, reason=name, change=0.01, low=-0.01, high=float("inf"))
        for n, answer in enumerate(answers)
    ]
    return GateResult("a", "b", "cpu", ("bench", "gate"), 0.02, 0.05, 1.0, cells, unfit=unfit)


@given(ANSWERS)
def test_a_faster_or_an_equal_cell_never_changes_the_exit(answers: list[Answer]) -> None:
    timed = [answer for answer in answers if answer in TIMED] or [Answer.SAME]
    before = result(timed).exit_code()
    assert result([*timed, Answer.FASTER, Answer.SAME]).exit_code() is before


@given(ANSWERS, st.booleans())
def test_the_exit_code_follows_from_the_worst_that_is_known(answers: list[Answer], unfit: bool) -> None:
    code = result(answers, ("noise",) if unfit else ()).exit_code()
    if set(answers) & set(BROKEN):
        assert code is GateExit.WRONG
    elif not set(answers) & set(TIMED):
        assert code is GateExit.NOTHING
    elif unfit:
        assert code is GateExit.UNFIT
    else:
        assert (code is GateExit.REGRESSION) == (Answer.SLOWER in answers)
        assert (code is GateExit.OK) == (not {Answer.SLOWER, Answer.UNSURE} & set(answers))


def test_unsure_passes_only_where_it_is_asked_to() -> None:
    unsure = result([Answer.UNSURE, Answer.SAME])
    assert unsure.exit_code() is GateExit.UNSURE
    assert unsure.exit_code(unsure_passes=True) is GateExit.OK
    assert result([Answer.UNSURE, Answer.SLOWER]).exit_code(unsure_passes=True) is GateExit.REGRESSION


@given(ANSWERS, st.booleans(), st.booleans())
def test_junit_counts_what_fails_the_gate(answers: list[Answer], unfit: bool, unsure_passes: bool) -> None:
    found = result(answers, ("noise",) if unfit else ())
    suite = ElementTree.fromstring(junit_xml(found, unsure_passes=unsure_passes))
    red = int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
    code = found.exit_code(unsure_passes=unsure_passes)
    assert (red > 0) == (code not in (GateExit.OK, GateExit.NOTHING))
    assert len(suite) == int(suite.get("tests", "-1")) == len(answers)


@given(TEXT)
def test_no_name_breaks_a_document(name: str) -> None:
    found = result([Answer.LOST, Answer.SAME], name=name)
    ElementTree.fromstring(junit_xml(found, unsure_passes=False))
    rows = [line for line in markdown(found, unsure_passes=False).splitlines() if line.startswith("| LOST")]
    assert [row.replace("\\\\", "").replace("\\|", "").count("|") for row in rows] == [9]
    assert "<script" not in markdown(result([Answer.SAME], name="<script>"), unsure_passes=False)
    assert json.loads(json.dumps(document(found, unsure_passes=False)))["cells"][0]["impl"] == name
    assert plain(found, unsure_passes=False)


def test_the_document_holds_what_was_calibrated() -> None:
    pairs = PairLogs.of_ratios(np.random.default_rng(0).normal(0, 0.002, (5, 8)))
    calibration = calibrate([pairs], Design(cells=1))
    found = result([Answer.SAME])
    data = document(GateResult(**{**vars(found), "calibration": calibration}), unsure_passes=False)
    assert data["calibration"]["false_positives"] == {"count": 0, "of": 1000}
    assert data["calibration"]["false_positive_bound"] == pytest.approx(0.003, abs=1e-4)
    assert data["calibration"]["smallest"] == calibration.smallest
    assert data["cells"][0]["high"] is None  # JSON has no infinity
    assert (data["exit_code"], data["verdict"]) == (0, "OK")
