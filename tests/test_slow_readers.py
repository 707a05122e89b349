"""Slow readers: what waits for them, when they are dropped, and that nobody notices."""

from __future__ import annotations

import select
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

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


def test_a_slow_reader_is_dropped_and_others_keep_receiving(
    start_room: StartRoom,
) -> None:
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    room.member("Slow", receive_buffer=SMALL_BUFFER)
    assert bob.line() == joined("Slow")
    said = 0

    # Each line is read by the other one before the next is said, so nothing else waits.
    while True:
        alex.say("x" * 4089)
        said += 4096
        if bob.line() == left("Slow"):
            break

    # The line that was said after the last straw may have come first.
    assert 4 * MIB < said < 4.5 * MIB
    assert bob.line() == "Alex: " + "x" * 4089
    assert_next(alex, bob)


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
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch, above: int, stays: bool
) -> None:
    limit = 20_000  # instead of 4 MiB, to be exact to the byte
    monkeypatch.setattr(server, "MAX_UNSENT_BYTES", limit)
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    slow = room.member("Slow", receive_buffer=SMALL_BUFFER)
    assert bob.line() == joined("Slow")
    said: list[str] = []

    def say(length: int) -> None:
        text = "x" * (length - len("Alex: \n"))
        alex.say(text)
        said.append(f"Alex: {text}")
        assert bob.line() == said[-1]

    for _ in range(40):
        say(500)
    ours = room.server.clients["Slow"]
    while select.select([], [ours], [], 0.3)[1]:
        pass  # the kernel takes some more after a while
    waiting = 40 * 500 - bytes_in_the_kernel(ours, slow)
    assert waiting > 0
    missing = limit + above - waiting
    for length in (
        missing // 4,
        missing // 4,
        missing // 4,
        missing - missing // 4 * 3,
    ):
        say(length)

    if stays:
        assert slow.lines(len(said)) == said
        assert_next(alex, slow)
    else:
        assert bob.line() == left("Slow")


@needs_proc
def test_a_thousand_stalled_members_share_what_waits_for_them(
    start_server: StartServer, open_file_limit: Callable[[int], None]
) -> None:
    open_file_limit(1200)
    chat = start_server(
        "--rate", "0", "--quiet", "--max-clients", "1002", small_buffers=True
    )
    alex, bob = chat.members("Alex", "Bob")
    before = chat.status_bytes("VmRSS")
    for i in range(1000):
        chat.connect(receive_buffer=SMALL_BUFFER).say(f"stalled{i}")
    assert len(bob.lines(1000)) == 1000
    said = 0

    while said < 5 * MIB:
        alex.say("x" * 4089)
        said += 4096
        if bob.line().endswith(" has left the chat."):
            break

    assert 3.9 * MIB < said < 5 * MIB  # their joinings wait for them too
    assert chat.status_bytes("VmHWM") - before < 64 * MIB


@needs_proc
def test_what_waits_costs_little_more_than_its_bytes(start_server: StartServer) -> None:
    chat = start_server("--rate", "0", "--quiet", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    chat.member("Slow", receive_buffer=SMALL_BUFFER)
    assert bob.line() == joined("Slow")
    before = chat.status_bytes("VmRSS")

    for _ in range(12_000):
        alex.say("x")
        assert bob.line() == "Alex: x"

    assert chat.status_bytes("VmHWM") - before < MIB


@needs_proc
def test_what_all_have_read_costs_no_memory(start_server: StartServer) -> None:
    chat = start_server("--rate", "0", "--quiet")
    alex, bob = chat.members("Alex", "Bob")
    before = chat.status_bytes("VmRSS")

    for _ in range(80):
        alex.send(("x" * 4000 + "\n") * 50)
        assert bob.lines(50) == ["Alex: " + "x" * 4000] * 50

    assert chat.status_bytes("VmHWM") - before < 4 * MIB


@needs_proc
def test_a_slow_reader_that_has_caught_up_costs_no_cpu(
    start_server: StartServer,
) -> None:
    chat = start_server("--rate", "0", "--quiet", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    slow = chat.member("Slow", receive_buffer=SMALL_BUFFER)
    assert bob.line() == joined("Slow")
    for _ in range(50):
        alex.say("x" * 4000)
        bob.line()

    assert slow.lines(50) == ["Alex: " + "x" * 4000] * 50
    before = chat.cpu_seconds()
    assert select.select([slow.socket, bob.socket], [], [], 0.5)[0] == []

    assert chat.cpu_seconds() - before < 0.05


@needs_proc
def test_refusals_that_their_author_does_not_read_are_bounded(
    start_server: StartServer,
) -> None:
    chat = start_server("--rate", "0", "--quiet", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    rude = chat.member("Rude", receive_buffer=SMALL_BUFFER)
    assert bob.line() == joined("Rude")
    before = chat.status_bytes("VmRSS")

    with suppress(ConnectionError):  # it is cut off
        for _ in range(2000):
            rude.send(b"\xff\n" * 2000)

    assert bob.line() == left("Rude")
    assert chat.status_bytes("VmHWM") - before < 16 * MIB
    assert_next(alex, bob)


def test_refusals_that_have_been_read_do_not_count(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are, to one that is never quite up to date."""
    monkeypatch.setattr(server, "MAX_UNSENT_BYTES", 400_000)  # instead of 4 MiB
    room = start_room(small_buffers=True, lines_per_second=0)
    rude = room.member("Rude", receive_buffer=SMALL_BUFFER)
    reply = "! That line is not UTF-8."
    rude.send(b"\xff\n" * 1000)  # 26 kB of replies, of which the kernel takes a part

    for _ in range(1500):
        rude.send(b"\xff\n" * 50)
        assert rude.lines(50) == [reply] * 50

    assert rude.lines(1000) == [reply] * 1000


def test_a_slow_reader_that_speaks_sees_all_but_its_own_lines(
    start_room: StartRoom,
) -> None:
    """And its refusals in their places."""
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob = room.members("Alex", "Bob")
    slow = room.member("Slow", receive_buffer=SMALL_BUFFER)
    assert bob.line() == joined("Slow")
    promised: list[str] = []

    for i in range(300):
        text = "x" * (3000 if i < 20 or i % 50 == 0 else 10) + str(i)
        alex.say(text)
        assert bob.line() == f"Alex: {text}"
        slow.send(f"own {i}\n".encode() + b"\xff\n")
        assert bob.line() == f"Slow: own {i}"
        promised += [f"Alex: {text}", "! That line is not UTF-8."]

    assert slow.lines(len(promised)) == promised
    assert_next(bob, slow)


@needs_proc
def test_a_line_without_end_costs_little_memory(start_server: StartServer) -> None:
    chat = start_server()
    alex, bob = chat.members("Alex", "Bob")
    before = chat.status_bytes("VmRSS")

    for _ in range(20):
        alex.send(b"x" * MIB)
    alex.send("\nafter\n")

    assert bob.line() == "Alex: after"
    assert chat.status_bytes("VmHWM") - before < 4 * MIB


# --- back-pressure, without a rate --------------------------------------------------


def flood(peer: Peer, stop: threading.Event) -> None:
    """Write as fast as the server reads, then close."""
    block = ("x" * 1000 + "\n").encode() * 64
    while not stop.is_set():
        peer.send(block)
    peer.half_close()


@contextmanager
def flooding(*writers: Peer) -> Iterator[threading.Event]:
    """Have these write without pause until the event is set, and read meanwhile."""
    stop = threading.Event()
    with ThreadPoolExecutor(2 * len(writers)) as pool:
        futures = [pool.submit(flood, writer, stop) for writer in writers]
        futures += [pool.submit(writer.drain) for writer in writers]
        try:
            yield stop
        finally:
            stop.set()
    for future in futures:
        future.result()


def test_who_reads_four_megabytes_a_second_stays_however_fast_others_write(
    start_server: StartServer,
) -> None:
    """For 2.5 s, in which writers without back-pressure would be 100 MB ahead."""
    chat = start_server("--rate", "0", "--quiet")
    reader, *writers = chat.members("Reader", "Writer1", "Writer2")

    with flooding(*writers) as stop:
        began, received = time.monotonic(), 0
        while received < 10_000_000:
            stop.wait(began + received / 4_000_000 - time.monotonic())
            received += len(reader.take())
        stop.set()
        ends = {left("Writer1"), left("Writer2")}
        last = [reader.gather(ends.__contains__) for _ in ends]

    assert set(last) == ends
    witness = chat.member("Witness")
    assert reader.line() == joined("Witness")
    assert_next(witness, reader)


def test_a_trickle_reader_delays_nobody(start_room: StartRoom) -> None:
    """Promised are 100 ms: of the median, since a busy machine may be late once."""
    room = start_room(small_buffers=True, lines_per_second=0)
    alex, bob, writer = room.members("Alex", "Bob", "Writer")
    for ours in room.server.clients.values():
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
    trickle = room.member("Trickle", receive_buffer=SMALL_BUFFER)
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
    assert max(delays) < 1
