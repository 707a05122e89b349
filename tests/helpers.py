"""What the tests share: a raw peer, and the server in a thread or in a process.

HANG_SECONDS is a guard that ends a test which would wait for ever; no claim depends on
it.
"""

from __future__ import annotations

import inspect
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from server import ChatServer

HANG_SECONDS = 10.0
PROJECT = Path(__file__).resolve().parent.parent
# The kernel swallows megabytes before a reader that never reads stops anybody; with
# this on both sides it is some kilobytes.
SMALL_BUFFER = 4096
MIB = 1024 * 1024
SHUTTING_DOWN = "* Server is shutting down."

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads /proc"
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def joined(name: str) -> str:
    """Return what the others read when somebody joins."""
    return f"* {name} has joined the chat."


def left(name: str) -> str:
    """Return what the others read when somebody leaves."""
    return f"* {name} has left the chat."


def wait_until(fact: Callable[[], bool]) -> None:
    """Wait for a fact that nothing reports."""
    give_up_at = time.monotonic() + HANG_SECONDS
    while not fact():
        assert time.monotonic() < give_up_at
        select.select([], [], [], 0.005)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "127.0.0.1:12345" or "[::1]:12345"."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class _Lines:
    """Cuts into lines what comes in pieces."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._tail = b""

    def _piece(self) -> bytes:
        """Return what comes next, b"" at the end."""
        raise NotImplementedError

    def _receive(self) -> bool:
        piece = self._piece()
        *lines, self._tail = (self._tail + piece).split(b"\n")
        self._lines.extend(lines)
        return piece != b""

    def line(self) -> str:
        """Return the next line, without its newline."""
        while not self._lines:
            assert self._receive(), f"the end instead of a line, after {self._tail!r}"
        return self._lines.popleft().decode()

    def lines(self, count: int) -> list[str]:
        """Return that many lines."""
        return [self.line() for _ in range(count)]

    def rest(self) -> list[str]:
        """Return the lines up to the end, which must not come inside a line."""
        while self._receive():
            pass
        assert self._tail == b""
        return self.lines(len(self._lines))


class Peer(_Lines):
    """A client without any comfort: a socket that sends bytes and reads lines."""

    def __init__(self, address: str, *, receive_buffer: int = 0) -> None:
        """receive_buffer: in bytes, 0 for the system's own choice."""
        super().__init__()
        host, port = split_address(address)
        self.name = ""
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            if receive_buffer:
                option = socket.SOL_SOCKET, socket.SO_RCVBUF
                self.socket.setsockopt(*option, receive_buffer)
            self.socket.settimeout(HANG_SECONDS)
            self.socket.connect((host, port))
        except BaseException:
            self.socket.close()
            raise
        self.port: int = self.socket.getsockname()[1]

    def _piece(self) -> bytes:
        return self.socket.recv(65536)

    def send(self, data: str | bytes) -> None:
        """Send exactly this; a line needs its newline."""
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def say(self, text: str) -> None:
        """Send one line."""
        self.send(f"{text}\n")

    def join(self, name: str) -> str:
        """Send a name and return the welcome."""
        self.name = name
        self.say(name)
        welcome = self.line()
        assert welcome.startswith("* "), welcome
        return welcome

    def until(self, last: str) -> list[str]:
        """Return the lines up to this one, which is not among them."""
        return [*iter(self.line, last)]

    def gather(self, wanted: Callable[[str], bool]) -> str:
        """Return the first line that is wanted, and forget those before it."""
        while not wanted(line := self.line()):
            pass
        return line

    def come(self) -> list[str]:
        """Return the lines that have come by now."""
        while select.select([self.socket], [], [], 0)[0] and self._receive():
            pass
        return self.lines(len(self._lines))

    def drain(self) -> None:
        """Read and forget until the end."""
        while self.socket.recv(MIB):
            pass

    def half_close(self) -> None:
        """Send no more, but go on reading: a FIN."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Break the connection: a RST."""
        linger = struct.pack("ii", 1, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.socket.close()

    def close(self) -> None:
        """Close the connection; again does nothing."""
        self.socket.close()


_listen = socket.socket.listen


def _listen_small(self: socket.socket, *backlog: int) -> None:
    """Listen with a small send buffer, which the accepted sockets inherit."""
    self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    _listen(self, *backlog)


def assert_next(speaker: Peer, *readers: Peer) -> None:
    """Check with a fence that nothing else is under way to the readers.

    The speaker says a line, and that must be the next one that each of them reads.
    """
    fence = f"fence {os.urandom(4).hex()}"
    speaker.say(fence)
    for reader in readers:
        assert reader.line() == f"{speaker.name}: {fence}"


class _Chat:
    """A running server, and the peers that a test connects to it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._peers: list[Peer] = []

    def connect(self, *, receive_buffer: int = 0) -> Peer:
        """Return a new connection; it is closed when the test is over."""
        peer = Peer(self.address, receive_buffer=receive_buffer)
        self._peers.append(peer)
        return peer

    def member(self, name: str, *others: Peer, receive_buffer: int = 0) -> Peer:
        """Return a connection that has joined, and of which the others have read."""
        peer = self.connect(receive_buffer=receive_buffer)
        peer.join(name)
        for other in others:
            assert other.line() == joined(name)
        return peer

    def slow_member(self, *others: Peer) -> Peer:
        """Return "Slow", for whom the kernel takes little; the others have read of it."""
        return self.member("Slow", *others, receive_buffer=SMALL_BUFFER)

    def members(self, *names: str) -> list[Peer]:
        """Return connections that have joined and have read of one another's joining."""
        peers: list[Peer] = []
        for name in names:
            peers.append(self.member(name, *peers))
        return peers

    def close_peers(self) -> None:
        """Close all connections of the test."""
        for peer in self._peers:
            peer.close()


class Room(_Chat):
    """A ChatServer in a thread of this process."""

    def __init__(
        self, host: str = "127.0.0.1", *, small_buffers: bool = False, **options: Any
    ) -> None:
        """small_buffers: the accepted sockets send from one; options: the ChatServer's."""
        listen = _listen_small if small_buffers else _listen
        with mock.patch.object(socket.socket, "listen", listen):
            self.server = ChatServer(host, 0, **options)
        super().__init__(self.server.address)
        self._thread = threading.Thread(target=self.server.serve, name="server")
        self._thread.start()

    def stop(self) -> None:
        """Shut the server down, and wait until it has; again does nothing."""
        if self._thread.is_alive():
            self.server.stop()
            self._thread.join(HANG_SECONDS)
        assert not self._thread.is_alive()
        assert self.server.clients == {}


class LineReader(_Lines):
    """Reads lines from a pipe, and gives up when none comes."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def _piece(self) -> bytes:
        ready = select.select([self._descriptor], [], [], HANG_SECONDS)[0]
        assert ready, f"no output, after {self._tail!r}"
        return os.read(self._descriptor, 65536)

    def until(self, part: str) -> list[str]:
        """Return the lines up to the first one with this part in it, and that one."""
        lines = [self.line()]
        while part not in lines[-1]:
            lines.append(self.line())
        return lines


def run_server(
    *flags: str, limits: str = "true", program: Iterable[str] = ("server.py",)
) -> subprocess.CompletedProcess[str]:
    """Run `python server.py` to its end, for a start that fails.

    limits: a shell command that is run before it; program: what to run instead.
    """
    return subprocess.run(
        _command(program, flags, limits), check=False, cwd=PROJECT,
        capture_output=True, text=True, timeout=HANG_SECONDS,
    )  # fmt: skip


def _command(program: Iterable[str], flags: Iterable[str], limits: str) -> list[str]:
    shell = ["sh", "-c", f'{limits} && exec "$@"', "sh"]
    return [*shell, sys.executable, *program, *flags]


_EACH = """
import sys, server
for flags in {!r}:
    sys.argv = ["server.py", *flags]
    try:
        status = server.main()
    except SystemExit as end:
        status = end.code
    print(status)
"""


def explanations(status: int, *flags: Sequence[str], limits: str = "true") -> list[str]:
    """Check that these flags start no server; return the line that each gives."""
    run = run_server(program=["-c", _EACH.format(flags)], limits=limits)
    assert run.stdout == f"{status}\n" * len(flags)
    lines = run.stderr.splitlines()
    assert all(line.startswith("server.py: ") for line in lines)
    assert len(lines) == len(flags), lines
    return lines


_PATCHED = """
import errno, os, signal, socket, sys, threading
import protocol, server
{}
sys.exit(server.main())
"""
# In a process of its own; importing this module there would take its time.
_SMALL_BUFFERS = f"""
SMALL_BUFFER, _listen = {SMALL_BUFFER}, socket.socket.listen
{inspect.getsource(_listen_small)}
socket.socket.listen = _listen_small
"""


class ServerProcess(_Chat):
    """The real `python server.py`."""

    def __init__(
        self, *flags: str, limits: str = "true", small_buffers: bool = False,
        patch: str = "",
    ) -> None:  # fmt: skip
        """Start it and wait until it listens.

        limits: a shell command such as "ulimit -n 64" that is run before it.
        patch: Python that changes or breaks it before it starts.
        """
        self.errors: str | None = None  # what it wrote to stderr, once somebody asked
        if small_buffers:
            patch = f"{_SMALL_BUFFERS}\n{patch}"
        program = ["-c", _PATCHED.format(patch)] if patch else ["server.py"]
        self.process = subprocess.Popen(
            _command(program, ["--port", "0", *flags], limits),
            cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout
        try:
            self.output = LineReader(self.process.stdout.fileno())
            self.start_lines = self.output.until("Listening on ")
        except BaseException:
            print(self.end())
            raise
        super().__init__(self.start_lines[-1].rpartition(" ")[2])

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        """Return the exit status."""
        return self.process.wait(HANG_SECONDS)

    def stop(self) -> list[str]:
        """End it in order; return the rest of what its terminal shows."""
        self.interrupt()
        self.close_peers()
        shown = self.output.rest()
        assert self.wait() == 0
        return shown

    @contextmanager
    def growing_by_less_than(self, limit: int) -> Iterator[None]:
        """Check that meanwhile it takes so many bytes more at most, by /proc."""
        before = self._status_bytes("VmRSS")
        yield
        assert self._status_bytes("VmHWM") - before < limit

    def _status_bytes(self, field: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"\n{field}:")[2].split()[0]) * 1024

    def assert_idle(self, *peers: Peer) -> None:
        """Check that for a while it sends nothing, and does not compute, by /proc."""
        before = self._cpu_seconds()
        assert select.select([peer.socket for peer in peers], [], [], 0.3)[0] == []
        assert self._cpu_seconds() - before < 0.05

    def _cpu_seconds(self) -> float:
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> str:
        """Kill it if it still runs; return what it wrote to stderr."""
        if self.errors is None:
            self.process.kill()
            assert self.process.stdout
            assert self.process.stderr
            with self.process.stdout, self.process.stderr:
                self.errors = self.process.stderr.read().decode()
            self.process.wait(HANG_SECONDS)
        return self.errors


StartRoom = Callable[..., Room]
StartServer = Callable[..., ServerProcess]


def open_descriptors() -> set[int]:
    """Return the open file descriptors of this process, where the system tells."""
    found = set()
    for name in os.listdir("/dev/fd") if Path("/dev/fd").exists() else ():
        with suppress(OSError):  # it was that of the listing itself
            os.fstat(int(name))
            found.add(int(name))
    return found
