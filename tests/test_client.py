"""The real client, in pipes and on a terminal, with honest and other servers."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
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
    joined,
    left,
    needs_proc,
    split_address,
    wait_until,
)
from terminal import Terminal

import client

MENU = ["1. Join the chat", "q. Leave the chat", "2. Exit the program"]
START = ["Connected to server.", *MENU]
NAMED = ["Enter your choice: 1", "Enter your username: Alex"]
JOINING = [*START, *NAMED, "Joining the chat as Alex..."]
WELCOME = "* Welcome, Alex! /help lists the commands. Also online: "
LEFT = ["Leaving the chat...", "Connection closed."]
EXITED = ["Exiting the program.", "Connection closed."]
FULL = "! The chat is full, please try again later."
LOST = "Connection lost: the server closed the connection."
REFUSED = "Connection lost: Connection refused."
HAS_JOINED, HAS_LEFT = joined("Alex"), left("Alex")

ENTER, ESCAPE, BACKSPACE, DELETE = "\r", "\x1b", "\x7f", "\x1b[3~"
CTRL_A, CTRL_C, CTRL_D, CTRL_L, CTRL_Z = "\x01", "\x03", "\x04", "\x0c", "\x1a"
CTRL_K, CTRL_U, CTRL_W = "\x0b", "\x15", "\x17"
UP, DOWN, RIGHT, LEFT_KEY = "\x1b[A", "\x1b[B", "\x1b[C", "\x1b[D"


def paste(*lines: str) -> str:
    """Return what a terminal sends for a paste."""
    return f"\x1b[200~{ENTER.join(lines)}\x1b[201~"


# --- who takes part -----------------------------------------------------------------

PROGRAM = [str(PROJECT / "client.py")]


def changed(change: str) -> list[str]:
    """Return the program with a change: Python that is run before it."""
    path = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); import client"
    return ["-c", f"{path}\n{change}\nsys.exit(client.client_program())"]


def impatient(share: float) -> list[str]:
    """Return the program, but that a server that hangs holds it up for less long."""
    return changed(f"client.LEAVE_SECONDS *= {share}")


def command(address: str, program: list[str] = PROGRAM) -> list[str]:
    """Return what starts the client."""
    host, port = split_address(address)
    return [sys.executable, *program, "--host", host, "--port", str(port)]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a person who has not set anything special."""
    inherited = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    return {**inherited, "TERM": "xterm-256color", "PYTHONUTF8": "1", **variables}


def run(
    command: list[str], typed: str | bytes = "", shell: str = 'exec "$@"'
) -> tuple[int, list[str], list[str]]:
    """Run a program to its end; return exit status, output and errors, in lines.

    typed: its whole input; shell: what the shell does with the command.
    """
    ended = subprocess.run(
        ["sh", "-c", shell, "sh", *command],
        check=False,
        env=environment(),
        input=typed.encode() if isinstance(typed, str) else typed,
        capture_output=True,
        timeout=HANG_SECONDS,
    )
    *output, last = ended.stdout.decode().split("\n")
    *errors, last_error = ended.stderr.decode().split("\n")
    assert last == last_error == ""
    return ended.returncode, output, errors


def run_client(address: str, typed: str | bytes) -> tuple[int, list[str]]:
    """Run the client with this as its whole input; return exit status and output."""
    status, output, errors = run(command(address), typed)
    assert errors == []
    return status, output


class PipedClient:
    """A client in pipes, whose input comes bit by bit."""

    def __init__(self, address: str, typed: str, program: list[str]) -> None:
        self.process = subprocess.Popen(
            command(address, program),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout
        self.output = LineReader(self.process.stdout.fileno())
        self.write(typed)

    def write(self, text: str) -> None:
        """Write to its input."""
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

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
    with ExitStack() as clients:

        def start(
            address: str, typed: str = "", program: list[str] = PROGRAM
        ) -> PipedClient:
            return clients.enter_context(closing(PipedClient(address, typed, program)))

        yield start


StartTerminal = Callable[..., Terminal]
Chat = tuple[Terminal, Peer]


@pytest.fixture
def start_terminal(no_leaks: None) -> Iterator[StartTerminal]:
    """Start clients on terminals; on leaving they are killed."""
    with ExitStack() as terminals:

        def start(
            address: str,
            program: list[str] = PROGRAM,
            *,
            at: str = "menu",
            shell: str = "",
            **variables: str,
        ) -> Terminal:
            wrapper = ["sh", "-c", shell, "sh"] if shell else []
            full_command = [*wrapper, *command(address, program)]
            alex = Terminal(full_command, environment(**variables))
            terminals.enter_context(closing(alex))
            go_to(at, alex)
            return alex

        yield start


def go_to(place: str, alex: Terminal) -> None:
    """Go from the start to the menu, to the name, or into the chat; or stay there."""
    if place != "start":
        alex.wait_for("Enter your choice:")
    if place in ("name", "chat"):
        alex.type(f"1{ENTER}")
        alex.wait_for("Enter your username:")
    if place == "chat":
        alex.type(f"Alex{ENTER}")
        wait_for_prompt(alex)


def wait_for_prompt(alex: Terminal, prompt: str = "You:") -> None:
    """Wait until nothing but this is on the last row."""
    alex.wait_until(lambda: alex.screen.rows[-1] == prompt)


def clear(alex: Terminal) -> None:
    """Clear the screen, and forget what has left it, but for the prompt."""
    cleared = alex.screen.cleared
    alex.type(CTRL_L)
    alex.wait_until(lambda: alex.screen.cleared > cleared)
    assert alex.shows(["You:"], cursor=(0, 5))
    alex.screen.scrolled_off.clear()


def meet(room: Room, alex: Terminal) -> Peer:
    """Let Alex, who is at the menu, join; and Bob before him, who is returned."""
    bob = room.member("Bob")
    go_to("chat", alex)
    assert bob.line() == HAS_JOINED
    clear(alex)
    return bob


@pytest.fixture(scope="module")
def one_chat() -> Iterator[Chat]:
    """One chat, in a small window, for many tests that leave nothing behind."""
    room = Room(lines_per_second=0)
    try:
        start = command(room.address), environment()
        with closing(Terminal(*start, columns=20, rows=10)) as alex:
            yield alex, meet(room, alex)
    finally:
        room.close_peers()
        room.stop()


@pytest.fixture
def small_chat(one_chat: Chat) -> Chat:
    """Alex in a window of 20 columns and 10 rows, which is clear, and Bob."""
    clear(one_chat[0])
    return one_chat


class Caller(Peer):
    """A client that has called the test's own server."""

    def __init__(self, accepted: socket.socket) -> None:
        accepted.settimeout(HANG_SECONDS)
        self.name = ""
        self.socket = accepted
        self._lines: deque[bytes] = deque()
        self._tail = b""

    def give_up(self) -> None:
        """End the connection as the server does when nobody joins."""
        self.say("! You have not joined within 120 seconds.")
        self.close()


class Puppet:
    """A server that does what the test says, and nothing else."""

    def __init__(self, start_piped: StartPiped, start_terminal: StartTerminal) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Accepted sockets inherit it: little is on its way unread.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        self._listener.settimeout(HANG_SECONDS)
        self._callers: list[Caller] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.piped = partial(start_piped, self.address)
        self.terminal = partial(start_terminal, self.address)

    def accept(self) -> Caller:
        """Take the next connection."""
        self._callers.append(Caller(self._listener.accept()[0]))
        return self._callers[-1]

    def hear(self, name: str = "Alex") -> Caller:
        """Take the next connection, which gives this name."""
        caller = self.accept()
        assert caller.line() == name
        return caller

    def welcome(self, name: str = "Alex") -> Caller:
        """Take the next connection, and the name it gives."""
        caller = self.hear(name)
        caller.say(f"* Welcome, {name}!")
        return caller

    def join(self, alex: Terminal, name: str = "Alex") -> Caller:
        """Take in Alex, who is at the menu."""
        alex.type(f"1{ENTER}{name}{ENTER}")
        caller = self.welcome(name)
        wait_for_prompt(alex)
        return caller

    def close(self) -> None:
        """Take no more connections, and end those there are; again does nothing."""
        self._listener.close()
        for caller in self._callers:
            caller.close()


@pytest.fixture
def puppet(start_piped: StartPiped, start_terminal: StartTerminal) -> Iterator[Puppet]:
    """A server that does what the test says, and clients that call it."""
    with closing(Puppet(start_piped, start_terminal)) as server:
        yield server


# --- the client in pipes ------------------------------------------------------------


def test_piped_session_reads_like_one_at_a_terminal(room: Room) -> None:
    bob = room.member("Bob")

    status, output = run_client(room.address, "1\nAlex\nHello everyone!\nq\n")

    welcome = "* Welcome, Alex! /help lists the commands. Also online: Bob."
    assert output == [*JOINING, welcome, "You: Hello everyone!", "You: q", *LEFT]
    assert status == 0
    assert bob.lines(3) == [HAS_JOINED, "Alex: Hello everyone!", HAS_LEFT]


@pytest.mark.parametrize(
    ("typed", "answers", "goodbye", "status"),
    [
        (" Q \n", ["Enter your choice:  Q "], LEFT, 0),
        ("\t2 \n", ["Enter your choice:     2 "], EXITED, 0),
        ("q", ["Enter your choice: q"], LEFT, 0),
        ("", [], LEFT, 0),
        (" 1\n Q\n", ["Enter your choice:  1", "Enter your username:  Q"], LEFT, 1),
        ("1\n", ["Enter your choice: 1"], LEFT, 1),
    ],
)
def test_pipe_that_leaves_before_the_chat_has_failed_if_it_was_to_join(
    room: Room, typed: str, answers: list[str], goodbye: list[str], status: int
) -> None:
    assert run_client(room.address, typed) == (status, [*START, *answers, *goodbye])


def test_pipe_that_ends_before_the_server_has_answered_leaves(puppet: Puppet) -> None:
    ended = run(command(puppet.address, impatient(0.03)), "1\nAlex\n")

    assert ended == (1, [*JOINING, *LEFT], [])


def test_another_choice_gets_one_line_and_the_menu_again(room: Room) -> None:
    others = ["3", "", "12", "join", "1 1", "ｑ"]

    status, output = run_client(room.address, "\n".join([*others, "q\n"]))

    assert status == 0
    for other in others:
        turn, output = output[: len(START) + 1], output[len(START) + 1 :]
        assert turn[1:] == [*MENU, f"Enter your choice: {other}"]
        assert all(choice in output[0] for choice in "1q2")
    assert output[1:] == [*MENU, "Enter your choice: q", *LEFT]


@pytest.mark.parametrize(
    ("last", "choice", "status", "output"),
    [
        ("", "q", 0, LEFT),
        (FULL, "2", 0, EXITED),
        (FULL, "1", 1, [FULL]),
        ("", "1", 1, [REFUSED]),
        ("! You took too long.", "1", 1, [REFUSED]),
    ],
)
def test_server_that_is_gone_or_full_fails_those_alone_who_choose_to_join(
    puppet: Puppet, last: str, choice: str, status: int, output: list[str]
) -> None:
    piped = puppet.piped()
    assert piped.output.lines(len(START)) == START
    puppet.accept().send(f"{last}\n".lstrip())
    puppet.close()

    piped.write(f"{choice}\n")

    assert piped.end() == (status, [f"Enter your choice: {choice}", *output])


def test_prompt_in_a_pipe_appears_only_with_its_answer(
    room: Room, start_piped: StartPiped
) -> None:
    """So what others write stays on lines of its own."""
    bob = room.member("Bob")
    piped = start_piped(room.address, "1\nAlex\n")
    piped.output.until("* Welcome")

    bob.say("Hi!")
    assert piped.output.line() == "Bob: Hi!"
    piped.write("Hello")
    bob.say("Hi?")
    assert piped.output.line() == "Bob: Hi?"
    piped.write(" Bob!\nq\n")

    assert piped.end() == (0, ["You: Hello Bob!", "You: q", *LEFT])


def test_all_that_was_piped_reaches_a_slow_server_which_then_has_its_say(
    puppet: Puppet,
) -> None:
    """Closing earlier could reset the connection, and cost the server lines unread.

    The end of the input leaves as q does; a last line without its newline counts.
    """
    said = [f"line {number} {'x' * 1000}" for number in range(6000)]
    with ThreadPoolExecutor() as pool:
        typed = "\n".join(["1", "Alex", *said])
        ended = pool.submit(run, command(puppet.address, impatient(0)), typed)
        caller = puppet.welcome()

        assert caller.rest() == [*said, "q"]
        with pytest.raises(TimeoutError):
            ended.result(0.2)
        caller.say("* Still here.")
        caller.close()

    status, output, _ = ended.result()
    assert (status, output[-3:]) == (0, [LEFT[0], "* Still here.", LEFT[1]])


@pytest.mark.parametrize("moment", ["Enter your choice", "Joining", "* Welcome"])
def test_interrupted_piped_client_leaves_with_status_130(
    room: Room, start_piped: StartPiped, moment: str
) -> None:
    piped = start_piped(room.address, "1\nAlex\n")
    piped.output.until(moment)

    piped.process.send_signal(signal.SIGINT)

    status, output = piped.end()
    assert (status, output[-1]) == (130, LEFT[-1])
    room.connect().join("Alex")  # the name is free again


def test_piped_client_ends_by_itself_when_the_server_does(
    room: Room, start_piped: StartPiped
) -> None:
    piped = start_piped(room.address, "1\nAlex\n")
    piped.output.until("* Welcome")

    room.stop()

    assert piped.end() == (1, ["* Server is shutting down.", LOST])


def test_reset_while_a_pipe_is_leaving_is_told_and_has_status_1(puppet: Puppet) -> None:
    piped = puppet.piped("1\nAlex\nHello\nq\n")
    caller = puppet.welcome()
    piped.output.until("Leaving the chat...")

    caller.reset()

    lost = "Connection lost: Connection reset by peer."
    assert piped.end() == (1, [lost, "Connection closed."])


def test_refused_lines_do_not_touch_the_lines_around_them(room: Room) -> None:
    """What is not UTF-8, and what is too long, but not what only cleaning makes so."""
    bob = room.member("Bob")
    refused = [b"\xff\xfe", b"x" * 4097, b"x" * 1_000_000, b"\xc3"]
    tabs = b"\t" * 2000 + b"x"
    typed = b"\n".join([b"1", b"Alex", b"before", *refused, tabs, b"after", b"q"])

    status, output = run_client(room.address, typed)

    assert status == 0
    said = ["Alex: before", f"Alex: {' ' * 8000}x", "Alex: after"]
    assert bob.lines(4)[1:] == said
    refusals = sorted(line for line in output if line.startswith("!"))
    assert refusals == [
        *["! That line is longer than 4096 bytes."] * 2,
        *["! That line is not UTF-8."] * 2,
    ]


def test_refused_name_gets_the_reason_and_is_asked_for_again(room: Room) -> None:
    """After the fifth the server closes, and the client connects again."""
    room.member("Bob")

    status, output = run_client(room.address, "1\n\n" + "Bob\n" * 5 + "\tAlex \nq\n")

    assert status == 0
    assert "name" in output.pop(6)  # what is said of the blank one
    refused = ["Enter your username: Bob", "Joining the chat as Bob..."]
    reason, tries = "! The name Bob is taken.", " (5 of 5 tries on this connection)"
    assert output == [
        *[*START, "Enter your choice: 1", "Enter your username: "],
        *[*refused, reason] * 4,
        *[*refused, reason + tries],
        *["Enter your username:     Alex ", "Joining the chat as Alex..."],
        *[f"{WELCOME}Bob.", "You: q", *LEFT],
    ]


# --- what servers send --------------------------------------------------------------


AT_LIMIT = "x" * 32 * 1024
FROM_SERVER = {
    b"Bob: \x1b[2J\x1b]0;title\x07Hi": "Bob: \ufffd[2J\ufffd]0;title\ufffdHi",
    b"* \x1b[31mred\x1b[m": "* \ufffd[31mred\ufffd[m",
    b"Bob: a\rb\tc": "Bob: a\ufffdb    c",
    b"Bob: \xff\xc3": "Bob: \ufffd\ufffd",
    "Bob: 👩\u200d👩\u200d👧 é ｑ".encode(): "Bob: 👩\u200d👩\u200d👧 é ｑ",
    b"": "",
    b"neither a notice nor a message": "neither a notice nor a message",
    f"{AT_LIMIT}\r".encode(): AT_LIMIT,
    f"{AT_LIMIT}x".encode(): f"{AT_LIMIT}…",
    f"{AT_LIMIT[1:]}é".encode(): f"{AT_LIMIT[1:]}…",
    AT_LIMIT.encode() * 100: f"{AT_LIMIT}…",
}


def test_line_from_the_server_is_cleaned_and_cut_at_32_kibibytes_before_it_is_shown(
    puppet: Puppet,
) -> None:
    piped = puppet.piped("1\nAlex\n")
    caller = puppet.welcome()
    piped.output.until("* Welcome")

    for line, shown in FROM_SERVER.items():
        caller.send(line + b"\n")
        assert piped.output.line() == shown


def test_lines_in_pieces_are_shown_whole_and_an_endless_one_as_soon_as_it_is_cut(
    puppet: Puppet,
) -> None:
    """A line of no kind before the answer to the name is no answer."""
    piped = puppet.piped("1\nAlex\n")
    caller = puppet.hear()

    caller.send("Hi there.\n* Welcome!\n* Bob has joined the chat.\nBob: one\nBob: t")
    piped.output.until("* Welcome!")
    assert piped.output.lines(2) == ["* Bob has joined the chat.", "Bob: one"]
    piped.write("Hello\n")
    assert piped.output.line() == "You: Hello"
    caller.send(b"wo \xe2\x82")
    caller.send(b"\xac\r\n")
    assert piped.output.line() == "Bob: two €"
    caller.send("x" * 40_000)

    assert piped.output.line() == f"{AT_LIMIT}…"


# --- the start ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "status", "parts"),
    [
        (["--port", "1"], 1, ["127.0.0.1", "port 1:", "Connection refused"]),
        (["--host", ""], 1, ["''", "12345", "--host"]),
        (["--host", "a..b"], 1, ["a..b", "12345", "--host"]),
        (["--host", "no-such-host.invalid"], 1, ["no-such-host.invalid", "--host"]),
        (["--port", "0"], 2, ["'0'", "1 to 65535", "--help"]),
        (["--por", "12345"], 2, ["--por", "--help"]),
        (["localhost"], 2, ["localhost", "--help"]),
    ],
)
def test_start_that_fails_is_one_line_that_says_where_and_why(
    flags: list[str], status: int, parts: list[str]
) -> None:
    ended, output, errors = run([sys.executable, *PROGRAM, *flags])

    assert (ended, output, len(errors)) == (status, [], 1)
    assert [part for part in parts if part not in errors[0]] == []


def test_help_explains_every_flag_with_its_default() -> None:
    status, output, errors = run([sys.executable, *PROGRAM, "--help"])

    assert (status, errors) == (0, [])
    explained = " ".join(" ".join(output).split())
    flags = ["--host", "default: 127.0.0.1", "--port", "1 to 65535", "default: 12345"]
    for part in [*flags, "--times", "--bell"]:
        assert part in explained


def test_client_reaches_an_ipv6_address_in_brackets(
    start_room: Callable[..., Room],
) -> None:
    try:
        room = start_room("::1")
    except OSError:
        pytest.skip("no IPv6 here")
    flags = ["--host", "[::1]", "--port", room.address.rpartition(":")[2]]

    status, output, _ = run([sys.executable, *PROGRAM, *flags], "1\nAlex\nq\n")

    assert status == 0
    assert f"{WELCOME}nobody yet." in output


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_stream_without_a_descriptor_is_no_reason_for_a_traceback(
    room: Room, closed: str
) -> None:
    ended = run(command(room.address), "1\nAlex\nq\n", f'exec "$@" {closed}')

    assert ended[::2] == (0, [])


@pytest.mark.parametrize("files", [5, 6, 7, 9])
def test_too_few_descriptors_are_one_line(room: Room, files: int) -> None:
    shell = f'ulimit -n {files} && exec "$@"'

    status, _, errors = run(command(room.address), "q\n", shell)

    assert (status, len(errors)) in ((0, 0), (1, 1))


def test_ctrl_c_while_python_imports_is_silent(tmp_path: Path) -> None:
    for name in "client.py", "protocol.py":
        (tmp_path / name).write_text((PROJECT / name).read_text())
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "argparse.py").write_text(interrupt)

    ended = run([sys.executable, str(tmp_path / "client.py")])

    assert ended == (-signal.SIGINT, [], [])


def test_old_python_is_one_line_that_says_what_is_needed() -> None:
    old = "import runpy, sys; sys.version_info = (3, 10); "
    run_it = f"runpy.run_path({PROGRAM[0]!r}, run_name='__main__')"

    status, _, errors = run([sys.executable, "-c", old + run_it])

    assert (status, len(errors)) == (1, 1)
    assert "3.11" in errors[0]


TERMINALS = pytest.mark.parametrize("kind", ["xterm", "dumb"])


@TERMINALS
def test_session_at_a_terminal_which_gets_plain_lines_if_it_is_dumb(
    room: Room, start_terminal: StartTerminal, kind: str
) -> None:
    bob = room.member("Bob")
    alex = start_terminal(room.address, at="chat", TERM=kind)
    bob.say("Hi Alex!")
    alex.wait_until(lambda: alex.screen.rows[-2:] == ["Bob: Hi Alex!", "You:"])
    alex.type(f"Hello everyone!{ENTER}")
    assert bob.lines(2)[1:] == ["Alex: Hello everyone!"]
    alex.wait_until(lambda: alex.screen.rows[-2:] == ["You: Hello everyone!", "You:"])

    alex.type(f"q{ENTER}")

    assert alex.end() == 0
    assert bob.line() == HAS_LEFT
    prompt = ["You:"] if kind == "dumb" else []  # stays, and comes again
    talk = ["Bob: Hi Alex!", "You: Hello everyone!", "You: q"]
    shown = [*JOINING, f"{WELCOME}Bob.", *prompt, *talk, *LEFT, ""]
    assert alex.screen.rows == shown
    assert (ESCAPE in alex.output) == (kind == "xterm")


def test_whole_session_can_be_typed_ahead_or_pasted_without_brackets(
    room: Room, start_terminal: StartTerminal
) -> None:
    bob = room.member("Bob")
    alex = start_terminal(room.address)
    lines = [f"line {number} of the paste: ä日{'x' * 100}" for number in range(30)]

    alex.type("".join(f"{line}{ENTER}" for line in ["1", "Alex", *lines, "q"]))

    assert alex.end() == 0
    assert bob.lines(32) == [HAS_JOINED, *[f"Alex: {line}" for line in lines], HAS_LEFT]


A_Z = "abcdefghijklmnopqrstuvwxyz"
FIRST_ROW = "You: abcdefghijklmno"
WIDE = "日本語"


@pytest.mark.parametrize("full", [False, True], ids=["above", "at the bottom"])
@pytest.mark.parametrize(
    ("typed", "keys", "rows", "cursor"),
    [
        ("hello", LEFT_KEY * 2, ["You: hello"], (0, 8)),
        ("", "", ["You:"], (0, 5)),
        ("日本語", LEFT_KEY, ["You: 日本語"], (0, 9)),
        ("e\u0301a\u0308o", LEFT_KEY * 2, ["You: e\u0301a\u0308o"], (0, 6)),
        # More than a row, and the cursor in the second, and at its margin.
        (A_Z, LEFT_KEY * 10, [FIRST_ROW, "pqrstuvwxyz"], (1, 1)),
        (A_Z, LEFT_KEY * 11, [FIRST_ROW, "pqrstuvwxyz"], (1, 0)),
        (A_Z * 2, LEFT_KEY * 30, [FIRST_ROW, f"{A_Z[15:]}{A_Z[:9]}", A_Z[9:]], (1, 7)),
        # A row, and two, that are just full.
        (A_Z[:15], "", [FIRST_ROW, ""], (1, 0)),
        (A_Z[:15], LEFT_KEY, [FIRST_ROW], (0, 19)),
        (A_Z + "012345678", "", [FIRST_ROW, "pqrstuvwxyz012345678", ""], (2, 0)),
        # At the margin a wide and a combining character.
        (A_Z[:14] + "日", "", ["You: abcdefghijklmn", "日"], (1, 2)),
        (A_Z[:14] + "e\u0301", "", ["You: abcdefghijklmne\u0301", ""], (1, 0)),
        (WIDE * 5, LEFT_KEY * 8, [f"You: {WIDE * 2}日", f"本語{WIDE * 2}"], (1, 0)),
    ],
    ids=ascii,
)
def test_lines_of_others_appear_above_the_line_being_typed(
    small_chat: Chat,
    typed: str,
    keys: str,
    rows: list[str],
    cursor: tuple[int, int],
    full: bool,
) -> None:
    alex, bob = small_chat
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
    alex.wait_until(lambda: alex.screen.everything == [*above, *rows])
    row = len(above) - len(alex.screen.scrolled_off) + cursor[0]
    alex.wait_until(lambda: alex.screen.cursor == (row, cursor[1]))
    alex.type(ENTER)
    if typed:
        assert bob.line() == f"Alex: {typed}"
    sent = [*above, *(row for row in rows if row), "You:"]
    alex.wait_until(lambda: alex.screen.everything == sent)


def test_line_taller_than_the_screen_is_sent_and_shown_once(small_chat: Chat) -> None:
    alex, bob = small_chat
    typed = " ".join(f"word{number}" for number in range(60))
    line = f"You: {typed}"
    rows = [line[start : start + 20].rstrip() for start in range(0, len(line), 20)]
    assert len(rows) > 20

    alex.type(typed)
    wait_for_prompt(alex, rows[-1])
    bob.say("hi")
    alex.wait_until(lambda: "Bob: hi" in alex.screen.everything)
    alex.type(CTRL_A)
    alex.wait_until(lambda: alex.screen.cursor[1] == 5)
    first_rows = alex.screen.rows
    bob.say("ho")
    alex.wait_until(lambda: "Bob: ho" in alex.screen.everything)
    alex.type(ENTER)

    assert bob.line() == f"Alex: {typed}"
    assert first_rows[-9:] == rows[:9]
    shown = ["Bob: hi", "Bob: ho", *rows, "You:"]
    alex.wait_until(lambda: alex.screen.everything == shown)


def test_line_can_be_changed_in_the_middle_of_its_rows(small_chat: Chat) -> None:
    alex, bob = small_chat
    alex.type(A_Z + LEFT_KEY * 20)
    alex.type("0123456789" * 2)
    grown = ["You: abcdef012345678", "90123456789ghijklmno", "pqrstuvwxyz"]
    assert alex.shows(grown, cursor=(1, 11))

    alex.type(BACKSPACE * 24)

    assert alex.shows(["You: abghijklmnopqrs", "tuvwxyz"], cursor=(0, 7))
    alex.type(ENTER)
    assert bob.line() == "Alex: abghijklmnopqrstuvwxyz"


# --- editing ------------------------------------------------------------------------

WORD_LEFT, WORD_RIGHT = "\x1bb", "\x1bf"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        *[(f"ac{key}b", "abc") for key in (LEFT_KEY, "\x1bOD", "\x02")],
        *[(f"ac{LEFT_KEY * 2}{key}b", "abc") for key in (RIGHT, "\x1bOC", "\x06")],
        (f"bd{LEFT_KEY * 5}a{RIGHT}c{RIGHT * 5}e", "abcde"),
        *[(f"bc{home}a", "abc") for home in ("\x1b[H", "\x1bOH", "\x1b[1~", "\x1b[7~")],
        *[(f"b{CTRL_A}a{end}c", "abc") for end in ("\x1b[F", "\x1bOF", "\x1b[4~")],
        *[(f"b{CTRL_A}a{end}c", "abc") for end in ("\x1b[8~", "\x05")],
        *[(f"axb{LEFT_KEY * 2}{key}{key * 2}c", "ac") for key in (DELETE, CTRL_D)],
        *[(f"axb{LEFT_KEY}{key * 3}c", "cb") for key in (BACKSPACE, "\x08")],
        (f"abcdef{LEFT_KEY * 3}{CTRL_K}", "abc"),
        (f"abcdef{LEFT_KEY * 3}{CTRL_U}", "def"),
        (f"one two-three  {CTRL_W}", "one "),
        *[(f"one, two{k}x{k * 2}y", "yone, xtwo") for k in (WORD_LEFT, "\x1b[1;5D")],
        *[(f"a, b{CTRL_A}{k}x{k}y", "ax, by") for k in (WORD_RIGHT, "\x1b[1;5C")],
        *[(f"one{CTRL_A}two {k}x", "two onex") for k in ("\x1b[1;3C", "\x1b\x1b[C")],
        *[(f"one two{k}x", "one xtwo") for k in ("\x1b[1;3D", "\x1b\x1b[D")],
        (f"one two-three{ESCAPE}{BACKSPACE}x", "one two-x"),
        (f"one two{CTRL_A}{ESCAPE}dx", "x two"),
        (f"日本x語{LEFT_KEY}{BACKSPACE}", "日本語"),
        (f"ae\u0301{BACKSPACE}b", "ab"),
        (f"ae\u0301{LEFT_KEY}b", "abe\u0301"),
        (f"e\u0301a{CTRL_A}{RIGHT}b", "e\u0301ba"),
        (f"e\u0301a{CTRL_A}{DELETE}", "a"),
        (f"say cafe\u0301s{WORD_LEFT}x", "say xcafe\u0301s"),
        (f"cafe\u0301s x{CTRL_A}{WORD_RIGHT}-", "cafe\u0301s- x"),
        (f"ab{LEFT_KEY}{CTRL_L}c", "acb"),
        ("a\tb", "a    b"),
        # Keys of no meaning.
        ("a\x1b[15~b\x1b[201~c\x1bOPd\x00\x07\x1de", "abcde"),
        (" spaces  stay ", " spaces  stay "),
        (b"not \xff UTF-8", "not \ufffd UTF-8"),
        ("a \u200b \U0001f469\u200d\U0001f467", "a \u200b \U0001f469\u200d\U0001f467"),
    ],
    ids=ascii,
)
def test_editing_keys(one_chat: Chat, keys: str | bytes, text: str) -> None:
    alex, bob = one_chat

    alex.type(keys)
    alex.type(ENTER)

    assert bob.line() == f"Alex: {text}"


def test_up_and_down_go_through_the_messages_but_no_menu_answers_and_names(
    room: Room, start_terminal: StartTerminal
) -> None:
    bob = room.member("Bob")
    alex = start_terminal(room.address)
    alex.type(f"x{ENTER}")
    alex.type(f"{UP}1{ENTER}")
    alex.wait_for("Enter your username:")
    alex.type(f"{UP}Alex{ENTER}")
    assert bob.line() == HAS_JOINED
    for text in "one", "two", "three":
        alex.type(f"{text}{ENTER}")
        assert bob.line() == f"Alex: {text}"

    alex.type(f"half{UP * 2}")
    wait_for_prompt(alex, "You: two")
    alex.type(UP * 5)
    wait_for_prompt(alex, "You: one")
    alex.type(f"{DOWN} again{ENTER}")
    assert bob.line() == "Alex: two again"
    alex.type(f"half{UP}{DOWN * 3} a line{ENTER}")
    assert bob.line() == "Alex: half a line"
    alex.type(paste("q", "") + UP + ENTER)

    assert bob.lines(2) == ["Alex: q "] * 2


def test_up_finds_pasted_lines(small_chat: Chat) -> None:
    alex, bob = small_chat

    for first, last in ("1", "2"), ("3", "4"):
        alex.type(paste(first, last, ""))
        assert bob.lines(2) == [f"Alex: {first}", f"Alex: {last}"]
        alex.type(UP)
        wait_for_prompt(alex, f"You: {last}")
        alex.type(DOWN)
        wait_for_prompt(alex, "You:")


def test_tab_completes_the_names_that_were_seen(puppet: Puppet) -> None:
    alex = puppet.terminal(at="name")
    alex.type(f"Alex{ENTER}")
    caller = puppet.hear()
    caller.say(f"{WELCOME}Bob, Eve.")
    caller.say("* 3 online: Alex, Bob, Dan")
    caller.say("* Sam has joined the chat.")
    caller.say("* [2026-11-24 14:02] Zoe: well, yes")
    caller.say("Samuel: hello you, there")
    alex.wait_for("Samuel: hello")

    for keys, text in {
        "so sa\t!": "so Samuel!",
        "SA\t\t!": "Sam!",
        "sa\t\t\t!": "Samuel!",
        "/msg \t hi": "/msg Samuel hi",
        "/msg e\t hi": "/msg Eve hi",
        "e\t b\t d\t": "Eve Bob Dan",
        f"sa there{LEFT_KEY * 6}\t": "Samuel there",
        f"sa\t{paste(' e')}\t": "Samuel Eve",
        "zo\t": "Zoe",
        "ye\tx": "ye    x",
        "you\tx": "you    x",
        "al\tx": "al    x",
    }.items():
        alex.type(f"{keys}{ENTER}")
        assert caller.line() == text


def test_ctrl_z_and_fg_keep_what_was_typed(small_chat: Chat) -> None:
    alex, bob = small_chat
    alex.type(f"half a line{LEFT_KEY * 4}")
    assert alex.shows(["You: half a line"], cursor=(0, 12))
    assert alex.screen.takes_pastes

    alex.type(CTRL_Z)
    assert alex.status() == 128 + signal.SIGTSTP
    assert alex.modes() == alex.modes_before
    alex.drain()
    assert not alex.screen.takes_pastes
    bob.say("still there?")
    alex.resume()

    alex.wait_for("Bob: still there?")
    wait_for_prompt(alex, "You: half a line")
    assert alex.screen.cursor[1] == 12
    alex.wait_until(lambda: alex.screen.takes_pastes)
    alex.type(f"of {ENTER}")
    assert bob.line() == "Alex: half a of line"

    # With keys right before it: it empties the system's buffer, and nothing is to read.
    for _ in range(20):
        alex.type(f"x{CTRL_Z}")
        assert alex.status() == 128 + signal.SIGTSTP
        alex.resume()
        alex.wait_until(lambda: alex.screen.takes_pastes)
    alex.type(CTRL_U)


def cpu_ticks(alex: Terminal) -> int:
    """Return how many hundredths of a second of CPU the client has used."""
    stat = Path(f"/proc/{alex.pid()}/stat").read_text()
    user, system = stat.rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


@needs_proc
def test_huge_pasted_line_takes_little_at_each_key_and_waiting_takes_nothing(
    room: Room, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(room.address)
    meet(room, alex)
    alex.type(paste("word " * 100_000))
    alex.wait_until(lambda: len(alex.screen.rows) > 4)
    written, ticks = len(alex.output), cpu_ticks(alex)

    for key in "abc", WORD_LEFT, CTRL_W, "!":
        seen = len(alex.output)
        alex.type(key)
        alex.wait_until(lambda before=seen: len(alex.output) > before)  # type: ignore[misc]
    assert cpu_ticks(alex) - ticks < 50
    assert len(alex.output) - written < 10_000

    ticks = cpu_ticks(alex)
    assert alex.is_silent(0.2)
    assert cpu_ticks(alex) - ticks <= 1  # of the 20 that this took


# --- colours, bells, and terminals without them -------------------------------------


def test_names_have_colours_notices_are_dim_and_refusals_red(puppet: Puppet) -> None:
    """And what others write brings no style of its own."""
    alex = puppet.terminal()
    caller = puppet.join(alex)

    caller.send("Bob: hi\nBob: Bob: is my name\n* Bob has left the chat.\n! No.\n")
    caller.send("B\x1b[Hob: \x1b[2J\x1b[31mred\n")
    alex.wait_for("B\ufffd[Hob: \ufffd[2J\ufffd[31mred")

    styles = alex.screen.styles
    (colour,) = styles("Bob")
    assert colour not in ("", "0", "1", "2", "31", "35")
    assert styles(": hi") == styles(": is my name") == {""}
    assert styles("* Bob has left the chat.") == {"2"}
    assert styles("! No.") == {"31"}
    assert styles("[31mred") == styles("You:") == {""}


def test_private_messages_and_the_own_name_stand_out_and_ring_the_bell(
    puppet: Puppet,
) -> None:
    alex = puppet.terminal([*PROGRAM, "--bell"])
    caller = puppet.join(alex, "ＡＬＥＸ")

    for line, bells in {
        "Bob (private): psst": 1,
        "Bob: (private): no": 1,
        "Bob: so ALEX, Alexandra is here": 2,
        "Bob (private): is it Alex?": 3,
        "* Alex is a name": 3,
    }.items():
        caller.say(line)
        alex.wait_for(line)
        assert alex.screen.bells == bells

    styles = alex.screen.styles
    assert styles("Bob (private): psst") == {"35"}
    assert "35" not in styles("Bob: (private): no")
    assert styles("ALEX") == {"1"}
    assert styles(", Alexandra is here") == {""}
    assert styles("it Alex?") == {"35;1", "35"}


def test_no_color_means_no_colours_and_no_flag_no_bell(puppet: Puppet) -> None:
    alex = puppet.terminal(NO_COLOR="1")
    caller = puppet.join(alex)
    clear(alex)
    alex.type(f"hello{LEFT_KEY * 2}")

    caller.say("Bob: hi Alex")

    assert alex.shows(["Bob: hi Alex", "You: hello"], cursor=(1, 8))
    assert not re.search(r"\x1b\[[0-9;]*m|\a", alex.output)


def test_times_stand_before_what_comes_from_the_server(puppet: Puppet) -> None:
    """And in a pipe no bell rings."""
    piped = puppet.piped("1\nAlex\n", [*PROGRAM, "--times", "--bell"])
    caller = puppet.welcome()
    caller.say("Bob (private): psst")
    caller.close()

    _, output = piped.end()

    times = [re.sub(r"^[0-2]\d:[0-5]\d ", "14:02 ", line) for line in output]
    said = ["14:02 * Welcome, Alex!", "14:02 Bob (private): psst"]
    assert times == [*JOINING, *said, LOST]


@pytest.mark.parametrize(
    ("shell", "typed"),
    [(r"""printf '1\nAlex\nHello\nq\n' | "$@" """, ""), ('"$@" | cat', "q")],
    ids=["stdout", "keyboard"],
)
def test_no_escape_sequence_if_only_one_of_keyboard_and_stdout_is_a_terminal(
    room: Room, start_terminal: StartTerminal, shell: str, typed: str
) -> None:
    """The prompt goes out before the answer if it is the keyboard."""
    place = "chat" if typed else "start"
    alex = start_terminal(room.address, shell=shell, at=place)

    if typed:
        alex.type(f"{typed}{ENTER}")

    alex.wait_for("Connection closed.")
    assert alex.end() == 0
    assert ESCAPE not in alex.output
    talk = ["You: q"] if typed else ["You: Hello", "You: q"]
    assert alex.screen.rows == [*JOINING, f"{WELCOME}nobody yet.", *talk, *LEFT, ""]


# --- leaving ------------------------------------------------------------------------


LEAVING = {f"q{ENTER}": 0, CTRL_D: 0, CTRL_C: 130}  # with its exit status


@pytest.mark.parametrize("key", LEAVING, ids=repr)
@pytest.mark.parametrize(
    ("kind", "place"),
    [("xterm", "menu"), ("xterm", "name"), ("xterm", "chat"), ("dumb", "chat")],
)
def test_leaving_at_a_terminal(
    room: Room, start_terminal: StartTerminal, kind: str, place: str, key: str
) -> None:
    alex = start_terminal(room.address, at=place, TERM=kind)

    alex.type(key)

    assert alex.end() == LEAVING[key]
    assert alex.screen.rows[-3:] == [*LEFT, ""]
    assert alex.output.count(LEFT[0]) == 1
    room.connect().join("Alex")  # the name is free again


# That a paste is stuck in the sending shows soon if little fits into the system.
SMALL_SEND_BUFFER = f"""
client.LEAVE_SECONDS *= 0.1
connect = client.socket.create_connection
def connect_small(*address):
    connection = connect(*address)
    option = client.socket.SOL_SOCKET, client.socket.SO_SNDBUF
    connection.setsockopt(*option, {SMALL_BUFFER})
    return connection
client.socket.create_connection = connect_small
"""


def get_stuck_in_a_paste(alex: Terminal, caller: Caller) -> None:
    """Let Alex in, who pastes more than is read and than the system takes."""
    caller.say("* Welcome, Alex!")
    wait_for_prompt(alex)
    alex.type(paste(*["x" * 1000] * 200, "") + f"y{ENTER}")
    alex.wait_until(lambda: "You: x" in alex.output)
    while not alex.is_silent(0.1):
        alex.drain()


@pytest.mark.parametrize(
    ("moment", "kind", "key"),
    [
        *[("before joining", "dumb", key) for key in LEAVING],
        *[("in a paste", "xterm", key) for key in LEAVING],
        ("in a paste", "xterm", f"x{BACKSPACE}q{ENTER}"),
    ],
    ids=repr,
)
def test_server_that_hangs_holds_up_the_leaving_for_a_limited_time(
    puppet: Puppet, moment: str, kind: str, key: str
) -> None:
    """Here for a tenth of the usual time, so that 3 s is late enough on any machine."""
    assert client.LEAVE_SECONDS <= 3.0
    alex = puppet.terminal(changed(SMALL_SEND_BUFFER), TERM=kind)
    alex.type(f"1{ENTER}Alex{ENTER}")
    caller = puppet.hear()
    if moment == "in a paste":
        get_stuck_in_a_paste(alex, caller)

    began = time.monotonic()
    alex.type(key)

    assert alex.end() == LEAVING.get(key, 0)
    assert time.monotonic() - began < 3.0
    assert alex.output.count("Leaving the chat...") == 1
    assert alex.screen.rows[-2:] == ["Connection closed.", ""]


def test_pasted_lines_that_were_not_sent_are_counted_when_the_connection_is_lost(
    puppet: Puppet,
) -> None:
    alex = puppet.terminal(changed(SMALL_SEND_BUFFER), at="name")
    alex.type(f"Alex{ENTER}")
    caller = puppet.hear()
    get_stuck_in_a_paste(alex, caller)

    caller.reset()

    alex.wait_for("not sent")
    (unsent,) = re.findall(r"not sent: (\d+)", alex.output)
    assert 0 < int(unsent) == 200 - alex.output.count("You: x")
    alex.type(f"1{ENTER}{ENTER}{ENTER}")  # the one that was being sent is there again
    assert puppet.welcome().line() == "x" * 1000


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
@TERMINALS
def test_client_that_is_terminated_leaves_the_terminal_sane_and_sends_no_half_line(
    room: Room, start_terminal: StartTerminal, name: str, kind: str
) -> None:
    number = signal.Signals[name]
    bob = room.member("Bob")
    alex = start_terminal(room.address, at="chat", TERM=kind)
    assert bob.line() == HAS_JOINED
    alex.type(f"half a line{LEFT_KEY * 4 if kind == 'xterm' else ''}")
    alex.wait_for("half a line")

    os.kill(alex.pid(), number)

    assert alex.end() == 128 + number
    rows = ["You: half a line", *(LEFT if name == "SIGINT" else []), ""]
    assert alex.screen.rows[-len(rows) :] == rows
    assert bob.line() == HAS_LEFT


@TERMINALS
@pytest.mark.parametrize(
    ("keys", "patience"),
    [([f"q{ENTER}"], 0.03), ([CTRL_C], 0.03), ([CTRL_C, CTRL_C], HANG_SECONDS)],
    ids=["q", "Ctrl-C", "Ctrl-C twice"],
)
def test_what_is_typed_ahead_is_not_left_for_the_shell(
    puppet: Puppet, keys: list[str], patience: float, kind: str
) -> None:
    """The last check is that of end(): nothing is left to be read.

    A second Ctrl-C ends a leaving that takes too long.
    """
    alex = puppet.terminal(impatient(patience), TERM=kind)
    puppet.join(alex)

    for key in keys[:-1]:
        alex.type(key)
        alex.wait_for("Leaving the chat...")
    alex.type(f"{keys[-1]}rm -rf everything{ENTER}and{ENTER}half a line")

    assert alex.end() == LEAVING[keys[0]]
    assert alex.output.count("Leaving the chat...") == 1


def test_held_key_does_not_keep_the_client_from_ending(puppet: Puppet) -> None:
    alex = puppet.terminal(impatient(0.1))

    with alex.holding("x"):
        alex.type(f"\x15q{ENTER}")
        status = alex.status()

    assert status == 0


# The first connection is made; each later one hangs until something is typed.
HANGING_CONNECT = """
connect = client.socket.create_connection
def hang(*address):
    client.os.write(1, b"(connecting)\\n")
    client.select.select([0], [], [])
    raise TimeoutError("timed out")
def connect_once(*address):
    client.socket.create_connection = hang
    return connect(*address)
client.socket.create_connection = connect_once
"""


@pytest.mark.parametrize(("kind", "keys"), [("dumb", CTRL_D), ("xterm", f"q{ENTER}")])
def test_leaving_while_a_new_connection_is_being_made(
    puppet: Puppet, kind: str, keys: str
) -> None:
    alex = puppet.terminal(changed(HANGING_CONNECT), TERM=kind)
    puppet.join(alex).close()
    wait_for_prompt(alex, "Enter your choice:")
    alex.type(f"1{ENTER}")
    alex.wait_for("(connecting)")

    alex.type(keys)

    assert alex.end() == 1
    assert alex.screen.rows[-3:] == [*LEFT, ""]


@needs_proc
def test_client_that_is_terminated_while_it_is_stopped_ends(
    room: Room, start_terminal: StartTerminal
) -> None:
    """Continued in the background it may not touch the terminal: that would stop it."""
    alex = start_terminal(room.address)
    bob = meet(room, alex)
    process = alex.pid()
    alex.type(CTRL_Z)
    assert alex.status() == 128 + signal.SIGTSTP

    os.kill(process, signal.SIGTERM)
    os.kill(process, signal.SIGCONT)

    assert bob.line() == HAS_LEFT
    file = Path(f"/proc/{process}/cmdline")  # of a zombie it is empty
    wait_until(lambda: not file.exists() or file.read_bytes() == b"")
    assert alex.modes() == alex.modes_before


# --- servers that are full, and servers that are gone -------------------------------


def test_full_server_says_so_once_1_was_chosen_and_what_is_typed_ahead_is_forgotten(
    start_room: Callable[..., Room], start_terminal: StartTerminal
) -> None:
    room = start_room(max_clients=1)
    room.member("Bob")
    alex = start_terminal(room.address)
    assert alex.screen.rows == [*START, "Enter your choice:"]

    alex.type(f"1{ENTER}Alex{ENTER}half a line")

    assert alex.end() == 1
    # A busy server may say so only once the name has been given.
    assert alex.screen.rows[: len(START) + 1] == [*START, "Enter your choice: 1"]
    assert alex.screen.rows[-2:] == [FULL, ""]
    assert "half a line" not in alex.screen.rows[-3]


def test_server_that_has_become_full_ends_the_client(puppet: Puppet) -> None:
    alex = puppet.terminal(at="name")
    puppet.accept().close()

    alex.type(f"Alex{ENTER}")
    caller = puppet.accept()
    caller.say(FULL)
    caller.half_close()
    assert caller.rest() in ([], ["Alex"])

    assert alex.end() == 1
    assert alex.screen.rows == [*JOINING, FULL, ""]


@pytest.mark.parametrize("end", [Caller.close, Caller.reset, Caller.give_up])
def test_connection_that_ended_at_the_menu_or_at_the_name_is_made_again(
    puppet: Puppet, end: Callable[[Caller], None]
) -> None:
    alex = puppet.terminal()
    end(puppet.accept())
    go_to("name", alex)
    end(puppet.accept())

    alex.type(f"Alex{ENTER}")

    caller = puppet.welcome()
    alex.type(f"Hello{ENTER}q{ENTER}")
    assert caller.rest() == ["Hello", "q"]
    caller.close()
    assert alex.end() == 0
    talk = ["* Welcome, Alex!", "You: Hello", "You: q"]
    assert alex.screen.rows == [*JOINING, *talk, *LEFT, ""]


@pytest.mark.parametrize("place", ["menu", "name"])
def test_server_that_cannot_be_reached_again_leads_to_the_menu(
    puppet: Puppet, place: str
) -> None:
    alex = puppet.terminal(at=place)
    puppet.accept().give_up()
    puppet.close()

    alex.type(f"1{ENTER}" if place == "menu" else f"Alex{ENTER}")

    before = [*START, NAMED[0]] if place == "menu" else JOINING
    assert alex.shows([*before, REFUSED, *MENU, "Enter your choice:"])
    alex.type(f"q{ENTER}")
    assert alex.end() == 1


@TERMINALS
def test_killed_server_is_told_within_a_second_and_the_shell_gets_nothing(
    start_terminal: StartTerminal, start_server: Callable[..., ServerProcess], kind: str
) -> None:
    server = start_server()
    shell = '"$@"; echo "ended $?"; cat'
    alex = start_terminal(server.address, shell=shell, at="chat", TERM=kind)
    alex.type("in the middle of a line")
    alex.wait_for("You: in the middle of a line")
    above = alex.screen.rows

    server.process.kill()
    began = time.monotonic()
    alex.wait_for(LOST)

    assert time.monotonic() - began < 1.0
    assert alex.shows([*above, LOST, *MENU, "Enter your choice:"])
    alex.type(f"2{ENTER}ls{ENTER}")
    alex.wait_until(lambda: alex.screen.rows[-2:] == ["ended 1", ""])
    alex.type(CTRL_D)  # for cat, which was given nothing
    assert alex.end() == 0
    assert alex.screen.rows[-4:] == [*EXITED, "ended 1", ""]


def test_rest_of_the_sentence_is_no_answer_to_the_menu(puppet: Puppet) -> None:
    alex = puppet.terminal(TERM="dumb")
    caller = puppet.join(alex)
    alex.type("2")
    alex.wait_for("You: 2")

    caller.close()
    wait_for_prompt(alex, "Enter your choice:")
    alex.type(ENTER)

    alex.wait_for("Please choose one of these")
    alex.type(f"q{ENTER}")
    assert alex.end() == 1


def test_half_typed_line_is_typed_on_after_the_server_restarted(puppet: Puppet) -> None:
    """And the last words of the server that went are shown."""
    alex = puppet.terminal()
    caller = puppet.join(alex)
    clear(alex)
    alex.type(f"half a line{LEFT_KEY * 4}")
    alex.wait_for("You: half a line")

    caller.say("* Server is shutting down.")
    caller.close()
    last = ["* Server is shutting down.", "You: half a line"]
    assert alex.shows([*last, LOST, *MENU, "Enter your choice:"])
    alex.type(f"1{ENTER}")
    alex.wait_for("Enter your username [Alex]:")
    alex.type(ENTER)
    caller = puppet.welcome()

    wait_for_prompt(alex, "You: half a line")
    assert alex.screen.cursor[1] == 12
    alex.type(f"of {ENTER}q{ENTER}")
    assert caller.rest() == ["half a of line", "q"]
    caller.close()
    assert alex.end() == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ten_lost_connections_leave_no_thread_descriptor_or_stale_row(
    puppet: Puppet,
) -> None:
    alex = puppet.terminal()
    caller = puppet.join(alex)
    process = Path(f"/proc/{alex.pid()}")
    before = [len(list((process / kind).iterdir())) for kind in ("task", "fd")]
    expected = alex.screen.rows[:-1]

    reset = "Connection lost: Connection reset by peer."
    for end, lost in [(Caller.close, LOST), (Caller.reset, reset)] * 5:
        end(caller)
        wait_for_prompt(alex, "Enter your choice:")
        alex.type(f"1{ENTER}")
        wait_for_prompt(alex, "Enter your username [Alex]:")
        alex.type(ENTER)
        caller = puppet.welcome()
        again = [lost, *MENU, NAMED[0], "Enter your username [Alex]:"]
        expected += [*again, *JOINING[-1:], "* Welcome, Alex!"]
        wait_for_prompt(alex)
        assert alex.screen.everything == [*expected, "You:"]

    after = [len(list((process / kind).iterdir())) for kind in ("task", "fd")]
    assert after == before


def test_bug_in_the_receiver_is_told_and_does_not_hang_the_client(room: Room) -> None:
    bug = """
import protocol
decode = protocol.decode_shown
protocol.decode_shown = lambda line: 1 / 0 if b"online: Alex" in line else decode(line)
"""
    _, output, errors = run(command(room.address, changed(bug)), "1\nAlex\n/who\n")

    assert f"{WELCOME}nobody yet." in output
    assert "ZeroDivisionError: division by zero" in errors


# --- pastes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (paste("1", "q", "Q", "", "4", "5x") + BACKSPACE, ["1", "q ", "Q ", "4", "5"]),
        (paste("q"), ["q "]),
        (f"ad{LEFT_KEY}{paste('b', 'c')}", ["ab", "cd"]),
        (f"a b{paste()}c{paste('', 'd')}", ["a bc", "d"]),
        (paste("\t\x1b[31mc\x00\x07\x04d"), ["    \ufffd[31mc\ufffd\ufffd\ufffdd"]),
    ],
    ids=["five lines", "q", "between two halves", "nothing", "control characters"],
)
def test_pasted_q_is_text_as_all_that_is_pasted(
    small_chat: Chat, keys: str, said: list[str]
) -> None:
    alex, bob = small_chat

    alex.type(keys)
    wait_for_prompt(alex, f"You: {said[-1]}".rstrip())
    alex.type(ENTER)

    assert bob.lines(len(said)) == [f"Alex: {text}" for text in said]
    assert alex.shows([*[f"You: {text}".rstrip() for text in said], "You:"])


@pytest.mark.parametrize(("answer", "last"), [("y", ["line 19", ""]), (" Yes ", ["x"])])
def test_long_paste_is_sent_after_a_yes(
    small_chat: Chat, answer: str, last: list[str]
) -> None:
    alex, bob = small_chat
    lines = [*[f"line {number}" for number in range(19)], last[0]]

    alex.type(paste(*lines[:-1], *last))
    alex.wait_for("Send 20 lines? [y/N]")
    alex.type(f"{answer}{ENTER}")

    assert bob.lines(20) == [f"Alex: {line}" for line in lines]
    asked = ["Send 20 lines? [y/N]", f" {answer}".rstrip()]
    shown = [*asked, *[f"You: {line}" for line in lines], "You:"]
    alex.wait_until(lambda: alex.screen.everything == shown)


@pytest.mark.parametrize("answer", [ENTER, f"n{ENTER}", f"q{ENTER}", CTRL_D])
def test_no_to_a_long_paste_keeps_its_first_line(small_chat: Chat, answer: str) -> None:
    """Where it was pasted, with what stood behind the cursor."""
    alex, bob = small_chat

    lines = [f"line {number}" for number in range(6)]
    alex.type(f"say now{LEFT_KEY * 4}{paste(*lines, '')}")
    alex.wait_for("Send 6 lines?")
    alex.type(answer)
    wait_for_prompt(alex, "You: sayline 0 now")
    alex.type(f"!{ENTER}")

    assert bob.line() == "Alex: sayline 0! now"


def test_keys_and_pastes_that_come_in_pieces_are_whole(small_chat: Chat) -> None:
    alex, bob = small_chat
    keys = f"日b\x1b[1;5Dx{ENTER}{ESCAPE}{paste('q', 'ä', '')}"

    for byte in keys.encode():
        alex.type(bytes([byte]))
        alex.drain()

    assert bob.lines(3) == ["Alex: x日b", "Alex: q ", "Alex: ä"]


def test_paste_without_an_end_is_taken_once_it_is_silent_and_only_ctrl_c_ends_it(
    room: Room, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(room.address, changed("client.PASTE_SECONDS *= 0.1"))
    bob = meet(room, alex)

    alex.type("\x1b[200~one\rq\rthree")

    while not select.select([bob.socket], [], [], 0.05)[0]:
        bob.say("Others go on meanwhile.")
    assert bob.lines(2) == ["Alex: one", "Alex: q "]
    alex.type(f" and on{ENTER}")
    assert bob.line() == "Alex: three and on"
    alex.type("!\x1b[200~one\rq\r")
    wait_for_prompt(alex, "You: !")
    seen = len(alex.output)
    alex.type(CTRL_Z)  # the shell would get, and run, the rest
    alex.wait_until(lambda: len(alex.output) > seen)
    alex.type(CTRL_C)
    assert alex.end() == 130


def test_paste_that_goes_on_after_the_end_is_not_left_for_the_shell(
    puppet: Puppet,
) -> None:
    alex = puppet.terminal(impatient(0.03))
    puppet.join(alex)
    alex.type(f"q{ENTER}\x1b[200~one{ENTER}")
    alex.wait_for("Connection closed.")
    # The terminal is still taking its time, and the client waits for it.
    alex.wait_until(lambda: alex.is_silent(0.2) and alex.screen.takes_pastes)
    alex.type(f"two{ENTER}" * 1000 + "\x1b[201~")

    assert alex.end() == 0


# --- passwords ----------------------------------------------------------------------

PASSWORD = "correct horse battery"
ASKED = "? The password?"


def test_password_at_the_name_is_not_shown(puppet: Puppet) -> None:
    """And is never sent on a new connection, where it would be taken for a name."""
    alex = puppet.terminal(at="name")
    alex.type(f"Alex{ENTER}")
    caller = puppet.hear()

    caller.say(ASKED)
    wait_for_prompt(alex, "Password:")
    alex.type(f"{UP}wr\tong{ENTER}")
    assert caller.line() == "wrong"
    caller.say("! That is not it.")
    alex.wait_for("! That is not it.")
    alex.type(f"Alex{ENTER}")
    assert caller.line() == "Alex"
    caller.say(ASKED)
    wait_for_prompt(alex, "Password:")
    caller.close()
    alex.type(f"for nobody{ENTER}")
    wait_for_prompt(alex, "Enter your choice:")
    alex.type(f"1{ENTER}Sam{ENTER}")
    caller = puppet.hear("Sam")
    caller.say(ASKED)
    alex.type(f"{PASSWORD}{ENTER}")
    assert caller.line() == PASSWORD
    caller.say("* Welcome, Sam!")

    wait_for_prompt(alex)
    assert "wrong" not in alex.output
    assert PASSWORD not in alex.output


def test_password_in_the_chat_is_hidden_and_the_half_typed_line_comes_back(
    puppet: Puppet,
) -> None:
    alex = puppet.terminal()
    caller = puppet.join(alex)
    alex.type(f"/register{ENTER}a password for nobody{ENTER}")
    assert caller.line() == "/register"
    caller.say("! /register is no command.")
    alex.wait_for("is no command.")
    wait_for_prompt(alex)
    alex.type("half")
    wait_for_prompt(alex, "You: half")

    caller.say(ASKED)
    wait_for_prompt(alex, "Password:")
    caller.say("Bob: Hi!")
    alex.wait_until(lambda: alex.screen.rows[-2:] == ["Bob: Hi!", "Password:"])
    alex.type(f"{PASSWORD}{ENTER}")
    assert caller.line() == PASSWORD
    wait_for_prompt(alex, "You: half")
    assert alex.screen.rows.count("You: half") == 1
    alex.type(f"{UP * 2} a line{ENTER}")

    assert caller.line() == "/register"
    assert PASSWORD not in alex.output


def test_password_that_is_asked_for_right_behind_the_welcome_stops_nothing(
    puppet: Puppet,
) -> None:
    puppet.piped(f"1\nAlex\n{PASSWORD}\nHello!\n")
    caller = puppet.hear()

    caller.say(f"* Welcome, Alex!\n{ASKED}")

    assert caller.line() == PASSWORD
    assert caller.line() == "Hello!"


def test_password_on_a_dumb_terminal_is_not_shown_after_ctrl_z_and_fg(
    puppet: Puppet,
) -> None:
    alex = puppet.terminal(TERM="dumb")
    caller = puppet.join(alex)
    caller.say(ASKED)
    wait_for_prompt(alex, "Password:")
    hidden = alex.modes()

    alex.type(CTRL_Z)
    assert alex.status() == 128 + signal.SIGTSTP
    assert alex.modes() == alex.modes_before
    alex.resume()
    wait_until(lambda: alex.modes() == hidden)
    alex.type(f"{PASSWORD}{ENTER}")
    assert caller.line() == PASSWORD
    wait_for_prompt(alex)
    alex.type(f"Hello{ENTER}")

    assert caller.line() == "Hello"
    assert PASSWORD not in alex.output


def test_pasted_password_is_not_shown(puppet: Puppet) -> None:
    alex = puppet.terminal()
    caller = puppet.join(alex)

    alex.type(paste("/register", PASSWORD, "Hello", ""))
    assert caller.line() == "/register"
    caller.say(ASKED)

    assert caller.lines(2) == [PASSWORD, "Hello"]
    alex.wait_until(lambda: alex.screen.rows[-2:] == ["You: Hello", "You:"])
    assert PASSWORD not in alex.output


def test_password_in_a_pipe_is_the_next_line_and_is_not_shown(puppet: Puppet) -> None:
    piped = puppet.piped(f"1\nAlex\n{PASSWORD}\n/register\nanother one\nHello\nq\n")
    caller = puppet.hear()
    caller.say(ASKED)
    assert caller.line() == PASSWORD
    caller.say("* Welcome, Alex!")
    assert caller.line() == "/register"
    caller.say("Bob: Hi!")
    caller.say(ASKED)
    assert caller.lines(3) == ["another one", "Hello", "q"]
    caller.close()

    assert piped.end() == (
        0,
        [
            *[*JOINING, ASKED, "Password: ", "* Welcome, Alex!"],
            *["You: /register", "Bob: Hi!", ASKED, "Password: "],
            *["You: Hello", "You: q", *LEFT],
        ],
    )


@pytest.mark.parametrize(
    ("line", "refused", "heard"),
    [
        ("/register", "/registers is no command.", [PASSWORD, "q"]),
        ("/register", "That line is longer than 4096 bytes.", [PASSWORD, "q"]),
        ("/register", "/register is no command.", ["q"]),
        ("/register " + "x" * 4096, "/register is no command.", ["q"]),
    ],
    ids=["an earlier line", "an earlier long one", "the command", "its line"],
)
def test_piped_password_is_said_to_nobody_but_its_question_if_a_line_is_refused(
    puppet: Puppet, line: str, refused: str, heard: list[str]
) -> None:
    piped = puppet.piped(f"1\nAlex\n/foo\n{line}\n{PASSWORD}\nq\n")
    caller = puppet.welcome()
    assert caller.lines(2)[0] == "/foo"

    caller.say(f"! {refused}")
    if PASSWORD in heard:
        caller.say(ASKED)

    assert caller.rest() == heard
    caller.close()
    ended, output = piped.end()
    assert ended == (0 if PASSWORD in heard else 1)
    assert ("Password: " in output) == (PASSWORD in heard)
    assert PASSWORD not in "\n".join(output)
