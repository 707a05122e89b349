"""The real client in a real terminal: tmux, read as a person reads it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from helpers import HANG_SECONDS, PROJECT, Peer, Room, joined, split_address

SIZES = [(80, 24), (40, 12), (20, 4)]
POLL_SECONDS = 0.02  # tmux does not tell when a program has written
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Window:
    """A window of a tmux server of its own, with a program in it."""

    def __init__(self, folder: str, size: tuple[int, int], *command: str) -> None:
        """folder: for the socket of tmux, whose path may not be long."""
        self.columns, self.rows = size
        inherited = {"PATH": os.environ["PATH"], "TERM": "xterm-256color"}
        self._environment = {**inherited, "LC_ALL": "C.UTF-8", "TMUX_TMPDIR": folder}
        self._tmux(f"new-session -d -x {self.columns} -y {self.rows}", *command)

    def close(self) -> None:
        """End tmux, and with it what runs in the window."""
        self._tmux("kill-server")

    def type(self, text: str) -> None:
        """Type characters."""
        self._tmux("send-keys -l --", text)

    def press(self, key: str, times: int = 1) -> None:
        """Press a key, by the name that tmux has for it."""
        self._tmux(f"send-keys -N {times} {key}")

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
        self._wait_until(lambda: self.everything() == (rows, cursor))
        return True

    def wait_for(self, text: str) -> None:
        """Wait until some row shows this."""
        self._wait_until(lambda: any(text in row for row in self.everything()[0]))

    def _wait_until(self, fact: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not fact():
            assert time.monotonic() < deadline, self.everything()
            threading.Event().wait(POLL_SECONDS)

    def _tmux(self, command: str, *arguments: str) -> str:
        """Run a command of tmux with arguments that may have spaces."""
        start = ["tmux", "-u", "-L", "chat", "-f", os.devnull]
        run = subprocess.run(
            [*start, *command.split(), *arguments],
            check=False,
            env=self._environment,
            capture_output=True,
            encoding="utf-8",
            timeout=HANG_SECONDS,
        )
        assert (run.returncode, run.stderr) == (0, "")
        return run.stdout


Chat = tuple[Window, Peer]


@pytest.fixture
def chat(request: pytest.FixtureRequest, room: Room) -> Iterator[Chat]:
    """Alex in a window that is clear, and Bob without one.

    Its size is the first of SIZES, or what the test is parametrized with.
    """
    if not shutil.which("tmux"):
        reason = "tmux is not installed, which is the terminal of these tests"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    size = getattr(request, "param", SIZES[0])
    host, port = split_address(room.address)
    command = [sys.executable, str(PROJECT / "client.py"), f"--host={host}"]
    bob = room.member("Bob")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        closing(Window(folder, size, *command, f"--port={port}")) as alex,
    ):
        alex.type("1\nAlex\n")
        assert bob.line() == joined("Alex")
        alex.wait_for("You:")
        alex.clear()
        yield alex, bob


@pytest.mark.parametrize("chat", SIZES, indirect=True, ids=str)
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
        row, column = divmod(len("You: ") + len(typed) - 3, columns)
        line = f"You: {typed}"
        wrapped = [line[at : at + columns] for at in range(0, len(line), columns)]
        assert alex.shows([*lines, *wrapped], cursor=(len(lines) + row, column))
    alex.press("Enter")
    assert bob.line() == f"Alex: {typed}"
