"""The server over real sockets: every promise of it, under its contract's headings.

The tests that take longer than a quarter of a second wait for a process to start, for
megabytes to flow, or for a time that is itself what is promised.
"""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    HANG_SECONDS,
    SMALL_BUFFER,
    LineReader,
    Peer,
    Room,
    ServerProcess,
    assert_next,
    run_server,
)

import server

StartRoom = Callable[..., Room]
StartServer = Callable[..., ServerProcess]

MIB = 1024 * 1024
SHUTTING_DOWN = "* Server is shutting down."

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads /proc"
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def joined(name: str) -> str:
    return f"* {name} has joined the chat."


def left(name: str) -> str:
    return f"* {name} has left the chat."


# --- the wire: joining --------------------------------------------------------------


def test_a_name_is_answered_with_one_notice(room: Room) -> None:
    (bob,) = room.members("Bob")
    alex = room.connect()

    alex.say("Alex")

    assert alex.line().startswith("* ")
    assert bob.line() == joined("Alex")
    assert_next(bob, alex)


def test_the_others_read_of_a_joining_and_of_a_leaving(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")

    room.member("Carol").close()

    for peer in (alex, bob):
        assert peer.lines(2) == [joined("Carol"), left("Carol")]


def test_the_welcome_names_those_who_are_online(room: Room) -> None:
    anna, _ = room.members("Anna", "Bert")
    room.member("Carol").close()
    anna.until(left("Carol"))

    words = re.findall(r"\w+", room.connect().join("Dora"))

    assert "Anna" in words
    assert "Bert" in words
    assert "Carol" not in words


@pytest.mark.parametrize("online", [0, 1, 19, 20, 21, 25])
def test_the_welcome_names_twenty_people_and_how_many_more(
    room: Room, online: int
) -> None:
    for number in range(online):
        room.member(f"p{number}")

    welcome = room.connect().join("Alex")

    assert len(re.findall(r"\bp\d+\b", welcome)) == min(online, 20)
    assert re.findall(r"(\d+) more\b", welcome) == (
        [str(online - 20)] if online > 20 else []
    )


def test_blank_lines_before_the_name_are_passed_over(room: Room) -> None:
    alex = room.connect()

    alex.send("\n \r\n\t\nAlex\n")

    assert alex.line().startswith("* ")
    assert list(room.server.clients) == ["Alex"]


def test_name_and_messages_may_come_in_one_piece(room: Room) -> None:
    (bob,) = room.members("Bob")

    room.connect().send("Alex\r\none\r\ntwo\r\nq\r\n")

    assert bob.lines(4) == [joined("Alex"), "Alex: one", "Alex: two", left("Alex")]


def test_name_and_messages_may_come_byte_by_byte(room: Room) -> None:
    (bob,) = room.members("Bob")
    alex = room.connect()
    alex.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    for byte in "Zoé\nça va?\n".encode():
        alex.send(bytes([byte]))

    assert bob.lines(2) == [joined("Zoé"), "Zoé: ça va?"]


@pytest.mark.parametrize("line", [b"bob", b"a b", b"server", b"\xff", b"x" * 5000])
def test_after_a_refused_name_another_one_may_be_sent(room: Room, line: bytes) -> None:
    (bob,) = room.members("Bob")
    alex = room.connect()

    alex.send(line + b"\n")

    assert alex.line().startswith("! ")
    alex.join("Alex")
    assert bob.line() == joined("Alex")


def test_the_fifth_name_may_be_the_good_one(room: Room) -> None:
    alex = room.connect()

    alex.send("a b\n" * 4 + "\n" + "Alex\n")

    assert [line[0] for line in alex.lines(5)] == ["!", "!", "!", "!", "*"]


def test_after_five_refused_names_the_connection_is_closed(room: Room) -> None:
    (bob,) = room.members("Bob")
    alex = room.connect()

    alex.send("a b\n" * 5 + "Alex\n" * 100)

    assert [line[0] for line in alex.rest()] == ["!"] * 5
    carol = room.member("Carol")
    assert bob.line() == joined("Carol")
    assert_next(carol, bob)


@pytest.mark.parametrize("line", ["q", "Q", "q\r"])
def test_q_at_the_name_closes_without_a_word(room: Room, line: str) -> None:
    alex, bob = room.members("Alex", "Bob")
    carol = room.connect()

    carol.say(line)

    assert carol.rest() == []
    assert_next(alex, bob)


def test_who_has_not_joined_receives_nothing_of_the_chat(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")
    carol = room.connect()
    carol.say("a b")
    assert carol.line().startswith("! ")

    assert_next(alex, bob)

    carol.join("Carol")  # fails if any line comes before the welcome
    assert_next(alex, carol)


# --- the wire: names ----------------------------------------------------------------


def test_one_of_fifty_claims_of_a_name_at_one_moment_wins(room: Room) -> None:
    (bob,) = room.members("Bob")
    claimants = [room.connect() for _ in range(50)]

    for claimant in claimants:
        claimant.say("Alex")

    answers = [claimant.line()[0] for claimant in claimants]
    assert sorted(answers) == ["!"] * 49 + ["*"]
    winner = claimants[answers.index("*")]
    winner.name = "Alex"
    assert bob.line() == joined("Alex")
    assert_next(winner, bob)


@pytest.mark.parametrize("name", ["alex", "ALEX", "ＡＬＥＸ", "Alex "])
def test_a_name_that_differs_in_case_or_width_is_taken(room: Room, name: str) -> None:
    room.members("Alex")
    other = room.connect()

    other.say(name)

    assert other.line().startswith("! ")


def test_a_name_is_shown_trimmed_and_in_nfkc(room: Room) -> None:
    (bob,) = room.members("Bob")
    alex = room.connect()

    alex.say("  Ａｌｅｘ ")

    assert alex.line().startswith("* ")
    assert bob.line() == joined("Alex")


def test_a_name_is_free_once_its_leaving_is_announced(room: Room) -> None:
    (bob,) = room.members("Bob")

    for _ in range(20):
        room.member("Alex").close()
        assert bob.lines(2) == [joined("Alex"), left("Alex")]


def test_a_name_is_free_once_its_owner_is_disconnected(room: Room) -> None:
    for _ in range(20):
        alex = room.member("Alex")
        alex.say("q")
        assert alex.rest() == []


def test_an_owner_of_a_name_is_there_until_what_it_sent_is_passed_on(
    start_room: StartRoom,
) -> None:
    room = start_room(lines_per_second=10)
    (bob,) = room.members("Bob")
    alex = room.member("Alex")
    alex.send("hi\n" * 103)
    alex.close()
    bob.until("Alex: hi")

    other = room.connect()
    other.say("Alex")

    assert other.line().startswith("! ")
    assert bob.until(left("Alex")) == ["Alex: hi"] * 102
    other.join("Alex")


# --- the wire: messages -------------------------------------------------------------


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


def test_each_refused_line_is_answered_once(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.send((b"x" * 20_000 + b"\n" + b"\xff\n") * 3)
    assert_next(alex, bob)
    bob.say("done")

    assert [line[0] for line in alex.until("Bob: done")] == ["!"] * 6


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


# --- promised: once, whole, in one order --------------------------------------------


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
    """Two who do not read for a while each get what the other said meanwhile."""
    room = start_room(small_buffers=True, lines_per_second=0)
    anna = room.member("Anna", receive_buffer=SMALL_BUFFER)
    bert = room.member("Bert", receive_buffer=SMALL_BUFFER)
    carol = room.member("Carol")
    texts = [f"{i:02} " + "é" * (97 * i) for i in range(20)]

    for text in texts:
        anna.say(text)
        bert.say(text)
        assert sorted(carol.lines(2)) == [f"Anna: {text}", f"Bert: {text}"]

    assert anna.lines(22)[2:] == [f"Bert: {text}" for text in texts]
    assert bert.lines(21)[1:] == [f"Anna: {text}" for text in texts]
    assert_next(carol, anna, bert)


# --- promised: the ways of leaving --------------------------------------------------


@pytest.mark.parametrize(
    "leave",
    [
        lambda peer: peer.say("q"),
        lambda peer: peer.say("Q"),
        lambda peer: peer.send("q\r\nq\nmore\n"),
        Peer.close,
        Peer.half_close,
        Peer.reset,
    ],
    ids=["q", "Q", "q and more", "close", "half-close", "reset"],
)
def test_a_leaving_is_announced_once(
    room: Room, leave: Callable[[Peer], object]
) -> None:
    alex, bob = room.members("Alex", "Bob")
    carol = room.member("Carol")

    leave(carol)

    assert bob.lines(2) == [joined("Carol"), left("Carol")]
    assert_next(alex, bob)
    assert "Carol" not in room.server.clients


def test_removing_a_client_twice_is_announced_once(room: Room) -> None:
    alex, bob, carol = room.members("Alex", "Bob", "Carol")

    room.server.remove_client(room.server.clients["Carol"])
    carol.close()

    for peer in (alex, bob):
        assert peer.line() == left("Carol")
    assert_next(alex, bob)


def test_removing_a_client_again_spares_the_next_owner_of_its_name(room: Room) -> None:
    alex, bob, carol = room.members("Alex", "Bob", "Carol")
    room.server.remove_client(room.server.clients["Carol"])
    for peer in (alex, bob):
        assert peer.line() == left("Carol")
    again = room.member("Carol")
    for peer in (alex, bob):
        assert peer.line() == joined("Carol")

    carol.half_close()  # its handler removes it once more
    assert carol.rest() == []

    assert_next(again, alex, bob)
    assert_next(alex, bob, again)


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


@pytest.mark.parametrize("tail", ["unfinished", "q", "\xff", "x" * 4096, "x\r"])
def test_a_last_line_without_newline_is_not_passed_on(room: Room, tail: str) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.send("finished\n" + tail)
    alex.close()

    assert bob.lines(2) == ["Alex: finished", left("Alex")]


# --- promised: no client can delay another one --------------------------------------


def test_half_a_line_delays_nobody(room: Room) -> None:
    alex, bob, carol = room.members("Alex", "Bob", "Carol")

    carol.send("half a li")
    assert_next(alex, bob, carol)
    carol.send("ne\n")

    assert bob.line() == "Carol: half a line"


def test_a_silent_connection_delays_nobody(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")

    room.connect()
    room.connect().send("half a na")

    assert_next(alex, bob)
    assert room.member("Carol")


def test_a_slow_reader_is_dropped_and_others_keep_receiving(
    start_room: StartRoom,
) -> None:
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    room.member("Slow", receive_buffer=SMALL_BUFFER)
    assert bob.line() == joined("Slow")
    said = 0

    # Each line is read by the other one before the next is said, so nothing else waits.
    while True:
        alex.say("x" * 4089)
        said += 4096
        if bob.line() == left("Slow"):
            break

    # The line that was said after the last straw may have come first.
    assert 4 * MIB < said < 4.5 * MIB
    assert bob.line() == "Alex: " + "x" * 4089
    assert_next(alex, bob)


def bytes_in_the_kernel(ours: socket.socket, peer: Peer) -> int:
    """Return how much of what the server sent the peer has still to read."""
    import fcntl
    import termios

    # Send the acknowledgement that may be due, or those bytes would count twice.
    peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    return sum(
        int.from_bytes(fcntl.ioctl(end, request, bytes(4)), sys.byteorder)
        for end, request in ((ours, termios.TIOCOUTQ), (peer.socket, termios.FIONREAD))
    )


@needs_linux
@pytest.mark.parametrize(("above", "stays"), [(-1, True), (0, True), (1, False)])
def test_a_slow_reader_is_dropped_above_the_limit_and_not_at_it(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch, above: int, stays: bool
) -> None:
    limit = 20_000  # instead of 4 MiB, to be exact to the byte
    monkeypatch.setattr(server, "MAX_BACKLOG_BYTES", limit)
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    slow = room.member("Slow", receive_buffer=SMALL_BUFFER)
    assert bob.line() == joined("Slow")
    said: list[str] = []

    def say(length: int) -> None:
        text = "x" * (length - len("Alex: \n"))
        alex.say(text)
        said.append(f"Alex: {text}")
        assert bob.line() == said[-1]

    for _ in range(40):
        say(500)
    ours = room.server.clients["Slow"]
    while select.select([], [ours], [], 0.3)[1]:
        pass  # the kernel takes some more after a while
    waiting = 40 * 500 - bytes_in_the_kernel(ours, slow)
    assert waiting > 0
    missing = limit + above - waiting
    for length in (
        missing // 4,
        missing // 4,
        missing // 4,
        missing - missing // 4 * 3,
    ):
        say(length)

    if stays:
        assert slow.lines(len(said)) == said
        assert_next(alex, slow)
    else:
        assert bob.line() == left("Slow")


@needs_proc
def test_a_thousand_stalled_members_share_what_waits_for_them(
    start_server: StartServer, open_file_limit: Callable[[int], None]
) -> None:
    open_file_limit(1200)
    chat = start_server(
        "--rate", "0", "--quiet", "--max-clients", "1002", small_buffers=True
    )
    alex, bob = chat.members("Alex", "Bob")
    before = chat.status_bytes("VmRSS")
    for i in range(1000):
        chat.connect(receive_buffer=SMALL_BUFFER).say(f"stalled{i}")
    assert len(bob.lines(1000)) == 1000
    said = 0

    while said < 5 * MIB:
        alex.say("x" * 4089)
        said += 4096
        if bob.line().endswith(" has left the chat."):
            break

    assert 3.9 * MIB < said < 5 * MIB  # their joinings wait for them too
    assert chat.status_bytes("VmHWM") - before < 64 * MIB


@needs_proc
def test_what_waits_costs_little_more_than_its_bytes(start_server: StartServer) -> None:
    """Short lines, said one by one, so that each of them is a round."""
    chat = start_server("--rate", "0", "--quiet", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    chat.member("Slow", receive_buffer=SMALL_BUFFER)
    assert bob.line() == joined("Slow")
    before = chat.status_bytes("VmRSS")

    for _ in range(12_000):
        alex.say("x")
        assert bob.line() == "Alex: x"

    assert chat.status_bytes("VmHWM") - before < MIB


@needs_proc
def test_refusals_that_their_author_does_not_read_are_bounded(
    start_server: StartServer,
) -> None:
    chat = start_server("--rate", "0", "--quiet", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    rude = chat.member("Rude", receive_buffer=SMALL_BUFFER)
    assert bob.line() == joined("Rude")
    before = chat.status_bytes("VmRSS")

    with suppress(ConnectionError):  # it is cut off
        for _ in range(2000):
            rude.send(b"\xff\n" * 2000)

    assert bob.line() == left("Rude")
    assert chat.status_bytes("VmHWM") - before < 16 * MIB
    assert_next(alex, bob)


def test_refusals_that_have_been_read_do_not_count(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are, to one that is never quite up to date."""
    monkeypatch.setattr(server, "MAX_BACKLOG_BYTES", 40_000)  # instead of 4 MiB
    room = start_room(small_buffers=True, lines_per_second=0)
    rude = room.member("Rude", receive_buffer=SMALL_BUFFER)
    reply = "! That line is not UTF-8."
    rude.send(b"\xff\n" * 1000)  # 26 kB of replies, of which the kernel takes a part

    for _ in range(1500):
        rude.send(b"\xff\n" * 50)
        assert rude.lines(50) == [reply] * 50

    assert rude.lines(1000) == [reply] * 1000


def test_a_slow_reader_that_speaks_sees_all_but_its_own_lines(
    start_room: StartRoom,
) -> None:
    """And its refusals in their places, wherever in the chain of backlogs they fall."""
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    slow = room.member("Slow", receive_buffer=SMALL_BUFFER)
    assert bob.line() == joined("Slow")
    promised: list[str] = []

    for i in range(300):
        text = "x" * (3000 if i < 20 or i % 50 == 0 else 10) + str(i)
        alex.say(text)
        assert bob.line() == f"Alex: {text}"
        slow.send(f"own {i}\n".encode() + b"\xff\n")
        assert bob.line() == f"Slow: own {i}"
        promised += [f"Alex: {text}", "! That line is not UTF-8."]

    assert slow.lines(len(promised)) == promised
    assert_next(bob, slow)


@pytest.mark.parametrize(("lines", "entries"), [(127, 1), (128, 1), (129, 2)])
def test_what_goes_into_the_log_at_once_is_bounded_in_lines(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch, lines: int, entries: int
) -> None:
    """Each gets a name, and so short lines become long."""
    passed_on: list[bytes] = []
    broadcast = server.ChatServer.broadcast_message

    def spy(chat: server.ChatServer, message: bytes, *rest: Any) -> bool:
        passed_on.append(message)
        return broadcast(chat, message, *rest)

    monkeypatch.setattr(server.ChatServer, "broadcast_message", spy)
    room = start_room(lines_per_second=0)
    alex, bob = room.members("\U00010400" * 32, "Bob")

    alex.send("a\n" * lines)

    assert bob.lines(lines) == [f"{alex.name}: a"] * lines
    assert len(passed_on) == entries
    assert max(map(len, passed_on)) < server.MAX_LOG_BYTES // 8


@needs_proc
def test_a_line_without_end_costs_little_memory(start_server: StartServer) -> None:
    chat = start_server()
    alex, bob = chat.members("Alex", "Bob")
    before = chat.status_bytes("VmRSS")

    for _ in range(50):
        alex.send(b"x" * MIB)
    alex.send("\nafter\n")

    assert bob.line() == "Alex: after"
    assert chat.status_bytes("VmHWM") - before < 32 * MIB


# --- promised: brakes without a rate ------------------------------------------------


def drain(peer: Peer) -> None:
    """Read and forget until EOF."""
    while peer.socket.recv(MIB):
        pass


def flood(peer: Peer, stop: threading.Event) -> None:
    """Write as fast as the server reads, then close."""
    block = ("x" * 1000 + "\n").encode() * 64
    while not stop.is_set():
        peer.send(block)
    peer.half_close()


@contextmanager
def flooding(*writers: Peer) -> Iterator[threading.Event]:
    """Have these write without pause until the event is set, and read meanwhile."""
    stop = threading.Event()
    with ThreadPoolExecutor(2 * len(writers)) as pool:
        futures = [pool.submit(flood, writer, stop) for writer in writers]
        futures += [pool.submit(drain, writer) for writer in writers]
        try:
            yield stop
        finally:
            stop.set()
    for future in futures:
        future.result()


def test_who_reads_four_megabytes_a_second_stays_however_fast_others_write(
    start_server: StartServer,
) -> None:
    """For 2.5 s, in which unbraked writers would be 100 MB ahead."""
    chat = start_server("--rate", "0", "--quiet")
    reader, *writers = chat.members("Reader", "Writer1", "Writer2")

    with flooding(*writers) as stop:
        began, received = time.monotonic(), 0
        while received < 10_000_000:
            stop.wait(began + received / 4_000_000 - time.monotonic())
            received += len(reader.take())
        stop.set()
        ends = {left("Writer1"), left("Writer2")}
        last = [reader.gather(ends.__contains__) for _ in ends]

    assert set(last) == ends
    witness = chat.member("Witness")
    assert reader.line() == joined("Witness")
    assert_next(witness, reader)


def test_a_trickle_reader_delays_nobody(start_room: StartRoom) -> None:
    """Promised are 100 ms: of the median, since a busy machine may be late once."""
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob, writer = room.members("Alex", "Bob", "Writer")
    for ours in room.server.clients.values():
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
    trickle = room.member("Trickle", receive_buffer=SMALL_BUFFER)
    delays: list[float] = []
    ends = {left("Trickle")}

    with flooding(writer) as stop, ThreadPoolExecutor(1) as pool:
        pool.submit(drain, alex)
        while not stop.is_set():
            trickle.socket.recv(1)
            probe = f"probe {len(delays)}"
            said = time.monotonic()
            alex.say(probe)
            if bob.gather({f"Alex: {probe}", *ends}.__contains__) in ends:
                stop.set()
            delays.append(time.monotonic() - said)
        alex.half_close()

    assert statistics.median(delays[-10:]) < 0.1
    assert max(delays) < 1


def test_what_is_said_after_a_join_waits_for_an_instant_only(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it took to tell of the join: 20 ms, and 100 ms are promised."""
    monkeypatch.setattr(server, "JOIN_PAUSE", 1e9)
    alex, bob = room.members("Alex", "Bob")
    delays = []

    for i in range(10):
        room.member(f"Guest{i}")
        assert alex.line() == bob.line() == joined(f"Guest{i}")
        said = time.monotonic()
        alex.say("hi")
        assert bob.line() == "Alex: hi"
        delays.append(time.monotonic() - said)

    assert 0.01 < statistics.median(delays) < 0.1


# --- promised: connections that come to nothing -------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"half a na", b"a b\n"], ids=["nothing", "half a name", "a bad name"]
)
def test_who_has_not_joined_in_time_is_told_so_and_closed(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(server, "JOIN_SECONDS", 0.1)
    room = start_room()
    alex, bob = room.members("Alex", "Bob")
    carol = room.connect()

    carol.send(data)

    assert carol.rest()[-1].startswith("! ")
    assert_next(alex, bob)  # whose own time to join is over by now


@pytest.mark.parametrize("rate", [0, 1, 100])
@pytest.mark.parametrize("data", [b"\n" * 100, b"x" * 100], ids=["blank", "endless"])
def test_who_has_not_joined_in_time_is_closed_though_it_keeps_sending(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch, rate: int, data: bytes
) -> None:
    monkeypatch.setattr(server, "JOIN_SECONDS", 0.2)
    room = start_room(lines_per_second=rate)
    began = time.monotonic()
    carol = room.connect()
    stop = threading.Event()

    def keep_sending() -> None:
        try:
            while not stop.is_set():
                carol.send(data)
        except OSError:
            pass  # closed

    with ThreadPoolExecutor(1) as pool:
        pool.submit(keep_sending)
        carol.socket.settimeout(2)
        try:
            reason = carol.gather(lambda line: "join" in line)
        finally:
            stop.set()
            with suppress(OSError):  # it has been closed by now
                carol.half_close()

    assert reason.startswith("! ")
    assert time.monotonic() - began < 1


def test_the_time_to_join_is_two_minutes() -> None:
    assert server.JOIN_SECONDS == 120


@pytest.mark.parametrize(
    ("level", "option", "value"),
    [
        ("SOL_SOCKET", "SO_KEEPALIVE", 1),
        ("IPPROTO_TCP", "TCP_KEEPIDLE", 60),
        ("IPPROTO_TCP", "TCP_KEEPINTVL", 15),
        ("IPPROTO_TCP", "TCP_KEEPCNT", 4),
        ("IPPROTO_TCP", "TCP_USER_TIMEOUT", 120_000),
    ],
)
def test_peers_that_vanish_are_found(
    room: Room, level: str, option: str, value: int
) -> None:
    if not hasattr(socket, option):
        pytest.skip(f"no {option} here")
    room.members("Alex")

    ours = room.server.clients["Alex"]

    assert ours.getsockopt(getattr(socket, level), getattr(socket, option)) == value


# --- promised: a full room ----------------------------------------------------------


def test_members_up_to_the_limit_join_and_the_next_one_is_refused(
    start_room: StartRoom,
) -> None:
    room = start_room(max_clients=3)
    alex, bob, _ = room.members("Alex", "Bob", "Carol")

    (refusal,) = room.connect().rest()

    assert refusal.startswith("! ")
    assert "full" in refusal
    assert_next(alex, bob)


def test_a_full_room_has_room_again_when_somebody_leaves(start_room: StartRoom) -> None:
    room = start_room(max_clients=2)
    alex, bob = room.members("Alex", "Bob")
    room.connect().rest()

    bob.close()
    assert alex.line() == left("Bob")

    assert room.member("Carol")


def test_who_is_refused_may_have_sent_something(start_room: StartRoom) -> None:
    room = start_room(max_clients=1)
    room.members("Alex")
    bob = room.connect()

    bob.send("Bob\n" + "hi\n" * 1000)

    (refusal,) = bob.rest()  # raises if the connection is reset
    assert "full" in refusal


def test_the_longest_waiting_connection_makes_room_in_a_full_chat(
    start_room: StartRoom,
) -> None:
    room = start_room(max_clients=3)
    alex = room.member("Alex")
    first, second = room.connect(), room.connect()

    bob = room.member("Bob")

    (reason,) = first.rest()
    assert reason.startswith("! ")
    second.join("Second")
    assert alex.lines(2) == [joined("Bob"), joined("Second")]
    assert bob.line() == joined("Second")


def test_nobody_makes_room_below_the_limit(start_room: StartRoom) -> None:
    room = start_room(max_clients=3)
    first, second, third = room.connect(), room.connect(), room.connect()

    third.join("Third")
    second.join("Second")

    first.join("First")


# --- promised: no more descriptors, no more threads ---------------------------------


def test_the_server_raises_its_own_limit_of_open_files(
    start_server: StartServer,
) -> None:
    chat = start_server("--max-clients", "100", limits="ulimit -S -n 32")

    for i in range(100):
        chat.member(f"member{i}")

    assert "full" in chat.connect().line()


@needs_proc
def test_the_server_stays_on_one_processor(start_server: StartServer) -> None:
    here = os.sched_getaffinity(0)
    if len(here) == 1:
        pytest.skip("there is only one processor")
    chat = start_server()
    chat.members("Alex", "Bob")

    threads = Path(f"/proc/{chat.process.pid}/task").iterdir()
    allowed = [os.sched_getaffinity(int(thread.name)) for thread in threads]

    assert len(allowed) >= 5
    assert allowed[0] < here
    assert all(len(processors) == 1 for processors in allowed)
    assert len(set(map(frozenset, allowed))) == 1


def test_a_python_without_an_interpreter_lock_uses_all_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[object] = []
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda *_: chosen.append(_), raising=False
    )

    server._stay_on_one_processor()

    assert not chosen


def test_the_server_runs_where_it_may_not_choose_a_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: int, __: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse, raising=False)

    server._stay_on_one_processor()


@needs_proc
def test_out_of_descriptors_the_server_serves_those_inside_and_does_not_spin(
    start_server: StartServer,
) -> None:
    chat = start_server(limits="ulimit -n 64")
    alex, bob = chat.members("Alex", "Bob")

    crowd = [chat.connect() for _ in range(200)]
    chat.output.until("Cannot take new clients")

    before = chat.cpu_seconds()
    assert select.select([alex.socket, bob.socket], [], [], 0.5)[0] == []
    assert chat.cpu_seconds() - before < 0.05
    assert_next(alex, bob)
    for peer in crowd:
        peer.close()
    assert chat.member("Carol")
    assert alex.line() == joined("Carol")


def test_out_of_threads_the_server_serves_those_inside(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    alex, bob = room.members("Alex", "Bob")
    failed = threading.Event()

    def start(thread: threading.Thread) -> None:
        failed.set()
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        room.connect()
        assert failed.wait(HANG_SECONDS)
        assert_next(alex, bob)

    assert room.member("Carol")
    assert alex.line() == joined("Carol")


# --- promised: the rate -------------------------------------------------------------


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


def test_who_sends_too_fast_loses_nothing(start_room: StartRoom) -> None:
    room = start_room(lines_per_second=50)
    alex, bob = room.members("Alex", "Bob")
    began = time.monotonic()

    alex.send("".join(f"line {i}\n" for i in range(520)))
    alex.close()

    assert bob.until(left("Alex")) == [f"Alex: line {i}" for i in range(520)]
    assert 0.4 <= time.monotonic() - began < 5


def test_nobody_is_slower_for_one_who_sends_too_fast(start_room: StartRoom) -> None:
    room = start_room(lines_per_second=1)
    alex, bob, carol = room.members("Alex", "Bob", "Carol")
    alex.send("hi\n" * 1000)
    assert bob.lines(9) == ["Alex: hi"] * 9

    carol.say("hello")

    assert bob.until("Carol: hello") in ([], ["Alex: hi"])


# --- promised: the shutdown ---------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_in_order(
    start_server: StartServer, number: signal.Signals
) -> None:
    chat = start_server()
    alex, bob = chat.members("Alex", "Bob")
    waiting = chat.connect()
    waiting.say("a b")
    assert waiting.line().startswith("! ")

    began = time.monotonic()
    chat.process.send_signal(number)

    for peer in (alex, bob):
        assert peer.rest() == [SHUTTING_DOWN]
    waiting.rest()
    chat.close_peers()
    assert chat.wait() == 0
    assert time.monotonic() - began < 2
    again = start_server("--port", chat.address.rpartition(":")[2])
    assert again.address == chat.address


def test_all_that_was_logged_arrives_before_the_shutdown(
    start_server: StartServer,
) -> None:
    chat = start_server("--rate", "0")
    reader, *writers = chat.members("Reader", "Writer1", "Writer2", "Writer3")

    def write(writer: Peer) -> None:
        try:
            for i in range(3000):
                writer.say(f"line {i}")
        except OSError:
            pass  # the server is gone

    with ThreadPoolExecutor(5) as pool:
        output = pool.submit(chat.output.rest)
        for writer in writers:
            pool.submit(write, writer)
        received = reader.lines(1)
        chat.interrupt()
        received += reader.rest()
        for writer in writers:
            drain(writer)
        chat.close_peers()
        logged = output.result()

    assert chat.wait() == 0
    assert received.pop() == SHUTTING_DOWN
    prefix = "Received message from "
    heard = [line.removeprefix(prefix) for line in logged if line.startswith(prefix)]
    assert sorted(received) == sorted(heard)


@pytest.mark.parametrize("flags", [["--quiet"], []], ids=["", "nor a stuck terminal"])
def test_a_stalled_member_does_not_hold_up_the_shutdown(
    start_server: StartServer, flags: list[str]
) -> None:
    """It takes 1.5 s: so long the stalled member may still read."""
    chat = start_server("--rate", "0", *flags, small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    stall_a_member(chat, alex, bob)

    began = time.monotonic()
    chat.interrupt()

    assert bob.line() == SHUTTING_DOWN
    assert chat.wait() == 0
    assert time.monotonic() - began < 2


def test_a_second_interrupt_ends_the_server_at_once(start_server: StartServer) -> None:
    chat = start_server("--rate", "0", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    stall_a_member(chat, alex, bob)
    chat.interrupt()
    assert bob.line() == SHUTTING_DOWN
    began = time.monotonic()

    chat.interrupt()

    assert chat.wait() in (-signal.SIGINT, 130)
    assert time.monotonic() - began < 1  # and, as always, nothing is on stderr


def stall_a_member(chat: ServerProcess, speaker: Peer, reader: Peer) -> None:
    """Have a member for whom more waits than the kernel takes."""
    chat.member("Stalled", receive_buffer=SMALL_BUFFER)
    reader.line()
    for _ in range(20):  # which also fills the pipe that nobody reads
        speaker.say("x" * 4000)
        reader.line()


def test_no_new_clients_come_in_after_a_shutdown(room: Room) -> None:
    room.stop()

    with pytest.raises(ConnectionRefusedError):
        room.connect()


def test_a_shutdown_wakes_one_who_is_braked(start_room: StartRoom) -> None:
    room = start_room(lines_per_second=1)
    alex, bob = room.members("Alex", "Bob")
    alex.send("hi\n" * 1000)
    bob.lines(9)
    began = time.monotonic()

    room.server.stop()

    assert bob.gather(SHUTTING_DOWN.__eq__)
    assert bob.rest() == []
    room.close_peers()
    room.stop()
    assert time.monotonic() - began < 2


# --- the terminal -------------------------------------------------------------------


def test_the_terminal_shows_one_line_for_each_event(start_server: StartServer) -> None:
    chat = start_server()
    alex = chat.connect()
    alex.join("Alex")
    alex.say("Hello everyone!")
    alex.say("q")
    alex.rest()

    assert chat.start_lines == [
        "Server is running...",
        f"Listening on {chat.address}",
    ]
    assert chat.output.lines(5) == [
        f"New connection from 127.0.0.1:{alex.port}",
        "User Alex has joined the chat.",
        "Received message from Alex: Hello everyone!",
        "Received message from Alex: q",
        "Removing user: Alex from clients",
    ]


def test_quiet_leaves_out_the_messages(start_server: StartServer) -> None:
    chat = start_server("--quiet")
    alex = chat.member("Alex")

    alex.send("hi\nq\n")
    alex.rest()

    assert chat.output.lines(3)[1:] == [
        "User Alex has joined the chat.",
        "Removing user: Alex from clients",
    ]


def test_the_terminal_gets_no_control_characters(start_server: StartServer) -> None:
    chat = start_server()
    alex = chat.member("Alex")
    assert len(chat.output.lines(2)) == 2

    alex.say("a\x1b[2J\r\u2028\u202e\x9b\tz")

    cleaned = "a\ufffd[2J\ufffd\ufffd\ufffd\ufffd    z"
    assert chat.output.line() == f"Received message from Alex: {cleaned}"


@pytest.mark.parametrize("bad", [b"a b\n", b"\xff\n"])
def test_the_terminal_says_whose_name_was_refused_and_why(
    start_server: StartServer, bad: bytes
) -> None:
    chat = start_server()
    alex = chat.connect()

    alex.send(bad)

    line = chat.output.lines(2)[1]
    assert f"127.0.0.1:{alex.port}" in line
    assert alex.line().removeprefix("! ") in line


def test_the_terminal_says_whose_line_was_refused_and_why(
    start_server: StartServer,
) -> None:
    chat = start_server()
    alex = chat.member("Alex")
    assert len(chat.output.lines(2)) == 2

    alex.send(b"\xff\n")

    line = chat.output.line()
    assert "Alex" in line
    assert alex.line().removeprefix("! ") in line


def test_the_terminal_says_whose_connection_was_lost_and_why(
    start_server: StartServer,
) -> None:
    chat = start_server()
    alex = chat.member("Alex")

    alex.reset()

    line = chat.output.until("reset")[-1]
    assert "Alex" in line
    assert f"127.0.0.1:{alex.port}" in line


def test_the_terminal_says_who_was_too_slow(start_server: StartServer) -> None:
    chat = start_server("--rate", "0", "--quiet", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    slow = chat.member("Slow", receive_buffer=SMALL_BUFFER)
    line = bob.line()

    while line != left("Slow"):
        alex.say("x" * 4000)
        line = bob.line()

    line = chat.output.until("too slow")[-1]
    assert "Slow" in line
    assert f"127.0.0.1:{slow.port}" in line


def test_the_terminal_says_who_was_turned_away(start_server: StartServer) -> None:
    chat = start_server("--max-clients", "1")
    chat.member("Alex")

    bob = chat.connect()

    assert f"127.0.0.1:{bob.port}" in chat.output.until("full")[-1]


def test_a_name_that_the_terminal_cannot_show_stops_nothing(
    start_server: StartServer,
) -> None:
    chat = start_server(limits="export PYTHONIOENCODING=ascii PYTHONUTF8=0")
    alex, zoe = chat.members("Alex", "Zoé")

    assert_next(zoe, alex)

    assert "joined" in chat.output.until("Zo")[-1]


def test_a_terminal_that_stops_reading_does_not_stop_the_chat(
    start_server: StartServer,
) -> None:
    """What was left out is told, and nothing is left out silently."""
    chat = start_server("--rate", "0")
    alex, bob = chat.members("Alex", "Bob")
    assert len(chat.output.lines(4)) == 4
    text = "as long as a line is that people write"
    said = 15_000

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(alex.send, f"{text}\n" * said)
        assert bob.lines(said) == [f"Alex: {text}"] * said
        sending.result()

        # Now somebody reads it.  Say more until something fits again.
        reading = pool.submit(chat.output.until, "left out")
        while not reading.done():
            alex.say(text)
            said += 1
            assert bob.line() == f"Alex: {text}"
    alex.say("last")
    lines = reading.result() + chat.output.until("last")

    shown = lines.count(f"Received message from Alex: {text}")
    counts = [re.search(r"\d+(?= lines? left out)", line) for line in lines]
    assert shown + sum(int(count[0]) for count in counts if count) == said
    # What one recv() gave is shown together or left out together.
    assert shown > 10_000 - 4096 // len(text)


@pytest.mark.parametrize("lines", [9_999, 10_000, 10_001, 10_003])
def test_up_to_ten_thousand_lines_wait_for_the_terminal(lines: int) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writing, b"\n" * 4096)
    os.set_blocking(writing, True)
    writer = server.LogWriter(writing)
    output = LineReader(reading)

    for i in range(lines):
        writer.handle(logging.makeLogRecord({"msg": f"line {i}"}))
    shown = [line for line in output.until(f"line {min(lines, 10_000) - 1}") if line]
    writer.drain(HANG_SECONDS)
    writer.handle(logging.makeLogRecord({"msg": "next"}))
    after = output.until("next")

    os.close(reading)
    os.close(writing)
    assert shown == [f"line {i}" for i in range(min(lines, 10_000))]
    assert re.findall(r"\d+", "".join(after)) == (
        [str(lines - 10_000)] if lines > 10_000 else []
    )


def test_whatever_is_logged_gets_to_the_terminal_cleaned() -> None:
    reading, writing = os.pipe()
    output = LineReader(reading)
    writer = server.LogWriter(writing)

    writer.handle(logging.makeLogRecord({"msg": "one\x1b[2J\ntwo\r\u202e\tend"}))

    assert output.lines(2) == ["one\ufffd[2J", "two\ufffd\ufffd    end"]
    writer.drain(HANG_SECONDS)
    os.close(reading)
    os.close(writing)


@needs_proc
def test_an_idle_server_uses_no_cpu(start_server: StartServer) -> None:
    chat = start_server()
    members = chat.members("Alex", "Bob", "Carol")
    chat.connect()
    before = chat.cpu_seconds()

    assert select.select([peer.socket for peer in members], [], [], 0.5)[0] == []

    assert chat.cpu_seconds() - before < 0.03


# --- the start ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--prot", "1"],
        ["--port"],
        ["--port", "x"],
        ["--port", "-1"],
        ["--port", "65536"],
        ["--max-clients", "0"],
        ["--rate", "-1"],
        ["--rate", "1.5"],
        ["--quiet=1"],
        ["extra"],
    ],
    ids=" ".join,
)
def test_a_bad_flag_is_explained_in_one_line(flags: list[str]) -> None:
    run = run_server(*flags)

    assert run.returncode == 2
    assert run.stdout == ""
    assert re.fullmatch(r"[^\n]+--help[^\n]+\n", run.stderr)


def test_a_taken_port_is_explained_in_one_line(room: Room) -> None:
    port = room.address.rpartition(":")[2]

    run = run_server("--port", port)

    assert run.returncode == 1
    assert run.stdout == ""
    assert re.fullmatch(rf"[^\n]+{port}[^\n]+in use[^\n]+--port\b[^\n]*\n", run.stderr)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "192.0.2.1"])
def test_an_unknown_host_is_explained_in_one_line(host: str) -> None:
    run = run_server("--host", host, "--port", "0")

    assert run.returncode == 1
    assert run.stdout == ""
    assert re.fullmatch(rf"[^\n]+{host}[^\n]+--host\b[^\n]*\n", run.stderr)


def test_help_explains_every_flag_with_its_default() -> None:
    run = run_server("--help")

    assert run.returncode == 0
    assert run.stderr == ""
    text = " ".join(run.stdout.split())
    for flag, default in (
        ("--host", "127.0.0.1"),
        ("--port", "12345"),
        ("--max-clients", "1000"),
        ("--rate", "100"),
        ("--quiet", "False"),
    ):
        explained = text.rpartition(f" {flag} ")[2]
        assert re.match(rf"[^()]+\(default: {re.escape(default)}\)", explained), flag


def test_the_server_listens_on_an_ipv6_address(start_server: StartServer) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    chat = start_server("--host", "::1")

    assert re.fullmatch(r"\[::1\]:\d+", chat.address)
    alex, bob = chat.members("Alex", "Bob")
    assert_next(alex, bob)
    assert chat.output.line() == f"New connection from [::1]:{alex.port}"


def test_the_server_listens_on_a_name(start_server: StartServer) -> None:
    chat = start_server("--host", "localhost")

    alex, bob = chat.members("Alex", "Bob")

    assert_next(alex, bob)
