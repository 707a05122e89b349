"""The chat client: a menu, a send loop and one thread that receives.

Threads:
  main          client_program: menu, keyboard, handle_chat (the send loop)
  receiver      receive_messages: shows what others write, above the line being typed

A terminal object owns keyboard and screen: LineEditor on a terminal, PlainTerminal for
pipes, dumb terminals and Windows.  Both have the same methods, so nothing else here
knows which one it talks to.
"""

from __future__ import annotations

import argparse
import codecs
import os
import re
import select
import signal
import socket
import sys
import threading
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn, Self

import protocol
from protocol import ServerLine

try:
    import fcntl
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

CONNECT_SECONDS = 10.0
LEAVE_SECONDS = 3.0  # that a hanging server may hold up a person who leaves
RECEIVE_BYTES = 65536
READ_BYTES = 4096  # of the keyboard or a pipe
HISTORY_LINES = 1000

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended: 128 + SIGINT
CHOICES = {"1": "Join the chat", "q": "Leave the chat", "2": "Exit the program"}


class ConnectionLost(Exception):
    """The server is gone, or full; str() of it is what to tell the person."""


class ChatClient:
    """One person's session: menu, name, chat."""

    def __init__(self, host: str, port: int, terminal: PlainTerminal) -> None:
        """Connect.  Raises OSError if there is no server."""
        self._address = (host, port)
        self._terminal = terminal
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.create_connection(self._address, CONNECT_SECONDS)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._splitter = protocol.LineSplitter(protocol.MAX_SHOWN_BYTES)
        self._lines: deque[ServerLine] = deque()  # received, but not looked at yet
        self._end = ""  # why the server is gone; set by the receiver

    def run(self) -> int:
        """Run the session and return the exit status.

        Raises ConnectionLost if the server ends it, KeyboardInterrupt for Ctrl-C.
        """
        with self._terminal:
            try:
                self._terminal.show("Connected to server.")
                choice = self.menu()
                if choice == "1":
                    self._check_connection()
                    if self._join():
                        return self.handle_chat(self._socket)
                leaving = "Exiting the program." if choice == "2" else ""
                self._say_goodbye(leaving or "Leaving the chat...")
                return 0
            except KeyboardInterrupt:
                self._say_goodbye("Leaving the chat...")
                return INTERRUPTED
            except ConnectionLost as error:
                self._terminal.show(str(error))
                return 1
            finally:
                # Wakes the receiver, if Ctrl-C came while handle_chat() started it.
                _shut_down(self._socket, socket.SHUT_RDWR)
                self._socket.close()

    def menu(self) -> str:
        """Show the menu until one of CHOICES is chosen; the end of input is a q."""
        while True:
            self._terminal.show(*(f"{key}. {what}" for key, what in CHOICES.items()))
            answer = self._terminal.ask("Enter your choice: ")
            choice = "q" if answer is None else answer.strip().lower()
            if choice in CHOICES:
                return choice
            self._terminal.show(f"Please choose one of these: {', '.join(CHOICES)}.")

    def _say_goodbye(self, leaving: str) -> None:
        self._terminal.show(leaving, "Connection closed.")

    # --- joining --------------------------------------------------------------------

    def _join(self) -> bool:
        """Ask for a name until the server takes one; False if the person leaves."""
        while True:
            answer = self._terminal.ask("Enter your username: ")
            name = "q" if answer is None else protocol.clean(answer).strip()
            if name.lower() == "q":
                return False
            if not name:
                self._terminal.show("Please enter a name, or q to leave.")
                continue
            self._terminal.show(f"Joining the chat as {name}...")
            reply = self._send_name(name)
            if _says_full(reply):
                raise ConnectionLost(f"! {reply.text}")
            self._terminal.show(reply)
            if reply.mark == "*":
                return True

    def _send_name(self, name: str) -> ServerLine:
        """Return the server's answer to a name; connect again if need be, once."""
        self._check_connection()
        for last_try in (False, True):
            try:
                self._socket.sendall(protocol.encode_line(name))
                if reply := self._next_line():
                    return reply
                reason = "the server closed the connection"
            except OSError as error:
                reason = error.strerror or str(error)
            if not last_try:  # it ended between our look at it and now
                self._connect_again()
        raise ConnectionLost(f"Connection lost: {reason}.")

    def _check_connection(self) -> None:
        """Connect again if the server has ended a connection that nobody used."""
        if self._has_ended():
            self._connect_again()

    def _has_ended(self) -> bool:
        """Look without waiting.  Raises ConnectionLost if the server was full."""
        try:
            while select.select([self._socket], [], [], 0)[0]:
                line = self._next_line()
                if not line:
                    return True
                if _says_full(line):
                    raise ConnectionLost(f"! {line.text}")
            return False
        except OSError:
            return True

    def _connect_again(self) -> None:
        self._socket.close()
        try:
            self._connect()
        except OSError as error:
            reason = error.strerror or error
            raise ConnectionLost(f"Connection lost: {reason}.") from None

    def _next_line(self) -> ServerLine | None:
        """Return the next line from the server; None at EOF.  Raises OSError."""
        while not self._lines:
            chunk = self._socket.recv(RECEIVE_BYTES)
            if not chunk:
                return None
            self._lines += self._split(chunk)
        return self._lines.popleft()

    def _split(self, chunk: bytes) -> list[ServerLine]:
        return [
            protocol.parse_server_line(protocol.decode_shown(line))
            for line in self._splitter.feed(chunk)
        ]

    # --- chatting -------------------------------------------------------------------

    def handle_chat(self, client_socket: socket.socket) -> int:
        """Send what the person types until they leave; return the exit status.

        Raises ConnectionLost if the server goes first.
        """
        receiver = threading.Thread(target=self.receive_messages, args=(client_socket,))
        receiver.start()
        status = 0
        try:
            try:
                if not self._send_lines(client_socket):
                    raise ConnectionLost(f"Connection lost: {self._end}.")
            except KeyboardInterrupt:
                status = INTERRUPTED
            self._terminal.show("Leaving the chat...")
            # Everything sent is delivered before the server closes its side.
            _shut_down(client_socket, socket.SHUT_WR)
            try:
                self._wait_for_end(receiver, interrupted=bool(status))
            except KeyboardInterrupt:
                status = INTERRUPTED
        finally:
            _shut_down(client_socket, socket.SHUT_RDWR)  # wakes the receiver
            receiver.join()
        self._terminal.show("Connection closed.")
        return status

    def _wait_for_end(self, receiver: threading.Thread, *, interrupted: bool) -> None:
        """Wait until the server has read everything and closed its side.

        In a pipe however long that takes.  A person at a terminal waits while it goes
        on, and after Ctrl-C for LEAVE_SECONDS only.
        """
        if not (self._terminal.person or interrupted):
            receiver.join()
        unread = _unread_bytes(self._socket)
        while receiver.is_alive():
            receiver.join(LEAVE_SECONDS)
            before, unread = unread, _unread_bytes(self._socket)
            if interrupted or not 0 < unread < before:
                break
        if receiver.is_alive() and unread and not interrupted:
            self._terminal.show(f"The server has not taken the last {unread} bytes.")

    def _send_lines(self, client_socket: socket.socket) -> bool:
        """Send line by line until the person leaves; False if the server is gone."""
        try:
            while (text := self._terminal.ask("You: ")) is not None:
                leaving = text.strip().lower() == "q"
                if text.strip():
                    # As it is: cleaned it may be longer than a line may be.
                    line = protocol.encode_line("q" if leaving else text)
                    client_socket.sendall(line)
                if leaving:
                    return True
                self._terminal.remember(text)
            return not self._end
        except OSError:
            # The receiver says why, once it has shown all that had arrived.
            self._terminal.wait_for_wake()
            return False

    def receive_messages(self, client_socket: socket.socket) -> None:
        """Show what comes until the connection ends.  Runs in the receiver thread."""
        try:
            self._terminal.show(*self._lines)
            while chunk := client_socket.recv(RECEIVE_BYTES):
                self._terminal.show(*self._split(chunk))
            self._end = "the server closed the connection"
        except OSError as error:
            self._end = error.strerror or str(error)
        self._terminal.wake()


def _says_full(line: ServerLine) -> bool:
    return line.mark == "!" and line.text.startswith(protocol.FULL)


def _unread_bytes(client_socket: socket.socket) -> int:
    """Return how much of what was sent the server's side has not taken yet.

    0 where the system does not tell, or if the connection has ended.
    """
    if termios is None:
        return 0
    try:
        answer = fcntl.ioctl(client_socket, termios.TIOCOUTQ, bytes(4))  # tcp(7)
        return int.from_bytes(answer, sys.byteorder)
    except OSError:
        return 0


def _shut_down(client_socket: socket.socket, how: int) -> None:
    try:
        client_socket.shutdown(how)
    except OSError:
        pass  # the server was quicker


# --- keyboard and screen ------------------------------------------------------------


class PlainTerminal:
    """Keyboard and screen without any escape sequence.

    With a person at it, a prompt stands there while they type.  In a pipe it appears
    together with the answer, so that what comes out reads like a session.
    """

    def __init__(self, keyboard: int, screen: int, encoding: str) -> None:
        """keyboard, screen: file descriptors; encoding: of the screen."""
        self._keyboard = keyboard
        self._screen = screen
        self._encoding = encoding
        self.person = os.isatty(keyboard) and os.isatty(screen)
        # Guards the screen and what stands on it.  Held while writing to it.
        self._lock = threading.RLock()
        self._prompt: str | None = None  # of the line being typed, if one is
        # Whoever wants the main thread's attention while it waits for a key: wake()
        # and, on a terminal, signals.  The bytes say nothing, the flag does.
        self._waker, self._wake_receiver = socket.socketpair()
        self._waker.setblocking(False)
        self._woken = False
        # One over the limit is as good as any more: the server refuses it.
        self._splitter = protocol.LineSplitter(protocol.MAX_LINE_BYTES)
        self._typed: deque[bytes] = deque()  # lines read, but not asked for yet
        self._last_chunk = b"\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._waker.close()
        self._wake_receiver.close()

    def ask(self, prompt: str) -> str | None:
        """Return the line that is typed; None at the end of input, or if woken."""
        line = None
        try:
            with self._lock:
                self._prompt = prompt
                if self.person:
                    self._write(prompt)
            line = self._read_line()
        finally:
            with self._lock:
                self._prompt = None
                if self.person and line is None:
                    self._write("\n")
        if line is None:
            return None
        text = line.decode(protocol.ENCODING, "surrogateescape")
        if not self.person:
            self.show(prompt + text)
        return text

    def show(self, *lines: ServerLine | str) -> None:
        """Show whole lines above the one being typed.  For any thread."""
        text = "".join([self._paint(line) + "\n" for line in lines])
        if not text:
            return
        with self._lock:
            if self.person and self._prompt is not None:
                text = f"\n{text}{self._prompt}"
            self._write(text)

    def give_back(self) -> None:
        """Leave the keyboard as it was found; here it has not been touched."""

    def remember(self, text: str) -> None:
        """Note a message for the history, if there is one."""

    def wake(self) -> None:
        """Make ask() return None, now and from now on.  For any thread."""
        self._woken = True
        if os.name == "nt":  # there nothing wakes a thread that reads the keyboard
            self.show("The connection is lost: please press Enter.")
        self._nudge()

    def wait_for_wake(self) -> None:
        """Wait until someone has called wake()."""
        while not self._woken:
            self._wake_receiver.recv(READ_BYTES)

    def _nudge(self) -> None:
        try:
            self._waker.send(b"\0")
        except OSError:
            pass  # full of nudges, or nobody waits any more

    def _paint(self, line: ServerLine | str) -> str:
        if isinstance(line, str):
            return protocol.clean(line)
        mark = f"{line.mark} " if line.mark else f"{line.name}: " if line.name else ""
        return mark + line.text

    def _write(self, text: str) -> None:
        # Past sys.stdout, whose flush at exit would wait for a pipe that is full.
        data = memoryview(text.encode(self._encoding, "replace"))
        try:
            while data:
                data = data[self._write_some(data) :]
        except OSError:
            pass  # nobody reads any more; what is typed still counts

    def _write_some(self, data: memoryview) -> int:
        """Write what the screen takes; some terminals are shared and do not block."""
        try:
            return os.write(self._screen, data)
        except BlockingIOError:
            select.select([], [self._screen], [])
            return 0

    def _read_line(self) -> bytes | None:
        while not self._typed and not self._woken:
            chunk = self._read_keyboard()
            if chunk:
                self._typed += self._splitter.feed(chunk)
            elif chunk is not None:  # the end of input
                if self._last_chunk.endswith(b"\n"):
                    return None
                # A last line without newline counts.
                chunk = b"\n"
                self._typed += self._splitter.feed(chunk)
            self._last_chunk = chunk or self._last_chunk
        return None if self._woken else self._typed.popleft()

    def _read_keyboard(self) -> bytes | None:
        """Return what was typed; b"" at the end of input, None after a nudge."""
        if os.name != "nt":  # there select() takes sockets only
            inputs: list[Any] = [self._keyboard, self._wake_receiver]
            if self._wake_receiver in select.select(inputs, [], [])[0]:
                self._wake_receiver.recv(READ_BYTES)
                return None
        try:
            return os.read(self._keyboard, READ_BYTES)
        except OSError:
            return b""  # the terminal has been closed


# --- the line editor ----------------------------------------------------------------

_NAME_COLOURS = (32, 33, 34, 35, 36, 92, 93, 94, 95, 96)  # all but the refusals' red
_DIM, _RED = 2, 31

# One key: an escape sequence (also one that breaks off), Alt and a character, or a
# character.  What matches none of them is the beginning of a sequence.
_KEY = re.compile(
    r"\x1b+\[\[?+[0-?]*+[ -/]*+(?:[@-~]|(?=.))"
    r"|\x1b+O[0-9;]*+.|\x1b+[^\x1b\[O]|[^\x1b]",
    re.DOTALL,
)

# What is typed is two strings, before the cursor and after it; a key makes two of two.
_Line = tuple[str, str]


_JOINER = "\u200d"  # of emoji, and of letters of some scripts


def cell_width(char: str) -> int:
    """Return how many cells of the screen a character takes: 0, 1 or 2."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _width_at(text: str, place: int) -> int:
    """Return how many cells text[place] takes; joined emoji take those of one."""
    width = cell_width(text[place])
    if width and place and text[place - 1] == _JOINER:
        base = place - 1
        while base and not cell_width(text[base]):
            base -= 1
        if cell_width(text[base]) == 2:  # letters that are joined stand side by side
            return 0
    return width


def _last(before: str) -> int:
    """Return where the last character begins, what combines with it included."""
    place = max(0, len(before) - 1)
    while place and not _width_at(before, place):
        place -= 1
    return place


def _first(after: str) -> int:
    """Return where the first character ends, what combines with it included."""
    place = min(1, len(after))
    while place < len(after) and not _width_at(after, place):
        place += 1
    return place


def _start(pattern: str, before: str) -> int:
    found = re.search(pattern + r"\Z", before)
    return found.start() if found else len(before)


def _word_left(before: str) -> int:
    return _start(r"\w*\W*", before)


def _word_right(after: str) -> int:
    found = re.match(r"\W*\w*", after)
    return found.end() if found else 0


def _move_left(place: int, before: str, after: str) -> _Line:
    return before[:place], before[place:] + after


def _move_right(place: int, before: str, after: str) -> _Line:
    return before + after[:place], after[place:]


_ACTIONS: dict[str, Callable[[str, str], _Line]] = {
    "left": lambda before, after: _move_left(_last(before), before, after),
    "right": lambda before, after: _move_right(_first(after), before, after),
    "word left": lambda before, after: _move_left(_word_left(before), before, after),
    "word right": lambda before, after: _move_right(_word_right(after), before, after),
    "home": lambda before, after: ("", before + after),
    "end": lambda before, after: (before + after, ""),
    "backspace": lambda before, after: (before[: _last(before)], after),
    "delete": lambda before, after: (before, after[_first(after) :]),
    "cut left": lambda before, after: ("", after),
    "cut right": lambda before, after: (before, ""),
    "cut blank left": lambda before, after: (
        before[: _start(r"\S*\s*", before)],
        after,
    ),
    "cut word left": lambda before, after: (before[: _word_left(before)], after),
    "cut word right": lambda before, after: (before, after[_word_right(after) :]),
}

_KEYS = {
    key: action
    for action, keys in {
        "left": "\x02 \x1b[D \x1bOD",
        "right": "\x06 \x1b[C \x1bOC",
        "word left": "\x1bb \x1b[1;5D \x1b[1;3D \x1b[5D \x1bOd \x1b\x1b[D",
        "word right": "\x1bf \x1b[1;5C \x1b[1;3C \x1b[5C \x1bOc \x1b\x1b[C",
        "home": "\x01 \x1b[H \x1bOH \x1b[1~ \x1b[7~",
        "end": "\x05 \x1b[F \x1bOF \x1b[4~ \x1b[8~",
        "backspace": "\x7f \x08",
        "delete": "\x04 \x1b[3~",
        "cut left": "\x15",
        "cut right": "\x0b",
        "cut blank left": "\x17",
        "cut word left": "\x1b\x7f \x1b\x08",
        "cut word right": "\x1bd \x1b[3;5~ \x1b[3;3~",
        "older": "\x10 \x1b[A \x1bOA",
        "newer": "\x0e \x1b[B \x1bOB",
        "clear screen": "\x0c",
    }.items()
    for key in keys.split(" ")
}


class LineEditor(PlainTerminal):
    """Keyboard and screen of a terminal, with the line being typed at the bottom.

    The only place that knows escape sequences and termios.  The screen is changed in
    one write at a time: from the first row of the line down everything is cleared, what
    others wrote comes there, and prompt and line again below it.
    """

    def __init__(
        self, keyboard: int, screen: int, encoding: str, *, colours: bool
    ) -> None:
        super().__init__(keyboard, screen, encoding)
        self._modes = termios.tcgetattr(keyboard)
        self._colours = colours
        self._decoder = codecs.getincrementaldecoder(protocol.ENCODING)("replace")
        self._undecided = ""  # the beginning of an escape sequence
        self._pressed: deque[str] = deque()  # keys read, but not used yet
        self._history: deque[str] = deque(maxlen=HISTORY_LINES)
        self._before, self._after = "", ""  # what is typed, around the cursor
        # What stands on the screen of prompt and line, around the cursor.
        self._shown: _Line = ("", "")
        self._stop_asked = False  # Ctrl-Z was pressed

    def __enter__(self) -> Self:
        self._take_keyboard()
        # Their Python handlers run on the main thread, and only between two steps of
        # it; the byte that a signal writes ends its wait for a key.
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGWINCH, lambda *_: None)
        signal.signal(signal.SIGTSTP, self._on_stop)
        signal.signal(signal.SIGCONT, self._on_continue)
        signal.signal(signal.SIGTERM, self._on_end)
        signal.signal(signal.SIGHUP, self._on_end)
        signal.signal(signal.SIGQUIT, self._on_end)
        return self

    def __exit__(self, *exception: object) -> None:
        self.give_back()
        for number in signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        super().__exit__(*exception)

    # --- the terminal's modes -------------------------------------------------------

    def _take_keyboard(self) -> None:
        """Read key by key and without echo; Ctrl-C and Ctrl-Z stay signals."""
        try:
            modes = termios.tcgetattr(self._keyboard)
            modes[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
            modes[6][termios.VMIN] = 1
            modes[6][termios.VTIME] = 0
            termios.tcsetattr(self._keyboard, termios.TCSADRAIN, modes)
        except termios.error:
            pass  # the terminal has been closed

    def give_back(self) -> None:
        """Leave the keyboard as it was found."""
        try:
            termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._modes)
        except termios.error:
            pass  # the terminal has been closed

    def _on_stop(self, *_: object) -> None:
        self._stop_asked = True
        if self._prompt is None:  # else ask() does it, when the screen is in order
            self._stop()

    def _stop(self) -> None:
        """Stop as Ctrl-Z asks for; returns when the shell continues the program."""
        self._stop_asked = False
        with self._lock:
            if self._prompt is not None:
                self._finish_line()
            self.give_back()
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTSTP)
            signal.signal(signal.SIGTSTP, self._on_stop)
            self._take_keyboard()

    def _on_continue(self, *_: object) -> None:
        self._take_keyboard()
        with self._lock:
            self._shown = ("", "")  # the shell has written since

    def _on_end(self, number: int, _: object) -> None:
        self.give_back()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    # --- the keyboard ---------------------------------------------------------------

    def ask(self, prompt: str) -> str | None:
        """Return the line that is typed; None for Ctrl-D, or if woken."""
        drafts = [*self._history, ""]  # and the new line, as they are edited
        place = len(drafts) - 1
        try:
            with self._lock:
                self._prompt = prompt
                self._before, self._after = "", ""
                self._draw()
            while (key := self._next_key()) is not None:
                if key in "\r\n":
                    return self._before + self._after
                if key == "\x04" and not self._before + self._after:
                    return None
                action = _KEYS.get(key, "")
                with self._lock:
                    if action in ("older", "newer"):
                        drafts[place] = self._before + self._after
                        step = -1 if action == "older" else 1
                        place = min(max(0, place + step), len(drafts) - 1)
                        self._before, self._after = drafts[place], ""
                    elif action == "clear screen":
                        self._write("\x1b[H\x1b[2J")
                        self._shown = ("", "")
                    elif action:
                        self._before, self._after = _ACTIONS[action](
                            self._before, self._after
                        )
                    elif key == "\t" or key >= " " and key[0] != "\x1b":
                        self._before += protocol.clean(key)
                    if not self._pressed:
                        self._draw()
            return None
        finally:
            with self._lock:
                self._finish_line()
                self._prompt = None

    def remember(self, text: str) -> None:
        """Note a message for the history."""
        if text.strip() and (not self._history or self._history[-1] != text):
            self._history.append(text)

    def _next_key(self) -> str | None:
        """Return the next key; None at the end of input, or if woken."""
        while not self._pressed and not self._woken:
            chunk = self._read_keyboard()
            if chunk:
                self._undecided += self._decoder.decode(chunk)
                self._decide()
            elif chunk is not None:
                return None
            else:
                if self._stop_asked:
                    self._stop()
                with self._lock:
                    self._draw()  # the window's size has changed, or all is forgotten
        return None if self._woken else self._pressed.popleft()

    def _decide(self) -> None:
        """Take the keys that are complete from what was read."""
        place = 0
        while found := _KEY.match(self._undecided, place):
            self._pressed.append(found[0])
            place = found.end()
        self._undecided = self._undecided[place:]

    # --- the screen -----------------------------------------------------------------

    def show(self, *lines: ServerLine | str) -> None:
        """Show whole lines above the one being typed.  For any thread."""
        text = "".join([self._paint(line) + "\n" for line in lines])
        with self._lock:
            if self._prompt is None:
                self._write(text)
            else:
                self._draw(text)

    def _paint(self, line: ServerLine | str) -> str:
        text = super()._paint(line)
        if isinstance(line, str) or not self._colours:
            return text
        if line.mark:
            return f"\x1b[{_DIM if line.mark == '*' else _RED}m{text}\x1b[m"
        if not line.name:
            return text
        colour = _NAME_COLOURS[zlib.crc32(line.name.encode()) % len(_NAME_COLOURS)]
        return text.replace(line.name, f"\x1b[{colour}m{line.name}\x1b[m", 1)

    def _finish_line(self) -> None:
        """Leave the line on the screen, whole; go on below it.  Caller holds _lock."""
        self._draw(whole=True)
        self._write("\n")
        self._shown = ("", "")

    def _draw(self, above: str = "", *, whole: bool = False) -> None:
        """Write lines above the prompt, and prompt and line again, in one write.

        whole: all of the line, however many rows it takes, and the cursor behind it.
        Caller holds _lock.
        """
        columns, rows = self._size()
        before, after = (self._prompt or "") + self._before, self._after
        if whole:
            before, after = before + after, ""
        else:
            before, after = _window(before, after, columns, rows - 1)
        up = _places("".join(self._shown), columns)[len(self._shown[0])][0]
        places = _places(before + after, columns)
        (end_row, end_column), (row, column) = places[-1], places[len(before)]
        self._write(
            # Not from the first cell: at the top of the screen tmux would take that for
            # clearing all of it, and keep what stood there in its history.
            f"\r{_move(up, 'A')}\x1b[K \x1b[J\r{above}{before}{after}"
            # A row that is exactly full: makes the terminal really go to the next one.
            + (" \r" if end_row and not end_column and not whole else "")
            + f"\r{_move(end_row - row, 'A')}{_move(column, 'C')}"
        )
        self._shown = (before, after)

    def _size(self) -> tuple[int, int]:
        """Return columns and rows of the window, as they are now."""
        try:
            columns, rows = os.get_terminal_size(self._screen)
        except OSError:
            columns = rows = 0
        return columns or 80, rows or 24


def _move(steps: int, direction: str) -> str:
    return f"\x1b[{steps}{direction}" if steps else ""


def _places(text: str, columns: int) -> list[tuple[int, int]]:
    """Return row and column of every character, and of the place behind the last."""
    places = []
    row = column = 0
    for place in range(len(text)):
        width = _width_at(text, place)
        if column + width > columns:  # a wide character goes to the next row whole
            row, column = row + 1, 0
        places.append((row, column))
        column += width
    places.append((row, column) if column < columns else (row + 1, 0))
    return places


def _window(before: str, after: str, columns: int, rows: int) -> _Line:
    """Return the part of a line around the cursor that fits into so many rows."""
    places = _places(before + after, columns)
    last_row = max(rows - 1, places[len(before)][0])
    inside = [last_row - rows < row <= last_row for row, _ in places[:-1]]
    return (
        "".join([c for c, shown in zip(before, inside) if shown]),
        "".join([c for c, shown in zip(after, inside[len(before) :]) if shown]),
    )


# --- the program --------------------------------------------------------------------


def _parse_arguments() -> argparse.Namespace:
    flags = protocol.CommandLine("Join a chat room over plain TCP.")
    flags.add_argument(
        "--host", type=protocol.host_name, default=protocol.DEFAULT_HOST,
        help="the server's name or address",
    )  # fmt: skip
    flags.add_number(
        "--port", 1, 65535, default=protocol.DEFAULT_PORT, metavar="PORT",
        help="the server's TCP port",
    )  # fmt: skip
    return flags.parse_args()


def _open_terminal() -> PlainTerminal:
    # A stream that was closed before the start is None.
    keyboard = sys.stdin.fileno() if sys.stdin else os.open(os.devnull, os.O_RDONLY)
    screen = sys.stdout.fileno() if sys.stdout else os.open(os.devnull, os.O_WRONLY)
    encoding = sys.stdout.encoding if sys.stdout else protocol.ENCODING
    two_ways = os.isatty(keyboard) and os.isatty(screen)
    if termios is None or not two_ways or os.environ.get("TERM") == "dumb":
        return PlainTerminal(keyboard, screen, encoding)
    return LineEditor(
        keyboard, screen, encoding, colours=not os.environ.get("NO_COLOR")
    )


def client_program() -> int:
    """Run the client; return its exit status."""
    options = _parse_arguments()
    terminal = _open_terminal()

    def give_up(*_: object) -> NoReturn:
        terminal.give_back()
        os._exit(INTERRUPTED)

    def leave(*_: object) -> NoReturn:
        # The first Ctrl-C leaves.  The second one ends the program though the leaving
        # may be stuck, on a server or on a pipe that nobody reads.
        signal.signal(signal.SIGINT, give_up)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, leave)
    try:
        try:
            client = ChatClient(options.host, options.port, terminal)
        except (OSError, ValueError) as error:  # ValueError: not a host name at all
            reason = getattr(error, "strerror", None) or error
            host = protocol.clean(options.host)
            print(
                f"client.py: cannot connect to {host}, port {options.port}: {reason}"
                " (is the server running? --host and --port say where)",
                file=sys.stderr,
            )
            return 1
        return client.run()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        # All is done: the interpreter's own exit is not to be broken into.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(client_program())
