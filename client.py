"""The chat client: a menu, a send loop and one thread that receives.

Threads:
  main          client_program: menu, name, handle_chat (the send loop), all of the keyboard
  receiver      receive_messages, from the connection on: shows what comes above the line
                being typed, and tells the main thread what concerns it

Only the receiver reads the socket.  The main thread waits in one place, Terminal._watch,
for keys, signals and the receiver alike, so that leaving never depends on the server.

A terminal object owns keyboard and screen: LineEditor on a terminal, PlainTerminal for
pipes, dumb terminals and Windows.  Both have the same methods, so nothing else here
knows which one it talks to.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything that takes time, or needs a new Python
    import signal
    import sys

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python still imports
    if sys.hexversion < 0x030B0000:
        sys.exit("client.py needs Python 3.11 or newer: try python3.11 client.py")

import argparse
import math
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable

import protocol
from console import Draft, LineEditor, Pasted, PlainTerminal, Terminal, Woken
from protocol import ServerLine

try:
    import fcntl
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

CONNECT_SECONDS = 10.0
LEAVE_SECONDS = 3.0  # that a hanging server may hold up a person who leaves
RECEIVE_BYTES = 65536

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended: 128 + SIGINT
CHOICES = {"1": "Join the chat", "q": "Leave the chat", "2": "Exit the program"}
LEAVING = "Leaving the chat..."
# The line after one of these is a secret, and the server says so with a question.
SECRET_COMMANDS = frozenset({"/register"})

# Windows has no such flag: there a server that hangs holds up a line until it goes on.
_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)


class ConnectionLost(Exception):
    """The server is gone; str() of it is the reason."""


class ServerFull(Exception):
    """The server has no room, which has been shown."""


# --- the program --------------------------------------------------------------------


def client_program() -> int:
    """Run the client; return its exit status."""
    _fill_standard_streams()
    options = _parse_arguments()
    try:
        terminal = _open_terminal(options)
        client = ChatClient(options.host, options.port, terminal)
    except (OSError, ValueError) as error:  # ValueError: not a host name at all
        where = f"{protocol.clean(options.host) or repr('')}, port {options.port}"
        print(
            f"client.py: cannot connect to {where}: {_explain(error)}", file=sys.stderr
        )
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
    flags.add_argument(
        "--host", type=protocol.host_name, default=protocol.DEFAULT_HOST,
        help="the server's name or address",
    )  # fmt: skip
    flags.add_number(
        "--port", 1, 65535, default=protocol.DEFAULT_PORT, metavar="PORT",
        help="the server's TCP port",
    )  # fmt: skip
    flags.add_argument(
        "--times", action="store_true", help="show the time before each line"
    )
    flags.add_argument(
        "--bell", action="store_true",
        help="ring for private messages, and for those that name you",
    )  # fmt: skip
    return flags.parse_args()


def _open_terminal(options: argparse.Namespace) -> Terminal:
    keyboard, screen = sys.stdin.fileno(), sys.stdout.fileno()
    two_ways = os.isatty(keyboard) and os.isatty(screen)
    if termios is None or not two_ways or os.environ.get("TERM") == "dumb":
        return PlainTerminal(keyboard, screen, options)
    return LineEditor(keyboard, screen, options)


# What to do about it, by the first kind of error that fits.
_ADVICE: list[tuple[type[Exception], str]] = [
    (socket.gaierror, "is the name after --host spelled as it should be?"),
    (ConnectionRefusedError, "start the server there, or give its --port"),
    (TimeoutError, "is that computer up, and the port open in its firewall?"),
    (OSError, "the system does not allow it"),
    (ValueError, "--host takes a name or an address"),
]


def _explain(error: Exception) -> str:
    """Return why there is no connection, and what to do about that very thing."""
    reason = "that is no host" if isinstance(error, ValueError) else _reason(error)
    advice = next(advice for kind, advice in _ADVICE if isinstance(error, kind))
    return f"{reason} ({advice})"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# --- one person's session -----------------------------------------------------------


class ChatClient:
    """Menu, name and chat, over one connection after another."""

    def __init__(self, host: str, port: int, terminal: Terminal) -> None:
        """Connect.  Raises OSError if there is no server, ValueError if no such host."""
        self._address = (host, port)
        self._terminal = terminal
        self._name = ""  # under which the person was in, to be offered again
        self._status = 0  # the exit status, if the person leaves now
        self._hangs = False  # the server takes nothing any more
        self._draft = Draft()  # what is half typed, while it cannot be typed on
        self._open(CONNECT_SECONDS)

    def _open(self, seconds: float) -> None:
        """Make a new connection; its receiver is still to be started."""
        self._socket = socket.create_connection(self._address, seconds)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._receiver = threading.Thread(
            target=self.receive_messages, args=(self._socket,), name="receiver"
        )
        # What the receiver tells the main thread, with a nudge of the terminal.  Each is
        # set in one step, so there is no lock.
        self._end = ""  # why the connection has ended
        self._idle = False  # all that it has read is taken
        self._bug: Exception | None = None  # that ended the receiver
        self._joined = False
        self._early: ServerLine | None = None  # a notice or refusal before any name
        self._answer: ServerLine | None = None  # to what was sent to get in
        self._question = False  # a password is asked for, in the chat
        self._refused = False  # a line was, in the chat
        # And the other way round: the next notice, refusal or question is the answer.
        self._awaits_answer = False

    def run(self) -> int:
        """Run the session and return the exit status.

        Raises SystemExit if a signal ends the program, and whatever bug ended the
        receiver.  The connection is closed and the receiver has ended in any case.
        """
        try:
            self._terminal.show("Connected to server.")
            self._start_receiver()
            try:
                leaving = self._stay()
            except KeyboardInterrupt:
                self._status, leaving = INTERRUPTED, LEAVING
            except (ConnectionLost, ServerFull):
                return 1
            self._leave(leaving)
            return self._status
        finally:
            self._hang_up()

    def _stay(self) -> str:
        """Go through menu, name and chat until the person leaves; return what to say.

        A lost connection leads back to the menu, where 1 makes a new one.
        Raises ConnectionLost if nobody is there to try again, and ServerFull.
        """
        while True:
            try:
                choice = self.menu()
                if choice == "1" and self._join():
                    self.handle_chat(self._socket)
                return "Exiting the program." if choice == "2" else LEAVING
            except ConnectionLost as lost:
                self._hang_up()
                self._terminal.show(f"Connection lost: {lost}.")
                self._status = 1
                if not self._terminal.person:
                    raise
                # It was meant for the chat, and would be taken for answers.
                self._terminal.forget_typed()

    def menu(self) -> str:
        """Show the menu until one of CHOICES is chosen."""
        while True:
            self._terminal.show(*(f"{key}. {what}" for key, what in CHOICES.items()))
            answer = self._ask("Enter your choice: ")
            if answer is None:
                return "q"
            if (choice := answer.strip()) in ("1", "2"):
                return choice
            self._terminal.show(f"Please choose one of these: {', '.join(CHOICES)}.")

    def _ask(self, prompt: str, *, hidden: bool = False) -> str | None:
        """Return the answer to a prompt; None if the person leaves."""
        answer = self._terminal.ask(prompt, hidden=hidden)
        return None if answer is None or _is_quit(answer) else answer

    # --- joining --------------------------------------------------------------------

    def _join(self) -> bool:
        """Ask for a name until the server takes one; False if the person leaves.

        Raises ServerFull, or ConnectionLost.
        """
        if not self._terminal.person:
            self._status = 1  # until it is in
        self._check_connection()
        while (name := self._ask_name()) is not None:
            self._terminal.show(f"Joining the chat as {name}...")
            answer = self._send_name(name)
            while answer and answer.mark == "?":
                password = self._ask("Password: ", hidden=True)
                # Never on a new connection: there it would be taken for a name.
                answer = None if password is None else self._exchange(password)
            if not answer:
                return False
            if _says_full(answer):
                raise ServerFull
            if answer.mark == "*":
                self._status, self._name = 0, name
                self._terminal.know_name(name)
                return True
        return False

    def _ask_name(self) -> str | None:
        offer = f" [{self._name}]" if self._name else ""
        while (answer := self._ask(f"Enter your username{offer}: ")) is not None:
            if name := protocol.clean(answer).strip() or self._name:
                return name
            self._terminal.show("Please enter a name, or q to leave.")
        return None

    def _send_name(self, name: str) -> ServerLine | None:
        """Return the server's answer to a name; None if the person leaves.

        A connection that ended while the person thought about it is made again.
        """
        self._check_connection()
        try:
            return self._exchange(name)
        except ConnectionLost:
            # It ended between our look at it and now, or it was about to.
            self._check_connection()
            return self._exchange(name)

    def _exchange(self, text: str) -> ServerLine | None:
        """Send a line and return the answer; None if the person leaves.

        Raises ConnectionLost.
        """
        self._answer, self._awaits_answer = None, True
        if not self._send(text):
            return None
        if not self._wait(lambda: self._answer is not None or self._end != ""):
            return None
        if self._answer is None:
            raise ConnectionLost(self._end)
        return self._answer

    def _check_connection(self) -> None:
        """Connect again if the server has ended a connection that nobody used.

        Raises ServerFull if it had no room, ConnectionLost if it is gone.
        """
        self._wait(self._has_heard_all)
        if self._early and _says_full(self._early):
            self._terminal.show(self._early)
            raise ServerFull
        if not self._end:
            return
        self._hang_up()
        try:
            self._open(LEAVE_SECONDS)
        except OSError as error:
            raise ConnectionLost(_reason(error)) from None
        self._start_receiver()

    def _has_heard_all(self) -> bool:
        """Tell whether the receiver has taken all that has arrived.

        The order counts: the receiver is not idle before it reads, so what has left the
        socket in between is either taken already or makes it busy.
        """
        if self._end:
            return True
        arrived = select.select([self._socket], [], [], 0)[0]
        return not arrived and self._idle

    # --- chatting -------------------------------------------------------------------

    def handle_chat(self, client_socket: socket.socket) -> None:
        """Send what the person types until they leave.  Raises ConnectionLost."""
        going_on = True
        while going_on:
            if self._end:
                raise ConnectionLost(self._end)
            try:
                going_on = self._tell_secret() if self._question else self._say()
            except Woken as woken:
                self._draft = woken.draft or self._draft
                if self._end and self._draft.text:  # it stays to be seen meanwhile
                    self._terminal.show(f"You: {self._draft.text}")

    def _say(self) -> bool:
        """Send the next line that is typed; False if the person leaves."""
        draft, self._draft = self._draft, Draft()
        text = self._terminal.ask(
            "You: ", until=lambda: self._end != "" or self._question, draft=draft
        )
        if text is None:
            return False
        if _is_quit(text):
            self._terminal.leaving = True
            self._send("q")
            return False
        if text in ("q", "Q"):
            text += " "  # pasted: with the blank it is a message
        try:
            # As it is: cleaned it may be longer than a line may be.
            return not text.strip() or self._send(text) and self._await_question(text)
        except ConnectionLost:
            self._draft = Draft(text)
            raise

    def _await_question(self, text: str) -> bool:
        """After a line that leads to a question, wait for it: what is typed is secret.

        False if the person leaves.
        """
        if protocol.split_command(text)[0] not in SECRET_COMMANDS:
            return True
        return self._wait(lambda: self._question or self._refused or self._end != "")

    def _tell_secret(self) -> bool:
        """Send a password; False if the person leaves."""
        self._question = False
        answer = self._terminal.ask(
            "Password: ", hidden=True, until=lambda: self._end != ""
        )
        return answer is not None and not _is_quit(answer) and self._send(answer)

    # --- sending, waiting and leaving -----------------------------------------------

    def _send(self, text: str) -> bool:
        """Send a line; False if the person leaves before the server has taken it.

        Raises ConnectionLost.
        """
        unsent = memoryview(protocol.encode_line(text))
        self._refused = False

        def is_sent() -> bool:
            nonlocal unsent
            try:
                unsent = unsent[self._socket.send(unsent, _DONT_WAIT) :]
            except BlockingIOError:
                pass
            return not unsent

        try:
            patience = LEAVE_SECONDS if self._terminal.person else math.inf
            self._hangs = not self._terminal.wait(is_sent, patience, self._socket)
        except OSError as error:
            # The receiver says why, once it has shown all that had arrived.
            self._wait(lambda: self._end != "")
            raise ConnectionLost(self._end or _reason(error)) from None
        return not self._hangs

    def _wait(self, fact: Callable[[], bool]) -> bool:
        """Wait until the receiver has told something; False if the person leaves."""
        return self._terminal.wait(fact, LEAVE_SECONDS)

    def _leave(self, leaving: str) -> None:
        """Say goodbye, and see to it that what was sent arrives."""
        self._terminal.leaving = True
        self._terminal.show(leaving)
        if self._joined:
            # Everything sent is delivered before the server closes its side.
            _shut_down(self._socket, socket.SHUT_WR)
            self._wait_for_end()
        self._hang_up()
        self._terminal.show("Connection closed.")

    def _wait_for_end(self) -> None:
        """Wait until the server has read everything and closed its side.

        In a pipe however long that takes.  A person at a terminal waits while it goes
        on, and after Ctrl-C for LEAVE_SECONDS only.
        """
        interrupted = self._status == INTERRUPTED
        patient = not (self._terminal.person or interrupted)
        patience = math.inf if patient else LEAVE_SECONDS
        unread = _unread_bytes(self._socket)
        try:
            while not self._hangs:
                if self._terminal.wait(lambda: self._end != "", patience):
                    return
                before, unread = unread, _unread_bytes(self._socket)
                self._hangs = interrupted or not 0 < unread < before
        except KeyboardInterrupt:
            self._status = INTERRUPTED
            return
        if unread and not interrupted:
            self._terminal.show(f"The server has not taken the last {unread} bytes.")

    def _hang_up(self) -> None:
        """Close the connection and end the receiver; again does nothing.

        Raises what ended the receiver, if that was a bug.
        """
        _shut_down(self._socket, socket.SHUT_RDWR)  # wakes the receiver
        if self._receiver.is_alive():
            self._receiver.join()
        self._socket.close()
        self._joined = False
        bug, self._bug = self._bug, None
        if bug:
            raise bug

    # --- receiving ------------------------------------------------------------------

    def _start_receiver(self) -> None:
        try:
            self._receiver.start()
        except RuntimeError as error:  # the system has no more threads
            self._end = str(error)

    def receive_messages(self, client_socket: socket.socket) -> None:
        """Show what comes until the connection ends.  Runs in the receiver thread."""
        splitter = protocol.LineSplitter(protocol.MAX_SHOWN_BYTES)
        end = "the server closed the connection"
        try:
            while chunk := self._receive(client_socket):
                lines = map(protocol.decode_shown, splitter.feed(chunk))
                self._take([protocol.parse_server_line(line) for line in lines])
        except OSError as error:
            end = _reason(error)
        except Exception as error:  # noqa: BLE001  a bug: _hang_up() raises it
            self._bug = error
            end = repr(error)
        self._end = end
        self._terminal.nudge()

    def _receive(self, client_socket: socket.socket) -> bytes:
        """Wait for bytes and return them; b"" at EOF."""
        self._idle = True
        if not self._joined:
            self._terminal.nudge()  # _check_connection() may wait for it
        select.select([client_socket], [], [])
        self._idle = False  # before it is read: see _has_heard_all()
        return client_socket.recv(RECEIVE_BYTES)

    def _take(self, lines: list[ServerLine]) -> None:
        """Show lines, and tell the main thread of those that concern it."""
        shown, answer = [], None
        asked = refused = False
        for line in lines:
            if self._joined:
                asked |= line.mark == "?"
                refused |= line.mark == "!"
            elif line.mark and not self._awaits_answer:
                self._early = line
                continue
            elif line.mark:
                answer, self._awaits_answer = line, False
                self._joined = line.mark == "*"
            shown.append(line)
        # First, so that the next prompt comes below.
        self._terminal.show(*shown)
        self._question |= asked
        self._refused |= refused
        if answer or asked or refused:
            self._answer = answer or self._answer
            self._terminal.nudge()


def _is_quit(answer: str) -> bool:
    return not isinstance(answer, Pasted) and answer.strip().lower() == "q"


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


if __name__ == "__main__":
    sys.exit(client_program())
