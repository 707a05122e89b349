"""Measure the server side by side with the two designs that people usually write.

    python tests/benchmark.py            # four minutes
    python tests/benchmark.py --quick    # a few seconds: does it work at all?

Each run starts one design as a process of its own, puts one workload on it and ends it.
The designs take turns, so that a ratio compares neighbours in time; the table has the
medians of all rounds.  The load generator is one process with one thread and a selector.
All that it does while the clock runs is to keep the bytes and note when they came: most
members are to see the very same bytes, so only one copy is kept, and what the others
receive is compared with it.  Lines and latencies are worked out afterwards.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Timer
from typing import NamedTuple, Self

HOST = "127.0.0.1"
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
RUN_SECONDS = 10.0  # no run takes longer, whatever its server does
TOTAL_SECONDS = 240.0  # no run starts later
SILENCE_SECONDS = 1.0  # nothing more is expected after that
CHUNK_BYTES = 65536
LINE_BYTES = 64  # as the others receive it: name, message, newline
# Enough to fill the kernel's buffers for one who stopped reading within a second.
STALL_LINE_BYTES = 3000
NAME_BYTES = 5
BUSY = 0.85  # of a core: from there on the load generator may be the limit

THREAD_PER_CLIENT = """
import socket, threading

clients = {}

def broadcast(line, author):
    for client in list(clients):
        if client is not author:
            try:
                client.sendall(line)
            except OSError:
                clients.pop(client, None)

def handle(client):
    try:
        lines = client.makefile("rb")
        name = clients[client] = lines.readline().strip()
        broadcast(b"* %b has joined the chat.\\n" % name, client)
        client.sendall(b"* Welcome, %b!\\n" % name)
        for line in lines:
            broadcast(b"%b: %b" % (name, line), client)
    finally:
        clients.pop(client, None)
        broadcast(b"* %b has left the chat.\\n" % name, client)

listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
print("Listening on 127.0.0.1:%d" % listener.getsockname()[1], flush=True)
while True:
    client, _ = listener.accept()
    threading.Thread(target=handle, args=(client,), daemon=True).start()
"""

ASYNCIO = """
import asyncio

clients = {}

async def broadcast(line, author):
    others = [client for client in clients if client is not author]
    for client in others:
        client.write(line)
    for client in others:
        try:
            await client.drain()
        except ConnectionError:
            pass

async def handle(lines, client):
    try:
        name = clients[client] = (await lines.readline()).strip()
        await broadcast(b"* %b has joined the chat.\\n" % name, client)
        client.write(b"* Welcome, %b!\\n" % name)
        while line := await lines.readline():
            await broadcast(b"%b: %b" % (name, line), client)
    finally:
        clients.pop(client, None)
        await broadcast(b"* %b has left the chat.\\n" % name, client)

async def main():
    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=1024)
    port = server.sockets[0].getsockname()[1]
    print("Listening on 127.0.0.1:%d" % port, flush=True)
    await server.serve_forever()

asyncio.run(main())
"""

SERVER = Path(__file__).resolve().parent.parent / "server.py"
FLAGS = ["--port", "0", "--rate", "0", "--max-clients", "20000", "--quiet"]
THIS = "this server"
DATABASE = "chat.db"  # in a folder of the run's own
ONE_PROCESSOR = """
import os, sys

if hasattr(os, "sched_setaffinity"):  # what taskset does
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
DESIGNS = {  # what Python is to run
    THIS: [str(SERVER), *FLAGS],
    "with --database": [str(SERVER), *FLAGS, "--database", DATABASE],
    "on one processor": ["-c", ONE_PROCESSOR, str(SERVER), *FLAGS],
    "naive threads": ["-c", THREAD_PER_CLIENT],
    "asyncio": ["-c", ASYNCIO],
}


class Sizes(NamedTuple):
    """How much of everything."""

    rounds: int
    members: int
    senders: int  # of the members
    flood_seconds: float
    steady_seconds: float
    rate: int  # messages per second, of all senders together
    stall_seconds: float  # before, and then twice as long after the reader stopped
    joins: int  # at once; with the server's files it stays below macOS's limit of 256


FULL = Sizes(3, 100, 10, 0.4, 1.5, 500, 1.0, 200)
QUICK = Sizes(1, 20, 4, 0.05, 0.2, 500, 0.2, 40)

Numbers = dict[str, float]  # row of the table → number


class BenchmarkError(Exception):
    """A run that cannot be measured; str() of it says why."""


# --- the load generator -------------------------------------------------------------


class Member:
    """One connection.  It keeps what it receives, and when."""

    def __init__(self, load: Load, number: int) -> None:
        """Connect, without waiting; the name follows as soon as that has worked."""
        self.load = load
        self.name = b"u%0*d" % (NAME_BYTES - 1, number)
        self.unsent = bytearray(self.name + b"\n")
        self.said = 0  # messages
        self.watched = True  # by the selector
        # What it received: the load's common bytes up to `position`, or its own if
        # those differ, as they must for a sender.
        self.position = 0
        self.own: bytearray | None = bytearray()
        self.marks: list[int] = []  # the position after each recv(), and
        self.times: list[float] = []  # when that was
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if load.like_remote:
            # The kernel would hide megabytes of what a reader does not take, also
            # because segments are huge on the loopback interface.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
            with suppress(AttributeError, OSError):  # not every system has it
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1448)
        self.socket.connect_ex((HOST, load.port))
        load.selector.register(self.socket, READ | WRITE, self)
        load.members.append(self)

    def prepare(self, line_bytes: int, count: int = 1) -> None:
        """Make up messages, no two of them alike, for flush() to send."""
        size = line_bytes - len(self.name + b": \n")
        now = time.perf_counter()
        for number in range(self.said, self.said + count):
            text = (b"%08d" % number).ljust(size, b".")
            self.load.sent[b"%b: %b" % (self.name, text)] = now
            self.unsent += text + b"\n"
        self.said += count

    def flush(self) -> None:
        """Send what the socket takes now; the selector tells when to go on."""
        if not self.watched:
            return
        try:
            del self.unsent[: self.socket.send(self.unsent[:CHUNK_BYTES])]
        except BlockingIOError:
            pass
        except OSError:
            self.stop_reading()  # what it misses counts as lost
            return
        events = READ | (WRITE if self.unsent else 0)
        if self.load.selector.get_key(self.socket).events != events:
            self.load.selector.modify(self.socket, events, self)

    def receive(self) -> None:
        """Take what one recv() gives, and compare it with what the others got."""
        try:
            chunk = self.socket.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self.stop_reading()
            return
        common = self.load.common
        known = len(common) - self.position
        if self.own is not None:
            self.own += chunk
            self.load.own_lines += chunk.count(b"\n")
        elif common.startswith(chunk[:known], self.position):
            common += chunk[known:]
        else:
            self.own = common[: self.position] + chunk
        self.position += len(chunk)
        self.marks.append(self.position)
        self.times.append(time.perf_counter())
        self.load.received_bytes += len(chunk)

    def stop_reading(self) -> None:
        """Leave the socket open, and never look at it again."""
        if self.watched:
            self.watched = False
            self.load.selector.unregister(self.socket)

    def received(self) -> bytes:
        """Return all that came since Load.begin()."""
        return bytes(
            self.load.common[: self.position] if self.own is None else self.own
        )


class Load:
    """The members, what they sent, and what they received in common."""

    def __init__(self, port: int) -> None:
        """port: the server's.  Use it in a `with` block, which closes all sockets."""
        self.port = port
        self.like_remote = False  # what the members' buffers are to be
        self.selector = selectors.DefaultSelector()
        self.members: list[Member] = []
        self.deadline = time.perf_counter() + RUN_SECONDS
        self.last_arrival = 0.0
        self.own_lines = 0  # received by members that keep their own bytes
        self.begin(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.socket.close()
        self.selector.close()

    def read(self, seconds: float) -> None:
        """Move what can be moved, waiting at most so long for the first of it."""
        # The selector counts in milliseconds and rounds up: a message may be sent that
        # much late, but its latency counts from when it was.
        ready = self.selector.select(seconds)
        for key, events in ready:
            if events & WRITE:
                key.data.flush()
            if events & READ and key.data.watched:
                key.data.receive()
        if ready:
            self.last_arrival = time.perf_counter()

    def wait(self, done: Callable[[], bool], silence: float = SILENCE_SECONDS) -> bool:
        """Read until done; False if that does not come, and nothing else does."""
        silent_since = time.perf_counter()
        while not done():
            self.read(silence / 4)
            now = time.perf_counter()
            silent_since = max(silent_since, self.last_arrival)
            if now > self.deadline or now - silent_since > silence:
                return False
        self.note_busy()
        return True

    def settle(self) -> None:
        """Read until nothing comes any more."""
        self.wait(lambda: False, SILENCE_SECONDS / 2)

    def join_all(self, count: int) -> None:
        """Let members join one after the other, and read all notices."""
        for number in range(count):
            newcomer = Member(self, number)
            if not self.wait(lambda: bool(newcomer.own)):  # noqa: B023
                raise BenchmarkError(f"member {number} of {count} could not join")
        if not self.wait(lambda: self.own_lines == pairs(count) + count):
            raise BenchmarkError("not everybody was told once who joined")

    def begin(self, senders: int) -> None:
        """Forget what was received; from here on most members receive the same."""
        self.sent: dict[bytes, float] = {}  # line as received, without newline → when
        self.common = bytearray()
        self.received_bytes = 0
        for number, member in enumerate(self.members):
            member.position = 0
            member.own = bytearray() if number < senders else None
            member.marks.clear()
            member.times.clear()
        self.senders = self.members[:senders]
        self.listeners = self.members[senders:]
        self.busy = 0.0
        self._began = time.perf_counter(), time.process_time()

    def note_busy(self) -> None:
        """Note the share of a core that was used here since begin()."""
        wall, process = self._began
        self.busy = (time.process_time() - process) / (time.perf_counter() - wall)

    def pace(self, rate: int, seconds: float, line_bytes: int) -> None:
        """Send at a fixed rate, the senders in turn."""
        start = time.perf_counter()
        for number in range(round(rate * seconds)):
            due = start + number / rate
            self.read(0)
            while (now := time.perf_counter()) < due:
                self.read(due - now)
            if now > self.deadline:
                return
            sender = self.senders[number % len(self.senders)]
            sender.prepare(line_bytes)
            sender.flush()
        self.note_busy()

    def latencies(self, since: float = 0, until: float = math.inf) -> list[float]:
        """Return those of all messages to all listeners; infinite if one never came.

        since, until: when a message was sent, to count.
        """
        counted = {line for line, sent in self.sent.items() if since <= sent < until}
        found = []
        for member in self.listeners:
            arrivals = zip(member.marks, member.times, strict=True)
            mark = position = 0
            for line in whole_lines(member.received()):
                position += len(line) + 1
                while mark < position:
                    mark, arrived = next(arrivals)
                if line in counted:
                    found.append(arrived - self.sent[line])
        missing = len(counted) * len(self.listeners) - len(found)
        return sorted(found) + [math.inf] * missing

    def faults(self) -> Counter[str]:
        """Check every delivery; return how many were wrong, and how."""
        if not self.sent:
            return self.join_faults()
        faults: Counter[str] = Counter()
        reference = whole_lines(self.listeners[0].received())
        views = Counter((m.received(), b"") for m in self.listeners)
        views.update((m.received(), m.name) for m in self.senders)
        for (received, author), members in views.items():
            wanted = {line for line in self.sent if line[:NAME_BYTES] != author}
            found = compare(whole_lines(received), wanted, reference)
            for fault, count in found.items():
                faults[fault] += count * members
        return +faults  # without those that are 0

    def join_faults(self) -> Counter[str]:
        """Check what everybody was told of the others' joins."""
        notices = [member.received().partition(b"\n")[2] for member in self.members]
        longest = max(notices, key=len)
        told = self.own_lines - len(self.members)
        in_one_order = sum(map(longest.endswith, notices))
        return +Counter(
            {
                "notices too many or too few": abs(told - pairs(len(notices))),
                "members saw an order of their own": len(notices) - in_one_order,
            }
        )


def whole_lines(received: bytes) -> list[bytes]:
    """Return the lines, without newlines; one that is not complete is left out."""
    return received.split(b"\n")[:-1]


def compare(
    received: list[bytes], wanted: set[bytes], reference: list[bytes]
) -> dict[str, int]:
    """Return what is wrong with what one member received: kind of fault → how often.

    reference: what another member received, in the order that all should see.
    """
    lines = [line for line in received if not line.startswith(b"* ")]
    seen = set(lines)
    by_author = sorted(lines, key=lambda line: line[:NAME_BYTES])
    mine = seen.intersection(reference)
    shared = [line for line in reference if line in mine]
    return {
        "lost": len(wanted - seen),
        "doubled": len(lines) - len(seen),
        "torn": len(seen - wanted),
        "members saw one sender's lines reordered": by_author != sorted(lines),
        "members saw an order of their own": (
            shared != [line for line in lines if line in mine]
        ),
    }


def pairs(count: int) -> int:
    """Return the notices that `count` joins make: each member is told of each later."""
    return count * (count - 1) // 2


# --- the workloads: each returns its numbers, by row of the table -------------------


def flood(load: Load, pid: int, sizes: Sizes) -> Numbers:
    """Send as fast as the server takes it, in batches, each for longer than the last."""
    load.join_all(sizes.members)
    load.begin(sizes.senders)
    count, seconds, rate = 8, 0.0, 0.0
    while seconds < sizes.flood_seconds:
        before = load.received_bytes
        batch_bytes = LINE_BYTES * count * sizes.senders * (sizes.members - 1)
        for sender in load.senders:
            sender.prepare(LINE_BYTES, count)
        start = time.perf_counter()
        for sender in load.senders:
            sender.flush()
        complete = load.wait(lambda: load.received_bytes - before >= batch_bytes)  # noqa: B023
        seconds = load.last_arrival - start
        rate = (load.received_bytes - before) / LINE_BYTES / seconds
        if not complete:
            break
        growth = 1.2 * sizes.flood_seconds / seconds
        count = math.ceil(count * min(10, growth))
    return {"flood: deliveries per second (more is better)": rate}


def steady(load: Load, pid: int, sizes: Sizes) -> Numbers:
    """Send at a rate that all designs can take."""
    kilobytes = resident_kilobytes(pid)
    load.join_all(sizes.members)
    kilobytes = resident_kilobytes(pid) - kilobytes
    load.begin(sizes.senders)
    load.pace(sizes.rate, sizes.steady_seconds, LINE_BYTES)
    load.settle()
    latencies = load.latencies()
    return {
        "steady: p50 of the latency, ms": percentile(latencies, 50) * 1000,
        "steady: p99 of the latency, ms": percentile(latencies, 99) * 1000,
        "steady: memory per client, kB": kilobytes / sizes.members,
    }


def stall(load: Load, pid: int, sizes: Sizes) -> Numbers:
    """Let one member stop reading, and look at the others."""
    load.like_remote = True
    load.join_all(sizes.members // 2)
    load.begin(sizes.senders // 2)
    load.pace(sizes.rate, sizes.stall_seconds, STALL_LINE_BYTES)
    stalled = load.listeners.pop()
    stalled.stop_reading()
    stalled_at = time.perf_counter()
    load.pace(sizes.rate, 2 * sizes.stall_seconds, STALL_LINE_BYTES)
    load.settle()
    before = percentile(load.latencies(until=stalled_at), 99)
    after = load.latencies(since=stalled_at)
    delivered = 1 - after.count(math.inf) / max(1, len(after))
    return {
        "stall: p99 of the others, after ÷ before": percentile(after, 99) / before,
        "stall: delivered to the others, % (more is better)": 100 * delivered,
    }


def joins(load: Load, pid: int, sizes: Sizes) -> Numbers:
    """Let many join at once."""
    start = time.perf_counter()
    for number in range(sizes.joins):
        Member(load, number)
    load.wait(lambda: load.own_lines >= pairs(sizes.joins) + sizes.joins)
    load.settle()  # there are designs that tell some of it twice
    return {
        f"joins: {sizes.joins} at once, s until all know": load.last_arrival - start
    }


def resident_kilobytes(pid: int) -> float:
    """Return VmRSS; NaN on a system without /proc."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        return float(status.partition("VmRSS:")[2].split()[0])
    return math.nan


def percentile(ordered: list[float], percent: int) -> float:
    """Return the value below which so many of them are."""
    if not ordered:
        raise BenchmarkError("no message was sent in time")
    return ordered[len(ordered) * percent // 100]


Workload = Callable[[Load, int, Sizes], Numbers]
WORKLOADS: list[Workload] = [flood, steady, stall, joins]

# --- runs ---------------------------------------------------------------------------


class Result(NamedTuple):
    """What one run showed."""

    numbers: Numbers
    faults: Counter[str]
    busy: float = 0.0
    failure: str = ""  # why there is nothing else


Results = dict[tuple[str, str], list[Result]]  # workload and design → its runs


@contextmanager
def started(command: list[str]) -> Iterator[tuple[int, int]]:
    """Run a server for the time of a `with` block; give its process id and port."""
    with (
        TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process,
    ):
        guard = Timer(RUN_SECONDS, process.kill)
        try:
            guard.start()
            # What comes later is not read: it fits into the pipe.
            for line in process.stdout or ():
                if line.startswith("Listening on "):
                    break
            else:
                raise BenchmarkError("the server did not start")
            guard.cancel()
            yield process.pid, int(line.rpartition(":")[2])
        finally:
            guard.cancel()
            process.kill()


def run(design: str, workload: Workload, sizes: Sizes) -> Result:
    """Put one workload on one design."""
    try:
        with started(DESIGNS[design]) as (pid, port), Load(port) as load:
            numbers = workload(load, pid, sizes)
            return Result(numbers, load.faults(), load.busy)
    except BenchmarkError as error:
        return Result({}, Counter(), failure=str(error))


def run_all(sizes: Sizes) -> Results:
    """Run everything in turns, until the time is up."""
    start = time.monotonic()
    results: Results = defaultdict(list)
    for number, workload, design in product(range(sizes.rounds), WORKLOADS, DESIGNS):
        seconds = time.monotonic() - start
        if seconds > TOTAL_SECONDS:
            break
        name = workload.__name__
        show_progress(f"round {number + 1} of {sizes.rounds}: {name}, {design}")
        results[name, design].append(run(design, workload, sizes))
    show_progress("")
    return results


def show_progress(text: str) -> None:
    """Show it; on a terminal in place of the last one."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}\r", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


# --- the report ---------------------------------------------------------------------


def table(results: Results) -> Iterator[str]:
    """Yield the lines of the table, in Markdown."""
    others = [f"{design} ÷ {THIS}" for design in DESIGNS if design != THIS]
    heads = ["workload", *DESIGNS, *others]
    yield f"| {' | '.join(heads)} |"
    yield "|---" + "|---:" * (len(heads) - 1) + "|"
    values: dict[str, dict[str, list[float]]] = {}
    for (_, design), runs in results.items():
        for result in runs:
            for row, number in result.numbers.items():
                values.setdefault(row, {}).setdefault(design, []).append(number)
    for row, by_design in values.items():
        medians = [median(by_design.get(design, [math.nan])) for design in DESIGNS]
        ratios = [number / medians[0] for number in medians[1:]]
        cells = medians + [math.nan if math.isinf(x) else x for x in ratios]
        yield f"| {row} | {' | '.join(map(format_number, cells))} |"


def format_number(number: float) -> str:
    """Return three digits of it, or what else there is to say."""
    if math.isnan(number):
        return "–"
    if math.isinf(number):
        return "never"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def remarks(results: Results) -> Iterator[str]:
    """Yield what was wrong with deliveries, and with the measurement."""
    for (workload, design), runs in results.items():
        where = f"{workload}, {design}"
        faults = sum((result.faults for result in runs), Counter())
        if faults:
            found = ", ".join(f"{count:,} {fault}" for fault, count in faults.items())
            yield f"{where}: {found} (all rounds together)"
        for failure in {result.failure for result in runs} - {""}:
            yield f"{where}: not measured: {failure}"
        busy = median(result.busy for result in runs)
        if busy > BUSY:
            yield f"{where}: the load generator used {busy:.0%} of a core: maybe its limit"
    if not Path("/proc/self/status").exists():
        yield "memory: not measured: this system has no /proc/PID/status"


def main() -> int:
    """Measure and print; return the exit status: 1 if this server made a mistake."""
    parser = argparse.ArgumentParser(
        description="Compare server.py with the two usual designs, in four minutes."
    )
    parser.add_argument(
        "--quick", action="store_true", help="a little of everything, in some seconds"
    )
    sizes = QUICK if parser.parse_args().quick else FULL
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.monotonic()
    try:
        results = run_all(sizes)
    except KeyboardInterrupt:
        print("benchmark.py: interrupted", file=sys.stderr)
        return 130
    print("\n".join(table(results)))
    rounds = min(len(runs) for runs in results.values())
    print(
        f"\nMedians of {rounds} of {sizes.rounds} rounds, "
        f"{time.monotonic() - start:.0f} s; Python {platform.python_version()}, "
        f"{os.cpu_count()} cores; {sizes.members} members of whom {sizes.senders} send "
        "(half of both where one stalls).  Less is better, but where it says more.\n"
        "Every delivery was checked: nothing lost, "
        "doubled or torn, and one order for all, except for what follows."
    )
    for remark in remarks(results):
        print(f"- {remark}")
    if sizes is QUICK:
        print("This was too short to judge by: it shows only that all of it works.")
    ours = [
        run for (_, design), runs in results.items() if design == THIS for run in runs
    ]
    return int(any(result.faults or result.failure for result in ours))


if __name__ == "__main__":
    sys.exit(main())
