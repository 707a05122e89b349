"""What is said stays, and a name can be kept: `python server.py --database FILE`.

Most tests run the real program, since a file outlives it.  A few take longer than a
quarter of a second: those that wait for a lock, or need more messages than fit.
"""

from __future__ import annotations

import hashlib
import os
import re
import select
import shutil
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    HANG_SECONDS,
    PROJECT,
    LineReader,
    Peer,
    Room,
    ServerProcess,
    assert_next,
    run_server,
)

import server

StartServer = Callable[..., ServerProcess]

PASSWORD = "correct horse"
KEPT = "* The name {} is now kept for you."
WAITING = 10_000  # messages that may wait for the file
HISTORY = re.compile(r"\* \[\d{4}-\d\d-\d\d \d\d:\d\d\] (.*)")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file; there is none yet."""
    return tmp_path / "chat.db"


@pytest.fixture
def start(start_server: StartServer, path: Path) -> StartServer:
    """Start servers that keep what is said in the file."""

    def run(*flags: str, **options: Any) -> ServerProcess:
        return start_server("--database", str(path), *flags, **options)

    return run


def query(path: Path, statement: str, *values: object) -> list[Any]:
    """Do as another program does that opens the file while the server runs."""
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def kept(path: Path) -> list[str]:
    """Return what is in the file, as members see it."""
    rows = query(path, "SELECT name, text FROM messages ORDER BY id")
    return [f"{name}: {text}" for name, text in rows]


def await_rows(path: Path, count: int) -> None:
    """Wait until so many messages are in the file; nothing tells, so it looks often."""
    give_up_at = time.monotonic() + HANG_SECONDS
    while (there := query(path, "SELECT count(*) FROM messages")[0][0]) < count:
        assert time.monotonic() < give_up_at, f"{there} of {count}"
        select.select([], [], [], 0.005)


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


def stop(chat: ServerProcess) -> list[str]:
    """End the server in order; return the rest of what its terminal shows."""
    chat.interrupt()
    shown = chat.output.rest()
    assert chat.wait() == 0
    return shown


def register(peer: Peer, password: str = PASSWORD) -> None:
    peer.say("/register")
    assert peer.line().startswith("? ")
    peer.say(password)
    assert peer.line() == KEPT.format(peer.name)


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
    question = peer.line()
    assert question.startswith("? ")
    assert "password" in question
    return peer


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- history: what is written -------------------------------------------------------


def test_the_table_has_what_was_said_when_and_by_whom(
    start: StartServer, path: Path
) -> None:
    before = time.time()
    chat = start()
    alex, bob = chat.members("Alex", "Bob")
    alex.say("hi\tall 👩‍👩‍👧")
    bob.line()
    bob.say("//who")
    alex.line()

    stop(chat)

    rows = query(path, "SELECT id, at, name, text FROM messages ORDER BY id")
    assert [row[2:] for row in rows] == [("Alex", "hi    all 👩‍👩‍👧"), ("Bob", "/who")]
    assert rows[0][0] < rows[1][0]
    assert before <= rows[0][1] <= rows[1][1] <= time.time()


def test_messages_are_kept_in_the_order_in_which_all_saw_them(
    start: StartServer, path: Path
) -> None:
    chat = start("--rate", "0", "--quiet")
    reader, *speakers = chat.members("Reader", "Alex", "Bob", "Carol")

    for speaker in speakers:
        say_all(speaker, numbers(1000))

    seen = reader.lines(3000)
    stop(chat)
    assert kept(path) == seen


def test_senders_that_are_faster_than_the_file_are_slowed_and_nothing_is_lost(
    start: StartServer, path: Path
) -> None:
    chat = start("--rate", "0", "--quiet")
    reader, *speakers = chat.members("Reader", "Alex", "Bob", "Carol")
    floods = [
        threading.Thread(target=say_all, args=(speaker, numbers(20_000)))
        for speaker in speakers
    ]

    for flood in floods:
        flood.start()

    reader.lines(60_000)
    for flood in floods:
        flood.join()
    stop(chat)
    assert query(path, "SELECT count(*) FROM messages") == [(60_000,)]


def test_a_message_is_in_the_file_within_a_second(
    start: StartServer, path: Path
) -> None:
    alex = start().member("Alex")

    said_at = time.monotonic()
    alex.say("soon")
    await_rows(path, 1)

    assert time.monotonic() - said_at < 1


def test_another_program_that_reads_the_file_holds_nothing_up(
    start: StartServer, path: Path
) -> None:
    alex = start().member("Alex")
    alex.say("before")
    await_rows(path, 1)

    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM messages").fetchall()
        alex.say("meanwhile")
        await_rows(path, 2)

        assert reader.execute("SELECT count(*) FROM messages").fetchone() == (1,)


def test_what_is_not_said_to_the_room_is_neither_kept_nor_shown(
    start: StartServer, path: Path, tmp_path: Path
) -> None:
    chat = start()
    alex, bob = chat.members("Alex", "Bob")

    register(alex, "secret of Alex")
    alex.say("/register")
    alex.say("secret")  # too short
    alex.say("/register secret too early")
    alex.say("secret of another")
    alex.say("/mgs Bob secret")
    alex.say("/msg Bob secret")
    alex.say("/msg Nobody secret")
    alex.say("secret " + "x" * 4096)
    alex.send(b"secret \xff\n")
    assert bob.line() == "Alex (private): secret"
    assert_next(alex, bob)
    leave(alex)
    alex = asked(chat, "Alex")
    alex.say("secret but wrong")
    alex.line()

    assert "secret" not in "".join(stop(chat))
    assert b"secret" not in b"".join(files_of(tmp_path).values())
    assert len(kept(path)) == 1


def test_text_and_names_are_no_sql(start: StartServer, path: Path) -> None:
    chat = start()
    alex = chat.member("Alex")

    alex.say("'); DROP TABLE messages; --")
    await_rows(path, 1)

    assert kept(path) == ["Alex: '); DROP TABLE messages; --"]


def test_nobody_else_may_read_the_files(start: StartServer, tmp_path: Path) -> None:
    chat = start(limits="umask 0")
    chat.member("Alex")

    modes = {
        file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()
    }

    assert set(modes.values()) == {0o600}, modes


# --- history: what is read ----------------------------------------------------------


def test_the_last_twenty_follow_the_welcome_in_local_time(
    start: StartServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "<+0545>-5:45")
    fill(path, numbers(21), at=1_000_000_000.0)
    chat = start()

    alex = chat.member("Alex")

    expected = [f"* [2001-09-09 07:31] Ann: {text}" for text in numbers(21)[1:]]
    assert alex.lines(20) == expected
    bob = chat.member("Bob")
    assert alex.line() == "* Bob has joined the chat."
    assert bob.lines(20) == expected
    assert_next(alex, bob)


def test_newcomers_miss_nothing_and_get_nothing_twice_in_a_flood(
    start: StartServer,
) -> None:
    chat = start("--rate", "0", "--quiet")
    ann = chat.member("Ann")
    enough = threading.Event()
    flood = threading.Thread(target=_count_aloud, args=(ann, enough))
    flood.start()

    newcomers = [chat.member(f"newcomer{number}") for number in range(5)]
    enough.set()
    flood.join()
    shown = [newcomer.until("Ann: that is all") for newcomer in newcomers]

    for lines in shown:
        said = [int(line.rpartition(" ")[2]) for line in lines if "Ann: " in line]
        assert said == list(range(said[0], said[-1] + 1))
        kept_ones = sum(line.startswith("* [") for line in lines)
        assert kept_ones == min(20, said[0] + kept_ones)


def _count_aloud(speaker: Peer, enough: threading.Event) -> None:
    number = 0
    while not enough.is_set():
        say_all(speaker, map(str, range(number, number + 100)))
        number += 100
    speaker.say("that is all")


def test_history_goes_on_after_a_restart(start: StartServer) -> None:
    first = start()
    first.member("Alex").say("yesterday")
    first.output.until("yesterday")
    stop(first)

    bob = start().member("Bob")
    bob.say("today")

    assert history(bob)[-2:] == ["Alex: yesterday", "Bob: today"]


@pytest.mark.parametrize(
    ("wanted", "count"),
    [("", 20), ("1", 1), ("199", 199), ("200", 200), ("201", 200), ("999999999", 200)],
)
def test_history_shows_the_last_messages(
    start: StartServer, path: Path, wanted: str, count: int
) -> None:
    fill(path, numbers(250))
    alex = start().member("Alex")
    alex.lines(20)

    shown = history(alex, wanted)

    assert shown == [f"Ann: {text}" for text in numbers(250)[-count:]]


@pytest.mark.parametrize("wanted", ["0", "-1", "all", "1.5", "2 3", "9" * 500])
def test_history_of_what_is_no_number_is_refused(
    room_with_file: Room, wanted: str
) -> None:
    alex = room_with_file.member("Alex")

    alex.say(f"/history {wanted}")

    assert alex.line() == "! Write it like this: /history 50."


def test_a_million_messages_delay_neither_the_start_nor_the_history(
    start: StartServer, path: Path
) -> None:
    fill(path, [])
    query(
        path,
        "INSERT INTO messages(at, name, text) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL"
        " SELECT i + 1 FROM n LIMIT 1000000) SELECT i, 'Ann', 'message ' || i FROM n",
    )

    started_at = time.monotonic()
    alex = start().member("Alex")
    joined_at = time.monotonic()
    alex.lines(20)
    asked_at = time.monotonic()
    shown = history(alex, "200")

    assert time.monotonic() - asked_at < 0.05
    assert joined_at - started_at < 1
    assert len(shown) == 200


# --- without the flag ---------------------------------------------------------------


def test_without_a_database_there_are_no_such_commands(
    start_server: StartServer,
) -> None:
    chat = start_server()
    alex = chat.member("Alex")

    alex.say("/nonsense\n/history\n/register\n/unregister\n/help")

    unknown, *others, first, _, _, last = alex.lines(8)
    words = ("/history", "/register", "/unregister")
    assert others == [unknown.replace("/nonsense", word) for word in words]
    assert (first[:7], last[:4]) == ("* /who:", "* q,")
    assert_next(alex)
    opened = [os.readlink(f) for f in Path(f"/proc/{chat.process.pid}/fd").iterdir()]
    assert not [name for name in opened if name.startswith(str(PROJECT))]


# --- accounts -----------------------------------------------------------------------


@pytest.fixture
def room_with_file(tmp_path: Path) -> Iterator[Room]:
    """A server with a file, in a thread of this process."""
    database = server.Database(str(tmp_path / "room.db"), lambda lines: None)
    room = Room(database=database)  # type: ignore[arg-type]
    yield room
    room.close_peers()
    room.stop()
    database.close(HANG_SECONDS)


def test_the_owner_of_a_kept_name_joins_with_the_password(start: StartServer) -> None:
    chat = start()
    keep_name(chat, "Alex")

    alex = asked(chat, "Alex")
    alex.say(PASSWORD)

    assert alex.line().startswith("* Welcome, Alex!")


def test_a_name_stays_kept_over_a_restart(start: StartServer) -> None:
    first = start()
    keep_name(first, "Alex")
    stop(first)

    alex = asked(start(), "Alex")
    alex.say(PASSWORD)

    assert alex.line().startswith("* Welcome, Alex!")


@pytest.mark.parametrize("form", ["ALEX", "ＡＬＥＸ", "  alex  "])
def test_any_form_of_a_kept_name_is_asked_for_the_password(
    room_with_file: Room, form: str
) -> None:
    keep_name(room_with_file, "Alex")

    asked(room_with_file, form).say("not the password")


def test_another_name_is_not_asked(room_with_file: Room) -> None:
    keep_name(room_with_file, "Alex")

    room_with_file.member("Alexa")


def test_a_wrong_password_is_one_of_five_tries(room_with_file: Room) -> None:
    keep_name(room_with_file, "Alex")
    peer = room_with_file.connect()

    peer.say("a b\nAlex\nnot the password\nc d\nAlex\n\nAlex\nALEX")

    replies = peer.rest()
    assert [reply[0] for reply in replies] == list("!?!!?!?!")
    assert "(5 of 5 tries on this connection)" not in "".join(replies[:-1])
    assert replies[-1].endswith("(5 of 5 tries on this connection)")


def test_the_right_password_at_the_fifth_try_joins(room_with_file: Room) -> None:
    keep_name(room_with_file, "Alex")
    peer = room_with_file.connect()

    peer.say("Alex\nnot the password\n" * 4 + f"Alex\n{PASSWORD}")

    assert peer.lines(10)[-1].startswith("* Welcome, Alex!")


def test_the_room_hears_nothing_of_a_password(room_with_file: Room) -> None:
    bob, carol = room_with_file.members("Bob", "Carol")
    register(bob)

    intruder = asked_later = room_with_file.connect()
    leave(bob)
    assert carol.line() == "* Bob has left the chat."
    intruder.say("Bob\nnot the password")
    assert [line[0] for line in asked_later.lines(2)] == ["?", "!"]

    dave = room_with_file.member("Dave")
    assert carol.line() == "* Dave has joined the chat."
    assert_next(dave, carol)


def test_while_the_owner_is_in_the_name_is_taken(room_with_file: Room) -> None:
    register(room_with_file.member("Alex"))
    other = room_with_file.connect()

    other.say("alex")

    assert other.line() == "! The name alex is taken."


def test_of_two_with_the_right_password_one_joins(room_with_file: Room) -> None:
    keep_name(room_with_file, "Alex")
    peers = [asked(room_with_file, "Alex") for _ in range(2)]

    for peer in peers:
        peer.say(PASSWORD)

    assert sorted(peer.line()[:9] for peer in peers) == ["! The nam", "* Welcome"]


@pytest.mark.parametrize("farewell", ["q", "Q"])
def test_q_at_the_password_leaves(room_with_file: Room, farewell: str) -> None:
    keep_name(room_with_file, "Alex")
    peer = asked(room_with_file, "Alex")

    peer.say(farewell)

    assert peer.rest() == []


def test_q_as_the_new_password_leaves(room_with_file: Room) -> None:
    alex = room_with_file.member("Alex")

    alex.say("/register\nq")

    assert [line[0] for line in alex.rest()] == ["?"]
    room_with_file.member("Alex")


def test_registering_again_changes_the_password(room_with_file: Room) -> None:
    alex = room_with_file.member("Alex")
    register(alex, "the old one")
    register(alex, PASSWORD)
    leave(alex)
    peer = room_with_file.connect()

    peer.say(f"Alex\nthe old one\nAlex\n{PASSWORD}")

    assert [line[0] for line in peer.lines(4)] == list("?!?*")


def test_an_old_password_does_not_answer_a_question_from_before_the_change(
    room_with_file: Room,
) -> None:
    keep_name(room_with_file, "Alex")
    intruder = asked(room_with_file, "Alex")
    owner = asked(room_with_file, "Alex")
    owner.say(PASSWORD)
    owner.line()
    register(owner, "a new password")
    leave(owner)

    intruder.say(PASSWORD)

    assert intruder.line().startswith("! ")


def test_a_name_that_is_given_up_is_free_for_all(
    start: StartServer, path: Path
) -> None:
    chat = start()
    alex = chat.member("Alex")
    register(alex)

    alex.say("/unregister")

    assert alex.line() == "* The name Alex is no longer kept."
    assert query(path, "SELECT * FROM accounts") == []
    leave(alex)
    chat.member("Alex")


def test_a_name_that_is_not_kept_cannot_be_given_up(room_with_file: Room) -> None:
    alex = room_with_file.member("Alex")

    alex.say("/unregister")

    assert alex.line() == "! The name Alex is not kept."


@pytest.mark.parametrize(
    ("password", "mark"),
    [("", "!"), ("ü" * 7, "!"), ("ü" * 8, "*"), ("ü" * 128, "*"), ("ü" * 129, "!"),
     ("/register", "*"), ("\udcff" * 8, "!")],
)  # fmt: skip
def test_a_password_has_8_to_128_characters(
    room_with_file: Room, password: str, mark: str
) -> None:
    alex, bob = room_with_file.members("Alex", "Bob")

    alex.send(f"/register\n{password}\n".encode("utf-8", "surrogateescape"))

    assert [line[0] for line in alex.lines(2)] == ["?", mark]
    assert_next(alex, bob)  # the next line is a message again


def test_scrypt_with_a_salt_each_is_kept(start: StartServer, path: Path) -> None:
    chat = start()

    for name in ("Alex", "Bob"):
        keep_name(chat, name)

    rows = query(path, "SELECT key, name, salt, hash, n, r, p, since FROM accounts")
    assert [row[:2] for row in rows] == [("alex", "Alex"), ("bob", "Bob")]
    assert rows[0][2] != rows[1][2]
    for _, _, salt, kept_hash, n, r, p, since in rows:
        assert (n, r, p) == (2**14, 8, 1)
        assert len(salt) >= 16
        assert kept_hash == hashlib.scrypt(PASSWORD.encode(), salt=salt, n=n, r=r, p=p)
        assert time.time() - 60 < since <= time.time()


class _Gate:
    """Stands for scrypt: each call waits until it is let through."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.may_leave = threading.Semaphore(0)

    def scrypt(self, password: bytes, **_: object) -> bytes:
        self.entered.release()
        self.may_leave.acquire(timeout=HANG_SECONDS)
        return bytes(password)


def test_two_passwords_at_most_are_computed_and_nobody_else_is_delayed(
    room_with_file: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_name(room_with_file, "Alex")
    gate = _Gate()
    monkeypatch.setattr(hashlib, "scrypt", gate.scrypt)
    peers = [asked(room_with_file, "Alex") for _ in range(5)]

    for peer in peers:
        peer.say("not the password")
    for _ in range(2):
        assert gate.entered.acquire(timeout=HANG_SECONDS)

    assert_next(*room_with_file.members("Bob", "Carol"))
    assert not gate.entered.acquire(timeout=0.2)
    gate.may_leave.release(5)
    assert [peer.line()[0] for peer in peers] == ["!"] * 5


def test_a_shutdown_does_not_wait_for_the_passwords_of_many(start: StartServer) -> None:
    chat = start()
    keep_name(chat, "Alex")
    peers = [asked(chat, "Alex") for _ in range(150)]
    for peer in peers:
        peer.say("not the password")

    interrupted_at = time.monotonic()
    stop(chat)

    assert time.monotonic() - interrupted_at < 2


def test_a_traceback_shows_no_password(
    room_with_file: Room,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def scrypt(password: bytes, **_: object) -> bytes:
        raise MemoryError("a bug")

    monkeypatch.setattr(hashlib, "scrypt", scrypt)
    alex = room_with_file.member("Alex")

    alex.say(f"/register\n{PASSWORD}")

    alex.rest()
    errors = capfd.readouterr().err
    assert "MemoryError: a bug" in errors
    assert PASSWORD not in errors


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


Fault = Callable[[ServerProcess, Path], Mend]
FAULTS = [fill_the_disk, move_the_file, put_another_there, truncate_the_file]
FAULTS += [lock_the_file]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_chat_goes_on_without_its_file_and_nothing_is_lost(
    start: StartServer, path: Path, fault: Fault
) -> None:
    chat = start("--quiet")
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
    stop(chat)
    assert kept(path)[:2] == ["Alex: before", "Alex: meanwhile"]
    assert len(kept(path)) == 3


@pytest.mark.parametrize("fault", [move_the_file, lock_the_file])
def test_what_could_not_be_kept_is_counted_at_the_end(
    start: StartServer, path: Path, fault: Fault
) -> None:
    chat = start("--quiet")
    alex = chat.member("Alex")
    _ = fault(chat, path)  # kept, since a lock ends with its connection
    say_all(alex, numbers(3))
    alex.say("/who")
    alex.line()
    chat.output.until("Cannot write to the database for now: ")

    told = stop(chat)

    assert "(3 messages left out of the database)" in told


def test_a_file_that_is_made_read_only_is_still_written(
    start: StartServer, path: Path
) -> None:
    alex = start().member("Alex")

    path.chmod(0o400)
    alex.say("still")

    await_rows(path, 1)


@pytest.mark.parametrize("messages", [WAITING - 1, WAITING, WAITING + 1])
def test_ten_thousand_messages_wait_and_more_are_counted(
    start: StartServer, path: Path, messages: int
) -> None:
    chat = start("--quiet", "--rate", "0")
    alex, bob = chat.members("Alex", "Bob")
    mend = move_the_file(chat, path)
    say_all(alex, numbers(WAITING - 1))
    bob.until(f"Alex: {numbers(WAITING - 1)[-1]}")
    for _ in range(messages - WAITING + 1):
        assert_next(alex, bob)
    chat.output.until("Cannot write to the database for now: ")

    mend()
    chat.output.until("The database is written again.")
    told = stop(chat)

    left_out = max(0, messages - WAITING)
    assert ("(1 messages left out of the database)" in told) == (left_out == 1)
    assert len(kept(path)) == messages - left_out


def test_a_kill_in_a_flood_costs_the_end_of_it_at_most(
    start: StartServer, path: Path
) -> None:
    chat = start("--quiet")
    reader, *speakers = chat.members("Reader", "Alex", "Bob")
    floods = [
        threading.Thread(target=_flood_until_reset, args=(speaker,))
        for speaker in speakers
    ]
    for flood in floods:
        flood.start()
    seen = reader.lines(1000)
    await_rows(path, 1000)

    chat.process.kill()

    for flood in floods:
        flood.join(HANG_SECONDS)
    seen += _lines_until_reset(reader)
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    there = kept(path)
    both = min(len(there), len(seen))
    assert both > 1000
    assert there[:both] == seen[:both]


def _flood_until_reset(speaker: Peer) -> None:
    try:
        while True:
            say_all(speaker, numbers(100))
    except OSError:
        pass  # the server is gone


def _lines_until_reset(reader: Peer) -> list[str]:
    lines = []
    try:
        while True:
            lines.append(reader.line())
    except (OSError, AssertionError):
        return lines


def test_a_server_that_was_killed_leaves_the_file_free(
    start: StartServer, path: Path
) -> None:
    killed = start()
    killed.member("Alex").say("last words")
    await_rows(path, 1)
    killed.process.kill()
    killed.wait()

    assert history(start().member("Bob"))[-1] == "Alex: last words"


# --- files that are refused ---------------------------------------------------------


def refusal(path: Path | str) -> str:
    """Start a server that must not start; return what it says."""
    ended = run_server("--port", "0", "--database", str(path))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("server.py: cannot use ")
    assert ended.stderr.count("\n") == 1
    assert "Errno" not in ended.stderr
    return ended.stderr


def text_file(path: Path) -> None:
    path.write_text("Dear diary\n" * 1000)


def other_database(path: Path) -> None:
    query(path, "CREATE TABLE sheep(name)")


def same_table_other_columns(path: Path) -> None:
    query(path, "CREATE TABLE messages(id, sheep)")


def next_version(path: Path) -> None:
    fill(path, ["from the future"])
    query(path, "PRAGMA user_version = 2")


def other_database_after_a_crash(path: Path) -> None:
    script = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.executescript("
        "'PRAGMA journal_mode = WAL; CREATE TABLE sheep(name);'); os.abort()"
    )
    command = [sys.executable, "-c", script, str(path)]
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0


@pytest.mark.parametrize(
    "make",
    [text_file, other_database, same_table_other_columns, next_version,
     other_database_after_a_crash],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_untouched(
    path: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(path)
    before = files_of(tmp_path)

    refusal(path)

    after = files_of(tmp_path)
    shared_memory = f"{path.name}-shm"  # how its readers know of one another
    before.pop(shared_memory, None)
    after.pop(shared_memory, None)
    assert after == before


@pytest.mark.parametrize(
    ("place", "reason"),
    [("", ""), ("no/chat.db", "No such file"), ("locked/x", "No such file")],
)
def test_a_place_where_no_file_can_be_is_refused(
    tmp_path: Path, place: str, reason: str
) -> None:
    assert reason in refusal(tmp_path / place)


def test_an_empty_name_is_no_file() -> None:
    refusal("")


@pytest.mark.parametrize("by_link", [False, True])
def test_a_file_that_another_server_has_is_refused_untouched(
    start: StartServer, path: Path, tmp_path: Path, by_link: bool
) -> None:
    alex = start().member("Alex")
    alex.say("mine")
    await_rows(path, 1)
    before = path.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(path)

    reason = refusal(link if by_link else path)

    assert "another server has it" in reason
    assert path.read_bytes() == before
    alex.say("still mine")
    await_rows(path, 2)


# --- over the network ---------------------------------------------------------------


@pytest.mark.parametrize(("host", "told"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_beyond_this_machine_a_line_warns_of_passwords_in_the_clear(
    start: StartServer, host: str, told: bool
) -> None:
    chat = start("--host", host)

    assert ("Passwords travel in the clear" in "".join(stop(chat))) == told


@pytest.fixture
def stunnel(start: StartServer, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server behind stunnel: the address of that, and its certificate."""
    program, openssl = shutil.which("stunnel4"), shutil.which("openssl")
    if not (program and openssl):
        pytest.skip("needs stunnel (Debian: stunnel4) and openssl")
    pem = tmp_path / "chat.pem"
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=chat", "-addext", "subjectAltName=IP:127.0.0.1"]
    out = ["-keyout", str(pem), "-out", str(tmp_path / "certificate")]
    subprocess.run(
        [openssl, *make.split(), *names, *out], check=True, capture_output=True
    )
    with pem.open("a") as file:
        file.write((tmp_path / "certificate").read_text())
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    configuration = tmp_path / "stunnel.conf"
    configuration.write_text(
        f"foreground = yes\npid =\n[chat]\naccept = {address}\n"
        f"connect = {start().address}\ncert = {pem}\n"
    )
    with subprocess.Popen([program, configuration], stderr=subprocess.PIPE) as process:
        assert process.stderr
        try:
            LineReader(process.stderr.fileno()).until("Configuration successful")
            yield address, tmp_path / "certificate"
        finally:
            process.kill()


def test_stunnel_in_front_encrypts_passwords(stunnel: tuple[str, Path]) -> None:
    address, certificate = stunnel
    context = ssl.create_default_context(cafile=str(certificate))
    plain = Peer(address)
    with context.wrap_socket(plain.socket, server_hostname="127.0.0.1") as encrypted:
        plain.socket = encrypted

        plain.join("Alex")
        register(plain)
        plain.say("q")

        assert plain.rest() == []
