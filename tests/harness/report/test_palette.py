from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.registry import entries
from attnbench.harness.report.palette import APPROXIMATE, COLOURS, MARKERS, styles


@given(st.sets(st.text(min_size=1), min_size=1, max_size=30), st.text(min_size=1))
def test_a_name_keeps_its_colour_in_any_company(others: set[str], name: str) -> None:
    assert styles([*others, name])[name].colour == styles([name])[name].colour


@given(st.sets(st.text(min_size=1), max_size=len(MARKERS)))
def test_no_two_names_look_alike(names: set[str]) -> None:
    found = styles(names)
    assert len(set(found.values())) == len(names)
    assert styles(sorted(names, reverse=True)) == found


def test_more_names_than_styles_still_draw() -> None:
    many = [f"impl{number}" for number in range(len(COLOURS) * len(MARKERS) + 50)]
    assert set(styles(many)) == set(many)


def test_the_backends_of_this_repository_have_a_colour_each() -> None:
    found = styles(entries())
    assert len({style.colour for style in found.values()}) == len(found)


def test_the_approximations_and_what_they_are_compared_with_have_a_colour_each() -> None:
    exact = ("standard", "sdpa-flash", "sdpa-cudnn", "flex", "flash-triton", "flash-cuda")
    found = styles([*exact, *(name + APPROXIMATE for name in entries(approximate=True))])
    assert len({style.colour for style in found.values()}) == len(found)
