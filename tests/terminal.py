"""A person at a terminal: a program on a pseudo-terminal, and what the screen shows.

Terminal runs a program under a shell with job control, so that Ctrl-C, Ctrl-Z and fg do
what they do for people.  Screen makes rows of text of what the program writes.  It
knows the escape sequences that the client may use, and fails on any other.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import signal
import subprocess
import termios
import threading
import time
import tty
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from helpers import HANG_SECONDS


class _Cell(NamedTuple):
    text: str  # a character and what combines with it; "" behind a wide one
    style: str  # the numbers of the last ESC [ ... m


def _text(row: list[_Cell]) -> str:
    """Return a row without the spaces at its end, as nobody sees them."""
    return "".join([cell.text for cell in row]).rstrip(" ")


class Screen:
    """What a terminal makes of the bytes that are written to it."""

    _TOKEN = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])|([^\x1b])", re.DOTALL)

    def __init__(self, columns: int, rows: int) -> None:
        self._columns, self._height = columns, rows
        self._rows: list[list[_Cell]] = [[]]
        self._row = 0
        self._column = 0  # the number of columns: the next character wraps
        self._style = ""
        self._unread = ""  # the beginning of an escape sequence
        self.takes_pastes = False  # between brackets
        self.bells = 0
        self.cleared = 0  # how often
        self.scrolled_off: list[str] = []  # rows that have left the screen at the top

    @property
    def rows(self) -> list[str]:
        """The rows down to the last one with text or the cursor in it."""
        rows = [_text(row) for row in self._rows]
        while len(rows) > self._row + 1 and not rows[-1]:
            rows.pop()
        return rows

    @property
    def everything(self) -> list[str]:
        """The rows that have scrolled off, and those on the screen."""
        return self.scrolled_off + self.rows

    @property
    def cursor(self) -> tuple[int, int]:
        """Row and column of the cursor."""
        return self._row, min(self._column, self._columns - 1)

    def styles(self, text: str) -> set[str]:
        """Return the styles in which the first occurrence of this text is shown."""
        row = next(row for row in self._rows if text in _text(row))
        cells = [cell for cell in row if cell.text]
        start = "".join([cell.text for cell in cells]).index(text)
        return {cell.style for cell in cells[start : start + len(text)]}

    def feed(self, text: str) -> None:
        """Interpret what was written."""
        self._unread += text
        place = 0
        while found := self._TOKEN.match(self._unread, place):
            place = found.end()
            numbers, command, char = found.groups()
            if char:
                self._put(char)
            else:
                self._obey(command, numbers)
        self._unread = self._unread[place:]
        assert len(self._unread) < 16, f"not understood: {self._unread!r}"

    def _put(self, char: str) -> None:
        if char == "\r":
            self._column = 0
        elif char == "\n":
            self._line_feed()
        elif char == "\a":
            self.bells += 1
        else:
            category = unicodedata.category(char)
            assert category != "Cc", f"control character {char!r}"
            if category in ("Mn", "Me", "Cf"):
                self._combine(char)
            else:
                self._print(char, 1 + (unicodedata.east_asian_width(char) in "WF"))

    def _print(self, char: str, width: int) -> None:
        if self._column + width > self._columns:
            self._column = 0
            self._line_feed()
        cells = self._rows[self._row]
        cells += [_Cell(" ", "")] * (self._column - len(cells))
        new = [_Cell(char, self._style), _Cell("", self._style)][:width]
        cells[self._column : self._column + width] = new
        self._column += width

    def _combine(self, mark: str) -> None:
        cells = self._rows[self._row]
        place = self._column - 1
        while not cells[place].text:  # the second half of a wide character
            place -= 1
        cells[place] = cells[place]._replace(text=cells[place].text + mark)

    def _line_feed(self) -> None:
        self._row += 1
        if self._row == len(self._rows):
            self._rows.append([])
        if self._row == self._height:
            self.scrolled_off.append(_text(self._rows.pop(0)))
            self._row -= 1

    def _obey(self, command: str, numbers: str) -> None:
        match command, numbers:
            case "m", "1" if self._style:
                self._style += ";1"
            case "m", "22":
                self._style = self._style.removesuffix("1").removesuffix(";")
            case "m", _:
                self._style = numbers
            case (("h" | "l"), "?2004"):
                self.takes_pastes = command == "h"
            case "A", _:
                self._row = max(0, self._row - int(numbers))
                self._column = min(self._column, self._columns - 1)
            case "C", _:
                self._column = min(self._column + int(numbers), self._columns - 1)
            case (("J" | "K"), ""):
                if command == "J":
                    del self._rows[self._row + 1 :]
                del self._rows[self._row][self._column :]
            case "J", "2":
                self.cleared += 1
                self._rows = [[] for _ in self._rows]
            case "H", "":
                self._row = self._column = 0
            case _:
                raise AssertionError(f"escape sequence ESC [ {numbers} {command}")


# The first shell makes the terminal ($0) the controlling one of its session: the session
# has none yet, and opening one is enough.  3 brings orders of the test, 4 takes reports
# to it, 5 will be the program's stderr.
_TAKE_TERMINAL = 'exec 3<&0 4>&1 5>&2 <>"$0" >&0 2>&0; exec "$@"'
# The second one is the shell of the person: when the program has stopped or ended, it
# reports the status, and for each line of order it continues the program.
_RUN_JOB = """
set -m
sh -c 'exec "$@" 2>&5 3<&- 4>&- 5>&-' sh "$@"
status=$?
while echo "$status" >&4 && read -r _ <&3; do
    fg >/dev/null
    status=$?
done
"""


class Terminal:
    """A program that runs on a terminal of its own, with a person at it."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        columns: int = 80,
        rows: int = 24,
    ) -> None:
        self.screen = Screen(columns, rows)
        self.output = ""  # all that was written, as it was written
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._reports = b""
        self._master, slave = os.openpty()
        os.set_blocking(self._master, False)
        termios.tcsetwinsize(self._master, (rows, columns))
        self.modes_before = self.modes()
        self._name = os.ttyname(slave)
        shells = ["sh", "-c", _TAKE_TERMINAL, self._name]
        self._shell = subprocess.Popen(
            [*shells, "sh", "-c", _RUN_JOB, "sh", *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.wait_until(lambda: self.output != "")  # the shells have opened it
        os.close(slave)

    # --- hands ----------------------------------------------------------------------

    def type(self, keys: str | bytes) -> None:
        """Press keys; Enter is a carriage return."""
        data = keys if isinstance(keys, bytes) else keys.encode()
        while data:
            # What the program shows meanwhile is read, or it might be stuck with it.
            ready = select.select([self._master], [self._master], [], HANG_SECONDS)
            assert ready[0] or ready[1], "the program does not read"
            if ready[0]:
                self._read()
            if ready[1]:
                data = data[os.write(self._master, data) :]

    @contextmanager
    def holding(self, key: str) -> Iterator[None]:
        """Hold a key down meanwhile."""
        released = threading.Event()

        def hold() -> None:
            while not released.wait(0.02):
                os.write(self._master, key.encode())

        with ThreadPoolExecutor(1) as pool:
            pool.submit(hold)
            try:
                yield
            finally:
                released.set()

    def resume(self) -> None:
        """Say fg to the shell."""
        assert self._shell.stdin
        self._shell.stdin.write(b"fg\n")
        self._shell.stdin.flush()

    # --- eyes -----------------------------------------------------------------------

    def wait_until(self, fact: Callable[[], bool]) -> None:
        """Read what the program writes until this is so."""
        deadline = time.monotonic() + HANG_SECONDS
        while not fact():
            ready = self._wait(deadline)
            assert ready, "\n".join(["It stays like this:", *self.screen.rows])

    def wait_for(self, text: str) -> None:
        """Wait until some row shows this."""
        self.wait_until(lambda: any(text in row for row in self.screen.rows))

    def shows(self, rows: list[str], cursor: tuple[int, int] | None = None) -> bool:
        """Wait until this, and no more, is what the screen shows."""

        def seen() -> bool:
            return self.screen.rows == rows and cursor in (None, self.screen.cursor)

        self.wait_until(seen)
        return True

    def is_silent(self, seconds: float) -> bool:
        """Tell whether the program writes nothing for so long."""
        return not select.select([self._master], [], [], seconds)[0]

    def drain(self) -> None:
        """Read what the program has written."""
        while not self.is_silent(0):
            self._read()

    def modes(self) -> list[Any]:
        """Return the modes of the terminal, as stty shows them."""
        return termios.tcgetattr(self._master)

    def unread(self) -> bytes:
        """Return what was typed and nobody has read: the shell is going to."""
        flags = os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK
        keyboard = os.open(self._name, flags)
        try:
            tty.setcbreak(keyboard, termios.TCSANOW)
            return os.read(keyboard, 65536)
        except BlockingIOError:
            return b""
        finally:
            termios.tcsetattr(keyboard, termios.TCSANOW, self.modes_before)
            os.close(keyboard)

    def pid(self) -> int:
        """Return the number of the process that runs in the foreground."""
        return os.tcgetpgrp(self._master)

    def status(self) -> int:
        """Return the status that the shell sees, once the program stops or ends."""
        self.wait_until(lambda: b"\n" in self._reports)
        report, _, self._reports = self._reports.partition(b"\n")
        return int(report)

    def end(self) -> int:
        """Return the exit status, once the program has ended and all of it is read.

        It must have left the terminal as it was, and nothing typed for the shell.
        """
        status = self.status()
        assert self.modes() == self.modes_before
        assert self.unread() == b""
        self.drain()
        assert not self.screen.takes_pastes
        self.close()
        return status

    def close(self) -> None:
        """Kill what still runs, read all that was written; again does nothing.

        Whatever has happened to the program, nothing may be on its stderr.
        """
        if self._shell.stdin is None or self._shell.stdin.closed:
            return
        assert self._shell.stdout
        assert self._shell.stderr
        with self._shell.stdin, self._shell.stdout, self._shell.stderr:
            if self._shell.poll() is None and self.pid() != self._shell.pid:
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(self.pid(), signal.SIGKILL)
            self._shell.stdin.close()  # the shell ends
            while self._read():
                pass
            os.close(self._master)
            self._shell.wait(HANG_SECONDS)
            assert self._shell.stderr.read() == b""

    # --- inside ---------------------------------------------------------------------

    def _wait(self, deadline: float) -> bool:
        """Read what comes next, from the program or the shell; False if it is late."""
        assert self._shell.stdout
        reports = self._shell.stdout.fileno()
        seconds = max(0.0, deadline - time.monotonic())
        ready = select.select([self._master, reports], [], [], seconds)[0]
        if self._master in ready:
            self._read()
        if reports in ready:
            report = os.read(reports, 100)
            self._reports += report
            return report != b""
        return ready != []

    def _read(self) -> bool:
        """Read from the program; False if no program has the terminal any more."""
        select.select([self._master], [], [], HANG_SECONDS)
        try:
            chunk = os.read(self._master, 65536)
        except OSError:  # EIO, on Linux
            return False
        text = self._decoder.decode(chunk)
        self.output += text
        self.screen.feed(text)
        return chunk != b""
