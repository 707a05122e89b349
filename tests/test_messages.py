"""Messages: which lines arrive, where, in what order, and how fast they may come."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import (
    SMALL_BUFFER,
    Peer,
    Room,
    StartRoom,
    assert_next,
    joined,
    left,
    open_descriptors,
    wait_until,
)

import server

# --- lines, good and bad ------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "end"), [(4095, "\n"), (4096, "\n"), (4096, "\r\n")]
)
def test_a_message_up_to_the_limit_arrives(room: Room, length: int, end: str) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.send("x" * length + end)

    assert bob.line() == "Alex: " + "x" * length


@pytest.mark.parametrize(
    "line",
    [b"x" * 4097, b"x" * 100_000, b"fin\xc3", b"\xed\xa0\x80"],
    ids=lambda line: repr(line)[:9],
)
def test_a_refused_line_leaves_its_neighbours_intact(room: Room, line: bytes) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.send(b"before\r\n" + line + b"\r\nafter\r\n")

    assert bob.lines(2) == ["Alex: before", "Alex: after"]
    assert alex.line().startswith("! ")
    assert_next(alex, bob)
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


@pytest.mark.parametrize(
    "text",
    [
        "  👩‍👩‍👧 ❤️ e\u0301 می\u200cخواهم a\u3000b \ufeff\U0010ffff: * ! ",
        *("* Bob has left the chat.", "! no", "Bob: hi", " q", " /who"),
        *("/who", "//", "/"),  # said with one slash more
    ],
)
def test_everything_else_arrives_byte_for_byte(room: Room, text: str) -> None:
    """Also what looks like another kind of line."""
    alex, bob = room.members("Alex", "Bob")

    alex.say(re.sub("^/", "//", text))

    assert bob.line() == f"Alex: {text}"
    assert_next(bob, alex)


def test_a_last_line_without_newline_is_not_passed_on(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.send("finished\nunfinished")
    alex.close()

    assert bob.lines(2) == ["Alex: finished", left("Alex")]


# --- once, whole, in one order ------------------------------------------------------


def test_a_message_goes_to_every_member_but_its_sender(room: Room) -> None:
    alex, bob, carol = room.members("Alex", "Bob", "Carol")

    alex.say("hi")
    assert [bob.line(), carol.line()] == ["Alex: hi"] * 2

    assert_next(bob, alex, carol)
    assert_next(carol, bob)


def test_all_members_and_the_terminal_see_one_order(start_room: StartRoom) -> None:
    """Of what many say at once, and of guests who come and go meanwhile."""
    told: list[str] = []
    room = start_room(
        lines_per_second=0, tell=lambda text: told.extend(text.split("\n"))
    )
    watcher, *speakers = room.members("Watcher", *[f"speaker{i}" for i in range(8)])

    def speak(speaker: Peer) -> None:
        for i in range(50):
            speaker.say(f"line {i}")
            if i % 10 == 0:
                room.member(f"guest-{speaker.name}-{i}").half_close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(speak, speakers))

    order = watcher.lines(8 * (50 + 5 * 2))
    for speaker in speakers:
        own = [f"{speaker.name}: line {i}" for i in range(50)]
        assert [line for line in order if line in own] == own
        others = [line for line in order if line not in own]
        assert speaker.lines(len(others)) == others
    shown = [
        re.sub(r"Removing user: (\S+) from clients", r"* \1 has left the chat.", line)
        for line in told
        if not line.startswith("New connection")
    ]
    shown = [re.sub("^Received message from ", "", line) for line in shown]
    shown = [re.sub("^User ", "* ", line) for line in shown]
    assert shown[9 : 9 + len(order)] == order


def test_what_a_socket_takes_in_pieces_arrives_whole_once(narrow_room: Room) -> None:
    """All but one do not read for a while, and then go on from different places."""
    watcher = narrow_room.member("Watcher")
    sizes = {f"listener{i}": (i + 1) * SMALL_BUFFER for i in range(6)}
    sizes |= {f"s{i}": SMALL_BUFFER for i in range(2)}
    slow: list[Peer] = []
    for name, size in sizes.items():
        slow.append(narrow_room.member(name, watcher, *slow, receive_buffer=size))
    order: list[str] = []

    for i in range(60):
        for speaker in slow[-2:]:
            speaker.say(f"{i:02} " + "é" * (30 * i))
        order += watcher.lines(2)

    for reader in slow:
        others = [line for line in order if not line.startswith(f"{reader.name}:")]
        assert reader.lines(len(others)) == others
    assert_next(watcher, *slow)


# --- what was sent before leaving ---------------------------------------------------


@pytest.mark.parametrize("leave", ["q", "close", "half_close"])
def test_what_was_sent_before_leaving_is_delivered(
    narrow_room: Room, leave: str
) -> None:
    alex, bob = narrow_room.members("Alex", "Bob")

    alex.send("".join(f"line {i}\n" for i in range(2000)))
    if leave == "q":
        alex.say("q")
    else:
        getattr(alex, leave)()

    assert bob.until(left("Alex")) == [f"Alex: line {i}" for i in range(2000)]


def test_what_was_sent_is_delivered_though_writing_fails(start_room: StartRoom) -> None:
    room = start_room(lines_per_second=20)
    bob, carol = room.members("Bob", "Carol")
    alex = room.member("Alex", bob, carol)
    alex.send("".join(f"line {i}\n" for i in range(205)))  # one is for the name
    alex.close()
    heard = bob.lines(1)

    # The first is answered with a reset, so that writing the second one fails.
    for text in ("who is there?", "anybody?"):
        bob.say(text)
        carol.gather(f"Bob: {text}".__eq__)

    heard += bob.until(left("Alex"))
    assert heard == [f"Alex: line {i}" for i in range(205)]


def test_who_leaves_still_receives_what_was_said_before(narrow_room: Room) -> None:
    """Also what its socket could not take yet."""
    bob, carol = narrow_room.members("Bob", "Carol")
    alex = narrow_room.slow_member(bob, carol)
    said = [f"Bob: {i:03} " + "x" * 1000 for i in range(100)]
    bob.send("".join(line.removeprefix("Bob: ") + "\n" for line in said))
    assert carol.lines(100) == said

    alex.say("q")

    assert carol.line() == left("Slow")
    assert alex.rest() == said


def test_what_is_sent_after_q_costs_nobody_the_last_lines(narrow_room: Room) -> None:
    """A close with input unread would reset the connection."""
    bob, carol = narrow_room.members("Bob", "Carol")
    alex = narrow_room.slow_member(bob, carol)
    said = ["Bob: " + "x" * 1000] * 10  # of which the system has sent the half
    bob.send(f"{'x' * 1000}\n" * 10)
    assert carol.lines(10) == said

    alex.send("q\n" + "too late\n" * 1000)
    assert carol.line() == left("Slow")
    before = open_descriptors()
    passer_by = narrow_room.connect()
    passer_by.say("q")
    assert passer_by.rest() == []
    passer_by.close()
    wait_until(lambda: open_descriptors() <= before)  # so Alex's could be closed too

    assert alex.rest() == said


def test_who_leaves_without_reading_is_not_waited_for(
    narrow_room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LEAVE_SECONDS", 0.1)  # instead of 5
    alex, bob = narrow_room.members("Alex", "Bob")
    slow = narrow_room.slow_member(alex, bob)
    before = open_descriptors()
    alex.send(f"{'x' * 1000}\n" * 50)
    bob.lines(50)

    slow.say("q")

    assert bob.line() == left("Slow")
    wait_until(lambda: len(open_descriptors()) == len(before) - 1)


# --- the rate -----------------------------------------------------------------------


@pytest.mark.parametrize("lines", [9, 10])
def test_a_burst_up_to_ten_seconds_worth_arrives_at_once(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    monkeypatch.setattr(server, "BURST_SECONDS", 1000)  # instead of 10
    room = start_room(lines_per_second=0.01)  # the eleventh comes after 100 s
    (bob,) = room.members("Bob")

    room.connect().send("Alex\n" + "hi\n" * (lines - 1))  # a name is a line too

    assert bob.lines(lines) == [joined("Alex")] + ["Alex: hi"] * (lines - 1)


def test_a_line_above_the_burst_is_read_later_not_lost(start_room: StartRoom) -> None:
    """Refused lines, blank ones and commands count."""
    room = start_room(lines_per_second=2)
    (bob,) = room.members("Bob")
    began = time.monotonic()

    kinds = b"hi\n\n\xff\n/x\n/msg Bob hi\n"
    room.connect().send(b"Alex\n" + kinds * 3 + b"\n" * 4 + b"above\n")

    assert bob.gather("Alex: above".__eq__)
    assert time.monotonic() - began >= 0.5


def test_nobody_is_slower_for_one_who_sends_too_fast(start_room: StartRoom) -> None:
    room = start_room(lines_per_second=1)
    alex, bob, carol = room.members("Alex", "Bob", "Carol")
    alex.send("hi\n" * 1000)
    assert bob.lines(9) == ["Alex: hi"] * 9

    carol.say("hello")

    assert len(bob.until("Carol: hello")) < 500
