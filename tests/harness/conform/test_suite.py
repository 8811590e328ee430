"""Suites of cases: the words, what is said about a wrong one, and what the built-in suites hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.checks import CHECKS
from attnbench.harness.conform.suite import parse_suite, read_suite, select, sharing, suite_names, widest
from attnbench.harness.run.errors import RunError
from attnbench.harness.run.suite import SuiteError

HEAD = 'name = "s"\nwhy = "a suite for tests"\n'
CASE = '[[case]]\nname = "c"\nwhy = "a case"\nbatch = 1\nheads = 2\nseqlen = 5\nhead_dim = 8\n'


def cases(text: str, kind: str = "cpu") -> list[Case]:
    return [case for case in parse_suite(HEAD + text, "s.toml").on(kind) if isinstance(case, Case)]


def test_checks_inputs_masks_and_strides_are_crossed() -> None:
    found = cases(
        CASE
        + 'check = ["agrees", "one_gradient"]\ninputs = ["normal", "needle"]\nmask = ["full", "causal"]\n'
        'strides = ["k=bhsd", "v=transposed"]\ndirection = "fwd_bwd"\n'
    )
    assert len(found) == 16
    assert len({case.id for case in found}) == 16
    assert {dict(case.problem.strides)["v"] for case in found if "v" in dict(case.problem.strides)} == {
        (80, 1, 40, 5)
    }


def test_one_device_may_differ() -> None:
    text = (
        CASE
        + 'dtype = "fp32"\nnightly = false\ncuda = { dtype = ["bf16", "fp16"], seqlen = 7, alone = true }\n'
    )
    assert [(case.problem.dtype, case.problem.seqlen_q, case.alone) for case in cases(text)] == [
        ("fp32", 5, False)
    ]
    on_cuda = [(case.problem.dtype, case.problem.seqlen_q, case.alone) for case in cases(text, "cuda")]
    assert on_cuda == [("bf16", 7, True), ("fp16", 7, True)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('check = "agree"', "unknown check 'agree'; did you mean agrees?"),
        ('inputs = "needles"', "unknown kind of inputs 'needles'; did you mean needle?"),
        ('cites = ["flash-attention 282"]', "is not a list of issues"),
        ("with = { repeat = 2 }", "check agrees: unknown option 'repeat'"),
        ('strides = "k=sideways"', "unknown view 'sideways'"),
        ('strides = "w=bhsd"', "unknown tensor 'w'"),
        ("nightly = 1", "1 is neither true nor false"),
        ("cuda = { name = 'x' }", "unknown key 'name'"),
        ("check = []", "is an empty list"),
        ("mask = ['full', 'full']", "stands twice"),
        ("sed = 3", "unknown key 'sed'"),
        ("nightly = { why = 'more' }", "unknown key 'why'"),
    ],
)
def test_a_wrong_word_is_named_with_its_line(line: str, said: str) -> None:
    with pytest.raises(SuiteError, match=re.escape(said)) as caught:
        cases(CASE + line + "\n")
    assert re.match(r"s\.toml:\d+: ", str(caught.value))


def test_what_differs_on_a_device_contradicts_a_case_of_one_device() -> None:
    with pytest.raises(SuiteError, match="cannot differ: the case is on cpu alone"):
        cases(CASE + 'device = "cpu"\ncuda = { seqlen = 7 }\n')


def test_a_twin_for_the_larger_selection_stands_beside_the_case() -> None:
    text = CASE + 'dtype = "fp32"\ncuda = { dtype = "bf16", nightly = { dtype = "fp16" } }\n'
    assert [(case.problem.dtype, case.nightly) for case in cases(text)] == [("fp32", False)]
    on_cuda = [(case.problem.dtype, case.nightly) for case in cases(text, "cuda")]
    assert on_cuda == [("bf16", False), ("fp16", True)]


def test_select_names_what_is_not_there() -> None:
    with pytest.raises(RunError, match="unknown conformance suite 'causl'; did you mean causal"):
        select(["causl"], "cpu")
    with pytest.raises(RunError, match="--case 'nothing' is part of no case's name"):
        select(["causal"], "cpu", only=["nothing"])


def test_seeds_are_draws_of_the_same_case() -> None:
    found = select(["causal"], "cpu", only=["windows-shifted"], seeds=3)
    assert len({case.id for case in found}) == len(found)
    assert len({case.input_seed for case in found}) == len({case.question for case in found})
    assert len({case.id.partition("#")[0] for case in found}) == len(found) / 3


def test_cases_with_one_question_share_an_oracle_that_answers_the_most() -> None:
    found = select(["causal"], "cpu", only=["causal/one-query"])
    asked = widest(found)
    assert len(found) == 2 * len(asked)
    assert {case.problem.direction for case in asked.values()} == {"fwd_bwd"}
    order = [case.question for case in sharing(found)]
    assert order == sorted(order, key=order.index)


def test_a_case_survives_its_json() -> None:
    for case in select(["layout", "shapes", "gradients"], "cpu", seeds=2):
        assert Case.from_json(case.to_json()) == case


# ---- the built-in suites -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", suite_names())
def test_every_case_says_why_and_has_a_name_of_its_own(name: str) -> None:
    suite = read_suite(name)
    assert suite.name == name
    every = [case for kind in ("cpu", "cuda") for case in suite.on(kind) if isinstance(case, Case)]
    assert all(len(text.split()) >= 8 for text in (suite.why, *(case.why for case in every)))
    whys = {(case.name, case.why) for case in every}
    assert len(whys) == len({name for name, _ in whys})
    assert {case.check for case in every} <= set(CHECKS)


# Issues of real libraries by the line of the project's list of pitfalls that they stand on.
KNOWN = {
    "alignment": "flash-attention#282 flash-attention#517 flash-attention#1778 cutlass#2336",
    "empty rows": "pytorch#103963 pytorch#41508 pytorch#109517",
    "lse of an empty row": "flash-attention#978 flashinfer#4452",
    "backward with more queries": "flash-attention#443 flash-attention#334",
    "int32 offsets": "flash-attention#2260 flash-attention#1500 flash-attention#2214 flash-attention#2611",
    "int32 offsets in torch": "pytorch#190857",
    "layout of dO": "flash-attention#355 aotriton#236",
    "K and V differ": "pytorch#119500 FlagGems#5896",
    "nothing": "flash-attention#2470 pytorch#133780 pytorch#141218 flash-attention#1159",
    "one query": "cudnn-frontend#1072 flash-attention#1537",
    "head dims": "flash-attention#1347 flash-attention#2888",
    "gqa": "flash-linear-attention#1029",
    "inf x 0": "flash-linear-attention#1214",
    "lse": "flash-attention#141 flash-attention#887 flash-attention#1137 pytorch#181645",
    "block-sparse": "flash-attention#2623 pytorch#136232 pytorch#141126",
    "mask in the backward": "flash-attention#2424",
    "incomplete cache key": "flash-attention#2566 flashinfer#3857",
    "window": "transformers#39408 flash-attention#1133",
    "miscompiled": "flash-linear-attention#1262 triton#11366",
    "wrong gradients": "cudnn-frontend#384 cudnn-frontend#385",
    "wrong without causal": "triton#4174",
}


@pytest.mark.parametrize("line", KNOWN)
def test_every_known_bug_is_a_case(line: str) -> None:
    suites = [read_suite(name) for name in suite_names()]
    cited = {
        cite for suite in suites for case in suite.cases if isinstance(case, Case) for cite in case.cites
    }
    assert set(KNOWN[line].split()) <= cited


def test_a_users_own_suite_is_read_from_its_path(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(HEAD + CASE)
    (case,) = select([str(tmp_path / "own.toml")], "cpu")
    assert case.id == "s/c[agrees,normal,b1_h2_q5_d8_bf16_full_fwd]"
    with pytest.raises(RunError, match="cannot read suite file"):
        select([str(tmp_path / "other.toml")], "cpu")
