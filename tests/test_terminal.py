"""The real client in a real terminal: tmux, read as a person reads it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from helpers import HANG_SECONDS, PROJECT, Peer, Room, ServerProcess, split_address

SIZES = [(80, 24), (40, 12), (20, 4)]
POLL_SECONDS = 0.02  # tmux does not tell when a program has written
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

# What the person types at the shell; the status is told if the modes are as before.
RUN_CHAT = 'm=$(stty -a); ./chat; s=$?; [ "$m" = "$(stty -a)" ] && echo status $s'
STOPPED = f"status {128 + signal.SIGTSTP}"


class Window:
    """A window of a tmux server of its own, with a shell in it."""

    def __init__(self, socket_folder: str, folder: Path, size: tuple[int, int]) -> None:
        """socket_folder: a short path; folder: where the shell is."""
        self.columns, self.rows = size
        self._folder = folder
        self._environment = {
            "HOME": str(folder),
            "LC_ALL": "C.UTF-8",
            "PATH": os.environ["PATH"],
            "PS1": "$ ",
            "TERM": "xterm-256color",
            "TMUX_TMPDIR": socket_folder,
        }
        self._tmux(f"new-session -d -x {self.columns} -y {self.rows}", "sh", "-i")

    def close(self) -> None:
        """End tmux, and with it all that runs in the window."""
        self._tmux("kill-server")

    # --- hands ----------------------------------------------------------------------

    def type(self, text: str) -> None:
        """Type characters."""
        self._tmux("send-keys -l --", text)

    def press(self, key: str, times: int = 1) -> None:
        """Press a key, by the name that tmux has for it."""
        self._tmux(f"send-keys -N {times} {key}")

    def enter(self, text: str) -> None:
        """Type a line."""
        self.type(text)
        self.press("Enter")

    def paste(self, text: str, *, brackets: bool = False) -> None:
        """Paste a text, of whatever length, at once."""
        self._tmux("load-buffer -", stdin=text)
        self._tmux("paste-buffer -p" if brackets else "paste-buffer")

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the window, and wait until the program can know it."""
        self.columns, self.rows = columns, rows
        self._tmux(f"resize-window -x {columns} -y {rows}")
        with open(self._tmux("display-message -p #{pane_tty}").strip()) as terminal:
            # tmux takes its time if it is not the first change.
            self._wait_until(
                lambda: os.get_terminal_size(terminal.fileno()) == (columns, rows)
            )

    def clear(self) -> None:
        """Clear screen and scrollback, but for the prompt."""
        self.press("C-l")
        self._wait_until(lambda: self.screen() == ["You:", *[""] * (self.rows - 1)])
        self._tmux("clear-history")

    # --- eyes -----------------------------------------------------------------------

    def screen(self) -> list[str]:
        """Return the rows of the screen."""
        return self._tmux("capture-pane -p").splitlines()

    def everything(self) -> tuple[list[str], tuple[int, int]]:
        """Return the rows of scrollback and screen, and the cursor: row, column."""
        ask = "display-message -p #{history_size},#{cursor_y},#{cursor_x}"
        where, *rows = self._tmux(f"{ask} ; capture-pane -p -S -").splitlines()
        history, row, column = map(int, where.split(","))
        while rows and not rows[-1]:
            rows.pop()
        return rows, (history + row, column)

    def shows(self, rows: list[str], cursor: tuple[int, int]) -> bool:
        """Wait until this, and no more, is in scrollback and screen."""
        try:
            self._wait_until(lambda: self.everything() == (rows, cursor))
        except AssertionError:
            assert self.everything() == (rows, cursor)
        return True

    def wait_for(self, text: str) -> None:
        """Wait until some row shows this."""
        self._wait_until(lambda: any(text in row for row in self.everything()[0]))

    def shell_has_run(self, output: str) -> bool:
        """Tell whether the shell has run what prints this, of all it was told."""
        self.enter("echo all done")
        self._wait_until(lambda: "all done" in self.everything()[0])
        return output in self.everything()[0]

    # --- inside ---------------------------------------------------------------------

    def _wait_until(self, fact: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not fact():
            seen = ["It stays like this:", *self.everything()[0]]
            assert time.monotonic() < deadline, "\n".join(seen)
            threading.Event().wait(POLL_SECONDS)

    def _tmux(self, command: str, *arguments: str, stdin: str = "") -> str:
        """Run a command of tmux with arguments that may have spaces."""
        start = ["tmux", "-u", "-L", "chat", "-f", os.devnull]
        run = subprocess.run(
            [*start, *command.split(), *arguments],
            check=False,
            cwd=self._folder,
            env=self._environment,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            timeout=HANG_SECONDS,
        )
        assert (run.returncode, run.stderr) == (0, "")
        return run.stdout


OpenWindow = Callable[[str], Window]
Chat = tuple[Window, Peer]


@pytest.fixture
def open_window(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenWindow]:
    """Let Alex join a server, in a window that is cleared then.

    Its size is the first of SIZES, or what the test is parametrized with.
    """
    if not shutil.which("tmux"):
        reason = "tmux is not installed, which is the terminal of these tests"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    size = getattr(request, "param", SIZES[0])
    # The path of a socket may not be long, and that of tmp_path is.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as socket_folder,
        closing(Window(socket_folder, tmp_path, size)) as window,
    ):

        def join(address: str) -> Window:
            host, port = split_address(address)
            program = [sys.executable, str(PROJECT / "client.py")]
            command = shlex.join([*program, "--host", host, "--port", str(port)])
            chat = tmp_path / "chat"
            chat.write_text(f"#!/bin/sh\nexec {command}\n")
            chat.chmod(0o755)
            window.enter(RUN_CHAT)
            window.wait_for("Enter your choice:")
            window.enter("1")
            window.enter("Alex")
            window.wait_for("You:")
            window.clear()
            return window

        yield join


@pytest.fixture
def chat(room: Room, open_window: OpenWindow) -> Chat:
    """Alex in a window, and Bob without one."""
    bob = room.member("Bob")
    alex = open_window(room.address)
    assert bob.line() == "* Alex has joined the chat."
    return alex, bob


sizes = pytest.mark.parametrize("open_window", SIZES, indirect=True, ids=str)


def folded(text: str, columns: int) -> list[str]:
    """Return the rows that a line of narrow characters fills."""
    return [text[start : start + columns] for start in range(0, len(text), columns)]


# --- others write -------------------------------------------------------------------


@sizes
def test_a_hundred_lines_are_shown_once_each_above_the_line_being_typed(
    chat: Chat,
) -> None:
    """And what is typed meanwhile, in the middle of the line, is what arrives."""
    alex, bob = chat
    alex.type("half line")
    alex.press("Left", 4)

    for number in range(100):
        if number % 20 == 0:
            alex.type("abcde"[number // 20])
        bob.say(f"line {number}")

    lines = [f"Bob: line {number}" for number in range(100)]
    assert alex.shows([*lines, "You: half abcdeline"], cursor=(100, 15))
    assert alex.screen() == [*lines[1 - alex.rows :], "You: half abcdeline"]
    alex.press("Enter")
    assert bob.line() == "Alex: half abcdeline"


def test_what_is_typed_on_the_top_row_leaves_no_copies_in_the_scrollback(
    chat: Chat,
) -> None:
    alex, _ = chat

    for letter in "abc":
        alex.type(letter)
        alex.wait_for(letter)

    assert alex.shows(["You: abc"], cursor=(0, 8))


def test_joined_emoji_in_the_line_cost_nothing_of_what_others_said(chat: Chat) -> None:
    """They take the place of one; counted apart the line would seem to be longer."""
    alex, bob = chat
    family = "\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL}"
    bob.say("meet at nine?")
    alex.wait_for("meet at nine?")
    alex.type(f"{family} " * ((alex.columns - 5) // 4) + "!")
    alex.wait_for("!")
    bob.say("no, at ten")
    alex.wait_for("no, at ten")

    alex.press("C-u")
    alex.type("done")

    rows = ["Bob: meet at nine?", "Bob: no, at ten", "You: done"]
    assert alex.shows(rows, cursor=(2, 9))


@sizes
def test_line_that_wraps_keeps_its_rows_and_the_cursor_and_stays_when_it_is_sent(
    chat: Chat,
) -> None:
    alex, bob = chat
    typed = (ALPHABET * 8)[: alex.columns * 2]
    rows = folded(f"You: {typed}", alex.columns)
    alex.type(typed)
    alex.press("Left", alex.columns)
    assert alex.shows(rows, cursor=(1, 5))

    bob.say("hi")
    assert alex.shows(["Bob: hi", *rows], cursor=(2, 5))
    alex.press("Enter")

    assert bob.line() == f"Alex: {typed}"
    assert alex.shows(["Bob: hi", *rows, "You:"], cursor=(4, 5))


def test_row_that_is_just_full_leaves_no_empty_row(chat: Chat) -> None:
    """And a wide character at the margin, behind a combining one, wraps whole."""
    alex, bob = chat
    typed = (ALPHABET * 4)[: alex.columns - len("You: ")]
    alex.type(typed)
    assert alex.shows([f"You: {typed}"], cursor=(1, 0))
    bob.say("hi")
    assert alex.shows(["Bob: hi", f"You: {typed}"], cursor=(2, 0))

    alex.press("Enter")
    shown = ["Bob: hi", f"You: {typed}"]
    assert alex.shows([*shown, "You:"], cursor=(2, 5))
    alex.type(f"{typed[2:]}e\u0301日")

    assert alex.shows([*shown, f"You: {typed[2:]}e\u0301", "日"], cursor=(3, 2))


def test_change_of_the_windows_size_keeps_line_and_cursor(chat: Chat) -> None:
    alex, bob = chat
    # On a screen that is full: else tmux moves rows away from it that are in use.
    lines = [f"Bob: line {number}" for number in range(30)]
    for line in lines:
        bob.say(line.removeprefix("Bob: "))
    alex.wait_for(lines[-1])
    typed = ALPHABET
    alex.type(typed)
    alex.press("Left", 3)

    for columns, rows in [*SIZES[1:], SIZES[0]]:
        alex.resize(columns, rows)
        alex.type("-")
        bob.say("hi")
        lines.append("Bob: hi")
        typed = f"{typed[:-3]}-{typed[-3:]}"
        place = len("You: ") + len(typed) - 3
        cursor = len(lines) + place // columns, place % columns
        assert alex.shows([*lines, *folded(f"You: {typed}", columns)], cursor)
    alex.press("Enter")
    assert bob.line() == f"Alex: {typed}"


# --- pastes, leaving, and servers that are gone -------------------------------------


def test_ctrl_z_gives_the_terminal_back_and_fg_brings_back_line_and_cursor(
    chat: Chat,
) -> None:
    alex, bob = chat
    alex.type("half line")
    alex.press("Left", 4)
    alex.wait_for("half line")

    alex.press("C-z")
    alex.wait_for(STOPPED)
    bob.say("still there?")
    alex.enter("fg")
    alex.wait_for("Bob: still there?")
    alex.enter("a ")

    assert bob.line() == "Alex: half a line"
    alex.wait_for("You: half a line")
    rows, _ = alex.everything()
    assert rows[rows.index("Bob: still there?") + 1] == "You: half a line"


def test_shell_is_given_nothing_when_the_server_is_killed_in_mid_sentence(
    open_window: OpenWindow, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server()
    alex = open_window(server.address)
    alex.type("echo oops; in mid-")

    server.process.kill()
    alex.enter("sentence")
    alex.enter("echo given")
    alex.wait_for("Enter your choice:")
    alex.enter("2")
    alex.enter("echo given")

    alex.wait_for("status 1")
    assert not alex.shell_has_run("given")


def test_shell_is_given_nothing_of_a_paste_with_a_q_in_it(chat: Chat) -> None:
    alex, bob = chat
    lines = ["echo given", *"1234", "q", *["echo given"] * 294]

    alex.paste("".join(f"{line}\n" for line in lines), brackets=True)
    alex.wait_for("Send 300 lines?")
    alex.enter("y")
    said = bob.lines(300)
    alex.paste("q\n" + "echo given\n" * 299)

    assert said == [f"Alex: {line}" if line != "q" else "Alex: q " for line in lines]
    alex.wait_for("status 0")
    assert not alex.shell_has_run("given")
