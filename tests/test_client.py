"""The real client, in pipes and on a terminal, with honest and other servers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import (
    HANG_SECONDS,
    PROJECT,
    SMALL_BUFFER,
    LineReader,
    Peer,
    Room,
    ServerProcess,
    split_address,
)
from terminal import Terminal

import client

MENU = ["1. Join the chat", "q. Leave the chat", "2. Exit the program"]
START = ["Connected to server.", *MENU]
NAMED = ["Enter your choice: 1", "Enter your username: Alex"]
JOINING = [*START, *NAMED, "Joining the chat as Alex..."]
LEFT = ["Leaving the chat...", "Connection closed."]
FULL = "The chat is full, please try again later."
EXITED = ["Exiting the program.", "Connection closed."]

ENTER, ESCAPE, BACKSPACE = "\r", "\x1b", "\x7f"
CTRL_A, CTRL_C, CTRL_D, CTRL_L, CTRL_Z = "\x01", "\x03", "\x04", "\x0c", "\x1a"
ARROW_UP, ARROW_DOWN = "\x1b[A", "\x1b[B"
ARROW_RIGHT, ARROW_LEFT = "\x1b[C", "\x1b[D"


# --- who takes part -----------------------------------------------------------------


class Caller(Peer):
    """A client that has called the test's own server."""

    def __init__(self, accepted: socket.socket) -> None:
        accepted.settimeout(HANG_SECONDS)
        self.name = ""
        self.socket = accepted
        self._lines: deque[bytes] = deque()
        self._tail = b""


class Puppet:
    """A server that does what the test says, and nothing else."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Accepted sockets inherit it: little is on its way unread.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        self._listener.settimeout(HANG_SECONDS)
        self._callers: list[Caller] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def accept(self) -> Caller:
        """Take the next connection."""
        caller = Caller(self._listener.accept()[0])
        self._callers.append(caller)
        return caller

    def welcome(self) -> Caller:
        """Take the next connection, and whatever name comes first."""
        caller = self.accept()
        caller.name = caller.line()
        caller.say(f"* Welcome, {caller.name}!")
        return caller

    def close(self) -> None:
        """Take no more connections, and end those there are; again does nothing."""
        self._listener.close()
        for caller in self._callers:
            caller.close()


@pytest.fixture
def puppet(no_leaks: None) -> Iterator[Puppet]:
    """A server that does what the test says."""
    server = Puppet()
    yield server
    server.close()


PROGRAM = [str(PROJECT / "client.py")]


def changed(change: str) -> list[str]:
    """Return the program with a change: a line of Python that is run before it."""
    path = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); import client"
    return ["-c", f"{path}\n{change}\nsys.exit(client.client_program())"]


def impatient(seconds: float) -> list[str]:
    """Return the program, but that a server that hangs holds it up for less long."""
    return changed(f"client.LEAVE_SECONDS = {seconds}")


SMALL_SEND_BUFFER = f"""
client.LEAVE_SECONDS = 0.5
connect = client.socket.create_connection
def connect_small(*address):
    connection = connect(*address)
    connection.setsockopt(client.socket.SOL_SOCKET, client.socket.SO_SNDBUF, {SMALL_BUFFER})
    return connection
client.socket.create_connection = connect_small
"""


def command(address: str, program: list[str] = PROGRAM) -> list[str]:
    """Return what starts the client."""
    host, port = split_address(address)
    return [sys.executable, *program, "--host", host, "--port", str(port)]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a person who has not set anything special."""
    inherited = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    return {**inherited, "TERM": "xterm-256color", "PYTHONUTF8": "1", **variables}


# --- the client in pipes ------------------------------------------------------------


def run_client(address: str, typed: str | bytes) -> tuple[int, list[str]]:
    """Run the client with this as its whole input; return exit status and output."""
    run = subprocess.run(
        command(address),
        check=False,
        env=environment(),
        input=typed.encode() if isinstance(typed, str) else typed,
        capture_output=True,
        timeout=HANG_SECONDS,
    )
    assert run.stderr == b""
    assert run.stdout.endswith(b"\n")
    return run.returncode, run.stdout.decode().removesuffix("\n").split("\n")


class PipedClient:
    """A client in pipes, whose input comes bit by bit."""

    def __init__(self, address: str, program: list[str] = PROGRAM) -> None:
        self.process = subprocess.Popen(
            command(address, program),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout
        self.output = LineReader(self.process.stdout.fileno())

    def write(self, text: str) -> None:
        """Write to its input."""
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def end_input(self) -> None:
        """Write no more."""
        assert self.process.stdin
        self.process.stdin.close()

    def end(self) -> tuple[int, list[str]]:
        """Return exit status and the rest of the output, once it has ended."""
        rest = self.output.rest()
        return self.process.wait(HANG_SECONDS), rest

    def close(self) -> None:
        """Kill it if it still runs; nothing may be on its stderr."""
        self.process.kill()
        with self.process:
            assert self.process.stderr
            errors = self.process.stderr.read()
        assert errors == b""


StartPiped = Callable[..., PipedClient]


@pytest.fixture
def start_piped(no_leaks: None) -> Iterator[StartPiped]:
    """Start clients in pipes; on leaving they are killed."""
    clients: list[PipedClient] = []

    def start(address: str, program: list[str] = PROGRAM) -> PipedClient:
        clients.append(PipedClient(address, program))
        return clients[-1]

    yield start
    for piped in clients:
        piped.close()


def test_piped_session_reads_like_one_at_a_terminal(room: Room) -> None:
    bob = room.member("Bob")

    status, output = run_client(room.address, "1\nAlex\nHello everyone!\nq\n")

    assert output == [
        "Connected to server.",
        "1. Join the chat",
        "q. Leave the chat",
        "2. Exit the program",
        "Enter your choice: 1",
        "Enter your username: Alex",
        "Joining the chat as Alex...",
        "* Welcome, Alex! /help lists the commands. Also online: Bob.",
        "You: Hello everyone!",
        "You: q",
        "Leaving the chat...",
        "Connection closed.",
    ]
    assert status == 0
    assert bob.lines(3) == [
        "* Alex has joined the chat.",
        "Alex: Hello everyone!",
        "* Alex has left the chat.",
    ]


@pytest.mark.parametrize(
    ("typed", "answers", "goodbye", "status"),
    [
        ("q\n", ["Enter your choice: q"], LEFT, 0),
        (" Q \n", ["Enter your choice:  Q "], LEFT, 0),
        ("2\n", ["Enter your choice: 2"], EXITED, 0),
        ("\t2 \n", ["Enter your choice:     2 "], EXITED, 0),
        ("q", ["Enter your choice: q"], LEFT, 0),
        ("", [], LEFT, 0),
        ("1\nq\n", ["Enter your choice: 1", "Enter your username: q"], LEFT, 1),
        (" 1\n Q\n", ["Enter your choice:  1", "Enter your username:  Q"], LEFT, 1),
        ("1\n", ["Enter your choice: 1"], LEFT, 1),
    ],
)
def test_pipe_that_leaves_before_the_chat_has_failed_if_it_was_to_join(
    room: Room, typed: str, answers: list[str], goodbye: list[str], status: int
) -> None:
    assert run_client(room.address, typed) == (status, [*START, *answers, *goodbye])


def test_pipe_whose_names_are_all_refused_has_status_1(room: Room) -> None:
    status, output = run_client(room.address, "1\n?\n")

    assert output[-2:] == LEFT
    assert status == 1


def test_pipe_that_ends_before_the_server_has_answered_leaves(
    puppet: Puppet, start_piped: StartPiped
) -> None:
    piped = start_piped(puppet.address, impatient(0.1))

    piped.write("1\nAlex\n")
    piped.end_input()

    assert piped.end() == (1, [*JOINING, *LEFT])


@pytest.mark.parametrize("other", ["3", "", "12", "join", "1 1", "ｑ"])
def test_another_choice_gets_one_line_and_the_menu_again(
    room: Room, other: str
) -> None:
    status, output = run_client(room.address, f"{other}\nq\n")

    again = output.pop(len(START) + 1)
    assert all(choice in again for choice in "1q2")
    assert output == [
        *START,
        f"Enter your choice: {other}",
        *MENU,
        "Enter your choice: q",
        *LEFT,
    ]
    assert status == 0


@pytest.mark.parametrize("choice", ["q", "2"])
def test_leaving_from_the_menu_has_status_0_when_the_server_is_gone(
    puppet: Puppet, start_piped: StartPiped, choice: str
) -> None:
    piped = start_piped(puppet.address)
    piped.output.lines(len(START))
    puppet.accept().reset()
    puppet.close()

    piped.write(f"{choice}\n")

    goodbye = LEFT if choice == "q" else EXITED
    assert piped.end() == (0, [f"Enter your choice: {choice}", *goodbye])


def test_end_of_piped_input_leaves_and_all_is_delivered(room: Room) -> None:
    bob = room.member("Bob")

    status, output = run_client(room.address, "1\nAlex\nHello everyone!\n")

    assert output[-3:] == ["You: Hello everyone!", *LEFT]
    assert status == 0
    assert bob.lines(3)[1:] == ["Alex: Hello everyone!", "* Alex has left the chat."]


def test_last_piped_line_without_newline_counts(room: Room) -> None:
    bob = room.member("Bob")

    status, output = run_client(room.address, "1\nAlex\nHello")

    assert output[-3:] == ["You: Hello", *LEFT]
    assert status == 0
    assert bob.lines(3)[1:] == ["Alex: Hello", "* Alex has left the chat."]


@pytest.mark.parametrize("quit_line", ["q", "Q", " q "])
def test_q_leaves_the_chat_and_nothing_after_it_is_sent(
    room: Room, quit_line: str
) -> None:
    bob = room.member("Bob")

    status, output = run_client(room.address, f"1\nAlex\n{quit_line}\nafter\n")

    assert output[-3:] == [f"You: {quit_line}", *LEFT]
    assert status == 0
    assert bob.lines(2)[1:] == ["* Alex has left the chat."]


def test_prompt_in_a_pipe_appears_only_with_its_answer(
    room: Room, start_piped: StartPiped
) -> None:
    """So what others write stays on lines of its own."""
    bob = room.member("Bob")
    piped = start_piped(room.address)
    piped.write("1\nAlex\n")
    piped.output.until("* Welcome")

    bob.say("Hi!")
    assert piped.output.line() == "Bob: Hi!"
    piped.write("Hello")
    bob.say("Hi?")
    assert piped.output.line() == "Bob: Hi?"
    piped.write(" Bob!\nq\n")

    assert piped.end() == (0, ["You: Hello Bob!", "You: q", *LEFT])


def test_piped_lines_reach_a_server_that_reads_slowly(
    puppet: Puppet, start_piped: StartPiped, tmp_path: Path
) -> None:
    said = [f"line {number} {'x' * 1000}" for number in range(8000)]
    everything = tmp_path / "everything"
    everything.write_text("\n".join(["1", "Alex", *said, ""]))
    with everything.open() as keyboard, (tmp_path / "out").open("w") as screen:
        process = subprocess.Popen(
            command(puppet.address), env=environment(), stdin=keyboard, stdout=screen
        )
    caller = puppet.welcome()

    heard = caller.rest()

    caller.close()
    assert process.wait(HANG_SECONDS) == 0
    assert heard == [*said, "q"]  # the end of its input leaves as q does


def test_piped_client_stays_until_the_server_has_had_its_say(
    puppet: Puppet, start_piped: StartPiped
) -> None:
    """Closing earlier could reset the connection, and cost the server lines unread."""
    piped = start_piped(puppet.address, impatient(0.0))
    piped.write("1\nAlex\nHello everyone!\nq\n")
    caller = puppet.welcome()
    piped.output.until("Leaving the chat...")
    assert caller.rest() == ["Hello everyone!", "q"]

    with pytest.raises(subprocess.TimeoutExpired):
        piped.process.wait(0.2)
    caller.say("* Still here.")
    caller.close()

    assert piped.end() == (0, ["* Still here.", "Connection closed."])


def test_interrupted_piped_client_leaves_with_status_130(
    room: Room, start_piped: StartPiped
) -> None:
    bob = room.member("Bob")
    piped = start_piped(room.address)
    piped.write("1\nAlex\n")
    piped.output.until("* Welcome")

    piped.process.send_signal(signal.SIGINT)

    assert piped.end() == (130, LEFT)
    assert bob.lines(2)[1:] == ["* Alex has left the chat."]


@pytest.mark.parametrize("moment", ["Enter your choice", "Joining", "* Welcome"])
def test_two_interrupts_at_once_end_a_piped_client_with_status_130(
    room: Room, start_piped: StartPiped, moment: str
) -> None:
    """Neither a traceback nor a receiver that nobody wakes, wherever they come.

    The second one may end it before it has said goodbye.
    """
    piped = start_piped(room.address)
    piped.write("1\nAlex\n")
    piped.output.until(moment)

    piped.process.send_signal(signal.SIGINT)
    piped.process.send_signal(signal.SIGINT)

    assert piped.end()[0] == 130


def test_piped_client_ends_by_itself_when_the_server_does(
    room: Room, start_piped: StartPiped
) -> None:
    piped = start_piped(room.address)
    piped.write("1\nAlex\n")
    piped.output.until("* Welcome")

    room.stop()

    assert piped.end() == (
        1,
        [
            "* Server is shutting down.",
            "Connection lost: the server closed the connection.",
        ],
    )


def test_refused_lines_do_not_touch_the_lines_around_them(room: Room) -> None:
    """What is not UTF-8, and what is too long, however long."""
    bob = room.member("Bob")
    refused = [b"\xff\xfe", b"x" * 4097, b"x" * 1_000_000, b"\xc3"]
    typed = b"\n".join([b"1", b"Alex", b"before", *refused, b"after", b"q"])

    status, output = run_client(room.address, typed)

    assert status == 0
    assert bob.lines(3)[1:] == ["Alex: before", "Alex: after"]
    refusals = sorted(line for line in output if line.startswith("!"))
    assert refusals == [
        *["! That line is longer than 4096 bytes."] * 2,
        *["! That line is not UTF-8."] * 2,
    ]


# --- names, and servers that end a connection ---------------------------------------


def test_refused_name_gets_the_reason_and_is_asked_for_again(room: Room) -> None:
    room.member("Bob")

    status, output = run_client(room.address, "1\nBob\n\n\tAlex \nq\n")

    assert status == 0
    blank = output.pop(9)
    assert "name" in blank
    assert output == [
        *START,
        "Enter your choice: 1",
        "Enter your username: Bob",
        "Joining the chat as Bob...",
        "! The name Bob is taken.",
        "Enter your username: ",
        "Enter your username:     Alex ",
        "Joining the chat as Alex...",
        "* Welcome, Alex! /help lists the commands. Also online: Bob.",
        "You: q",
        *LEFT,
    ]


def test_client_connects_again_after_the_last_refused_name(room: Room) -> None:
    """The server closes the connection after five."""
    status, output = run_client(room.address, "1\n" + "?\n" * 5 + "Alex\nq\n")

    assert status == 0
    assert sum(line.startswith("! ") for line in output) == 5
    assert output[-4:] == [
        "* Welcome, Alex! /help lists the commands. Also online: nobody yet.",
        "You: q",
        *LEFT,
    ]


def end_quietly(caller: Caller) -> None:
    """End a connection with a FIN."""
    caller.close()


def end_with_a_reset(caller: Caller) -> None:
    """End a connection with a RST."""
    caller.reset()


def end_with_a_reason(caller: Caller) -> None:
    """End a connection as the server does when nobody joins."""
    caller.say("! You have not joined within 120 seconds.")
    caller.close()


ENDINGS = pytest.mark.parametrize(
    "end", [end_quietly, end_with_a_reset, end_with_a_reason]
)


@ENDINGS
def test_connection_that_ended_at_the_menu_is_made_again(
    puppet: Puppet, start_piped: StartPiped, end: Callable[[Caller], None]
) -> None:
    piped = start_piped(puppet.address)
    piped.output.lines(len(START))
    end(puppet.accept())

    piped.write("1\nAlex\nHello\nq\n")

    caller = puppet.welcome()
    assert caller.name == "Alex"
    assert caller.lines(2) == ["Hello", "q"]
    caller.close()
    welcome = "* Welcome, Alex!"
    assert sorted(piped.end()[1]) == sorted(
        [*NAMED, JOINING[-1], welcome, "You: Hello", "You: q", *LEFT]
    )


@ENDINGS
def test_server_that_cannot_be_reached_again_from_the_menu_ends_the_client(
    puppet: Puppet, start_piped: StartPiped, end: Callable[[Caller], None]
) -> None:
    piped = start_piped(puppet.address)
    piped.output.lines(len(START))
    end(puppet.accept())
    puppet.close()

    piped.write("1\n")

    lost = "Connection lost: Connection refused."
    assert piped.end() == (1, ["Enter your choice: 1", lost])


def test_full_server_says_so_once_1_was_chosen(
    puppet: Puppet, start_piped: StartPiped
) -> None:
    piped = start_piped(puppet.address)
    assert piped.output.lines(len(START)) == START
    caller = puppet.accept()
    caller.say(f"! {FULL}")
    caller.close()

    piped.write("1\n")

    assert piped.end() == (1, ["Enter your choice: 1", f"! {FULL}"])


def test_refused_name_with_full_in_it_is_asked_for_again(
    start_room: Callable[..., Room],
) -> None:
    room = start_room()
    room.member("Full")

    status, output = run_client(room.address, "1\nfull\nAlex\nq\n")

    assert status == 0
    assert "! The name full is taken." in output
    assert "Joining the chat as Alex..." in output


def test_five_refusals_of_a_name_with_full_in_it_lead_to_a_new_connection(
    start_room: Callable[..., Room],
) -> None:
    room = start_room()
    room.member("Fuller")

    status, output = run_client(room.address, "1\n" + "fuller\n" * 5 + "Alex\nq\n")

    assert status == 0
    assert output[-3:] == ["You: q", *LEFT]


def test_line_that_cleaning_makes_longer_is_not_too_long(
    start_room: Callable[..., Room],
) -> None:
    room = start_room()
    bob = room.member("Bob")

    run_client(room.address, "1\nAlex\n" + "\t" * 2000 + "x\nq\n")

    assert bob.gather(lambda line: ":" in line) == "Alex: " + " " * 8000 + "x"


def test_real_server_that_is_full_ends_the_client(
    start_room: Callable[..., Room],
) -> None:
    room = start_room(max_clients=1)
    room.member("Bob")

    status, output = run_client(room.address, "1\nAlex\nHello\n")

    assert status == 1
    assert output[-1] == f"! {FULL}"


@pytest.mark.parametrize("choice", ["q", "2"])
def test_leaving_from_the_menu_of_a_full_server_has_status_0(
    start_room: Callable[..., Room], choice: str
) -> None:
    room = start_room(max_clients=1)
    room.member("Bob")

    status, output = run_client(room.address, f"{choice}\n")

    assert status == 0
    goodbye = LEFT if choice == "q" else EXITED
    assert output == [*START, f"Enter your choice: {choice}", *goodbye]


# --- what servers send --------------------------------------------------------------


@pytest.fixture
def joined(puppet: Puppet, start_piped: StartPiped) -> tuple[Caller, PipedClient]:
    """A client in pipes that has joined, and the server's end of its connection."""
    piped = start_piped(puppet.address)
    piped.write("1\nAlex\n")
    caller = puppet.welcome()
    piped.output.until("* Welcome")
    return caller, piped


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"Bob: \x1b[2J\x1b]0;title\x07Hi", "Bob: \ufffd[2J\ufffd]0;title\ufffdHi"),
        (b"B\x1bob: \xc2\x9b31m\x7f\b", "B\ufffdob: \ufffd31m\ufffd\ufffd"),
        (b"* \x1b[31mred\x1b[m", "* \ufffd[31mred\ufffd[m"),
        (b"! \x1bc", "! \ufffdc"),
        (b"\x1bc", "\ufffdc"),
        (b"Bob: a\rb", "Bob: a\ufffdb"),
        (b"Bob: a\tb", "Bob: a    b"),
        ("Bob: \u202eiH\u2028".encode(), "Bob: \ufffdiH\ufffd"),
        (b"Bob: \xff\xc3", "Bob: \ufffd\ufffd"),
        ("Bob: 👩\u200d👩\u200d👧 é ｑ".encode(), "Bob: 👩\u200d👩\u200d👧 é ｑ"),
        (b"", ""),
        (b"neither a notice nor a message", "neither a notice nor a message"),
    ],
)
def test_line_from_the_server_is_cleaned_before_it_is_shown(
    joined: tuple[Caller, PipedClient], line: bytes, shown: str
) -> None:
    caller, piped = joined

    caller.send(line + b"\n")

    assert piped.output.line() == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x" * 32_762, "x" * 32_762),
        ("x" * 32_763, "x" * 32_763),
        ("x" * 32_763 + "\r", "x" * 32_763),
        ("x" * 32_764, "x" * 32_763 + "…"),
        ("x" * 32_764 + "\r", "x" * 32_763 + "…"),
        ("é" * 16_382, "é" * 16_381 + "…"),
        ("x" * 3_000_000, "x" * 32_763 + "…"),
    ],
    ids=["below", "at", "at, CR LF", "above", "above, CR LF", "in a character", "far"],
)
def test_line_from_the_server_is_cut_at_32_kibibytes(
    joined: tuple[Caller, PipedClient], text: str, shown: str
) -> None:
    caller, piped = joined

    caller.send(f"Bob: {text}\nBob: next\n")

    assert piped.output.lines(2) == [f"Bob: {shown}", "Bob: next"]


def test_beginning_of_an_endless_line_is_shown_before_its_end(
    joined: tuple[Caller, PipedClient],
) -> None:
    caller, piped = joined

    caller.send("x" * 40_000)

    assert piped.output.line() == "x" * 32_768 + "…"


def test_lines_in_pieces_are_shown_whole(joined: tuple[Caller, PipedClient]) -> None:
    caller, piped = joined

    caller.send(b"Bob: one\nBob: t")
    first = piped.output.line()
    caller.send(b"wo \xe2\x82")
    caller.send(b"\xac\r\n")

    assert [first, piped.output.line()] == ["Bob: one", "Bob: two €"]


def test_lines_right_behind_the_welcome_are_shown(
    puppet: Puppet, start_piped: StartPiped
) -> None:
    piped = start_piped(puppet.address)
    piped.write("1\nAlex\n")
    caller = puppet.accept()
    assert caller.line() == "Alex"

    caller.send("* Welcome!\n* Bob has joined the chat.\nBob: Hi!\nBob: H")

    piped.output.until("* Welcome!")
    assert piped.output.lines(2) == ["* Bob has joined the chat.", "Bob: Hi!"]


# --- the start ----------------------------------------------------------------------


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python client.py` to its end, for a start that fails."""
    return subprocess.run(
        [sys.executable, *PROGRAM, *arguments],
        check=False,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


def test_no_server_is_one_line_that_says_where_and_why() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody else has the port, and nobody listens
        port = str(bound.getsockname()[1])

        run = run_program("--port", port)

    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.count("\n") == 1
    for part in "127.0.0.1", port, "Connection refused":
        assert part in run.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "0"],
        ["--port", "65536"],
        ["--port", "http"],
        ["--port"],
        ["--por", "12345"],
        ["--name", "Alex"],
        ["localhost"],
    ],
)
def test_bad_flag_is_one_line_and_status_2(arguments: list[str]) -> None:
    run = run_program(*arguments)

    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.count("\n") == 1
    assert "--help" in run.stderr


def test_help_explains_every_flag_with_its_default() -> None:
    run = run_program("--help")

    assert (run.returncode, run.stderr) == (0, "")
    explained = " ".join(run.stdout.split())
    for part in (
        "--host",
        "default: 127.0.0.1",
        "--port",
        "1 to 65535",
        "default: 12345",
        "--times",
        "--bell",
    ):
        assert part in explained


def test_client_reaches_an_ipv6_address(start_room: Callable[..., Room]) -> None:
    try:
        room = start_room("::1")
    except OSError:
        pytest.skip("no IPv6 here")

    status, output = run_client(room.address, "1\nAlex\nq\n")

    assert status == 0
    assert (
        "* Welcome, Alex! /help lists the commands. Also online: nobody yet." in output
    )


# --- the client on a terminal -------------------------------------------------------

StartTerminal = Callable[..., Terminal]
Chat = Callable[..., tuple[Terminal, Peer]]


@pytest.fixture
def start_terminal(no_leaks: None) -> Iterator[StartTerminal]:
    """Start clients on terminals; on leaving they are killed.

    Whatever happens to them, nothing may appear on their stderr.
    """
    terminals: list[Terminal] = []

    def start(
        address: str,
        program: list[str] = PROGRAM,
        *,
        shell: str = "",
        columns: int = 80,
        rows: int = 24,
        **variables: str,
    ) -> Terminal:
        wrapper = ["sh", "-c", shell, "sh"] if shell else []
        terminal = Terminal(
            [*wrapper, *command(address, program)],
            environment(**variables),
            columns=columns,
            rows=rows,
        )
        terminals.append(terminal)
        return terminal

    yield start
    for terminal in terminals:
        terminal.close()
    assert [terminal.errors for terminal in terminals] == [""] * len(terminals)


def go_to(place: str, alex: Terminal) -> None:
    """Go to the menu, to the name, or into the chat."""
    alex.wait_for("Enter your choice:")
    if place != "menu":
        alex.type(f"1{ENTER}")
        alex.wait_for("Enter your username:")
    if place == "chat":
        alex.type(f"Alex{ENTER}")
        alex.wait_until(lambda: alex.screen.rows[-1] == "You:")


def join(puppet: Puppet, alex: Terminal) -> Caller:
    """Let Alex join the test's own server; return its end of the connection."""
    go_to("menu", alex)
    alex.type(f"1{ENTER}Alex{ENTER}")
    caller = puppet.welcome()
    alex.wait_until(lambda: alex.screen.rows[-1] == "You:")
    return caller


@pytest.fixture
def chat(room: Room, start_terminal: StartTerminal) -> Chat:
    """Let Alex join on a terminal, with a clear screen, and Bob without one."""

    def start(**options: int | str) -> tuple[Terminal, Peer]:
        bob = room.member("Bob")
        alex = start_terminal(room.address, **options)
        go_to("chat", alex)
        assert bob.line() == "* Alex has joined the chat."
        alex.type(CTRL_L)
        assert alex.shows(["You:"], cursor=(0, 5))
        alex.screen.scrolled_off.clear()
        return alex, bob

    return start


def test_session_at_a_terminal(room: Room, start_terminal: StartTerminal) -> None:
    bob = room.member("Bob")
    alex = start_terminal(room.address)
    alex.wait_for("Enter your choice:")
    alex.type("1\r")
    alex.wait_for("Enter your username:")
    alex.type("Alex\r")
    alex.wait_for("You:")
    alex.type("Hello everyone!\r")
    assert bob.lines(2)[1:] == ["Alex: Hello everyone!"]
    bob.say("Hi Alex!")
    alex.wait_for("Hi Alex!")

    alex.type("q\r")

    assert alex.end() == 0
    assert alex.screen.rows == [
        "Connected to server.",
        "1. Join the chat",
        "q. Leave the chat",
        "2. Exit the program",
        "Enter your choice: 1",
        "Enter your username: Alex",
        "Joining the chat as Alex...",
        "* Welcome, Alex! /help lists the commands. Also online: Bob.",
        "You: Hello everyone!",
        "Bob: Hi Alex!",
        "You: q",
        "Leaving the chat...",
        "Connection closed.",
        "",
    ]
    assert bob.line() == "* Alex has left the chat."


ALPHABET = "abcdefghijklmnopqrstuvwxyz"
FIRST_ROW = "You: abcdefghijklmno"
ON_SCREEN = pytest.mark.parametrize(
    ("typed", "keys", "rows", "cursor"),
    [
        ("hello", "", ["You: hello"], (0, 10)),
        ("hello", ARROW_LEFT * 2, ["You: hello"], (0, 8)),
        ("", "", ["You:"], (0, 5)),
        ("日本語", ARROW_LEFT, ["You: 日本語"], (0, 9)),
        ("e\u0301a\u0308o", ARROW_LEFT * 2, ["You: e\u0301a\u0308o"], (0, 6)),
        (ALPHABET, "", [FIRST_ROW, "pqrstuvwxyz"], (1, 11)),
        (ALPHABET, ARROW_LEFT * 10, [FIRST_ROW, "pqrstuvwxyz"], (1, 1)),
        (ALPHABET, ARROW_LEFT * 11, [FIRST_ROW, "pqrstuvwxyz"], (1, 0)),
        (ALPHABET, ARROW_LEFT * 12, [FIRST_ROW, "pqrstuvwxyz"], (0, 19)),
        (
            ALPHABET * 2,
            ARROW_LEFT * 30,
            [FIRST_ROW, "pqrstuvwxyzabcdefghi", "jklmnopqrstuvwxyz"],
            (1, 7),
        ),
        (ALPHABET[:15], "", [FIRST_ROW, ""], (1, 0)),
        (ALPHABET[:15], ARROW_LEFT, [FIRST_ROW], (0, 19)),
        (ALPHABET + "012345678", "", [FIRST_ROW, "pqrstuvwxyz012345678", ""], (2, 0)),
        (ALPHABET[:14] + "日", "", ["You: abcdefghijklmn", "日"], (1, 2)),
        (ALPHABET[:14] + "日", ARROW_LEFT, ["You: abcdefghijklmn", "日"], (1, 0)),
        (
            ALPHABET[:14] + "e\u0301",
            "",
            ["You: abcdefghijklmne\u0301", ""],
            (1, 0),
        ),
        (
            "日本語" * 5,
            ARROW_LEFT * 8,
            ["You: 日本語日本語日", "本語日本語日本語"],
            (1, 0),
        ),
    ],
    ids=[
        "cursor at the end",
        "cursor in the middle",
        "nothing",
        "wide",
        "combining",
        "two rows",
        "two rows, cursor in the second",
        "two rows, cursor at the margin",
        "two rows, cursor in the first",
        "three rows",
        "a full row",
        "a full row, cursor in it",
        "two full rows",
        "wide at the margin",
        "wide at the margin, cursor on it",
        "combining at the margin",
        "two rows, wide",
    ],
)


@pytest.mark.parametrize("full", [False, True], ids=["above", "at the bottom"])
@ON_SCREEN
def test_lines_of_others_appear_above_the_line_being_typed(
    chat: Chat,
    typed: str,
    keys: str,
    rows: list[str],
    cursor: tuple[int, int],
    full: bool,
) -> None:
    alex, bob = chat(columns=20, rows=10)
    earlier = [f"Bob: {number}" for number in range(12 if full else 0)]
    for line in earlier:
        bob.say(line.removeprefix("Bob: "))
    alex.wait_until(lambda: alex.screen.everything == [*earlier, "You:"])
    alex.type(typed + keys)
    alex.wait_until(lambda: alex.screen.everything == [*earlier, *rows])

    bob.say("hi")
    bob.say("this is longer than a row")
    bob.say("日本語日本語日")

    others = ["Bob: hi", "Bob: this is longer", "than a row", "Bob: 日本語日本語日"]
    above = [*earlier, *others]
    row = len(above) + cursor[0]
    alex.wait_until(lambda: alex.screen.everything == [*above, *rows])
    alex.wait_until(lambda: alex.screen.cursor_in_everything == (row, cursor[1]))
    if typed:
        alex.type(ENTER)
        assert bob.line() == f"Alex: {typed}"
        sent = [*above, *filter(None, rows), "You:"]
        alex.wait_until(lambda: alex.screen.everything == sent)


def folded(text: str, columns: int) -> list[str]:
    """Return the rows that a line of narrow characters fills."""
    return [text[start : start + columns] for start in range(0, len(text), columns)]


def test_line_taller_than_the_screen_is_sent_and_shown_once(chat: Chat) -> None:
    alex, bob = chat(columns=20, rows=10)
    typed = " ".join(f"word{number}" for number in range(60))
    rows = folded(f"You: {typed}", 20)
    assert len(rows) > 20

    alex.type(typed)
    alex.wait_until(lambda: alex.screen.rows[-1] == rows[-1])
    bob.say("hi")
    alex.wait_until(lambda: "Bob: hi" in alex.screen.everything)
    alex.type(CTRL_A)
    alex.wait_until(lambda: alex.screen.cursor[1] == 5)
    first_rows = alex.screen.rows
    bob.say("ho")
    alex.wait_until(lambda: "Bob: ho" in alex.screen.everything)
    alex.type(ENTER)

    assert bob.line() == f"Alex: {typed}"
    assert first_rows[-9:] == [row.rstrip() for row in rows[:9]]
    shown = ["Bob: hi", "Bob: ho", *[row.rstrip() for row in rows], "You:"]
    alex.wait_until(lambda: alex.screen.everything == shown)


def test_line_can_be_changed_in_the_middle_of_its_rows(chat: Chat) -> None:
    alex, bob = chat(columns=20, rows=10)
    alex.type(ALPHABET + ARROW_LEFT * 20)
    assert alex.shows([FIRST_ROW, "pqrstuvwxyz"], cursor=(0, 11))

    alex.type("0123456789" * 2)
    grown = ["You: abcdef012345678", "90123456789ghijklmno", "pqrstuvwxyz"]
    assert alex.shows(grown, cursor=(1, 11))
    alex.type(BACKSPACE * 24)

    assert alex.shows(["You: abghijklmnopqrs", "tuvwxyz"], cursor=(0, 7))
    alex.type(ENTER)
    assert bob.line() == "Alex: abghijklmnopqrstuvwxyz"
    assert alex.shows(["You: abghijklmnopqrs", "tuvwxyz", "You:"])


# --- editing ------------------------------------------------------------------------


class Typist:
    """Someone in the chat who types a line, and someone else who reads it."""

    def __init__(self) -> None:
        self._room = Room(lines_per_second=0)
        self._reader = self._room.member("Bob")
        self._alex = Terminal(command(self._room.address), environment())
        go_to("chat", self._alex)
        self._reader.line()

    def sends(self, keys: str | bytes) -> str:
        """Type keys and Enter; return the message that arrives."""
        self._alex.type(keys)
        self._alex.type(ENTER)
        return self._reader.line().removeprefix("Alex: ")

    def close(self) -> None:
        """Leave."""
        self._alex.close()
        self._room.close_peers()
        self._room.stop()
        assert self._alex.errors == ""


@pytest.fixture(scope="module")
def typist() -> Iterator[Typist]:
    """One for all of these tests, each of which ends its line."""
    someone = Typist()
    yield someone
    someone.close()


LEFT_KEYS = [ARROW_LEFT, "\x1bOD", "\x02"]
RIGHT_KEYS = [ARROW_RIGHT, "\x1bOC", "\x06"]
HOME_KEYS = ["\x1b[H", "\x1bOH", "\x1b[1~", "\x1b[7~", CTRL_A]
END_KEYS = ["\x1b[F", "\x1bOF", "\x1b[4~", "\x1b[8~", "\x05"]
DELETE_KEYS = ["\x1b[3~", CTRL_D]
BACKSPACE_KEYS = [BACKSPACE, "\x08"]
CTRL_K, CTRL_U, CTRL_W = "\x0b", "\x15", "\x17"
WORD_LEFT_KEYS = ["\x1bb", "\x1b[1;5D", "\x1b[1;3D"]
WORD_RIGHT_KEYS = ["\x1bf", "\x1b[1;5C", "\x1b[1;3C"]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        *[(f"ac{left}b", "abc") for left in LEFT_KEYS],
        *[(f"bc{left * 5}a", "abc") for left in LEFT_KEYS],
        *[(f"ac{ARROW_LEFT * 2}{right}b", "abc") for right in RIGHT_KEYS],
        *[(f"ab{ARROW_LEFT}{right * 5}c", "abc") for right in RIGHT_KEYS],
        *[(f"bc{home}a", "abc") for home in HOME_KEYS],
        *[(f"ab{CTRL_A}{end}c", "abc") for end in END_KEYS],
        *[(f"axb{ARROW_LEFT * 2}{delete}", "ab") for delete in DELETE_KEYS],
        *[(f"ab{delete}c", "abc") for delete in DELETE_KEYS],
        *[(f"abx{backspace}c", "abc") for backspace in BACKSPACE_KEYS],
        *[(f"axb{ARROW_LEFT}{backspace}", "ab") for backspace in BACKSPACE_KEYS],
        *[(f"ab{CTRL_A}{backspace}c", "cab") for backspace in BACKSPACE_KEYS],
        (f"abcdef{ARROW_LEFT * 3}{CTRL_K}", "abc"),
        (f"abcdef{ARROW_LEFT * 3}{CTRL_U}", "def"),
        (f"one two-three  {CTRL_W}", "one "),
        (f"one two{ARROW_LEFT}{CTRL_W}", "one o"),
        (f"ab{CTRL_L}c", "abc"),
        *[(f"one two{word}x", "one xtwo") for word in WORD_LEFT_KEYS],
        *[(f"one, two{word * 2}x", "xone, two") for word in WORD_LEFT_KEYS],
        *[(f"one two{CTRL_A}{word}x", "onex two") for word in WORD_RIGHT_KEYS],
        *[(f"one, two{CTRL_A}{word * 2}x", "one, twox") for word in WORD_RIGHT_KEYS],
        (f"one two-three{ESCAPE}{BACKSPACE}x", "one two-x"),
        (f"one two{CTRL_A}{ESCAPE}dx", "x two"),
        (f"日本x語{ARROW_LEFT}{BACKSPACE}", "日本語"),
        (f"ae\u0301{BACKSPACE}b", "ab"),
        (f"ae\u0301{ARROW_LEFT}b", "abe\u0301"),
        (f"e\u0301a{CTRL_A}{ARROW_RIGHT}b", "e\u0301ba"),
        (f"e\u0301a{CTRL_A}\x1b[3~", "a"),
        ("a\tb", "a    b"),
        ("a\x1b[15~b\x1b[201~c\x1bOPd", "abcd"),
        (f"say cafe\u0301s{WORD_LEFT_KEYS[0]}x", "say xcafe\u0301s"),
        (f"cafe\u0301s x{CTRL_A}{WORD_RIGHT_KEYS[0]}-", "cafe\u0301s- x"),
        (f"cafe\u0301s{ESCAPE}{BACKSPACE}x", "x"),
        ("a\x00\x07\x1db", "ab"),
        ("1", "1"),
        ("2", "2"),
        (" spaces  stay ", " spaces  stay "),
        (b"not \xff UTF-8", "not \ufffd UTF-8"),
        ("zero \u200b width \U0001f469\u200d\U0001f467", None),
    ],
    ids=ascii,
)
def test_editing_keys(typist: Typist, keys: str | bytes, text: str | None) -> None:
    assert typist.sends(keys) == (keys if text is None else text)


def test_key_that_comes_in_pieces_is_one_key(chat: Chat) -> None:
    alex, bob = chat()
    alex.type("日b\x1b")
    alex.wait_for("You: 日b")

    alex.type("[")
    alex.type("1;5")
    alex.type(f"Dx{ENTER}")

    assert bob.line() == "Alex: x日b"


def test_ctrl_l_clears_the_screen_and_keeps_the_line(chat: Chat) -> None:
    alex, bob = chat()
    bob.say("hi")
    alex.type(f"hello{ARROW_LEFT * 2}")
    assert alex.shows(["Bob: hi", "You: hello"], cursor=(1, 8))

    alex.type(CTRL_L)

    assert alex.shows(["You: hello"], cursor=(0, 8))


def test_up_and_down_go_through_the_messages(chat: Chat) -> None:
    alex, bob = chat()
    for text in "one", "two", "three":
        alex.type(f"{text}{ENTER}")
        assert bob.line() == f"Alex: {text}"

    alex.type(f"half{ARROW_UP * 2}")
    alex.wait_until(lambda: alex.screen.rows[-1] == "You: two")
    alex.type(ARROW_UP * 5)
    alex.wait_until(lambda: alex.screen.rows[-1] == "You: one")
    alex.type(f"{ARROW_DOWN} again{ENTER}")
    assert bob.line() == "Alex: two again"
    alex.type(f"half{ARROW_UP}{ARROW_DOWN * 3} a line{ENTER}")

    assert bob.line() == "Alex: half a line"


def test_menu_answers_and_names_are_not_among_the_messages(
    room: Room, start_terminal: StartTerminal
) -> None:
    bob = room.member("Bob")
    alex = start_terminal(room.address)
    go_to("menu", alex)
    alex.type(f"x{ENTER}")
    alex.type(f"{ARROW_UP}1{ENTER}")
    alex.wait_for("Enter your username:")
    alex.type(f"{ARROW_UP}Alex{ENTER}")
    alex.wait_for("You:")

    alex.type(f"{ARROW_UP * 3}hello{ENTER}")

    assert bob.lines(2) == ["* Alex has joined the chat.", "Alex: hello"]


def test_paste_of_many_lines_sends_them_all_in_order(chat: Chat) -> None:
    alex, bob = chat()
    lines = [f"line {number} of the paste: ä日{'x' * 100}" for number in range(30)]

    alex.type("".join(f"{line}{ENTER}" for line in lines))

    assert bob.lines(30) == [f"Alex: {line}" for line in lines]
    alex.type(f"q{ENTER}")
    assert alex.end() == 0


def test_whole_session_can_be_pasted(room: Room, start_terminal: StartTerminal) -> None:
    bob = room.member("Bob")
    alex = start_terminal(room.address)
    alex.wait_for("Enter your choice:")

    alex.type("1\rAlex\rone\rtwo\rq\r")

    assert alex.end() == 0
    assert bob.lines(4) == [
        "* Alex has joined the chat.",
        "Alex: one",
        "Alex: two",
        "* Alex has left the chat.",
    ]


def test_ctrl_z_and_fg_keep_what_was_typed(chat: Chat) -> None:
    alex, bob = chat()
    alex.type(f"half a line{ARROW_LEFT * 4}")
    assert alex.shows(["You: half a line"], cursor=(0, 12))

    alex.type(CTRL_Z)
    assert alex.status() == 128 + signal.SIGTSTP
    assert alex.modes() == alex.modes_before
    bob.say("still there?")
    alex.resume()

    alex.wait_for("Bob: still there?")
    alex.wait_until(lambda: alex.screen.rows[-1] == "You: half a line")
    assert alex.screen.cursor[1] == 12
    alex.type(f"of {ENTER}")
    assert bob.line() == "Alex: half a of line"
    alex.type(f"q{ENTER}")
    assert alex.end() == 0


def test_ctrl_z_and_fg_at_the_name_keep_what_was_typed(
    room: Room, start_terminal: StartTerminal
) -> None:
    bob = room.member("Bob")
    alex = start_terminal(room.address)
    go_to("name", alex)
    alex.type("Al")
    alex.wait_for("username: Al")

    for _ in range(2):
        alex.type(CTRL_Z)
        assert alex.status() == 128 + signal.SIGTSTP
        assert alex.modes() == alex.modes_before
        alex.resume()
        alex.wait_until(lambda: alex.modes() != alex.modes_before)
    alex.type(f"ex{ENTER}")

    assert bob.line() == "* Alex has joined the chat."


def test_change_of_the_windows_size_keeps_what_was_typed(chat: Chat) -> None:
    alex, bob = chat(columns=60)
    alex.type(f"{ALPHABET}{ARROW_LEFT * 3}")
    assert alex.shows([f"You: {ALPHABET}"], cursor=(0, 28))

    alex.resize(20, 10)
    assert alex.shows([FIRST_ROW, "pqrstuvwxyz"], cursor=(1, 8))
    bob.say("hi")
    assert alex.shows(["Bob: hi", FIRST_ROW, "pqrstuvwxyz"], cursor=(2, 8))
    alex.resize(80, 24)
    assert alex.shows(["Bob: hi", f"You: {ALPHABET}"], cursor=(1, 28))
    alex.type(f"-{ENTER}")

    assert bob.line() == "Alex: abcdefghijklmnopqrstuvw-xyz"
    assert alex.shows(["Bob: hi", "You: abcdefghijklmnopqrstuvw-xyz", "You:"])


# --- colours, and terminals without them --------------------------------------------

COLOURED = re.compile(r"\x1b\[[0-9;]*m")


def test_names_have_colours_and_notices_are_dim(chat: Chat) -> None:
    alex, bob = chat()

    bob.say("hi")
    bob.say("Bob: is my name")
    alex.wait_for("is my name")
    bob.say("q")
    alex.wait_for("* Bob has left the chat.")

    (colour,) = alex.screen.styles("Bob")
    assert colour not in ("", "0", "2", "31")
    assert alex.screen.styles(": hi") == {""}
    assert alex.screen.styles("Bob: is my name") <= {colour, ""}
    assert alex.screen.styles(": is my name") == {""}
    assert alex.screen.styles("* Bob has left the chat.") == {"2"}
    assert alex.screen.styles("You:") == {""}


def test_refusals_are_red(chat: Chat) -> None:
    alex, _ = chat()
    refusal = "! That line is longer than 4096 bytes."

    alex.type("x" * 4097 + ENTER)

    alex.wait_for(refusal)
    assert alex.screen.styles(refusal) == {"31"}


def test_refused_name_is_red(room: Room, start_terminal: StartTerminal) -> None:
    room.member("Bob")
    alex = start_terminal(room.address)
    go_to("name", alex)

    alex.type(f"Bob{ENTER}")

    alex.wait_for("! The name Bob is taken.")
    assert alex.screen.styles("! The name Bob is taken.") == {"31"}


def test_no_color_means_no_colours_and_the_rest_stays(chat: Chat) -> None:
    alex, bob = chat(NO_COLOR="1")
    alex.type(f"hello{ARROW_LEFT * 2}")

    bob.say("hi")

    assert alex.shows(["Bob: hi", "You: hello"], cursor=(1, 8))
    assert not COLOURED.search(alex.output)


def paste(*lines: str) -> str:
    """Return what a terminal sends for a paste."""
    return f"\x1b[200~{ENTER.join(lines)}\x1b[201~"


def test_dumb_terminal_gets_plain_lines(
    room: Room, start_terminal: StartTerminal
) -> None:
    bob = room.member("Bob")
    alex = start_terminal(room.address, TERM="dumb")
    go_to("chat", alex)

    bob.say("Hi Alex!")
    alex.wait_until(lambda: alex.screen.rows[-2:] == ["Bob: Hi Alex!", "You:"])
    alex.type(f"Hello!{ENTER}")
    assert bob.lines(2)[1:] == ["Alex: Hello!"]
    alex.wait_until(lambda: alex.screen.rows[-2:] == ["You: Hello!", "You:"])
    alex.type(f"q{ENTER}")

    assert alex.end() == 0
    assert ESCAPE not in alex.output
    assert alex.screen.rows == [
        *JOINING,
        "* Welcome, Alex! /help lists the commands. Also online: Bob.",
        "You:",
        "Bob: Hi Alex!",
        "You: Hello!",
        "You: q",
        *LEFT,
        "",
    ]


def test_no_escape_sequence_if_only_stdout_is_a_terminal(
    room: Room, start_terminal: StartTerminal
) -> None:
    typed = r"1\nAlex\nHello\nq\n"

    alex = start_terminal(room.address, shell=f"printf '{typed}' | \"$@\"")

    assert alex.end() == 0
    assert ESCAPE not in alex.output
    welcome = "* Welcome, Alex! /help lists the commands. Also online: nobody yet."
    assert alex.screen.rows == [*JOINING, welcome, "You: Hello", "You: q", *LEFT, ""]


def test_escape_sequences_of_others_do_not_reach_the_terminal(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    """The screen fails on any that the client does not use itself."""
    alex = start_terminal(puppet.address)
    go_to("menu", alex)
    alex.type(f"1{ENTER}Alex{ENTER}")
    caller = puppet.accept()
    assert caller.line() == "Alex"

    caller.send(b"* Wel\x1bcome\x07\nB\x1b[Hob: \x1b[2J\x1b[31mred\n")

    alex.wait_for("* Wel\ufffdcome\ufffd")
    alex.wait_for("B\ufffd[Hob: \ufffd[2J\ufffd[31mred")


# --- leaving, and servers that are gone ---------------------------------------------

TERMINALS = pytest.mark.parametrize("kind", ["xterm", "dumb"])
PLACES = pytest.mark.parametrize("place", ["menu", "name", "chat"])


@TERMINALS
@PLACES
@pytest.mark.parametrize(
    ("key", "status"), [(CTRL_D, 0), (CTRL_C, 130), (f"q{ENTER}", 0)],
    ids=["Ctrl-D", "Ctrl-C", "q"],
)  # fmt: skip
def test_leaving_at_a_terminal(
    room: Room,
    start_terminal: StartTerminal,
    place: str,
    key: str,
    status: int,
    kind: str,
) -> None:
    alex = start_terminal(room.address, TERM=kind)
    go_to(place, alex)

    alex.type(key)

    assert alex.end() == status
    assert alex.screen.rows[-3:] == [*LEFT, ""]
    assert alex.output.count("Leaving the chat...") == 1
    room.connect().join("Alex")  # the name is free again


def test_exit_from_the_menu_at_a_terminal(
    room: Room, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(room.address)
    go_to("menu", alex)

    alex.type(f"2{ENTER}")

    assert alex.end() == 0
    assert alex.screen.rows == [*START, "Enter your choice: 2", *EXITED, ""]


def test_ctrl_c_with_half_a_line_typed_sends_nothing_of_it(chat: Chat) -> None:
    alex, bob = chat()
    alex.type(f"half a line{ARROW_LEFT * 4}")
    alex.wait_for("half a line")

    alex.type(CTRL_C)

    assert alex.end() == 130
    assert alex.screen.rows == ["You: half a line", *LEFT, ""]
    assert bob.line() == "* Alex has left the chat."


@TERMINALS
@pytest.mark.parametrize(("key", "status"), [(f"q{ENTER}", 0), (CTRL_C, 130)])
def test_server_that_hangs_holds_up_the_leaving_for_a_limited_time(
    puppet: Puppet, start_terminal: StartTerminal, key: str, status: int, kind: str
) -> None:
    alex = start_terminal(puppet.address, impatient(1.0), TERM=kind)
    join(puppet, alex)
    began = time.monotonic()

    alex.type(key)

    assert alex.end() == status
    assert 1.0 < time.monotonic() - began < 1.8
    assert alex.screen.rows[-3:] == [*LEFT, ""]
    assert client.LEAVE_SECONDS <= 3.0


LEAVING_KEYS = pytest.mark.parametrize(
    ("keys", "status"), [(CTRL_C, 130), (CTRL_D, 0), (f"q{ENTER}", 0)],
    ids=["Ctrl-C", "Ctrl-D", "q"],
)  # fmt: skip


@TERMINALS
@LEAVING_KEYS
def test_leaving_a_server_that_does_not_answer_to_the_name(
    puppet: Puppet, start_terminal: StartTerminal, keys: str, status: int, kind: str
) -> None:
    alex = start_terminal(puppet.address, impatient(0.5), TERM=kind)
    go_to("name", alex)
    alex.type(f"Alex{ENTER}")
    assert puppet.accept().line() == "Alex"

    began = time.monotonic()
    alex.type(keys)

    assert alex.end() == status
    assert time.monotonic() - began < 1.5
    echo = ("", "q", "^C") if kind == "dumb" else ("",)
    rows = [row.removeprefix("^C") for row in alex.screen.rows if row not in echo]
    assert rows == [*JOINING, *LEFT]


@LEAVING_KEYS
def test_leaving_in_the_middle_of_a_paste_that_the_server_does_not_take(
    puppet: Puppet, start_terminal: StartTerminal, keys: str, status: int
) -> None:
    alex = start_terminal(puppet.address, changed(SMALL_SEND_BUFFER))
    join(puppet, alex)
    alex.type(paste(*["x" * 1000] * 200, ""))
    alex.wait_for("Send 200 lines?")
    alex.type(f"y{ENTER}")
    while not alex.is_silent(0.3):
        alex.drain()

    began = time.monotonic()
    alex.type(keys)

    assert alex.end() == status
    assert time.monotonic() - began < 3.0
    assert alex.screen.rows[-2:] == ["Connection closed.", ""]
    assert alex.output.count("Leaving the chat...") == 1


def test_second_ctrl_c_ends_a_leaving_that_takes_too_long(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address, impatient(HANG_SECONDS))
    join(puppet, alex)

    alex.type(CTRL_C)
    alex.wait_for("Leaving the chat...")
    alex.type(CTRL_C)

    assert alex.end() == 130
    assert alex.output.count("Leaving the chat...") == 1


# That the client has come to the name is to be seen on a terminal only.


@ENDINGS
def test_connection_that_ended_at_the_name_is_made_again(
    puppet: Puppet, start_terminal: StartTerminal, end: Callable[[Caller], None]
) -> None:
    alex = start_terminal(puppet.address)
    go_to("name", alex)
    end(puppet.accept())

    alex.type(f"Alex{ENTER}")

    caller = puppet.welcome()
    assert caller.name == "Alex"
    alex.type(f"Hello{ENTER}q{ENTER}")
    assert caller.rest() == ["Hello", "q"]
    caller.close()
    assert alex.end() == 0
    talk = ["* Welcome, Alex!", "You: Hello", "You: q"]
    assert alex.screen.rows == [*JOINING, *talk, *LEFT, ""]


@ENDINGS
@pytest.mark.parametrize("place", ["menu", "name"])
def test_server_that_cannot_be_reached_again_leads_to_the_menu(
    puppet: Puppet,
    start_terminal: StartTerminal,
    place: str,
    end: Callable[[Caller], None],
) -> None:
    alex = start_terminal(puppet.address)
    go_to(place, alex)
    end(puppet.accept())
    puppet.close()

    alex.type(f"1{ENTER}" if place == "menu" else f"Alex{ENTER}")

    lost = "Connection lost: Connection refused."
    before = [*START, NAMED[0]] if place == "menu" else JOINING
    assert alex.shows([*before, lost, *MENU, "Enter your choice:"])
    alex.type(f"q{ENTER}")
    assert alex.end() == 1


def test_leaving_at_the_name_has_status_0_when_the_server_is_gone(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address)
    go_to("name", alex)
    puppet.accept().reset()
    puppet.close()

    alex.type(f"q{ENTER}")

    assert alex.end() == 0
    assert alex.screen.rows == [*START, NAMED[0], "Enter your username: q", *LEFT, ""]


def test_server_that_has_become_full_ends_the_client(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address)
    go_to("name", alex)
    puppet.accept().close()

    alex.type(f"Alex{ENTER}")
    caller = puppet.accept()
    caller.say(f"! {FULL}")
    caller.half_close()
    assert caller.rest() in ([], ["Alex"])

    assert alex.end() == 1
    assert alex.screen.rows == [*JOINING, f"! {FULL}", ""]


LOST = "Connection lost: the server closed the connection."


@TERMINALS
def test_killed_server_is_told_within_a_second_and_leads_to_the_menu(
    start_terminal: StartTerminal,
    start_server: Callable[..., ServerProcess],
    kind: str,
) -> None:
    server = start_server()
    alex = start_terminal(server.address, TERM=kind)
    go_to("chat", alex)
    alex.type("half a line")
    alex.wait_for("You: half a line")
    above = alex.screen.rows

    server.process.kill()
    start = time.monotonic()
    alex.wait_for(LOST)

    assert time.monotonic() - start < 1.0
    assert alex.shows([*above, LOST, *MENU, "Enter your choice:"])
    alex.type(f"q{ENTER}")
    assert alex.end() == 1
    assert alex.screen.rows[-3:] == [*LEFT, ""]


def test_connection_that_is_reset_is_lost_with_the_reason(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address)
    caller = join(puppet, alex)

    caller.reset()

    alex.wait_for("Connection lost: Connection reset by peer.")


def test_last_words_of_the_server_are_shown_before_the_connection_is_lost(
    chat: Chat, room: Room
) -> None:
    alex, _ = chat()
    alex.type("half")
    alex.wait_for("You: half")

    room.stop()

    last = "* Server is shutting down."
    assert alex.shows([last, "You: half", LOST, *MENU, "Enter your choice:"])


def test_half_typed_line_is_typed_on_after_the_server_was_restarted(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address)
    caller = join(puppet, alex)
    alex.type(f"half a line{ARROW_LEFT * 4}")
    alex.wait_for("You: half a line")

    caller.close()
    alex.wait_for("Enter your choice:")
    alex.wait_until(lambda: alex.screen.rows[-1] == "Enter your choice:")
    alex.type(f"1{ENTER}")
    alex.wait_for("Enter your username [Alex]:")
    alex.type(ENTER)
    caller = puppet.welcome()

    assert caller.name == "Alex"
    alex.wait_until(lambda: alex.screen.rows[-1] == "You: half a line")
    assert alex.screen.cursor[1] == 12
    alex.type(f"of {ENTER}")
    assert caller.line() == "half a of line"
    alex.type(f"q{ENTER}")
    assert caller.line() == "q"
    caller.close()
    assert alex.end() == 0


def test_another_name_may_be_given_after_the_connection_was_lost(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address)
    join(puppet, alex).close()
    alex.wait_until(lambda: alex.screen.rows[-1] == "Enter your choice:")

    alex.type(f"1{ENTER}Sam{ENTER}")

    assert puppet.welcome().name == "Sam"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ten_lost_connections_leave_no_thread_no_descriptor_and_no_stale_row(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address, rows=200)
    caller = join(puppet, alex)
    process = Path(f"/proc/{alex.pid()}")
    before = [len(list((process / kind).iterdir())) for kind in ("task", "fd")]
    expected = alex.screen.rows[:-1]

    for number in range(10):
        caller.close()
        alex.wait_until(lambda: alex.screen.rows[-1] == "Enter your choice:")
        alex.type(f"1{ENTER}")
        alex.wait_until(lambda: alex.screen.rows[-1].startswith("Enter your username"))
        alex.type(ENTER)
        caller = puppet.welcome()
        caller.say(f"* Start {number}")
        again = [LOST, *MENU, NAMED[0], "Enter your username [Alex]:"]
        expected += [*again, *JOINING[-1:], "* Welcome, Alex!", f"* Start {number}"]
        assert alex.shows([*expected, "You:"])

    after = [len(list((process / kind).iterdir())) for kind in ("task", "fd")]
    assert after == before


def test_bug_in_the_receiver_ends_the_client_loudly(
    puppet: Puppet, start_piped: StartPiped
) -> None:
    bug = "protocol.parse_server_line = lambda line: 1 / 0"
    process = subprocess.Popen(
        command(puppet.address, changed(f"import protocol; {bug}")),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    puppet.accept().say("* Hello")

    _, errors = process.communicate(b"1\nAlex\n", HANG_SECONDS)

    assert process.returncode == 1
    assert b"ZeroDivisionError" in errors


@TERMINALS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_terminal_is_left_sane_by_a_client_that_is_terminated(
    room: Room, start_terminal: StartTerminal, number: signal.Signals, kind: str
) -> None:
    bob = room.member("Bob")
    alex = start_terminal(room.address, TERM=kind)
    go_to("chat", alex)
    assert bob.line() == "* Alex has joined the chat."
    alex.type("half a line")
    alex.wait_for("half a line")

    os.kill(alex.pid(), number)

    assert alex.end() == 128 + number
    assert alex.screen.rows[-2:] == ["You: half a line", ""]
    assert bob.line() == "* Alex has left the chat."


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@PLACES
def test_idle_client_uses_no_cpu(
    room: Room, start_terminal: StartTerminal, place: str
) -> None:
    alex = start_terminal(room.address)
    go_to(place, alex)
    alex.type("half")
    alex.wait_for(": half")
    stat = Path(f"/proc/{alex.pid()}/stat")

    def ticks() -> int:
        fields = stat.read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    assert alex.is_silent(0.3)

    assert ticks() - before <= 1  # of the 30 that this took


# --- pastes, and what is typed ahead ------------------------------------------------


def test_pasted_q_is_text_and_goes_out_with_a_blank(chat: Chat) -> None:
    alex, bob = chat()

    alex.type(paste("one", "q", "Q", "", "four") + f"{BACKSPACE}r{ENTER}")

    assert bob.lines(4) == [
        "Alex: one",
        "Alex: q ",
        "Alex: Q ",
        "Alex: four"[:-1] + "r",
    ]


def test_pasted_q_without_a_newline_is_text_too(chat: Chat) -> None:
    alex, bob = chat()

    alex.type(f"{paste('q')}{ENTER}")

    assert bob.line() == "Alex: q "


@pytest.mark.parametrize("answer", ["y", " Y ", "yes"])
@pytest.mark.parametrize("last", ["", "line 19"])
def test_long_paste_is_sent_after_a_yes(chat: Chat, answer: str, last: str) -> None:
    alex, bob = chat()
    lines = [f"line {number}" for number in range(19)] + ([last] if last else ["last"])

    alex.type(paste(*lines, *([] if last else [""])))
    assert alex.shows(["Send 20 lines? [y/N]"])
    alex.type(f"{answer}{ENTER}")

    assert bob.lines(20) == [f"Alex: {line}" for line in lines]
    asked = f"Send 20 lines? [y/N] {answer}".rstrip()
    assert alex.shows([asked, *[f"You: {line}" for line in lines], "You:"])


@pytest.mark.parametrize("answer", [ENTER, f"n{ENTER}", f"q{ENTER}", CTRL_D])
def test_no_to_a_long_paste_keeps_its_first_line(chat: Chat, answer: str) -> None:
    alex, bob = chat()

    alex.type("say " + paste(*[f"line {number}" for number in range(6)], ""))
    alex.wait_for("Send 6 lines?")
    alex.type(answer)
    alex.wait_until(lambda: alex.screen.rows[-1] == "You: say line 0")
    alex.type(f"!{ENTER}")

    assert bob.line() == "Alex: say line 0!"


def test_paste_in_the_middle_of_a_line_goes_between_its_halves(chat: Chat) -> None:
    alex, bob = chat()

    alex.type(f"ad{ARROW_LEFT}{paste('b', 'c')}{ENTER}")

    assert bob.lines(2) == ["Alex: ab", "Alex: cd"]


def test_paste_that_comes_in_pieces_is_one_paste(chat: Chat) -> None:
    alex, bob = chat()

    for char in f"{ESCAPE}{paste('q', 'ä', '')}":
        alex.type(char)
        alex.drain()

    assert bob.lines(2) == ["Alex: q ", "Alex: ä"]


def test_control_characters_in_a_paste_are_cleaned(chat: Chat) -> None:
    alex, bob = chat()

    shown = "a    b\ufffd[31mc\ufffd\ufffd\ufffdd"

    alex.type(paste("a\tb\x1b[31mc\x00\x07\x04d"))
    assert alex.shows([f"You: {shown}"])
    alex.type(ENTER)

    assert bob.line() == f"Alex: {shown}"
    assert alex.shows([f"You: {shown}", "You:"])


def test_paste_without_an_end_is_taken_once_it_is_silent(chat: Chat) -> None:
    alex, bob = chat()

    alex.type("\x1b[200~one\rq\rthree")

    assert bob.lines(2) == ["Alex: one", "Alex: q "]
    alex.type(f" and on{ENTER}")
    assert bob.line() == "Alex: three and on"


def test_ctrl_c_ends_a_paste_without_an_end(chat: Chat) -> None:
    alex, _ = chat()
    alex.type("\x1b[200~one\rq\r")

    alex.type(CTRL_C)

    assert alex.end() == 130


def test_huge_pasted_line_takes_little_at_each_key(chat: Chat) -> None:
    alex, _ = chat(columns=40, rows=6)
    alex.type(paste("word " * 100_000))
    alex.wait_until(lambda: len(alex.screen.rows) > 4)
    written = len(alex.output)

    began = time.monotonic()
    for key in "abc", f"{ESCAPE}b", CTRL_W, "!":
        seen = len(alex.output)
        alex.type(key)
        alex.wait_until(lambda before=seen: len(alex.output) > before)

    assert time.monotonic() - began < 1.0
    assert len(alex.output) - written < 10_000


def test_keys_are_read_in_bounded_memory() -> None:
    keys = client.KeyReader()
    for text in "\x1b[200~", "\x1b[1;":
        for _ in range(3):
            keys.feed((text + "1" * 3 * client.MAX_TYPED_CHARS).encode())
            assert len(keys._rest) < client.MAX_TYPED_CHARS + 10_000


def leave_with_q(alex: Terminal) -> None:
    alex.type(f"q{ENTER}")


def leave_with_ctrl_c(alex: Terminal) -> None:
    alex.type(CTRL_C)


def leave_with_ctrl_c_twice(alex: Terminal) -> None:
    os.kill(alex.pid(), signal.SIGINT)
    alex.wait_for("Leaving the chat...")
    os.kill(alex.pid(), signal.SIGINT)


def leave_with_sigterm(alex: Terminal) -> None:
    os.kill(alex.pid(), signal.SIGTERM)


@TERMINALS
@pytest.mark.parametrize(
    ("leave", "status"),
    [
        (leave_with_q, 0),
        (leave_with_ctrl_c, 130),
        (leave_with_ctrl_c_twice, 130),
        (leave_with_sigterm, 143),
    ],
)
def test_what_is_typed_ahead_is_not_left_for_the_shell(
    puppet: Puppet,
    start_terminal: StartTerminal,
    leave: Callable[[Terminal], None],
    status: int,
    kind: str,
) -> None:
    """The last check is that of end(): nothing is left to be read."""
    alex = start_terminal(puppet.address, impatient(0.5), TERM=kind)
    join(puppet, alex)

    leave(alex)
    alex.type(f"rm -rf everything{ENTER}and{ENTER}half a line")

    assert alex.end() == status


def test_what_is_typed_ahead_of_a_full_server_is_not_left_for_the_shell(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address)
    go_to("menu", alex)
    caller = puppet.accept()
    caller.say(f"! {FULL}")
    caller.close()

    alex.type(f"1{ENTER}Alex{ENTER}half a line")

    assert alex.end() == 1


def test_paste_that_goes_on_after_the_end_is_not_left_for_the_shell(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address, impatient(0.2))
    join(puppet, alex)
    alex.type(f"q{ENTER}\x1b[200~one{ENTER}")
    alex.wait_for("Connection closed.")

    assert alex.is_silent(0.2)  # the terminal is still taking its time
    alex.type(f"two{ENTER}" * 1000 + "\x1b[201~")

    assert alex.end() == 0


def test_shell_gets_nothing_of_three_hundred_lines_with_a_q_among_them(
    room: Room, start_terminal: StartTerminal
) -> None:
    bob = room.member("Bob")
    alex = start_terminal(room.address, shell='"$@"; echo ended; cat')
    go_to("chat", alex)
    lines = [f"echo {number}" for number in range(300)]
    lines[5] = "q"

    alex.type(paste(*lines, ""))
    alex.wait_for("Send 300 lines?")
    alex.type(f"y{ENTER}")

    said = [f"Alex: {line}" for line in lines]
    said[5] = "Alex: q "
    assert bob.lines(301)[1:] == said
    alex.type("".join(f"{line}{ENTER}" for line in lines))  # without brackets
    alex.wait_until(lambda: alex.screen.rows[-2:] == ["ended", ""])
    alex.type(CTRL_D)  # for cat, which was given nothing
    assert alex.end() == 0
    assert alex.screen.rows[-3:] == ["Connection closed.", "ended", ""]


def test_shell_gets_nothing_of_what_is_typed_on_when_the_server_is_killed(
    start_terminal: StartTerminal, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server()
    alex = start_terminal(server.address, shell='"$@"; echo "ended $?"; cat')
    go_to("chat", alex)
    alex.type("in the middle ")

    server.process.kill()
    alex.type(f"of a sentence{ENTER}and another{ENTER}")
    alex.wait_for("Connection lost:")
    alex.wait_until(lambda: alex.screen.rows[-1] == "Enter your choice:")
    alex.type(f"2{ENTER}ls{ENTER}")

    alex.wait_until(lambda: alex.screen.rows[-2:] == ["ended 1", ""])
    alex.type(CTRL_D)
    assert alex.end() == 0
    assert alex.screen.rows[-4:] == [*EXITED, "ended 1", ""]


@pytest.mark.parametrize("moment", [CTRL_Z, f"q{ENTER}"])
def test_brackets_around_pastes_are_asked_for_only_while_the_client_runs(
    chat: Chat, moment: str
) -> None:
    alex, _ = chat()
    assert alex.screen.takes_pastes

    alex.type(moment)

    alex.status()
    alex.drain()
    assert not alex.screen.takes_pastes
    if moment == CTRL_Z:
        alex.resume()
        alex.wait_until(lambda: alex.screen.takes_pastes)


# --- secrets, private messages, and what the flags do -------------------------------


def test_line_before_the_answer_to_the_name_is_shown_and_is_not_the_answer(
    puppet: Puppet, start_piped: StartPiped
) -> None:
    piped = start_piped(puppet.address)
    piped.write("1\nAlex\nHello\nq\n")
    caller = puppet.accept()
    assert caller.line() == "Alex"

    caller.say("Welcome to this house.")
    piped.output.until("Welcome to this house.")
    caller.say("! Not now.")

    assert piped.output.lines(3)[0] == "! Not now."  # and Hello is the next name


PASSWORD = "correct horse battery"


def test_password_at_the_name_is_not_shown(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address)
    go_to("name", alex)
    alex.type(f"Alex{ENTER}")
    caller = puppet.accept()
    assert caller.line() == "Alex"

    caller.say("? This name is kept: its password?")
    alex.wait_until(lambda: alex.screen.rows[-1] == "Password:")
    alex.type(f"{ARROW_UP}wrong{ENTER}")
    assert caller.line() == "wrong"
    caller.say("! That is not it.")
    alex.wait_for("! That is not it.")
    alex.type(f"Alex{ENTER}")
    assert caller.line() == "Alex"
    caller.say("? This name is kept: its password?")
    alex.type(f"{PASSWORD}{ENTER}")
    assert caller.line() == PASSWORD
    caller.say("* Welcome, Alex!")

    alex.wait_until(lambda: alex.screen.rows[-1] == "You:")
    assert not {"wrong", PASSWORD} & {word for word in alex.output.split()}
    assert PASSWORD not in alex.output


@TERMINALS
def test_password_in_the_chat_is_hidden_and_the_half_typed_line_comes_back(
    puppet: Puppet, start_terminal: StartTerminal, kind: str
) -> None:
    alex = start_terminal(puppet.address, TERM=kind)
    caller = join(puppet, alex)
    alex.type(f"/register{ENTER}")
    assert caller.line() == "/register"
    caller.say("! /register is no command.")
    half = "" if kind == "dumb" else "half"
    alex.type(half)
    alex.wait_until(lambda: alex.screen.rows[-1] == f"You: {half}".rstrip())

    caller.say("? The new password?")
    alex.wait_until(lambda: alex.screen.rows[-1] == "Password:")
    caller.say("Bob: Hi!")
    alex.wait_until(lambda: alex.screen.rows[-2:] == ["Bob: Hi!", "Password:"])
    alex.type(f"{PASSWORD}{ENTER}")
    assert caller.line() == PASSWORD
    alex.wait_until(lambda: alex.screen.rows[-1] == f"You: {half}".rstrip())
    assert alex.screen.rows.count("You: half") == bool(half)
    alex.type(f"{ARROW_UP * 2 if half else ''} a line{ENTER}")

    assert caller.line() == ("/register a line" if half else " a line")
    assert PASSWORD not in alex.output


def test_refusal_of_an_earlier_line_does_not_show_a_piped_password(
    puppet: Puppet, start_piped: StartPiped
) -> None:
    piped = start_piped(puppet.address)
    piped.write(f"1\nAlex\n/foo\n/register\n{PASSWORD}\nq\n")
    caller = puppet.welcome()
    assert caller.lines(2) == ["/foo", "/register"]

    caller.say("! /foo is no command.")
    caller.say("? The new password?")

    assert caller.lines(2) == [PASSWORD, "q"]
    caller.close()
    status, output = piped.end()
    assert status == 0
    assert "Password: " in output
    assert PASSWORD not in "\n".join(output)


def test_piped_password_is_said_to_nobody_if_the_command_is_refused(
    puppet: Puppet, start_piped: StartPiped
) -> None:
    piped = start_piped(puppet.address)
    piped.write(f"1\nAlex\n/register\n{PASSWORD}\nq\n")
    caller = puppet.welcome()
    assert caller.line() == "/register"

    caller.say("! /register is no command.")

    assert caller.rest() == []
    caller.close()
    status, output = piped.end()
    assert status == 1
    assert PASSWORD not in "\n".join(output)


def test_password_in_a_pipe_is_the_next_line_and_is_not_shown(
    puppet: Puppet, start_piped: StartPiped
) -> None:
    piped = start_piped(puppet.address)
    piped.write(f"1\nAlex\n{PASSWORD}\n/register\nanother one\nHello\nq\n")
    caller = puppet.accept()
    assert caller.line() == "Alex"
    caller.say("? Its password?")
    assert caller.line() == PASSWORD
    caller.say("* Welcome, Alex!")
    assert caller.line() == "/register"
    caller.say("Bob: Hi!")
    caller.say("? The new password?")
    assert caller.lines(3) == ["another one", "Hello", "q"]
    caller.close()

    status, output = piped.end()
    assert status == 0
    assert output == [
        *JOINING,
        "? Its password?",
        "Password: ",
        "* Welcome, Alex!",
        "You: /register",
        "Bob: Hi!",
        "? The new password?",
        "Password: ",
        "You: Hello",
        "You: q",
        *LEFT,
    ]


def test_pasted_password_is_not_shown(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address)
    caller = join(puppet, alex)

    alex.type(paste("/register", PASSWORD, "Hello", ""))
    assert caller.line() == "/register"
    caller.say("? The new password?")

    assert caller.lines(2) == [PASSWORD, "Hello"]
    alex.wait_until(lambda: alex.screen.rows[-2:] == ["You: Hello", "You:"])
    assert PASSWORD not in alex.output


def test_password_is_never_sent_on_a_new_connection(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    """There it would be taken for a name, and shown to all."""
    alex = start_terminal(puppet.address)
    go_to("name", alex)
    alex.type(f"Alex{ENTER}")
    caller = puppet.accept()
    assert caller.line() == "Alex"
    caller.say("? Its password?")
    alex.wait_until(lambda: alex.screen.rows[-1] == "Password:")
    caller.close()

    alex.type(f"{PASSWORD}{ENTER}")

    alex.wait_for("Connection lost:")
    alex.wait_until(lambda: alex.screen.rows[-1] == "Enter your choice:")
    alex.type(f"1{ENTER}Sam{ENTER}")
    assert puppet.welcome().name == "Sam"


def test_private_message_looks_unlike_one_to_the_room(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address)
    caller = join(puppet, alex)

    caller.say("Bob (private): psst")
    caller.say("Bob: (private): no")
    alex.wait_for("Bob: (private): no")

    assert alex.screen.styles("Bob (private): psst") == {"35"}
    assert "35" not in alex.screen.styles("Bob: (private): no")


def test_own_name_is_bold_in_what_others_say(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address)
    caller = join(puppet, alex)

    caller.say("Bob: so alex, Alexandra is here")
    caller.say("Bob (private): is Alex?")
    alex.wait_for("(private)")

    assert alex.screen.styles("alex") == {"1"}
    assert alex.screen.styles(", Alexandra is here") == {""}
    assert alex.screen.styles("is Alex?") == {"35;1", "35"}


@pytest.mark.parametrize(
    ("line", "bells"),
    [
        ("Bob (private): psst", 1),
        ("Bob: you, ALEX?", 1),
        ("Bob: Alexandra", 0),
        ("* Alex is a name", 0),
        ("Bob: hello", 0),
    ],
)
def test_bell_rings_for_private_messages_and_for_the_own_name(
    puppet: Puppet, start_terminal: StartTerminal, line: str, bells: int
) -> None:
    for flags, expected in ([], 0), (["--bell"], bells):
        alex = start_terminal(puppet.address, [*PROGRAM, *flags])
        join(puppet, alex).say(line)
        alex.wait_for(line)
        assert alex.screen.bells == expected


def test_times_stand_before_what_comes_from_the_server(
    puppet: Puppet, start_piped: StartPiped
) -> None:
    piped = start_piped(puppet.address, [*PROGRAM, "--times", "--bell"])
    piped.write("1\nAlex\nHello\nq\n")
    puppet.welcome().close()

    _, output = piped.end()

    welcome = next(line for line in output if "Welcome" in line)
    assert re.fullmatch(r"[0-2]\d:[0-5]\d \* Welcome, Alex!", welcome)
    assert {*START, *NAMED, JOINING[-1]} < {*output}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("so sa\t!", "so Samuel!"),
        ("SA\t\t!", "Sam!"),
        ("sa\t\t\t!", "Samuel!"),
        ("/msg \t hi", "/msg Samuel hi"),
        ("/msg e\t hi", "/msg Eve hi"),
        ("e\t b\t d\t", "Eve Bob Dan"),
        (f"sa there{ARROW_LEFT * 6}\t", "Samuel there"),
        ("you\tx", "you    x"),
        ("al\tx", "al    x"),
    ],
)
def test_tab_completes_the_names_that_were_seen(
    puppet: Puppet, start_terminal: StartTerminal, keys: str, text: str
) -> None:
    alex = start_terminal(puppet.address)
    go_to("name", alex)
    alex.type(f"Alex{ENTER}")
    caller = puppet.accept()
    assert caller.line() == "Alex"
    caller.say("* Welcome, Alex! /help lists the commands. Also online: Bob, Eve.")
    caller.say("* 3 online: Alex, Bob, Dan")
    caller.say("* Sam has joined the chat.")
    caller.say("Samuel: hello you, there")
    alex.wait_for("Samuel: hello")

    alex.type(f"{keys}{ENTER}")

    assert caller.line() == text


# --- starts that fail, and odd surroundings -----------------------------------------


@pytest.mark.parametrize("host", ["", "a..b", "x" * 64, "no-such-host.invalid"])
def test_host_that_cannot_be_is_one_line_that_says_so(room: Room, host: str) -> None:
    port = room.address.rpartition(":")[2]

    run = run_program("--host", host, "--port", port)

    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.count("\n") == 1
    for part in host or "''", port, "--host":
        assert part in run.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_stream_without_a_descriptor_is_no_reason_for_a_traceback(
    room: Room, closed: str
) -> None:
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command(room.address)]

    run = subprocess.run(
        shell,
        check=False,
        input=b"1\nAlex\nq\n",
        capture_output=True,
        env=environment(),
        timeout=HANG_SECONDS,
    )

    assert run.returncode == 0
    assert run.stderr == b""


@pytest.mark.parametrize("files", [5, 6, 7])
def test_too_few_descriptors_are_one_line(room: Room, files: int) -> None:
    shell = f'ulimit -n {files} && exec "$@"'
    run = subprocess.run(
        ["sh", "-c", shell, "sh", *command(room.address)],
        check=False,
        input="q\n",
        capture_output=True,
        text=True,
        env=environment(),
        timeout=HANG_SECONDS,
    )

    assert "Traceback" not in run.stderr
    assert run.returncode == 0 or run.stderr.count("\n") == 1


def test_ctrl_c_while_python_imports_is_silent(tmp_path: Path) -> None:
    for name in "client.py", "protocol.py":
        (tmp_path / name).write_text((PROJECT / name).read_text())
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "argparse.py").write_text(interrupt)

    run = subprocess.run(
        [sys.executable, str(tmp_path / "client.py")], check=False, capture_output=True
    )

    assert (run.returncode, run.stderr) == (-signal.SIGINT, b"")


def test_old_python_is_one_line_that_says_what_is_needed() -> None:
    old = "import runpy, sys; sys.version_info = (3, 10); "
    run_it = f"runpy.run_path({PROGRAM[0]!r}, run_name='__main__')"

    run = subprocess.run(
        [sys.executable, "-c", old + run_it],
        check=False,
        capture_output=True,
        text=True,
    )

    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "3.11" in run.stderr


def test_prompt_goes_out_before_the_answer_if_only_the_keyboard_is_a_terminal(
    room: Room, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(room.address, shell='"$@" | cat')

    go_to("chat", alex)
    alex.type(f"q{ENTER}")

    alex.wait_for("Connection closed.")
    assert alex.end() == 0
    assert ESCAPE not in alex.output


def test_stop_that_comes_with_keys_is_heeded_at_once(chat: Chat) -> None:
    """It empties the system's buffer, so that there is nothing to read after all."""
    alex, _ = chat()

    for _ in range(20):
        alex.type(f"x{CTRL_Z}")
        assert alex.status() == 128 + signal.SIGTSTP
        alex.resume()
        alex.wait_until(lambda: alex.screen.takes_pastes)


def test_rest_of_the_sentence_is_no_answer_to_the_menu(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address)
    caller = join(puppet, alex)
    alex.type("the answers are")
    alex.wait_for("You: the answers are")

    caller.close()
    alex.wait_for("Connection lost:")
    alex.type(f" 1 and{ENTER}2{ENTER}")

    alex.wait_until(lambda: alex.screen.rows[-1] == "Enter your choice:")
    assert alex.is_silent(0.2)
