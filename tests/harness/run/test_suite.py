"""Suite files: what they mean, and that every mistake in one is named with its line and key."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.oracle.inputs import KINDS
from attnbench.harness.problem import DTYPES
from attnbench.harness.run.errors import Exit
from attnbench.harness.run.suite import (
    CASE_KEYS,
    INPUTS,
    SuiteError,
    load_suite,
    parse_size,
    parse_suite,
    read_suite,
    suite_names,
)

TOP = 'name = "mine"\nwhy = "a test"\n'
CASE = '[[case]]\nname = "one"\nwhy = "because"\nbatch = 2\nheads = 4\nseqlen = "1k"\nhead_dim = 64\n'


def with_line(line: str) -> str:
    """A sound suite whose one case ends in ``line``, which is line 10 of the text."""
    return f"{TOP}{CASE}{line}\n"


def test_a_sound_suite_is_read_as_written() -> None:
    suite = parse_suite(with_line('mask = "causal"'), "mine.toml")
    (case,) = suite.cases
    assert (suite.name, suite.why, suite.source, case.name, case.why) == (
        "mine", "a test", "mine.toml", "one", "because",
    )  # fmt: skip
    problem = case.problem
    assert (problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k) == (2, 4, 1024, 1024)
    assert problem.mask.label == "causal"
    assert case.inputs == "normal"


@given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, unique=True),
    lengths=st.lists(st.integers(1, 512), min_size=1, max_size=4, unique=True),
    directions=st.lists(st.sampled_from(["fwd", "bwd", "fwd_bwd"]), min_size=1, unique=True),
)
def test_lists_are_crossed_in_the_order_written(
    dtypes: list[str], lengths: list[int], directions: list[str]
) -> None:
    text = (
        f'{TOP}[[case]]\nname = "one"\nwhy = "because"\ndtype = {dtypes}\nseqlen = {lengths}\n'
        f"direction = {directions}\nbatch = 1\nheads = 1\nhead_dim = 8\n"
    )
    read = [case.problem for case in parse_suite(text, "s").cases]
    assert [(p.dtype, p.seqlen_q, p.direction) for p in read] == list(
        itertools.product(dtypes, lengths, directions)
    )


@pytest.mark.parametrize(
    ("q", "k", "tokens", "batch"),
    [("1k", "1k", "16k", 16), ("16k", "16k", "16k", 1), ("32k", "32k", "16k", 1), (1, "4k", "16k", 4)],
)
def test_tokens_set_the_batch_by_the_longer_sequence(q: int | str, k: str, tokens: str, batch: int) -> None:
    q_text = f'"{q}"' if isinstance(q, str) else q
    text = f'{TOP}[[case]]\nname = "n"\nwhy = "w"\nheads = 1\nhead_dim = 8\ntokens = "{tokens}"\n'
    (case,) = parse_suite(f'{text}seqlen_q = {q_text}\nseqlen_k = "{k}"\n', "s").cases
    assert case.problem.batch == batch


def test_hidden_sets_the_heads() -> None:
    text = (
        f'{TOP}[[case]]\nname = "n"\nwhy = "w"\nbatch = 1\nseqlen = 8\nhidden = 2048\nhead_dim = [64, 256]\n'
    )
    assert [case.problem.heads for case in parse_suite(text, "s").cases] == [32, 8]


# What is put on line 10 of a sound suite, and what the error must say beside "mine.toml:10:".
MISTAKES = {
    'dtipe = "bf16"': "unknown key 'dtipe'; did you mean dtype",
    "heds = 4": "unknown key 'heds'; did you mean heads",
    "dtype = 16": "dtype 16 is not a string",
    'dtype = "bf61"': "dtype is 'bf61'; it must be one of bf16, fp16",
    'kv_heads = "3q"': "kv_heads '3q' is not a size",
    "kv_heads = true": "kv_heads True is not a size",
    "kv_heads = -1": "kv_heads -1 is not a size",
    "kv_heads = 1.5": "kv_heads 1.5 is not a size",
    "kv_heads = [4, 3]": "kv_heads is 3; it must divide heads = 4",
    "kv_heads = []": "kv_heads is an empty list",
    'mask = "casual"': "mask 'casual' is not understood",
    "dropout_p = 1.0": "dropout_p is 1.0",
    'dropout_p = "0.1"': "dropout_p '0.1' is not a number",
    "scale = nan": "scale is nan",
    'layout = "sbhd"': "layout is 'sbhd'",
    'direction = ["fwd", "forward"]': "direction is 'forward'",
    'device = "gpu"': "unknown device 'gpu'",
    'inputs = "norml"': "unknown kind of inputs 'norml'; did you mean normal",
    "hidden = 2048": "hidden stands for heads",
    "tokens = 2048": "tokens stands for batch",
    "dtype = bf16": "not valid TOML",
    "dtype = ": "not valid TOML",
    "batch = 3": "not valid TOML",
    "mask = { kind = 1 }": "mask {'kind': 1} is not a string",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_named_with_its_line_and_key(line: str) -> None:
    with pytest.raises(SuiteError) as caught:
        parse_suite(with_line(line), "mine.toml")
    message = str(caught.value)
    assert message.startswith("mine.toml:10: ")
    assert MISTAKES[line] in message
    assert line.split(" ", maxsplit=1)[0] in message
    assert caught.value.exit_code == Exit.USAGE


@given(before=st.integers(0, 5), between=st.integers(0, 5), case=st.integers(0, 2))
def test_the_line_is_found_wherever_the_case_stands(before: int, between: int, case: int) -> None:
    tables = [CASE.replace('"1k"', f'"{n + 1}k"').replace('"one"', f'"case{n}"') for n in range(3)]
    tables[case] += "headdim = 3\n"
    text = "# a comment\n" * before + TOP + ("\n" * between).join(tables)
    line = next(n for n, written in enumerate(text.splitlines(), 1) if written.startswith("headdim"))
    with pytest.raises(SuiteError, match=rf"^s:{line}: unknown key 'headdim'; did you mean head_dim"):
        parse_suite(text, "s")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TOP, "s:1: a suite holds at least one [[case]] table"),
        (f"{TOP}[case]\nname = 'x'\n", "s:3: a suite holds at least one [[case]] table"),
        (f'{TOP}{CASE}[[cases]]\nname = "x"\n', "s:10: unknown key 'cases'; did you mean case"),
        ('name = "x"\n' + CASE, "s:1: key 'why' is missing"),
        (f"{TOP}{CASE}".replace('why = "because"\n', ""), "s:3: key 'why' is missing"),
        (f"{TOP}{CASE}".replace('why = "because"', 'why = " "'), "s:5: why ' ' is not a string that says"),
        (f"{TOP}{CASE}".replace("batch = 2\n", ""), "s:3: key 'batch' (or tokens) is missing"),
        (f"{TOP}{CASE}".replace("head_dim = 64\n", ""), "s:3: key 'head_dim' is missing"),
        (f"{TOP}{CASE}".replace("heads = 4", "hidden = 100"), "s:7: hidden 100 is not a multiple of head_dim 64"),
        (f"{TOP}{CASE}{CASE}", "s:10: case 'one' repeats b2_h4_q1024_d64_bf16_full of the case on line 3"),
        (f"{TOP}{CASE}".replace('"1k"', '["1k", 1024]'), "of this very case"),
        (f'{TOP}{CASE}{CASE}direction = "bwd"\n', "give all directions of a problem in one case"),
        (f'{TOP}[[case]]\nname = "open', "s:4: not valid TOML"),
    ],
)  # fmt: skip
def test_what_is_missing_or_repeated_is_named(text: str, message: str) -> None:
    with pytest.raises(SuiteError) as caught:
        parse_suite(text, "s")
    assert message in str(caught.value)


def test_one_problem_may_stand_on_two_kinds_of_device() -> None:
    suite = parse_suite(f'{TOP}{CASE}device = "cpu"\n{CASE}device = "cuda"\n', "s")
    assert len(suite.on("cpu")) == len(suite.on("cuda")) == 1


def test_a_suite_of_another_device_is_the_machines_fault(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'{TOP}device = "cuda"\n{CASE}')
    assert len(load_suite(str(path), "cuda").cases) == 1
    with pytest.raises(SuiteError, match="needs a cuda device, and this run is on cpu") as caught:
        load_suite(str(path), "cpu")
    assert caught.value.exit_code == Exit.MACHINE


def test_only_the_cases_of_the_device_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'{TOP}{CASE}device = "cuda"\n')
    assert load_suite(str(path), "cuda").cases
    with pytest.raises(SuiteError, match="poses nothing on cpu"):
        load_suite(str(path), "cpu")


def test_an_unknown_suite_names_the_close_ones() -> None:
    with pytest.raises(SuiteError, match="unknown suite 'smok'; did you mean smoke"):
        read_suite("smok")
    with pytest.raises(SuiteError, match=f"known: {', '.join(suite_names())}"):
        read_suite("zzz")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"cannot read suite file .*gone\.toml: No such file"):
        read_suite(str(tmp_path / "gone.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(SuiteError, match="Is a directory"):
        read_suite(str(tmp_path / "folder.toml"))
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(SuiteError, match=r"latin\.toml is not UTF-8 text: .* at byte 11"):
        read_suite(str(tmp_path / "latin.toml"))


@given(st.integers(0, 10**9))
def test_sizes_are_binary(number: int) -> None:
    assert parse_size(number) == parse_size(str(number)) == number
    assert parse_size(f"{number}k") == parse_size(f"{number}K") == 1024 * number


@given(st.text(st.characters(blacklist_categories=["Nd"]), max_size=4))
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@given(st.text(max_size=200))
def test_no_text_ends_in_anything_but_a_suite_error(text: str) -> None:
    with pytest.raises(SuiteError, match=r"^s:\d+: "):
        parse_suite(text, "s")


@given(
    key=st.sampled_from(CASE_KEYS),
    value=st.sampled_from(
        ["-1", "0", "1e400", "nan", "true", '""', '"k"', "[[1]]", "[{}]", "1979-05-27", '["a"]']
    ),
)
def test_no_value_ends_in_anything_but_a_suite_error(key: str, value: str) -> None:
    lines = [line for line in CASE.splitlines() if not line.startswith(f"{key} ")]
    text = TOP + "\n".join([*lines, f"{key} = {value}"]) + "\n"
    with contextlib.suppress(SuiteError):
        parse_suite(text, "s")


def test_the_kinds_of_inputs_are_the_oracles() -> None:
    assert INPUTS == KINDS
