"""Messages between the two processes of a worker, over a real socket pair."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from worker.pool.wire import (
    Abandon,
    Away,
    BlockingChannel,
    Broken,
    Cancel,
    Canceled,
    CannotServe,
    Done,
    GiveBack,
    Heartbeat,
    Message,
    NonBlockingChannel,
    Raised,
    Ready,
    Returned,
    RunJob,
    Started,
    Stop,
    Waited,
    Withdrawn,
)
from worker.runtime.exception_info import exception_info

SOON = 5.0
#: More than any socket's buffer.
BIG = b"x" * 5_000_000


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def received(channel: NonBlockingChannel, number: int) -> list[Message]:
    """So many messages, as soon as they are there."""
    messages: list[Message] = []
    end = time.monotonic() + SOON
    while len(messages) < number and time.monotonic() < end:
        arrived, closed = channel.receive()
        messages += arrived
        if closed:
            break
    return messages


def framed(message: Message) -> bytes:
    """A message as it is on the wire."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        NonBlockingChannel(ours).send(message)
        return theirs.recv(1 << 16)


# Messages


@pytest.mark.parametrize(
    "message",
    [
        RunJob(7, ("idefics.caption", "id", {"retries": None}, b"body")),
        Cancel(7),
        Abandon(7),
        GiveBack(2, [7, 8]),
        Stop(),
        Ready(),
        CannotServe("There is no such model."),
        Heartbeat({"batches": 1}, 8, 8.0, 0.5, 0.0),
        Started(7, 12.5),
        Waited(7, 0.5),
        Done(2**40, (0, {"a": 1}, 0.5)),
        Broken(7, "SystemExit in the worker."),
        Away(7),
        Canceled(7),
        Canceled(7, {"text": "so far"}),
        Withdrawn([7, 8]),
        Returned(7),
    ],
)
def test_a_message_arrives_as_it_was_sent(ends: tuple[socket.socket, socket.socket], message: Message) -> None:
    ours, theirs = map(NonBlockingChannel, ends)
    ours.send(message)
    assert theirs.receive() == ([message], False)


def test_an_exception_arrives_with_its_class_and_arguments(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = map(NonBlockingChannel, ends)
    ours.send(Raised(1, exception_info(ValueError("boom"))))
    [message], _ = theirs.receive()
    error = message.exception.exception
    assert (type(error), error.args) == (ValueError, ("boom",))


def test_messages_arrive_in_order_however_many_come_at_once(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = map(NonBlockingChannel, ends)
    for number in range(100):
        ours.send(Cancel(number))
    assert theirs.receive() == ([Cancel(number) for number in range(100)], False)


def test_both_ends_send_at_the_same_time(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = map(NonBlockingChannel, ends)
    ours.send(RunJob(0, (1,)))
    theirs.send(Done(2, ()))
    assert ours.receive()[0] == [Done(2, ())]
    assert theirs.receive()[0] == [RunJob(0, (1,))]


def test_nothing_has_arrived_and_nobody_waits(ends: tuple[socket.socket, socket.socket]) -> None:
    assert NonBlockingChannel(ends[0]).receive() == ([], False)


# Frames


def test_a_message_in_single_bytes_arrives_once_it_is_whole(ends: tuple[socket.socket, socket.socket]) -> None:
    channel, frame = NonBlockingChannel(ends[0]), framed(Done(1, ()))
    for byte in frame[:-1]:
        ends[1].send(bytes([byte]))
        assert channel.receive() == ([], False)
    ends[1].send(frame[-1:])
    assert channel.receive() == ([Done(1, ())], False)


@pytest.mark.parametrize("seed", range(10))
def test_messages_cut_anywhere_arrive_whole(ends: tuple[socket.socket, socket.socket], seed: int) -> None:
    dice = random.Random(seed)
    messages = [Done(number, ("x" * dice.randrange(200),)) for number in range(20)]
    stream, arrived, channel = b"".join(map(framed, messages)), [], NonBlockingChannel(ends[0])
    while stream:
        size = dice.randrange(1, 300)
        ends[1].send(stream[:size])
        stream = stream[size:]
        arrived += channel.receive()[0]
    assert arrived == messages


def test_a_frame_is_its_length_and_a_pickle() -> None:
    frame = framed(Ready())
    assert struct.unpack("!I", frame[:4])[0] == len(frame) - 4


# Big messages


def test_a_message_that_the_socket_does_not_take_waits_without_blocking(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    channel = NonBlockingChannel(ends[0])
    channel.send(RunJob(0, (BIG,)))
    assert channel.has_unsent


def test_a_big_message_arrives_bit_by_bit(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = map(NonBlockingChannel, ends)
    ours.send(RunJob(0, (BIG,)))
    ours.send(RunJob(0, ("next",)))
    messages: list[Message] = []
    end = time.monotonic() + SOON
    while len(messages) < 2 and time.monotonic() < end:
        ours.flush()
        messages += theirs.receive()[0]
    assert messages == [RunJob(0, (BIG,)), RunJob(0, ("next",))]
    assert not ours.has_unsent


# Closed peers


def test_a_closed_peer_is_noticed_after_its_last_words(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = map(NonBlockingChannel, ends)
    theirs.send(Done(1, ()))
    theirs.close()
    assert ours.receive() == ([Done(1, ())], True)
    assert ours.receive() == ([], True)


def test_half_a_message_of_a_closed_peer_is_none(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[1].send(framed(Done(1, ()))[:-1])
    ends[1].close()
    assert NonBlockingChannel(ends[0]).receive() == ([], True)


def test_sending_to_a_closed_peer_is_not_an_error(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = map(NonBlockingChannel, ends)
    theirs.close()
    ours.send(Stop())
    ours.send(RunJob(0, (BIG,)))
    assert not ours.has_unsent, "else the event loop would try for ever"


# The model process's end


def read_all(channel: BlockingChannel, into: list[Any]) -> threading.Thread:
    reader = threading.Thread(target=lambda: into.extend(channel), daemon=True)
    reader.start()
    return reader


def test_the_blocking_end_reads_until_its_parent_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    parent, messages = NonBlockingChannel(ends[0]), []
    reader = read_all(BlockingChannel(ends[1]), messages)
    parent.send(RunJob(0, (1,)))
    parent.send(Cancel(1))
    parent.close()
    reader.join(SOON)
    assert messages == [RunJob(0, (1,)), Cancel(1)]


def test_the_blocking_end_reads_a_big_message(ends: tuple[socket.socket, socket.socket]) -> None:
    parent, messages = NonBlockingChannel(ends[0]), []
    reader = read_all(BlockingChannel(ends[1]), messages)
    parent.send(RunJob(0, (BIG,)))
    while parent.has_unsent:
        parent.flush()
    parent.close()
    reader.join(SOON)
    assert messages == [RunJob(0, (BIG,))]


def test_many_threads_write_whole_messages(ends: tuple[socket.socket, socket.socket]) -> None:
    parent, child = NonBlockingChannel(ends[0]), BlockingChannel(ends[1])

    def write(thread: int) -> None:
        for number in range(20):
            child.send(Done(thread, (number, "x" * 20_000)))

    threads = [threading.Thread(target=write, args=(thread,), daemon=True) for thread in range(8)]
    for thread in threads:
        thread.start()
    messages = received(parent, 160)
    assert len(messages) == 160
    for thread in range(8):
        assert [message.outcome[0] for message in messages if message.serial == thread] == list(range(20))
