"""What the tests share: a raw peer, and the server in a thread or in a process.

HANG_SECONDS is a guard that ends a test which would wait for ever; no claim depends on
it.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
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


class Peer:
    """A client without any comfort: a socket that sends bytes and reads lines."""

    def __init__(self, address: str, *, receive_buffer: int = 0) -> None:
        """receive_buffer: in bytes, 0 for the system's own choice."""
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.name = ""
        self.socket = socket.socket(family)
        try:
            if receive_buffer:
                self.socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer
                )
            self.socket.settimeout(HANG_SECONDS)
            self.socket.connect((host, port))
        except BaseException:
            self.socket.close()
            raise
        self.port: int = self.socket.getsockname()[1]
        self._lines: deque[bytes] = deque()
        self._tail = b""

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

    def line(self) -> str:
        """Return the next line, without its newline."""
        while not self._lines:
            assert self._receive(), f"EOF instead of a line, after {self._tail!r}"
        return self._lines.popleft().decode()

    def lines(self, count: int) -> list[str]:
        """Return that many lines."""
        return [self.line() for _ in range(count)]

    def until(self, last: str) -> list[str]:
        """Return the lines up to this one, which is not among them."""
        lines = []
        while (line := self.line()) != last:
            lines.append(line)
        return lines

    def gather(self, wanted: Callable[[str], bool]) -> str:
        """Return the first line that is wanted, and forget those before it."""
        while not wanted(line := self.line()):
            pass
        return line

    def take(self) -> bytes:
        """Return whatever one recv() gives, past the lines: not EOF."""
        chunk = self.socket.recv(65536)
        assert chunk, "EOF"
        return chunk

    def rest(self) -> list[str]:
        """Return the lines up to EOF, which must not come inside a line."""
        while self._receive():
            pass
        assert self._tail == b""
        lines = [line.decode() for line in self._lines]
        self._lines.clear()
        return lines

    def drain(self) -> None:
        """Read and forget until EOF."""
        while self.socket.recv(MIB):
            pass

    def half_close(self) -> None:
        """Send no more, but go on reading: a FIN."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Break the connection: a RST."""
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.socket.close()

    def close(self) -> None:
        """Close the connection; again does nothing."""
        self.socket.close()

    def _receive(self) -> bool:
        chunk = self.socket.recv(65536)
        *lines, self._tail = (self._tail + chunk).split(b"\n")
        self._lines.extend(lines)
        return chunk != b""


def small_send_buffers() -> AbstractContextManager[object]:
    """Give listeners a small send buffer, which the sockets they accept inherit."""
    listen = socket.socket.listen

    def listen_small(self: socket.socket, *backlog: int) -> None:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
        listen(self, *backlog)

    return mock.patch.object(socket.socket, "listen", listen_small)


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

    def member(self, name: str, *, receive_buffer: int = 0) -> Peer:
        """Return a connection that has joined."""
        peer = self.connect(receive_buffer=receive_buffer)
        peer.join(name)
        return peer

    def members(self, *names: str) -> list[Peer]:
        """Return connections that have joined and have read of one another's joining."""
        peers: list[Peer] = []
        for name in names:
            newcomer = self.member(name)
            for peer in peers:
                assert peer.line() == f"* {name} has joined the chat."
            peers.append(newcomer)
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
        with small_send_buffers() if small_buffers else nullcontext():
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


class LineReader:
    """Reads lines from a pipe, and gives up when none comes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._tail = b""

    def line(self) -> str:
        """Return the next line, without its newline."""
        while not self._lines:
            assert self._receive(), f"end of output, after {self._tail!r}"
        return self._lines.popleft().decode()

    def lines(self, count: int) -> list[str]:
        """Return that many lines."""
        return [self.line() for _ in range(count)]

    def until(self, part: str) -> list[str]:
        """Return the lines up to the first one with this part in it, and that one."""
        lines = [self.line()]
        while part not in lines[-1]:
            lines.append(self.line())
        return lines

    def rest(self) -> list[str]:
        """Return the lines up to the end."""
        while self._receive():
            pass
        assert self._tail == b""
        lines = [line.decode() for line in self._lines]
        self._lines.clear()
        return lines

    def _receive(self) -> bool:
        ready = select.select([self._descriptor], [], [], HANG_SECONDS)[0]
        assert ready, f"no output, after {self._tail!r}"
        chunk = os.read(self._descriptor, 65536)
        *lines, self._tail = (self._tail + chunk).split(b"\n")
        self._lines.extend(lines)
        return chunk != b""


_PATCHED = """
import errno, os, signal, socket, sys, threading
import protocol, server
{}
sys.exit(server.main())
"""
_SMALL_BUFFERS = (
    "sys.path.append('tests'); import helpers; helpers.small_send_buffers().start()"
)


class ServerProcess(_Chat):
    """The real `python server.py`."""

    def __init__(
        self,
        *flags: str,
        limits: str = "",
        small_buffers: bool = False,
        patch: str = "",
    ) -> None:
        """Start it and wait until it listens.

        limits: a shell command such as "ulimit -n 64" that is run before it.
        patch: Python that breaks it before it starts; errors are expected then.
        """
        self.errors: str | None = None  # what it wrote to stderr, once it has ended
        self.errors_expected = patch != ""
        if small_buffers:
            patch = f"{_SMALL_BUFFERS}\n{patch}"
        program = ["-c", _PATCHED.format(patch)] if patch else ["server.py"]
        command = [sys.executable, *program, "--port", "0", *flags]
        if limits:
            command = ["sh", "-c", f'{limits} && exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
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

    def wait(self, seconds: float = HANG_SECONDS) -> int:
        """Return the exit status."""
        return self.process.wait(seconds)

    def status_bytes(self, field: str) -> int:
        """Return a size from /proc, such as VmHWM, the most memory used so far."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {field}")

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far, by /proc."""
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


def run_server(
    *arguments: str, limits: str = "true", program: Iterable[str] = ("server.py",)
) -> subprocess.CompletedProcess[str]:
    """Run `python server.py` to its end, for a start that fails.

    limits: a shell command that is run before it; program: what to run instead.
    """
    return subprocess.run(
        ["sh", "-c", f'{limits} && exec "$@"', "sh", sys.executable]
        + [*program, *arguments],
        check=False,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


def open_descriptors() -> set[int]:
    """Return the open file descriptors of this process, where the system tells."""
    try:
        names: Iterable[str] = os.listdir("/dev/fd")
    except OSError:
        names = ()
    return {int(name) for name in names if _is_open(int(name))}


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:  # it was that of the listing itself
        return False
    return True
