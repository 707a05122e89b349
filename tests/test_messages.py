"""Messages: which lines arrive, where, in what order, and how fast they may come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import (
    HANG_SECONDS,
    SMALL_BUFFER,
    Peer,
    Room,
    StartRoom,
    StartServer,
    assert_next,
    joined,
    left,
)

# --- lines, good and bad ------------------------------------------------------------


@pytest.mark.parametrize("length", [4095, 4096])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_message_up_to_the_limit_arrives(room: Room, length: int, end: str) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.send("x" * length + end)

    assert bob.line() == "Alex: " + "x" * length


REFUSED_LINES = [b"x" * 4097, b"x" * 100_000, b"\xff", b"fin\xc3", b"\xed\xa0\x80"]


@pytest.mark.parametrize("line", REFUSED_LINES, ids=lambda line: repr(line[:5]))
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_refused_line_leaves_its_neighbours_intact(
    room: Room, line: bytes, end: bytes
) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.send(b"before" + end + line + end + b"after" + end)

    assert bob.lines(2) == ["Alex: before", "Alex: after"]
    assert alex.line().startswith("! ")
    assert_next(alex, bob)
    assert_next(bob, alex)


def test_a_line_too_long_is_refused_though_its_newline_never_comes(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.send("x" * 5000)

    assert alex.line().startswith("! ")
    assert_next(bob, alex)


def test_blank_lines_are_passed_over(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.send("\n\r\n  \n\t\n\u3000\n")

    assert_next(alex, bob)
    assert_next(bob, alex)


def test_what_drives_a_terminal_or_reorders_text_reaches_nobody(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.say("a\x00\x1b[2J\x7f\x9b\u2028\u2029\u202e\u2066\u061c\rz\tz")

    assert bob.line() == "Alex: a\ufffd\ufffd[2J" + "\ufffd" * 8 + "z    z"


def test_everything_else_arrives_byte_for_byte(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")
    text = "  👩‍👩‍👧 ❤️ e\u0301 می\u200cخواهم a\u3000b \ufeff\U0010ffff: * ! "

    alex.say(text)

    assert bob.line() == f"Alex: {text}"


@pytest.mark.parametrize("text", ["* Bob has left the chat.", "! no", "Bob: hi", " q"])
def test_a_message_cannot_pass_for_another_kind_of_line(room: Room, text: str) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.say(text)

    assert bob.line() == f"Alex: {text}"


@pytest.mark.parametrize("tail", ["unfinished", "q", "\xff", "x" * 4096, "x\r"])
def test_a_last_line_without_newline_is_not_passed_on(room: Room, tail: str) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.send("finished\n" + tail)
    alex.close()

    assert bob.lines(2) == ["Alex: finished", left("Alex")]


# --- once, whole, in one order ------------------------------------------------------


def test_a_message_goes_to_every_member_but_its_sender(room: Room) -> None:
    alex, bob, carol = room.members("Alex", "Bob", "Carol")

    alex.say("hi")
    assert [bob.line(), carol.line()] == ["Alex: hi"] * 2

    assert_next(bob, alex, carol)
    assert_next(carol, bob)


def test_all_members_see_one_order(start_room: StartRoom) -> None:
    """Twenty senders, thirty readers, and ten visitors who come and go meanwhile."""
    room = start_room(lines_per_second=0)
    readers = [room.member(f"reader{i}") for i in range(30)]
    senders = [room.member(f"sender{i}") for i in range(20)]
    for peer in readers + senders[:-1]:
        peer.until(joined("sender19"))
    visitors = [room.connect() for _ in range(10)]
    together = threading.Barrier(30)

    def send(sender: Peer) -> None:
        together.wait(HANG_SECONDS)
        for i in range(20):
            if i == 10:
                together.wait(HANG_SECONDS)  # the visitors have come
            sender.say(f"line {i}")

    def visit(visitor: Peer, name: str) -> list[str]:
        together.wait(HANG_SECONDS)
        visitor.join(name)
        together.wait(HANG_SECONDS)
        heard = visitor.lines(20)
        visitor.say("bye")
        visitor.half_close()
        return heard + visitor.rest()

    with ThreadPoolExecutor(30) as pool:
        names = [f"visitor{i}" for i in range(10)]
        visits = pool.map(visit, visitors, names)
        list(pool.map(send, senders))

    # 20 senders have said 20 lines; 10 visitors have joined, said one, and left.
    order = readers[0].lines(20 * 20 + 3 * 10)
    for reader in readers[1:]:
        assert reader.lines(len(order)) == order
    for sender in senders:
        own = [f"{sender.name}: line {i}" for i in range(20)]
        assert [line for line in order if line in own] == own
        others = [line for line in order if line not in own]
        assert sender.lines(len(others)) == others
    for name, heard in zip(names, visits, strict=True):
        stay = order[order.index(joined(name)) + 1 : order.index(left(name))]
        assert heard == [line for line in stay if line != f"{name}: bye"]


def test_messages_that_a_socket_takes_in_pieces_arrive_whole_and_once(
    start_room: StartRoom,
) -> None:
    """All but one do not read for a while, and then go on from different places."""
    room = start_room(small_buffers=True, lines_per_second=0)
    watcher = room.member("Watcher")
    listeners = [
        room.member(f"listener{i}", receive_buffer=(i + 1) * SMALL_BUFFER)
        for i in range(6)
    ]
    speakers = [room.member(f"s{i}", receive_buffer=SMALL_BUFFER) for i in range(2)]
    for peer, last in ((watcher, "s1"), *((peer, "s1") for peer in listeners)):
        peer.until(joined(last))
    assert speakers[0].line() == joined("s1")
    order: list[str] = []

    for i in range(60):
        for speaker in speakers:
            speaker.say(f"{i:02} " + "é" * (30 * i))
        order += watcher.lines(2)

    with ThreadPoolExecutor(8) as pool:
        for heard in pool.map(lambda peer: peer.lines(len(order)), listeners):
            assert heard == order
        for speaker in speakers:
            others = [line for line in order if not line.startswith(speaker.name)]
            assert speaker.lines(len(others)) == others
    assert_next(watcher, *listeners, *speakers)


# --- what was sent before leaving ---------------------------------------------------


@pytest.mark.parametrize(
    "leave",
    [lambda peer: peer.say("q"), Peer.close, Peer.half_close],
    ids=["q", "close", "half-close"],
)
def test_what_was_sent_before_leaving_is_delivered(
    start_room: StartRoom, leave: Callable[[Peer], object]
) -> None:
    room = start_room(lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")

    alex.send("".join(f"line {i}\n" for i in range(2000)))
    leave(alex)

    assert bob.until(left("Alex")) == [f"Alex: line {i}" for i in range(2000)]


def test_what_was_sent_before_closing_is_delivered_though_writing_fails(
    start_room: StartRoom,
) -> None:
    room = start_room(lines_per_second=10)
    bob, carol = room.members("Bob", "Carol")
    alex = room.member("Alex")
    assert bob.line() == joined("Alex")
    alex.send("".join(f"line {i}\n" for i in range(105)))  # one is for the name
    alex.close()
    heard = bob.lines(1)

    # The first is answered with a reset, so that writing the second one fails.
    for text in ("who is there?", "anybody?"):
        bob.say(text)
        carol.gather(f"Bob: {text}".__eq__)

    heard += bob.until(left("Alex"))
    assert heard == [f"Alex: line {i}" for i in range(105)]


def test_who_half_closes_at_once_is_heard_and_answered(room: Room) -> None:
    """printf 'bot\\nhi\\n' | nc -N 127.0.0.1 12345"""
    (bob,) = room.members("Bob")
    bot = room.connect()

    bot.send("bot\nhi\n")
    bot.half_close()

    assert bob.lines(3) == [joined("bot"), "bot: hi", left("bot")]
    (welcome,) = bot.rest()
    assert welcome.startswith("* ")


def test_who_leaves_reads_its_replies_though_it_sent_more(room: Room) -> None:
    (bob,) = room.members("Bob")
    alex = room.connect()

    alex.send(b"Alex\n\xff\nq\n" + b"too late\n" * 10_000)

    welcome, refusal = alex.rest()  # raises if the connection is reset
    assert (welcome[0], refusal[0]) == ("*", "!")
    assert bob.lines(2) == [joined("Alex"), left("Alex")]


@pytest.mark.parametrize("small_buffers", [False, True])
def test_who_leaves_still_receives_what_was_said_before(
    start_server: StartServer, small_buffers: bool
) -> None:
    """Also what its socket could not take yet, and though it sent more than q."""
    chat = start_server("--rate", "0", "--quiet", small_buffers=small_buffers)
    bob, carol = chat.members("Bob", "Carol")
    alex = chat.member("Alex", receive_buffer=SMALL_BUFFER)
    assert carol.line() == joined("Alex")
    texts = [f"{i:03} " + "x" * 1000 for i in range(100)]
    bob.send("".join(f"{text}\n" for text in texts))
    assert carol.lines(100) == [f"Bob: {text}" for text in texts]

    alex.send(b"q\n" + b"too late\n" * 1000)

    assert carol.line() == left("Alex")
    passer_by = chat.connect()
    passer_by.send("q\n")
    assert passer_by.rest() == []  # the server has had the time to close Alex's too
    assert alex.rest() == [f"Bob: {text}" for text in texts]


# --- the rate -----------------------------------------------------------------------


@pytest.mark.parametrize("lines", [9, 10])
def test_a_burst_up_to_ten_seconds_worth_arrives_at_once(
    start_room: StartRoom, lines: int
) -> None:
    room = start_room(lines_per_second=1)
    (bob,) = room.members("Bob")
    began = time.monotonic()

    room.connect().send("Alex\n" + "hi\n" * (lines - 1))  # a name is a line too

    assert bob.lines(lines) == [joined("Alex")] + ["Alex: hi"] * (lines - 1)
    assert time.monotonic() - began < 0.8


@pytest.mark.parametrize("line", [b"hi\n", b"\n", b"\xff\n"], ids=repr)
def test_a_line_above_the_burst_is_read_later_and_not_lost(
    start_room: StartRoom, line: bytes
) -> None:
    room = start_room(lines_per_second=2)
    (bob,) = room.members("Bob")
    began = time.monotonic()

    room.connect().send(b"Alex\n" + line * 19 + b"above\n")

    assert bob.gather("Alex: above".__eq__)
    assert 0.5 <= time.monotonic() - began < 5


def test_nobody_is_slower_for_one_who_sends_too_fast(start_room: StartRoom) -> None:
    room = start_room(lines_per_second=1)
    alex, bob, carol = room.members("Alex", "Bob", "Carol")
    alex.send("hi\n" * 1000)
    assert bob.lines(9) == ["Alex: hi"] * 9

    carol.say("hello")

    assert bob.until("Carol: hello") in ([], ["Alex: hi"])
