"""What is said stays, and a name can be kept: `python server.py --database FILE`."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from helpers import (
    HANG_SECONDS,
    SMALL_BUFFER,
    LineReader,
    Peer,
    Room,
    ServerProcess,
    StartRoom,
    StartServer,
    assert_next,
    explanations,
    left,
    wait_until,
)

import server

PASSWORD = "correct horse"
HISTORY = re.compile(r"\* \[\d{4}-\d\d-\d\d \d\d:\d\d\] (.*)")
# So that what comes back after a fault is soon noticed.
QUICK = "server.RETRY_SECONDS = server.BUSY_SECONDS = 0.01"


class FileRoom(Room):
    """A ChatServer with a file, in a thread of this process."""

    def __init__(self, host: str, *, path: Path, **options: Any) -> None:
        self.told: list[str] = []  # what the terminal shows
        options |= {"database": str(path), "tell": self.told.append}
        super().__init__(host, **options)

    def stop(self) -> None:
        self.close_peers()
        super().stop()

    def await_told(self, line: str) -> None:
        """Wait until the terminal shows a line that has this in it."""
        wait_until(lambda: line in "\n".join(self.told))


StartFileRoom = Callable[..., FileRoom]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file; there is none yet."""
    return tmp_path / "chat.db"


@pytest.fixture
def start(
    start_room: StartRoom, path: Path, monkeypatch: pytest.MonkeyPatch
) -> StartFileRoom:
    """Start servers with the file in threads."""
    monkeypatch.setattr(server, "LAST_SECONDS", HANG_SECONDS)  # instead of 0.3
    return partial(start_room, kind=FileRoom, path=path)  # type: ignore[return-value]


@pytest.fixture
def room(start: StartFileRoom, monkeypatch: pytest.MonkeyPatch) -> FileRoom:
    """A server with the file, which computes passwords without taking its time."""

    def scrypt(password: bytes, *, salt: bytes, **_: object) -> bytes:
        return hashlib.sha256(salt + password).digest()

    monkeypatch.setattr(hashlib, "scrypt", scrypt)
    return start()


@pytest.fixture
def start_process(start_server: StartServer, path: Path) -> StartServer:
    """Start server processes with the file."""
    return partial(start_server, "--database", str(path))


def query(path: Path, statement: str, *values: object) -> list[Any]:
    """Do as another program does that opens the file while the server runs."""
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def kept(path: Path) -> list[str]:
    """Return what is in the file, as members see it."""
    rows = query(path, "SELECT name, text FROM messages ORDER BY id")
    return [f"{name}: {text}" for name, text in rows]


def await_rows(path: Path, count: int) -> None:
    """Wait until so many messages are in the file."""
    wait_until(lambda: query(path, "SELECT count(*) FROM messages") == [(count,)])


def fill(path: Path, texts: Iterable[str], at: float = 0.0) -> None:
    """Make a file in which Ann has said this."""
    columns = "id INTEGER PRIMARY KEY, at REAL, name TEXT, text TEXT"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"CREATE TABLE messages({columns})")
        insert = "INSERT INTO messages(at, name, text) VALUES (?, 'Ann', ?)"
        connection.executemany(insert, [(at, text) for text in texts])


def numbers(count: int) -> list[str]:
    return [f"message {number}" for number in range(count)]


def say_all(speaker: Peer, texts: Iterable[str]) -> None:
    speaker.send("".join(f"{text}\n" for text in texts))


def history(peer: Peer, wanted: str = "") -> list[str]:
    """Ask for the history; return its messages, without date and time."""
    peer.say(f"/history {wanted}")
    peer.say("/who")
    shown = peer.until(f"* 1 online: {peer.name}")
    return [match[1] for line in shown if (match := HISTORY.fullmatch(line))]


def register(peer: Peer, password: str = PASSWORD) -> None:
    peer.say("/register")
    assert re.match(r"\? .*password", peer.line())
    peer.say(password)
    assert peer.line() == f"* The name {peer.name} is now kept for you."


def leave(peer: Peer) -> None:
    """Leave, and wait until the name is free."""
    peer.say("q")
    peer.rest()


def keep_name(chat: ServerProcess | Room, name: str) -> None:
    """Keep a name with PASSWORD; its owner is gone afterwards."""
    owner = chat.member(name)
    register(owner)
    leave(owner)


def asked(chat: ServerProcess | Room, name: str) -> Peer:
    """Return a connection that is asked for the password of a name."""
    peer = chat.connect()
    peer.name = name
    peer.say(name)
    assert re.match(r"\? .*password", peer.line())
    return peer


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- history: what is written -------------------------------------------------------


def test_the_table_has_what_was_said_when_by_whom(room: FileRoom, path: Path) -> None:
    before = time.time()
    alex, bob = room.members("Alex", "Bob")
    alex.say("hi\tall 👩‍👩‍👧")
    bob.line()
    bob.say("'); DROP TABLE messages; --")
    alex.line()

    room.stop()

    rows = query(path, "SELECT id, at, name, text FROM messages ORDER BY id")
    assert [row[2:] for row in rows] == [
        ("Alex", "hi    all 👩‍👩‍👧"),
        ("Bob", "'); DROP TABLE messages; --"),
    ]
    assert rows[0][0] < rows[1][0]
    assert before <= rows[0][1] <= rows[1][1] <= time.time()


def test_all_is_kept_in_the_order_in_which_all_saw_it_however_fast_it_was_said(
    start: StartFileRoom, path: Path, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Senders that are faster than the file are slowed, and nothing is left out.

    Also if another program has locked the file for a moment, and all go on at once.
    """
    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)
    monkeypatch.setattr(server, "MAX_UNWRITTEN", 500)  # instead of 10,000
    monkeypatch.setattr(server, "HANGS_SECONDS", HANG_SECONDS)  # instead of 1
    room = start(lines_per_second=0, tell_messages=False)
    reader, *speakers = [room.member(f"p{number}") for number in range(31)]
    reader.lines(30)

    with ThreadPoolExecutor(30) as pool:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for speaker in speakers:
                pool.submit(say_all, speaker, numbers(200))
            seen = reader.lines(251)
        seen += reader.lines(6000 - 251)

    room.stop()
    assert kept(path) == seen


def test_a_message_is_in_the_file_within_a_second(room: FileRoom, path: Path) -> None:
    alex = room.member("Alex")
    said_at = time.monotonic()
    alex.say("before")
    await_rows(path, 1)
    assert time.monotonic() - said_at < 1

    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM messages").fetchall()
        alex.say("meanwhile")
        await_rows(path, 2)

        assert reader.execute("SELECT count(*) FROM messages").fetchone() == (1,)


def test_what_is_not_said_to_the_room_is_neither_kept_nor_shown(
    room: FileRoom, path: Path, tmp_path: Path
) -> None:
    """Passwords, right and wrong, private messages, and lines that are refused."""
    alex, bob = room.members("Alex", "Bob")

    register(alex, "secret of Alex")
    alex.say("/register\nsecret")  # too short
    alex.say("/register secret too early\nsecret of another")
    alex.say("/mgs Bob secret\n/msg Bob secret\n/msg Nobody secret")
    alex.say("secret " + "x" * 4096)
    alex.send(b"secret \xff\n")
    assert bob.line() == "Alex (private): secret"
    assert_next(alex, bob)
    leave(alex)
    assert bob.line() == left("Alex")
    alex = asked(room, "Alex")
    alex.say("secret but wrong")
    assert alex.line().startswith("! ")
    assert_next(room.member("Carol", bob), bob)
    room.stop()

    assert "secret" not in "".join(room.told)
    assert b"secret" not in b"".join(files_of(tmp_path).values())
    assert len(kept(path)) == 2


def test_nobody_else_may_read_the_files(start: StartFileRoom, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        start()
    finally:
        os.umask(before)

    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {0o600}


# --- history: what is read ----------------------------------------------------------


def test_the_last_twenty_follow_the_welcome_in_local_time(
    start_process: StartServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "<+0545>-5:45")
    fill(path, numbers(21), at=1_000_000_000.0)
    chat = start_process()

    alex = chat.member("Alex")

    expected = [f"* [2001-09-09 07:31] Ann: {text}" for text in numbers(21)[1:]]
    assert alex.lines(20) == expected
    bob = chat.member("Bob", alex)
    assert bob.lines(20) == expected
    assert_next(alex, bob)


def test_newcomers_miss_nothing_and_get_nothing_twice(start: StartFileRoom) -> None:
    room = start(lines_per_second=0)
    ann = room.member("Ann")
    enough = threading.Event()

    def count_aloud() -> None:
        number = 0
        while not enough.is_set():
            say_all(ann, map(str, range(number, number + 100)))
            number += 100
        ann.say("that is all")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(count_aloud)
        newcomers = [room.member(f"newcomer{number}") for number in range(5)]
        enough.set()

    for newcomer in newcomers:
        lines = newcomer.until("Ann: that is all")
        said = [int(line.rpartition(" ")[2]) for line in lines if "Ann: " in line]
        assert said == list(range(said[0], said[-1] + 1))
        past = sum(line.startswith("* [") for line in lines)
        assert past == min(20, said[0] + past)


def test_a_newcomer_that_reads_slowly_misses_nothing_behind_its_welcome(
    start: StartFileRoom, path: Path
) -> None:
    fill(path, ["x" * 4000] * 20)
    room = start(small_buffers=True, lines_per_second=0)
    alex, bob = room.member("Alex"), room.member("Bob")
    slow = room.connect(receive_buffer=SMALL_BUFFER)
    slow.say("Slow")
    bob.gather("* Slow has joined the chat.".__eq__)

    for text in numbers(100):
        alex.say(text)
        assert bob.line() == f"Alex: {text}"

    assert slow.lines(121)[21:] == [f"Alex: {text}" for text in numbers(100)]


def test_what_was_said_and_who_keeps_a_name_outlast_a_restart(
    room: FileRoom, start: StartFileRoom
) -> None:
    keep_name(room, "Alex")
    room.member("Bob").say("yesterday")
    room.await_told("yesterday")
    room.stop()

    again = start()

    alex = asked(again, "Alex")
    alex.say(PASSWORD)
    assert alex.line().startswith("* Welcome, Alex!")
    alex.say("today")
    assert history(alex)[-2:] == ["Bob: yesterday", "Alex: today"]


def test_what_another_program_wrote_into_the_file_harms_nobody(
    start: StartFileRoom, path: Path
) -> None:
    fill(path, ["two\nlines\x1b[2J"])
    for at in ("noon", 1e300, None):
        row = (at, "Eve", b"\0")
        query(path, "INSERT INTO messages(at, name, text) VALUES (?, ?, ?)", *row)

    alex = start().member("Alex")

    assert alex.line().endswith("] Ann: two\ufffdlines\ufffd[2J")
    assert history(alex) == ["Ann: two\ufffdlines\ufffd[2J"]


def test_history_shows_the_last_messages(start: StartFileRoom, path: Path) -> None:
    fill(path, numbers(250))
    alex = start().member("Alex")
    alex.lines(20)

    for wanted in ("", "1", "199", "200", "201", "9" * 4000):
        last = numbers(250)[-min(int(wanted or 20), 200) :]
        assert history(alex, wanted) == [f"Ann: {text}" for text in last]
    for wanted in ("0", "-1", "all", "1.5", "2 3"):
        alex.say(f"/history {wanted}")
        assert alex.line() == "! Write it like this: /history 50."


def test_without_a_database_there_are_no_such_commands(
    start_room: StartRoom, room: FileRoom
) -> None:
    words = ("/history", "/register", "/unregister")
    alex, bob = start_room().member("Alex"), room.member("Bob")

    alex.say("\n".join(("/nonsense", *words, "/help", "/msg Alex done")))
    bob.say("/help\n/msg Bob done")

    unknown, *answers = alex.until("Alex (private): done")
    assert answers[:3] == [unknown.replace("/nonsense", word) for word in words]
    with_file = bob.until("Bob (private): done")
    assert len(with_file) == len(answers)
    for word in words:
        assert [line.startswith(f"* {word}") for line in with_file].count(True) == 1


# --- accounts -----------------------------------------------------------------------


NEW = "/register\n{}"
TRIED = "(5 of 5 tries on this connection)"


@pytest.mark.parametrize(
    ("inside", "replies", "outside", "answers"),
    [
        # What Alex says in the room, and then somebody at the door, up to a q; and the
        # marks of the lines that answer it.
        *((NEW.format("ü" * 7), "?!", "Alex", "*"), (NEW.format("ü" * 129), "?!", "", "")),
        *((NEW.format("ü" * n), "?*", f"Alex\n{'ü' * n}", "?*") for n in (8, 9, 127, 128)),
        (NEW.format("/register"), "?*", "Alex\n/register", "?*"),
        (NEW.format("\udcff" * 8), "?!", "Alex", "*"),
        (NEW.format("Q"), "?", "Alex", "*"),
        (NEW.format("the old one\n") + NEW.format(PASSWORD), "?*?*",
         f"Alex\nthe old one\nAlex\n{PASSWORD}", "?!?*"),
        (f"/register\n{PASSWORD}\n/unregister\n/unregister", "?**!", "Alex", "*"),
        # With the name kept by PASSWORD.
        *((None, "", f"{form}\n{PASSWORD}", "?*") for form in ("ALEX", "ＡＬＥＸ", " alex ")),
        *((None, "", "Alexa", "*"), (None, "", "Alex", "?"), (None, "", "Alex\nQ", "?")),
        (None, "", "a b\nAlex\nwrong\nc d\nAlex\n\nAlex\nALEX", "!?!!?!?!"),
        (None, "", "Alex\nwrong\n" * 4 + f"Alex\n{PASSWORD}", "?!?!?!?!?*"),
    ],
    ids=lambda value: str(value)[-20:],
)  # fmt: skip
def test_a_name_is_kept_by_its_last_password_of_8_to_128_characters_until_given_up(
    room: FileRoom, inside: str | None, replies: str, outside: str, answers: str
) -> None:
    """In any form.  A wrong password is one of five tries; q in its place leaves."""
    alex, bob = room.members("Alex", "Bob")
    if inside is None:
        inside, replies = NEW.format(PASSWORD), "?*"
    alex.send(f"{inside}\nq\n".encode("utf-8", "surrogateescape"))
    assert "".join(line[0] for line in alex.rest()) == replies
    assert bob.line() == left("Alex")  # who has heard nothing of it

    peer = room.connect()
    peer.say(f"{outside}\nq")

    lines = peer.rest()
    assert "".join(line[0] for line in lines) == answers
    fifth = answers.count("!") == 5
    assert [line for line in lines if TRIED in line] == lines[-1:] * fifth


def test_of_two_with_the_right_password_one_joins(room: FileRoom) -> None:
    """So a question from before a change of the password is not answered by it."""
    keep_name(room, "Alex")
    intruder, other, owner = (asked(room, "Alex") for _ in range(3))

    for peer in (owner, other):
        peer.say(PASSWORD)
    first, second = owner.line(), other.line()

    assert sorted((first[:9], second[:9])) == ["! The nam", "* Welcome"]
    winner = owner if first[0] == "*" else other
    winner.name = "Alex"
    register(winner, "a new password")
    leave(winner)
    intruder.say(PASSWORD)
    assert intruder.line().startswith("! ")


def test_scrypt_with_a_salt_each_is_kept(
    start: StartFileRoom, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the file as soon as the owner is told so."""
    monkeypatch.setattr(server, "GATHER_SECONDS", 0.1)  # instead of 0.005
    room = start()

    for name in ("Alex", "Bob"):
        keep_name(room, name)

    rows = query(path, "SELECT key, name, salt_and_hash, since FROM accounts")
    assert [row[:2] for row in rows] == [("alex", "Alex"), ("bob", "Bob")]
    salts = set()
    for *_, kept_bytes, since in rows:
        salt, kept_hash = kept_bytes[:16], kept_bytes[16:]
        salts.add(salt)
        cost: dict[str, int] = {"n": 2**14, "r": 8, "p": 1}
        assert kept_hash == hashlib.scrypt(PASSWORD.encode(), salt=salt, **cost)
        assert time.time() - 60 < since <= time.time()
    assert len(salts) == 2


def test_passwords_are_computed_when_the_system_has_no_more_threads(
    room: FileRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    alex = room.member("Alex")
    no_more = Mock(side_effect=RuntimeError("can't start new thread"))
    monkeypatch.setattr(threading.Thread, "start", no_more)

    register(alex)


def test_two_passwords_at_most_are_computed_and_nobody_else_is_delayed(
    room: FileRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_name(room, "Alex")
    entered, may_leave = threading.Semaphore(0), threading.Semaphore(0)

    def scrypt(password: bytes, **_: object) -> bytes:
        entered.release()
        may_leave.acquire(timeout=HANG_SECONDS)
        return bytes(password)

    monkeypatch.setattr(hashlib, "scrypt", scrypt)
    peers = [asked(room, "Alex") for _ in range(5)]

    for peer in peers:
        peer.say("not the password")
    for _ in range(2):
        assert entered.acquire(timeout=HANG_SECONDS)

    assert_next(*room.members("Bob", "Carol"))
    assert not entered.acquire(timeout=0.1)
    may_leave.release(5)
    assert [peer.line()[0] for peer in peers] == ["!"] * 5


def test_what_the_owner_sent_before_a_reset_is_its_own(room: FileRoom) -> None:
    """Also if the connection is reset while the password is computed."""
    keep_name(room, "Alex")
    bob = room.member("Bob")
    alex = asked(room, "Alex")

    alex.send(f"{PASSWORD}\nHello!\n")
    alex.reset()

    said = ["* Alex has joined the chat.", "Alex: Hello!", left("Alex")]
    assert bob.lines(3) == said


def test_a_shutdown_does_not_wait_for_passwords(start_process: StartServer) -> None:
    """That of 150 takes 3 s and more."""
    chat = start_process()
    keep_name(chat, "Alex")
    for peer in [asked(chat, "Alex") for _ in range(150)]:
        peer.say("not the password")

    interrupted_at = time.monotonic()
    chat.stop()

    assert time.monotonic() - interrupted_at < 2


HISTORY_FLOOD = "/history 200                         \n" * 900


def test_a_shutdown_does_not_wait_for_answers(
    start_process: StartServer, path: Path
) -> None:
    """Forty members have asked for seven million lines."""
    fill(path, ["x" * 4000] * 200)
    chat = start_process()
    for name in numbers(40):
        chat.member(name.replace(" ", "-")).send(HISTORY_FLOOD)

    interrupted_at = time.monotonic()
    chat.stop()

    assert time.monotonic() - interrupted_at < 2


def test_answers_for_one_that_is_gone_do_not_keep_its_name(
    start: StartFileRoom, path: Path
) -> None:
    fill(path, ["x" * 4000] * 200)
    room = start()
    bob, *ghosts = [room.member(name) for name in ("Bob", *"abcdefghij")]
    for ghost in ghosts:
        ghost.send(HISTORY_FLOOD)
    reset_at = time.monotonic()

    for ghost in ghosts:
        ghost.reset()

    for _ in ghosts:
        bob.gather(lambda line: line.endswith(" has left the chat."))
    assert time.monotonic() - reset_at < 10


# --- faults -------------------------------------------------------------------------


Mend = Callable[[], object]


def fill_the_disk(chat: ServerProcess, path: Path) -> Mend:
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("no prlimit on this system")
    limit = resource.RLIMIT_FSIZE
    before = resource.prlimit(chat.process.pid, limit, (1, resource.RLIM_INFINITY))
    return lambda: resource.prlimit(chat.process.pid, limit, before)


def move_the_file(chat: ServerProcess, path: Path) -> Mend:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    return lambda: elsewhere.rename(path)


def put_another_there(chat: ServerProcess, path: Path) -> Mend:
    mend = move_the_file(chat, path)
    path.write_bytes(b"")
    return mend


def truncate_the_file(chat: ServerProcess, path: Path) -> Mend:
    content = path.read_bytes()
    os.truncate(path, 0)
    return lambda: path.write_bytes(content)


def lock_the_file(chat: ServerProcess, path: Path) -> Mend:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    return other.close


@pytest.mark.parametrize(
    "fault",
    [fill_the_disk, move_the_file, put_another_there, truncate_the_file, lock_the_file],
)
def test_the_chat_goes_on_without_its_file_and_nothing_is_lost(
    start_process: StartServer, path: Path, fault: Callable[..., Mend]
) -> None:
    chat = start_process("--quiet", patch=QUICK)
    alex, bob = chat.members("Alex", "Bob")
    alex.say("before")
    assert bob.line() == "Alex: before"
    await_rows(path, 1)

    mend = fault(chat, path)
    alex.say("meanwhile")
    assert bob.line() == "Alex: meanwhile"
    told = chat.output.until("Cannot write to the database for now: ")
    assert_next(alex, bob)
    mend()

    told += chat.output.until("The database is written again.")
    assert len([line for line in told if "database" in line]) == 2
    chat.stop()
    assert kept(path)[:2] == ["Alex: before", "Alex: meanwhile"]
    assert len(kept(path)) == 3
    assert chat.end() == ""


@pytest.mark.parametrize(
    ("messages", "left_out"), [(49, 0), (50, 0), (51, 1), (3, 3)], ids=str
)
def test_so_many_messages_wait_for_the_file_and_what_is_not_kept_is_counted(
    start: StartFileRoom, path: Path, monkeypatch: pytest.MonkeyPatch, messages: int,
    left_out: int,
) -> None:  # fmt: skip
    """The last three in vain: their file does not come back before the end."""
    monkeypatch.setattr(server, "MAX_UNWRITTEN", 50)  # instead of 10,000
    monkeypatch.setattr(server, "HANGS_SECONDS", 0.02)  # instead of 1
    monkeypatch.setattr(server, "RETRY_SECONDS", 0.02)  # instead of 0.2
    room = start(tell_messages=False)
    alex, bob = room.members("Alex", "Bob")
    elsewhere = path.rename(path.with_name("elsewhere"))
    for _ in range(messages):
        assert_next(alex, bob)
    room.await_told("Cannot write to the database for now: ")

    if messages > left_out:
        elsewhere.rename(path)
        room.await_told("The database is written again.")
    else:
        monkeypatch.setattr(server, "LAST_SECONDS", 0.1)  # instead of 0.3
    room.stop()

    counts = re.findall(r"\((\d+) messages left out of", "\n".join(room.told))
    assert sum(map(int, counts)) == left_out
    assert len(kept(path if path.exists() else elsewhere)) == messages - left_out


def test_a_flood_waits_for_the_file_and_who_just_says_something_does_not(
    start: StartFileRoom, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_UNWRITTEN", 200)  # instead of 10,000
    monkeypatch.setattr(server, "HANGS_SECONDS", 9 * HANG_SECONDS)  # instead of 1
    monkeypatch.setattr(server, "BUSY_SECONDS", 9 * HANG_SECONDS)  # instead of 1
    room = start(lines_per_second=0)
    flooder, alex, bob = room.members("Flooder", "Alex", "Bob")

    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        flooder.send("".join(f"{text}\n" for text in numbers(400)))
        bob.lines(100)
        alex.say("hi")
        bob.until("Alex: hi")


def test_a_file_that_hangs_is_told_and_not_waited_for(
    start: StartFileRoom, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_UNWRITTEN", 20)  # instead of 10,000
    monkeypatch.setattr(server, "HANGS_SECONDS", 0.02)  # instead of 1
    monkeypatch.setattr(server, "BUSY_SECONDS", 9 * HANG_SECONDS)  # instead of 1
    room = start(tell_messages=False)
    alex, bob = room.members("Alex", "Bob")

    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(15):
            assert_next(alex, bob)
        alex.say("/register")
        alex.gather(lambda line: line.startswith("? "))
        alex.say(PASSWORD)
        assert alex.line().startswith("! ")
        room.await_told("Cannot write to the database for now: ")

    room.await_told("The database is written again.")
    room.stop()
    assert len(kept(path)) == 15
    assert query(path, "SELECT name FROM accounts") == [("Alex",)]


def test_a_kill_in_a_flood_costs_the_end_of_it_at_most_and_leaves_the_file_free(
    start: StartFileRoom, start_process: StartServer, path: Path
) -> None:
    chat = start_process("--quiet")
    reader, *speakers = chat.members("Reader", "Alex", "Bob")

    def flood(speaker: Peer) -> None:
        with suppress(OSError):  # the server is gone
            while True:
                say_all(speaker, numbers(100))

    with ThreadPoolExecutor(2) as pool:
        for speaker in speakers:
            pool.submit(flood, speaker)
        seen = reader.lines(1000)
        wait_until(lambda: len(kept(path)) >= 1000)

        chat.process.kill()

    with suppress(OSError, AssertionError):  # a reset, or the end
        while True:
            seen.append(reader.line())
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    there = kept(path)
    both = min(len(there), len(seen))
    assert both >= 1000
    assert there[:both] == seen[:both]
    carol = start().member("Carol")
    assert len(carol.lines(20)) == 20
    assert history(carol) == there[-20:]


_MAKE_AND_CRASH = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.executescript(sys.argv[2])
os.abort()
"""


def make_and_crash(path: Path, script: str) -> None:
    """Make a database as a program does that dies then."""
    command = [sys.executable, "-c", _MAKE_AND_CRASH, str(path), script]
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


MESSAGES = (
    "CREATE TABLE messages(id INTEGER PRIMARY KEY, at REAL, name TEXT, text TEXT)"
)
CHANGES = {
    "written to a log": f"PRAGMA journal_mode = WAL; {MESSAGES};"
    "INSERT INTO messages VALUES (NULL, 0.0, 'Ann', 'hi')",
    "to be rolled back": f"{MESSAGES}; INSERT INTO messages VALUES (NULL, 0.0, 'Ann', 'hi');"
    "PRAGMA cache_size = 1; BEGIN; INSERT INTO messages WITH RECURSIVE n(i) AS"
    "(VALUES (2) UNION ALL SELECT i + 1 FROM n LIMIT 9999) SELECT i, i, i, i FROM n",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_whose_program_died_in_the_midst_of_a_change_opens(
    start: StartFileRoom, path: Path, change: str
) -> None:
    make_and_crash(path, CHANGES[change])
    beside = "chat.db-wal" if "log" in change else "chat.db-journal"
    assert path.with_name(beside).stat().st_size > 0

    bob = start().member("Bob")

    assert bob.line().endswith("] Ann: hi")
    assert len(history(bob)) == 1


# --- files that are refused ---------------------------------------------------------


KINDS = {
    "of another program": "CREATE TABLE sheep(name)",
    "with other columns": "CREATE TABLE messages(id, sheep)",
    "with columns of other types": "CREATE TABLE messages(id, at, name, text)",
    "with a journal": "PRAGMA cache_size = 1; CREATE TABLE sheep(name); BEGIN;"
    "INSERT INTO sheep WITH RECURSIVE n(i) AS"
    "(VALUES (2) UNION ALL SELECT i + 1 FROM n LIMIT 9999) SELECT i FROM n",
    "with a log": "PRAGMA journal_mode = WAL; CREATE TABLE sheep(name)",
}


def test_what_is_no_file_of_this_chat_is_refused_untouched(tmp_path: Path) -> None:
    paths = [tmp_path / kind / "chat.db" for kind in ("no database", *KINDS)]
    for path in paths:
        path.parent.mkdir()
        if script := KINDS.get(path.parent.name):
            make_and_crash(path, script)
        else:
            path.write_text("Dear diary\n" * 1000)
    for path, kind in zip(paths[-2:], ("journal", "wal"), strict=True):
        assert path.with_name(f"chat.db-{kind}").stat().st_size > 0
    before = [files_of(path.parent) for path in paths]
    changed_at = [path.stat().st_mtime_ns for path in paths]

    loop = tmp_path / "loop"
    loop.symlink_to(loop)

    *_, missing = refusals(*paths, tmp_path, "", loop, tmp_path / "no" / "chat.db")

    assert "No such file" in missing

    for path, files in zip(paths, before, strict=True):
        after = files_of(path.parent)
        for each in (files, after):
            each.pop("chat.db-shm", None)  # how its readers know of one another
        assert after == files
    assert [path.stat().st_mtime_ns for path in paths] == changed_at


def refusals(*paths: Path | str) -> list[str]:
    """Start servers that must not start; return what they say."""
    flags = [("--port", "0", "--database", str(path)) for path in paths]
    lines = explanations(1, *flags)
    assert all(line.startswith("server.py: cannot use ") for line in lines)
    assert "Errno" not in "".join(lines)
    return lines


def test_a_file_that_another_server_has_is_refused(
    start_process: StartServer, path: Path, tmp_path: Path
) -> None:
    alex = start_process().member("Alex")
    alex.say("mine")
    await_rows(path, 1)
    before = path.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(path)

    lines = refusals(path, link)

    assert all("another server has it" in line for line in lines)
    assert path.read_bytes() == before
    alex.say("still mine")
    await_rows(path, 2)


# --- over the network ---------------------------------------------------------------


def test_stunnel_in_front_encrypts_passwords(
    start_process: StartServer, tmp_path: Path
) -> None:
    program, openssl = shutil.which("stunnel4"), shutil.which("openssl")
    if not (program and openssl):
        pytest.skip("needs stunnel (Debian: stunnel4) and openssl")
    key, certificate = f"{tmp_path}/key.pem", f"{tmp_path}/cert.pem"
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=chat", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [openssl, *make.split(), *names, "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    configuration = tmp_path / "stunnel.conf"
    configuration.write_text(
        f"foreground = yes\npid =\n[chat]\naccept = {address}\n"
        f"connect = {start_process().address}\ncert = {certificate}\nkey = {key}\n"
    )
    context = ssl.create_default_context(cafile=certificate)

    with subprocess.Popen([program, configuration], stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr
            LineReader(process.stderr.fileno()).until("Configuration successful")
            peer = Peer(address)
            peer.socket = context.wrap_socket(peer.socket, server_hostname="127.0.0.1")
            with peer.socket:
                peer.join("Alex")
                register(peer)
                peer.say("q")

                assert peer.rest() == []
        finally:
            process.kill()
