"""Slow readers: what waits for them, when they are dropped, and that nobody notices."""

from __future__ import annotations

import select
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
from helpers import (
    MIB,
    SMALL_BUFFER,
    Peer,
    Room,
    StartServer,
    assert_next,
    left,
    needs_linux,
    needs_proc,
)

import server

# --- what waits for a slow reader ----------------------------------------------------


def test_silence_and_half_a_line_delay_nobody(room: Room) -> None:
    alex, bob, carol = room.members("Alex", "Bob", "Carol")
    room.connect()
    room.connect().send("half a na")

    carol.send("half a li")
    assert_next(alex, bob, carol)
    carol.send("ne\n")

    assert bob.line() == "Carol: half a line"


def test_a_slow_reader_is_dropped_and_others_go_on(start_server: StartServer) -> None:
    """The terminal says who it was, and why."""
    chat = start_server("--rate", "0", "--quiet", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    slow = chat.slow_member(bob)
    text = "x" * 4089
    said = 0

    # Each block is read by the other one before the next is said, so only this waits.
    while left("Slow") not in (read := bob.lines(8) if said else []):
        alex.send(f"{text}\n" * 8)
        said += 8 * 4096
    # What was said after the last straw may have come first.
    assert 4 * MIB < said < 4.5 * MIB
    assert {*read, bob.line()} == {f"Alex: {text}", left("Slow")}
    assert_next(alex, bob)
    line = chat.output.until("too slow")[-1]
    assert "Slow" in line
    assert f"127.0.0.1:{slow.port}" in line


def bytes_in_the_kernel(ours: socket.socket, peer: Peer) -> int:
    """Return how much of what the server sent the peer has still to read."""
    import fcntl
    import termios

    # Send the acknowledgement that may be due, or those bytes would count twice.
    peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    return sum(
        int.from_bytes(fcntl.ioctl(end, request, bytes(4)), sys.byteorder)
        for end, request in ((ours, termios.TIOCOUTQ), (peer.socket, termios.FIONREAD))
    )


@needs_linux
@pytest.mark.parametrize(("above", "stays"), [(-1, True), (0, True), (1, False)])
def test_a_slow_reader_is_dropped_above_the_limit_and_not_at_it(
    narrow_room: Room, monkeypatch: pytest.MonkeyPatch, above: int, stays: bool
) -> None:
    limit = 20_000  # instead of 4 MiB, to be exact to the byte
    monkeypatch.setattr(server, "MAX_UNSENT_BYTES", limit)
    alex, bob = narrow_room.members("Alex", "Bob")
    slow = narrow_room.slow_member(bob)
    said: list[str] = []

    def say(length: int) -> None:
        text = "x" * (length - len("Alex: \n"))
        alex.say(text)
        said.append(f"Alex: {text}")
        assert bob.line() == said[-1]

    for _ in range(40):
        say(500)
    ours = narrow_room.server.clients["Slow"]
    while select.select([], [ours], [], 0.3)[1]:
        pass  # the kernel takes some more after a while
    missing = limit + above - (40 * 500 - bytes_in_the_kernel(ours, slow))
    for length in (*[missing // 4] * 3, missing - missing // 4 * 3):
        say(length)

    if stays:
        assert slow.lines(len(said)) == said
        assert_next(alex, slow)
    else:
        assert bob.line() == left("Slow")


@needs_proc
def test_a_thousand_stalled_members_share_what_waits(start_server: StartServer) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1200, hard))
    flags = ("--rate", "0", "--quiet", "--max-clients", "1002")
    chat = start_server(*flags, small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    block = "x" * 4089 + "\n"
    said = 0

    with chat.growing_by_less_than(64 * MIB):
        for i in range(1000):
            chat.connect(receive_buffer=SMALL_BUFFER).say(f"stalled{i}")
        assert len(bob.lines(1000)) == 1000
        while said < 5 * MIB:
            alex.send(block * 8)
            said += 8 * 4096
            if any(line.endswith(" has left the chat.") for line in bob.lines(8)):
                break

    assert 3.9 * MIB < said < 5 * MIB  # their joinings wait for them too


@needs_proc
def test_what_all_have_read_and_a_line_without_end_cost_no_memory(
    start_server: StartServer,
) -> None:
    chat = start_server("--rate", "0", "--quiet")
    alex, bob = chat.members("Alex", "Bob")

    with chat.growing_by_less_than(4 * MIB):
        for _ in range(40):
            alex.send(("x" * 4000 + "\n") * 50)
            assert bob.lines(50) == ["Alex: " + "x" * 4000] * 50
        for _ in range(10):
            alex.send(b"x" * MIB)
        assert alex.line().startswith("! ")  # though its newline is still to come
        alex.send("\nafter\n")
        assert bob.line() == "Alex: after"


@needs_proc
def test_an_idle_server_uses_no_cpu(start_server: StartServer) -> None:
    """Nor does a slow reader that has caught up, or one that has not joined."""
    chat = start_server("--rate", "0", "--quiet", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    slow = chat.slow_member(alex, bob)
    chat.connect()
    for _ in range(50):
        alex.say("x" * 4000)
        bob.line()
    assert slow.lines(50) == ["Alex: " + "x" * 4000] * 50

    chat.assert_idle(alex, bob, slow)


@needs_proc
@pytest.mark.parametrize("line", [b"\xff", b"/help", b"/msg Slow " + b"x" * 1000])
def test_answers_that_are_not_read_are_bounded_and_disturb_no_conversation(
    start_server: StartServer, line: bytes
) -> None:
    """Refusals, replies, and private messages, here one's own."""
    chat = start_server("--rate", "0", "--quiet", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    slow = chat.slow_member(alex, bob)
    read: list[str] = []

    def flood() -> None:
        with suppress(ConnectionError):  # it is cut off
            for _ in range(1000):
                slow.send((line + b"\n") * 1000)

    with chat.growing_by_less_than(16 * MIB), ThreadPoolExecutor(1) as pool:
        flooding = pool.submit(flood)
        while not (read or flooding.done()):
            alex.say("hi")
            read += bob.until("Alex: hi")

    flooding.result()  # its connection has been reset
    assert (read or [bob.line()]) == [left("Slow")]


def test_refusals_that_have_been_read_do_not_count(
    narrow_room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are, to one that is never quite up to date."""
    monkeypatch.setattr(server, "MAX_UNSENT_BYTES", 100_000)  # instead of 4 MiB
    slow = narrow_room.slow_member()
    reply = "! That line is not UTF-8."
    slow.send(b"\xff\n" * 400)  # 10 kB of replies, of which the kernel takes a part

    for _ in range(200):
        slow.send(b"\xff\n" * 50)
        assert slow.lines(50) == [reply] * 50

    assert slow.lines(400) == [reply] * 400


def test_a_slow_reader_that_speaks_sees_all_but_its_own(narrow_room: Room) -> None:
    """And its refusals in their places."""
    alex, bob = narrow_room.members("Alex", "Bob")
    slow = narrow_room.slow_member(bob)
    promised: list[str] = []

    for i in range(300):
        text = "x" * (3000 if i < 20 or i % 50 == 0 else 10) + str(i)
        alex.say(text)
        assert bob.line() == f"Alex: {text}"
        slow.send(b"\xff\n" + f"own {i}\n".encode())
        assert bob.line() == f"Slow: own {i}"
        promised += [f"Alex: {text}", "! That line is not UTF-8."]

    assert slow.lines(len(promised)) == promised
    assert_next(bob, slow)


# --- back-pressure, without a rate --------------------------------------------------


@contextmanager
def flooding(*writers: Peer, start: str = "") -> Iterator[threading.Event]:
    """Have these write as fast as the server reads, until the event is set."""
    stop = threading.Event()

    def flood(writer: Peer) -> None:
        block = (start + "x" * 1000 + "\n") * 64
        while not stop.is_set():
            writer.send(block)
        writer.half_close()

    with ThreadPoolExecutor(2 * len(writers)) as pool:
        futures = [pool.submit(flood, writer) for writer in writers]
        futures += [pool.submit(writer.drain) for writer in writers]
        try:
            yield stop
        finally:
            stop.set()
    for future in futures:
        future.result()


@pytest.mark.parametrize("start", ["", "/msg Reader "])
def test_who_reads_four_megabytes_a_second_stays(
    start_server: StartServer, start: str
) -> None:
    """For 1.5 s, in which writers without back-pressure would be 50 MB ahead."""
    chat = start_server("--rate", "0", "--quiet")
    reader, *writers = chat.members("Reader", "Writer1", "Writer2")

    with flooding(*writers, start=start) as stop:
        began, received = time.monotonic(), 0
        while received < 6_000_000:
            stop.wait(began + received / 4_000_000 - time.monotonic())
            piece = reader.socket.recv(65536)
            assert piece, "EOF"
            received += len(piece)
        stop.set()
        ends = {left("Writer1"), left("Writer2")}
        assert {reader.gather(ends.__contains__) for _ in ends} == ends

    assert_next(chat.member("Witness", reader), reader)


def test_a_trickle_reader_delays_nobody(narrow_room: Room) -> None:
    """Promised are 100 ms: of the median, since a busy machine may be late once."""
    alex, bob, writer = narrow_room.members("Alex", "Bob", "Writer")
    for ours in narrow_room.server.clients.values():
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
    trickle = narrow_room.member("Trickle", receive_buffer=SMALL_BUFFER)
    delays: list[float] = []
    ends = {left("Trickle")}

    with flooding(writer) as stop, ThreadPoolExecutor(1) as pool:
        pool.submit(alex.drain)
        while not stop.is_set():
            trickle.socket.recv(1)
            probe = f"probe {len(delays)}"
            said = time.monotonic()
            alex.say(probe)
            if bob.gather({f"Alex: {probe}", *ends}.__contains__) in ends:
                stop.set()
            delays.append(time.monotonic() - said)
        alex.half_close()

    assert statistics.median(delays[-10:]) < 0.1


def test_who_reads_nothing_does_not_slow_what_is_not_for_it(
    narrow_room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    alex, bob, carol = narrow_room.members("Alex", "Bob", "Carol")
    narrow_room.slow_member(alex, bob, carol)
    alex.send(f"/msg Slow {'x' * 4000}\n" * 800)  # of 4 MiB that may wait for it
    for _ in range(2):  # the pause after the pass with the last of these is over
        assert_next(alex, bob, carol)
    monkeypatch.setattr(server, "FULL_PASS_SECONDS", 1000)  # instead of 0.08

    carol.send("/x\n" * 2000)

    assert len(carol.lines(2000)) == 2000
    assert_next(alex, bob, carol)


def test_what_members_alone_see_is_bounded_for_all_of_them_together(
    narrow_room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that lets the most of it wait is dropped; the other one gets all."""
    monkeypatch.setattr(server, "MAX_OWN_BYTES", 100_000)
    alex, bob = narrow_room.members("Alex", "Bob")
    modest = narrow_room.member("Modest", alex, bob, receive_buffer=SMALL_BUFFER)
    greedy = narrow_room.member(
        "Greedy", alex, bob, modest, receive_buffer=SMALL_BUFFER
    )

    for name, count in (("Modest", 50), ("Greedy", 200)):
        alex.send(f"/msg {name} {'x' * 500}\n" * count)
    assert bob.line() == left("Greedy")
    greedy.close()

    assert modest.lines(50) == [f"Alex (private): {'x' * 500}"] * 50
