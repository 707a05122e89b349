"""The server in bad company: bad networks, unlucky moments and ill will.

Whatever a test here does, its server has to forget everybody afterwards: the fixtures
check that no connection, name, backlog, thread or descriptor is left.  The tests that
take longer than a quarter of a second let hundreds of connections come and go.
"""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from helpers import HANG_SECONDS, SMALL_BUFFER, Peer, Room, assert_next
from proxy import Proxy

from protocol import MAX_LINE_BYTES, LineSplitter
from server import ChatServer

StartRoom = Callable[..., Room]
StartProxy = Callable[..., Proxy]

SHUTTING_DOWN = "* Server is shutting down."
# What must not reach anybody, by the words of the contract.
UNSAFE_CODES = {
    *range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0x061C, 0x200E, 0x200F,
    *range(0x202A, 0x202F), *range(0x2066, 0x206A),
}  # fmt: skip


def joined(name: str) -> str:
    return f"* {name} has joined the chat."


def left(name: str) -> str:
    return f"* {name} has left the chat."


def assert_all_forgotten(server: ChatServer) -> None:
    """Wait until every connection is closed, and check that nothing of them is left."""
    with server._lock:
        gone = server._all_closed.wait_for(
            lambda: not server._connections, HANG_SECONDS
        )
        assert gone, server._connections
        assert not server.clients
        assert not server._keys
        assert not server._waiting
        assert server._room_in_log.wait_for(lambda: not server._log, HANG_SECONDS)
        running = not server._closing.is_set()
    if running:
        with server._sending:
            assert not server._members
            assert not server._slow_readers
            assert len(server._writable.get_map()) == 1  # what wakes the broadcaster


@pytest.fixture
def start_room(start_room: StartRoom) -> Iterator[StartRoom]:
    """Start servers as elsewhere, and check that they forget all who have gone."""
    rooms: list[Room] = []

    def start(**options: int) -> Room:
        rooms.append(start_room(**options))
        return rooms[-1]

    yield start
    for room in rooms:
        room.close_peers()
        assert_all_forgotten(room.server)


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


def test_all_see_one_order_through_networks_of_any_kind(
    room: Room, start_proxy: StartProxy
) -> None:
    proxies = [
        start_proxy(room, piece_bytes=size, delay_seconds=delay)
        for size, delay in [(1, 0), (3, 0), (100, 0.001), (65536, 0), (50, 0.0005)]
    ]
    names = [f"member{i}" for i in range(5)]
    watcher = room.member("Watcher")
    for proxy, name in zip(proxies, names, strict=True):
        proxy.peer.join(name)

    for i in range(15):
        for proxy in proxies:
            proxy.peer.say(f"{i}")

    order = watcher.lines(5 + 5 * 15)
    for proxy, name in zip(proxies, names, strict=True):
        heard = order[order.index(joined(name)) + 1 :]
        own = [f"{name}: {i}" for i in range(15)]
        assert [line for line in order if line in own] == own
        expected = [line for line in heard if line not in own]
        assert proxy.peer.lines(len(expected)) == expected


def test_one_whose_network_stalls_misses_nothing_and_delays_nobody(
    start_room: StartRoom, start_proxy: StartProxy
) -> None:
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    proxy = start_proxy(room, receive_buffer=SMALL_BUFFER)
    proxy.peer.join("Carol")
    assert bob.line() == joined("Carol")

    proxy.stall(proxy.down)
    said = say_until_lines_wait(room, alex, bob)
    proxy.stall(proxy.down, stalled=False)

    assert proxy.peer.lines(len(said)) == said
    assert_next(alex, bob, proxy.peer)


def test_a_line_that_is_stalled_half_way_arrives_whole_when_it_goes_on(
    room: Room, start_proxy: StartProxy
) -> None:
    alex, bob = room.members("Alex", "Bob")
    proxy = start_proxy(room, piece_bytes=1)
    proxy.peer.join("Carol")
    assert [alex.line(), bob.line()] == [joined("Carol")] * 2

    proxy.peer.send("half a ")
    proxy.stall(proxy.up)
    proxy.peer.send("line\n")
    assert_next(alex, bob, proxy.peer)
    proxy.stall(proxy.up, stalled=False)

    assert bob.line() == "Carol: half a line"


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
def test_a_leaving_is_announced_once_however_it_happens(
    room: Room, start_proxy: StartProxy, end: Callable[[Proxy], None]
) -> None:
    alex, bob = room.members("Alex", "Bob")
    proxy = start_proxy(room)
    proxy.peer.join("Carol")
    proxy.peer.say("the last line")

    assert alex.lines(2) == [joined("Carol"), "Carol: the last line"]
    end(proxy)

    assert alex.line() == left("Carol")
    assert bob.lines(3) == [joined("Carol"), "Carol: the last line", left("Carol")]
    assert_next(alex, bob)
    assert_next(bob, alex)


@every_ending
def test_a_name_is_free_again_however_its_owner_left(
    room: Room, start_proxy: StartProxy, end: Callable[[Proxy], None]
) -> None:
    (bob,) = room.members("Bob")

    for _ in range(5):
        proxy = start_proxy(room)
        proxy.peer.join("Carol")
        end(proxy)
        bob.until(left("Carol"))

    assert list(room.server.clients) == ["Bob"]


def say_until_lines_wait(room: Room, speaker: Peer, reader: Peer) -> list[str]:
    """Say long lines until some wait inside the server; return them as they arrive."""
    said: list[str] = []
    while not room.server._slow_readers:
        assert len(said) < 10_000
        speaker.say(f"{len(said)} " + "x" * 2000)
        said.append(reader.line())
    return said


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
    say_until_lines_wait(room, alex, bob)

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
    say_until_lines_wait(room, alex, bob)
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
    with room.server._lock:
        waited = room.server._all_closed.wait_for(
            lambda: len(room.server._connections) == 1, HANG_SECONDS
        )
    assert waited
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


def test_visitors_during_a_flood_hear_all_from_their_joining_to_their_leaving(
    start_room: StartRoom,
) -> None:
    room = start_room(lines_per_second=0)
    watcher, speaker, echo = room.members("Watcher", "Speaker", "Echo")
    stop = threading.Event()
    visits: list[tuple[str, str, list[str]]] = []

    def flood() -> None:
        said = 0
        while not stop.is_set():
            speaker.send("".join(f"{said + i}\n" for i in range(50)))
            said += 50
            echo.until(f"Speaker: {said - 1}")

    def visit(seed: int) -> None:
        for i in range(8):
            peer = Peer(room.address)
            name = f"visitor-{seed}-{i}"
            welcome = peer.join(name)
            heard = peer.lines(60)
            if i % 2:
                peer.half_close()
            else:
                peer.say("q")
            visits.append((name, welcome, heard + peer.rest()))
            peer.close()

    def visit_all() -> None:
        try:
            in_threads(*[partial(visit, seed) for seed in range(4)])
        finally:
            stop.set()

    in_threads(flood, visit_all)

    speaker.say("the end")
    order = watcher.until("Speaker: the end")
    said = [line for line in order if line.startswith("Speaker: ")]
    assert said == [f"Speaker: {i}" for i in range(len(said))]
    assert len(visits) == 4 * 8
    for name, _, heard in visits:
        assert heard == order[order.index(joined(name)) + 1 : order.index(left(name))]


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
    say_until_lines_wait(room, alex, bob)

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


@pytest.mark.parametrize("joins", [1, 10, 100])
def test_who_joined_before_a_shutdown_is_announced_and_told_of_it(
    start_room: StartRoom, joins: int
) -> None:
    """Four threads join again and again; the server ends after so many joins."""
    room = start_room()
    (watcher,) = room.members("Watcher")
    enough = threading.Semaphore(0)
    names: list[str] = []
    last_lines: list[str] = []

    def stop() -> None:
        for _ in range(joins):
            assert enough.acquire(timeout=HANG_SECONDS)
        room.stop()

    def keep_joining(seed: int) -> None:
        welcomed: list[Peer] = []
        # Who comes too late is reset, or finds EOF in place of a line.
        with contextlib.suppress(ConnectionError, AssertionError):
            while True:
                peer = room.connect()
                name = f"member-{seed}-{len(welcomed)}"
                peer.say(name)
                if not peer.line().startswith("* Welcome, "):
                    break
                names.append(name)
                welcomed.append(peer)
                enough.release()
        for peer in welcomed:
            last_lines.append(peer.rest()[-1])
            peer.close()

    def watch() -> list[str]:
        with contextlib.closing(watcher):
            return watcher.rest()

    with ThreadPoolExecutor(6) as pool:
        watching = pool.submit(watch)
        for each in [
            pool.submit(stop), *(pool.submit(keep_joining, seed) for seed in range(4))
        ]:  # fmt: skip
            each.result(HANG_SECONDS)
    read = watching.result(HANG_SECONDS)

    assert sorted(read[:-1]) == sorted(map(joined, names))
    assert {read[-1], *last_lines} == {SHUTTING_DOWN}


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
    return b"" if line.strip(b"\r") in (b"q", b"Q") else line


@pytest.mark.parametrize("seed", range(5))
def test_whatever_bytes_come_the_next_good_line_arrives_and_all_are_clean(
    start_room: StartRoom, seed: int
) -> None:
    chance = random.Random(seed)
    room = start_room(lines_per_second=0)
    enemy, bob = room.members("Enemy", "Bob")
    stream = b"\n".join(
        [*(random_line(chance) for _ in range(300)), b"a good line", b""]
    )

    while stream:
        size = chance.choice([1, 2, 50, 5000])
        enemy.send(stream[:size])
        stream = stream[size:]

    for line in bob.until("Enemy: a good line"):  # fails if it is not UTF-8
        assert line.startswith("Enemy: ")
        assert not UNSAFE_CODES.intersection(map(ord, line))


@pytest.mark.parametrize("seed", range(5))
def test_each_bad_line_of_a_random_stream_is_refused_once(
    start_room: StartRoom, seed: int
) -> None:
    chance = random.Random(seed)
    room = start_room(lines_per_second=0)
    enemy, bob = room.members("Enemy", "Bob")
    stream = b"".join(random_line(chance) + b"\n" for _ in range(300))

    enemy.send(stream)

    bad = sum(not is_good(line) for line in naive_lines(stream, MAX_LINE_BYTES))
    assert bad
    for line in enemy.lines(bad):
        assert line.startswith("! ")
    assert_next(bob, enemy)


def is_good(line: bytes | None) -> bool:
    """Tell if a line is not too long, and UTF-8."""
    try:
        return line is not None and line.decode() is not None
    except UnicodeDecodeError:
        return False


NOT_UTF8 = {
    "overlong slash in 2": b"\xc0\xaf",
    "overlong slash in 3": b"\xe0\x80\xaf",
    "overlong slash in 4": b"\xf0\x80\x80\xaf",
    "overlong newline": b"\xc0\x8a",
    "overlong zero": b"\xc0\x80",
    "high surrogate": b"\xed\xa0\xbd",
    "low surrogate": b"\xed\xb8\x80",
    "pair of surrogates": b"\xed\xa0\xbd\xed\xb8\x80",
    "above U+10FFFF": b"\xf4\x90\x80\x80",
    "five bytes": b"\xf8\x88\x80\x80\x80",
    "continuation alone": b"\x80",
    "UTF-16": "hé".encode("utf-16"),
}
bad_encodings = pytest.mark.parametrize("bad", NOT_UTF8.values(), ids=NOT_UTF8)


@bad_encodings
def test_a_message_in_a_bad_encoding_reaches_nobody(room: Room, bad: bytes) -> None:
    enemy, bob = room.members("Enemy", "Bob")

    enemy.send(b"before " + bad + b" after\n")

    assert enemy.line().startswith("! ")
    assert_next(enemy, bob)


@bad_encodings
def test_a_name_in_a_bad_encoding_is_refused(room: Room, bad: bytes) -> None:
    (bob,) = room.members("Bob")
    enemy = room.connect()

    enemy.send(b"Al" + bad + b"ex\n")

    assert enemy.line().startswith("! ")
    enemy.join("Alex")
    assert bob.line() == joined("Alex")


@pytest.mark.parametrize("rate", [0, 100], ids=["no limit", "braked"])
@pytest.mark.parametrize(
    "bad", [b"\xff\n", b"x" * (MAX_LINE_BYTES + 1) + b"\n"], ids=["bytes", "too long"]
)
def test_a_flood_of_refused_lines_disturbs_no_conversation(
    start_room: StartRoom, rate: int, bad: bytes
) -> None:
    """Its author reads none of the refusals, and ends as a slow reader if at all."""
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
    room.close_peers()
    room.stop()  # who is braked is read to its end, unless the server ends before


def test_silent_connections_up_to_the_limit_keep_nobody_out(
    start_room: StartRoom,
) -> None:
    room = start_room(max_clients=20)
    alex, bob = room.members("Alex", "Bob")

    silent = [room.connect() for _ in range(100)]
    carol = room.member("Carol")

    assert [alex.line(), bob.line()] == [joined("Carol")] * 2
    assert_next(alex, bob, carol)
    assert len(silent[0].rest()) == 1  # why it had to go


def test_those_who_make_room_are_the_ones_who_have_waited_longest(
    start_room: StartRoom,
) -> None:
    room = start_room(max_clients=20)

    silent = [room.connect() for _ in range(50)]
    for peer in silent[:30]:
        assert peer.rest()

    for number, peer in enumerate(silent[30:]):
        peer.join(f"member{number}")
