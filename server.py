"""The chat server: a thread per client reads, one thread at a time sends to all.

Threads:
  main          accept_connections: accepts, starts a handler each; then shuts down
  handlers      handle_client, one per client: read, check, append to the log
  broadcaster   sends to the members, with a handler's help where that is quicker
  log writer    what the terminal shows

The way of a message: handle_client reads it and calls broadcast_message, which appends
one entry to a log, under the lock.  Whoever sends at the moment takes all entries that
wait, joins them into one block and does one non-blocking send per member: a round.
While nobody reads too slowly, what is said meanwhile joins the broadcaster's round.
What a socket does not take waits in a chain of blocks that all slow readers share.
"""

from __future__ import annotations

import argparse
import enum
import logging
import math
import os
import random
import select
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice
from typing import NamedTuple

import protocol
from protocol import ProtocolError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MAX_CLIENTS = 1000
LINES_PER_SECOND = 100  # faster than anybody types, slow enough for others to read
BURST_SECONDS = 10  # a burst holds the lines of so many seconds
ALLOWANCE_PAUSE_SECONDS = 0.05  # who may not send more now is read again after that
MAX_NAMES_TRIED = 5
MAX_NAMES_LISTED = 20
JOIN_SECONDS = 120.0

# Small, so that a message is passed on before many of its kind have piled up: the 99th
# percentile of the latency under many small senders is half of that with 64 KiB.
RECEIVE_BYTES = 4096
# From one client, in one entry of the log: each line gets a name, of up to 128 bytes,
# and so a recv() of short ones could fill all of the log.
MAX_LINES_AT_ONCE = 128
# So often at most a round takes in what is said meanwhile, while each member has one
# turn.  Each time costs some microseconds.
GROWTHS_PER_ROUND = 8
# A round in which everybody gets as much does not grow: it is to pass on little quickly.
MAX_GROWING_BYTES = 16 * 1024
# After each RECEIVE_BYTES of a line that is too long: some 25 MB/s of it are read.
PIECE_PAUSE_SECONDS = 0.0001
# What may wait for one member.  The blocks are shared: all slow readers together hold
# this much once, not each.
MAX_BACKLOG_BYTES = 4 * 1024 * 1024
# Rounds that wait are joined up to this size: each takes some memory besides.
LINK_BYTES = 16 * 1024
CUT_BYTES = 200  # of memory, for each place where a slow reader sees something else
# What may wait in the log for the next round.  Handlers wait for room, so that a sender
# that is too fast is slowed by its own TCP window.
MAX_LOG_BYTES = 256 * 1024
# While a slow reader is near its limit, full rounds come this far apart: 3.3 MB/s.  A
# member that reads 4 MB/s keeps up, and everybody else waits less than 100 ms.
FULL_ROUND_SECONDS = 0.08
# Pauses shorter than this are added up: no timer is that fine.
ROUND_SLACK_SECONDS = 0.002
# After a round that tells of joins: so many times as long as that took, so that in a
# storm of them one round tells of many, and the time goes into joining, not telling.
JOIN_PAUSE = 4
MAX_JOIN_PAUSE_SECONDS = 0.02
# Nothing sent for so long: the room is quiet, and a handler may send itself.
QUIET_SECONDS = 0.001
# What one send takes from a backlog: enough for speed, little enough to be fair.
FLUSH_BYTES = 64 * 1024

LISTEN_BACKLOG = 4096  # connections; the system may allow fewer
ACCEPT_PAUSE_SECONDS = 0.1  # when out of file descriptors, memory or threads
SPARE_DESCRIPTORS = 64  # for all but the clients, and those who are turned away
LINGER_SECONDS = 1.0  # for the last lines to one who leaves
SHUTDOWN_SECONDS = 1.3  # 2 s are promised
HANG_UP_SECONDS = 0.5  # of these, for the clients to close their side first
MAX_UNWRITTEN_LINES = 10_000  # that wait for the terminal
LAST_LINES_SECONDS = 0.3  # for them, after the shutdown
# Lines come in bursts, and to wake a thread for each would slow those who write them.
GATHER_SECONDS = 0.005

FOREVER = float("inf")
MSG_DONTWAIT: int = getattr(socket, "MSG_DONTWAIT", 0)  # 0: Windows has none

logger = logging.getLogger("chat.server")


class _Client:
    """One connection."""

    __slots__ = (
        "broken",
        "cut_bytes",
        "cut_off",
        "farewell",
        "join_by",
        "link",
        "name",
        "offset",
        "peer",
        "released",
        "send",
        "socket",
        "thread",
        "waiting_bytes",
    )  # fmt: skip

    def __init__(self, client_socket: socket.socket, peer: str) -> None:
        self.socket = client_socket
        self.send = _sender(client_socket)  # for whoever sends to it
        self.peer = peer  # "address:port", for the log
        self.thread: threading.Thread | None = None  # its handler
        self.name = ""  # until it has joined
        self.join_by = time.monotonic() + JOIN_SECONDS
        self.cut_off = ""  # why we have ended it: its handler stops reading
        self.farewell = b""  # the last line to one who has not joined
        self.broken = ""  # why sending to it failed: what it sent is still read
        self.released: threading.Event | None = None  # set after the last send to it
        # The backlog, the sender's alone: so many bytes, the first of them at `offset`
        # of what this client sees of `link` (from the end of the round on in which it
        # began); and what its cuts in the chain take.
        self.waiting_bytes = 0
        self.link: _Round | None = None
        self.offset = 0
        self.cut_bytes = 0

    def __str__(self) -> str:
        return f"{self.name} ({self.peer})" if self.name else self.peer


class _Move(enum.Enum):
    """What an entry of the log changes about who is in."""

    NONE = enum.auto()
    JOIN = enum.auto()
    LEAVE = enum.auto()


class _Entry(NamedTuple):
    """One entry of the log: its client sees `to_self`, everybody else `to_others`."""

    client: _Client | None
    to_others: bytes
    to_self: bytes = b""
    move: _Move = _Move.NONE


def _who_moves(entries: list[_Entry], move: _Move) -> list[_Client]:
    return [entry.client for entry in entries if entry.move is move and entry.client]


class _Cut(NamedTuple):
    """Where a client sees something else than the others do."""

    start: int  # in bytes of the block
    end: int
    instead: bytes

    def bytes_kept(self) -> int:
        """Return how much memory it takes."""
        return CUT_BYTES + len(self.instead)


class _Round:
    """What some members have still to be sent, and a link in the chain of backlogs.

    A slow reader holds on to the link it is in, and through `next` to all behind it.
    Links are freed by reference count, when the slowest reader has got past them.
    """

    __slots__ = ("block", "cut_bytes", "cuts", "end", "next")

    def __init__(self, entries: list[_Entry]) -> None:
        """Join the entries; note what those who wrote some of them see instead."""
        self.block = b"".join([entry.to_others for entry in entries])
        self.end = len(self.block)  # in bytes from the beginning of the chain
        self.cuts: dict[_Client, list[_Cut]] = {}
        self.cut_bytes = 0  # what those have taken that were kept
        self.next: _Round | None = None
        end = 0
        for client, to_others, to_self, move in entries:
            start, end = end, end + len(to_others)
            if client:
                first = 0 if move is _Move.JOIN else start
                last = len(self.block) if move is _Move.LEAVE else end
                self.cuts.setdefault(client, []).append(_Cut(first, last, to_self))

    def data(self, client: _Client) -> bytes:
        """Return the bytes that the client sees."""
        if client not in self.cuts:
            return self.block
        shared, seen = memoryview(self.block), 0
        parts: list[bytes | memoryview] = []
        for start, end, instead in self.cuts[client]:
            parts += shared[seen:start], instead
            seen = end
        return b"".join([*parts, shared[seen:]])

    def keep_cuts_of(self, clients: set[_Client]) -> None:
        """Forget what only others than these see; note what theirs take."""
        self.cuts = {c: cuts for c, cuts in self.cuts.items() if c in clients}
        for client, cuts in self.cuts.items():
            kept = sum(map(_Cut.bytes_kept, cuts))
            client.cut_bytes += kept
            self.cut_bytes += kept

    def pass_by(self, client: _Client) -> None:
        """Forget what only this client sees."""
        client.cut_bytes -= sum(map(_Cut.bytes_kept, self.cuts.pop(client, ())))

    def append(self, later: _Round) -> None:
        """Make the next round a part of this link: many small ones take much memory."""
        shift = len(self.block)
        for client, cuts in later.cuts.items():
            self.cuts.setdefault(client, []).extend(
                _Cut(start + shift, end + shift, instead)
                for start, end, instead in cuts
            )
        self.cut_bytes += later.cut_bytes
        self.block += later.block
        self.end += len(later.block)


class _Allowance:
    """A token bucket: a client's lines, so many a second and some at once."""

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second  # 0: no limit
        self._lines = float(per_second * BURST_SECONDS)
        self._counted = time.monotonic()

    def take(self, wanted: int) -> int:
        """Return how many lines, up to `wanted`, may be read now, and count them."""
        if not self._per_second:
            return wanted
        now = time.monotonic()
        earned = (now - self._counted) * self._per_second
        self._lines = min(self._per_second * BURST_SECONDS, self._lines + earned)
        self._counted = now
        taken = min(wanted, int(self._lines))
        self._lines -= taken
        return taken


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
        try:
            self.waker.send(b"\0")
        except OSError:
            pass  # full of wake-ups, or closed

    def wait(self, seconds: float) -> tuple[bool, list[selectors.SelectorKey]]:
        """Return whether it was woken, and which sockets are ready."""
        ready = self.select(None if seconds == FOREVER else max(0.0, seconds))
        keys = [key for key, _ in ready if key.fileobj is not self._woken]
        woken = len(keys) < len(ready)
        if woken:
            self._woken.recv(RECEIVE_BYTES)
        return woken, keys

    def close(self) -> None:
        super().close()
        self.waker.close()
        self._woken.close()


class ChatServer:
    """The room: who is in, what is still to be sent, and the threads that do it.

    Creating it binds and listens; serve() does the rest.  port: 0 takes a free one.
    lines_per_second: 0 is no limit.  Raises OSError if the host is unknown or the port
    is taken.
    """

    def __init__(
        self,
        host: str = protocol.DEFAULT_HOST,
        port: int = protocol.DEFAULT_PORT,
        *,
        max_clients: int = MAX_CLIENTS,
        lines_per_second: int = LINES_PER_SECOND,
        log_messages: bool = True,
    ) -> None:
        self._max_clients = max_clients
        self._lines_per_second = lines_per_second
        self._log_messages = log_messages
        self._listener = _listen(host, port)
        self.address = _format_address(self._listener.getsockname())
        self._arrivals = _Selector()  # for accept_connections(); stop() wakes it
        self._arrivals.register(self._listener, selectors.EVENT_READ)
        self.stop_sender = self._arrivals.waker

        # Guards the names below, which change together.  Held for table operations
        # only: never while sending, receiving, joining a thread or logging.
        self._lock = threading.Lock()
        self.clients: dict[str, socket.socket] = {}  # username → socket
        self._keys: set[str] = set()  # of the names in clients, as they are compared
        self._waiting: dict[_Client, None] = {}  # not joined yet, in order of arrival
        self._connections: dict[socket.socket, _Client] = {}  # all that are not closed
        self._log: list[_Entry] = []  # what no sender has taken yet
        self._log_bytes = 0
        self._closing = threading.Event()  # set under the lock: the log is complete
        self._room_in_log = threading.Condition(self._lock)
        self._all_closed = threading.Condition(self._lock)

        # Whoever holds this is the sender, and owns the names below: the broadcaster,
        # or a handler for one round.  Taken before _lock, never after it.
        self._sending = threading.Lock()
        self._members: set[_Client] = set()
        # Those with a backlog.  _deliver only asks if there are any, and takes it for a
        # hint: who takes _sending looks again.
        self._slow_readers: set[_Client] = set()
        self._last_link: _Round | None = None  # the end of the chain of backlogs
        self._next_round = 0.0  # not before then; _deliver takes it for a hint too

        self._writable = _Selector()  # slow readers; an append wakes it
        self._asleep = False  # the log was empty when its sender last looked
        self._give_up_at = FOREVER  # set before _closing is
        self._all_sent = threading.Event()  # the last send to anybody is done

    def serve(self) -> None:
        """Run the chat until stop() is called or a byte is sent to stop_sender."""
        broadcaster = threading.Thread(target=self._broadcast, name="broadcaster")
        broadcaster.start()
        try:
            self.accept_connections()
        finally:
            self._shut_down(broadcaster)

    def stop(self) -> None:
        """Make serve() shut down in order and return.  For any thread, at any time."""
        self._arrivals.wake()

    # --- connections come -----------------------------------------------------------

    def accept_connections(self) -> None:
        """Accept clients until told to stop; each one gets a thread of its own.

        Out of file descriptors or memory, it leaves the connections that come in the
        listener's queue and tries again a little later.  Out of threads, it turns away
        one at a time.
        """
        exhausted = False
        while True:
            stopped, arrivals = self._arrivals.wait(self._send_away_late_ones())
            if stopped:
                return
            try:
                if arrivals:
                    self._accept_one()
                    exhausted = False
            except (BlockingIOError, ConnectionAbortedError):
                pass  # it was gone again
            except (OSError, RuntimeError) as error:
                if not exhausted:
                    logger.warning("Cannot take new clients for now: %s", error)
                exhausted = True
                # The listener stays readable: without a pause this would spin.
                self._arrivals.unregister(self._listener)
                self._arrivals.select(ACCEPT_PAUSE_SECONDS)
                self._arrivals.register(self._listener, selectors.EVENT_READ)

    def _send_away_late_ones(self) -> float:
        """End those whose time to join is up; return the seconds until the next is."""
        with self._lock:
            while longest_waiting := next(iter(self._waiting), None):
                seconds = longest_waiting.join_by - time.monotonic()
                if seconds > 0:
                    return seconds
                self._send_away(
                    longest_waiting,
                    "it has not joined in time",
                    f"You have not joined within {JOIN_SECONDS:.0f} seconds.",
                )
        return FOREVER

    def _send_away(self, client: _Client, why: str, reason: str) -> None:
        """End one who has not joined: `why` is for the log, `reason` for the client.

        Caller holds _lock.
        """
        del self._waiting[client]
        client.cut_off = why
        client.farewell = protocol.refusal(reason)
        _shut(client.socket, socket.SHUT_RD)  # its handler says farewell

    def _accept_one(self) -> None:
        client_socket, address = self._listener.accept()
        client = _Client(client_socket, _format_address(address))
        handler = self.handle_client if self._make_room(client) else self._turn_away
        client.thread = threading.Thread(target=handler, args=(client_socket,))
        try:
            client.thread.start()
        except RuntimeError:  # the system has no more threads
            with self._lock:
                self._waiting.pop(client, None)
                del self._connections[client_socket]
            reason = f"{protocol.FULL} for now, please try again later."
            _send_at_once(client, protocol.refusal(reason))
            client_socket.close()
            raise

    def _make_room(self, client: _Client) -> bool:
        """Enter a new connection, in place of one that has not joined if need be.

        Returns False if the chat is full of members.
        """
        with self._lock:
            self._connections[client.socket] = client
            if len(self.clients) + len(self._waiting) >= self._max_clients:
                longest_waiting = next(iter(self._waiting), None)
                if longest_waiting is None:
                    return False
                self._send_away(
                    longest_waiting,
                    "it had not joined, and others need the room",
                    "Others need the room, and you have not joined.",
                )
            self._waiting[client] = None
        return True

    def _turn_away(self, client_socket: socket.socket) -> None:
        """Tell a client that the chat is full.  Runs in its handler's place."""
        with self._lock:
            client = self._connections[client_socket]
        logger.info("Refused %s: the chat is full", client)
        reason = f"{protocol.FULL}, please try again later."
        _send_at_once(client, protocol.refusal(reason))
        self._close(client)

    # --- one client -----------------------------------------------------------------

    def handle_client(self, client_socket: socket.socket) -> None:
        """Serve one client from its name to its end.  Runs in a thread of its own.

        Reads and checks; what is to be sent to members goes into the log.
        """
        with self._lock:
            client = self._connections[client_socket]
        logger.info("New connection from %s", client)
        try:
            _set_options(client_socket)
            lines = self._receive_lines(client)
            if self._ask_name(client, lines):
                self._pass_on(client, lines)
        except OSError as error:
            client.broken = error.strerror or str(error)
        finally:
            if client.cut_off:
                logger.info("Disconnected %s: %s", client, client.cut_off)
            elif client.broken:
                logger.info("Lost connection to %s: %s", client, client.broken)
            self.remove_client(client_socket)
            if client.farewell:
                _send_at_once(client, client.farewell)
            self._close(client)

    def _receive_lines(self, client: _Client) -> Iterator[list[bytes]]:
        """Yield the lines of a client as they come, no more of them than it may send.

        One at a time until it has joined, since what the next one means depends on it.
        Ends with EOF, at a shutdown, and when we have cut it off.
        """
        splitter = protocol.LineSplitter(protocol.MAX_LINE_BYTES)
        allowance = _Allowance(self._lines_per_second)
        receive = client.socket.recv
        while (chunk := receive(RECEIVE_BYTES)) and not client.cut_off:
            lines = splitter.feed(chunk)
            if not lines and len(chunk) == RECEIVE_BYTES:
                # A line without end is no reason to keep others from running.
                self._closing.wait(PIECE_PAUSE_SECONDS)
            while lines and not client.cut_off:
                most = MAX_LINES_AT_ONCE if client.name else 1
                taken = allowance.take(min(len(lines), most))
                if taken:
                    yield lines[:taken]
                    del lines[:taken]
                elif self._closing.wait(ALLOWANCE_PAUSE_SECONDS):
                    return

    def _ask_name(self, client: _Client, lines: Iterator[list[bytes]]) -> bool:
        """Read until a line is a name that may be used; False if none comes."""
        tried = 0
        for (line,) in lines:
            if line in protocol.QUIT_LINES:
                return False
            try:
                text = protocol.decode_message(line)
                if text:
                    return self._join(client, protocol.check_name(text))
            except ProtocolError as error:
                tried += 1
                if tried == MAX_NAMES_TRIED:
                    self._refuse(client, f"{error} That was your last try.")
                    return False
                self._refuse(client, error)
        return False

    def _refuse(self, client: _Client, reason: object) -> None:
        """Refuse what someone sent who is not a member yet, and so gets it at once."""
        logger.info("Refused %s: %s", client, reason)
        _send_at_once(client, protocol.refusal(reason))

    def _join(self, client: _Client, name: str) -> bool:
        """Make the client a member; False if its connection has been ended meanwhile.

        Raises ProtocolError if the name is taken.
        """
        key = protocol.name_key(name)
        joined = f"{name} has joined the chat."
        with self._lock:
            if client not in self._waiting:
                return False
            if key in self._keys:
                raise ProtocolError(f"The name {name} is taken.")
            welcome = protocol.notice(self._greeting(name))
            del self._waiting[client]
            self._keys.add(key)
            self.clients[name] = client.socket
            client.name = name
            self._append(_Entry(client, protocol.notice(joined), welcome, _Move.JOIN))
        self._deliver()
        logger.info("User %s", joined)
        return True

    def _greeting(self, name: str) -> str:
        """Caller holds _lock."""
        names = ", ".join(islice(self.clients, MAX_NAMES_LISTED))
        more = len(self.clients) - MAX_NAMES_LISTED
        others = f"{names} and {more} more" if more > 0 else names
        return f"Welcome, {name}! Also online: {others or 'nobody yet'}."

    def _pass_on(self, client: _Client, lines: Iterator[list[bytes]]) -> None:
        """Broadcast what a member says until it leaves."""
        for batch in lines:
            texts, refusals, events = [], [], []
            leaving = False
            for line in batch:
                if line in protocol.QUIT_LINES:
                    leaving = True
                    break
                try:
                    if text := protocol.decode_message(line):
                        texts.append(text)
                except ProtocolError as error:
                    refusals.append(protocol.refusal(error))
                    events.append(f"Refused a line from {client}: {error}")
            message = "".join([f"{client.name}: {text}\n" for text in texts])
            if texts or refusals:
                encoded = message.encode(protocol.ENCODING)
                reply = b"".join(refusals)
                if not self.broadcast_message(encoded, client.socket, reply):
                    return
            if self._log_messages:
                heard = f"Received message from {client.name}: "
                events += [heard + text for text in texts]
                if leaving:
                    events.append(heard + line.decode(protocol.ENCODING))
            if events:
                # One record for all of them: a record costs more than a message.
                logger.info("%s", "\n".join(events))
            if leaving:
                return

    def broadcast_message(
        self, message: bytes, sender_socket: socket.socket, reply: bytes = b""
    ) -> bool:
        """Append a message to the log, for everyone but its sender.

        message: whole lines, each with its newline; reply: lines that its sender gets
        instead.  Waits for room in the log, never for a reader.  Returns False if it
        was not accepted, because the server is shutting down.
        """
        size = len(message) + len(reply)
        # Who says so much at once may fill only half of the log: the other half keeps
        # the way free for all who just say something.
        hurried = size >= RECEIVE_BYTES
        limit = MAX_LOG_BYTES // (2 if hurried else 1)
        with self._lock:
            while self._log and self._log_bytes + size > limit:
                if self._closing.is_set():
                    return False
                self._room_in_log.wait()
            if self._closing.is_set():
                return False
            client = self._connections[sender_socket]
            self._append(_Entry(client, message, reply))
        self._deliver(may_send=not hurried)
        return True

    def _append(self, entry: _Entry) -> None:
        """Caller holds _lock, and has it sent once it has released that."""
        self._log.append(entry)
        self._log_bytes += len(entry.to_others) + len(entry.to_self)

    # --- sending --------------------------------------------------------------------

    def _deliver(self, *, may_send: bool = True) -> None:
        """Have what was appended to the log sent.  Never waits.

        While the room is quiet, the calling handler sends one round itself: that saves
        the time it takes to wake another thread.  What comes meanwhile is left to the
        broadcaster, and the handler goes back to reading; so is everything while much
        is said, since the broadcaster, woken a little later, joins more into one round.
        """
        quiet = time.monotonic() - self._next_round > QUIET_SECONDS
        may_send = may_send and quiet and not self._slow_readers
        if may_send and self._sending.acquire(blocking=False):
            try:
                if entries := self._take_log():
                    self._send_round(entries)
            finally:
                self._sending.release()
            if self._log or self._slow_readers:
                self._wake_broadcaster()
        elif self._asleep or not self._sending.locked():
            self._wake_broadcaster()

    def _wake_broadcaster(self) -> None:
        self._asleep = False  # before it wakes, and may sleep again
        self._writable.wake()

    def _broadcast(self) -> None:
        """Send what no handler sends.  Runs in the broadcaster.

        Ends when the log is closed and all of it is sent, or time is up.
        """
        while True:
            with self._sending:
                self._send_all()
                if self._closing.is_set() and not self._log:
                    self._hang_up_all()
                    return
            # Handlers that found us sending rely on this second look at the log.
            if not self._log:
                self._writable.wait(FOREVER)

    def _send_all(self) -> None:
        """Send until nothing waits, neither in the log nor for a slow reader."""
        while True:
            now = time.monotonic()
            until = now
            if now < self._next_round - ROUND_SLACK_SECONDS:
                until = self._next_round
            elif entries := self._take_log():
                self._send_round(entries, may_grow=True)
            elif self._slow_readers and now < self._give_up_at:
                until = self._give_up_at
            else:
                return
            if self._slow_readers or until > now:
                _, writable = self._writable.wait(until - now)
                for key in writable:
                    self._flush(key.data)

    def _take_log(self) -> list[_Entry]:
        with self._lock:
            entries = self._log
            # Who appends to the empty log from here on sees that it must wake somebody.
            self._asleep = not entries and not self._closing.is_set()
            if entries:
                self._log = []
                self._log_bytes = 0
                self._room_in_log.notify_all()
            return entries

    def _send_round(self, entries: list[_Entry], *, may_grow: bool = False) -> None:
        """Give every member its turn: one send of all that is under way.

        A round that may grow takes in what is appended to the log meanwhile, and goes
        on until each member has had a turn since.  It grows until much is under way, or
        somebody comes, goes, reads too slowly or is dropped.
        """
        readers = self._members - self._slow_readers
        may_grow = may_grow and not self._slow_readers
        turns: Iterator[_Client] = cycle(readers)
        turn = 0  # so many there have been
        under_way: deque[tuple[int, list[_Entry]]] = deque()  # until which turn, what
        kept: _Round | None = None  # for slow readers; what comes later is its end
        while entries or under_way:
            if entries:
                began = time.monotonic()
                joining = _who_moves(entries, _Move.JOIN)
                leaving = _who_moves(entries, _Move.LEAVE)
                if joining or leaving:  # this batch is the last one
                    may_grow = False
                    self._members.update(joining)
                    turns = chain(islice(turns, len(readers)), joining)
                under_way.append((turn + len(readers) + len(joining), entries))
                may_grow_at = turn + math.ceil(len(readers) / GROWTHS_PER_ROUND)
            this_round = _Round([entry for _, batch in under_way for entry in batch])
            may_grow = may_grow and len(this_round.block) < MAX_GROWING_BYTES
            until, _ = under_way[0]
            grow_after = may_grow_at - turn if may_grow else FOREVER
            next_ones = islice(turns, until - turn)
            given, all_took = self._give_turns(next_ones, this_round, grow_after)
            turn += given
            if turn == until:
                under_way.popleft()
            kept = kept or (this_round if self._slow_readers else None)
            may_grow = may_grow and all_took
            grows = may_grow and given >= grow_after and self._log
            entries = self._take_log() if grows else []
        self._last_link = self._keep(kept) if kept else None
        for client in leaving:
            self._members.discard(client)
            self._release_if_done(client)
        pause = self._restrain(len(kept.block)) if kept else 0.0
        now = time.monotonic()
        if joining:
            pause = max(pause, min(JOIN_PAUSE * (now - began), MAX_JOIN_PAUSE_SECONDS))
        self._next_round = max(self._next_round, now) + pause

    def _give_turns(
        self, clients: Iterator[_Client], this_round: _Round, grow_after: float
    ) -> tuple[int, bool]:
        """Send to one after the other; end after so many if the log has more by then.

        Returns how many had their turn, and whether they took all.
        """
        block, cuts = this_round.block, this_round.cuts
        given, all_took = 0, True
        for given, client in enumerate(clients, 1):
            data = this_round.data(client) if client in cuts else block
            if not data:
                continue  # replies for others, or only its own lines
            try:
                sent = client.send(data, MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0  # it reads too slowly
            except OSError as error:
                self._drop(client, error)
                all_took = False
                continue
            if sent < len(data):
                self._hold(client, len(data) - sent)
                all_took = False
            if self._log and given >= grow_after:
                break
        return given, all_took

    def _hold(self, client: _Client, size: int) -> None:
        """Note that a client did not take so many bytes; _keep() keeps them for it."""
        try:
            self._writable.register(client.socket, selectors.EVENT_WRITE, client)
        except OSError as error:  # the system watches no more of them
            self._drop(client, error)
            return
        self._slow_readers.add(client)
        client.waiting_bytes = size

    def _keep(self, this_round: _Round) -> _Round:
        """Add a round to the backlogs of the slow readers; return the chain's new end."""
        link, before = this_round, 0  # so many bytes of the link are before this round
        if last := self._last_link:
            if last.cut_bytes + len(last.block) + len(this_round.block) <= LINK_BYTES:
                link, before = last, len(last.block)
            else:
                last.next = this_round
                this_round.end += last.end
        for client in self._members & self._slow_readers:
            size = len(this_round.data(client))
            if client.link:
                client.waiting_bytes += size
            else:  # since this round: what it did not take is the end of it
                client.link, client.offset = link, before + size - client.waiting_bytes
        this_round.keep_cuts_of(self._slow_readers)
        if link is last:
            last.append(this_round)
        return link

    def _restrain(self, sent: int) -> float:
        """Cut off who is too slow; return seconds to pause for those who may become so.

        In proportion to the bytes that were sent, and to how far the longest backlog is
        beyond half of what may wait.
        """
        longest = 0
        for client in tuple(self._slow_readers):
            assert client.link and self._last_link
            # All that it keeps in memory, and so its own lines too.
            behind = self._last_link.end - client.link.end + len(client.link.block)
            held = behind - client.offset + client.cut_bytes
            if held > MAX_BACKLOG_BYTES:
                client.cut_off = f"too slow, it held back {MAX_BACKLOG_BYTES} bytes"
                self._drop(client)
            else:
                longest = max(longest, held)
        fullness = max(0.0, 2 * longest / MAX_BACKLOG_BYTES - 1)
        return FULL_ROUND_SECONDS * fullness * sent / MAX_LOG_BYTES

    def _flush(self, client: _Client) -> None:
        """Send from the backlog of a slow reader what its socket takes."""
        blocks: list[bytes] = []
        gathered, link = -client.offset, client.link
        while gathered < min(client.waiting_bytes, FLUSH_BYTES):
            assert link  # waiting_bytes counts what the chain holds
            blocks.append(link.data(client))
            gathered += len(blocks[-1])
            link = link.next
        # Who leaves does not see all of its last link.
        end = client.offset + client.waiting_bytes
        try:
            data = memoryview(b"".join(blocks))[client.offset : end]
            sent = client.send(data, MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(client, error)
            return
        client.waiting_bytes -= sent
        client.offset += sent
        for block in blocks:
            if client.offset < len(block) or not client.waiting_bytes:
                break
            assert client.link
            client.offset -= len(block)
            client.link.pass_by(client)
            client.link = client.link.next
        if not client.waiting_bytes:
            self._forget_backlog(client)
            self._release_if_done(client)

    def _forget_backlog(self, client: _Client) -> None:
        self._slow_readers.discard(client)
        self._writable.unregister(client.socket)
        while client.link:
            client.link.pass_by(client)
            client.link = client.link.next
        client.waiting_bytes = client.offset = 0

    def _drop(self, client: _Client, error: OSError | None = None) -> None:
        """Send nothing more to a client, and wake its handler, which does the rest.

        What the client sent before its connection broke can still be read.
        """
        if error:
            client.broken = error.strerror or str(error)
        self._members.discard(client)
        if client in self._slow_readers:
            self._forget_backlog(client)
        _shut(client.socket, socket.SHUT_RDWR)
        self._release_if_done(client)

    def _release_if_done(self, client: _Client) -> None:
        """Let the handler of a client that leaves close, once nothing is left to send.

        That may be before the others are told, if sending to it has failed.
        """
        in_log = client in self._members  # its leaving has not been sent yet
        if client.released and not in_log and not client.waiting_bytes:
            client.released.set()

    def _hang_up_all(self) -> None:
        """Close our side of all connections that get anything: the last act."""
        for client in self._members | self._slow_readers:
            _shut(client.socket, socket.SHUT_WR)
            if client.released:
                client.released.set()
        self._all_sent.set()

    # --- connections go -------------------------------------------------------------

    def remove_client(self, client_socket: socket.socket) -> None:
        """Take a member off the list, tell the others, wait for the last send to it.

        Its handler calls this, and closes the socket afterwards.  For one who has not
        joined, or called again before that, it announces nothing.
        """
        with self._lock:
            client = self._connections[client_socket]
            self._waiting.pop(client, None)
            if self.clients.get(client.name) is not client_socket:
                return
            del self.clients[client.name]
            self._keys.remove(protocol.name_key(client.name))
            last_send = self._all_sent
            if not self._closing.is_set():
                last_send = client.released = threading.Event()
                left = protocol.notice(f"{client.name} has left the chat.")
                self._append(_Entry(client, left, move=_Move.LEAVE))
        self._deliver()
        logger.info("Removing user: %s from clients", client.name)
        if not last_send.wait(LINGER_SECONDS):
            _shut(client_socket, socket.SHUT_RDWR)  # makes the next send fail
            last_send.wait()

    def _close(self, client: _Client) -> None:
        """Close a connection, in its own thread, after the last send to it.

        A close with input unread would reset the connection and could cost the peer the
        lines under way.  So: close our side, read on to EOF for a moment, then close.
        """
        deadline = time.monotonic() + LINGER_SECONDS
        with client.socket:
            _shut(client.socket, socket.SHUT_WR)
            try:
                while (seconds := deadline - time.monotonic()) > 0:
                    client.socket.settimeout(seconds)
                    if not client.socket.recv(RECEIVE_BYTES):
                        break
            except OSError:
                pass  # gone, or silent until the time was up
        if not client.name:
            logger.info("Closed connection from %s", client)
        with self._lock:
            del self._connections[client.socket]
            self._all_closed.notify_all()

    def _shut_down(self, broadcaster: threading.Thread) -> None:
        """End in order, within SHUTDOWN_SECONDS.

        1. Take no new clients; send those away who have not joined.
        2. Close the log, with a last notice to all members.
        3. Let the broadcaster send all of it to all that read, and hang up.
        4. Give the clients a moment to hang up too; then wake every handler.
        5. Wait for the handlers.
        """
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        notice = protocol.notice("Server is shutting down.")
        self._listener.close()
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            for client in waiting:
                client.farewell = notice
            self._append(_Entry(None, notice))
            self._give_up_at = deadline
            self._closing.set()
            self._room_in_log.notify_all()
            handled = list(self._connections.values())
        self._wake_broadcaster()
        for client in waiting:
            _shut(client.socket, socket.SHUT_RD)
        broadcaster.join()
        with self._lock:
            seconds = min(HANG_UP_SECONDS, deadline - time.monotonic())
            self._all_closed.wait_for(lambda: not self._connections, seconds)
            for client in self._connections.values():
                _shut(client.socket, socket.SHUT_RDWR)
        for client in handled:
            if client.thread:
                client.thread.join()
        self._writable.close()
        self._arrivals.close()


# --- sockets ------------------------------------------------------------------------


def _listen(host: str, port: int) -> socket.socket:
    """Return a listener on the first address of the host that can be had."""
    failure: OSError | None = None
    for family, _, _, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            # create_server sets SO_REUSEADDR where that is what lets a restarted
            # server have its port back at once.
            listener = socket.create_server(
                address, family=family, backlog=LISTEN_BACKLOG
            )
        except OSError as error:
            # Its own text: create_server() adds the address to it.
            reason = str(error.strerror).partition(" (while attempting")[0]
            failure = failure or OSError(error.errno, reason)
        else:
            listener.setblocking(False)
            return listener
    assert failure is not None  # getaddrinfo gives at least one address or raises
    raise failure


def _set_options(client_socket: socket.socket) -> None:
    """Make a connection quick, and find out when its peer has vanished.

    Without data under way by keep-alive; with it by the user timeout, since the kernel
    does not count keep-alive then (tcp(7)).  A system sets those that it has.
    """
    if sys.platform != "linux":  # elsewhere inherited from the listener
        client_socket.setblocking(True)
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


def _sender(
    client_socket: socket.socket,
) -> Callable[[bytes | memoryview, int], int]:
    """Return what sends as much as the socket takes at once, or raises BlockingIOError.

    To be called with MSG_DONTWAIT.  The socket itself stays blocking: its handler waits
    in recv() at the same time.  Where there is no such flag, it sends a little at once.
    """
    if MSG_DONTWAIT:
        return client_socket.send

    def send(data: bytes | memoryview, _: int) -> int:
        if not select.select([], [client_socket], [], 0)[1]:
            raise BlockingIOError
        return client_socket.send(data[:1024])  # so little does not block

    return send


def _send_at_once(client: _Client, line: bytes) -> None:
    """Send a line to one who is not a member, without waiting; it may be gone."""
    try:
        client.send(line, MSG_DONTWAIT)
    except OSError:
        pass  # its handler finds out by itself


def _shut(client_socket: socket.socket, how: int) -> None:
    """End one direction of a connection or both, under whoever is blocked on it.

    recv() returns b"" then.  close() would wake nobody, and free a descriptor that is
    still in use.
    """
    try:
        client_socket.shutdown(how)
    except OSError:
        pass  # ended already


def _format_address(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- the terminal -------------------------------------------------------------------


class LogWriter(logging.Handler):
    """Writes the log from a thread of its own: a paused terminal stops nothing.

    What is too much is left out, and the next line that fits says how much that was.
    (QueueListener would serve but that its stop() waits for a terminal that is stuck,
    and that its queue counts records; one record may hold the lines of a whole recv.)
    """

    def __init__(self, descriptor: int, encoding: str = protocol.ENCODING) -> None:
        """descriptor: where to write, unbuffered; it is not closed."""
        super().__init__()
        self._descriptor = descriptor
        self._encoding = encoding
        # Guards the names below.  Not held while writing.
        self._changed = threading.Condition()
        self._texts: list[str] = []
        self._unwritten_lines = 0
        self._left_out_lines = 0
        # A daemon, since nothing can wake a write to a terminal that is stuck; it holds
        # no lock then that the interpreter's exit needs.
        threading.Thread(target=self._write, name="log writer", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's lines, cleaned.  Never waits for the terminal."""
        lines = [protocol.clean(line) for line in record.getMessage().split("\n")]
        with self._changed:
            if self._unwritten_lines + len(lines) > MAX_UNWRITTEN_LINES:
                self._left_out_lines += len(lines)
                return
            if self._left_out_lines:
                lines.insert(0, f"({self._left_out_lines} lines left out)")
                self._left_out_lines = 0
            self._texts.append("\n".join(lines) + "\n")
            self._unwritten_lines += len(lines)
            if len(self._texts) == 1:
                self._changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Wait until all is written, or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unwritten_lines, seconds)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts)
            time.sleep(GATHER_SECONDS)
            with self._changed:
                text = "".join(self._texts)
                self._texts.clear()
            data = memoryview(text.encode(self._encoding, "backslashreplace"))
            try:
                while data:
                    data = data[_write_some(self._descriptor, data) :]
            except OSError:
                pass  # nobody reads it any more; the chat goes on
            with self._changed:
                self._unwritten_lines -= text.count("\n")
                self._changed.notify_all()


def _write_some(descriptor: int, data: memoryview) -> int:
    """Write what the descriptor takes; some terminals are shared and do not block."""
    try:
        return os.write(descriptor, data)
    except BlockingIOError:
        select.select([], [descriptor], [])
        return 0


def _parse_arguments() -> argparse.Namespace:
    flags = protocol.CommandLine("A chat room over plain TCP. Ctrl-C ends it.")
    flags.add_argument(
        "--host", type=protocol.host_name, default=protocol.DEFAULT_HOST,
        help="name or address to listen on; 0.0.0.0 lets the whole network in",
    )  # fmt: skip
    flags.add_number(
        "--port", 0, 65535, default=protocol.DEFAULT_PORT, metavar="PORT",
        help="TCP port to listen on; 0 takes a free one",
    )  # fmt: skip
    flags.add_number(
        "--max-clients", 1, 1_000_000, default=MAX_CLIENTS, metavar="N",
        help="connections at most, joined or not",
    )  # fmt: skip
    flags.add_number(
        "--rate", 0, 1_000_000, default=LINES_PER_SECOND, metavar="N",
        help="lines per second that a client may send on average, with bursts of up to "
        f"{BURST_SECONDS} times as many; 0 means no limit",
    )  # fmt: skip
    flags.add_argument("--quiet", action="store_true", help="do not print what is said")
    return flags.parse_args()


def _raise_open_file_limit(clients: int) -> None:
    """Make room for so many connections, as far as the system allows."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = clients + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        except (OSError, ValueError):
            allowed = soft  # macOS has a limit of its own below "unlimited"
        if allowed < needed:
            logger.warning(
                "Only %d open files are allowed: room for some %d of %d clients",
                allowed, max(0, allowed - SPARE_DESCRIPTORS), clients,
            )  # fmt: skip


def _stay_on_one_processor() -> None:
    """Run all threads that are started from here on on one processor, where possible.

    Only one of them has the interpreter lock, and to hand it on to another processor
    takes longer than what is mostly done with it: on two, a thousand joins at once take
    half as long again.  What is lost is that the kernel's part of a send and of a
    recv could run at once.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return  # a Python without that lock
    try:
        allowed = os.sched_getaffinity(0)
        # Any of them: another server should not have to share it.
        os.sched_setaffinity(0, {random.choice(tuple(allowed))})
    except (AttributeError, OSError):
        pass  # the system has no such thing, or does not let us


def _stop_on_signals(server: ChatServer) -> None:
    """Have Ctrl-C and SIGTERM stop the server, and a second one end it at once."""

    def stop(*_: object) -> None:
        # The signal's number has gone to stop_sender already.  The next one, of either
        # kind, ends the process at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # The kernel may hand a signal to any thread, and only a byte on a socket is sure to
    # wake the main one.
    signal.set_wakeup_fd(server.stop_sender.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def main() -> int:
    """Run the server; return its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while it starts
    options = _parse_arguments()
    # A stream that was closed before the start is None.
    screen = sys.stdout.fileno() if sys.stdout else os.open(os.devnull, os.O_WRONLY)
    encoding = sys.stdout.encoding if sys.stdout else protocol.ENCODING
    try:
        server = ChatServer(
            options.host,
            options.port,
            max_clients=options.max_clients,
            lines_per_second=options.rate,
            log_messages=not options.quiet,
        )
    except (OSError, ValueError) as error:  # ValueError: not a host name at all
        reason = getattr(error, "strerror", None) or error
        host = protocol.clean(options.host)
        print(
            f"server.py: cannot listen on {host}, port {options.port}: {reason}"
            " (try another --host or --port)",
            file=sys.stderr,
        )
        return 1

    _stop_on_signals(server)
    _stay_on_one_processor()  # the first of the other threads is the log writer's
    # A thread that computes makes every send wait this long for the interpreter lock.
    sys.setswitchinterval(0.0005)
    writer = LogWriter(screen, encoding)
    logger.addHandler(writer)
    logger.setLevel(logging.INFO)
    logger.info("Server is running...")
    logger.info("Listening on %s", server.address)
    _raise_open_file_limit(options.max_clients)
    server.serve()
    writer.drain(LAST_LINES_SECONDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
