"""Commands: who is here, a word in private, help, and what a mistyped one does."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from helpers import (
    MIB,
    SMALL_BUFFER,
    Peer,
    Room,
    StartRoom,
    StartServer,
    assert_next,
    joined,
    left,
    needs_proc,
)

import server

# --- /who ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["/who", "/WHO", "/Who \t"])
def test_who_lists_all_in_the_order_of_joining_to_the_asking_member_alone(
    room: Room, command: str
) -> None:
    alex, zoe, bob = room.members("Alex", "zoé", "Bob")

    zoe.say(command)

    assert zoe.line() == "* 3 online: Alex, zoé, Bob"
    assert_next(alex, zoe, bob)


@pytest.mark.parametrize("online", [1, 19, 20, 21, 40, 41])
def test_who_names_at_most_twenty_in_a_line(room: Room, online: int) -> None:
    names = [f"p{number}" for number in range(online)]
    asker, *_ = [room.member(name) for name in names]
    asker.lines(online - 1)

    asker.say("/who")

    rows = [", ".join(names[i : i + 20]) for i in range(0, online, 20)]
    first, *others = asker.lines(len(rows))
    assert first == f"* {online} online: {rows[0]}"
    assert others == [f"* … {row}" for row in rows[1:]]


def test_who_among_a_thousand_gives_short_lines_and_delays_nobody(
    start_room: StartRoom, open_file_limit: Callable[[int], None]
) -> None:
    open_file_limit(2200)
    room = start_room(max_clients=1010, lines_per_second=0)
    asker, alex, bob = room.members("Asker", "Alex", "Bob")
    names = [f"{number:04}" + "\U00020000" * 28 for number in range(997)]
    for name in names:
        room.connect().say(name)
    for peer in (asker, alex, bob):
        assert len(peer.lines(997)) == 997
    delays = []

    for i in range(20):
        asker.say("/who")
        said = time.monotonic()
        alex.say(f"{i}")
        assert bob.line() == f"Alex: {i}"
        delays.append(time.monotonic() - said)
        rows = [line for line in asker.lines(51) if line[0] == "*"]
        assert len(rows) == 50
        assert max(len(row.encode()) for row in rows) <= 4096
        assert len(re.findall(r"\b\d{4}\S", "".join(rows))) == 997

    assert statistics.median(delays) < 0.1


@needs_proc
def test_answers_that_are_not_read_are_bounded_and_delay_nobody(
    start_server: StartServer,
) -> None:
    chat = start_server("--rate", "0", "--quiet", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    rude = chat.member("Rude", receive_buffer=SMALL_BUFFER)
    assert [alex.line(), bob.line()] == [joined("Rude")] * 2
    before = chat.status_bytes("VmRSS")

    def flood() -> None:
        with suppress(ConnectionError):  # it is cut off
            while True:
                rude.send(b"/who\n" * 2000)

    with ThreadPoolExecutor(1) as pool:
        flooding = pool.submit(flood)
        read: list[str] = []
        while left("Rude") not in read:
            alex.say("hi")
            read += bob.until("Alex: hi")
        flooding.result()

    assert read == [left("Rude")]
    assert chat.status_bytes("VmHWM") - before < 16 * MIB


# --- /msg ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["/msg Bob psst", "/MSG bob psst", "/msg  ＢＯＢ   psst", "/msg\tBob\tpsst"],
)
def test_a_private_message_reaches_one_member_alone(room: Room, command: str) -> None:
    alex, bob, carol = room.members("Alex", "Bob", "Carol")

    alex.say(command)

    assert bob.line() == "Alex (private): psst"
    assert_next(carol, alex, bob)
    assert_next(bob, carol)


def test_a_private_message_to_oneself_arrives(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.say("/msg alex note to self")

    assert alex.line() == "Alex (private): note to self"
    assert_next(alex, bob)


@pytest.mark.parametrize(
    "command",
    [
        *("/msg", "/msg ", "/msg \t ", "/msg\t", "/msg Bob", "/msg Bob ", "/msg Bob\t"),
        *("/msg Carol psst", "/msg a:b psst", "/msg * psst"),
    ],
)
def test_a_private_message_without_text_or_to_nobody_is_refused(
    room: Room, command: str
) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.say(command)

    assert alex.line().startswith("! ")
    assert_next(alex, bob)
    assert_next(bob, alex)


@pytest.mark.parametrize(
    ("length", "good"), [(4095, True), (4096, True), (4097, False)]
)
def test_the_limit_of_a_private_message_counts_the_command(
    room: Room, length: int, good: bool
) -> None:
    alex, bob = room.members("Alex", "Bob")
    text = "x" * (length - len("/msg Bob "))

    alex.say(f"/msg Bob {text}")

    if good:
        assert bob.line() == f"Alex (private): {text}"
    else:
        assert alex.line().startswith("! ")
    assert_next(alex, bob)


def test_a_private_message_is_cleaned(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.say("/msg Bob a\x1b[2J\u202e\tz 👍🏽")

    assert bob.line() == "Alex (private): a\ufffd[2J\ufffd    z 👍🏽"


def test_what_two_say_to_each_other_and_to_the_room_keeps_its_order(
    start_room: StartRoom,
) -> None:
    room = start_room(lines_per_second=0)
    alex, bob, carol = room.members("Alex", "Bob", "Carol")

    def speak(speaker: Peer, to: str) -> None:
        speaker.send("".join(f"{i}\n/msg {to} {i}\n" for i in range(1000)))

    with ThreadPoolExecutor(3) as pool:
        pool.submit(speak, alex, "Bob")
        pool.submit(speak, bob, "Alex")
        pool.submit(carol.send, "flood\n" * 5000)
        for reader, name in ((alex, "Bob"), (bob, "Alex")):
            heard = [ln for ln in reader.lines(7000) if not ln.startswith("Carol: ")]
            assert heard == [
                f"{name}{kind}: {i}" for i in range(1000) for kind in ("", " (private)")
            ]


@pytest.mark.parametrize("leave", ["q\n", ""], ids=["q", "half-close"])
def test_a_private_message_to_one_that_leaves_is_delivered_or_refused(
    start_room: StartRoom, leave: str
) -> None:
    """Never both, never neither."""
    room = start_room(lines_per_second=0)
    (alex,) = room.members("Alex")

    for i in range(100):
        bob = room.member("Bob")
        bob.send(leave)
        if not leave:
            bob.half_close()
        alex.send(f"/msg Bob {i}\n" + "/msg Alex done\n")
        answers = alex.until("Alex (private): done")
        if left("Bob") not in answers:
            answers += alex.until(left("Bob"))

        delivered = bob.rest().count(f"Alex (private): {i}")
        assert delivered + sum(line[0] == "!" for line in answers) == 1


def test_private_messages_count_towards_what_may_wait_for_a_slow_reader(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_UNSENT_BYTES", 400_000)  # instead of 4 MiB
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    room.member("Slow", receive_buffer=SMALL_BUFFER)
    assert [alex.line(), bob.line()] == [joined("Slow")] * 2
    sent = 0

    while True:
        alex.send("/msg Slow " + "x" * 4000 + "\n/msg Alex next\n")
        sent += 4000
        if left("Slow") in alex.until("Alex (private): next"):
            break

    assert 380_000 < sent < 500_000
    assert bob.line() == left("Slow")
    assert_next(alex, bob)


@pytest.mark.parametrize("flags", [[], ["--quiet"]], ids=["", "quiet"])
def test_the_terminal_says_that_there_was_a_private_message_but_not_its_text(
    start_server: StartServer, flags: list[str]
) -> None:
    chat = start_server(*flags)
    alex, bob = chat.members("Alex", "Bob")
    assert len(chat.output.lines(4)) == 4

    alex.say("/msg bob secret")
    assert bob.line() == "Alex (private): secret"
    alex.close()

    if not flags:
        assert chat.output.line() == "Private message from Alex to Bob"
    assert chat.output.line() == "Removing user: Alex from clients"


# --- help, and lines that only look like commands -----------------------------------


def test_help_gives_each_command_and_how_to_leave_one_notice(room: Room) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.say("/help")
    alex.say("/msg Alex done")

    notices = alex.until("Alex (private): done")
    for notice, start in zip(
        notices, ["/who", "/msg NAME TEXT", "/help", "q"], strict=True
    ):
        assert re.match(rf"\* {start}\b", notice)
    assert_next(alex, bob)


def test_the_welcome_names_help(room: Room) -> None:
    assert "/help" in room.connect().join("Alex")


@pytest.mark.parametrize(
    "command",
    ["/mgs Bob secret", "/", "/ who", "/q", "/whois", "/register", "/history"],
)
def test_an_unknown_command_tells_the_room_nothing(room: Room, command: str) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.say(command)

    assert re.match(r"! .*/help\b", alex.line())
    assert_next(alex, bob)
    assert_next(bob, alex)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("//who", "/who"),
        ("///", "//"),
        ("//", "/"),
        (" /who", " /who"),
        ("a /who",) * 2,
    ],
)
def test_a_message_may_look_like_a_command(room: Room, line: str, text: str) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.say(line)

    assert bob.line() == f"Alex: {text}"


@pytest.mark.parametrize("command", ["/who", "/help", "/msg Bob hi", "//who", "/x"])
def test_who_has_not_joined_has_no_commands(room: Room, command: str) -> None:
    (bob,) = room.members("Bob")
    alex = room.connect()

    alex.say(command)

    assert alex.line().startswith("! ")
    alex.join("Alex")
    assert bob.line() == joined("Alex")


@pytest.mark.parametrize("command", ["/msg Bob hi", "/x"])
def test_commands_count_towards_the_rate(start_room: StartRoom, command: str) -> None:
    room = start_room(lines_per_second=2)
    (bob,) = room.members("Bob")
    began = time.monotonic()

    room.connect().send("Alex\n" + f"{command}\n" * 19 + "above\n")

    assert bob.gather("Alex: above".__eq__)
    assert 0.5 <= time.monotonic() - began < 5
