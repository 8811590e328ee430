"""What a launch is told, without a GPU: the driver is replaced by a recorder, everything above it is real."""

import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnbench.impls.flash_api import BlockMask, Options
from attnbench.impls.flash_cuda import backward as backward_module
from attnbench.impls.flash_cuda import forward as forward_module
from attnbench.impls.flash_cuda.arguments import (
    BACKWARD_FIELDS,
    FORWARD_FIELDS,
    MERGE_FIELDS,
    ROW_FIELDS,
    addressable,
)
from attnbench.impls.flash_cuda.backward import BackwardPlan, backward, plan_backward
from attnbench.impls.flash_cuda.driver import TensorMap
from attnbench.impls.flash_cuda.forward import ForwardPlan, forward, plan_forward

MAP_BYTES = 128
BLOCKS = 132
TICKET = 0x7000


class Recorder:
    """Stands in for compiled kernels and the driver."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int, int, bytes]] = []
        self.maps: dict[bytes, tuple[TensorMap, int]] = {}

    def load(self, source: str, name: str, device: int, shared: int = 0) -> Any:
        recorder = self

        class Loaded:
            def launch(self, grid: int, threads: int, params: bytes, stream: int, shared: int = 0) -> None:
                recorder.launches.append((name, grid, threads, params))

        return Loaded()

    def encode(self, known: TensorMap, address: int) -> bytes:
        code = struct.pack("<Q", len(self.maps)).ljust(MAP_BYTES, b"\0")
        self.maps[code] = (known, address)
        return code

    def maps_of(self, params: bytes, count: int) -> list[tuple[TensorMap, int]]:
        return [self.maps[params[i * MAP_BYTES : (i + 1) * MAP_BYTES]] for i in range(count)]


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()

    def encode(known: TensorMap, address: int) -> bytes:
        return found.encode(known, address)

    for module in (forward_module, backward_module):
        monkeypatch.setattr(module, "check", lambda q: None)
        monkeypatch.setattr(module, "load", found.load)
        monkeypatch.setattr(module, "multiprocessors", lambda device: BLOCKS)
        monkeypatch.setattr(module, "on_device", lambda device: torch.no_grad())
        monkeypatch.setattr(module, "stream_of", lambda device: 0)
        monkeypatch.setattr(module, "ticket", lambda device, stream: TICKET)
    monkeypatch.setattr(TensorMap, "_encode", encode)
    ForwardPlan.of.cache_clear()
    BackwardPlan.of.cache_clear()
    yield found
    ForwardPlan.of.cache_clear()
    BackwardPlan.of.cache_clear()


def options(
    left=None, right=None, bottom_right=True, scale=0.5, dropout_p=0.0, mask_block=(0, 0), deterministic=False
):
    return Options(left, right, bottom_right, scale, dropout_p, mask_block, deterministic)


def tensors(batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v):
    return (
        torch.randn(batch, seqlen_q, heads, head_dim, dtype=torch.float16),
        torch.randn(batch, seqlen_k, kv_heads, head_dim, dtype=torch.float16),
        torch.randn(batch, seqlen_k, kv_heads, head_dim_v, dtype=torch.float16),
    )


SIZES = st.tuples(
    st.integers(1, 3), st.integers(1, 300), st.integers(1, 300), st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.sampled_from([(16, 16), (64, 64), (80, 128), (128, 64)]),
)  # fmt: skip


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.none() | st.integers(0, 50), st.none() | st.integers(0, 50), st.booleans())
def test_the_forward_is_told_the_problem(recorder, sizes, left, right, bottom_right):
    batch, seqlen_q, seqlen_k, (heads, kv_heads), (head_dim, head_dim_v) = sizes
    q, k, v = tensors(batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v)
    out, lse = forward(q, k, v, None, [], options(left, right, bottom_right))
    ((name, grid, threads, params),) = recorder.launches[-1:]
    assert name == "attention_forward"
    assert len(params) == 4 * MAP_BYTES + FORWARD_FIELDS.size
    fields = FORWARD_FIELDS.unpack(params[4 * MAP_BYTES :])
    group = heads // kv_heads
    few = seqlen_q <= 64 and group > 1  # then its heads share tiles of 64 rows
    queries = 64 // group if few else 64 * (threads // 128 - 1)
    tiles, planes = -(-seqlen_q // queries), batch * (kv_heads if few else heads)
    far = seqlen_q + seqlen_k
    assert fields[:4] == (lse.data_ptr(), 0, 0, TICKET)
    assert fields[4:13] == (0,) * 9
    assert fields[13:18] == (
        seqlen_q, seqlen_k, seqlen_k - seqlen_q if bottom_right else 0, min(left or 0, far), min(right or 0, far),
    )  # fmt: skip
    assert fields[18:20] == (tiles, planes)
    assert 1 <= fields[20] <= batch * heads
    assert fields[21:23] == (tiles * planes, min(BLOCKS, tiles * planes))
    assert grid == fields[22]
    assert fields[23:28] == (kv_heads, group, batch, 1, queries)
    assert fields[28] == pytest.approx(0.5 * math.log2(math.e))
    boxes = [found.box for found, _ in recorder.maps_of(params, 4)]
    assert boxes[0] == boxes[3] == ((64, group, queries, 1, 1) if few else (64, 1, 64, 1, 1))
    for (found, address), x in zip(recorder.maps_of(params, 4), (q, k, v, out), strict=True):
        assert address == x.data_ptr()
        assert address_of(found, x, kv_heads) == x.data_ptr() + 2 * x[-1, -1, -1, -1:].storage_offset()


def address_of(found, x, kv_heads):
    """Where a tensor map finds the last element of a BSHD tensor."""
    group = x.shape[2] // kv_heads
    last = [x.shape[3] - 1, x.shape[1] - 1, x.shape[2] - 1, x.shape[0] - 1]
    if len(found.sizes) == 5:
        assert found.sizes == (x.shape[3], group, x.shape[1], kv_heads, x.shape[0])
        last = [x.shape[3] - 1, group - 1, x.shape[1] - 1, kv_heads - 1, x.shape[0] - 1]
    else:
        assert found.sizes == (x.shape[3], x.shape[1], x.shape[2], x.shape[0])
    assert all(stride % 16 == 0 for stride in found.strides)
    steps = zip(last[1:], found.strides, strict=True)
    return x.data_ptr() + last[0] * 2 + sum(index * stride for index, stride in steps)


def test_few_queries_split_the_keys_over_the_device(recorder):
    q, k, v = tensors(2, 3, 8192, 12, 2, 64, 72)
    out, lse = forward(q, k, v, None, [], options(right=0))
    (name, grid, threads, params), (merge, merge_grid, merge_threads, merge_params) = recorder.launches
    assert (name, merge) == ("attention_forward", "attention_forward_merge")
    fields = FORWARD_FIELDS.unpack(params[4 * MAP_BYTES :])
    splits = 16  # of 64 steps of 128 keys, 4 each; 33 would give every multiprocessor one
    assert fields[18:20] == (1, splits * 2 * 2)
    assert grid == splits * 2 * 2 <= BLOCKS
    assert threads == 256
    assert fields[23:28] == (2, 6, 2, splits, 64 // 6)
    told = MERGE_FIELDS.unpack(merge_params)
    assert told[:4] == (fields[1], fields[0], out.data_ptr(), lse.data_ptr())
    assert 0 not in told[:2]
    assert told[4:] == (splits, 2 * 12 * 3, 12, 3, 72)
    assert merge_grid * merge_threads // 32 == 2 * 12 * 3


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_block_lists_reach_the_kernel(recorder, lead):
    q, k, v = tensors(2, 200, 500, 4, 2, 64, 64)
    lists = BlockMask.from_dense(torch.rand(*lead, 4, 4) < 0.5, (64, 128)).by_query.tensors()
    forward(q, k, v, None, lists, options(mask_block=(64, 128)))
    _, grid, threads, params = recorder.launches[-1]
    fields = FORWARD_FIELDS.unpack(params[4 * MAP_BYTES :])
    assert fields[4:8] == tuple(x.data_ptr() for x in lists)
    assert fields[8:13] == (lead[1] * 4 if lead[0] > 1 else 0, 4 if lead[1] > 1 else 0, 4, 64, 128)
    assert threads == 256, "a tile of 128 rows would meet two rows of blocks"
    assert grid == 4 * 2 * 4


@pytest.mark.parametrize("block", [(32, 128), (96, 64), (128, 48)], ids=str)
def test_blocks_that_no_tile_divides_are_refused(recorder, block):
    q, k, v = tensors(1, 300, 300, 2, 2, 64, 64)
    lists = [torch.zeros(1, 1, -(-300 // block[0]), *width) for width in ([], [-(-300 // block[1])])] * 2
    with pytest.raises(ValueError, match=f"block_mask: blocks of {block[0]} x {block[1]}, allowed"):
        forward(q, k, v, None, lists, options(mask_block=block))
    assert recorder.launches == []


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.booleans())
def test_the_backward_is_told_the_problem(recorder, sizes, with_d_lse):
    batch, seqlen_q, seqlen_k, (heads, kv_heads), (head_dim, head_dim_v) = sizes
    q, k, v = tensors(batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v)
    out, lse = forward(q, k, v, None, [], options(right=0))
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse) if with_d_lse else None
    grads = backward(d_out, d_lse, q, k, v, out, lse, None, [], options(right=0))
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]
    prepare, main, finish = recorder.launches[-3:]
    assert [launch[0] for launch in (prepare, main, finish)] == [
        "attention_backward_prepare", "attention_backward", "attention_backward_finish",
    ]  # fmt: skip
    rows = 128 if max(head_dim, head_dim_v) <= 64 else 64
    row_blocks = -(-seqlen_q // rows)
    units = rows // 64 * -(-head_dim // 64)
    told = ROW_FIELDS.unpack(prepare[3])
    assert told[:4] == (
        out.data_ptr(), d_out.data_ptr(), lse.data_ptr(), 0 if d_lse is None else d_lse.data_ptr()
    )  # fmt: skip
    assert told[7] == batch * heads * row_blocks * units * 64 * 64 // 4
    assert told[8] == TICKET
    assert told[9:12] == d_out.stride()[:3]
    assert told[12:15] == ((0, 0, 0) if d_lse is None else d_lse.stride())
    assert told[15:20] == (batch, heads, seqlen_q, rows * row_blocks, head_dim_v)
    assert told[20:30] == (0,) * 10
    fields = BACKWARD_FIELDS.unpack(main[3][6 * MAP_BYTES :])
    tiles = -(-seqlen_k // 128)
    assert fields[:6] == (*told[4:7], 0, TICKET, 0)
    assert fields[6:16] == (0,) * 10
    assert fields[16:21] == (seqlen_q, seqlen_k, seqlen_k - seqlen_q, 0, 0)
    assert fields[21:23] == (tiles, batch * kv_heads)
    assert fields[24:26] == (tiles * batch * kv_heads, main[1])
    assert fields[26:29] == (kv_heads, heads // kv_heads, row_blocks)
    assert fields[31:] == (1.0, 256, True)
    for (found, address), x in zip(
        recorder.maps_of(main[3], 6), (q, d_out, k, v, grads[1], grads[2]), strict=True
    ):
        assert address == x.data_ptr()
        assert address_of(found, x, kv_heads) == x.data_ptr() + 2 * x[-1, -1, -1, -1:].storage_offset()
    assert finish[1] == batch * heads * row_blocks * units


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
@pytest.mark.parametrize(("block", "keys"), [((64, 128), 128), ((128, 64), 64)], ids=str)
def test_block_lists_by_key_reach_the_backward(recorder, lead, block, keys):
    q, k, v = tensors(2, 200, 500, 4, 2, 64, 64)
    rows, columns = -(-200 // block[0]), -(-500 // block[1])
    mask = BlockMask.from_dense(torch.rand(*lead, rows, columns) < 0.5, block)
    lists = mask.by_query.tensors() + mask.by_key.tensors()
    asked = options(mask_block=block)
    out, lse = forward(q, k, v, None, lists[:4], asked)
    backward(torch.randn_like(out), None, q, k, v, out, lse, None, lists, asked)
    (*_, rows_params), (_, grid, _, params) = recorder.launches[-3:-1]
    told, fields = ROW_FIELDS.unpack(rows_params), BACKWARD_FIELDS.unpack(params[6 * MAP_BYTES :])
    shared = (lead[1] * columns if lead[0] > 1 else 0, columns if lead[1] > 1 else 0)
    by_key = (*(x.data_ptr() for x in lists[4:]), *shared, rows, *block[::-1])
    assert fields[7:16] == told[20:29] == by_key
    tiles = -(-500 // keys)
    assert grid == tiles * 2 * 2
    assert told[30:] == (tiles, 2 * 2, 2, 2)
    assert fields[6] == told[29] == told[6] + 16 * told[7], "behind what is zeroed"


def test_a_deterministic_backward_has_a_counter_for_each_block_of_sums(recorder):
    q, k, v = tensors(1, 130, 50, 2, 2, 64, 64)
    out, lse = forward(q, k, v, None, [], options())
    backward(torch.randn_like(out), None, q, k, v, out, lse, None, [], options(deterministic=True))
    prepare, main, _ = recorder.launches[-3:]
    told = ROW_FIELDS.unpack(prepare[3])
    fields = BACKWARD_FIELDS.unpack(main[3][6 * MAP_BYTES :])
    blocks = 2 * 4  # heads x rows in 64s, of whole steps of 128
    assert fields[5] == told[6] + 4 * 64 * 64 * blocks
    assert told[7] == (64 * 64 * blocks + 8) // 4  # float4 to be zeroed: the counters too


def test_what_dropout_keeps_is_scaled_by_the_rate_that_the_kernels_have(recorder):
    q, k, v = tensors(1, 130, 50, 2, 2, 64, 64)
    rng = torch.zeros(2, dtype=torch.int64)
    out, lse = forward(q, k, v, rng, [], options(dropout_p=0.3))
    backward(torch.randn_like(out), None, q, k, v, out, lse, rng, [], options(dropout_p=0.3))
    fields = BACKWARD_FIELDS.unpack(recorder.launches[-2][3][6 * MAP_BYTES :])
    assert fields[3] == rng.data_ptr()
    assert fields[31:33] == (pytest.approx(256 / 179), 179)


def test_tensors_that_the_copy_engine_cannot_address_are_copied(recorder):
    q, k, v = tensors(2, 40, 50, 2, 2, 64, 64)
    flat = torch.empty(k.numel() + 1, dtype=k.dtype)
    unaligned = flat[1:].view(k.shape)
    expanded = v[:1].expand(v.shape)
    forward(q, unaligned, expanded, None, [], options())
    addresses = [address for _, address in recorder.maps_of(recorder.launches[-1][3], 3)]
    assert addresses[0] == q.data_ptr()
    assert all(address % 16 == 0 for address in addresses)
    assert addresses[1] != unaligned.data_ptr()
    assert addresses[2] != expanded.data_ptr()


def test_saved_results_of_another_layout_are_copied(recorder):
    q, k, v = tensors(2, 40, 50, 2, 2, 64, 64)
    out, lse = forward(q, k, v, None, [], options())
    d_out = torch.randn_like(out)
    other_out, other_lse = out.mT.contiguous().mT, lse.mT.contiguous().mT
    backward(d_out, None, q, k, v, other_out, other_lse, None, [], options())
    told = ROW_FIELDS.unpack(recorder.launches[-3][3])
    assert told[0] != other_out.data_ptr()
    assert told[2] != other_lse.data_ptr()


@pytest.mark.parametrize(
    ("shape", "strides", "able"),
    [
        ((2, 8, 2, 64), (1024, 128, 64, 1), True),
        ((2, 8, 2, 64), (1024, 64, 512, 1), True),
        ((2, 8, 2, 64), (1024, 132, 64, 1), False),
        ((2, 8, 2, 64), (0, 128, 64, 1), False),
        ((1, 8, 2, 64), (3, 128, 64, 1), True),
        ((2, 8, 2, 64), (1024, 128, 64, 2), False),
    ],
)
def test_what_the_copy_engine_can_address(shape, strides, able):
    assert addressable((shape, strides), 2) is able


def test_a_plan_is_made_once(recorder):
    q, k, v = tensors(2, 40, 50, 2, 2, 64, 64)
    for _ in range(3):
        forward(q, k, v, None, [], options())
    assert ForwardPlan.of.cache_info().misses == 1
    assert len(recorder.launches) == 3


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "batch"), [(0, 5, 1), (5, 0, 1), (5, 5, 0)])
def test_nothing_to_attend_to_launches_nothing(recorder, seqlen_q, seqlen_k, batch):
    q, k, v = tensors(batch, seqlen_q, seqlen_k, 2, 1, 64, 64)
    out, lse = forward(q, k, v, None, [], options())
    assert recorder.launches == []
    assert not out.any()
    assert bool((lse == -math.inf).all())
    grads = backward(out, None, q, k, v, out, lse, None, [], options())
    assert recorder.launches == []
    assert not any(x.any() for x in grads)


def plans(q, k, v, asked):
    """How calls like these repeat: forward and backward."""
    out, lse = forward(q, k, v, None, [], asked)
    return plan_forward(q, k, v, asked), plan_backward(torch.randn_like(out), q, k, v, out, lse, asked)


@pytest.mark.parametrize("deterministic", [False, True])
def test_calls_that_repeat_have_the_plan_of_the_first(recorder, deterministic):
    q, k, v = tensors(2, 150, 130, 4, 2, 64, 128)
    asked = options(right=0, deterministic=deterministic)
    again, backward_again = plans(q, k, v, asked)
    out, lse = again(q, k, v, None)
    backward_again(torch.randn_like(out), q, k, v, out, lse, None)
    backward(torch.randn_like(out), None, q, k, v, out, lse, None, [], asked)
    assert [launch[0].rpartition("_")[2] for launch in recorder.launches] == [
        "forward", "forward", *["prepare", "backward", "finish"] * 2,
    ]  # fmt: skip
    assert ForwardPlan.of.cache_info().misses == BackwardPlan.of.cache_info().misses == 1


def test_calls_that_repeat_copy_what_begins_elsewhere(recorder):
    """Layouts are as they were, but not the address."""
    q, k, v = tensors(2, 40, 50, 2, 2, 64, 64)
    again, backward_again = plans(q, k, v, options())
    flat = torch.empty(k.numel() + 1, dtype=k.dtype)
    unaligned = flat[1:].view(k.shape)
    out, lse = again(q, unaligned, v, None)
    backward_again(torch.randn_like(out), q, unaligned, v, out, lse, None)
    for launch, count in ((recorder.launches[-4], 4), (recorder.launches[-2], 6)):
        addresses = [address for _, address in recorder.maps_of(launch[3], count)]
        assert all(address % 16 == 0 for address in addresses)
        assert q.data_ptr() in addresses
        assert unaligned.data_ptr() not in addresses


def test_what_is_copied_or_empty_is_not_planned(recorder):
    q, k, v = tensors(2, 40, 50, 2, 2, 64, 64)
    for operands in ((q, k[:1].expand(k.shape), v), (q, k, v.mT.contiguous().mT), (q[:0], k[:0], v[:0])):
        assert plans(*operands, options()) == (None, None)
    out, lse = forward(q, k, v, None, [], options())
    arguments = torch.randn_like(out), q, k, v
    other_out, other_lse = out.mT.contiguous().mT, lse.mT.contiguous().mT
    assert plan_backward(*arguments, other_out, lse, options()) is None
    assert plan_backward(*arguments, out, other_lse, options()) is None
    assert plan_backward(out[:1].expand(out.shape), q, k, v, out, lse, options()) is None
    assert plan_backward(*arguments, out, lse, options()) is not None


def test_plans_refuse_what_calls_refuse():
    """As on this machine: no GPU."""
    x = torch.zeros(1, 8, 2, 64, dtype=torch.float16)
    for q, error, message in (
        (x, ValueError, "q: on a cpu device"),
        (x.float(), TypeError, "q: got torch.float32"),
    ):
        with pytest.raises(error, match=message):
            plan_forward(q, q, q, options())
        with pytest.raises(error, match=message):
            plan_backward(q, q, q, q, q, q[..., 0], options())
