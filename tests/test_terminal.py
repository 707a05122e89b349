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
from pathlib import Path

import pytest
from helpers import HANG_SECONDS, PROJECT, Peer, Room, ServerProcess, split_address

SIZES = [(80, 24), (40, 12), (20, 4)]
POLL_SECONDS = 0.02  # tmux does not tell when a program has written
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
LEFT = ["Leaving the chat...", "Connection closed."]

# What the person types at the shell: a note of the terminal's modes, before and after.
RUN_CHAT = "stty -a >before; ./chat; s=$?; stty -a >after; echo status $s"
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

    def until(self, last: str) -> list[str]:
        """Return the rows up to this one, which is not among them."""
        self._wait_until(lambda: last in self.everything()[0])
        rows, _ = self.everything()
        return rows[: rows.index(last)]

    def made(self, name: str) -> bool:
        """Tell whether the shell has made a file, as far as it was told to."""
        self.enter("echo all done")
        self._wait_until(lambda: "all done" in self.everything()[0])
        return (self._folder / name).exists()

    def stty(self, moment: str) -> str:
        """Return the modes of the terminal, "before" or "after" the program."""
        return (self._folder / moment).read_text()

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


@pytest.fixture(params=SIZES, ids=["80x24", "40x12", "20x4"])
def open_window(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenWindow]:
    """Let Alex join a server, in a window that is cleared then."""
    if not shutil.which("tmux"):
        reason = "tmux is not installed, which is the terminal of these tests"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # The path of a socket may not be long, and that of tmp_path is.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as socket_folder:
        window = Window(socket_folder, tmp_path, request.param)

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

        try:
            yield join
        finally:
            window.close()


@pytest.fixture
def chat(room: Room, open_window: OpenWindow) -> Chat:
    """Alex in a window, and Bob without one."""
    bob = room.member("Bob")
    alex = open_window(room.address)
    assert bob.line() == "* Alex has joined the chat."
    return alex, bob


def folded(text: str, columns: int) -> list[str]:
    """Return the rows that a line of narrow characters fills."""
    return [text[start : start + columns] for start in range(0, len(text), columns)]


# --- others write -------------------------------------------------------------------


def type_while_bob_says_a_hundred_lines(alex: Window, bob: Peer) -> list[str]:
    """Let Alex type in the middle of a line; return Bob's lines as they are shown."""
    alex.type("half line")
    alex.press("Left", 4)
    for number in range(100):
        if number % 20 == 0:
            alex.type("abcde"[number // 20])
        bob.say(f"line {number}")
    alex.wait_for("line 99")
    return [f"Bob: line {number}" for number in range(100)]


def test_what_is_typed_while_a_hundred_lines_come_in_is_what_arrives(
    chat: Chat,
) -> None:
    alex, bob = chat
    type_while_bob_says_a_hundred_lines(alex, bob)

    alex.press("Enter")

    assert bob.line() == "Alex: half abcdeline"


def test_a_hundred_lines_are_shown_once_each_above_the_line_being_typed(
    chat: Chat,
) -> None:
    alex, bob = chat

    lines = type_while_bob_says_a_hundred_lines(alex, bob)

    assert alex.shows([*lines, "You: half abcdeline"], cursor=(100, 15))


def test_line_being_typed_stays_on_the_bottom_row(chat: Chat) -> None:
    alex, bob = chat
    lines = [f"Bob: line {number}" for number in range(alex.rows + 3)]
    for line in lines[:-1]:
        bob.say(line.removeprefix("Bob: "))
    alex.wait_for(lines[-2])
    alex.type("half")
    alex.wait_for("You: half")

    bob.say(lines[-1].removeprefix("Bob: "))

    assert alex.shows([*lines, "You: half"], cursor=(len(lines), 9))
    assert alex.screen() == [*lines[1 - alex.rows :], "You: half"]


def test_what_is_typed_on_the_top_row_leaves_no_copies_in_the_scrollback(
    chat: Chat,
) -> None:
    alex, _ = chat

    for letter in "abc":
        alex.type(letter)
        alex.wait_for(letter)

    assert alex.shows(["You: abc"], cursor=(0, 8))


# --- where the cursor stands --------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "steps", "column", "changed"),
    [
        ("日本語", 1, 9, "日本-語"),
        ("e\u0301a\u0308o", 2, 6, "e\u0301-a\u0308o"),
    ],
    ids=["wide", "combining"],
)
def test_cursor_stands_between_characters_that_are_not_one_cell_wide(
    chat: Chat, typed: str, steps: int, column: int, changed: str
) -> None:
    alex, bob = chat
    alex.type(typed)
    alex.press("Left", steps)
    bob.say("日本語")
    assert alex.shows(["Bob: 日本語", f"You: {typed}"], cursor=(1, column))

    alex.type("-")

    assert alex.shows(["Bob: 日本語", f"You: {changed}"], cursor=(1, column + 1))


def test_joined_emoji_in_the_line_cost_nothing_of_what_others_said(chat: Chat) -> None:
    """They take the place of one; counted apart the line would seem to be longer."""
    alex, bob = chat
    family = "\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL}"
    typed = f"{family} " * ((alex.columns - 5) // 4)
    bob.say("meet at nine?")
    alex.wait_for("meet at nine?")
    alex.type(f"{typed}!")
    alex.wait_for("!")
    bob.say("no, at ten")
    alex.wait_for("no, at ten")

    alex.press("C-u")
    alex.type("done")

    rows = ["Bob: meet at nine?", "Bob: no, at ten", "You: done"]
    assert alex.shows(rows, cursor=(2, 9))


def test_line_that_wraps_keeps_its_rows_and_the_cursor(chat: Chat) -> None:
    alex, bob = chat
    typed = (ALPHABET * 8)[: alex.columns * 2]
    rows = folded(f"You: {typed}", alex.columns)
    alex.type(typed)
    alex.press("Left", alex.columns)
    assert alex.shows(rows, cursor=(1, 5))

    bob.say("hi")

    assert alex.shows(["Bob: hi", *rows], cursor=(2, 5))


def test_line_that_wraps_stays_whole_when_it_is_sent(chat: Chat) -> None:
    alex, bob = chat
    typed = (ALPHABET * 8)[: alex.columns * 2]
    alex.type(typed)
    alex.press("Left", alex.columns)

    alex.press("Enter")

    assert bob.line() == f"Alex: {typed}"
    rows = folded(f"You: {typed}", alex.columns)
    assert alex.shows([*rows, "You:"], cursor=(3, 5))


def test_row_that_is_just_full_leaves_no_empty_row(chat: Chat) -> None:
    alex, bob = chat
    typed = (ALPHABET * 4)[: alex.columns - len("You: ")]
    alex.type(typed)
    assert alex.shows([f"You: {typed}"], cursor=(1, 0))
    bob.say("hi")
    assert alex.shows(["Bob: hi", f"You: {typed}"], cursor=(2, 0))

    alex.press("Enter")

    assert alex.shows(["Bob: hi", f"You: {typed}", "You:"], cursor=(2, 5))


def test_wide_character_at_the_margin_goes_to_the_next_row_whole(chat: Chat) -> None:
    alex, bob = chat
    narrow = "a" * (alex.columns - len("You: ") - 1)
    alex.type(f"{narrow}日")
    bob.say("hi")

    assert alex.shows(["Bob: hi", f"You: {narrow}", "日"], cursor=(2, 2))


def test_change_of_the_windows_size_keeps_line_and_cursor(chat: Chat) -> None:
    alex, bob = chat
    size = alex.columns, alex.rows
    # On a screen that is full: else tmux moves rows away from it that are in use.
    lines = [f"Bob: line {number}" for number in range(30)]
    for line in lines:
        bob.say(line.removeprefix("Bob: "))
    alex.wait_for(lines[-1])
    alex.type(ALPHABET)
    alex.press("Left", 3)

    for columns, rows in [other for other in SIZES if other != size] + [size]:
        alex.resize(columns, rows)
        bob.say("hi")
        lines.append("Bob: hi")
        typed = folded(f"You: {ALPHABET}", columns)
        cursor = len(lines) + 28 // columns, 28 % columns
        assert alex.shows([*lines, *typed], cursor)


def test_typing_goes_on_when_the_windows_size_changes(chat: Chat) -> None:
    alex, bob = chat
    alex.type("half line")
    alex.press("Left", 4)

    alex.resize(15, 8)
    alex.type("a ")
    assert alex.shows(["You: half a lin", "e"], cursor=(0, 12))
    alex.press("Enter")

    assert bob.line() == "Alex: half a line"


# --- many lines ---------------------------------------------------------------------


def test_up_and_down_bring_the_messages_back(chat: Chat) -> None:
    alex, bob = chat
    alex.enter("first")
    alex.enter("second")
    assert bob.lines(2) == ["Alex: first", "Alex: second"]

    sent = ["You: first", "You: second"]
    alex.press("Up", 2)
    assert alex.shows([*sent, "You: first"], cursor=(2, 10))
    alex.press("Down")

    assert alex.shows([*sent, "You: second"], cursor=(2, 11))


def test_paste_of_thirty_lines_sends_them_all_in_order(chat: Chat) -> None:
    alex, bob = chat
    lines = [f"line {number}" for number in range(30)]

    alex.paste("".join(f"{line}\n" for line in lines))

    assert bob.lines(30) == [f"Alex: {line}" for line in lines]


def test_paste_of_thirty_lines_shows_each_of_them_once(chat: Chat) -> None:
    alex, _ = chat
    lines = [f"line {number}" for number in range(30)]

    alex.paste("".join(f"{line}\n" for line in lines))

    shown = [f"You: {line}" for line in lines]
    assert alex.shows([*shown, "You:"], cursor=(30, 5))


# --- leaving ------------------------------------------------------------------------


def test_ctrl_c_with_half_a_line_typed_leaves_with_status_130(chat: Chat) -> None:
    alex, _ = chat
    alex.type("half a line")
    alex.wait_for("half a line")

    alex.press("C-c")

    assert alex.until("status 130") == ["You: half a line", *LEFT]
    assert alex.stty("after") == alex.stty("before")


def test_ctrl_d_on_an_empty_line_leaves_with_status_0(chat: Chat) -> None:
    alex, _ = chat

    alex.press("C-d")

    assert alex.until("status 0") == ["You:", *LEFT]
    assert alex.stty("after") == alex.stty("before")


def test_ctrl_z_gives_the_terminal_back_to_the_shell(chat: Chat) -> None:
    alex, _ = chat
    alex.type("half line")
    alex.wait_for("half line")

    alex.press("C-z")

    alex.wait_for(STOPPED)
    assert alex.stty("after") == alex.stty("before")


def test_fg_after_ctrl_z_brings_back_line_and_cursor(chat: Chat) -> None:
    alex, bob = chat
    alex.type("half line")
    alex.press("Left", 4)
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


def test_killed_server_leads_to_the_menu_and_back_to_the_half_typed_line(
    open_window: OpenWindow, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server()
    alex = open_window(server.address)
    alex.type("half a line")
    alex.press("Left", 4)
    alex.wait_for("half a line")

    server.process.kill()
    server.process.wait()
    alex.wait_for("Enter your choice:")
    start_server("--port", server.address.rpartition(":")[2])
    alex.enter("1")
    alex.wait_for("[Alex]:")
    alex.press("Enter")

    alex.wait_for("* Welcome, Alex!")
    lines = [
        "You: half a line",
        "Connection lost: the server closed the connection.",
        *["1. Join the chat", "q. Leave the chat", "2. Exit the program"],
        "Enter your choice: 1",
        "Enter your username [Alex]:",
        "Joining the chat as Alex...",
        "* Welcome, Alex! /help lists the commands. Also online: nobody yet.",
        "You: half a line",
    ]
    rows = [row.rstrip() for line in lines for row in folded(line, alex.columns)]
    assert alex.shows(rows, cursor=(len(rows) - 1, 12))


def test_shell_is_given_nothing_when_the_server_is_killed_in_mid_sentence(
    open_window: OpenWindow, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server()
    alex = open_window(server.address)
    alex.type("echo oops; in mid-")

    server.process.kill()
    alex.enter("sentence")
    alex.enter("touch given")
    alex.wait_for("Enter your choice:")
    alex.enter("2")
    alex.enter("touch given")

    alex.wait_for("status 1")
    assert not alex.made("given")
    assert alex.stty("after") == alex.stty("before")


def test_shell_is_given_nothing_of_a_paste_with_a_q_in_it(chat: Chat) -> None:
    alex, bob = chat
    lines = [
        "touch given",
        *["one", "two", "three", "four"],
        "q",
        *["touch given"] * 294,
    ]

    alex.paste("".join(f"{line}\n" for line in lines), brackets=True)
    alex.wait_for("Send 300 lines?")
    alex.enter("y")
    said = bob.lines(300)
    alex.paste("q\n" + "touch given\n" * 299)

    assert said == [f"Alex: {line}" if line != "q" else "Alex: q " for line in lines]
    alex.wait_for("status 0")
    assert not alex.made("given")
    assert alex.stty("after") == alex.stty("before")
