"""Joining: the name and its answer, who is told, and who is turned away."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from helpers import (
    Peer,
    Room,
    StartRoom,
    StartServer,
    assert_next,
    joined,
    left,
    wait_until,
)

import server

# --- the name and its answer --------------------------------------------------------


def test_a_name_is_answered_with_one_notice(room: Room) -> None:
    (bob,) = room.members("Bob")
    alex = room.connect()

    alex.say("Alex")

    assert alex.line().startswith("* ")
    assert bob.line() == joined("Alex")
    assert_next(bob, alex)


def test_the_welcome_names_those_who_are_online(room: Room) -> None:
    anna, _ = room.members("Anna", "Bert")
    room.member("Carol").close()
    assert anna.lines(2) == [joined("Carol"), left("Carol")]

    words = re.findall(r"\w+", room.connect().join("Dora"))

    assert {"Anna", "Bert"} <= {*words}
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


# --- refused names ------------------------------------------------------------------


@pytest.mark.parametrize("line", [b"bob", b"a b", b"server", b"\xff", b"x" * 5000])
def test_after_a_refused_name_another_one_may_be_sent(room: Room, line: bytes) -> None:
    (bob,) = room.members("Bob")
    alex = room.connect()

    alex.send(line + b"\n")

    assert alex.line().startswith("! ")
    alex.join("Alex")
    assert bob.line() == joined("Alex")


@pytest.mark.parametrize("refused", [3, 4])
def test_up_to_the_fifth_name_may_be_the_good_one(room: Room, refused: int) -> None:
    alex = room.connect()

    alex.send("a b\n" * refused + "\n" + "Alex\n")

    answers = alex.lines(refused + 1)
    assert [line[0] for line in answers] == ["!"] * refused + ["*"]
    assert "tries" not in "".join(answers)


def test_after_five_refused_names_the_connection_is_closed(room: Room) -> None:
    (bob,) = room.members("Bob")
    alex = room.connect()

    alex.send("a b\n" * 5 + "Alex\n" * 100)

    answers = alex.rest()
    assert [line[0] for line in answers] == ["!"] * 5
    assert answers[4] == f"{answers[3]} (5 of 5 tries on this connection)"
    carol = room.member("Carol")
    assert bob.line() == joined("Carol")
    assert_next(carol, bob)


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

    assert (
        other.line()
        == f"! The name {'ALEX' if name == 'ＡＬＥＸ' else name.strip()} is taken."
    )


# --- connections that come to nothing -----------------------------------------------


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
    room.members("Alex")
    threads = threading.active_count()
    began = time.monotonic()
    carol = room.connect()
    stop = threading.Event()

    def keep_sending() -> None:
        with suppress(OSError):  # closed
            while not stop.is_set():
                carol.send(data)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(keep_sending)
        try:
            reason = carol.gather(lambda line: "join" in line)
        finally:
            stop.set()
            with suppress(OSError):  # it has been closed by now
                carol.half_close()

    assert reason.startswith("! ")
    assert time.monotonic() - began < 2
    wait_until(lambda: threading.active_count() == threads)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("SO_KEEPALIVE", 1), ("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15)),
        *(("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 120_000)),
    ],
)
def test_peers_that_vanish_are_found(room: Room, option: str, value: int) -> None:
    if not hasattr(socket, option):
        pytest.skip(f"no {option} here")
    room.members("Alex")

    ours = room.server.clients["Alex"]

    level = socket.SOL_SOCKET if option[:2] == "SO" else socket.IPPROTO_TCP
    assert ours.getsockopt(level, getattr(socket, option)) == value


def test_the_times_are_those_that_are_promised() -> None:
    assert (server.JOIN_SECONDS, server.GONE_SECONDS) == (120, 10)


# --- a full room --------------------------------------------------------------------


def test_members_up_to_the_limit_join_and_the_next_one_is_refused(
    start_room: StartRoom,
) -> None:
    room = start_room(max_clients=3)
    alex, bob, _ = room.members("Alex", "Bob", "Carol")

    (refusal,) = room.connect().rest()

    assert re.fullmatch("! .*full.*", refusal)
    assert_next(alex, bob)
    bob.close()
    assert alex.line() == left("Bob")
    room.member("Dora")


def test_who_is_refused_may_have_sent_something(start_room: StartRoom) -> None:
    room = start_room(max_clients=1)
    room.members("Alex")
    bob = room.connect()

    bob.send("Bob\n" + "hi\n" * 1000)

    (refusal,) = bob.rest()  # raises if the connection is reset
    assert "full" in refusal


def test_those_turned_away_cost_no_thread(
    start_room: StartRoom, open_file_limit: Callable[[int], None]
) -> None:
    open_file_limit(1000)
    room = start_room(max_clients=2)
    alex, bob = room.members("Alex", "Bob")
    before = threading.active_count()

    crowd = [room.connect() for _ in range(400)]
    refusals = [peer.rest() for peer in crowd]

    assert threading.active_count() == before  # none has closed its side yet
    for (refusal,) in refusals:
        assert re.fullmatch("! .*full.*", refusal)
    assert_next(alex, bob)


def test_those_who_have_waited_longest_make_room_in_a_full_chat(
    start_room: StartRoom,
) -> None:
    room = start_room(max_clients=20)

    silent = [room.connect() for _ in range(50)]

    for peer in silent[:30]:
        (reason,) = peer.rest()
        assert reason.startswith("! ")
    for number, peer in enumerate(silent[30:]):
        peer.join(f"member{number}")


def test_the_server_raises_its_own_limit_of_open_files(
    start_server: StartServer,
) -> None:
    chat = start_server("--max-clients", "100", limits="ulimit -S -n 32")

    for i in range(100):
        chat.member(f"member{i}")

    assert "full" in chat.connect().line()


# --- the name of one that is gone ---------------------------------------------------


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


def reset(peer: Peer, speaker: Peer) -> None:
    peer.reset()


def close_and_answer_with_a_reset(peer: Peer, speaker: Peer) -> None:
    peer.close()
    speaker.say("is anybody there?")


@pytest.mark.parametrize("end", [reset, close_and_answer_with_a_reset])
def test_the_flood_of_one_that_is_gone_keeps_neither_its_name_nor_its_place(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch, end: Callable[..., None]
) -> None:
    monkeypatch.setattr(server, "GONE_SECONDS", 0.2)
    room = start_room(max_clients=2, lines_per_second=1)
    (bob,) = room.members("Bob")
    ghost = room.member("Ghost")
    ghost.send("x\n" * 10_000)  # at a line a second
    bob.gather("Ghost: x".__eq__)

    end(ghost, bob)

    bob.gather(left("Ghost").__eq__)
    room.member("Ghost")


def test_the_flood_of_one_that_is_gone_is_read_for_that_long(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "GONE_SECONDS", 0.5)
    room = start_room(lines_per_second=10)
    (bob,) = room.members("Bob")
    ghost = room.member("Ghost")
    ghost.send("x\n" * 1000)
    bob.gather("Ghost: x".__eq__)

    ghost.reset()

    began = time.monotonic()
    bob.gather(left("Ghost").__eq__)
    assert time.monotonic() - began > 0.4


def test_one_that_half_closed_is_not_gone_and_is_read_to_its_end(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "GONE_SECONDS", 0.01)
    room = start_room(lines_per_second=10)
    (bob,) = room.members("Bob")
    alex = room.connect()

    alex.send("Alex\n" + "x\n" * 105)
    alex.half_close()

    assert bob.until(left("Alex")) == [joined("Alex"), *["Alex: x"] * 105]
