"""Records: illegal ones cannot be built, and legal ones come back from JSON as they were."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.masks import Mask
from attnbench.harness.problem import DIRECTIONS, DTYPES, Problem
from attnbench.harness.run.record import (
    SCHEMA,
    Ceilings,
    Cell,
    Group,
    Judgement,
    Memory,
    RecordError,
    Status,
    TensorError,
    Timing,
    from_json,
    to_json,
)

PROBLEM = Problem(batch=1, heads=2, seqlen_q=16, head_dim=8)
GOOD = TensorError(0.1, 0.01, 1.0, 0.1, ok=True)
BAD = TensorError(2.0, 0.01, 1.0, 0.1, ok=False, first_bad=(0, 1, 0, 2), got=3.0, want=1.0)
RIGHT = Judgement({"out": GOOD, "lse": GOOD}, rows=16, rows_total=16)
WRONG = Judgement({"out": GOOD, "lse": BAD}, rows=16, rows_total=16)
TIMING = Timing([[1.0, 1.5], [2.0]], "cold")
NOT_OK = [status for status in Status if status is not Status.OK]


def cell(**changes: Any) -> Cell:
    fields: dict[str, Any] = {
        "run": "r",
        "suite": "s",
        "case": "c",
        "group": PROBLEM.group_key,
        "impl": "a",
        "impl_version": "1",
        "device": "cpu",
        "problem": PROBLEM,
        "status": Status.OK,
        "judgement": RIGHT,
        "timing": TIMING,
    }
    return Cell(**fields | changes)


def test_a_legal_cell_of_every_status_can_be_built() -> None:
    cell()
    for status in NOT_OK:
        cell(status=status, reasons=["why"], judgement=None, timing=None)
    cell(status=Status.INCORRECT, reasons=["why"], judgement=WRONG, timing=None)
    cell(status=Status.TIMEOUT, reasons=["judged right, lost while timed"], timing=None)


@pytest.mark.parametrize("status", NOT_OK)
def test_a_status_other_than_ok_needs_a_reason(status: Status) -> None:
    with pytest.raises(RecordError, match="all but OK need one"):
        cell(status=status, judgement=None, timing=None)


@pytest.mark.parametrize("status", NOT_OK)
def test_only_ok_carries_samples(status: Status) -> None:
    judgement = WRONG if status is Status.INCORRECT else None
    with pytest.raises(RecordError, match="carries samples"):
        cell(status=status, reasons=["why"], judgement=judgement)


@pytest.mark.parametrize("judgement", [None, WRONG])
def test_ok_was_judged_right(judgement: Judgement | None) -> None:
    with pytest.raises(RecordError, match="without having been judged right"):
        cell(judgement=judgement)


def test_ok_has_no_reason() -> None:
    with pytest.raises(RecordError, match="OK none"):
        cell(reasons=["why"])


def test_incorrect_does_not_carry_a_judgement_that_passed() -> None:
    with pytest.raises(RecordError, match="a judgement that passed"):
        cell(status=Status.INCORRECT, reasons=["why"], timing=None)


def test_a_bad_tensor_names_where() -> None:
    with pytest.raises(RecordError, match="first bad coordinate"):
        TensorError(2.0, 0.1, 1.0, 0.1, ok=False)


@pytest.mark.parametrize(
    "rounds",
    [[], [[]], [[1.0], []], [[0.0]], [[1.0], [2.0, -1.0]], [[math.nan]], [[1.0, math.nan]], [[math.inf]]],
    ids=str,
)
def test_a_timing_without_a_round_or_with_an_impossible_sample_is_refused(rounds: list[list[float]]) -> None:
    with pytest.raises(RecordError, match="every sample"):
        Timing(rounds, "cold")


# ---- JSON -------------------------------------------------------------------------------------------------

# What five digits can hold, so that equality is exact; the loss beyond them has a test of its own.
figures = st.integers(1, 99_999).flatmap(lambda n: st.integers(-8, 8).map(lambda e: float(f"{n}e{e}")))
maybe = st.none() | figures
words = st.text(max_size=20)
counts = st.none() | st.integers(0, 2**40)
problems = st.builds(
    Problem,
    batch=st.integers(0, 4),
    heads=st.sampled_from([2, 4]),
    kv_heads=st.sampled_from([1, 2]),
    seqlen_q=st.integers(0, 999),
    seqlen_k=st.integers(0, 999),
    head_dim=st.integers(1, 256),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(["full", "causal", "window(3,inf)", "causal&blocks(random,64x32,density=0.5)"]).map(
        Mask.parse
    ),
    scale=st.none() | figures,
    direction=st.sampled_from(DIRECTIONS),
    strides=st.sampled_from([(), (("q", (0, 8, 4, 1)),)]),
)
passed = st.builds(TensorError, maybe, maybe, figures, figures, ok=st.just(True))
failed = st.builds(
    TensorError,
    maybe,
    maybe,
    figures,
    figures,
    ok=st.just(False),
    first_bad=st.tuples(*[st.integers(0, 99)] * 4) | st.tuples(*[st.integers(0, 99)] * 3),
    got=maybe,
    want=maybe,
)
tensor_names = st.sampled_from(["out", "lse", "dq", "dk", "dv"])
right = st.builds(
    Judgement, st.dictionaries(tensor_names, passed, min_size=1), st.integers(1, 9), st.integers(9, 99)
)
wrong = st.builds(
    Judgement, st.dictionaries(tensor_names, failed, min_size=1), st.integers(1, 9), st.integers(9, 99)
)
samples = st.lists(st.lists(figures, min_size=1, max_size=4), min_size=1, max_size=4)
timings = st.builds(
    Timing,
    samples,
    st.sampled_from(["cold", "hot", "cold+graph"]),
    host_us=st.lists(maybe, max_size=3),
    sm_mhz=st.lists(counts, max_size=3),
    power_w=st.lists(maybe, max_size=3),
    throttle=st.lists(counts, max_size=3),
    unheld=st.integers(0, 9),
)
memories = st.none() | st.builds(Memory, maybe, maybe, figures)
answers = st.one_of(
    st.fixed_dictionaries(
        {"status": st.just(Status.OK), "reasons": st.just([]), "judgement": right, "timing": timings}
    ),
    st.fixed_dictionaries({"status": st.just(Status.INCORRECT), "judgement": wrong, "timing": st.none()}),
    st.fixed_dictionaries({"status": st.sampled_from(NOT_OK), "judgement": st.none(), "timing": st.none()}),
)


@st.composite
def cells(draw: st.DrawFn) -> Cell:
    fields = {"reasons": draw(st.lists(words, min_size=1, max_size=2))} | draw(answers)
    return cell(
        **fields,
        impl=draw(words),
        problem=draw(problems),
        evidence=draw(words),
        memory=draw(memories),
        prepare_ms=draw(maybe),
        warnings=draw(st.lists(words, max_size=2)),
    )


rates = st.lists(st.lists(figures, max_size=3), max_size=3)
groups = st.builds(
    Group,
    run=words,
    suite=words,
    case=words,
    why=words,
    group=words,
    device=words,
    cells=st.lists(words, max_size=3),
    seed=st.integers(0, 2**63),
    oracle_ms=maybe,
    ceilings=st.dictionaries(st.sampled_from(DIRECTIONS), st.builds(Ceilings, rates, rates)),
    order=st.dictionaries(st.sampled_from(DIRECTIONS), st.lists(st.lists(words, max_size=2), max_size=2)),
    phases=st.dictionaries(words, figures, max_size=3),
    foreign=st.none() | st.lists(words, max_size=2),
)


@given(cells() | groups)
def test_a_record_comes_back_from_json_as_it_was(record: Cell | Group) -> None:
    assert from_json(json.loads(json.dumps(to_json(record), allow_nan=False))) == record


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_a_sample_keeps_five_digits(ms: float) -> None:
    back = from_json(to_json(cell(timing=Timing([[ms]], "cold"))))
    assert isinstance(back, Cell)
    assert back.timing is not None
    assert back.timing.rounds[0][0] == pytest.approx(ms, rel=1e-4)


def test_what_is_not_a_number_is_missing_and_never_zero() -> None:
    bad = dataclasses.replace(BAD, max_error=math.nan, got=math.inf)
    record = cell(
        status=Status.INCORRECT, reasons=["why"], judgement=Judgement({"out": bad}, 1, 1), timing=None
    )
    back = from_json(json.loads(json.dumps(to_json(record), allow_nan=False)))
    assert isinstance(back, Cell)
    assert back.judgement is not None
    assert (back.judgement.tensors["out"].max_error, back.judgement.tensors["out"].got) == (None, None)


def test_from_json_leaves_its_argument_alone() -> None:
    data = to_json(cell())
    before = json.dumps(data)
    from_json(data)
    assert json.dumps(data) == before


@pytest.mark.parametrize("schema", [None, 0, SCHEMA + 1, str(SCHEMA)])
def test_another_schema_is_refused_by_its_number(schema: object) -> None:
    with pytest.raises(RecordError, match=f"record schema {schema!r} is not {SCHEMA}"):
        from_json(to_json(cell()) | {"schema": schema})


def test_another_kind_is_refused() -> None:
    with pytest.raises(RecordError, match="'verdict' is neither"):
        from_json(to_json(cell()) | {"kind": "verdict"})


@pytest.mark.parametrize(
    "change",
    [
        {"surplus": 1},
        {"status": "FINE"},
        {"timing": None, "status": "ERROR"},
        {"timing": {"rounds": [[None]], "mode": "cold"}},
        {"timing": {"rounds": [[1.0]]}},
        {"judgement": None},
        {"judgement": {"tensors": []}},
        {"judgement": {"tensors": {"out": {"ok": True}}, "rows": 1, "rows_total": 1}},
        {"problem": {}},
        {"problem": to_json(cell())["problem"] | {"mask": "sideways"}},
        {"problem": to_json(cell())["problem"] | {"strides": []}},
    ],
    ids=str,
)
def test_a_malformed_cell_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        from_json(to_json(cell()) | change)


@pytest.mark.parametrize("field", ["run", "problem", "status", "impl"])
def test_a_missing_field_is_refused(field: str) -> None:
    data = to_json(cell())
    del data[field]
    with pytest.raises(RecordError, match=field):
        from_json(data)


@pytest.mark.parametrize(
    "change", [{"ceilings": {"fwd": {"gemm": []}}}, {"ceilings": []}, {"surplus": 1}], ids=str
)
def test_a_malformed_group_is_refused(change: dict[str, Any]) -> None:
    data = to_json(Group("r", "s", "c", "w", "g", "cpu", [], 0))
    assert from_json(data)
    with pytest.raises(RecordError):
        from_json(data | change)
