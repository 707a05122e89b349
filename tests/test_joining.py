"""Joining: the name and its answer, who is told, and who is turned away."""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest
from helpers import (
    Room,
    StartRoom,
    StartServer,
    assert_next,
    joined,
    left,
)

import server

# --- the name and its answer --------------------------------------------------------


@pytest.mark.parametrize("online", [0, 19, 20, 21])
def test_the_welcome_names_twenty_and_how_many_more(room: Room, online: int) -> None:
    """Of those who are online: somebody has left before."""
    gone = room.member("p99")
    gone.say("q")
    assert gone.rest() == []
    for number in range(online):
        room.member(f"p{number}")

    alex = room.connect()
    welcome = alex.join("Alex")

    assert re.findall(r"\bp\d+\b", welcome) == [f"p{i}" for i in range(min(online, 20))]
    assert re.findall(r"(\d+) more\b", welcome) == (["1"] if online > 20 else [])
    assert_next(room.member("Bob", alex), alex)


def test_blank_lines_name_and_messages_may_come_in_one_piece(room: Room) -> None:
    """printf 'bot\\nhi\\n' | nc -N 127.0.0.1 12345: it is heard and answered."""
    (bob,) = room.members("Bob")
    bot = room.connect()

    bot.send("\n \r\n\t\nbot\r\none\r\ntwo\r\n")
    bot.half_close()

    assert bob.lines(4) == [joined("bot"), "bot: one", "bot: two", left("bot")]
    (welcome,) = bot.rest()
    assert welcome.startswith("* ")


@pytest.mark.parametrize("line", ["q", "Q"])
def test_q_at_the_name_closes_without_a_word(room: Room, line: str) -> None:
    alex, bob = room.members("Alex", "Bob")
    carol = room.connect()

    carol.say(line)

    assert carol.rest() == []
    assert_next(alex, bob)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((b"bob", "bob is taken"), (b" BOB\t", "BOB is taken")),
        *(("ＢＯＢ".encode(), "BOB is taken"), (b"server", "reserved")),
        *((b"a b", "letters"), (b"/who", "letters"), (b"//who", "letters")),
        *((b"\xff", "UTF-8"), (b"x" * 5000, "longer")),
    ],
    ids=lambda value: str(value)[:9],
)
def test_after_a_refused_name_another_one_may_be_sent(
    room: Room, name: bytes, reason: str
) -> None:
    """Until then its client receives nothing of the chat, and has no commands."""
    bob, carol = room.members("Bob", "Carol")
    alex = room.connect()

    alex.send(name + b"\n")

    assert re.match(f"! .*{reason}", alex.line())
    assert_next(carol, bob)
    alex.join("Alex")  # fails if any line comes before the welcome
    assert bob.line() == joined("Alex")
    assert_next(bob, alex)


@pytest.mark.parametrize(("refused", "more"), [(4, 1), (5, 1), (5, 0)])
def test_after_five_refused_names_the_connection_is_closed(
    room: Room, refused: int, more: int
) -> None:
    """Whether more comes or not; and the fifth name may be the good one."""
    (bob,) = room.members("Bob")
    alex = room.connect()

    alex.send("a b\n" * refused + ("\nAlex\nq\n" + "Alex\n" * 100) * more)

    answers = alex.rest()
    assert "".join(line[0] for line in answers) == "!" * refused + "*" * (5 - refused)
    told = [line for line in answers if "tries" in line]
    assert told == [f"{answers[3]} (5 of 5 tries on this connection)"] * (refused == 5)
    if refused == 4:
        assert bob.lines(2) == [joined("Alex"), left("Alex")]
    assert_next(room.member("Carol", bob), bob)


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


# --- connections that come to nothing -----------------------------------------------


def test_who_has_not_joined_in_time_is_told_so_and_closed(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it has said nothing, half a name, a bad one, or more than it may."""
    monkeypatch.setattr(server, "JOIN_SECONDS", 0.1)
    room = start_room(lines_per_second=1)
    alex, bob = room.members("Alex", "Bob")
    late = [room.connect() for _ in range(4)]

    for peer, said in zip(late, ("", "half a na", "a b\n", "\n" * 20_000), strict=True):
        peer.send(said)

    for peer in late:
        assert re.match("! .*not joined", peer.rest()[-1])
    assert_next(alex, bob)  # whose own time to join is over by now


def test_peers_that_vanish_are_found(room: Room) -> None:
    """By keep-alive, idle 60 s, then every 15 s, 4 times; and by the user timeout."""
    room.members("Alex")
    ours = room.server.clients["Alex"]

    for option, value in (
        *(("SO_KEEPALIVE", 1), ("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15)),
        *(("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 120_000)),
    ):
        if number := getattr(socket, option, None):  # the system has it
            level = socket.SOL_SOCKET if option[:2] == "SO" else socket.IPPROTO_TCP
            assert ours.getsockopt(level, number) == value


def test_the_limits_that_other_tests_make_smaller_are_as_promised() -> None:
    assert (server.JOIN_SECONDS, server.GONE_SECONDS) == (120, 10)
    assert (server.MAX_UNSENT_BYTES, server.MAX_UNWRITTEN) == (4 << 20, 10_000)
    assert server.BURST_SECONDS == 10


# --- a full room --------------------------------------------------------------------


def test_members_join_up_to_the_limit_and_no_further(start_room: StartRoom) -> None:
    room = start_room(max_clients=3)
    alex, bob, _ = room.members("Alex", "Bob", "Carol")
    refused = room.connect()
    refused.send("Dora\n" + "hi\n" * 1000)

    (refusal,) = refused.rest()  # raises if the connection is reset

    assert re.fullmatch("! .*full.*", refusal)
    assert_next(alex, bob)
    for _ in range(10):  # and nothing of them is left
        bob.close()
        assert alex.line() == left("Bob")
        bob = room.member("Bob", alex)


def test_those_turned_away_cost_no_thread(start_room: StartRoom) -> None:
    room = start_room(max_clients=2)
    alex, bob = room.members("Alex", "Bob")
    before = threading.active_count()

    crowd = [room.connect() for _ in range(100)]
    refusals = [peer.rest() for peer in crowd]

    assert threading.active_count() == before  # none has closed its side yet
    assert all(re.fullmatch("! .*full.*", refusal) for (refusal,) in refusals)
    assert_next(alex, bob)


def test_who_has_waited_longest_makes_room_when_full(start_room: StartRoom) -> None:
    """As long as the handlers of at most so many again have still to end."""
    room = start_room(max_clients=10)

    silent = [room.connect() for _ in range(20)]

    for peer in silent[:10]:
        (reason,) = peer.rest()
        assert reason.startswith("! ")
    for number, peer in enumerate(silent[10:]):
        peer.join(f"member{number}")


def test_the_server_raises_its_limit_of_open_files(start_server: StartServer) -> None:
    chat = start_server("--max-clients", "50", limits="ulimit -S -n 32")

    for i in range(50):
        chat.member(f"member{i}")

    assert "full" in chat.connect().line()


# --- the name of one that is gone ---------------------------------------------------


def test_who_half_closed_is_read_to_its_end_and_keeps_its_name_until_then(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "GONE_SECONDS", 0.01)
    room = start_room(lines_per_second=10)
    (bob,) = room.members("Bob")
    alex, other = room.connect(), room.connect()
    alex.send("Alex\n" + "x\n" * 103)
    alex.half_close()
    assert bob.lines(2) == [joined("Alex"), "Alex: x"]

    other.say("Alex")

    assert other.line() == "! The name Alex is taken."
    assert bob.until(left("Alex")) == ["Alex: x"] * 102
    other.join("Alex")


def test_removing_a_client_again_spares_the_next_owner_of_its_name(room: Room) -> None:
    alex, bob, carol = room.members("Alex", "Bob", "Carol")
    room.server.remove_client(room.server.clients["Carol"])
    assert [alex.line(), bob.line()] == [left("Carol")] * 2
    again = room.member("Carol", alex, bob)

    carol.half_close()  # its handler removes it once more
    assert carol.rest() == []

    assert_next(again, alex, bob)
    assert_next(alex, bob, again)


@pytest.mark.parametrize("answered", [False, True])
def test_the_flood_of_one_that_is_gone_keeps_its_name_and_its_place_for_a_while(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """It is read for that long, and no longer."""
    monkeypatch.setattr(server, "GONE_SECONDS", 0.2)  # instead of 10
    room = start_room(max_clients=2, lines_per_second=1)
    (bob,) = room.members("Bob")
    ghost = room.member("Ghost")
    ghost.send("x\n" * 10_000)  # at a line a second
    bob.gather("Ghost: x".__eq__)
    began = time.monotonic()

    if answered:  # with a reset
        ghost.close()
        bob.say("is anybody there?")
    else:
        ghost.reset()

    bob.gather(left("Ghost").__eq__)
    assert time.monotonic() - began >= 0.2
    room.member("Ghost")
