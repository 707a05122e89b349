"""The server's terminal: its start, and the lines that it shows."""

from __future__ import annotations

import ast
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import (
    HANG_SECONDS,
    PROJECT,
    SMALL_BUFFER,
    LineReader,
    Peer,
    Room,
    StartRoom,
    StartServer,
    assert_next,
    left,
    needs_linux,
    needs_proc,
    run_server,
    wait_until,
)

import server

# --- events -------------------------------------------------------------------------


def test_the_terminal_shows_one_line_for_each_event(start_server: StartServer) -> None:
    chat = start_server()
    alex = chat.connect()
    alex.join("Alex")
    alex.say("Hello everyone!")
    alex.say("q")
    alex.rest()

    assert chat.start_lines == [
        "Server is running...",
        f"Listening on {chat.address}",
    ]
    assert chat.output.lines(5) == [
        f"New connection from 127.0.0.1:{alex.port}",
        "User Alex has joined the chat.",
        "Received message from Alex: Hello everyone!",
        "Received message from Alex: q",
        "Removing user: Alex from clients",
    ]


def test_quiet_leaves_out_the_messages(start_server: StartServer) -> None:
    chat = start_server("--quiet")
    alex = chat.member("Alex")

    alex.send("hi\nq\n")
    alex.rest()

    assert chat.output.lines(3)[1:] == [
        "User Alex has joined the chat.",
        "Removing user: Alex from clients",
    ]


def test_the_terminal_gets_no_control_characters(start_server: StartServer) -> None:
    chat = start_server()
    alex = chat.member("Alex")
    assert len(chat.output.lines(2)) == 2

    alex.say("a\x1b[2J\r\u2028\u202e\x9b\tz")

    cleaned = "a\ufffd[2J\ufffd\ufffd\ufffd\ufffd    z"
    assert chat.output.line() == f"Received message from Alex: {cleaned}"


@pytest.mark.parametrize(
    ("joins", "act", "reason"),
    [
        (False, lambda peer: peer.say("a b"), "A name is made of letters"),
        (False, lambda peer: peer.send(b"\xff\n"), "not UTF-8"),
        (True, lambda peer: peer.send(b"\xff\n"), "not UTF-8"),
        (True, Peer.reset, "reset"),
    ],
    ids=["bad name", "bad bytes for a name", "bad line", "lost"],
)
def test_the_terminal_says_who_was_refused_or_lost_and_why(
    start_server: StartServer, joins: bool, act: Callable[[Peer], None], reason: str
) -> None:
    chat = start_server()
    peer = chat.member("Alex") if joins else chat.connect()
    assert len(chat.output.lines(1 + joins)) == 1 + joins

    act(peer)

    line = chat.output.line()
    assert f"127.0.0.1:{peer.port}" in line
    assert reason in line
    assert ("Alex" in line) is joins


def test_the_terminal_says_who_was_turned_away(start_server: StartServer) -> None:
    chat = start_server("--max-clients", "1")
    chat.member("Alex")

    bob = chat.connect()

    assert f"127.0.0.1:{bob.port}" in chat.output.until("full")[-1]


def test_the_terminal_says_who_was_too_slow(start_server: StartServer) -> None:
    chat = start_server("--rate", "0", "--quiet", small_buffers=True)
    alex, bob = chat.members("Alex", "Bob")
    slow = chat.member("Slow", receive_buffer=SMALL_BUFFER)
    line = bob.line()

    while line != left("Slow"):
        alex.say("x" * 4000)
        line = bob.line()

    line = chat.output.until("too slow")[-1]
    assert "Slow" in line
    assert f"127.0.0.1:{slow.port}" in line


def test_times_puts_date_and_time_before_each_line(start_server: StartServer) -> None:
    chat = start_server("--times", "--rate", "0")
    alex = chat.member("Alex")
    alex.send("one\ntwo\n")

    lines = chat.start_lines + chat.output.until("two")

    for line in lines:
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [A-Z]", line)
    assert len(lines) == 6


def test_the_terminal_has_the_order_of_the_room(start_room: StartRoom) -> None:
    """Of what many say at once, and of the joining and leaving of guests meanwhile."""
    told: list[str] = []
    room = start_room(
        lines_per_second=0, tell=lambda text: told.extend(text.split("\n"))
    )
    watcher, *speakers = room.members("Watcher", *[f"speaker{i}" for i in range(8)])

    def speak(speaker: Peer) -> None:
        for i in range(100):
            speaker.say(f"line {i}")
            if i % 10 == 0:
                room.member(f"guest-{speaker.name}-{i}").half_close()
        speaker.say("q")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(speak, speakers))
    order = watcher.lines(8 * (100 + 10 * 2 + 1))

    room.stop()
    events = {
        r"Received message from (\S+: line \d+)": r"\1",
        r"User (.+ has joined the chat\.)": r"* \1",
        r"Removing user: (\S+) from clients": r"* \1 has left the chat.",
    }
    shown = [
        re.sub(event, line, text)
        for text in told
        for event, line in events.items()
        if re.fullmatch(event, text)
    ]
    assert shown[9 : 9 + len(order)] == order


# --- a terminal that cannot keep up -------------------------------------------------


def test_a_name_that_the_terminal_cannot_show_stops_nothing(
    start_server: StartServer,
) -> None:
    chat = start_server(limits="export PYTHONIOENCODING=ascii PYTHONUTF8=0")

    alex, zoe = chat.members("Alex", "Zoé")

    assert "joined" in chat.output.until("Zo")[-1]
    assert_next(zoe, alex)


def test_a_terminal_that_stops_reading_does_not_stop_the_chat(
    start_server: StartServer,
) -> None:
    """What was left out is told, and nothing is left out silently."""
    chat = start_server("--rate", "0")
    alex, bob = chat.members("Alex", "Bob")
    assert len(chat.output.lines(4)) == 4
    text = "as long as a line is that people write"
    said = 15_000

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(alex.send, f"{text}\n" * said)
        assert bob.lines(said) == [f"Alex: {text}"] * said
        sending.result()

        # Now somebody reads it.  Say more until something fits again.
        reading = pool.submit(chat.output.until, "left out")
        while not reading.done():
            alex.say(text)
            said += 1
            assert bob.line() == f"Alex: {text}"
    alex.say("last")
    lines = reading.result() + chat.output.until("last")

    shown = lines.count(f"Received message from Alex: {text}")
    counts = [re.search(r"\d+(?= lines? left out)", line) for line in lines]
    assert shown + sum(int(count[0]) for count in counts if count) == said
    # What one recv() gave is shown together or left out together.
    assert shown > 10_000 - 4096 // len(text)


@pytest.mark.parametrize("lines", [9_999, 10_000, 10_001, 10_003])
def test_up_to_ten_thousand_lines_wait_for_the_terminal(
    monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writing, b"\n" * 4096)
    os.set_blocking(writing, True)
    output = LineReader(reading)
    with open(writing, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        terminal = server.Terminal()

        for i in range(lines):
            terminal.tell(f"line {i}")
        shown = output.until(f"line {min(lines, 10_000) - 1}")
        terminal.close(HANG_SECONDS)
    after = output.rest()

    os.close(reading)
    assert [line for line in shown if line] == [
        f"line {i}" for i in range(min(lines, 10_000))
    ]
    assert re.findall(r"\d+", "".join(after)) == (
        [str(lines - 10_000)] if lines > 10_000 else []
    )


@needs_proc
def test_an_idle_server_uses_no_cpu(start_server: StartServer) -> None:
    chat = start_server()
    members = chat.members("Alex", "Bob", "Carol")
    chat.connect()
    before = chat.cpu_seconds()

    assert select.select([peer.socket for peer in members], [], [], 0.5)[0] == []

    assert chat.cpu_seconds() - before < 0.03


# --- the start ----------------------------------------------------------------------


ONE_LINE = r"server\.py: [^\n]+\n"


@pytest.mark.parametrize(
    "flags",
    [
        *(["--prot", "1"], ["--port"], ["--port", "x"], ["--port", "-1"]),
        *(["--port", "65536"], ["--max-clients", "0"], ["--max-clients", "1000001"]),
        *(["--rate", "-1"], ["--rate", "1.5"], ["--rate", "1000001"]),
        *(["--quiet=1"], ["extra"]),
    ],
    ids=" ".join,
)
def test_a_bad_flag_is_explained_in_one_line(flags: list[str]) -> None:
    run = run_server(*flags)

    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(ONE_LINE, run.stderr)
    assert "--help" in run.stderr


def test_a_taken_port_is_explained_in_one_line(room: Room) -> None:
    port = room.address.rpartition(":")[2]

    run = run_server("--port", port)

    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(ONE_LINE, run.stderr)
    assert re.search(rf"{port}.+in use.+--port\b", run.stderr)


@pytest.mark.parametrize(
    "host", ["no-such-host.invalid", "a..b", "192.0.2.1", "", "x y", "é" * 70, "[::1"]
)
def test_an_unknown_host_is_explained_in_one_line(host: str) -> None:
    run = run_server("--host", host, "--port", "0")

    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(ONE_LINE, run.stderr)
    assert f"'{host}'" in run.stderr
    assert "--host" in run.stderr.rpartition("'")[2]


@needs_linux
def test_too_few_descriptors_to_listen_are_explained_in_one_line() -> None:
    run = run_server("--port", "0", limits="ulimit -n 9")

    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(ONE_LINE, run.stderr)
    assert "ulimit -n" in run.stderr


@needs_linux
def test_few_descriptors_do_for_few_members(start_server: StartServer) -> None:
    chat = start_server(limits="ulimit -n 14")

    alex, bob = chat.members("Alex", "Bob")

    assert_next(alex, bob)


def test_the_server_runs_without_a_stdout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "server.py", "--port", str(port)]
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command],
        cwd=PROJECT,
        stderr=subprocess.PIPE,
        text=True,
    )

    def is_listening() -> bool:
        with socket.socket() as peer:
            return peer.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(is_listening)
    finally:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=HANG_SECONDS)[1]
    assert (process.returncode, errors) == (0, "")


_RUN = """
import os, runpy, signal, sys
{}
sys.argv = ["server.py", "--port", "0"]
runpy.run_path("server.py", run_name="__main__")
"""
_INTERRUPTED_BY_IMPORT = """
class Finder:
    def find_spec(name, *_):
        if name == {!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("module", ["argparse", "selectors", "socket", "protocol"])
def test_an_interrupt_while_python_still_imports_ends_the_server_without_a_word(
    module: str,
) -> None:
    patch = _INTERRUPTED_BY_IMPORT.format(module)

    run = run_server(program=["-c", _RUN.format(patch)])

    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 10, 14)], ids=str)
def test_an_older_python_is_told_what_is_needed(version: tuple[int, int, int]) -> None:
    patch = f"sys.version_info = {version}"

    run = run_server(program=["-c", _RUN.format(patch)])

    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(ONE_LINE, run.stderr)
    assert "3.11" in run.stderr
    source = (PROJECT / "server.py").read_text()
    assert ast.parse(source, feature_version=version[:2])  # it comes to say so


def test_help_explains_every_flag_with_its_default() -> None:
    run = run_server("--help")

    assert run.returncode == 0
    assert run.stderr == ""
    text = " ".join(run.stdout.split())
    for flag, default in (
        ("--host", "127.0.0.1"),
        ("--port", "12345"),
        ("--max-clients", "1000"),
        ("--rate", "100"),
        ("--quiet", "False"),
        ("--times", "False"),
    ):
        explained = text.rpartition(f" {flag} ")[2]
        assert re.match(rf"[^()]+\(default: {re.escape(default)}\)", explained), flag


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_the_server_listens_on_an_ipv6_address(
    start_server: StartServer, host: str
) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    chat = start_server("--host", host)

    assert re.fullmatch(r"\[::1\]:\d+", chat.address)
    alex, bob = chat.members("Alex", "Bob")
    assert_next(alex, bob)
    assert chat.output.line() == f"New connection from [::1]:{alex.port}"


def test_the_server_listens_on_a_name(start_server: StartServer) -> None:
    chat = start_server("--host", "localhost")

    alex, bob = chat.members("Alex", "Bob")

    assert_next(alex, bob)
