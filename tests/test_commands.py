"""Commands: who is here, a word in private, help, and what a mistyped one does."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import Peer, Room, assert_next, left

import protocol

# --- /who ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["/who", "/WHO \t"])
def test_who_lists_all_to_the_asking_member_alone(room: Room, command: str) -> None:
    alex, zoe, bob = room.members("Alex", "zoé", "Bob")

    zoe.say(command)

    assert zoe.line() == "* 3 online: Alex, zoé, Bob"
    assert_next(alex, zoe, bob)


@pytest.mark.parametrize("online", [19, 20, 21, 41])
def test_who_names_at_most_twenty_in_a_line(room: Room, online: int) -> None:
    names = [f"p{number}" for number in range(online)]
    asker, *_ = [room.member(name) for name in names]
    asker.lines(online - 1)

    asker.say("/who")

    rows = [", ".join(names[i : i + 20]) for i in range(0, online, 20)]
    first, *others = asker.lines(len(rows))
    assert first == f"* {online} online: {rows[0]}"
    assert others == [f"* … {row}" for row in rows[1:]]


# --- /msg ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("/msg Bob psst", "psst"),
        ("/MSG  ＢＯＢ   psst", "psst"),
        ("/msg\tbob\ta\x1b[2J\u202e\tz 👍🏽", "a\ufffd[2J\ufffd    z 👍🏽"),
    ],
)
def test_a_private_message_reaches_one_member_alone(
    room: Room, command: str, text: str
) -> None:
    """Cleaned as every message is."""
    alex, bob, carol = room.members("Alex", "Bob", "Carol")

    alex.say(command)

    assert bob.line() == f"Alex (private): {text}"
    assert_next(carol, alex, bob)
    assert_next(bob, carol)


@pytest.mark.parametrize(
    "command",
    ["/msg", "/msg \t ", "/msg Bob", "/msg Bob ", "/msg Carol psst", "/msg a:b psst"],
)
def test_a_private_message_needs_a_text_and_a_member(room: Room, command: str) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.say(command)

    assert alex.line().startswith("! ")
    assert_next(alex, bob)
    assert_next(bob, alex)


@pytest.mark.parametrize("length", [4095, 4096, 4097])
def test_the_limit_of_a_private_message_counts_it_all(room: Room, length: int) -> None:
    alex, bob = room.members("Alex", "Bob")
    text = "x" * (length - len("/msg Bob "))

    alex.say(f"/msg Bob {text}")

    if length <= 4096:
        assert bob.line() == f"Alex (private): {text}"
    else:
        assert alex.line().startswith("! ")
    assert_next(alex, bob)


def test_what_two_say_to_each_other_and_to_all_keeps_order(narrow_room: Room) -> None:
    alex, bob, carol = narrow_room.members("Alex", "Bob", "Carol")

    def speak(speaker: Peer, to: str) -> None:
        speaker.send("".join(f"{i}\n/msg {to} {i}\n" for i in range(500)))

    with ThreadPoolExecutor(3) as pool:
        pool.submit(speak, alex, "Bob")
        pool.submit(speak, bob, "Alex")
        pool.submit(carol.send, "flood\n" * 2500)
        for reader, name in ((alex, "Bob"), (bob, "Alex")):
            heard = [ln for ln in reader.lines(3500) if not ln.startswith("Carol: ")]
            assert heard == [
                f"{name}{kind}: {i}" for i in range(500) for kind in ("", " (private)")
            ]


def test_a_private_message_to_one_that_has_just_left_is_refused(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    alex, bob, carol = room.members("Alex", "Bob", "Carol")
    private_message = protocol.private_message

    def leave_at_the_last_moment(author: str, text: str) -> bytes:
        bob.say("q")
        assert carol.line() == left("Bob")
        return private_message(author, text)

    monkeypatch.setattr(protocol, "private_message", leave_at_the_last_moment)
    alex.say("/msg Bob psst")

    assert alex.line() == left("Bob")
    assert alex.line().startswith("! ")


# --- help, and lines that are no command --------------------------------------------


def test_help_gives_each_command_and_how_to_leave_one_notice(room: Room) -> None:
    alex = room.connect()
    assert "/help" in alex.join("Alex")
    bob = room.member("Bob", alex)

    alex.say("/HELP")
    alex.say("/msg Alex done")

    notices = alex.until("Alex (private): done")
    for notice, start in zip(
        notices, ["/who", "/msg NAME TEXT", "/help", "q"], strict=True
    ):
        assert re.match(rf"\* {start}\b", notice)
    assert_next(alex, bob)


@pytest.mark.parametrize("command", ["/mgs Bob secret", "/", "/ who", "/q", "/whois"])
def test_an_unknown_command_tells_the_room_nothing(room: Room, command: str) -> None:
    alex, bob = room.members("Alex", "Bob")

    alex.say(command)

    assert re.match(r"! .*/help\b", alex.line())
    assert_next(alex, bob)
    assert_next(bob, alex)
