"""Random stories of a room, told against a model of what each person must have seen.

A story is a list of steps that depends on nothing but its seed.  It is played without
waiting for the room after each step, so the server meets its own races.  A person who
only watches has the one order of all that happened; from it follows what everybody else
must have read.  Of a story that goes wrong, the shortest part that still does is shown.
"""

from __future__ import annotations

import contextlib
import random
import re
import select
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
from helpers import SMALL_BUFFER, Peer, Room, assert_next

NAMES = ["Anna", "Bert", "Čeněk", "Дима", "Eva", "陽子"]
STEPS_IN_A_STORY = 2000
# Guards of a play: the first time, and once a story is known to go wrong.
HANG_SECONDS = 10.0
SHORT_HANG_SECONDS = 2.0
MAX_REPLAYS = 150
MAX_SHORTENING_SECONDS = 20.0


class Step(NamedTuple):
    """What somebody does; it is passed over if they cannot."""

    name: str
    action: str
    number: int  # makes what is said unique

    def __str__(self) -> str:
        return f"{self.number:4} {self.name} {self.action}"


class Visit:
    """One stay in the room: its connection, and the model of it."""

    def __init__(self, peer: Peer, online: set[str], number: int) -> None:
        self.peer = peer
        self.online = online  # by the welcome
        self.number = number  # of the visits of this person, from 0
        self.started = ""  # of a line without its newline yet
        self.said: list[str] = []
        self.whispers: list[tuple[str, str]] = []  # to whom, and what they read
        self.read: list[str] = []
        self.vanished = False


class Play:
    """A story being played in a room of its own."""

    def __init__(self, room: Room, hang_seconds: float) -> None:
        self.room = room
        self.hang_seconds = hang_seconds
        self.visits: dict[str, list[Visit]] = {name: [] for name in NAMES}
        self.now: dict[str, Visit] = {}
        self.watcher = self._connect()
        self.watcher.join("Watcher")
        self.order: list[str] = []

    def _connect(self) -> Peer:
        peer = self.room.connect(receive_buffer=SMALL_BUFFER)
        peer.socket.settimeout(self.hang_seconds)
        return peer

    def do(self, step: Step) -> None:
        """Do one step, if that is possible now."""
        visit = self.now.get(step.name)
        if step.action == "joins":
            if not visit:
                self._join(step.name)
        elif visit:
            getattr(self, f"_{step.action.replace(' ', '_')}")(step, visit)

    def _join(self, name: str) -> None:
        before = self.visits[name]
        # Who comes back waits until the name is free.
        self._watch_until(left(name), len(before))
        peer = self._connect()
        welcome = peer.join(name)
        visit = Visit(peer, online_by(welcome), len(before))
        before.append(visit)
        self.now[name] = visit

    def _says(self, step: Step, visit: Visit) -> None:
        visit.peer.say(f"{step.number}")
        visit.said.append(f"{visit.started}{step.number}")
        visit.started = ""

    def _says_much(self, step: Step, visit: Visit) -> None:
        visit.peer.say(f"{step.number} " + "é" * 1500)
        visit.said.append(f"{visit.started}{step.number} " + "é" * 1500)
        visit.started = ""

    def _says_half(self, step: Step, visit: Visit) -> None:
        if len(visit.started) < 500:
            visit.peer.send(f"{step.number} and ")
            visit.started += f"{step.number} and "

    def _says_nonsense(self, step: Step, visit: Visit) -> None:
        visit.peer.send(b"\xff\n")
        visit.started = ""
        visit.said.append("")  # a refusal, which only its author reads

    def _whispers(self, step: Step, visit: Visit) -> None:
        recipient = NAMES[step.number % len(NAMES)]
        if visit.started:
            self._says(step, visit)  # ends the line that was begun
        else:
            visit.peer.say(f"/msg {recipient.lower()} {step.number}")
            private = f"{step.name} (private): {step.number}"
            visit.whispers.append((recipient, private))

    def _reads(self, step: Step, visit: Visit) -> None:
        while select.select([visit.peer.socket], [], [], 0)[0]:
            visit.peer._receive()
        while visit.peer._lines:
            visit.read.append(visit.peer.line())

    def _claims_a_taken_name(self, step: Step, visit: Visit) -> None:
        other = self._connect()
        other.say(step.name.upper())
        assert other.line() == f"! The name {step.name.upper()} is taken."
        other.close()

    def _quits(self, step: Step, visit: Visit) -> None:
        if visit.started:
            self._says(step, visit)
        visit.peer.say("q")
        self._reads_to_the_end(visit)

    def _ends_input(self, step: Step, visit: Visit) -> None:
        visit.peer.half_close()
        self._reads_to_the_end(visit)

    def _reads_to_the_end(self, visit: Visit) -> None:
        visit.read += visit.peer.rest()
        self._goes(visit)

    def _vanishes(self, step: Step, visit: Visit) -> None:
        self._reads(step, visit)
        self._vanishes_unread(step, visit)

    def _vanishes_unread(self, step: Step, visit: Visit) -> None:
        visit.vanished = True
        self._goes(visit)

    def _goes(self, visit: Visit) -> None:
        visit.peer.close()
        self.now = {name: v for name, v in self.now.items() if v is not visit}

    def end(self) -> None:
        """Wait until all has been passed on, and let those still there read it."""
        # What does not come within the guard is missed by check(), which says more.
        with contextlib.suppress(TimeoutError):
            for name, visits in self.visits.items():
                leavings = len(visits) - (name in self.now)
                self._watch_until(left(name), leavings)
            for name, visit in self.now.items():
                # Behind this nothing of theirs is under way, no refusal either.
                self._says(Step(name, "says", STEPS_IN_A_STORY), visit)
                self._watch_until(f"{name}: {visit.said[-1]}", 1)
        self.watcher.say("the end")
        for visit in self.now.values():
            visit.read += visit.peer.until("Watcher: the end")
        speaker = self._connect()
        speaker.join("Speaker")
        self.order += self.watcher.until(joined("Speaker"))
        assert_next(speaker, self.watcher)

    def _watch_until(self, line: str, times: int) -> None:
        while self.order.count(line) < times:
            self.order.append(self.watcher.line())

    def check(self) -> None:
        """Compare what everybody has read with what follows from the one order."""
        expected_online = {"Watcher"}
        moves = {f(name): (f, name) for name in NAMES for f in (joined, left)}
        stays: dict[str, list[slice]] = {name: [] for name in NAMES}
        for position, line in enumerate(self.order):
            if line not in moves:
                assert line.partition(": ")[0] in expected_online, line
                continue
            move, name = moves[line]
            if move is joined:
                assert name not in expected_online, f"{name} is in twice"
                visit = self.visits[name][len(stays[name])]
                assert visit.online == expected_online, f"{name} was welcomed so"
                expected_online.add(name)
                stays[name].append(slice(position + 1, len(self.order)))
            else:
                expected_online.remove(name)
                stays[name][-1] = slice(stays[name][-1].start, position)
        assert expected_online == {"Watcher", *self.now}
        gone = {name for name in NAMES if any(v.vanished for v in self.visits[name])}
        heard = {n: [ln for v in self.visits[n] for ln in v.read] for n in NAMES}
        for name, visits in self.visits.items():
            assert len(stays[name]) == len(visits), f"the visits of {name}"
            for visit, stay in zip(visits, stays[name], strict=True):
                lost = [to for to, line in visit.whispers if heard[to].count(line) != 1]
                unsure = sum(to in gone for to in lost)
                self._check_visit(name, visit, self.order[stay], len(lost), unsure)

    def _check_visit(
        self, name: str, visit: Visit, heard: list[str], lost: int, unsure: int
    ) -> None:
        """lost: private messages that did not arrive, of which some may be unread."""
        who = f"{name}, visit {visit.number}"
        said = [f"{name}: {text}" for text in visit.said if text]
        passed_on = [line for line in heard if line.startswith(f"{name}: ")]
        if visit.vanished:
            # Closing with input unread is a RST, which overtakes what is under way.
            said = said[: len(passed_on)]
        assert passed_on == said, f"{who}: what was passed on"
        refusals = [line for line in visit.read if line.startswith("! ")]
        read = [line for line in visit.read if not re.match(r"! |\S+ \(priv", line)]
        others = [line for line in heard if not line.startswith(f"{name}: ")]
        if visit.vanished:
            others = others[: len(read)]
        else:
            most = visit.said.count("") + lost
            assert most - unsure <= len(refusals) <= most, f"{who}: refusals"
        assert read == others, f"{who}: what was read"


def joined(name: str) -> str:
    return f"* {name} has joined the chat."


def left(name: str) -> str:
    return f"* {name} has left the chat."


def online_by(welcome: str) -> set[str]:
    """Return the names that a welcome tells."""
    names = welcome.partition("Also online: ")[2].removesuffix(".")
    return set(names.split(", "))


# How often each of them is done.
ACTIONS = {
    "joins": 25,
    "says": 20,
    "says much": 20,
    "says half": 8,
    "says nonsense": 4,
    "whispers": 6,
    "reads": 10,
    "claims a taken name": 2,
    "quits": 2,
    "ends input": 2,
    "vanishes": 3,
    "vanishes unread": 4,
}


def story_of(seed: int) -> list[Step]:
    """Return a random story, always the same one for a seed."""
    chance = random.Random(seed)
    actions = chance.choices([*ACTIONS], [*ACTIONS.values()], k=STEPS_IN_A_STORY)
    return [
        Step(chance.choice(NAMES), action, number)
        for number, action in enumerate(actions)
    ]


def what_goes_wrong(story: list[Step], hang_seconds: float = HANG_SECONDS) -> str:
    """Play a story in a new room; return "" if everybody saw what they must have."""
    room = Room(small_buffers=True, lines_per_second=0)
    try:
        play = Play(room, hang_seconds)
        for step in story:
            play.do(step)
        play.end()
        play.check()
    except (AssertionError, OSError, UnicodeDecodeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        room.close_peers()
        room.stop()
    return ""


def shortest_that_fails(
    story: list[Step], fails: Callable[[list[Step]], bool]
) -> list[Step]:
    """Drop steps, many at first and then one by one, while the rest still fails."""
    give_up_at = time.monotonic() + MAX_SHORTENING_SECONDS
    size = len(story) // 2
    replays = 0
    while size:
        start = 0
        while start < len(story):
            if replays == MAX_REPLAYS or time.monotonic() > give_up_at:
                return story
            replays += 1
            shorter = story[:start] + story[start + size :]
            if fails(shorter):
                story = shorter
            else:
                start += size
        size //= 2
    return story


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5, 6, None])
def test_everybody_sees_what_follows_from_the_one_order(
    no_leaks: None, seed: int | None
) -> None:
    """A story takes its time for hundreds of steps and dozens of connections."""
    if seed is None:
        seed = time.time_ns() // 1_000_000
    print(f"seed {seed}")
    story = story_of(seed)

    wrong = what_goes_wrong(story)

    if wrong:
        story = shortest_that_fails(
            story, lambda steps: what_goes_wrong(steps, SHORT_HANG_SECONDS) != ""
        )
        steps = "\n".join(map(str, story))
        pytest.fail(f"seed {seed}: {wrong}\nThe shortest story found:\n{steps}")


def test_a_story_that_fails_is_shortened_to_what_it_takes() -> None:
    story = story_of(1)
    culprits = {story[17], story[203]}

    shortest = shortest_that_fails(story, lambda steps: culprits <= {*steps})

    assert shortest == [story[17], story[203]]
