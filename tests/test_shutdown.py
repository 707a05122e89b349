"""The end of the server: when it is told to, and when something in it breaks."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from helpers import (
    HANG_SECONDS,
    SHUTTING_DOWN,
    Peer,
    ServerProcess,
    StartRoom,
    StartServer,
    assert_next,
    joined,
    left,
)

import server

# --- told to end --------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_in_order(
    start_server: StartServer, number: signal.Signals
) -> None:
    chat = start_server()
    alex, bob = chat.members("Alex", "Bob")
    waiting = chat.connect()
    waiting.say("a b")
    assert waiting.line().startswith("! ")

    began = time.monotonic()
    chat.process.send_signal(number)

    for peer in (alex, bob):
        assert peer.rest() == [SHUTTING_DOWN]
    (reason,) = waiting.rest()
    assert reason.startswith("! ")  # a notice would mean that it has joined
    chat.close_peers()
    assert chat.wait() == 0
    assert time.monotonic() - began < 2
    again = start_server("--port", chat.address.rpartition(":")[2])
    assert again.address == chat.address


def test_all_that_was_told_arrives_before_the_end(start_server: StartServer) -> None:
    chat = start_server("--rate", "0")
    reader, *writers = chat.members("Reader", "Writer1", "Writer2", "Writer3")

    def write(writer: Peer) -> None:
        with suppress(OSError):  # the server is gone
            for i in range(3000):
                writer.say(f"line {i}")
            writer.drain()

    with ThreadPoolExecutor(4) as pool:
        output = pool.submit(chat.output.rest)
        writing = [pool.submit(write, writer) for writer in writers]
        received = reader.lines(1)
        chat.interrupt()
        received += reader.rest()
        for each in writing:
            each.result()
        chat.close_peers()
        logged = output.result()

    assert chat.wait() == 0
    assert received.pop() == SHUTTING_DOWN
    prefix = "Received message from "
    heard = [line.removeprefix(prefix) for line in logged if line.startswith(prefix)]
    assert sorted(received) == sorted(heard)


def stall_a_member(chat: ServerProcess) -> Peer:
    """Have a member for whom more waits than the kernel takes; return one that reads.

    And fill the pipe of the terminal, which nobody reads.
    """
    alex, bob = chat.members("Alex", "Bob")
    chat.slow_member(bob)
    for _ in range(20):
        alex.say("x" * 4000)
        bob.line()
    return bob


def test_a_stalled_member_does_not_hold_up_the_end(start_server: StartServer) -> None:
    """It takes 1 s: so long the stalled member may still read."""
    chat = start_server("--rate", "0", small_buffers=True)
    bob = stall_a_member(chat)

    began = time.monotonic()
    chat.interrupt()

    assert bob.line() == SHUTTING_DOWN
    assert chat.wait() == 0
    assert time.monotonic() - began < 2


def test_a_second_interrupt_ends_the_server_at_once(start_server: StartServer) -> None:
    patch = "server.SHUTDOWN_SECONDS = 60"
    chat = start_server("--rate", "0", small_buffers=True, patch=patch)
    bob = stall_a_member(chat)
    chat.interrupt()
    assert bob.line() == SHUTTING_DOWN

    chat.interrupt()

    assert chat.wait() in (-signal.SIGINT, 130)
    # And, as always, nothing is on stderr.


def test_a_shutdown_is_over_once_all_clients_have_hung_up(
    start_room: StartRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many lines one of them has sent, faster than it may; nobody comes in."""
    monkeypatch.setattr(server, "SHUTDOWN_SECONDS", 60)  # instead of 1
    monkeypatch.setattr(server, "THROTTLE_PAUSE_SECONDS", 60)  # instead of 0.05
    room = start_room(lines_per_second=1)
    alex, bob = room.members("Alex", "Bob")
    alex.send("hi\n" * 1000)
    assert bob.lines(9) == ["Alex: hi"] * 9

    room.server.stop()
    for peer in (alex, bob):
        assert peer.rest() == [SHUTTING_DOWN]
        peer.close()
    room.stop()

    with pytest.raises(ConnectionRefusedError):
        room.connect()


@pytest.mark.parametrize("joins", [1, 50])
def test_who_joined_before_a_shutdown_is_announced_and_told_of_it(
    start_room: StartRoom, joins: int
) -> None:
    """Four threads join again and again; the server ends after so many joins."""
    room = start_room()
    (watcher,) = room.members("Watcher")
    enough = threading.Semaphore(0)
    names: list[str] = []
    last_lines: list[str] = []

    def keep_joining(seed: int) -> None:
        welcomed: list[Peer] = []
        # Who comes too late is reset, or finds EOF in place of a line.
        with suppress(ConnectionError, AssertionError):
            name = f"member-{seed}-0"
            while (peer := room.connect()).join(name).startswith("* Welcome, "):
                names.append(name)
                welcomed.append(peer)
                enough.release()
                name = f"member-{seed}-{len(welcomed)}"
        for peer in welcomed:
            last_lines.append(peer.rest()[-1])
            peer.close()

    with ThreadPoolExecutor(6) as pool:
        watching = pool.submit(watcher.rest)
        joining = [pool.submit(keep_joining, seed) for seed in range(4)]
        for _ in range(joins):
            assert enough.acquire(timeout=HANG_SECONDS)
        room.server.stop()
        *read, last = watching.result()
        watcher.close()
        for each in joining:
            each.result()

    assert sorted(read) == sorted(map(joined, names))
    assert {last, *last_lines} == {SHUTTING_DOWN}


# --- bugs: an exception that nobody expected ----------------------------------------


def bug(call: str, when: str, error: str = "MemoryError('no more')") -> str:
    """Return Python that has a call raise an error.

    when: an expression of its arguments, `args`, and of its number from 0, `number`.
    """
    return f"""
import itertools
call, numbers = {call}, itertools.count()
def broken(*args):
    number = next(numbers)
    if {when}:
        raise {error}
    return call(*args)
{call} = broken
"""


SENDING = bug("socket.socket.send", "b'boom' in args[1]")
WRITING = bug("os.write", "b'boom' in bytes(args[1])")
READING = bug("protocol.decode_message", "b'boom' in args[0]")


def assert_ended_by_a_bug(chat: ServerProcess, error: str) -> None:
    """Check that the server has ended in order, and has told why, once."""
    chat.close_peers()
    assert chat.wait() == 1
    errors = chat.end()
    assert errors.count("Traceback") == 1, errors
    assert errors.splitlines()[-1].startswith(error), errors


@pytest.mark.parametrize("patch", [SENDING, WRITING], ids=["sending", "terminal"])
def test_a_bug_in_sending_or_writing_ends_the_server_in_order(
    start_server: StartServer, patch: str
) -> None:
    chat = start_server(patch=patch)
    alex, bob = chat.members("Alex", "Bob")

    alex.say("boom")

    for peer in (alex, bob):
        assert {*peer.rest()} <= {"Alex: boom", SHUTTING_DOWN}
    assert_ended_by_a_bug(chat, "MemoryError: no more")
    again = start_server("--port", chat.address.rpartition(":")[2])
    assert again.address == chat.address


def test_a_bug_in_sending_hangs_nobody_who_waits(start_server: StartServer) -> None:
    """Neither for room in the outbox, nor for the last line to one that leaves."""
    patch = f"server.LEAVE_SECONDS = 60; server.SHUTDOWN_SECONDS = 0.1\n{SENDING}"
    chat = start_server("--rate", "0", "--quiet", patch=patch, small_buffers=True)
    alex, *writers = chat.members("Alex", "Writer1", "Writer2", "Writer3")
    chat.slow_member().send(b"\xff\n" * 1000 + b"q\n")
    alex.gather(left("Slow").__eq__)
    together = threading.Barrier(4)

    def write(writer: Peer) -> None:
        together.wait()
        with suppress(OSError):
            for _ in range(100):
                writer.send(("x" * 1000 + "\n") * 100)

    with ThreadPoolExecutor(4) as pool:
        for writer in writers:
            pool.submit(write, writer)
        together.wait()
        alex.say("boom")

        assert chat.wait() == 1
    assert "MemoryError: no more" in chat.end()


def test_a_bug_in_the_shutdown_does_not_hang_it(start_server: StartServer) -> None:
    chat = start_server(patch=bug("server._Broadcaster.close_outbox", "True"))
    chat.members("Alex", "Bob")

    chat.interrupt()

    assert_ended_by_a_bug(chat, "MemoryError: no more")


def test_a_bug_in_waking_the_broadcaster_ends_one_connection(
    start_server: StartServer,
) -> None:
    thread = "threading.current_thread()"
    first = f"vars({thread}).setdefault('first', number) == number"
    when = f"{thread}.name.startswith('Thread-1 ') and {first}"
    chat = start_server(patch=bug("server._Selector.wake", when))
    alex = chat.connect()

    alex.say("Alex")

    assert len(alex.rest()) <= 1  # its welcome
    assert_next(*chat.members("Bob", "Carol"))
    chat.stop()
    errors = chat.end()
    assert errors.count("Traceback") == 1
    assert "MemoryError: no more" in errors


def test_a_bug_in_accepting_ends_the_server(start_server: StartServer) -> None:
    error = "OSError(errno.EBADF, 'gone')"
    chat = start_server(patch=bug("socket.socket.accept", "number == 2", error))
    alex, bob = chat.members("Alex", "Bob")

    with suppress(ConnectionError):  # the server may be quicker to end than to answer
        chat.connect()

    for peer in (alex, bob):
        assert peer.rest() == [SHUTTING_DOWN]
    assert_ended_by_a_bug(chat, "OSError")


@pytest.mark.parametrize("joins", [True, False], ids=["member", "not joined"])
def test_a_bug_in_reading_ends_one_connection(
    start_server: StartServer, joins: bool
) -> None:
    chat = start_server(patch=READING)
    alex, bob = chat.members("Alex", "Bob")
    carol = chat.member("Carol", alex, bob) if joins else chat.connect()

    carol.say("boom")

    assert carol.rest() == []
    if joins:
        assert [alex.line(), bob.line()] == [left("Carol")] * 2
    assert_next(alex, bob)
    chat.member("Dora")
    chat.stop()  # in order, with status 0
    errors = chat.end()
    assert errors.count("Traceback") == 1
    assert "MemoryError: no more" in errors
