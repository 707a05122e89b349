"""The chat server: a thread per client reads, the broadcaster sends to all.

Threads:
  main          accept_connections: accepts; at the end runs the shutdown
  handlers      handle_client, one per client: read, check, append to the outbox
  broadcaster   all that is ever sent; closes the connections
  recorders     what the terminal shows; with --database, what is kept there
  hashing       with --database, two: the passwords

The way of a message: handle_client reads it and calls broadcast_message, which appends
one entry to the outbox, under the lock.  The broadcaster moves all entries that are in
the outbox to the end of one stream of bytes and makes a pass: each client is sent what it
has not had yet, without blocking.  A member is a place in that stream; a slow
reader is a member whose place is further behind.  What only one client sees (a welcome, a
refusal, a private message) is its own face of an entry.  Before it joins and after it
leaves, its place is outside of the stream.

How a connection ends: the client leaves (q, or EOF), it is lost (its peer is gone), or we
drop it (too slow, or not joined).  Its handler then calls remove_client, and ends: the
client's last entry hands the connection over to the broadcaster.  That ends our side
after the last send, and closes the connection once the peer has ended its side too, or
its time is up.  A newcomer that is turned away has no handler: a refusal and its last
entry are sent at once.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the other imports take their time: Ctrl-C ends them without a traceback.
    import _signal  # type: ignore[import-not-found]  # signal itself takes its time
    import sys

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit("server.py: needs Python 3.11 or newer (try python3.11 server.py)")

import argparse
import errno
import hashlib
import os
import secrets
import select
import selectors
import signal
import socket
import sqlite3
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import protocol
from protocol import ProtocolError

MAX_CLIENTS = 1000
LINES_PER_SECOND = 100  # faster than anybody types, slow enough for others to read
BURST_SECONDS = 10  # a burst holds the lines of so many seconds
THROTTLE_PAUSE_SECONDS = 0.05  # a client that may not send now is read again after that
MAX_NAMES_TRIED = 5
MAX_NAMES_LISTED = 20
JOIN_SECONDS = 120.0
GONE_SECONDS = 10.0  # a peer that is gone is read for so long: its flood keeps no name

# One recv() is small, so that a message is passed on before many of its kind have piled
# up: with 64 KiB, the 99th percentile of the latency under many small senders doubles.
RECEIVE_BYTES = 4096
# Lines of one client in one entry: each gets a name, of up to 128 bytes, and so one
# recv() of short lines could fill all of the outbox.
MAX_LINES_AT_ONCE = 128
# The pause after each piece of a line: one without end is read at 25 MB/s at most.
PIECE_PAUSE_SECONDS = 0.0001
# The outbox is bounded.  Handlers wait for space, so that a sender that is too fast is
# slowed by its own TCP window.  One send offers so much too.
MAX_OUTBOX_BYTES = 256 * 1024
# A member may be so far behind.  The stream is shared: all slow readers together hold
# this much once, not each.
MAX_UNSENT_BYTES = 4 * 1024 * 1024
# What only one member sees is not shared: so much for all of them.
MAX_OWN_BYTES = 16 * 1024 * 1024
ENTRY_BYTES = 200  # of memory, for an entry or a face besides its text
STEPS_PER_TURN = 200  # for a client with faces of its own: others have their turn soon
# A pass takes in what is said meanwhile until the stream has this length.
MAX_LOOK_BYTES = 16 * 1024
# Back-pressure: while a member is near its limit, passes of a full outbox come this far
# apart, 3.3 MB/s.  A member that reads 4 MB/s keeps up, and others wait under 100 ms.
FULL_PASS_SECONDS = 0.08

LISTEN_BACKLOG = 4096  # connections; the system may allow fewer
ACCEPT_PAUSE_SECONDS = 0.1  # when out of file descriptors, memory or threads
SPARE_DESCRIPTORS = 64  # for all but the clients, and for those turned away
LEAVE_SECONDS = 5.0  # for a member to receive what waits for it, and to end its side
LINGER_SECONDS = 1.0  # for one that has not joined to do so
SHUTDOWN_SECONDS = 1.0  # for all to do so at the end; 2 s are promised
MAX_UNWRITTEN = 10_000  # lines that wait for the terminal, messages for the database
LAST_SECONDS = 0.3  # at the end, for the database; then as long for the terminal
# Lines and messages come in bursts, and a batch costs little more than one of them.
GATHER_SECONDS = 0.005

HISTORY_MESSAGES = 20  # that a newcomer gets
MAX_HISTORY = 200  # that a member may ask for: they are in memory
# In one statement, of four values each: older SQLite takes 999 values in all.
MAX_ROWS = 1000 if sqlite3.sqlite_version_info >= (3, 32) else 249
BUSY_SECONDS = 1.0  # that another program may keep the database locked
RETRY_SECONDS = 0.1  # after a write to the database has failed
HANGS_SECONDS = 1.0  # without anything written: the disk hangs, and nobody waits
SALT_BYTES = 16
SCRYPT = {"n": 2**14, "r": 8, "p": 1}  # 16 MiB and some 50 ms (RFC 7914)
MAX_HASHES_AT_ONCE = 2
HASH_PAUSE_SECONDS = 0.5  # until we look again whether the client has been dropped

# The errors of accept(2) that tell of a bug; all others pass.
BROKEN = {errno.EBADF, errno.EINVAL, errno.ENOTSOCK}

FOREVER = float("inf")
MSG_DONTWAIT: int = getattr(socket, "MSG_DONTWAIT", 0)  # 0: Windows has none
# Places outside of the stream: of a client that has not joined, and of one that has had
# all, so that we have ended our side.
OUTSIDE, OVER = sys.maxsize - 1, sys.maxsize


class _Client:
    """One connection; once it has joined, a member: a place in the stream."""

    def __init__(self, client_socket: socket.socket, peer: str) -> None:
        # It blocks its handler, and the broadcaster sends with MSG_DONTWAIT meanwhile.
        self.socket = client_socket
        self.peer = peer  # "address:port"
        self.thread: threading.Thread  # its handler
        self.name = ""  # until it has joined
        self.dropped = ""  # why we end it: its handler reads no more
        self.lost = ""  # why its peer is gone; what that had sent is still read
        # Its handler's own: the lines to come, and what it says in those that came.
        self.lines: Iterator[bytes] = iter(())
        self.said: list[str] = []
        self.refusals = 0  # so far
        # The broadcaster's own.  Up to its place in the stream, an offset, a member has
        # been sent all.  Its own faces of entries stand further on: of each, the place
        # where it is sent, its text, and the place where the client goes on then.
        self.place = OUTSIDE
        self.faces: deque[tuple[int, bytes, int]] = deque()
        self.own_bytes = 0  # of memory, for these faces

    def __str__(self) -> str:
        return f"{self.name} ({self.peer})" if self.name else self.peer

    def receive(self) -> bytes:
        """Wait for what the peer sends next; b"" is the end.  For the handler."""
        if not MSG_DONTWAIT:  # the socket does not block
            select.select([self.socket], [], [])
        return self.socket.recv(RECEIVE_BYTES)

    def is_gone(self) -> bool:
        """Tell whether the connection has been reset, also if input is still unread."""
        try:
            return not self.socket.getpeername()
        except OSError:
            return True

    def has_ended(self) -> bool:
        """Look whether the peer has ended the connection; pass over what it sent."""
        try:
            return not self.socket.recv(RECEIVE_BYTES, MSG_DONTWAIT)
        except OSError as error:
            return not isinstance(error, BlockingIOError)

    def shut(self, how: int) -> None:
        """End one direction or both, under a thread that is blocked on the socket.

        recv() returns b"" then.  close() would wake nobody, and free a descriptor that
        is still in use.
        """
        with suppress(OSError):  # ended already
            self.socket.shutdown(how)


class _Entry(NamedTuple):
    """One entry of the outbox: its client sees `to_self`, all others `to_others`."""

    client: _Client
    to_others: bytes
    to_self: bytes = b""
    joins: bool = False  # from here on it gets the stream
    ends: bool = False  # here it gets the last thing
    leaves: bool = False  # and its handler has ended

    def size(self) -> int:
        """Return how many bytes of memory it takes."""
        return ENTRY_BYTES + len(self.to_others) + len(self.to_self)


class ChatServer:
    """The room: who is in, and the threads that serve them.

    Creating it binds and listens; serve() does the rest.  port: 0 takes a free one.
    lines_per_second: 0 is no limit.  tell: takes what is for the server's terminal, one
    line or several, and never waits.  database: the path of its file.  Raises OSError if
    the host is unknown or the port taken, and what Database raises.
    """

    def __init__(
        self, host: str = protocol.DEFAULT_HOST, port: int = protocol.DEFAULT_PORT, *,
        max_clients: int = MAX_CLIENTS, lines_per_second: int = LINES_PER_SECOND,
        tell: Callable[[str], None] = lambda lines: None, tell_messages: bool = True,
        database: str | None = None,
    ) -> None:  # fmt: skip
        self._max_clients = max_clients
        self._lines_per_second = lines_per_second
        self._tell_messages = tell_messages
        self._tell = tell
        self._database = None if database is None else Database(database, tell)
        self._commands = _COMMANDS | (_DATABASE_COMMANDS if self._database else {})
        self._stopping = False

        # The main thread's own.
        self._listener = _listen(host, port)
        self.address = _format_address(self._listener.getsockname())
        self._accepts = True  # as far as the terminal was told
        self._arrivals = _Selector()  # watches the listener; stop() wakes it
        self._arrivals.register(self._listener, selectors.EVENT_READ, self._listener)
        self.waker = self._arrivals.waker  # for signals: any byte wakes the main thread

        # Guards changes of the tables below and of the outbox, which go together (to look
        # one thing up needs no lock).  Held for table operations only: never while
        # sending to clients, receiving or joining a thread.
        self._lock = threading.Lock()
        self.clients: dict[str, socket.socket] = {}  # username → socket
        self._owners: dict[str, _Client] = {}  # name_key() of these names → member
        self._unjoined: dict[_Client, float] = {}  # in order of arrival → join until
        self._connections: dict[socket.socket, _Client] = {}  # all that have a handler
        self._broadcaster = _Broadcaster(self._lock)

    def serve(self) -> None:
        """Run the chat until stop() is called, by a signal or for a bug in a thread."""
        self._broadcaster.start()
        try:
            self.accept_connections()
        finally:
            self._shut_down()

    def stop(self) -> None:
        """Make serve() shut down in order and return.  For any thread, at any time."""
        self._stopping = True
        self._arrivals.wake()

    def accept_connections(self) -> None:
        """Accept clients until told to stop; each one gets a thread of its own.

        Out of file descriptors, memory or threads, it leaves the connections that come
        in the listener's queue and tries again a little later.
        """
        while not self._stopping:
            try:
                if self._arrivals.wait(self._drop_late()):
                    self._accept_one()
                    self._accepts = True
            except (BlockingIOError, ConnectionError):
                pass  # the peer is gone again
            except (OSError, RuntimeError) as error:
                if isinstance(error, OSError) and error.errno in BROKEN:
                    raise
                if self._accepts:
                    self._tell(f"Cannot take new clients for now: {error}")
                self._accepts = False
                time.sleep(ACCEPT_PAUSE_SECONDS)  # it would spin

    def _drop_late(self) -> float:
        """End one that has not joined in time; return the seconds until one is due."""
        with self._lock:
            client, until = next(iter(self._unjoined.items()), (None, FOREVER))
            seconds = until - time.monotonic()
            if client and seconds <= 0:
                why = f"This connection has not joined within {JOIN_SECONDS:.0f} s."
                self._drop_unjoined(client, why)
        return seconds

    def _accept_one(self) -> None:
        """Give a client a handler, if need be instead of one that has not joined.

        Raises OSError or RuntimeError if the system lacks something.
        """
        client_socket, address = self._listener.accept()
        # macOS has no address for a peer that is gone again.
        client = _Client(client_socket, _format_address(address or ("unknown", 0)))
        # A daemon, so that a bug in the shutdown ends the program; as the broadcaster is.
        handler = client.thread = threading.Thread(
            target=self.handle_client, args=(client_socket,), daemon=True
        )
        with self._lock:
            self._connections[client_socket] = client
            self._unjoined[client] = time.monotonic() + JOIN_SECONDS
            if len(self.clients) + len(self._unjoined) > self._max_clients:
                # The one that waits to join for longest gives way.  If all are members,
                # or too many handlers have still to end, the newcomer is turned away.
                leaver = next(iter(self._unjoined))
                why = "This connection has not joined, and others need the space."
                if leaver is client or len(self._connections) > 2 * self._max_clients:
                    leaver, why = client, f"{protocol.FULL}, please try again later."
                self._drop_unjoined(leaver, why)
        try:
            if not client.dropped:
                handler.start()
        except RuntimeError:
            with self._lock:
                self._drop_unjoined(client, "The system has no more threads.")
            raise
        finally:
            if not handler.ident:  # no handler runs that would do it
                self.remove_client(client_socket)

    def _drop_unjoined(self, client: _Client, why: str) -> None:
        """End a client that has not joined.  Caller holds _lock."""
        del self._unjoined[client]
        client.dropped = why
        self._broadcaster.append(_Entry(client, b"", protocol.refusal(why)))
        if client.thread.is_alive():  # else the broadcaster passes over what came
            client.shut(socket.SHUT_RD)  # wakes its handler

    def handle_client(self, client_socket: socket.socket) -> None:
        """Serve one client from its name to its end.  Runs in a thread of its own.

        Reads and checks; what is to be sent goes into the outbox.
        """
        client = self._connections[client_socket]
        self._tell(f"New connection from {client}")
        try:
            _set_options(client_socket)
            client.lines = self._read_lines(client)
            for line in client.lines:
                self._obey(client, line)
        except OSError as error:
            client.lost = protocol.reason_of(error)
        except Exception:  # noqa: BLE001
            traceback.print_exc()  # a bug: the others go on
        finally:
            self.remove_client(client_socket)

    def _read_lines(self, client: _Client) -> Iterator[bytes]:
        """Yield the lines of a client, up to the one with which it leaves."""
        for line in self._receive(client):
            if line in protocol.QUIT_LINES:
                self._say(client)
                if client.name and self._tell_messages:
                    self._tell(f"Received message from {client.name}: {line.decode()}")
                return
            yield line

    def _receive(self, client: _Client) -> Iterator[bytes]:
        """Yield lines as they come, no more of them than it may send.

        What it says in lines that came together is passed on together.  Ends with EOF,
        at a shutdown, when the client is dropped, and some time after its peer is gone.
        """
        splitter = protocol.LineSplitter(protocol.MAX_LINE_BYTES)
        closed = self._broadcaster.closed
        rate = self._lines_per_second or 10**9  # more than anybody sends
        used_until = -FOREVER  # a token bucket: its lines are used up to this time
        read_until = FOREVER
        while not client.dropped and (chunk := client.receive()):
            lines = splitter.feed(chunk)
            if not lines:
                closed.wait(PIECE_PAUSE_SECONDS)  # so that others can run
            while lines:
                now = time.monotonic()
                used_until = max(used_until, now - BURST_SECONDS)
                unused = int((now - used_until) * rate)
                if batch := lines[: min(unused, MAX_LINES_AT_ONCE)]:
                    for line in batch:
                        if client.dropped or closed.is_set():
                            return
                        yield line
                    self._say(client)
                    del lines[: len(batch)]
                    used_until += len(batch) / rate
                elif closed.wait(THROTTLE_PAUSE_SECONDS):
                    return
                if lines and client.is_gone():
                    read_until = min(read_until, now + GONE_SECONDS)
                    if now > read_until:
                        raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    def _obey(self, client: _Client, line: bytes) -> None:
        """Take a name from a client; then note what it says, or do what it asks for."""
        try:
            text = protocol.decode_message(line)
            command, rest = protocol.split_command(text)
            if text and not client.name:
                self._admit(client, protocol.check_name(text))
            elif command:
                self._say(client)
                if command not in self._commands:
                    word = command[: protocol.MAX_NAME_CHARS]  # our client looks for it
                    reason = "is no command: see /help (//TEXT says /TEXT)."
                    raise ProtocolError(f"{word} {reason}")
                for answer in self._commands[command][0](self, client, rest):
                    self._reply(client, protocol.notice(answer))
            elif text:
                client.said.append(rest)
        except ProtocolError as error:
            self._say(client)
            reason = str(error)
            client.refusals += 1
            if (tried := client.refusals) == MAX_NAMES_TRIED and not client.name:
                reason += f" ({tried} of {tried} tries on this connection)"
                client.dropped = "it has no try left"
            self._tell(f"Refused a line from {client}: {reason}")
            self._reply(client, protocol.refusal(reason))

    def _admit(self, client: _Client, name: str) -> None:
        """Make the client a member, if need be once it has said the password."""
        given = b""
        if self._database and (account := self._database.account(name)):
            self._check_free(name)
            question = f"The name {name} is kept for its owner. What is the password?"
            self._reply(client, protocol.question(question))
            if (line := next(client.lines, None)) is None:
                return
            given = self._database.hash(line, client, account)
        self._join(client, name, given)

    def _check_free(self, name: str) -> None:
        if protocol.name_key(name) in self._owners:
            raise ProtocolError(f"The name {name} is taken.")

    def _join(self, client: _Client, name: str, given: bytes) -> None:
        """Make the client a member, unless its connection has been ended meanwhile.

        given: the account that the password of the client makes.  Raises ProtocolError
        if the name is taken, or kept by another password.
        """
        joined = f"{name} has joined the chat."
        with self._lock:
            # The wait comes first: what is looked at behind it stays as it is.
            if not self._broadcaster.wait_for_space() or client not in self._unjoined:
                return
            self._check_free(name)
            welcome = [self._greeting(name)]
            if self._database:
                if not secrets.compare_digest(given, self._database.account(name)):
                    reason = f"That is not the password of {name}: give the name again."
                    raise ProtocolError(reason)
                welcome += list(self._database.last)[-HISTORY_MESSAGES:]
            del self._unjoined[client]
            self._owners[protocol.name_key(name)] = client
            self.clients[name] = client.socket
            client.name = name
            notices = b"".join(map(protocol.notice, welcome))
            entry = _Entry(client, protocol.notice(joined), notices, joins=True)
            self._tell(f"User {joined}")
            self._broadcaster.append(entry)

    def _greeting(self, name: str) -> str:
        """Caller holds _lock."""
        names = ", ".join(islice(self.clients, MAX_NAMES_LISTED)) or "nobody yet"
        more = len(self.clients) - MAX_NAMES_LISTED
        online = f"{names} and {more} more" if more > 0 else names
        return f"Welcome, {name}! /help lists the commands. Also online: {online}."

    def _say(self, client: _Client) -> None:
        """Pass on what a member has said in the lines that came together."""
        if client.said:
            self.broadcast_message("\n".join(client.said), client.socket)
            client.said.clear()

    def broadcast_message(self, message: str, sender_socket: socket.socket) -> None:
        """Append what a member says to the outbox, for everybody else.

        message: one text or several, a line each, cleaned.  Waits for space in the
        outbox, never for a reader.  Once the server shuts down, nothing is accepted.
        """
        sender = self._connections[sender_socket]
        texts = message.split("\n")
        shown = [f"{sender.name}: {text}\n" for text in texts]
        told = [f"Received message from {s}" for s in shown if self._tell_messages]
        if self._database:
            self._database.wait_for_space(len(texts))
        encoded = "".join(shown).encode(protocol.ENCODING)
        self._submit(_Entry(sender, encoded), "".join(told).removesuffix("\n"), texts)

    def _reply(self, client: _Client, line: bytes) -> None:
        """Send a client a line of its own; not to a peer that is gone."""
        if not client.lost:
            self._submit(_Entry(client, b"", line))

    def _submit(self, entry: _Entry, told: str = "", said: Sequence[str] = ()) -> bool:
        """Append an entry once there is space for it, unless the server shuts down.

        told, said: what is for the terminal and for the database, which so keep the
        order of the room.  Returns False if it was not appended: its client has left.
        """
        with self._lock:
            brief = entry.to_others != b"" and entry.size() < RECEIVE_BYTES
            has_space = self._broadcaster.wait_for_space(entry.size(), brief=brief)
            if not has_space or entry.client.socket not in self._connections:
                return False
            if told:
                self._tell(told)
            self._broadcaster.append(entry)
            if said and self._database:
                self._database.remember(entry.client.name, said)
        return True

    def _who(self, client: _Client, _: str) -> Iterable[str]:
        with self._lock:
            names = list(self.clients)
        for first in range(0, len(names), MAX_NAMES_LISTED):
            head = "…" if first else f"{len(names)} online:"
            row = ", ".join(names[first : first + MAX_NAMES_LISTED])
            yield f"{head} {row}"

    def _msg(self, client: _Client, rest: str) -> Iterable[str]:
        name, _, text = rest.partition(" ")
        if not (text := text.lstrip()):
            raise ProtocolError("Write it like this: /msg NAME TEXT.")
        if recipient := self._owners.get(protocol.name_key(protocol.check_name(name))):
            entry = _Entry(recipient, b"", protocol.private_message(client.name, text))
            told = f"Private message from {client.name} to {recipient.name}"
            if self._submit(entry, told):
                return ()
        raise ProtocolError("Nobody here has that name.")

    def _help(self, client: _Client, rest: str) -> Iterable[str]:
        for _, usage, effect in self._commands.values():
            yield f"{usage}: {effect}"
        yield "q, alone on its line: leaves the chat"

    def _history(self, client: _Client, rest: str) -> Iterable[str]:
        assert self._database
        number = rest.strip() or str(HISTORY_MESSAGES)
        if not number.isdecimal() or not int(number):
            raise ProtocolError("Write it like this: /history 50.")
        with self._lock:
            messages = list(self._database.last)[-int(number) :]
        return messages or ["Nothing has been said yet."]

    def _register(self, client: _Client, _: str) -> Iterable[str]:
        assert self._database
        question = f"Which password shall keep the name {client.name} for you?"
        self._reply(client, protocol.question(question))
        if (line := next(client.lines, None)) is not None:
            account = self._database.hash(protocol.check_password(line), client)
            self._database.keep(client.name, account)
            yield f"The name {client.name} is now kept for you."

    def _unregister(self, client: _Client, _: str) -> Iterable[str]:
        assert self._database
        if not self._database.account(client.name):
            raise ProtocolError(f"The name {client.name} is not kept.")
        self._database.keep(client.name, None)
        yield f"The name {client.name} is no longer kept."

    def remove_client(self, client_socket: socket.socket) -> None:
        """Take a client off the list, tell the others that a member has left, hand over.

        The last thing that its handler does: the broadcaster closes the connection.
        Called again, it does nothing.
        """
        with self._lock:
            client = self._connections.pop(client_socket, None)
            if not client:
                return
            self._unjoined.pop(client, None)
            left = b""
            if client.dropped:
                self._tell(f"Disconnected {client}: {client.dropped}")
            elif client.lost:
                self._tell(f"Lost connection to {client}: {client.lost}")
            elif not client.name:
                self._tell(f"Closed connection from {client}")
            if client.name:
                del self.clients[client.name]
                del self._owners[protocol.name_key(client.name)]
                self._tell(f"Removing user: {client.name} from clients")
                left = protocol.notice(f"{client.name} has left the chat.")
            self._broadcaster.append(_Entry(client, left, leaves=True))

    def _shut_down(self) -> None:
        """End in order.

        1. Take no new clients; send those away that have not joined.
        2. Close the outbox, with a last notice to all members, and the database.
        3. Let the broadcaster send all of it to all that read, and end our side of each
           connection; it closes those that the peers end too within SHUTDOWN_SECONDS.
        4. Wake the handlers that are left, wait for them, and close what they held.
        """
        self._listener.close()
        notice = protocol.notice("Server is shutting down.")
        with self._lock:
            for client in tuple(self._unjoined):
                self._drop_unjoined(client, "The server shuts down.")
            for client in self._owners.values():
                self._broadcaster.append(_Entry(client, b"", notice, ends=True))
            self._broadcaster.close_outbox()
            clients = tuple(self._connections.values())
        if self._database:
            self._database.close()
        self._broadcaster.join()
        for client in clients:
            client.shut(socket.SHUT_RDWR)
            client.thread.join()
        self._broadcaster.close()
        self._arrivals.close()


# Command → what obeys it and gives its answers; its usage and effect, for /help.
_COMMANDS = {
    "/who": (ChatServer._who, "/who", "lists all that are online"),
    "/msg": (ChatServer._msg, "/msg NAME TEXT", "says TEXT to NAME alone"),
    "/help": (ChatServer._help, "/help", "lists the commands"),
}
_DATABASE_COMMANDS = {
    "/history": (ChatServer._history, "/history [N]", "shows the last N messages"),
    "/register": (ChatServer._register, "/register", "keeps your name for you"),
    "/unregister": (ChatServer._unregister, "/unregister", "gives your name up"),
}


class _Broadcaster(threading.Thread):
    """The outbox, and the thread that sends what is in it and closes the connections.

    The outbox is for all threads.  All else is the thread's own.
    """

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__(name="broadcaster", daemon=True)
        # The outbox: entries in the one order in which all see them.
        self._lock = lock
        self._has_space = threading.Condition(lock)
        self._outbox: list[_Entry] = []
        self._outbox_bytes = 0
        self.closed = threading.Event()  # set under the lock
        self._end_at = FOREVER  # set once it is closed
        self._rests = False  # the next entry is to wake the thread

        # The stream: what some member has still to be sent, addressed by its offset since
        # the start of the server; the offset behind its last byte.
        self._stream = bytearray()
        self._end = 0
        self._clients: dict[_Client, None] = {}  # all that had an entry, until closed
        self._slow: dict[_Client, int] = {}  # behind, and watched → bytes unsent
        self._leaving: dict[_Client, float] = {}  # no handler any more → close by then
        self._selector = _Selector()  # where the thread rests
        self._pass_again = False  # some members had their turn before the last look
        self._pass_at = 0.0  # no pass before then
        self._taken = 0  # bytes of this pass, for one that is near its limit

    def wait_for_space(self, size: int = ENTRY_BYTES, *, brief: bool = True) -> bool:
        """Wait until an entry may be appended; False once the outbox is closed.

        Caller holds the lock.  One that says much, or not to the room, is not brief, and may
        fill only half of the outbox: the other half is for all that just say something.
        """
        most = max(0, MAX_OUTBOX_BYTES // (1 if brief else 2) - size)
        while self._outbox_bytes > most and not self.closed.is_set():
            self._has_space.wait()
            if self._outbox_bytes <= most:
                self._has_space.notify()  # one wakes the next: to wake all would be in vain
        return not self.closed.is_set()

    def append(self, entry: _Entry) -> None:
        """Have an entry sent.  Caller holds the lock.  Never waits."""
        self._outbox.append(entry)
        self._outbox_bytes += entry.size()
        if self._rests:
            self._selector.wake()
            self._rests = False

    def close_outbox(self) -> None:
        """Let nobody wait for space any longer, and end soon.  Caller holds the lock."""
        self._end_at = time.monotonic() + SHUTDOWN_SECONDS
        self.closed.set()
        self._has_space.notify_all()
        self._selector.wake()

    def run(self) -> None:
        """Send all that is appended until the outbox is closed and all have left."""
        while self._clients or self._outbox or not self.closed.is_set():
            until = min([self._end_at, *self._leaving.values()])
            self._rests = True  # an entry wakes it from here on; look what came before
            if self._outbox or self._pass_again:
                until = min(until, self._pass_at)
            ready = self._selector.wait(until - time.monotonic())
            self._rests = False
            if time.monotonic() >= self._end_at:
                return
            self._give_turns(ready)
            self._close_ended({*ready})
            self._make_pass()

    def close(self) -> None:
        """Close the connections that are left; the thread has ended."""
        for client in self._clients:
            client.socket.close()
        self._selector.close()

    def _make_pass(self) -> None:
        """Give a turn to each client that keeps up."""
        if self._outbox and time.monotonic() >= self._pass_at:
            self._take_in()
        if self._pass_again:
            self._pass_again = False
            self._give_turns(self._in_turn())
        self._mind_slow_readers()

    def _in_turn(self) -> Iterator[_Client]:
        """Yield each client that keeps up, and look at the outbox before its turn.

        So it gets at once what was said meanwhile; the others get that in the next pass.
        """
        for client in [client for client in self._clients if client not in self._slow]:
            if self._outbox and len(self._stream) < MAX_LOOK_BYTES:
                self._take_in()
            yield client

    def _take_in(self) -> None:
        """Move all entries of the outbox to the end of the stream."""
        with self._lock:
            entries, self._outbox = self._outbox, []
            self._outbox_bytes = 0
            self._has_space.notify()
        self._pass_again = True  # also for those that have had their turn in this one
        for entry in entries:
            client, start = entry.client, self._end
            self._stream += entry.to_others
            self._end += len(entry.to_others)
            self._taken += len(entry.to_others)
            if self._slow.get(client, 0) > MAX_UNSENT_BYTES / 2:
                self._taken += entry.size()
            self._queue_face(client, start, entry)
            self._clients[client] = None
            if entry.leaves:
                seconds = LEAVE_SECONDS if client.name else LINGER_SECONDS
                self._leaving[client] = time.monotonic() + seconds

    def _queue_face(self, client: _Client, start: int, entry: _Entry) -> None:
        """Have a client see its own face of an entry; the others see it from start on."""
        last = client.faces[-1] if client.faces else None
        place = end = last[2] if last else client.place
        if entry.ends or entry.leaves:
            end = OVER
        elif entry.joins or place < self._end:
            end = self._end
        text = entry.to_self
        if last and place >= start and len(last[1]) < RECEIVE_BYTES:
            # No stream in between: one send will do.  Long ones are not copied again.
            start, text, _ = client.faces.pop()
            text += entry.to_self
            client.own_bytes -= ENTRY_BYTES
        client.faces.append((start, text, end))
        client.own_bytes += ENTRY_BYTES + len(entry.to_self)

    def _give_turns(self, clients: Iterable[_Client]) -> None:
        """Send each client what it has not had, as much as its socket takes at once.

        All that is ever sent is sent here and in _send_faces().
        """
        part, block = (0, 0), bytearray()  # members at one place share one block
        for client in clients:
            if client.place >= self._end and not client.faces:
                continue
            try:
                if client.faces:
                    self._send_faces(client)
                if (client.place, self._end) != part:
                    part = client.place, self._end
                    block = self._slice(*part)
                if block:
                    client.place += client.socket.send(block, MSG_DONTWAIT)
            except BlockingIOError:
                pass  # it is slow
            except OSError as error:
                client.lost = protocol.reason_of(error)
                client.place = OVER
            if client.place != self._end or client.faces or client in self._slow:
                self._note_progress(client)

    def _slice(self, place: int, end: int) -> bytearray:
        """Return a part of the stream, as much of it as one send offers."""
        first = self._end - len(self._stream)
        return self._stream[place - first : min(end, place + MAX_OUTBOX_BYTES) - first]

    def _send_faces(self, client: _Client) -> None:
        """Send a client its own faces, and the stream up to the last of them.

        Raises BlockingIOError if some are left for its next turn.
        """
        for _ in range(STEPS_PER_TURN):
            if not client.faces:
                return
            start, text, end = client.faces[0]
            if client.place < start:
                part = self._slice(client.place, start)
                client.place += client.socket.send(part, MSG_DONTWAIT)
            elif text:
                sent = client.socket.send(text, MSG_DONTWAIT)
                client.faces[0] = start, text[sent:], end
                client.own_bytes -= sent
            else:
                client.faces.popleft()
                client.place = end
                client.own_bytes -= ENTRY_BYTES
        raise BlockingIOError

    def _note_progress(self, client: _Client) -> None:
        """Watch the socket of a client that is behind; end our side if it has had all.

        What its peer has sent can still be read then.
        """
        if client.place == OVER:
            self._unwatch(client)
            client.faces.clear()
            client.own_bytes = 0
            client.shut(socket.SHUT_WR)
            if client in self._leaving:
                self._selector.register(client.socket, selectors.EVENT_READ, client)
        elif client.place >= self._end and not client.faces:
            self._unwatch(client)
        elif client not in self._slow:
            self._slow[client] = 0
            self._selector.register(client.socket, selectors.EVENT_WRITE, client)

    def _mind_slow_readers(self) -> None:
        """Forget what all members have; drop a client that is too far behind.

        While one is beyond half of its limit, the next pass comes later: in proportion to
        what this one took in for such a client, and to how far it is beyond that.
        """
        place, most = self._end, 0
        for client in tuple(self._slow):
            # Before its welcome has been sent, its place is not in the stream yet.
            first = min(client.place, client.faces[0][0] if client.faces else self._end)
            unsent = self._slow[client] = self._end - first + client.own_bytes
            if unsent > MAX_UNSENT_BYTES:
                self._drop(client, f"{unsent} bytes waited for it")
            else:
                place, most = min(place, first), max(most, unsent)
        while sum([client.own_bytes for client in self._slow]) > MAX_OWN_BYTES:
            greediest = max(self._slow, key=lambda client: client.own_bytes)
            self._drop(greediest, f"{greediest.own_bytes} bytes waited for it alone")
        if not self._pass_again:  # all but the slow ones have been sent all
            del self._stream[: place - (self._end - len(self._stream))]
        pressure = max(0.0, 2 * most / MAX_UNSENT_BYTES - 1)
        fullness = min(1.0, self._taken / MAX_OUTBOX_BYTES)
        pause = FULL_PASS_SECONDS * pressure * fullness
        self._pass_at = max(self._pass_at, time.monotonic() + pause)
        self._taken = 0

    def _drop(self, client: _Client, why: str) -> None:
        client.dropped = f"too slow, {why}"
        client.shut(socket.SHUT_RDWR)  # wakes its handler
        client.place = OVER
        self._note_progress(client)

    def _close_ended(self, ready: set[_Client]) -> None:
        """Close the connections that have ended on both sides, or whose time is up.

        A close with input unread would reset the connection, and could cost the peer
        the last lines to it: but one that is too slow has to hear that nobody reads.
        """
        now = time.monotonic()
        for client, until in tuple(self._leaving.items()):
            is_over = client in ready and client.place == OVER
            is_slow = client.name and client.dropped
            if until <= now or (is_over and (is_slow or client.has_ended())):
                self._unwatch(client)
                del self._clients[client], self._leaving[client]
                client.socket.close()

    def _unwatch(self, client: _Client) -> None:
        self._slow.pop(client, None)
        with suppress(KeyError):
            self._selector.unregister(client.socket)


class _Selector(selectors.DefaultSelector):
    """Waits for sockets, and can be woken by any thread, or by a signal."""

    def __init__(self) -> None:
        super().__init__()
        # A byte sent to the first makes the second readable.
        self.waker, self._woken = socket.socketpair()
        self.waker.setblocking(False)
        self.register(self._woken, selectors.EVENT_READ)

    def wake(self) -> None:
        """Make a wait() return, the one that runs or else the next one."""
        with suppress(OSError):  # full of wake-ups, or closed
            self.waker.send(b"\0")

    def wait(self, seconds: float) -> list[Any]:
        """Return the data of the sockets that are ready; less if it was woken."""
        try:
            ready = self.select(None if seconds == FOREVER else seconds)
        except ValueError:  # Windows takes 512 sockets: any of these may be ready
            time.sleep(0.01)
            ready = [(key, 0) for key in self.get_map().values() if key.data]
        found = [key.data for key, _ in ready if key.data]
        if len(found) < len(ready):
            self._woken.recv(RECEIVE_BYTES)
        return found

    def close(self) -> None:
        super().close()
        self.waker.close()
        self._woken.close()


def _listen(host: str, port: int) -> socket.socket:
    """Return a listener on an address of the host."""
    # As bytes: a text that can be no host name would raise UnicodeError, not OSError.
    addresses = socket.getaddrinfo(os.fsencode(host), port, type=socket.SOCK_STREAM)
    # The first IPv4 one if the host has both: the lower number everywhere.
    family, *_, address = min(addresses, key=lambda found: found[0])
    # It sets SO_REUSEADDR where that lets a restarted server have its port at once.
    listener = socket.create_server(address, family=family, backlog=LISTEN_BACKLOG)
    listener.setblocking(False)
    return listener


def _set_options(client_socket: socket.socket) -> None:
    """Make a connection quick, and find out when its peer has vanished.

    Without data under way by keep-alive; with it by the user timeout, since the kernel
    does not count keep-alive then (tcp(7)).  A system sets those that it has.
    """
    # Elsewhere a connection inherits from the listener that it does not block.  On Linux
    # the call would only hand the interpreter lock over: joins took 25 % longer.
    if sys.platform != "linux":
        client_socket.setblocking(MSG_DONTWAIT != 0)
    client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_NODELAY", 1),  # a message does not wait until the last one is answered
        ("TCP_KEEPIDLE", 60),  # seconds
        ("TCP_KEEPALIVE", 60),  # the same on macOS
        ("TCP_KEEPINTVL", 15),  # seconds
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", 120_000),  # milliseconds
    ):
        if hasattr(socket, option):
            client_socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _format_address(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Recorder:
    """Writes to one output from a thread of its own, so that a slow one stops nothing.

    Items that are too many are left out and counted.  (logging's QueueListener would
    serve the terminal, but its stop() waits for an output that is stuck.)
    """

    def __init__(self, tell: Callable[[str], None], gap: str) -> None:
        """tell: shows a line on the terminal; gap: the one for {} items left out."""
        self._tell, self._gap = tell, gap
        # Guards what changes below.  Not held while writing.
        self._changed = threading.Condition()
        self._unwritten: list[Any] = []  # those being written included
        self._left_out = 0
        self._stopped = False
        # A daemon, since nothing can wake a write that is stuck; it holds no lock then
        # that the interpreter's exit needs.
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def _write(self, items: list[Any]) -> int:
        """Write the first ones of these, however long that takes; return how many."""
        raise NotImplementedError

    def put(self, items: Sequence[Any]) -> bool:
        """Queue as many items as there is space for; return whether all.  Never waits."""
        with self._changed:
            if not self._unwritten:
                self._changed.notify_all()
            space = MAX_UNWRITTEN - len(self._unwritten)
            self._unwritten += items[:space]
            self._left_out += len(items[space:])
            return len(items) <= space

    def close(self) -> None:
        """Write all that was put, for a while at most; leave out what is left then."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(LAST_SECONDS)
        with self._changed:
            self._left_out += len(self._unwritten)
            self._forget(len(self._unwritten))

    def _forget(self, count: int) -> None:
        """Forget the first items, and tell what was left out for want of space."""
        with self._changed:
            del self._unwritten[:count]
            self._changed.notify_all()
            if count and self._left_out:
                line, self._left_out = self._gap.format(self._left_out), 0
                self._tell(line)  # for the terminal, this puts an item

    def _run(self) -> None:
        """Write what is put, in batches, until stopped; a batch that fails is repeated.

        What is being written stays queued, and so counts as waiting.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unwritten or self._stopped)
                if len(self._unwritten) < MAX_ROWS:
                    self._changed.wait(GATHER_SECONDS)
                if not self._unwritten:  # close() may have left them out meanwhile
                    return
                items = self._unwritten[:MAX_ROWS]
            self._forget(self._write(items))


class Terminal(Recorder):
    """The recorder of what the server's terminal shows."""

    def __init__(self, *, times: bool = False) -> None:
        """times: put date and time before each line."""
        self._time_format = "%Y-%m-%d %H:%M:%S " if times else ""
        # A stream that was closed before the start is None.
        self._stream = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
        super().__init__(self.tell, "({} lines left out)")

    def tell(self, lines: str) -> None:
        """Show one line or several, without the last newline.  Never waits."""
        now = time.strftime(self._time_format)
        self.put([now + line for line in lines.split("\n")])

    def _write(self, items: list[str]) -> int:
        text = "".join([f"{line}\n" for line in items])
        data = memoryview(text.encode(self._stream.encoding, "backslashreplace"))
        with suppress(OSError):  # nobody reads it any more; the chat goes on
            while data:
                try:
                    data = data[os.write(self._stream.fileno(), data) :]
                except BlockingIOError:  # some terminals are shared, and do not block
                    select.select([], [self._stream], [])
        return len(items)


_SCHEMA = """
    CREATE TABLE IF NOT EXISTS messages(
        id INTEGER PRIMARY KEY, at REAL, name TEXT, text TEXT);
    CREATE TABLE IF NOT EXISTS accounts(
        key TEXT PRIMARY KEY, name TEXT, salt_and_hash BLOB, since REAL);
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
"""
# Of messages, by which we know a file as ours; and what we read of it at the start.
_COLUMNS = [("id", "INTEGER"), ("at", "REAL"), ("name", "TEXT"), ("text", "TEXT")]
_READ_COLUMNS = "SELECT name, type FROM pragma_table_info('messages')"
# (Another program may have written times there that no clock shows.)
_READ_MESSAGES = """SELECT at, name, text FROM messages WHERE at BETWEEN 0 AND 1e11
    ORDER BY id DESC LIMIT ?"""
_READ_ACCOUNTS = "SELECT key, salt_and_hash FROM accounts"


class Database(Recorder):
    """The recorder of an SQLite file with what is said to the room, and with accounts.

    An item is the name of a table and a row.  All that is read is in memory, and only
    the recorder writes: a flood waits for it, and a change of an account does.
    """

    def __init__(self, path: str, tell: Callable[[str], None]) -> None:
        """Open or create it; OSError or sqlite3.Error leave what is there untouched."""
        self._path = Path(os.path.realpath(path))
        file = self._file = _connect(self._path, BUSY_SECONDS)
        if self._path.stat().st_size:
            # Look without a touch, also if a program has died in the midst of a change:
            # a log (-wal) can be read and left alone, a journal only be passed over.
            how = "mode=ro" if Path(f"{self._path}-wal").exists() else "immutable=1"
            uri = f"{self._path.as_uri()}?{how}"
            with closing(sqlite3.connect(uri, uri=True)) as look:
                if look.execute(_READ_COLUMNS).fetchall() != _COLUMNS:
                    raise sqlite3.Error("it is a database of another program")
        self._lock_file = _connect(Path(f"{self._path}-lock"), 0)
        self._lock_file.execute("BEGIN EXCLUSIVE")  # until the end of this process
        file.executescript(_SCHEMA)
        self._status = self._path.stat()
        # The last messages as notices show them.  The server's lock guards them, as it
        # does their order.
        self.last: deque[str] = deque(maxlen=MAX_HISTORY)
        for at, name, text in file.execute(_READ_MESSAGES, [MAX_HISTORY]):
            self.last.appendleft(protocol.clean(f"{_author(at, name)}{text}"))
        # By name_key(): salt and hash, or None.  A member changes that of its own name.
        self._accounts: dict[str, bytes | None] = dict(file.execute(_READ_ACCOUNTS))
        # In threads of their own, in turn: each thread keeps the 16 MiB that it has used.
        # They start here: later the system may have no more threads.
        self._hashing = ThreadPoolExecutor(MAX_HASHES_AT_ONCE, "hashing")
        self._hashing.map(time.sleep, [GATHER_SECONDS] * MAX_HASHES_AT_ONCE)
        self._failing = False  # nobody waits for the file then
        self._due = 0  # messages on their way to remember()
        super().__init__(tell, "({} messages left out of the database)")

    def _run(self) -> None:
        """Write until closed; then the file is free for another server."""
        with self._hashing, closing(self._lock_file), closing(self._file):
            super()._run()

    def _wait(self, fact: Callable[[], bool]) -> bool:
        """Wait for a fact; False if the file cannot be written, or after close()."""
        with self._changed:
            while not fact() and not (self._failing or self._stopped):
                if not self._changed.wait(HANGS_SECONDS):
                    self._fail("it takes too long")
            return fact()

    def wait_for_space(self, messages: int) -> None:
        """Let a flood wait while the file is behind but comes on; not if it hangs.

        So many messages are to follow: until then their space is taken.  Many at once
        leave half of the space to all that just say something.
        """
        most = MAX_UNWRITTEN if messages == 1 else MAX_UNWRITTEN // 2
        with self._changed:
            self._wait(lambda: len(self._unwritten) + self._due < most)
            self._due += messages

    def remember(self, name: str, texts: Sequence[str]) -> None:
        """Keep messages of a member.  Never waits; caller holds the server's lock."""
        at = time.time()
        author = _author(at, name)
        self.last += [author + text for text in texts]
        with self._changed:
            self._due -= len(texts)
            self.put([("messages", (None, at, name, text)) for text in texts])

    def _write(self, items: list[Any]) -> int:
        """Write the rows up to the next one for another table.

        In one statement, since the interpreter lock is taken back after each.
        """
        table, some = next(groupby(items, lambda item: item[0]))
        rows = [row for _, row in some]
        marks = ",".join(["(?,?,?,?)"] * len(rows))
        try:
            status = self._path.stat()
            if not (os.path.samestat(status, self._status) and status.st_size):
                raise OSError("the file has been replaced or emptied")
            statement = f"REPLACE INTO {table} VALUES {marks}"
            self._file.execute(statement, list(chain.from_iterable(rows)))
        except (sqlite3.Error, OSError) as error:
            self._fail(error)
            time.sleep(RETRY_SECONDS)
            return 0
        if self._failing:
            self._tell("The database is written again.")
        self._failing = False
        return len(rows)

    def _fail(self, reason: object) -> None:
        """Tell once that the file cannot be written, until it can be again."""
        if not self._failing:
            self._tell(f"Cannot write to the database for now: {reason}")
        self._failing = True

    def account(self, name: str) -> bytes:
        """Return the account that keeps a name, salt and hash; b"" if there is none."""
        return self._accounts.get(protocol.name_key(name)) or b""

    def keep(self, name: str, account: bytes | None) -> None:
        """Keep the name of a member for it from now on; None: no longer.

        Returns once that is in the file; raises ProtocolError if it is not for now.
        """
        key = protocol.name_key(name)
        self._accounts[key] = account
        item = "accounts", (key, name, account, time.time())
        if not (self.put([item]) and self._wait(lambda: item not in self._unwritten)):
            raise ProtocolError("Done, but the database cannot be written for now.")

    def hash(self, password: bytes, client: _Client, account: bytes = b"") -> bytes:
        """Return the account that a password makes, with a new salt or that of this one.

        client: who waits for it.  Raises ProtocolError if it is dropped, or at a shutdown.
        One that is gone is waited for: what it sent is still obeyed.
        """
        salt = account[:SALT_BYTES] or secrets.token_bytes(SALT_BYTES)
        with suppress(RuntimeError):  # closed already
            hashed = self._hashing.submit(hashlib.scrypt, password, salt=salt, **SCRYPT)
            while not (client.dropped or self._stopped):
                with suppress(TimeoutError):
                    return salt + hashed.result(HASH_PAUSE_SECONDS)
            hashed.cancel()
        raise ProtocolError("There was no time for the password.")


def _connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    """Open a file that only its owner may read, and create it if need be."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    return sqlite3.connect(
        path, timeout=busy_seconds, isolation_level=None, check_same_thread=False,
        cached_statements=4,  # one of MAX_ROWS takes some 400 kB
    )  # fmt: skip


def _author(at: float, name: str) -> str:
    """Return what stands before a message of the past: its time, and who said it."""
    return f"[{time.strftime('%Y-%m-%d %H:%M', time.localtime(at))}] {name}: "


def _raise_open_file_limit(clients: int) -> None:
    """Allow so many connections, as far as the system allows."""
    # Windows has no such limit, and macOS one of its own below "unlimited".
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = clients + SPARE_DESCRIPTORS
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(needed, hard)), hard))


def _stop_on_signals_and_bugs(server: ChatServer) -> list[object]:
    """Have Ctrl-C, SIGTERM and exceptions that no thread expected stop the server.

    A second signal ends it at once.  Returns the list of these exceptions.
    """
    bugs: list[object] = []

    def on_signal(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        server.stop()

    def on_bug(bug: threading.ExceptHookArgs) -> None:
        bugs.append(bug.exc_type)
        threading.__excepthook__(bug)  # tells of it, with the traceback
        server.stop()

    # The kernel may hand a signal to any thread; this wakes the main one, which alone
    # runs the handler.
    signal.set_wakeup_fd(server.waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    threading.excepthook = on_bug
    return bugs


def _explain(error: Exception, options: argparse.Namespace) -> str:
    """Return what cannot be done at the start, why, and what to do about that."""
    what = f"listen on {protocol.clean(options.host)!r}, port {options.port}"
    advice = {
        errno.EADDRINUSE: "another program has that port: choose another --port",
        errno.EACCES: "choose a --port above 1023",
        errno.EADDRNOTAVAIL: "--host must be an address of this machine",
        errno.EMFILE: "allow more open files: ulimit -n 1024",
    }.get(getattr(error, "errno", 0), "try another --host")
    reason = protocol.clean(protocol.reason_of(error))
    if isinstance(error, sqlite3.Error) or getattr(error, "filename", None):
        what, advice = f"use {options.database!r}", "choose another --database"
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
        reason = "another server has it open, or a program has locked it"
    return f"cannot {what}: {reason.partition(' (')[0]} ({advice})"


def main() -> int:
    """Run the server; return its exit status."""
    flags = protocol.CommandLine("A chat room over plain TCP. Ctrl-C ends it.")
    host = "name or address to listen on; 0.0.0.0 lets the whole network in"
    flags.add_address(host, 0, "TCP port to listen on; 0 takes a free one")
    flags.add_number("--max-clients", 1, 10**6, MAX_CLIENTS, "connections at most")
    rate = f"lines a second per client, {BURST_SECONDS}-fold in a burst; 0: no limit"
    flags.add_number("--rate", 0, 10**6, LINES_PER_SECOND, rate)
    flags.add_argument("--quiet", action="store_true", help="do not print what is said")
    flags.add_argument("--times", action="store_true", help="show when each line came")
    database = "SQLite file for what is said and for passwords; else nothing is kept"
    flags.add_argument("--database", metavar="FILE", help=database)
    options = flags.parse_args()
    _raise_open_file_limit(options.max_clients)
    terminal = Terminal(times=options.times)
    try:
        server = ChatServer(
            options.host, options.port, max_clients=options.max_clients,
            lines_per_second=options.rate, tell_messages=not options.quiet,
            tell=terminal.tell, database=options.database,
        )  # fmt: skip
    except (OSError, sqlite3.Error) as error:
        print(f"server.py: {_explain(error, options)}", file=sys.stderr)
        return 1
    bugs = _stop_on_signals_and_bugs(server)
    terminal.tell(f"Server is running...\nListening on {server.address}")
    with closing(terminal):
        server.serve()
        signal.set_wakeup_fd(-1)  # it has been closed
    return 1 if bugs else 0


if __name__ == "__main__":
    sys.exit(main())
