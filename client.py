"""The chat client: a menu, a send loop and one thread that receives.

Threads:
  main          client_program: menu, name, handle_chat (the send loop), all of the keyboard
  receiver      receive_messages, from the connection on: shows what comes above the line
                being typed, and tells the main thread what concerns it

Only the receiver reads the socket.  The main thread waits in one place, Terminal._watch,
for keys, signals and the receiver alike: leaving never depends on the server, and a
signal handler has nothing to do but to note the signal.

A terminal object owns keyboard and screen: LineEditor, which alone knows escape
sequences, or a plain Terminal for pipes, dumb terminals and Windows.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the other imports take their time: Ctrl-C ends them without a traceback.
    import _signal  # type: ignore[import-not-found]  # signal itself takes its time
    import sys

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit("client.py: needs Python 3.11 or newer (try python3.11 client.py)")

import argparse
import codecs
import getpass
import math
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import compress, cycle
from typing import Any, Self

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
QUIET_SECONDS = 0.05  # without a key: all that was typed ahead has come
PASTE_SECONDS = 2.0  # without a key: the end of a paste will not come any more
FORGET_SECONDS = 3.0  # that keys which never end may hold up the end of the program
MAX_TYPED_CHARS = 1024 * 1024  # in one paste: what comes after is left out
MAX_TYPED_AHEAD = 4096  # keys or lines; the rest waits in the system
MAX_PASTED_LINES = 5  # that are sent without asking
REMEMBERED = 1000  # messages, and a hundred times as many sightings of names

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended: 128 + SIGINT
CHOICES = {"1": "Join the chat", "q": "Leave the chat", "2": "Exit the program"}
CLOSED = "the server closed the connection"
LEAVING = "Leaving the chat..."
MESSAGE = "You: "  # what is typed here can be half typed, pasted, and recalled
PASSWORD = "Password: "  # what is typed here is not shown, and remembered nowhere
SECRET_COMMAND = "/register"  # a password follows, if the server asks for it

# Windows has no such flag: there a server that hangs holds up a line until it goes on.
_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)

Fact = Callable[[], object]  # is so if what it returns is true
_never: Fact = lambda: False


class Leave(Exception):
    """The person leaves; str() of it is what to say then, if it is not LEAVING."""


class ServerHangs(Leave):
    """They leave, and the server has not gone on within LEAVE_SECONDS."""


class ConnectionLost(Exception):
    """The server is gone; str() of it is the reason."""


class ServerFull(ConnectionLost):
    """The server has no room; str() of it is how it says so."""


# --- the program --------------------------------------------------------------------


def client_program() -> int:
    """Run the client; return its exit status."""
    _fill_standard_streams()
    options = _parse_arguments()
    terminal = None
    try:
        two_ways = sys.stdin.isatty() and sys.stdout.isatty()
        plain = termios is None or not two_ways or os.environ.get("TERM") == "dumb"
        terminal = Terminal(options) if plain else LineEditor(options)
        client = ChatClient(options.host, options.port, terminal)
    except (OSError, ValueError) as error:  # ValueError: not a host name at all
        where = f"{protocol.clean(options.host) or repr('')}, port {options.port}"
        reason = _explain(error)
        if terminal:
            terminal.restore()
        print(f"client.py: cannot connect to {where}: {reason}", file=sys.stderr)
        return 1
    with terminal:
        return client.run()


def _fill_standard_streams() -> None:
    """Open what was closed before the start, so that no socket takes its number."""
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _parse_arguments() -> argparse.Namespace:
    flags = protocol.CommandLine("Join a chat room over plain TCP.")
    flags.add_argument("--host", type=protocol.host_name, default=protocol.DEFAULT_HOST,
                       help="the server's name or address")  # fmt: skip
    flags.add_number("--port", 1, 65535, default=protocol.DEFAULT_PORT, metavar="PORT",
                     help="the server's TCP port")  # fmt: skip
    flags.add_argument("--times", action="store_true",
                       help="show the time before each line")  # fmt: skip
    flags.add_argument("--bell", action="store_true",
                       help="ring for what is meant for you")  # fmt: skip
    return flags.parse_args()


def _explain(error: Exception) -> str:
    """Return why there is no connection, and what to do about that very thing."""
    if not isinstance(error, OSError):
        return "that is no host (--host takes a name or an address)"
    advice = {
        socket.gaierror: "is the name after --host spelled as it should be?",
        ConnectionRefusedError: "start the server there, or give its --port",
        TimeoutError: "is that computer up, and the port open in its firewall?",
    }.get(type(error), "is --host right, and is there a network that leads there?")
    return f"{_reason(error)} ({advice})"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# --- one person's session -----------------------------------------------------------


class ChatClient:
    """Menu, name and chat, over one connection after another.

    Whatever the main thread waits for, Leave (caught by run) and ConnectionLost (caught
    by _stay) end it.
    """

    def __init__(self, host: str, port: int, terminal: Terminal) -> None:
        """Connect.  Raises OSError if there is no server, ValueError if no such host."""
        self._address = (host, port)
        self._terminal = terminal
        self._name = ""  # under which the person was in, to be offered again
        self._status = 0  # the exit status, if the person leaves now
        self._connect(CONNECT_SECONDS)

    def _connect(self, seconds: float) -> None:
        """Make a new connection and start its receiver."""
        self._socket = socket.create_connection(self._address, seconds)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What the receiver tells the main thread, with a nudge of the terminal.  Each is
        # set in one step, so there is no lock.
        self._end: ConnectionLost | None = None  # why the connection has ended
        self._joined = False
        # The last answer to a name or a password, or once joined the last refusal or
        # question; None from the sending of a line until there is one.
        self._answer = ServerLine("!", "", "nothing was asked")
        self._receiver = threading.Thread(
            target=self.receive_messages, args=(self._socket,), name="receiver"
        )
        try:
            self._receiver.start()
        except RuntimeError as error:  # the system has no more threads
            self._end = ConnectionLost(error)

    def run(self) -> int:
        """Run the session and return the exit status."""
        try:
            self._terminal.show("Connected to server.")
            self._stay()
        except (Leave, KeyboardInterrupt) as leave:
            self._leave(leave)
        finally:
            self._hang_up()
        return self._status

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
                if isinstance(lost, ServerFull):
                    self._terminal.show(ServerLine("!", "", str(lost)))
                    return
                self._terminal.show(f"Connection lost: {lost}.")
                if not self._terminal.person:
                    return
                # It was meant for the chat, and would be taken for answers.
                if unsent := self._terminal.forget_typed():
                    self._terminal.show(f"Pasted lines that were not sent: {unsent}.")

    def menu(self) -> str:
        """Show the menu until one of CHOICES is chosen."""
        while True:
            self._terminal.show(*(f"{key}. {what}" for key, what in CHOICES.items()))
            choice = self._terminal.ask("Enter your choice: ").strip()
            if choice in CHOICES:
                return choice
            self._terminal.show(f"Please choose one of these: {', '.join(CHOICES)}.")

    def _join(self) -> None:
        """Ask for a name, and its password if it has one, until the server takes it."""
        if not self._terminal.person:
            self._status = 1  # until it is in
        self._check_connection()
        while not self._joined:
            if self._is_asked():
                # Never on a new connection: there it would be taken for a name.
                self._exchange(self._terminal.ask(PASSWORD))
            else:
                offer = f" [{self._name}]" if self._name else ""
                answer = self._terminal.ask(f"Enter your username{offer}: ")
                if not (name := protocol.clean(answer).strip() or self._name):
                    self._terminal.show("Please enter a name, or q to leave.")
                    continue
                self._terminal.show(f"Joining the chat as {name}...")
                self._terminal.know_name(name)  # before anybody can say it
                self._send_name(name)
        self._status, self._name = 0, name

    def _send_name(self, name: str) -> None:
        """Send a name and wait for its answer."""
        self._check_connection()
        try:
            self._exchange(name)
        except ConnectionLost:  # between that look and now
            self._check_connection()
            self._exchange(name)

    def _check_connection(self) -> None:
        """Connect again if the server has ended a connection that nobody used."""
        # Whatever has arrived is heard first: a refusal from before is no answer to the
        # name.  At its end the socket stays readable.
        self._terminal.wait(
            lambda: self._end or not select.select([self._socket], [], [], 0)[0]
        )
        if isinstance(self._end, ServerFull):
            raise self._end
        if self._end:
            self._hang_up()
            try:
                self._connect(LEAVE_SECONDS)
            except OSError as error:
                self._terminal.check_leaving()
                raise ConnectionLost(_reason(error)) from None

    def _exchange(self, text: str, about: str | tuple[str, ...] = "") -> None:
        """Send a line; wait for a question, or an answer that begins with `about`."""
        self._send(text)
        told: Fact = lambda: (
            self._is_asked()
            or (self._answer.mark and self._answer.text.startswith(about))
        )
        self._terminal.wait(lambda: told() or self._end, patient=self._joined)
        if self._end and not told():
            raise self._end

    def _is_asked(self) -> bool:
        return self._answer.mark == "?"

    def handle_chat(self, client_socket: socket.socket) -> None:
        """Send what the person types until they leave or the connection is lost."""
        while not self._end:
            if not self._is_asked():
                self._say()
            else:
                password = self._terminal.ask(PASSWORD, lambda: self._end)
                if not self._end:
                    self._send(password)
        if half_typed := "".join(self._terminal.draft):
            self._terminal.show(MESSAGE + half_typed)  # it stays to be seen
        raise self._end

    def _say(self) -> None:
        """Send the next line that is typed."""
        try:
            text = self._terminal.ask(MESSAGE, lambda: self._end or self._is_asked())
        except Leave:
            self._terminal.leaving = True
            with suppress(ConnectionLost):  # then nobody is there to be told
                self._send("q")
            raise
        # As it is: cleaned it may be longer than a line may be.
        command, _ = protocol.split_command(protocol.clean(text))
        secret = command == SECRET_COMMAND
        try:
            if secret:
                # An earlier line may be refused now; our server names the command.
                self._exchange(text, about=(command, "That line is "))
            elif text.strip():
                self._send(text)
        except ConnectionLost:
            self._terminal.draft = (text, "".join(self._terminal.draft))
            raise
        if secret and not self._is_asked():
            # The next line is the password, for nobody.
            self._terminal.drop_ahead()
            if not self._terminal.person:
                self._status = 1
                raise Leave

    def _send(self, text: str) -> None:
        """Send a line."""
        unsent = memoryview(protocol.encode_line(text))
        self._answer = ServerLine("", "", "")

        def is_sent() -> bool:
            nonlocal unsent
            with suppress(BlockingIOError):
                unsent = unsent[self._socket.send(unsent, _DONT_WAIT) :]
            return not unsent

        try:
            self._terminal.wait(is_sent, self._socket, patient=True)
        except OSError as error:
            # The receiver says why, once it has shown all that had arrived.
            self._terminal.wait(lambda: self._end)
            raise self._end or ConnectionLost(_reason(error)) from None

    def _leave(self, leave: BaseException) -> None:
        """Say goodbye, and see to it that what was sent arrives."""
        self._terminal.leaving = True
        self._terminal.show(str(leave) or LEAVING)
        if isinstance(leave, KeyboardInterrupt):
            self._status = INTERRUPTED
        if self._joined and isinstance(leave, ServerHangs):
            self._terminal.show("The server does not answer.")
        elif self._joined:
            self._wait_for_end()
        self._hang_up()
        self._terminal.show("Connection closed.")

    def _wait_for_end(self) -> None:
        """Wait until the server has read all and closes, or goes on no more."""
        with suppress(OSError):  # the server was quicker
            self._socket.shutdown(socket.SHUT_WR)
        unread = _unread_bytes(self._socket)
        try:
            while not self._end:
                with suppress(ServerHangs):
                    self._terminal.wait(lambda: self._end, patient=True)
                before, unread = unread, _unread_bytes(self._socket)
                if not 1 < unread < before:  # the end of our side counts as one
                    break
        except KeyboardInterrupt:
            self._status = INTERRUPTED
        if not self._end and unread > 1:
            self._terminal.show("The server has not taken everything.")
        if self._end and str(self._end) != CLOSED and not self._terminal.person:
            self._terminal.show(f"Connection lost: {self._end}.")
            self._status = self._status or 1  # what has arrived is not known

    def _hang_up(self) -> None:
        """Close the connection and end the receiver; again does nothing."""
        with suppress(OSError):  # the server was quicker
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the receiver
        if self._receiver.is_alive():
            self._receiver.join()
        self._socket.close()
        self._joined = False

    def receive_messages(self, client_socket: socket.socket) -> None:
        """Show what comes until the connection ends.  Runs in the receiver thread."""
        splitter = protocol.LineSplitter(protocol.MAX_SHOWN_BYTES)
        end = ConnectionLost("this client has a bug")  # told on stderr by then
        try:
            while chunk := client_socket.recv(RECEIVE_BYTES):
                lines = map(protocol.decode_shown, splitter.feed(chunk))
                self._take([protocol.parse_server_line(line) for line in lines])
            end = ConnectionLost(CLOSED)
        except OSError as error:
            end = ConnectionLost(_reason(error))
        except ServerFull as full:  # which is not shown before 1 is chosen
            end = full
        finally:
            self._end = end
            self._terminal.nudge()

    def _take(self, lines: list[ServerLine]) -> None:
        """Show lines, and tell the main thread of an answer among them."""
        shown, answer = [], None
        for line in lines:
            if self._joined:
                answer = line if line.mark in ("!", "?") else answer
            elif line.mark == "!" and line.text.startswith(protocol.FULL):
                raise ServerFull(line.text)
            elif line.mark:
                if self._answer.mark or answer:
                    continue  # nobody has asked for anything yet
                answer, self._joined = line, line.mark == "*"
            shown.append(line)
        # First, so that the next prompt comes below.
        self._terminal.show(*shown)
        if answer:
            self._answer = answer
        if answer or not self._joined:
            self._terminal.nudge()


def _unread_bytes(client_socket: socket.socket) -> int:
    """Return how much the server's side has not taken yet, as far as the system tells."""
    if termios:
        with suppress(OSError):  # the connection has ended
            answer = fcntl.ioctl(client_socket, termios.TIOCOUTQ, bytes(4))  # tcp(7)
            return int.from_bytes(answer, sys.byteorder)
    return 0


def _is_quit(text: str) -> bool:
    return text.strip().lower() == "q"


# --- keyboard and screen ------------------------------------------------------------

# The local modes that are off while we get key by key (Ctrl-C and Ctrl-Z stay signals),
# and while a password is typed on a plain terminal.
_EDITED = termios.ICANON | termios.ECHO | termios.IEXTEN if termios else 0
_HIDDEN = termios.ECHO if termios else 0
# A line that leaves, among those that were typed ahead.
_LEAVES = re.compile(r"(?:^|[\r\n])(?:\x04|[ \t]*[qQ][ \t]*[\r\n])")


class Terminal:
    """Keyboard and screen in whole lines, without any escape sequence.

    With a person at it, a prompt stands there while they type.  In a pipe it appears
    together with the answer, so that what comes out reads like a session.
    Threads: all but show() and nudge() is the main thread's.
    """

    _idle_reads = 0  # empty ones, in a row, that are no end of input

    def __init__(self, options: argparse.Namespace) -> None:
        self._keyboard, self._screen = sys.stdin.fileno(), sys.stdout.fileno()
        self._options = options
        self.person = sys.stdin.isatty()
        # The half typed message around its cursor, while other things are asked for.
        self.draft = ("", "")
        # Guards the screen and what stands on it.  Held while writing to it.
        self._lock = threading.RLock()
        self._prompt = ""  # of the line being typed, if one is
        self._until: Fact = _never
        self._echoed = False  # the Enter that ended the line
        self._mention = re.compile("(?!)")  # the person's own name, once it is known
        self._reader: LineReader | KeyReader = LineReader()
        self._ahead: deque[str] = deque()  # lines or keys, typed but not used yet
        self._pasted: deque[str] = deque()  # lines of a long paste, to be sent
        self._input_ended, self._empty_reads = False, 0
        self.leaving = False  # the person has asked to
        # For the main thread's attention: nudge(), and signals.
        self._waker, self._wake_receiver = socket.socketpair()
        self._waker.setblocking(False)
        self._signals: deque[int] = deque()  # that have come
        self._ending = False  # one of them ends the program
        self._modes: list[Any] | None = None  # as they were found
        if termios and self.person:
            self._modes = termios.tcgetattr(self._keyboard)
        self._off = 0  # of the local modes, while the terminal is ours

    def __enter__(self) -> Self:
        # A Python handler runs on the main thread, between two steps of it; the byte
        # that the signal itself writes ends the wait in _watch().
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._on_end)
        if self._modes:  # there is something to put in order
            for number in signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT:
                signal.signal(number, self._on_end)
            for number in signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH:
                signal.signal(number, lambda number, _: self._signals.append(number))
        self._set_modes(self._off)
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()
        signal.set_wakeup_fd(-1)
        self._waker.close()
        self._wake_receiver.close()

    def know_name(self, name: str) -> None:
        """Note the person's own name, which stands out in what others say."""
        pattern = rf"(?<!\w){re.escape(unicodedata.normalize('NFKC', name))}(?!\w)"
        self._mention = re.compile(pattern, re.IGNORECASE)

    def ask(self, prompt: str, until: Fact = _never) -> str:
        """Return the line that is typed.  Raises Leave if the person leaves.

        until: "" is the answer as soon as this is so; looked at after every nudge.
        """
        with self._lock:
            self._prompt, self._until = prompt, until
            self._begin_line()
        try:
            return self._read_line()
        finally:
            with self._lock:
                self._end_line()
                self._prompt, self._until = "", _never

    def _begin_line(self) -> None:
        """Show the prompt.  Caller holds _lock."""
        self._echoed = False
        self.draft = ("", "")  # the system edits the line
        if self._prompt == PASSWORD:
            # What is half typed in the system's buffer is no part of the secret.
            self._off = _HIDDEN
            self._set_modes(self._off, flush=True)
        if self.person:
            self._write(self._prompt)

    def _read_line(self) -> str:
        if os.name == "nt" and self._prompt == PASSWORD:
            return getpass.getpass("")
        if not (line := self._next()):
            return line
        text, shown = line.removesuffix("\n"), self._prompt != PASSWORD
        self._echoed = shown and line != text
        if not self.person:
            self.show(self._prompt + text * shown)
        if _is_quit(text):
            raise Leave
        return text

    def _end_line(self) -> None:
        """See to it that what is shown next begins a row.  Caller holds _lock."""
        if self.person and not self._echoed:
            self._write("\n")
        self._off = 0
        self._set_modes(self._off)

    def _next(self) -> str:
        """Return the next line or key; "" if woken.  The end of input is a Leave."""
        while not self._ahead:
            if self._until():  # what was typed before has been used by now
                return ""
            if self._input_ended:
                raise Leave
            self._await_typing()
        return self._ahead.popleft()

    def _await_typing(self) -> None:
        if os.name == "nt":  # select() takes sockets only there
            self._read_keyboard()
            self._heed_signals()
        else:
            self._watch()

    def wait(
        self, fact: Fact, writable: socket.socket | None = None, patient: bool = False
    ) -> None:
        """Wait until this is so, with the keyboard watched.

        A person that leaves meanwhile waits LEAVE_SECONDS more, and as long as the socket
        goes on taking what is sent: then ServerHangs is raised.  The fact is looked at
        after every nudge, and if the socket is writable.
        patient: what came from a pipe is to be delivered, however long that takes.
        """
        for_ever = patient and not (self.person or self._ending)
        deadline = math.inf
        self._heed_signals()  # also if there is nothing to wait for, time after time
        while not fact():
            if deadline == math.inf and not for_ever and self._wants_to_leave():
                deadline = time.monotonic() + LEAVE_SECONDS
            if time.monotonic() >= deadline:
                raise ServerHangs
            if writable in self._watch(deadline - time.monotonic(), writable):
                deadline = math.inf

    def _wants_to_leave(self) -> bool:
        """Tell whether the person has asked to leave, perhaps in what is typed ahead."""
        typed = "".join(key for key in self._ahead if not key.startswith(_PASTED))
        if self.person and _LEAVES.search(typed):
            return True
        # What is in a pipe is delivered, however long that takes.
        return self.leaving or self._input_ended and (self.person or not self._ahead)

    def check_leaving(self) -> None:
        """Raise Leave if the person has asked to while nobody watched the keyboard."""
        self._watch(0)
        if self.person and self._wants_to_leave():
            raise Leave

    def nudge(self) -> None:
        """Let the main thread look at what it waits for.  For any thread."""
        with suppress(OSError):  # full of nudges, or nobody waits any more
            self._waker.send(b"\0")
        if os.name == "nt" and self._until():
            self.show("(Please press Enter.)")  # nothing else ends its reading there

    def _watch(
        self, seconds: float = math.inf, writable: socket.socket | None = None
    ) -> list[object]:
        """Wait for keys, a nudge or a signal, and take them; return what was ready.

        Raises KeyboardInterrupt, or SystemExit for the other signals that end it.
        """
        inputs: list[Any] = [self._wake_receiver]
        if os.name != "nt" and not self._input_ended:
            inputs += [self._keyboard] if len(self._ahead) < MAX_TYPED_AHEAD else []
        outputs = [writable] if writable else []
        timeout = None if seconds == math.inf else max(0.0, seconds)
        readable, ready, _ = select.select(inputs, outputs, [], timeout)
        if self._wake_receiver in readable:
            self._wake_receiver.recv(READ_BYTES)
        # Before reading: Ctrl-C empties the system's buffer, and a read might wait.
        self._heed_signals()
        if self._keyboard in readable:
            self._read_keyboard()
        return [*readable, *ready]

    def _read_keyboard(self) -> None:
        try:
            chunk = os.read(self._keyboard, READ_BYTES)
        except OSError:
            chunk = b""  # the terminal has been closed
        self._empty_reads = 0 if chunk else self._empty_reads + 1
        self._input_ended = self._empty_reads > self._idle_reads
        self._ahead += self._reader.feed(chunk)

    def _on_end(self, number: int, _: object) -> None:
        """Note that the program is to end.  The second time end it at once."""
        if self._ending:  # stuck, on a server or on a screen that takes nothing
            self.restore()
            os._exit(128 + number)
        self._ending = True
        self._signals.append(number)

    def _heed_signals(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            if number == signal.SIGTSTP:
                self._stop()
            elif number == signal.SIGCONT:  # by fg, or after a kill -STOP
                self._set_modes(self._off)
                with self._lock:
                    self._draw()
            elif number != signal.SIGWINCH:  # for which it is enough to wake
                sys.exit(128 + number)

    def _stop(self) -> None:
        """Stop as Ctrl-Z asks for; returns when the shell continues the program."""
        self._set_modes(0)
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        # Without a shell to continue it the system has not stopped it at all.
        self._signals.append(signal.SIGCONT)

    def restore(self) -> None:
        """Leave the terminal as it was found.  Takes no lock: for signal handlers too."""
        self.forget_typed()
        self._set_modes(0)

    def forget_typed(self) -> int:
        """Throw away what was typed ahead, lest the menu or the shell take it.

        Returns how many pasted lines were among it.
        """
        if self._modes and not self._in_background():
            self._read_out()
        return self.drop_ahead()

    def drop_ahead(self) -> int:
        """Throw away what has been read already; return how many lines of a paste."""
        unsent = len(self._pasted)
        self._pasted.clear()
        self._ahead.clear()
        return unsent

    def _read_out(self) -> None:
        """Read until nothing comes any more.

        A terminal goes on sending the rest of a long paste after the system's buffer has
        been emptied.
        """
        deadline = time.monotonic() + FORGET_SECONDS
        self._set_modes(_EDITED)
        with suppress(OSError):  # the terminal has been closed
            while self._reader.pasting or time.monotonic() < deadline:
                pause = PASTE_SECONDS if self._reader.pasting else QUIET_SECONDS
                if not select.select([self._keyboard], [], [], pause)[0]:
                    break
                if not (chunk := os.read(self._keyboard, READ_BYTES)):
                    break
                self._reader.feed(chunk)
        if not self._reader.pasting:
            self._reader = type(self._reader)()
        self._set_modes(self._off, flush=True)

    def _in_background(self) -> bool:
        """Tell whether the shell has the terminal: to touch it would stop the program."""
        with suppress(OSError):  # no shell with job control has it
            return os.tcgetpgrp(self._keyboard) != os.getpgrp()
        return False

    def _set_modes(self, off: int, *, flush: bool = False) -> None:
        """Set the modes that were found, but for some local ones that are off."""
        if not self._modes or self._in_background():
            return
        modes = [*self._modes[:6], [*self._modes[6]]]
        modes[3] &= ~off
        if off & termios.ICANON:
            modes[6][termios.VMIN] = modes[6][termios.VTIME] = 0  # never wait
        with suppress(termios.error):  # the terminal has been closed
            if flush:
                termios.tcflush(self._keyboard, termios.TCIFLUSH)
            # At once: output that is paused must not hold this up.
            termios.tcsetattr(self._keyboard, termios.TCSANOW, modes)

    def show(self, *lines: ServerLine | str) -> None:
        """Show whole lines above the one being typed.  For any thread."""
        with self._lock:
            text = "".join([self._paint(line) + "\n" for line in lines])
            if text and self._prompt:
                self._draw(text)
            else:
                self._write(text)

    def _draw(self, above: str = "") -> None:
        """Write lines, and the prompt again below them.  Caller holds _lock."""
        self._write(f"\n{above}{self._prompt}" if self.person else above)

    def _paint(self, line: ServerLine | str) -> str:
        """Return a line as it is shown, with what the flags ask for."""
        if isinstance(line, str):
            return protocol.clean(line)
        rings = line.private or line.name and self._mention.search(line.text)
        at_terminal = self.person and sys.stdout.isatty()
        bell = "\a" if rings and self._options.bell and at_terminal else ""
        now = time.strftime("%H:%M ") if self._options.times else ""
        return f"{bell}{now}{self._style(line)}"

    def _style(self, line: ServerLine) -> str:
        """Return a line as it came over the wire."""
        private = " (private)" if line.private else ""
        head = f"{line.mark} " if line.mark else f"{line.name}{private}: "
        return head + line.text if line.mark or line.name else line.text

    def _write(self, text: str) -> None:
        # Past sys.stdout, whose flush at exit would wait for a pipe that is full.
        data = memoryview(text.encode(sys.stdout.encoding, "replace"))
        with suppress(OSError):  # nobody reads any more; what is typed still counts
            while data:
                try:
                    data = data[os.write(self._screen, data) :]
                except BlockingIOError:  # some terminals are shared and do not block
                    select.select([], [self._screen], [])


class LineReader:
    """Cuts what comes from a pipe or a plain terminal into lines, with their newlines."""

    pasting = False  # nobody can know

    def __init__(self) -> None:
        # One over the limit is as good as any more: the server refuses it.
        self._splitter = protocol.LineSplitter(protocol.MAX_LINE_BYTES)

    def feed(self, chunk: bytes) -> list[str]:
        """Add what was read, nothing at the end of input, and return complete lines."""
        lines = self._splitter.feed(chunk or b"\n")  # the last line counts
        texts = [str(line, protocol.ENCODING, "surrogateescape") for line in lines]
        return [f"{text}\n" for text in texts if chunk or text]


# --- keys ---------------------------------------------------------------------------

_JOINER = "\u200d"  # of emoji, and of letters of some scripts


def _cell_width(char: str) -> int:
    """Return how many cells of the screen a character takes: 0, 1 or 2."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _width_at(text: str, place: int) -> int:
    """Return how many cells text[place] takes; joined emoji take those of one."""
    width = _cell_width(text[place])
    if width and place and text[place - 1] == _JOINER:
        base = place - 1
        while base and not _cell_width(text[base]):
            base -= 1
        if _cell_width(text[base]) == 2:  # letters that are joined stand side by side
            return 0
    return width


# Where a key takes the cursor, to the left (by is negative) or to the right.  A character
# is passed with all that combines with it, so that no key stops inside one.
def _step(text: str, place: int, by: int) -> int:
    place = min(max(0, place + by), len(text))
    while 0 < place < len(text) and not _width_at(text, place):
        place += by
    return place


def _word(text: str, place: int, by: int, gap: str) -> int:
    """Pass what is between two words, then a word."""
    for in_gap in (True, False):
        while (further := _step(text, place, by)) != place:
            if bool(re.match(gap, text[min(place, further)])) != in_gap:
                break
            place = further
    return place


_FAR = sys.maxsize
# key → how far it takes the cursor, in characters or in words with such gaps between
# them, and whether it cuts what is passed on the way there
_KEYS = {
    key: (by, gap, cuts)
    for by, gap, cuts, keys in [
        (-1, "", False, "\x02 \x1b[D \x1bOD"),
        (-1, "", True, "\x7f \x08"),
        (1, "", False, "\x06 \x1b[C \x1bOC"),
        (1, "", True, "\x04 \x1b[3~"),
        (-_FAR, "", False, "\x01 \x1b[H \x1bOH \x1b[1~ \x1b[7~"),
        (-_FAR, "", True, "\x15"),
        (_FAR, "", False, "\x05 \x1b[F \x1bOF \x1b[4~ \x1b[8~"),
        (_FAR, "", True, "\x0b"),
        (-1, r"\W", False, "\x1bb \x1b[1;5D \x1b[1;3D \x1b[5D \x1bOd \x1b\x1b[D"),
        (-1, r"\W", True, "\x1b\x7f \x1b\x08"),
        (1, r"\W", False, "\x1bf \x1b[1;5C \x1b[1;3C \x1b[5C \x1bOc \x1b\x1b[C"),
        (1, r"\W", True, "\x1bd \x1b[3;5~ \x1b[3;3~"),
        (-1, r"\s", True, "\x17"),
    ]
    for key in keys.split(" ")
}
_RECALLS = {"\x10": -1, "\x1b[A": -1, "\x1bOA": -1, "\x0e": 1, "\x1b[B": 1, "\x1bOB": 1}

# Around what is pasted.  A key that begins so stands for a whole paste.
_PASTED, _PASTE_END = "\x1b[200~", "\x1b[201~"
# One key: a paste (before which a person may have pressed Escape), an escape sequence
# (also one that breaks off), Alt and a character, or a character.  What matches none of
# them is the beginning of a paste or of a sequence.
_KEY = re.compile(
    r"\x1b+\[200~([^\x1b]*+(?:\x1b(?!\[201~)[^\x1b]*+)*+)\x1b\[201~"
    r"|(?!\x1b+\[200~)(?:\x1b+\[\[?+[0-?]*+[ -/]*+(?:[@-~]|(?=.))"
    r"|\x1b+O[0-9;]*+.|\x1b+[^\x1b\[O]|[^\x1b])",
    re.DOTALL,
)


class KeyReader:
    """Cuts what a keyboard sends into keys, in bounded memory; a paste is one key."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder(protocol.ENCODING)("replace")
        self._rest = ""  # the beginning of a key

    @property
    def pasting(self) -> bool:
        """The end of a paste is still to come."""
        return self._rest.lstrip("\x1b").startswith(_PASTED[1:])

    def feed(self, chunk: bytes) -> list[str]:
        """Add what was read and return the keys that it completes."""
        self._rest += self._decoder.decode(chunk)
        keys, place = [], 0
        while match := _KEY.match(self._rest, place):
            pasted = match[1]
            keys.append(match[0] if pasted is None else _PASTED + pasted)
            place = match.end()
        self._rest = self._rest[place:]
        # Too much of one key is forgotten, but not the beginning of the end of a paste.
        if len(self._rest) > MAX_TYPED_CHARS + READ_BYTES:
            self._rest = self._rest[:MAX_TYPED_CHARS] + self._rest[-len(_PASTE_END) :]
        return keys


# --- the line editor ----------------------------------------------------------------

# Red is for refusals, magenta for private messages.
_NAME_COLOURS = (32, 33, 34, 36, 92, 93, 94, 96)
_MARK_STYLES = {"*": 2, "!": 31, "?": 1}
_PRIVATE_COLOUR = 35
# The names in a notice: "NAME has joined …", "… online: NAME, NAME and 3 more.",
# "… NAME, NAME", "[…] NAME: …"
_NAMES = re.compile(
    r"(?:^(?=\S+ has (?:joined|left) )|online: |^… |, |^\[.*?\] )"
    r"([^\s,]+?)(?=,|: |\.?$| has | and \d)"
)


class LineEditor(Terminal):
    """Keyboard and screen of a terminal, with the line being typed at the bottom.

    It reads keys in place of lines, and draws what Terminal only writes.  The screen is
    changed in one write at a time: from the first row of the line down everything is
    cleared, what others wrote comes there, and prompt and line again below it.  So it is
    right after each write, by either thread, and a change of the window's size is
    one more reason to draw, and no case of its own.
    """

    # A read that never waits is empty as well when Ctrl-C or Ctrl-Z has emptied the
    # system's buffer before it.
    _idle_reads = 2

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self._off = _EDITED
        self._brackets = ""  # the request for them around a paste, or for none
        self._reader = KeyReader()
        self._colours = not os.environ.get("NO_COLOR")
        self._before, self._after = self.draft  # the cursor, of the line being typed
        self._was_pasted = False  # what was done last to it
        self._unpasted = ("", "")  # the line with the first of them alone
        self._sent: deque[str] = deque(maxlen=REMEMBERED)
        self._names: deque[str] = deque(maxlen=100 * REMEMBERED)  # as often as seen
        self._fitting: Iterator[str] | None = None  # of them, for Tab once more
        self._shown = ("", "")  # of prompt and line on the screen, around the cursor

    def _set_modes(self, off: int, *, flush: bool = False) -> None:
        super()._set_modes(off, flush=flush)
        if self._in_background():
            return
        before, self._brackets = self._brackets, "\x1b[?2004" + ("h" if off else "l")
        # A signal handler may be here because the screen takes nothing any more.
        ready = select.select([], [self._screen], [], QUIET_SECONDS)[1]
        if self._brackets != before and ready:
            self._write(self._brackets)

    def _stop(self) -> None:
        if not self._reader.pasting:  # the shell would get, and run, the rest
            with self._lock:
                self._end_line()
                super()._stop()

    def ask(self, prompt: str, until: Fact = _never) -> str:
        """Return the line that is typed, or the next one that was pasted."""
        if self._pasted:
            answer = self._pasted.popleft()
            self.show(prompt if prompt == PASSWORD else f"{prompt}{answer}")
            if _is_quit(answer):
                answer += " "  # with the blank it is a message
        else:
            answer = super().ask(prompt, until)
            if len(self._pasted) > MAX_PASTED_LINES:
                self._confirm(until)
        if answer.strip() and prompt == MESSAGE:
            self._sent.append(answer)
        return answer

    def _confirm(self, until: Fact) -> None:
        """Ask before many lines are sent; Enter alone means No."""
        lines, self._pasted = self._pasted, deque()
        with suppress(Leave):
            answer = super().ask(f"Send {len(lines)} lines? [y/N] ", until)
            if answer.strip().lower() in ("y", "yes"):
                self._pasted = lines
                return
        self.draft = self._unpasted
        if until():
            self.show(f"Pasted lines that were not sent: {len(lines) - 1}.")

    def _begin_line(self) -> None:
        self._before = self._after = ""
        self._was_pasted, self._fitting = False, None
        self._drafts = [*self._sent, ""]  # what Up and Down go through, as it is now
        self._recalled = len(self._sent)
        if self._prompt == MESSAGE:
            (self._before, self._after), self.draft = self.draft, ("", "")
        self._draw()

    def _read_line(self) -> str:
        """Let keys change the line until one of them ends it."""
        while key := self._next():
            text = self._before + self._after
            if key == "\x04" and not text:
                raise Leave
            if key in "\r\n":
                if _is_quit(text) and not self._was_pasted:
                    raise Leave
                return f"{text} " if _is_quit(text) else text
            with self._lock:
                self._edit(key)
                if self._pasted:
                    break
                if not self._ahead:  # of many keys at once only the last one is drawn
                    self._draw()
        with self._lock:  # the line goes: something else comes here before it is sent
            if self._prompt == MESSAGE:
                self.draft = (self._before, self._after)
            self._write(self._erase())
            self._prompt = ""
        return ""

    def _end_line(self) -> None:
        if self._prompt:  # the line stays on the screen, whole
            text = "" if self._prompt == PASSWORD else self._before + self._after
            self._write(f"{self._erase()}{self._prompt}{text}\n")

    def _await_typing(self) -> None:
        pasting = self._reader.pasting
        if not self._watch(PASTE_SECONDS if pasting else math.inf):  # its end got lost
            self._ahead += self._reader.feed(_PASTE_END.encode())
        if not self._ahead:  # the window's size has changed, or all is forgotten
            with self._lock:
                self._draw()

    def _edit(self, key: str) -> None:
        """Change the line as a key asks for.  Caller holds _lock."""
        self._was_pasted = False
        if key != "\t":
            self._fitting = None
        if key in _KEYS:
            by, gap, cuts = _KEYS[key]
            text, start = self._before + self._after, len(self._before)
            end = _word(text, start, by, gap) if gap else _step(text, start, by)
            self._before = text[: min(start, end) if cuts else end]
            self._after = text[max(start, end) if cuts else end :]
        elif key in _RECALLS and self._prompt != PASSWORD:
            self._drafts[self._recalled] = self._before + self._after
            self._recalled = min(
                max(0, self._recalled + _RECALLS[key]), len(self._sent)
            )
            self._before, self._after = self._drafts[self._recalled], ""
        elif key == "\t":
            self._complete()
        elif key == "\x0c":
            self._write("\x1b[H\x1b[2J")
            self._shown = ("", "")
        elif key.startswith(_PASTED):
            self._paste(key.removeprefix(_PASTED))
            self._was_pasted = self._prompt == MESSAGE
        elif key >= " " and key[0] != "\x1b":
            self._before += protocol.clean(key)

    def _paste(self, text: str) -> None:
        """Insert a line; of a longer text put the lines into _pasted.

        The last one stays here if it has no end, unless there is to be a question.
        Where no message is typed, only the first line is of use.
        """
        first, *more = map(protocol.clean, re.split("\r\n|\r|\n", text))
        self._before += first
        if not more or self._prompt != MESSAGE:
            return
        self._unpasted = (self._before, self._after)
        lines = [self._before, *more]
        if sum(line.strip() != "" for line in lines) > MAX_PASTED_LINES:
            lines.append("")
        *lines, self._before = lines
        self._pasted.extend([line for line in lines if line.strip()])

    def _complete(self) -> None:
        """Complete a name that was seen; once more: the next one that fits."""
        # Once more, the name that was put in is the stem, and is replaced.
        stem = self._before.rpartition(" ")[2]
        if self._fitting is None:
            start, seen = protocol.name_key(stem), dict.fromkeys(reversed(self._names))
            names = [name for name in seen if protocol.name_key(name).startswith(start)]
            fitting = [name for name in names if not self._mention.fullmatch(name)]
            if self._prompt == PASSWORD or not fitting:
                self._before += protocol.clean("\t")
                return
            self._fitting = cycle(fitting)
        self._before = self._before.removesuffix(stem) + next(self._fitting)

    def _style(self, line: ServerLine) -> str:
        """Return a line in its colours; the person's own name is bold in it."""
        names = [line.name, *(_NAMES.findall(line.text) if line.mark == "*" else [])]
        self._names += [
            name for name in names if 0 < len(name) <= protocol.MAX_NAME_CHARS
        ]
        text = super()._style(line)
        if not self._colours:
            return text
        if line.mark:
            return f"\x1b[{_MARK_STYLES[line.mark]}m{text}\x1b[m"
        said = self._mention.sub("\x1b[1m\\g<0>\x1b[22m", line.text)
        if line.private:
            return f"\x1b[{_PRIVATE_COLOUR}m{text.removesuffix(line.text)}{said}\x1b[m"
        colour = _NAME_COLOURS[zlib.crc32(line.name.encode()) % len(_NAME_COLOURS)]
        return f"\x1b[{colour}m{line.name}\x1b[m: {said}" if line.name else text

    def _erase(self) -> str:
        """Return what clears prompt and line from the screen.  Caller holds _lock."""
        before, after = self._shown
        self._shown = ("", "")
        up = _places(before + after, self._size()[0])[len(before)][0]
        # Not from the first cell: at the top of the screen tmux would take that for
        # clearing all of it, and keep what stood there in its history.
        return f"\r{_move(up, 'A')}\x1b[K \x1b[J\r"

    def _draw(self, above: str = "") -> None:
        """Write lines, and prompt and line again below them.  Caller holds _lock."""
        columns, rows = self._size()
        hidden = self._prompt == PASSWORD
        before, after = ("", "") if hidden else (self._before, self._after)
        before, after = _window(self._prompt + before, after, columns, max(1, rows - 1))
        places = _places(before + after, columns)
        (end_row, end_column), (row, column) = places[-1], places[len(before)]
        self._write(
            f"{self._erase()}{above}{before}{after}"
            # A row that is exactly full: makes the terminal really go to the next one.
            + (" \r" if end_row and not end_column else "")
            + f"\r{_move(end_row - row, 'A')}{_move(column, 'C')}"
        )
        self._shown = (before, after)

    def _size(self) -> tuple[int, int]:
        columns = rows = 0
        with suppress(OSError):  # the terminal has been closed
            columns, rows = os.get_terminal_size(self._screen)
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
    return [*places, (row, column) if column < columns else (row + 1, 0)]


def _window(before: str, after: str, columns: int, rows: int) -> tuple[str, str]:
    """Return the part of a line around the cursor that fits into so many rows."""
    # Of a very long line look at what may be near only, from the beginning of a row.
    near = columns * (rows + 1)
    start = max(0, len(before) - near) // columns * columns
    before, after = before[start:], after[:near]
    places = _places(before + after, columns)
    last_row = max(rows - 1, places[len(before)][0])
    inside = [last_row - rows < row <= last_row for row, _ in places[:-1]]
    behind = inside[len(before) :]
    return "".join(compress(before, inside)), "".join(compress(after, behind))


if __name__ == "__main__":
    sys.exit(client_program())
