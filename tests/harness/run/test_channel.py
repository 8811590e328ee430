"""Messages over a socket: however the bytes are cut, whole messages come out, in order."""

from __future__ import annotations

import _thread
import json
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.run.channel import Channel, ChannelClosed

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(st.dictionaries(st.text(), values, max_size=3), min_size=1, max_size=5)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


@given(messages, st.data())
def test_messages_split_and_joined_anywhere_arrive_whole(
    sent: list[dict[str, object]], data: st.DataObject
) -> None:
    stream = "".join(json.dumps(message) + "\n" for message in sent).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel, received, begin = Channel(ours), [], 0
        for end in [*cuts, len(stream)]:
            theirs.sendall(stream[begin:end])
            received += [channel.receive(10) for _ in range(stream.count(b"\n", begin, end))]
            begin = end
    assert received == sent


@given(messages)
def test_what_is_sent_is_what_is_received(sent: list[dict[str, object]]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        one, other = Channel(ours), Channel(theirs)
        for message in sent:
            one.send(message)
        assert [other.receive(10) for _ in sent] == sent


def test_no_message_within_the_limit_is_a_timeout(ends: tuple[Channel, socket.socket]) -> None:
    with pytest.raises(TimeoutError):
        ends[0].receive(0.01)


def test_an_interrupt_that_wakes_no_thread_is_heard(ends: tuple[Channel, socket.socket]) -> None:
    # interrupt_main marks the signal as come and interrupts no system call, as one that comes at the wrong moment.
    answered: list[bool] = []
    late = threading.Timer(20.0, lambda: (answered.append(True), ends[1].sendall(b"{}\n")))
    late.start()
    threading.Timer(0.2, _thread.interrupt_main).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            ends[0].receive(60.0)
    finally:
        late.cancel()
    assert not answered


def test_a_part_of_a_message_is_a_timeout_and_is_kept(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    other.sendall(b'{"a":')
    with pytest.raises(TimeoutError):
        channel.receive(0.01)
    other.sendall(b" 1}\n")
    assert channel.receive(10) == {"a": 1}


def test_a_limit_already_spent_still_takes_what_is_there(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    other.sendall(b'{"a": 1}\n')
    assert channel.receive(0.0) == {"a": 1}


def test_the_end_of_the_stream_is_closed_and_not_an_empty_message(
    ends: tuple[Channel, socket.socket],
) -> None:
    channel, other = ends
    other.sendall(b'{"a": 1}\n{"torn"')
    other.close()
    assert channel.receive(10) == {"a": 1}
    with pytest.raises(ChannelClosed):
        channel.receive(10)


def test_sending_to_nobody_is_closed(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    other.close()
    with pytest.raises(ChannelClosed):
        channel.send({"a": 1})


@pytest.mark.parametrize("limit", [None, 10.0])
def test_receiving_on_one_s_own_closed_end_is_closed(
    ends: tuple[Channel, socket.socket], limit: float | None
) -> None:
    channel, _ = ends
    channel.close()
    with pytest.raises(ChannelClosed):
        channel.receive(limit)


def test_a_message_larger_than_the_socket_s_buffer_passes(ends: tuple[Channel, socket.socket]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    channel, other = ends
    message = {"text": "x" * 3_000_000}
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(channel.send, message)
        assert Channel(other).receive(10) == message
        sending.result()
