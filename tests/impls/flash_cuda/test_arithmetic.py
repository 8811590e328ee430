"""Ranges, schedules, Philox and layouts as the kernels compute them, against brute force and the public contract."""

import itertools
import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnbench.impls import flash_api
from attnbench.impls.flash_cuda.arguments import (
    BACKWARD_FIELDS,
    FINISH_FIELDS,
    FORWARD_FIELDS,
    MERGE_FIELDS,
    ROW_FIELDS,
)

# An example is a batch, since one evaluation is one compilation.
few_batches = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])

LENGTHS = st.integers(1, 70)
BANDS = st.tuples(
    LENGTHS, LENGTHS, st.none() | st.integers(0, 40), st.none() | st.integers(0, 40), st.booleans()
)


def words(band):
    """(template arguments, Band literal) of (rows, keys, left, right, bottom right)."""
    rows, keys, left, right, bottom_right = band
    shift = keys - rows if bottom_right else 0
    flags = f"{str(left is not None).lower()}, {str(right is not None).lower()}"
    return f"<{flags}>", f"Band{{{rows}, {keys}, {shift}, {left or 0}, {right or 0}}}"


def visible(band):
    """The set of (row, key) that see each other."""
    rows, keys, left, right, bottom_right = band
    shift = keys - rows if bottom_right else 0
    return {
        (i, j)
        for i, j in itertools.product(range(rows), range(keys))
        if (left is None or j >= i + shift - left) and (right is None or j <= i + shift + right)
    }


def ranges(evaluate, expressions):
    """Values of expressions of type Range, as Python ranges."""
    parts = [f"{e}.{part}" for e in expressions for part in ("begin", "end")]
    values = evaluate("attn/band.cuh", parts)
    return [range(b, e) for b, e in zip(values[::2], values[1::2], strict=True)]


@few_batches
@given(cases=st.lists(st.tuples(BANDS, st.integers(0, 69), st.integers(0, 69)), min_size=30, max_size=30))
def test_ranges_of_a_band_are_exact(evaluate, cases):
    asked, expected = [], []
    for band, a, b in cases:
        flags, literal = words(band)
        seen = visible(band)
        rows, keys = band[0], band[1]
        first, last = sorted((a % rows, b % rows))
        columns = [{j for j in range(keys) if (i, j) in seen} for i in range(first, last + 1)]
        for name, want in (("any", set.union(*columns)), ("all", set.intersection(*columns))):
            asked.append(f"keys_of_{name}{flags}({literal}, {first}, {last})")
            expected.append(want)
        asked.append(f"visible_keys{flags}({literal}, {first})")
        expected.append(columns[0])
        first, last = sorted((a % keys, b % keys))
        lines = [{i for i in range(rows) if (i, j) in seen} for j in range(first, last + 1)]
        for name, want in (("any", set.union(*lines)), ("all", set.intersection(*lines))):
            asked.append(f"rows_of_{name}{flags}({literal}, {first}, {last})")
            expected.append(want)
    for question, got, want in zip(asked, ranges(evaluate, asked), expected, strict=True):
        assert set(got) == want, question


@few_batches
@given(cases=st.lists(st.tuples(st.integers(0, 300), st.integers(-50, 300)), min_size=40, max_size=40))
def test_blocks_of_a_range(evaluate, cases):
    literals = [f"Range{{{begin}, {end}}}" for begin, end in cases]
    touching = ranges(evaluate, [f"blocks_touching<32>({x})" for x in literals])
    within = ranges(evaluate, [f"blocks_within<32>({x})" for x in literals])
    for (begin, end), some, whole in zip(cases, touching, within, strict=True):
        wanted = set(range(begin, end))
        blocks = {b: set(range(32 * b, 32 * b + 32)) for b in range(11)}
        assert set(some) >= {b for b, keys in blocks.items() if keys & wanted}
        assert not wanted or set(some) == {b for b, keys in blocks.items() if keys & wanted}
        assert set(whole) == {b for b, keys in blocks.items() if keys <= wanted}


@few_batches
@given(cases=st.lists(BANDS, min_size=8, max_size=8))
def test_turns_count_the_tiles_that_come_before(evaluate, cases):
    """Tiles of 16 keys in the order in which they are drawn; what each adds to a block of 8 rows is the next turn."""
    asked, expected = [], []
    for band, last_keys_first in itertools.product(cases, (False, True)):
        if last_keys_first and band[3] is None:
            continue  # without a right side all tiles begin at the first row
        flags, literal = words(band)
        order = f"8, 16, {flags[1:-1]}, {str(last_keys_first).lower()}"
        pairs = {(i // 8, j // 16) for i, j in visible(band)}
        done = Counter()
        for tile in sorted({tile for _, tile in pairs}, reverse=last_keys_first):
            for block in sorted(block for block, other in pairs if other == tile):
                asked.append(f"backward::turn_of<{order}>({literal}, {block}, {16 * tile})")
                expected.append(done[block])
                done[block] += 1
    assert evaluate("backward/turns.cuh", asked) == expected


@pytest.mark.parametrize(
    ("tiles", "planes", "wave"), [(1, 1, 1), (5, 3, 1), (4, 7, 3), (6, 8, 8), (3, 10, 4)]
)
def test_every_tile_is_worked_on_once_and_the_last_ones_first(evaluate, tiles, planes, wave):
    total = tiles * planes
    places = [f"place_of({{{tiles}, {planes}, {wave}, {total}, 1}}, {i})" for i in range(total)]
    values = evaluate("attn/schedule.cuh", [f"{p}.{part}" for p in places for part in ("tile", "plane")])
    found = list(zip(values[::2], values[1::2], strict=True))
    assert sorted(found) == sorted(itertools.product(range(tiles), range(planes)))
    for first in range(0, planes, wave):
        in_wave = [tile for tile, plane in found if first <= plane < first + wave]
        assert in_wave == sorted(in_wave, reverse=True)
    waves = [plane // wave for _, plane in found]
    assert waves == sorted(waves)


def test_shares_of_a_range_are_disjoint_and_nearly_equal(evaluate):
    cases = [(3, 3 + size, shares) for size in (0, 1, 5, 16, 17) for shares in (1, 2, 5, 16)]
    asked = [f"share_of(Range{{{b}, {e}}}, {i}, {n})" for b, e, n in cases for i in range(n)]
    answers = iter(evaluate("attn/schedule.cuh", [f"{a}.{part}" for a in asked for part in ("begin", "end")]))
    for begin, end, shares in cases:
        parts = [range(next(answers), next(answers)) for _ in range(shares)]
        assert [i for part in parts for i in part] == list(range(begin, end))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize(("partial", "full"), [([1, 3], [0, 2]), ([0, 1, 2, 3], []), ([], [1, 3]), ([], [])])
def test_steps_cover_the_listed_blocks_and_know_which_need_a_mask(evaluate, partial, full, banded):
    """Blocks of 128 in steps of 32, the last of 4 blocks cut after 40 positions."""
    length, size, step = 3 * 128 + 40, 128, 32
    arrays = "".join(
        f"constexpr i32 {name}[] = {{{', '.join(map(str, values or [0]))}}};"
        for name, values in (
            ("np", [7, len(partial)]), ("p", [9] * 4 + partial), ("nf", [7, len(full)]), ("f", [9] * 4 + full),
        )
    )  # fmt: skip
    lists = f"BlockLists{{np, p, nf, f, 0, 0, 4, 64, {size}}}"
    steps = f"steps_of<{step}, {str(banded).lower()}>({lists}, 1, {length})"
    whole, first_partial, everything = evaluate(
        "attn/block_lists.cuh", [f"{steps}.{part}" for part in ("whole", "full", "all")], arrays
    )
    assert (first_partial, everything) == (4 * len(full), 4 * len(full + partial))
    found = evaluate(
        "attn/block_lists.cuh",
        [f"position_of<{step}>({lists}, 1, {steps}, {i})" for i in range(everything)],
        arrays,
    )
    assert found == [128 * block + 32 * i for block in full + partial for i in range(4)]
    needs = [at + step > length or (banded and i >= first_partial) for i, at in enumerate(found)]
    assert not any(needs[:whole])
    if banded or 3 not in full:
        assert all(needs[whole:]), "a mask where none is needed costs time"


def test_philox_is_the_contract(evaluate):
    draw = random.Random(0)
    counters = [[draw.getrandbits(32) for _ in range(4)] for _ in range(10)] + [[0] * 4, [0xFFFFFFFF] * 4]
    key = (draw.getrandbits(32), draw.getrandbits(32))
    asked = [
        f"philox<7>({{{', '.join(f'{c}u' for c in counter)}}}, {key[0]}u, {key[1]}u).c{word}"
        for counter in counters
        for word in range(4)
    ]
    got = [value & 0xFFFFFFFF for value in evaluate("attn/dropout.cuh", asked)]
    columns = tuple(torch.tensor(column) for column in zip(*counters, strict=True))
    expected = torch.stack(flash_api.philox4x32(columns, key), 1)
    assert got == expected.flatten().tolist()


def test_bytes_are_compared_with_the_threshold(evaluate):
    draw = random.Random(1)
    cases = [
        (draw.getrandbits(32), threshold)
        for threshold in (1, 2, 127, 128, 129, 230, 255, 256)
        for _ in range(20)
    ]
    cases += [
        (b * 0x01010101, threshold) for threshold in (1, 128, 200, 256) for b in (0, 127, 128, 199, 200, 255)
    ]
    got = evaluate("attn/dropout.cuh", [f"bytes_from({word}u, {threshold})" for word, threshold in cases])
    for (word, threshold), flags in zip(cases, got, strict=True):
        for byte in range(4):
            assert bool(flags >> (8 * byte + 7) & 1) == ((word >> 8 * byte & 255) >= threshold)


def test_a_fragment_covers_its_tile_once(evaluate):
    asked = [f"tile::first_row({t})" for t in range(128)] + [f"tile::first_column({t})" for t in range(128)]
    asked += [f"tile::half_of({i})" for i in range(32)] + [f"tile::column_of({i})" for i in range(32)]
    values = evaluate("tile/fragment.cuh", asked)
    rows, columns, halves, offsets = values[:128], values[128:256], values[256:288], values[288:]
    covered = [
        (rows[t] + 8 * halves[i], columns[t] + offsets[i])
        for t, i in itertools.product(range(128), range(32))
    ]
    assert sorted(covered) == list(itertools.product(range(64), range(64)))


def test_chunks_of_a_panel_are_permuted_within_rows_and_spread_over_banks(evaluate):
    asked = [f"tile::chunk_offset({row}, {chunk})" for row in range(16) for chunk in range(8)]
    offsets = evaluate("tile/panels.cuh", asked)
    for row in range(16):
        assert sorted(offsets[8 * row : 8 * row + 8]) == [128 * row + 16 * c for c in range(8)]
    for chunk in range(8):
        banks = {offsets[8 * row + chunk] % 128 for row in range(8)}
        assert len(banks) == 8


@pytest.mark.parametrize(
    ("header", "struct", "maps", "fields"),
    [
        ("forward/plan.cuh", "forward::Params", 4, FORWARD_FIELDS),
        ("forward/merge.cuh", "forward::MergeParams", 0, MERGE_FIELDS),
        ("backward/plan.cuh", "backward::Params", 6, BACKWARD_FIELDS),
        ("backward/rows.cuh", "backward::RowParams", 0, ROW_FIELDS),
        ("backward/rows.cuh", "backward::FinishParams", 1, FINISH_FIELDS),
    ],
)
def test_arguments_have_the_size_that_the_kernel_copies(evaluate, header, struct, maps, fields):
    assert evaluate(header, [f"sizeof({struct})"]) == [128 * maps + fields.size]
