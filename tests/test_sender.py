"""The sender alone, on sockets that take what they like, against a model of the log.

Whatever happens while a round is under way happens inside a send: somebody says
something, comes or goes, a socket takes only a part, or is broken.  What each member
got must be what the one order of all that was appended says.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pytest

import server
from server import ChatServer

SEEDS = 300
STEPS = 60  # for each of them


class Socket:
    """Stands for a client's socket, and knows what it should have got."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage = stage
        self.got = b""
        self.expected = b""
        self.client = server._Client(self, name)  # type: ignore[arg-type]
        self.client.name = name
        self.client.send = self.send  # type: ignore[assignment]
        self.there = False  # as the log has it
        self.failed = False  # as if reset by its peer
        self.broken = False  # shut down by the server

    def send(self, data: bytes | memoryview, _flags: int) -> int:
        self.stage.during_a_send()
        takes = self.stage.takes(self, len(data))
        self.got += bytes(data[:takes])
        self.stage.sends.append((self, bytes(data[:takes])))
        return takes

    def shutdown(self, _how: int) -> None:
        self.broken = True


class Writable:
    """Stands for the selector of the slow readers."""

    def __init__(self) -> None:
        self.clients: dict[Any, Any] = {}

    def register(self, socket: Socket, _events: int, client: Any) -> None:
        assert socket not in self.clients
        self.clients[socket] = client

    def unregister(self, socket: Socket) -> None:
        del self.clients[socket]

    def wake(self) -> None: ...

    def close(self) -> None: ...


class Stage:
    """A server without threads, and what was appended to its log, in order."""

    def __init__(self, chat: ChatServer) -> None:
        self.chat = chat
        self.writable = Writable()
        chat._writable.close()
        chat._writable = self.writable  # type: ignore[assignment]
        self.sockets: list[Socket] = []
        self.sends: list[tuple[Socket, bytes]] = []
        self.during_a_send: Callable[[], None] = lambda: None
        self.takes: Callable[[Socket, int], int] = lambda _, size: size

    def append(
        self, socket: Socket | None, to_others: str, to_self: str, move: str
    ) -> None:
        if socket:
            socket.there |= move == "JOIN"
        for other in self.sockets:
            if other.there:
                seen = to_self if other is socket else to_others
                other.expected += seen.encode()
        if socket:
            socket.there &= move != "LEAVE"
        entry = server._Entry(
            socket.client if socket else None,
            to_others.encode(),
            to_self.encode(),
            server._Move[move],
        )
        with self.chat._lock:
            self.chat._append(entry)

    def join(self, name: str) -> Socket:
        socket = Socket(self, name)
        self.sockets.append(socket)
        self.append(socket, f"* {name} in\n", f"* hello {name}\n", "JOIN")
        return socket

    def say(self, socket: Socket, text: str, reply: str = "") -> None:
        self.append(
            socket, f"{socket.client.name}: {text}\n" * bool(text), reply, "NONE"
        )

    def leave(self, socket: Socket) -> None:
        self.append(socket, f"* {socket.client.name} out\n", "", "LEAVE")

    def play_round(self, *, may_grow: bool = True) -> None:
        if entries := self.chat._take_log():
            self.chat._send_round(entries, may_grow=may_grow)

    def finish(self) -> None:
        """Send all that waits, to sockets that take it."""
        self.during_a_send = lambda: None
        self.takes = lambda _, size: size
        while self.chat._log or self.writable.clients:
            self.play_round()
            for client in list(self.writable.clients.values()):
                self.chat._flush(client)


@pytest.fixture
def stage() -> Iterator[Stage]:
    chat = ChatServer(port=0)
    yield Stage(chat)
    chat._listener.close()
    chat._arrivals.close()


def play(stage: Stage, seed: int) -> None:
    """Let things happen at random, within sends and between rounds."""
    chance = random.Random(seed)
    often = chance.choice([0.05, 0.3])
    trouble = chance.choice([0.0, 0.02, 0.2])
    steps = iter(range(STEPS))

    def something_happens() -> None:
        if (step := next(steps, None)) is None:
            return
        here = [socket for socket in stage.sockets if socket.there]
        what = chance.random()
        if not here or what < 0.1:
            stage.join(f"n{step}")
        elif what < 0.15:
            stage.leave(chance.choice(here))
        elif what < 0.25:
            stage.say(chance.choice(here), "", f"! no {step}\n")
        elif what < 0.35:
            stage.say(chance.choice(here), f"m{step}", f"! no {step}\n")
        else:
            stage.say(chance.choice(here), f"m{step}" * chance.choice([1, 1, 1, 2000]))

    def during_a_send() -> None:
        if chance.random() < often:
            something_happens()

    def takes(socket: Socket, size: int) -> int:
        if socket.broken:
            raise BrokenPipeError(errno.EPIPE, "broken pipe")
        if chance.random() < trouble:
            if chance.random() < 0.1:
                socket.failed = True
                raise ConnectionResetError(errno.ECONNRESET, "reset")
            if chance.random() < 0.5:
                raise BlockingIOError
            return chance.randrange(size + 1)
        return size

    stage.during_a_send, stage.takes = during_a_send, takes
    for _ in range(STEPS):
        something_happens()
        stage.play_round(may_grow=chance.random() < 0.9)
        for client in list(stage.writable.clients.values()):
            if client in stage.chat._slow_readers and chance.random() < 0.5:
                stage.chat._flush(client)
    stage.finish()
    stage.join("last one")
    stage.finish()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_everybody_gets_what_the_log_says_whatever_happens_in_a_round(
    stage: Stage, seed: int
) -> None:
    play(stage, seed)

    for socket in stage.sockets:
        if socket.failed:
            assert socket.client.broken == "reset"
            assert socket.expected.startswith(socket.got)
        else:
            assert socket.got == socket.expected
    chat = stage.chat
    assert chat._members == {
        s.client for s in stage.sockets if s.there and not s.broken
    }
    assert not chat._slow_readers
    assert not chat._last_link
    assert all(not s.client.cut_bytes and not s.client.link for s in stage.sockets)


def crowd(stage: Stage, size: int) -> list[Socket]:
    """Let so many join, and forget what was sent to them for that."""
    members = [stage.join(f"n{i}") for i in range(size)]
    stage.play_round()
    stage.sends.clear()
    stage.chat._next_round = 0.0  # no pause after the joins
    return members


def notice_in_each_send(stage: Stage, texts: Iterable[str]) -> None:
    left = iter(texts)

    def send_one() -> None:
        for text in islice(left, 1):
            stage.append(None, f"* {text}\n", "", "NONE")

    stage.during_a_send = send_one


def lines_of_each_send(stage: Stage) -> list[int]:
    return [data.count(b"\n") for _, data in stage.sends]


def test_what_is_said_in_a_round_goes_to_the_next_member_at_once(stage: Stage) -> None:
    crowd(stage, 5)
    stage.append(None, "* one\n", "", "NONE")
    notice_in_each_send(stage, ["two"])

    stage.play_round()

    # The first one has had its turn, and gets another one.
    assert lines_of_each_send(stage) == [1, 2, 2, 2, 2, 1]


def test_the_rounds_of_the_broadcaster_grow(stage: Stage) -> None:
    crowd(stage, 5)
    stage.append(None, "* one\n", "", "NONE")
    notice_in_each_send(stage, ["two"])

    stage.chat._send_all()

    assert lines_of_each_send(stage) == [1, 2, 2, 2, 2, 1]


def test_the_round_of_a_handler_does_not_grow(stage: Stage) -> None:
    crowd(stage, 5)
    stage.append(None, "* one\n", "", "NONE")
    notice_in_each_send(stage, ["two"])

    stage.play_round(may_grow=False)

    assert lines_of_each_send(stage) == [1, 1, 1, 1, 1]
    assert stage.chat._log


@pytest.mark.parametrize(("more", "turns_between"), [(-1, 3), (0, 3), (1, 4)])
def test_a_round_grows_so_often_while_each_member_has_one_turn(
    stage: Stage, more: int, turns_between: int
) -> None:
    members = 3 * server.GROWTHS_PER_ROUND + more
    crowd(stage, members)
    stage.append(None, "* 0\n", "", "NONE")
    notice_in_each_send(stage, map(str, range(1, members)))

    stage.play_round()

    assert lines_of_each_send(stage)[:members] == [
        1 + turns_between * (turn // turns_between) for turn in range(members)
    ]


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_round_grows_while_less_than_so_many_bytes_are_under_way(
    stage: Stage, more: int
) -> None:
    crowd(stage, 5)
    text = "x" * (server.MAX_GROWING_BYTES + more - len("* \n"))
    stage.append(None, f"* {text}\n", "", "NONE")
    notice_in_each_send(stage, ["two"])

    stage.play_round()

    grown = more < 0
    assert lines_of_each_send(stage) == ([1, 2, 2, 2, 2, 1] if grown else [1] * 5)
    assert bool(stage.chat._log) is not grown


def test_a_reply_is_sent_to_nobody_else(stage: Stage) -> None:
    author, *_ = crowd(stage, 5)
    stage.say(author, "", "! no\n")

    stage.play_round()

    assert stage.sends == [(author, b"! no\n")]


def test_a_reply_that_joins_a_round_is_sent_to_nobody_else(stage: Stage) -> None:
    author, *others = crowd(stage, 5)
    stage.append(None, "* one\n", "", "NONE")
    refusals = iter(["! no\n"])
    stage.during_a_send = lambda: stage.say(author, "", next(refusals, ""))

    stage.play_round()

    assert all(data for _, data in stage.sends)
    assert author.got.endswith(b"* one\n! no\n")
    assert sum(socket in others for socket, _ in stage.sends) == len(others)
