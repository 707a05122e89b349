"""The server's terminal: its start, and the lines that it shows."""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from helpers import (
    HANG_SECONDS,
    PROJECT,
    LineReader,
    Peer,
    Room,
    StartServer,
    assert_next,
    explanations,
    needs_linux,
    run_server,
    wait_until,
)

import server

# --- events -------------------------------------------------------------------------

# What three people do, and the lines that it gives: the address of a connection is {0}
# to {2}.
EVENTS = """
New connection from {0}
User Alex has joined the chat.
Received message from Alex: Hello everyone!
Received message from Alex: a\ufffd[2J\ufffd\ufffd\ufffd\ufffd    z
Private message from Alex to Alex
Refused a line from Alex ({0}): That line is not UTF-8.
New connection from {1}
Refused a line from {1}: A name is made of letters, digits, "_", "-" and ".".
Refused a line from {1}: That line is not UTF-8.
User Bob has joined the chat.
Private message from Bob to Alex
Disconnected {2}: The chat is full, please try again later.
Lost connection to Bob ({1}): Connection reset by peer
Removing user: Bob from clients
Received message from Alex: q
Removing user: Alex from clients
"""


@pytest.mark.parametrize("flag", ["--rate=100", "--quiet", "--times"])
def test_the_terminal_shows_one_line_for_each_event(
    start_server: StartServer, flag: str
) -> None:
    """Cleaned; with --quiet not what is said, with --times date and time before each."""
    chat = start_server("--max-clients", "2", flag)
    alex = chat.member("Alex")
    alex.say("Hello everyone!\na\x1b[2J\r\u2028\u202e\x9b\tz\n/msg alex done")
    assert alex.line() == "Alex (private): done"
    alex.send(b"\xff\n")
    assert alex.line().startswith("! ")
    bob = chat.connect()
    bob.send(b"a b\n\xff\nBob\n/msg alex secret\n")
    alex.gather("Bob (private): secret".__eq__)
    carol = chat.connect()
    assert "full" in carol.line()
    assert carol.rest() == []
    bob.lines(3)
    bob.reset()
    assert alex.line() == "* Bob has left the chat."
    alex.say("q")
    alex.rest()

    addresses = [f"127.0.0.1:{peer.port}" for peer in (alex, bob, carol)]
    expected = EVENTS.format(*addresses).strip().split("\n")
    if flag == "--quiet":
        expected = [line for line in expected if "Received message" not in line]
    shown = chat.start_lines + chat.output.lines(len(expected))
    if flag == "--times":
        stamps = [re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in shown]
        shown = [line[len(s[0]) :] for s, line in zip(stamps, shown, strict=True) if s]
    start = ["Server is running...", f"Listening on {chat.address}"]
    assert shown == start + expected
    assert chat.stop() == []


# --- a terminal that cannot keep up -------------------------------------------------


def test_a_name_that_cannot_be_shown_stops_nothing(start_server: StartServer) -> None:
    chat = start_server(limits="export PYTHONIOENCODING=ascii PYTHONUTF8=0")

    alex, zoe = chat.members("Alex", "Zoé")

    assert "joined" in chat.output.until("Zo")[-1]
    assert_next(zoe, alex)


def test_a_stuck_terminal_does_not_stop_the_chat(start_server: StartServer) -> None:
    """What was left out is told, and nothing is left out silently."""
    chat = start_server("--rate", "0", patch="server.LAST_SECONDS = 10")
    alex, bob = chat.members("Alex", "Bob")
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
    lines = reading.result() + chat.stop()

    shown = lines.count(f"Received message from Alex: {text}")
    counts = [re.search(r"\d+(?= lines? left out)", line) for line in lines]
    assert shown + sum(int(count[0]) for count in counts if count) == said
    assert shown > 9_990  # beside what else the terminal shows


@pytest.mark.parametrize("lines", [9_999, 10_000, 10_001])
def test_up_to_ten_thousand_lines_wait_for_the_terminal(
    monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writing, b"\n" * 4096)
    os.set_blocking(writing, True)
    with ThreadPoolExecutor(1) as pool, open(writing, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(server, "LAST_SECONDS", HANG_SECONDS)  # instead of 0.3
        terminal = server.Terminal()

        for i in range(lines):
            terminal.tell(f"line {i}")
        output = pool.submit(LineReader(reading).rest)
        terminal.close()

    os.close(reading)
    expected = [f"line {i}" for i in range(min(lines, 10_000))]
    shown = [line for line in output.result() if line]
    assert shown == expected + ["(1 lines left out)"] * (lines > 10_000)


# --- the start ----------------------------------------------------------------------


def test_a_bad_flag_is_explained_in_one_line() -> None:
    lines = (
        *("--prot 1", "--port", "--port x", "--port -1", "--port 65536", "--quiet=1"),
        *("--max-clients 0", "--max-clients 1000001", "--rate -1", "--rate 1000001"),
        *("--rate 1.5", "extra"),
    )
    flags = [line.split() for line in lines]
    for (flag, *_), line in zip(flags, explanations(2, *flags), strict=True):
        assert flag.partition("=")[0] in line
        assert "--help" in line


def test_an_unknown_host_is_explained_in_one_line() -> None:
    hosts = ["no-such-host.invalid", "a..b", "192.0.2.1", "", "x y", "é" * 70]
    flags = [["--host", host, "--port", "0"] for host in hosts]
    for host, line in zip(hosts, explanations(1, *flags), strict=True):
        assert f"'{host}'" in line
        assert "--host" in line.rpartition("'")[2]


def test_a_taken_port_is_explained_in_one_line(room: Room) -> None:
    port = room.address.rpartition(":")[2]

    (line,) = explanations(1, ["--port", port])

    assert re.search(rf"{port}.+in use.+--port\b", line)


@needs_linux
def test_too_few_descriptors_to_listen_are_explained_in_one_line() -> None:
    (line,) = explanations(1, ["--port", "0"], limits="ulimit -n 9")

    assert "ulimit -n" in line


def test_the_server_runs_without_a_stdout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "server.py", "--port", f"{port}"],
        cwd=PROJECT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def can_be_joined() -> bool:
        try:
            peer = Peer(f"127.0.0.1:{port}")
        except ConnectionRefusedError:
            return False
        with closing(peer):
            return peer.join("Alex") != ""

    try:
        wait_until(can_be_joined)
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


@pytest.mark.parametrize("module", ["argparse", "protocol"])
def test_an_interrupt_while_python_imports_ends_without_a_word(module: str) -> None:
    patch = _INTERRUPTED_BY_IMPORT.format(module)

    run = run_server(program=["-c", _RUN.format(patch)])

    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", "")


def test_an_older_python_is_told_what_is_needed() -> None:
    run = run_server(program=["-c", _RUN.format("sys.version_info = (3, 10, 14)")])

    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(r"server\.py: [^\n]+\n", run.stderr)
    assert "3.11" in run.stderr
    source = (PROJECT / "server.py").read_text()
    assert ast.parse(source, feature_version=(3, 10))  # it comes to say so


def test_help_explains_every_flag_with_its_default() -> None:
    run = run_server("--help")

    assert run.returncode == 0
    assert run.stderr == ""
    text = " ".join(run.stdout.split())
    defaults = {"host": "127.0.0.1", "port": "12345", "max-clients": "1000"}
    defaults |= {"rate": "100", "quiet": "False", "times": "False"}
    for flag, default in defaults.items():
        explained = text.rpartition(f" --{flag} ")[2]
        assert re.match(rf"[^()]+\(default: {re.escape(default)}\)", explained), flag


@pytest.mark.parametrize("host", ["::1", "[::1]", "localhost"])
def test_the_server_listens_on_a_name_and_on_an_ipv6_address(
    start_server: StartServer, host: str
) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    chat = start_server("--host", host)

    alex, bob = chat.members("Alex", "Bob")

    assert_next(alex, bob)
    address = chat.address.rpartition(":")[0]
    assert address == "[::1]" or (host, address) == ("localhost", "127.0.0.1")
    assert chat.output.line() == f"New connection from {address}:{alex.port}"
