"""The fixtures: servers that leave nothing behind."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The modules under test lie beside the tests' directory, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import HANG_SECONDS, Room, ServerProcess, open_descriptors


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Check that the test leaves no thread and no file descriptor behind."""
    threads = set(threading.enumerate())
    descriptors = open_descriptors()
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive(), thread
    assert open_descriptors() == descriptors


@pytest.fixture
def start_room(no_leaks: None) -> Iterator[Callable[..., Room]]:
    """Start servers in threads; on leaving they are stopped, and nothing is left.

    kind: the class of their rooms.
    """
    rooms: list[Room] = []

    def start(host: str = "127.0.0.1", kind: Any = Room, **options: Any) -> Any:
        rooms.append(kind(host, **options))
        return rooms[-1]

    yield start
    for room in rooms:
        room.close_peers()
        room.stop()


@pytest.fixture
def room(start_room: Callable[..., Room]) -> Room:
    """A server in a thread, as it is by default but for the free port."""
    return start_room()


@pytest.fixture
def narrow_room(start_room: Callable[..., Room]) -> Room:
    """A server without a rate, that has small buffers: what is not read waits in it."""
    return start_room(small_buffers=True, lines_per_second=0)


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Start server processes; on leaving they are killed.

    Nothing may appear on their stderr, but what a test has asked for.
    """
    servers: list[ServerProcess] = []

    def start(*flags: str, **options: Any) -> ServerProcess:
        servers.append(ServerProcess(*flags, **options))
        return servers[-1]

    yield start
    errors = ""
    for server in servers:
        server.close_peers()
        errors += server.end() if server.errors is None else ""
    assert errors == ""
