"""The server in bad company: bad networks, unlucky moments, ill will and want.

Whatever a test here does, the fixtures check that no thread or descriptor is left.
"""

from __future__ import annotations

import errno
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from helpers import (
    HANG_SECONDS,
    SMALL_BUFFER,
    Room,
    StartRoom,
    StartServer,
    assert_next,
    joined,
    left,
    needs_proc,
    open_descriptors,
    wait_until,
)
from proxy import Proxy

import server
from protocol import MAX_LINE_BYTES

StartProxy = Callable[..., Proxy]

# What must not reach anybody, by the words of the contract.
UNSAFE_CODES = {
    *range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0x061C, 0x200E, 0x200F,
    *range(0x202A, 0x202F), *range(0x2066, 0x206A),
}  # fmt: skip


@pytest.fixture
def start_proxy(start_room: StartRoom) -> Iterator[StartProxy]:
    """Start proxies; on leaving they are closed, before the servers are."""
    with ExitStack() as proxies:
        yield lambda room, **options: proxies.enter_context(
            closing(Proxy(room.address, **options))
        )


# --- faults: what a network does ----------------------------------------------------


@pytest.mark.parametrize(
    ("piece_bytes", "delay_seconds"), [(1, 0), (7, 0.0001)], ids=["bytes", "sevens"]
)
def test_messages_arrive_once_and_whole_however_the_network_cuts_them(
    room: Room, start_proxy: StartProxy, piece_bytes: int, delay_seconds: float
) -> None:
    slow = {"piece_bytes": piece_bytes, "delay_seconds": delay_seconds}
    speaker = start_proxy(room, **slow).peer
    reader = start_proxy(room, **slow).peer
    reader.join("Reader")
    speaker.join("Speaker")
    texts = [f"{i} " + "é😀ж" * i for i in range(20)]

    speaker.send("".join(f"{text}\r\n" for text in texts))

    said = [f"Speaker: {text}" for text in texts]
    assert reader.lines(21) == [joined("Speaker"), *said]
    assert_next(speaker, reader)


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_what_was_whole_arrives_wherever_the_connection_is_cut(
    room: Room, start_proxy: StartProxy, reset: bool
) -> None:
    """A line of which the newline was not sent is not passed on."""
    if reset and sys.platform != "linux":
        pytest.skip("other systems throw away what came before a RST")
    (bob,) = room.members("Bob")
    data = "Zoé\n1\r\n\n22\n".encode()
    events = {5: joined("Zoé"), 8: "Zoé: 1", 12: "Zoé: 22"}  # by the bytes they take

    for size in range(len(data) + 1):
        if reset:
            peer = room.connect()
            peer.send(data[:size])
            peer.reset()
        else:
            proxy = start_proxy(room)
            proxy.cut(proxy.up, size)
            proxy.peer.send(data + b"lost\n")
        expected = [event for end, event in events.items() if end <= size]
        if expected:
            expected.append(left("Zoé"))
        assert bob.lines(len(expected)) == expected


ENDS: dict[str, list[Callable[[Proxy], object]]] = {
    "q": [lambda proxy: proxy.peer.say("q")],
    "Q and more": [lambda proxy: proxy.peer.send("Q\r\nq\nmore\n")],
    "FIN": [lambda proxy: proxy.peer.close()],
    "half-close": [lambda proxy: proxy.peer.half_close()],
    "RST": [Proxy.reset],
    "RST of the peer": [lambda proxy: proxy.peer.reset()],
    "a line cut": [
        lambda proxy: proxy.cut(proxy.up, 6), lambda proxy: proxy.peer.say("half a li")
    ],
    "a line and RST": [lambda proxy: proxy.peer.send("half a li"), Proxy.reset],
    "half a character": [
        lambda proxy: proxy.peer.send(b"caf\xc3"), lambda proxy: proxy.peer.half_close()
    ],
    "too long": [
        lambda proxy: proxy.peer.send(b"x" * 10_000), lambda proxy: proxy.peer.close()
    ],
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_leaving_is_announced_once_and_the_name_is_free_however_it_happens(
    narrow_room: Room, start_proxy: StartProxy, end: list[Callable[[Proxy], object]]
) -> None:
    """Also while lines wait for it; and no thread, no descriptor is left of it."""
    alex, bob = narrow_room.members("Alex", "Bob")
    before = threading.active_count(), open_descriptors()

    for lines_wait in (False, True):
        proxy = start_proxy(narrow_room, receive_buffer=SMALL_BUFFER)
        proxy.peer.join("Carol")
        assert alex.line() == bob.line() == joined("Carol")
        if lines_wait:
            proxy.stall(proxy.down)
            for _ in range(50):  # more than the sockets take
                alex.say("x" * 2000)
                bob.line()
        proxy.peer.say("the last line")
        assert alex.line() == bob.line() == "Carol: the last line"
        for act in end:
            act(proxy)

        assert alex.line() == bob.line() == left("Carol")
        proxy.close()
    wait_until(lambda: (threading.active_count(), open_descriptors()) == before)
    narrow_room.member("Carol", alex, bob)
    assert_next(alex, bob)
    assert_next(bob, alex)


# --- enemies: ill will --------------------------------------------------------------


def random_line(chance: random.Random) -> bytes:
    """Return a line of any kind, good or bad, but one that leaves."""
    size = chance.choice([0, 1, 2, 10, 100])
    kind = chance.randrange(6)
    if kind == 0:
        line = chance.randbytes(size).replace(b"\n", b"\r")
    elif kind == 1:
        line = bytes(chance.choices(b" \t\r\0\x1b[2J\x7f\xc2\x9b", k=size))
    elif kind == 2:
        line = b"x" * (MAX_LINE_BYTES + chance.randrange(-1, 3))
    else:
        last = chance.choice([0x7F, 0x7FF, 0xD7FF, 0x10FFFF])
        codes = [chance.randrange(last + 1) for _ in range(size)]
        text = "".join(chr(code) for code in codes if code != 0x0A)
        line = text.encode("utf-8", "surrogatepass")
    return b"" if line.strip(b"\r") in (b"q", b"Q") or line[:1] == b"/" else line


@pytest.mark.parametrize("seed", range(2))
def test_of_any_bytes_the_good_lines_arrive_clean_and_each_bad_one_is_refused_once(
    narrow_room: Room, seed: int
) -> None:
    chance = random.Random(seed)
    enemy, bob = narrow_room.members("Enemy", "Bob")
    lines = [*(random_line(chance) for _ in range(300)), b"a good line", b""]
    unsent = sent = b"\n".join(lines)

    while unsent:
        size = chance.choice([1, 2, 50, 5000])
        enemy.send(unsent[:size])
        unsent = unsent[size:]

    for line in bob.until("Enemy: a good line"):  # fails if it is not UTF-8
        assert line.startswith("Enemy: ")
        assert not UNSAFE_CODES.intersection(map(ord, line))
    bad = sum(
        len(line) > MAX_LINE_BYTES or line.decode(errors="ignore").encode() != line
        for line in sent.replace(b"\r\n", b"\n").split(b"\n")
    )
    assert [line[0] for line in enemy.lines(bad)] == ["!"] * bad
    assert_next(bob, enemy)


# --- want: of descriptors, of threads, of luck in accept() --------------------------


@needs_proc
def test_out_of_descriptors_the_server_serves_those_inside_and_does_not_spin(
    start_server: StartServer,
) -> None:
    chat = start_server(limits="ulimit -n 64")
    alex, bob = chat.members("Alex", "Bob")

    crowd = [chat.connect() for _ in range(100)]
    chat.output.until("Cannot take new clients")

    chat.assert_idle(alex, bob)
    assert_next(alex, bob)
    for peer in crowd:
        peer.close()
    chat.member("Carol", alex, bob)


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
        turned_away = room.connect()
        assert failed.wait(HANG_SECONDS)
        assert_next(alex, bob)

    (refusal,) = turned_away.rest()
    assert refusal.startswith("! ")
    room.member("Carol", alex, bob)


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EMFILE, 0])
def test_what_accept_tells_of_one_costs_no_other_one(
    room: Room, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """An abort, a lack, and no address, as macOS gives it for a peer that is gone."""
    monkeypatch.setattr(server, "ACCEPT_PAUSE_SECONDS", 0.02)  # instead of 0.1
    alex, bob = room.members("Alex", "Bob")
    accept = socket.socket.accept
    faults = [code] * 2

    def fail_at_first(listener: socket.socket) -> tuple[socket.socket, Any]:
        if not faults:
            return accept(listener)
        if code := faults.pop():
            raise OSError(code, "cannot accept")
        return accept(listener)[0], None

    monkeypatch.setattr(socket.socket, "accept", fail_at_first)
    for _ in faults.copy():
        if not code:
            room.connect().close()

    room.member("Carol", alex, bob)
    assert faults == []
