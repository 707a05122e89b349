"""The server in bad company: bad networks, unlucky moments, ill will and want.

Whatever a test here does, its server has to forget everybody afterwards: the fixtures
check that no connection, thread or descriptor is left.  The tests that take longer than
a quarter of a second let hundreds of connections come and go.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import random
import select
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

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
    needs_proc,
    wait_until,
)
from proxy import Proxy

import server
from protocol import MAX_LINE_BYTES, LineSplitter

StartProxy = Callable[..., Proxy]

# What must not reach anybody, by the words of the contract.
UNSAFE_CODES = {
    *range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0x061C, 0x200E, 0x200F,
    *range(0x202A, 0x202F), *range(0x2066, 0x206A),
}  # fmt: skip


@pytest.fixture
def start_room(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StartRoom]:
    """Start servers as elsewhere, and check that they forget all who have gone."""
    accept = socket.socket.accept
    accepted: weakref.WeakSet[socket.socket] = weakref.WeakSet()
    rooms: list[Room] = []
    threads = threading.active_count() + 2  # the server's, and its broadcaster

    def accept_and_note(listener: socket.socket) -> tuple[socket.socket, Any]:
        connection = accept(listener)
        accepted.add(connection[0])
        return connection

    def start(**options: Any) -> Room:
        rooms.append(start_room(**options))
        return rooms[-1]

    monkeypatch.setattr(socket.socket, "accept", accept_and_note)
    yield start
    for room in rooms:
        room.close_peers()
        wait_until(lambda: threading.active_count() <= threads)
        room.stop()
    wait_until(lambda: gc.collect() >= 0 and not accepted)


@pytest.fixture
def start_proxy(start_room: StartRoom) -> Iterator[StartProxy]:
    """Start proxies; on leaving they are closed, before the servers are."""
    with contextlib.ExitStack() as proxies:

        def start(room: Room, **options: Any) -> Proxy:
            return proxies.enter_context(
                contextlib.closing(Proxy(room.address, **options))
            )

        yield start


# --- faults: what a network does ----------------------------------------------------


@pytest.mark.parametrize(
    ("piece_bytes", "delay_seconds"),
    [(1, 0), (2, 0), (7, 0.0001), (1000, 0.001)],
    ids=["single bytes", "pairs", "sevens", "slow pieces"],
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

    assert reader.lines(21) == [
        joined("Speaker"), *(f"Speaker: {text}" for text in texts)
    ]  # fmt: skip
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


def end_with_q(proxy: Proxy) -> None:
    proxy.peer.say("q")


def end_with_fin(proxy: Proxy) -> None:
    proxy.peer.close()


def end_with_half_close(proxy: Proxy) -> None:
    proxy.peer.half_close()


def end_with_reset(proxy: Proxy) -> None:
    proxy.reset()


def end_with_peer_reset(proxy: Proxy) -> None:
    proxy.peer.reset()


def end_with_cut_line(proxy: Proxy) -> None:
    proxy.cut(proxy.up, 6)
    proxy.peer.say("half a line")


def end_with_reset_line(proxy: Proxy) -> None:
    proxy.peer.send("half a li")
    proxy.reset()


def end_with_half_a_character(proxy: Proxy) -> None:
    proxy.peer.send(b"caf\xc3")
    proxy.peer.half_close()


def end_too_long(proxy: Proxy) -> None:
    proxy.peer.send(b"x" * 10_000)
    proxy.peer.close()


every_ending = pytest.mark.parametrize(
    "end",
    [
        end_with_q,
        end_with_fin,
        end_with_half_close,
        end_with_reset,
        end_with_peer_reset,
        end_with_cut_line,
        end_with_reset_line,
        end_with_half_a_character,
        end_too_long,
    ],
    ids=lambda end: end.__name__,
)


@every_ending
def test_a_leaving_is_announced_once_and_the_name_is_free_however_it_happens(
    room: Room, start_proxy: StartProxy, end: Callable[[Proxy], None]
) -> None:
    alex, bob = room.members("Alex", "Bob")

    for _ in range(5):
        proxy = start_proxy(room)
        proxy.peer.join("Carol")
        proxy.peer.say("the last line")
        assert alex.lines(2) == [joined("Carol"), "Carol: the last line"]
        end(proxy)

        assert alex.line() == left("Carol")
        assert bob.lines(3) == [joined("Carol"), "Carol: the last line", left("Carol")]
    assert_next(alex, bob)
    assert_next(bob, alex)


def say_more_than_a_socket_takes(speaker: Peer, reader: Peer) -> None:
    """Say so much that some waits in the server for all that have small buffers."""
    for i in range(50):
        speaker.say(f"{i} " + "x" * 2000)
        reader.line()


@every_ending
def test_a_member_that_ends_while_lines_wait_for_it_leaves_once(
    start_room: StartRoom, start_proxy: StartProxy, end: Callable[[Proxy], None]
) -> None:
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    proxy = start_proxy(room, receive_buffer=SMALL_BUFFER)
    proxy.peer.join("Carol")
    assert [alex.line(), bob.line()] == [joined("Carol")] * 2
    proxy.stall(proxy.down)
    say_more_than_a_socket_takes(alex, bob)

    end(proxy)

    assert [alex.line(), bob.line()] == [left("Carol")] * 2
    assert_next(alex, bob)
    assert_next(bob, alex)


def test_a_member_reset_while_lines_wait_for_it_is_heard_to_its_last_whole_line(
    start_room: StartRoom, start_proxy: StartProxy
) -> None:
    if sys.platform != "linux":
        pytest.skip("other systems throw away what came before a RST")
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    proxy = start_proxy(room, receive_buffer=SMALL_BUFFER)
    proxy.peer.join("Carol")
    assert bob.line() == joined("Carol")
    proxy.stall(proxy.down)
    say_more_than_a_socket_takes(alex, bob)
    server_side = proxy.down.source

    server_side.send(b"".join(b"%d\n" % i for i in range(500)) + b"half")
    proxy.reset()

    assert bob.until(left("Carol")) == [f"Carol: {i}" for i in range(500)]


# --- races: unlucky moments ---------------------------------------------------------

ENDINGS: list[Callable[[Peer], object]] = [
    lambda peer: peer.say("q"),
    lambda peer: peer.send("half a line"),
    Peer.half_close,
    Peer.reset,
    Peer.close,
]


def end_somehow(peer: Peer, chance: random.Random) -> None:
    """Leave in one of many ways."""
    chance.choice(ENDINGS)(peer)
    peer.close()


def in_threads(*calls: Callable[[], object]) -> None:
    """Call all of these at one time, and wait until they have returned."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result(HANG_SECONDS)


def test_a_name_that_many_fight_for_has_one_owner_at_a_time(room: Room) -> None:
    """Six claim it again and again, in three spellings, and leave at once."""
    (watcher,) = room.members("Watcher")
    spellings = ["Alex", "ALEX", "ａｌｅｘ"]
    together = threading.Barrier(6)
    wins: list[str] = []

    def fight(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(25):
            together.wait(HANG_SECONDS)
            peer = Peer(room.address)
            peer.say(chance.choice(spellings))
            welcome = peer.line()
            if welcome.startswith("* Welcome, "):
                wins.append(welcome)
            end_somehow(peer, chance)

    in_threads(*[partial(fight, seed) for seed in range(6)])

    assert len(wins) >= 25  # nobody had it at the first of the claims of a round
    for _ in wins:
        come = watcher.line()
        name = come.split()[1]
        assert come == joined(name)
        assert watcher.line() == left(name)
    assert list(room.server.clients) == ["Watcher"]


def talk(one: Peer, other: Peer, stop: threading.Event) -> tuple[int, list[str]]:
    """Let two talk in turns until told to stop; return how much, and all they read."""
    turns = 0
    read: list[str] = []
    while not stop.is_set():
        for speaker, listener in ((one, other), (other, one)):
            speaker.say(f"turn {turns}")
            said = f"{speaker.name}: turn {turns}"
            if listener is one:
                read += [*listener.until(said), said]
            else:
                listener.until(said)
        turns += 1
    return turns, read


def test_hundreds_who_come_and_go_disturb_no_conversation(
    start_room: StartRoom,
) -> None:
    room = start_room(lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    stop = threading.Event()
    together = threading.Barrier(4)

    def come_and_go(seed: int) -> None:
        chance = random.Random(seed)
        together.wait(HANG_SECONDS)
        for i in range(100):
            peer = Peer(room.address)
            peer.join(f"guest-{seed}-{i}")
            end_somehow(peer, chance)

    def converse() -> tuple[int, list[str]]:
        together.wait(HANG_SECONDS)
        return talk(alex, bob, stop)

    with ThreadPoolExecutor(4) as pool:
        conversation = pool.submit(converse)
        guests = [pool.submit(come_and_go, seed) for seed in range(3)]
        try:
            for guest in guests:
                guest.result(HANG_SECONDS)
        finally:
            stop.set()
        turns, read = conversation.result(HANG_SECONDS)

    names = [f"guest-{seed}-{i}" for seed in range(3) for i in range(100)]
    wanted = sorted([joined(name) for name in names] + [left(name) for name in names])
    while sum(not line.startswith("Bob: ") for line in read) < len(wanted):
        read.append(alex.line())
    assert sorted(line for line in read if not line.startswith("Bob: ")) == wanted
    assert [line for line in read if line.startswith("Bob: ")] == [
        f"Bob: turn {i}" for i in range(turns)
    ]
    assert_next(bob, alex)
    assert sorted(room.server.clients) == ["Alex", "Bob"]


@pytest.mark.parametrize("seed", range(3))
def test_members_that_end_in_the_middle_of_a_send_leave_once(
    start_room: StartRoom, seed: int
) -> None:
    """Thirty do not read; lines wait for them when they end, one after the other."""
    chance = random.Random(seed)
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    names = [f"member{i}" for i in range(30)]
    members = [room.member(name, receive_buffer=SMALL_BUFFER) for name in names]
    assert bob.lines(30) == [joined(name) for name in names]
    say_more_than_a_socket_takes(alex, bob)

    read: list[str] = []
    for i, member in enumerate(members):
        end_somehow(member, chance)
        alex.say(f"{i} " + "x" * 3000)
        read.append(bob.line())
    while len(read) < 60:
        read.append(bob.line())

    leavings = [line for line in read if line.startswith("* ")]
    assert sorted(leavings) == sorted(left(name) for name in names)
    said = [line for line in read if line.startswith("Alex: ")]
    assert said == [f"Alex: {i} " + "x" * 3000 for i in range(30)]
    assert_next(alex, bob)


# --- enemies: ill will --------------------------------------------------------------


def naive_lines(stream: bytes, limit: int) -> list[bytes | None]:
    """Return the lines of all that has come so far; None for one that is too long."""
    *lines, tail = (line.removesuffix(b"\r") for line in stream.split(b"\n"))
    if len(tail) > limit:
        lines.append(tail)
    return [line if len(line) <= limit else None for line in lines]


@pytest.mark.parametrize("seed", range(10))
def test_the_splitter_agrees_with_a_naive_one_on_any_stream(seed: int) -> None:
    chance = random.Random(seed)
    limit = chance.randrange(1, 12)
    for _ in range(100):
        splitter = LineSplitter(limit)
        stream = b""
        lines: list[bytes | None] = []
        for _ in range(20):
            size = chance.choice([1, 1, 2, 3, 10, 40])
            chunk = bytes(chance.choices(b"ab\r\n", [4, 4, 2, 1], k=size))
            stream += chunk
            fed = splitter.feed(chunk)
            lines += [line if len(line) <= limit else None for line in fed]
            assert lines == naive_lines(stream, limit), stream


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


@pytest.mark.parametrize("seed", range(5))
def test_of_any_bytes_the_good_lines_arrive_clean_and_each_bad_one_is_refused_once(
    start_room: StartRoom, seed: int
) -> None:
    chance = random.Random(seed)
    room = start_room(lines_per_second=0)
    enemy, bob = room.members("Enemy", "Bob")
    stream = b"\n".join(
        [*(random_line(chance) for _ in range(300)), b"a good line", b""]
    )
    sent = stream

    while stream:
        size = chance.choice([1, 2, 50, 5000])
        enemy.send(stream[:size])
        stream = stream[size:]

    for line in bob.until("Enemy: a good line"):  # fails if it is not UTF-8
        assert line.startswith("Enemy: ")
        assert not UNSAFE_CODES.intersection(map(ord, line))
    bad = sum(not is_good(line) for line in naive_lines(sent, MAX_LINE_BYTES))
    assert [line[0] for line in enemy.lines(bad)] == ["!"] * bad
    assert_next(bob, enemy)


def is_good(line: bytes | None) -> bool:
    """Tell if a line is not too long, and UTF-8."""
    try:
        return line is not None and line.decode() is not None
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("rate", [0, 100], ids=["no limit", "throttled"])
@pytest.mark.parametrize(
    "bad", [b"\xff\n", b"x" * (MAX_LINE_BYTES + 1) + b"\n"], ids=["bytes", "too long"]
)
def test_a_flood_of_refused_lines_disturbs_no_conversation(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch, rate: int, bad: bytes
) -> None:
    """Its author reads none of the refusals, and ends as a slow reader if at all."""
    monkeypatch.setattr(server, "GONE_SECONDS", 0.1)  # it is forgotten soon
    room = start_room(small_buffers=True, lines_per_second=rate)
    alex, bob = room.members("Alex", "Bob")
    enemy = room.member("Enemy", receive_buffer=SMALL_BUFFER)
    assert [alex.line(), bob.line()] == [joined("Enemy")] * 2
    block = bad * (20_000 // len(bad))
    flooding = threading.Event()
    read: list[str] = []

    def flood() -> None:
        try:
            while True:
                enemy.send(block)
                flooding.set()
        except OSError:
            pass  # it has been thrown out, or the test is over
        finally:
            flooding.set()

    with ThreadPoolExecutor(1) as pool:
        flooder = pool.submit(flood)
        assert flooding.wait(HANG_SECONDS)
        for i in range(50):
            for speaker, listener in ((alex, bob), (bob, alex)):
                speaker.say(f"{i}")
                read += listener.until(f"{speaker.name}: {i}")
        enemy.socket.shutdown(socket.SHUT_RDWR)
        flooder.result(HANG_SECONDS)

    assert set(read) <= {left("Enemy")}


# --- want: of descriptors, of threads, of luck in accept() --------------------------


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
        turned_away = room.connect()
        assert failed.wait(HANG_SECONDS)
        assert_next(alex, bob)

    (refusal,) = turned_away.rest()
    assert refusal.startswith("! ")
    assert room.member("Carol")
    assert alex.line() == joined("Carol")


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EMFILE, errno.ENOMEM])
def test_a_lack_or_an_abort_that_accept_tells_of_costs_no_other_connection(
    room: Room, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    alex, bob = room.members("Alex", "Bob")
    accept = socket.socket.accept
    errors = [OSError(code, "cannot accept")] * 3

    def fail_at_first(listener: socket.socket) -> tuple[socket.socket, Any]:
        if errors:
            raise errors.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", fail_at_first)
    room.member("Carol")

    assert errors == []
    assert [alex.line(), bob.line()] == [joined("Carol")] * 2


def test_a_connection_without_an_address_is_passed_over(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS gives it for a peer that was gone at once."""
    alex, bob = room.members("Alex", "Bob")
    accept = socket.socket.accept

    with monkeypatch.context() as patch:
        patch.setattr(
            socket.socket, "accept", lambda listener: (accept(listener)[0], None)
        )
        assert room.connect().rest() == []

    assert_next(alex, bob)
    assert room.member("Carol")
