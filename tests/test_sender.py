"""The sender alone, on sockets that take what they like, against a model of the log.

Whatever happens while a round is under way happens inside a send: somebody says
something, comes or goes, a socket takes only a part, or is broken.  What each member
got must be what the one order of all that was appended says.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import server
from server import ChatServer

SEEDS = 300
STEPS = 60  # for each of them


class Socket:
    """Stands for a client's socket; its own line and the others' tell of a client."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage = stage
        self.got = b""
        self.expected = b""
        self.client = server._Client(self, name)  # type: ignore[arg-type]
        self.client.name = name
        self.client.send = self.send  # type: ignore[assignment]
        self.there = False  # as the log has it
        self.failed = False
        self.broken = False

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

    def append(self, socket: Socket, to_others: str, to_self: str, move: str) -> None:
        socket.there |= move == "JOIN"
        for other in self.sockets:
            if other.there:
                seen = to_self if other is socket else to_others
                other.expected += seen.encode()
        socket.there &= move != "LEAVE"
        entry = server._Entry(
            socket.client, to_others.encode(), to_self.encode(), server._Move[move]
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


@pytest.fixture
def members(stage: Stage) -> list[Socket]:
    """Return more members than batches may be under way."""
    members = [stage.join(f"n{i}") for i in range(server.MAX_BATCHES + 3)]
    stage.play_round()
    stage.sends.clear()
    return members


def say_one_in_each_send(stage: Stage, author: Socket, texts: list[str]) -> None:
    left = iter(texts)

    def say_one() -> None:
        if text := next(left, ""):
            stage.say(author, text)

    stage.during_a_send = say_one


def test_what_is_said_in_a_round_goes_to_the_next_member_at_once(
    stage: Stage, members: list[Socket]
) -> None:
    author, *readers = members
    stage.say(author, "one")
    say_one_in_each_send(stage, author, ["two"])

    stage.play_round()

    assert all(reader.got.endswith(b"n0: one\nn0: two\n") for reader in readers)
    first_sends = [data for socket, data in stage.sends if socket is not author]
    assert first_sends.count(b"n0: one\nn0: two\n") >= len(readers) - 1


def test_the_rounds_of_the_broadcaster_grow(
    stage: Stage, members: list[Socket]
) -> None:
    author, *readers = members
    stage.say(author, "one")
    say_one_in_each_send(stage, author, ["two"])
    stage.chat._next_round = 0.0  # no pause after the joins

    stage.chat._send_all()

    assert len(stage.sends) <= len(members) + 2
    assert all(reader.got.endswith(b"n0: one\nn0: two\n") for reader in readers)


def test_a_reply_is_sent_to_nobody_else(stage: Stage, members: list[Socket]) -> None:
    author = members[0]
    stage.say(author, "", "! no\n")

    stage.play_round()

    assert stage.sends == [(author, b"! no\n")]


def test_the_round_of_a_handler_does_not_grow(
    stage: Stage, members: list[Socket]
) -> None:
    author, *readers = members
    stage.say(author, "one")
    say_one_in_each_send(stage, author, ["two"])

    stage.play_round(may_grow=False)

    assert all(reader.got.endswith(b"n0: one\n") for reader in readers)
    assert stage.chat._log


@pytest.mark.parametrize("batches", [-1, 0, 1])
def test_so_many_batches_are_under_way_at_a_time(
    stage: Stage, members: list[Socket], batches: int
) -> None:
    author = members[0]
    said = server.MAX_BATCHES + batches
    stage.say(author, "0")
    say_one_in_each_send(stage, author, [str(i) for i in range(1, said)])

    stage.play_round()

    for turn, (socket, data) in enumerate(stage.sends[: len(members)]):
        under_way = min(turn + 1, said, server.MAX_BATCHES)
        assert data.count(b"\n") == (under_way if socket is not author else 0)
    assert not stage.chat._log
