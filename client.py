"""The chat client: a menu, a send loop and one thread that receives.

Threads:
  main          client_program: menu, name, handle_chat (the send loop), all of the keyboard
  receiver      receive_messages, from the connection on: shows what comes above the line
                being typed, and tells the main thread what concerns it

Only the receiver reads the socket.  The main thread waits in one call, Terminal.watch,
for keys, signals and the receiver alike: no server holds up the leaving for long, and a
signal handler has nothing to do but to note the signal.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the other imports take their time: Ctrl-C ends them without a traceback.
    import _signal  # type: ignore[import-not-found]  # signal itself takes its time
    import sys

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit("client.py: needs Python 3.11 or newer (try python3.11 client.py)")

import codecs
import getpass
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import unicodedata
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle

import protocol

try:
    import termios

    # All others that we note end the program.
    _JOB_SIGNALS = (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)
except ImportError:  # Windows
    termios, _JOB_SIGNALS = None, ()  # type: ignore[assignment]

CONNECT_SECONDS = 10.0
LEAVE_SECONDS = 3.0  # for a server that hangs; connecting again: for each address
READ_BYTES = 65536  # at once
QUIET_SECONDS = 0.05  # without a key: all that was typed ahead has come
FOREVER = float("inf")
PASTE_SECONDS = 2.0  # without a key: the end of a paste will not come any more
MAX_TYPED_CHARS = 1024 * 1024  # in one paste: what comes after is left out
MAX_TYPED_AHEAD = 4096  # keys or lines; the rest waits in the system
MAX_PASTED_LINES = 5  # that are sent without asking
REMEMBERED = 1000  # messages, and a hundred times as many sightings of names

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended: 128 + SIGINT
CHOICES = {"1": "Join the chat", "q": "Leave the chat", "2": "Exit the program"}
CLOSED = "the server closed the connection"
MESSAGE = "You: "  # what is typed here can be half typed, pasted, and recalled
PASSWORD = "Password: "  # what is typed here is not shown, and remembered nowhere
SECRET_COMMAND = "/register"  # a password follows, if the server asks for it

_WINDOWS = os.name == "nt"
# Windows has no such flag: there a server that hangs holds up a line until it goes on.
MSG_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)

Fact = Callable[[], object]  # is so if what it returns is true
NEVER: Fact = lambda: False


class Leave(Exception):
    """The person leaves; str() of it is what to say then, if it is not the usual."""


class LeaveAtOnce(Leave):
    """They leave in the middle of a line: with Ctrl-C, or as the server hangs."""


class ConnectionLost(Exception):
    """The server is gone; str() of it is the reason."""


def client_program() -> int:
    """Run the client; return its exit status, or exit if there is no connection."""
    # What was closed before the start is opened, so that no socket takes its number.
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    flags = protocol.CommandLine("Join a chat room over plain TCP.")
    flags.add_address("the server's name or address", 1, "the server's TCP port")
    flags.add_argument("--times", action="store_true", help="show when each line came")
    flags.add_argument("--bell", action="store_true", help="ring for what is for you")
    options = flags.parse_args()
    terminal = None
    try:
        terminal = Terminal(options.times, options.bell)
        client = ChatClient(options.host, options.port, terminal)
    except (OSError, RuntimeError, ValueError) as error:
        if terminal:
            terminal.empty_keyboard()  # what was typed meanwhile is not for the shell
        where = f"{protocol.clean(options.host) or repr('')}, port {options.port}"
        sys.exit(f"client.py: cannot connect to {where}: {_explain(error)}")
    with terminal:
        return client.run()


def _explain(error: Exception) -> str:
    """Return why there is no connection, and what to do about that very thing."""
    if isinstance(error, ValueError):
        return "that is no host (--host takes a name or an address)"
    advice = {
        socket.gaierror: "is the name after --host spelled as it should be?",
        ConnectionRefusedError: "start the server there, or give its --port",
        TimeoutError: "is that computer up, and the port open in its firewall?",
        RuntimeError: "are too many programs running?",  # no more threads
    }.get(type(error), "is --host right, and is there a network that leads there?")
    return f"{protocol.reason_of(error)} ({advice})"


class ChatClient:
    """Menu, name and chat, over one connection after another.

    Whatever is waited for, Leave (for run) and ConnectionLost (for _stay) end it.
    """

    def __init__(self, host: str, port: int, terminal: Terminal) -> None:
        """Connect.  Raises what _connect does, ValueError if there is no such host."""
        self._address = (host, port)
        self._terminal = terminal
        self._name = ""  # under which the person was in, to be offered again
        self._status = 0  # the exit status, if the person leaves now
        self._hurries = False  # leaving, and does not wait for a server that hangs
        self._deadline = FOREVER  # until which it is waited for
        self._connect(CONNECT_SECONDS)

    def _connect(self, seconds: float) -> None:
        """Make a new connection and start its receiver.  Raises OSError, RuntimeError."""
        self._socket = socket.create_connection(self._address, seconds)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What the receiver tells the main thread.  Each is set in one step: no lock.
        self._end: ConnectionLost | None = None  # why the connection has ended
        self._full = ""  # how it says that it is full: shown once 1 is chosen
        self._joined = False
        # What the server said to the line that was sent last: "" as long as it has said
        # nothing.  What it says before the first line is no answer, and passed over: so
        # this begins as if something had been answered.
        self._answer = "! Nothing was asked."
        receiver = threading.Thread(target=self.receive_messages, args=(self._socket,))
        receiver.start()
        self._receiver = receiver

    def run(self) -> int:
        """Run the session and return the exit status."""
        try:
            self._terminal.show("Connected to server.")
            self._stay()
        except Leave as leave:
            self._leave(leave)
        finally:
            self._hang_up()
        return INTERRUPTED if self._terminal.ending else self._status

    def _stay(self) -> None:
        """Go through menu, name and chat until the person leaves, or nobody can go on."""
        while True:
            try:
                if self.menu() == "2":
                    raise Leave("Exiting the program.")
                self._join()
                self.handle_chat(self._socket)
            except ConnectionLost as lost:
                self._status = 1
                self._hang_up()
                reason = self._full or f"Connection lost: {lost}."
                self._terminal.show(reason, received=self._full != "")
                if self._full or not self._terminal.person:
                    return
                # It was meant for the chat, and would be taken for answers.
                self._terminal.forget_typed()

    def menu(self) -> str:
        """Show the menu until one of CHOICES is chosen."""
        while True:
            self._terminal.show(*(f"{key}. {what}" for key, what in CHOICES.items()))
            if (choice := self._terminal.ask("Enter your choice: ").strip()) in CHOICES:
                return choice
            self._terminal.show(f"Please choose one of these: {', '.join(CHOICES)}.")

    def _join(self) -> None:
        """Ask for a name, and its password if it has one, until the server takes it."""
        if not self._terminal.person:
            self._status = 1  # until it is in
        self._check_connection()
        while not self._joined:
            offer = f" [{self._name}]" if self._name else ""
            answer = self._terminal.ask(f"Enter your username{offer}: ")
            if not (name := protocol.clean(answer).strip() or self._name):
                self._terminal.show("Please enter a name, or q to leave.")
                continue
            self._terminal.show(f"Joining the chat as {name}...")
            self._terminal.know_name(name)  # before anybody can say it
            self._check_connection()
            try:
                self._exchange(name)
            except ConnectionLost:  # between that look and now
                self._check_connection()
                self._exchange(name)
            while not self._joined and self._is_asked():
                # Never on a new connection: there it would be taken for a name.
                self._exchange(self._terminal.ask(PASSWORD))
        self._status, self._name = 0, name

    def _check_connection(self) -> None:
        """Connect again if the server has ended a connection that nobody used."""
        # Whatever has arrived is heard first: a refusal from before is no answer to the
        # name.  At its end the socket stays readable.
        self._wait(lambda: self._end or not select.select([self._socket], [], [], 0)[0])
        with self._terminal.lock:  # what the receiver has taken, it hears under it
            if self._full:
                raise ConnectionLost(CLOSED)
        if self._end:
            self._hang_up()
            try:
                self._connect(LEAVE_SECONDS)  # the keyboard is not read meanwhile
            except (OSError, RuntimeError) as error:
                self._end = ConnectionLost(protocol.reason_of(error))
                raise self._end from None

    def handle_chat(self, client_socket: socket.socket) -> None:
        """Send what the person types until they leave or the connection is lost."""
        woken: Fact = lambda: self._end or self._is_asked()
        while not self._end:
            if self._is_asked():
                self._send(self._terminal.ask(PASSWORD, lambda: self._end))
            else:
                self._say(self._terminal.ask(MESSAGE, woken))
        if half_typed := self._terminal.draft.text:
            self._terminal.show(MESSAGE + half_typed)  # it stays to be seen
        raise self._end

    def _say(self, text: str) -> None:
        """Send a line; if a password is to follow it, wait until that is asked for."""
        command, _ = protocol.split_command(protocol.clean(text))
        try:
            if command == SECRET_COMMAND:
                # Alone, since what stands behind it could be refused.  A refusal that
                # does not name the command is that of an earlier line.
                self._exchange(command, refusal=f"! {command} ")
            elif text.strip():
                self._send(text)
        except ConnectionLost:
            self._terminal.draft.before = text + self._terminal.draft.before
            raise
        if command == SECRET_COMMAND and not self._is_asked():
            if not self._terminal.person:
                self._status = 1
                raise Leave
            self._terminal.forget_typed()  # the next line: a password, for nobody

    def _is_asked(self) -> bool:
        return self._answer.startswith("? ")

    def _exchange(self, text: str, refusal: str = "! ") -> None:
        """Send a line, and wait for its answer.  refusal: how one that says no begins."""
        self._send(text)
        self._wait(lambda: self._answer.startswith(("* ", "? ", refusal)))

    def _send(self, text: str) -> None:
        """Send a line."""
        unsent = bytearray(protocol.encode_line(text))
        self._answer = ""

        def is_sent() -> bool:
            with suppress(BlockingIOError):
                del unsent[: self._socket.send(unsent, MSG_DONTWAIT)]
            return not unsent

        try:
            self._wait(is_sent, [self._socket])
        except OSError:
            self._wait(NEVER)  # the receiver says why, once it has shown what came

    def _wait(self, fact: Fact, writable: Sequence[socket.socket] = ()) -> None:
        """Wait until this is so.  Raises ConnectionLost if the connection ends first.

        It is looked at after every wake(), and whenever one of `writable` takes more.
        Raises LeaveAtOnce if that takes LEAVE_SECONDS while the person wants to leave.
        """
        self._terminal.heed_signals()  # also if there is nothing to wait for
        while not fact():
            if self._end and not fact():  # what came right before the end counts
                raise self._end
            now = time.monotonic()
            if self._hurries or self._terminal.wants_to_leave(self._joined):
                self._deadline = min(self._deadline, now + LEAVE_SECONDS)
            if now >= self._deadline:
                raise LeaveAtOnce
            self._terminal.watch(self._deadline - now, writable)
        self._deadline = FOREVER

    def _leave(self, leave: Leave) -> None:
        """Say goodbye, and wait until the server has read all and closes."""
        self._hurries = self._terminal.person or self._terminal.ending
        with suppress(ConnectionLost, LeaveAtOnce):
            if self._joined and not isinstance(leave, LeaveAtOnce):  # in mid-line
                self._send("q")
        self._terminal.show(str(leave) or "Leaving the chat...")
        if self._joined:
            with suppress(OSError):  # the server was quicker
                self._socket.shutdown(socket.SHUT_WR)
            with suppress(ConnectionLost, LeaveAtOnce):
                self._wait(NEVER)
        if self._joined and not self._end:
            self._terminal.show("The server does not answer.")
        elif self._joined and str(self._end) != CLOSED and not self._terminal.person:
            self._terminal.show(f"Connection lost: {self._end}.")
            self._status = 1  # what has arrived is not known
        self._hang_up()
        self._terminal.show("Connection closed.")

    def _hang_up(self) -> None:
        """Close the connection and end the receiver; again does nothing."""
        with suppress(OSError):  # the server was quicker
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the receiver
        self._receiver.join()
        self._socket.close()

    def receive_messages(self, client_socket: socket.socket) -> None:
        """Show what comes until the connection ends.  Runs in the receiver thread."""
        splitter = protocol.LineSplitter(protocol.MAX_SHOWN_BYTES)
        end = ConnectionLost("this client has a bug")  # told on stderr by then
        try:
            # Read under the lock only: what has not been shown yet stays readable.
            while client_socket.recv(1, socket.MSG_PEEK):
                with self._terminal.lock:  # the next prompt comes below what is shown
                    chunk = client_socket.recv(READ_BYTES)
                    lines = map(protocol.decode_shown, splitter.feed(chunk))
                    self._terminal.show(*filter(self._take, lines), received=True)
                self._terminal.wake()
            end = ConnectionLost(CLOSED)
        except OSError as error:
            end = ConnectionLost(protocol.reason_of(error))
        finally:
            self._end = end
            self._terminal.wake()
            in_chat = self._joined and not self._hurries
            if _WINDOWS and self._terminal.person and in_chat:
                self._terminal.show("(Please press Enter.)")  # else nothing wakes it

    def _take(self, line: str) -> bool:
        """Note what a line tells the main thread; return whether it is to be shown."""
        mark = protocol.parse_server_line(line).mark
        if self._joined:
            self._answer = line if mark in ("!", "?") else self._answer
        elif line.startswith(f"! {protocol.FULL}"):
            self._full = line
            return False
        elif mark:
            if self._answer:
                return False  # nobody has asked for anything yet
            # In this order: who sees the answer must know already whether it is in.
            self._joined = mark == "*"
            self._answer = line
        return True


# The local modes that are off while we get key by key; Ctrl-C and Ctrl-Z stay signals.
_EDITED = termios.ICANON | termios.ECHO | termios.IEXTEN if termios else 0
# Red is for refusals, magenta for private messages.
_NAME_COLOURS = (32, 33, 34, 36, 92, 93, 94, 96)
_STYLES = {"*": 2, "!": 31, "?": 1, "private": 35}
_QUIT = re.compile(r"\s*[qQ]\s*")  # a wish to leave
# The names in a notice: "NAME has joined …", "… online: NAME, NAME and 3 more.",
# "… NAME, NAME", "[…] NAME: …"
_NAMES = re.compile(
    r"(?:^(?=\S+ has (?:joined|left) )|online: |^… |, |^\[.*?\] )"
    r"([^\s,]+?)(?=,|: |\.?$| has | and \d)"
)


class Terminal:
    """Keyboard and screen; it alone knows escape sequences and modes.

    At a terminal the line being typed stands at the bottom, and is edited here.  The
    screen is changed in one write at a time: from the first row of the line down
    everything is cleared, what others wrote comes there, and prompt and line again below
    it.  So it is right after each write, and for every size of the window.

    Else whole lines are read, and no escape sequence is written.  In a pipe a prompt
    appears together with the answer, so that what comes out reads like a session.

    Threads: all but lock, show() and wake() is the main thread's.
    """

    def __init__(self, times: bool, bell: bool) -> None:
        self._times, self._bell = times, bell
        self._keyboard, self._screen = sys.stdin.fileno(), sys.stdout.fileno()
        self.person = sys.stdin.isatty()
        has_modes = termios and self.person
        self._modes = termios.tcgetattr(self._keyboard) if has_modes else []  # as found
        dumb = os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
        self._edits = self._modes != [] and not dumb
        self._off = _EDITED if self._edits else 0  # of the local modes
        self._colours = self._edits and not os.environ.get("NO_COLOR")
        # Guards the screen and what stands on it.  Held while writing to it.
        self.lock = threading.RLock()
        self._prompt = ""  # of the line being typed, if one is
        self._shown = ("", "")  # of prompt and line on the screen, around the cursor
        self._sent: deque[str] = deque(maxlen=REMEMBERED)
        self._line = self.draft = Line()  # waits during questions
        self._mention = re.compile("(?!)")  # the person's own name, once it is known
        self._names: deque[str] = deque(maxlen=100 * REMEMBERED)  # as often as seen
        self._reader = KeyReader(self._edits)
        # What ask() goes on with: first the pasted lines that are still to be said, then
        # the keys (or lines) that are typed ahead.
        self._pasted: deque[str] = deque()
        self._ahead: deque[str] = deque()
        self._unconfirmed: list[str] = []  # wait for the y of "Send N lines?"
        self._input_ended = False
        self._read_at = 0.0  # when a key came last
        # For the main thread's attention: wake(), and signals.
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._signals: deque[int] = deque()  # that have come
        self.ending = False  # one of them ends the program

    def __enter__(self) -> None:
        # A Python handler runs on the main thread, between two steps of it; the byte
        # that the signal itself writes ends the wait in watch().
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._note_signal)
        if self._modes:  # there is something to put in order
            for number in signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, *_JOB_SIGNALS:
                signal.signal(number, self._note_signal)
        self._set_modes(self._off)

    def __exit__(self, *exception: object) -> None:
        with self._waker, self._woken:  # which this closes
            self.empty_keyboard()
            signal.set_wakeup_fd(-1)

    def ask(self, prompt: str, until: Fact = NEVER) -> str:
        """Return the line that is typed, "" once `until` is so.  Raises Leave."""
        if self._modes and not self._edits:
            self._off = termios.ECHO if prompt == PASSWORD else 0
            self._set_modes(self._off)
            if prompt == PASSWORD:  # of which a half line, typed ahead, is no part
                self.empty_keyboard(self._off)
        with self.lock:
            self._prompt, self._unconfirmed = prompt, []
            self._line = self.draft if prompt == MESSAGE else Line()
            self._draw()
        try:
            if _WINDOWS and prompt == PASSWORD:
                return getpass.getpass("")
            while not self._pasted:
                if not (key := self._next(until)):
                    self._line = Line()  # something else comes before it is sent
                    return ""
                if not self._edits:
                    self._line.before = key.removesuffix("\n").removesuffix("\r")
                    key = "\n"
                if key in "\r\n" or key == "\x04" and not self._line.text:
                    return self._answer(key)
                with self.lock:
                    self._edit(key)
            self._line = Line(self._pasted.popleft())
            return self._answer("\r")
        finally:
            self._end_line()  # if it has not ended yet

    def _answer(self, key: str) -> str:
        """Return the line that this key ends.  Raises Leave if the person leaves."""
        line, prompt = self._line, self._prompt
        self._end_line(entered=key != "\x04")
        if lines := self._unconfirmed:
            self._unconfirmed = []
            if line.text.strip().lower() in ("y", "yes"):
                self._pasted += lines
                self.draft = Line("", self.draft.after)
            return ""
        leaves = _QUIT.fullmatch(line.text)
        if key == "\x04" or leaves and not line.is_text:
            raise Leave
        if prompt == MESSAGE and line.text.strip():
            self._sent.append(line.text)
        if line is self.draft:
            self.draft = Line()
        # With a blank behind it a q is a message.
        return f"{line.text} " if leaves else line.text

    def _edit(self, key: str) -> None:
        """Do what a key asks for, and draw.  Caller holds the lock."""
        if key == "\t" and self._prompt != PASSWORD:
            seen = dict.fromkeys(reversed(self._names))
            self._line.complete([n for n in seen if not self._mention.fullmatch(n)])
        elif key == "\x0c":
            self._write(f"{self._erase()}\x1b[H\x1b[2J")
        elif key.startswith(_PASTE):
            self._paste(key.removeprefix(_PASTE))
        else:
            self._line.edit(key, self._sent if self._prompt == MESSAGE else ())
        if not self._ahead:  # of many keys draw the last only
            self._draw()

    def _paste(self, text: str) -> None:
        """Insert a line; of a longer text send lines, or ask before if there are many."""
        first, *more = map(protocol.clean, re.split("\r\n|\r|\n", text))
        self._line.edit(first)
        if self._prompt != MESSAGE:  # where the other lines are of no use
            return
        self._line.is_text = True
        lines = [line for line in (self._line.before, *more) if line.strip()]
        if len(lines) > MAX_PASTED_LINES:
            self._unconfirmed, self._line = lines, Line()
            self._prompt = f"Send {len(lines)} lines? [y/N] "
        elif more:
            self._line = self.draft = Line(more[-1], self._line.after)
            self._pasted += lines[:-1] if more[-1].strip() else lines  # ended ones

    def _next(self, until: Fact) -> str:
        """Return the next key or line; "" if woken.  The end of input is a Leave."""
        while not self._ahead:
            if until():  # what was typed before has been used by now
                return ""
            if self._input_ended:
                raise Leave
            self.watch(0 if _WINDOWS else FOREVER)
            if _WINDOWS:  # where select() takes sockets only
                self._read_keyboard()
        return self._ahead.popleft()

    def watch(self, seconds: float, writable: Sequence[socket.socket] = ()) -> None:
        """Wait for keys, a wake-up or a signal and take them, or for a writable socket.

        Raises LeaveAtOnce on Ctrl-C, SystemExit for the other signals that end it.
        """
        deaf = _WINDOWS or self._input_ended or len(self._ahead) >= MAX_TYPED_AHEAD
        inputs = [self._woken] if deaf else [self._woken, self._keyboard]
        if self._reader.pasting:
            seconds = min(seconds, self._read_at + PASTE_SECONDS - time.monotonic())
        timeout = None if seconds == FOREVER else max(0.0, seconds)
        readable = select.select(inputs, writable, [], timeout)[0]
        if self._woken in readable:
            self._woken.recv(READ_BYTES)
        # Before reading, and then not at once: Ctrl-C and Ctrl-Z empty the system's buffer.
        if self._signals:
            self.heed_signals()
        elif self._keyboard in readable:
            self._read_keyboard()
        elif self._reader.pasting and time.monotonic() >= self._read_at + PASTE_SECONDS:
            self._ahead += self._reader.feed(_PASTE_END.encode())  # its end got lost

    def _read_keyboard(self) -> bool:
        """Take what is typed; return whether there was anything."""
        chunk = b""
        with suppress(OSError):  # the terminal has been closed
            chunk = os.read(self._keyboard, READ_BYTES)
        # A read that never waits is empty as well if Ctrl-C or Ctrl-Z came before it.
        self._input_ended = not (chunk or self._signals)
        self._ahead += self._reader.feed(chunk)
        self._read_at = time.monotonic()
        return chunk != b""

    def wants_to_leave(self, in_chat: bool = True) -> bool:
        """Tell whether the person has asked to leave in what is typed ahead."""
        if not self.person:  # in the chat all of a pipe is delivered, however slowly
            return self._input_ended and not (in_chat or self._ahead)
        if not self._edits:
            return self._input_ended or any(map(_QUIT.fullmatch, self._ahead))
        line = Line()
        for key in self._ahead:
            if key.startswith(_PASTE):
                line.before += key  # as text: a q in it does not leave
            if key in "\r\n" or key == "\x04" and not line.text:
                if key == "\x04" or _QUIT.fullmatch(line.text):
                    return True
                line = Line()
            line.edit(key)
        return self._input_ended

    def wake(self) -> None:
        """Let the main thread look at what it waits for.  For any thread."""
        with suppress(OSError):  # full of wake-ups, or nobody waits any more
            self._waker.send(b"\0")

    def forget_typed(self) -> None:
        """Throw away what was typed ahead.  Raises Leave if it asks for that."""
        self.watch(0)  # first: Ctrl-D is one in the modes in which it was typed
        self.empty_keyboard(self._off)
        if self.wants_to_leave():
            raise Leave
        # Of lines that are asked about, the first is in the editor.
        if unsent := len(self._pasted) + len(self._unconfirmed[1:]):
            self.show(f"Pasted lines that were not sent: {unsent}.")
        self._pasted.clear()
        self._ahead.clear()

    def empty_keyboard(self, off: int = 0) -> None:
        """Read until nothing comes any more, then set the modes that were found.

        off: the local modes that are off then.  What is half typed is forgotten.  To
        empty the system's buffer would not be enough: a terminal goes on sending the rest
        of a long paste after that.  Takes no lock: for signal handlers too.
        """
        if self._set_modes(_EDITED):
            until = time.monotonic() + LEAVE_SECONDS  # if a key is held down
            typed = True
            while typed and (self._reader.pasting or time.monotonic() < until):
                pause = PASTE_SECONDS if self._reader.pasting else QUIET_SECONDS
                came = select.select([self._keyboard], [], [], pause)[0]
                typed = came != [] and self._read_keyboard()
            self._reader = KeyReader(self._edits)
            self._set_modes(off)

    def _note_signal(self, number: int, _: object) -> None:
        """Note a signal.  The second one that ends the program ends it at once."""
        if number not in _JOB_SIGNALS:
            if self.ending:  # stuck, on a server or on a screen that takes nothing
                self.empty_keyboard()
                os._exit(128 + number)
            self.ending = True
        self._signals.append(number)

    def heed_signals(self) -> None:
        """Do what the signals that have come ask for.  Raises what watch() raises."""
        while self._signals:
            number = self._signals.popleft()
            if number == signal.SIGINT:
                raise LeaveAtOnce
            if number not in _JOB_SIGNALS:
                sys.exit(128 + number)
            # In the middle of a paste the shell would get, and run, the rest.
            if number == signal.SIGTSTP and not self._reader.pasting:
                with self.lock:
                    self._write(self._erase())
                self._set_modes(0)
                handler = signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)  # returns when the shell says fg
                signal.signal(number, handler)
            self._set_modes(self._off)
            with self.lock:
                if self._edits or not self._shown[0]:
                    self._draw()

    def _set_modes(self, off: int) -> bool:
        """Set the modes that were found, but for some that are off; False if it cannot.

        While the shell has the terminal, to touch it would stop the program.
        """
        with suppress(OSError):  # no shell with job control has it
            if not self._modes or os.tcgetpgrp(self._keyboard) != os.getpgrp():
                return False
        modes = [*self._modes[:6], [*self._modes[6]]]
        modes[3] &= ~off
        if off & termios.ICANON:
            modes[6][termios.VMIN] = modes[6][termios.VTIME] = 0  # never wait
        with suppress(termios.error):  # the terminal has been closed
            # At once: output that is paused must not hold this up.
            termios.tcsetattr(self._keyboard, termios.TCSANOW, modes)
        # A signal handler may be here because the screen takes nothing any more.
        if self._edits and select.select([], [self._screen], [], QUIET_SECONDS)[1]:
            self._write("\x1b[?2004h" if off else "\x1b[?2004l")  # brackets for pastes
        return True

    def know_name(self, name: str) -> None:
        """Note the person's own name, which stands out in what others say."""
        pattern = rf"(?<!\w){re.escape(unicodedata.normalize('NFKC', name))}(?!\w)"
        self._mention = re.compile(pattern, re.IGNORECASE)

    def show(self, *lines: str, received: bool = False) -> None:
        """Show whole lines, our own or received ones, above the one being typed."""
        paint = self._paint if received else protocol.clean
        with self.lock:
            if lines:
                self._draw("".join([f"{paint(line)}\n" for line in lines]))

    def _paint(self, line: str) -> str:
        """Return a line from the server as it is shown, with what the flags ask for."""
        mark, name, text, private = protocol.parse_server_line(line)
        # Of a message of the past only its author: what follows is free text.
        told = text.partition(": ")[0] + ": " if text.startswith("[") else text
        names = [name, *(_NAMES.findall(told) if mark == "*" else [])]
        self._names += [n for n in names if 0 < len(n) <= protocol.MAX_NAME_CHARS]
        rings = private or name and self._mention.search(text)
        bell = "\a" if rings and self._bell and sys.stdout.isatty() else ""
        now = time.strftime("%H:%M ") if self._times else ""
        if self._colours:
            said = text if mark else self._mention.sub("\x1b[1m\\g<0>\x1b[22m", text)
            if mark or private:
                style = _STYLES[mark or "private"]
                line = f"\x1b[{style}m{line.removesuffix(text)}{said}\x1b[m"
            elif name:
                colour = _NAME_COLOURS[sum(name.encode()) % len(_NAME_COLOURS)]
                line = f"\x1b[{colour}m{name}\x1b[m: {said}"
        return f"{bell}{now}{line}"

    def _end_line(self, *, entered: bool = False) -> None:
        """Let the line stay, whole, and go on below it; an empty one is taken away."""
        with self.lock:
            text = "" if self._prompt == PASSWORD else protocol.clean(self._line.text)
            if (entered or text) and (self._edits or not self.person):
                self._write(f"{self._erase()}{self._prompt}{text}\n")
            elif not entered or self._prompt == PASSWORD:
                self._write(self._erase())  # else the system has shown the Enter
            self._prompt, self._line, self._shown = "", Line(), ("", "")

    def _erase(self) -> str:
        """Return what clears prompt and line from the screen.  Caller holds the lock."""
        before, after = self._shown
        self._shown = ("", "")
        if not (self._edits and before + after):
            return "\n" if before else ""
        up = _cells(before + after, self._size()[0])[len(before)][0]
        # Not from the first cell: at the top of the screen tmux would take that for
        # clearing all of it, and keep what stood there in its history.
        return f"\r{_move(up, 'A')}\x1b[K \x1b[J\r"

    def _draw(self, above: str = "") -> None:
        """Write lines, and prompt and line again below them.  Caller holds the lock."""
        if not self._edits:
            prompt = self._prompt if self.person else ""
            self._write(f"{self._erase()}{above}{prompt}")
            self._shown = (prompt, "")
            return
        columns, rows = self._size()
        line = Line() if self._prompt == PASSWORD else self._line
        before, after = _window(self._prompt + line.before, line.after, columns, rows)
        cells = _cells(before + after, columns)
        (end_row, end_column), (row, column) = cells[-1], cells[len(before)]
        # Of a row that is exactly full the terminal has to be pushed to the next one.
        wrap = " \r" if end_row and not end_column else ""
        back = f"\r{_move(end_row - row, 'A')}{_move(column, 'C')}"
        self._write(f"{self._erase()}{above}{before}{after}{wrap}{back}")
        self._shown = (before, after)

    def _size(self) -> tuple[int, int]:
        """Return the columns of the screen, and the rows that a line may fill."""
        columns = rows = 0
        with suppress(OSError):  # the terminal has been closed
            columns, rows = os.get_terminal_size(self._screen)
        return columns or 80, max(1, (rows or 24) - 1)

    def _write(self, text: str) -> None:
        # Past sys.stdout, whose flush at exit would wait for a pipe that is full.
        data = memoryview(text.encode(sys.stdout.encoding, "replace"))
        with suppress(OSError):  # nobody reads any more; what is typed still counts
            while data:
                try:
                    data = data[os.write(self._screen, data) :]
                except BlockingIOError:  # some terminals are shared and do not block
                    select.select([], [self._screen], [])


def _move(steps: int, direction: str) -> str:
    return f"\x1b[{steps}{direction}" if steps else ""


def _width_at(text: str, index: int) -> int:
    """Return how many cells of the screen text[index] takes: 0, 1 or 2."""
    char = text[index]
    category = unicodedata.category(char)
    # Emoji joined by U+200D take the cells of one; letters so joined stand side by side.
    joined = category[0] == "S" and text[index - 1 : index] == "\u200d"
    jamo = "\u1160" <= char <= "\u11ff" or "\ud7b0" <= char <= "\ud7ff"  # medial, final
    if joined or jamo or category in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _cells(text: str, columns: int) -> list[tuple[int, int]]:
    """Return row and column of every character, and of the cell behind the last."""
    cells = []
    row = column = 0
    for index in range(len(text)):
        width = _width_at(text, index)
        if column + width > columns:  # a wide character goes to the next row whole
            row, column = row + 1, 0
        cells.append((row, column))
        column += width
    return [*cells, (row, column) if column < columns else (row + 1, 0)]


def _window(before: str, after: str, columns: int, rows: int) -> tuple[str, str]:
    """Return the part of a line around the cursor that fits into so many rows."""
    # Of a very long line look at what may be near only, from the beginning of a row.
    near = columns * (rows + 1)
    start = max(0, len(before) - near) // columns * columns
    before, text = before[start:], before[start:] + after[:near]
    cells = _cells(text, columns)
    end_row = max(rows, cells[len(before)][0] + 1)
    begin = bisect_left(cells, (end_row - rows, 0), hi=len(text))
    end = bisect_left(cells, (end_row, 0), hi=len(text))
    return before[begin:], text[len(before) : end]


class Line:
    """What is typed at a prompt, before and after the cursor, and how keys change it."""

    def __init__(self, pasted: str = "", after: str = "") -> None:
        self.before, self.after = pasted, after
        self.is_text = pasted != ""  # a q in it too: pasted or recalled just now
        self._drafts: list[str] = []  # earlier lines and this one, once Up is pressed
        self._recalled = -1  # among them
        self._fitting: Iterator[str] | None = None  # names, for Tab once more

    @property
    def text(self) -> str:
        return self.before + self.after

    def edit(self, key: str, earlier: Sequence[str] = ()) -> None:
        """Do what a key asks for, if anything; Up goes through the earlier lines."""
        self.is_text, self._fitting = False, None
        text, start = self.text, len(self.before)
        if key in _KEYS:
            by, gap, cuts = _KEYS[key]
            end = _word(text, start, by, gap) if gap else _step(text, start, by)
            self.before = text[: min(start, end) if cuts else end]
            self.after = text[max(start, end) if cuts else end :]
        elif key in _RECALLS:
            self._drafts = self._drafts or [*earlier, ""]
            self._drafts[self._recalled] = text
            recalled = self._recalled + _RECALLS[key]
            self._recalled = min(max(-len(self._drafts), recalled), -1)
            self.before, self.after = self._drafts[self._recalled], ""
            self.is_text = self._recalled < -1
        elif key >= " " and key[0] != "\x1b":
            self.before += protocol.clean(key)

    def complete(self, names: list[str]) -> None:
        """Complete one of the names; once more: the next one that fits."""
        # Once more, the name that was put in is the stem, and is replaced.
        head, space, stem = self.before.rpartition(" ")
        if self._fitting is None:
            key, start = protocol.name_key, protocol.name_key(stem)
            self._fitting = cycle([n for n in names if key(n).startswith(start)])
        self.before = head + space + next(self._fitting, stem + protocol.clean("\t"))


# Where a key takes the cursor, to the left (by is negative) or to the right.  A character
# is passed with all that combines with it, so that no key stops inside one.
def _step(text: str, index: int, by: int) -> int:
    index = min(max(0, index + by), len(text))
    while 0 < index < len(text) and not _width_at(text, index):
        index += by
    return index


def _word(text: str, index: int, by: int, gap: str) -> int:
    """Pass what is between two words, then a word."""
    for in_gap in (True, False):
        while (further := _step(text, index, by)) != index:
            if bool(re.match(gap, text[min(index, further)])) != in_gap:
                break
            index = further
    return index


# key → how far it takes the cursor, in characters or in words with such gaps between
# them, and whether it cuts what is passed on the way there, as those in the last column
_KEYS = {
    key: (by, gap, cuts)
    for by, gap, *keys in [
        (-1, "", "\x02 \x1b[D \x1bOD", "\x7f \x08"),
        (1, "", "\x06 \x1b[C \x1bOC", "\x04 \x1b[3~"),
        (-sys.maxsize, "", "\x01 \x1b[H \x1bOH \x1b[1~ \x1b[7~", "\x15"),
        (sys.maxsize, "", "\x05 \x1b[F \x1bOF \x1b[4~ \x1b[8~", "\x0b"),
        (-1, r"\W", "\x1bb \x1b[1;5D \x1b[1;3D \x1b[5D \x1bOd \x1b\x1b[D",
         "\x1b\x7f \x1b\x08"),
        (1, r"\W", "\x1bf \x1b[1;5C \x1b[1;3C \x1b[5C \x1bOc \x1b\x1b[C",
         "\x1bd \x1b[3;5~ \x1b[3;3~"),
        (-1, r"\s", "", "\x17"),
    ]
    for cuts in (False, True)
    for key in keys[cuts].split(" ") if key  # not split(): Ctrl-K is a blank there
}  # fmt: skip
_RECALLS = {"\x10": -1, "\x1b[A": -1, "\x1bOA": -1, "\x0e": 1, "\x1b[B": 1, "\x1bOB": 1}

# Around what is pasted.  A key that begins so stands for a whole paste.
_PASTE, _PASTE_END = "\x1b[200~", "\x1b[201~"
# One key: a paste (before which a person may have pressed Escape), an escape sequence
# (also one that breaks off), Alt and a character, or a character.  What matches none of
# them is the beginning of a paste or of a sequence.
_KEY = re.compile(
    r"\x1b+\[200~([^\x1b]*+(?:\x1b(?!\[201~)[^\x1b]*+)*+)\x1b\[201~"
    r"|(?!\x1b+\[200~)(?:\x1b+\[\[?+[0-?]*+[ -/]*+(?:[@-~]|(?=.))"
    r"|\x1b+O[0-9;]*+.|\x1b+[^\x1b\[O]|[^\x1b])",
    re.DOTALL,
)
_LINE = re.compile(r"[^\n]*+\n")


class KeyReader:
    """Cuts what a keyboard or a pipe sends into keys, in bounded memory.

    A paste is one key.  Where the system edits the lines, each is one, with its newline.
    """

    def __init__(self, edits: bool) -> None:
        self._edits = edits
        errors = "replace" if edits else "surrogateescape"
        self._decoder = codecs.getincrementaldecoder(protocol.ENCODING)(errors)
        self._rest = ""  # the beginning of a key
        self.pasting = False  # the end of a paste is still to come

    def feed(self, chunk: bytes) -> list[str]:
        """Add what was read, nothing at the end of input; return the keys it completes."""
        self._rest += self._decoder.decode(chunk, final=not chunk)
        if self._rest and not (chunk or self._edits):
            self._rest += "\n"  # the last line counts
        key, keys, index = _KEY if self._edits else _LINE, [], 0
        while match := key.match(self._rest, index):
            keys.append(_PASTE + match[1] if match.lastindex else match[0])
            index = match.end()
        self._rest = self._rest[index:]
        self.pasting = self._edits and self._rest.lstrip("\x1b").startswith(_PASTE[1:])
        # Too much of one key is forgotten, but not the beginning of the end of a paste.
        if len(self._rest) > MAX_TYPED_CHARS + READ_BYTES:
            self._rest = self._rest[:MAX_TYPED_CHARS] + self._rest[-len(_PASTE_END) :]
        return keys


if __name__ == "__main__":
    sys.exit(client_program())
