"""Random stories of a room, told against a model of what each person must have seen.

A story is a list of steps that depends on nothing but its seed.  It is played without
waiting for the room after each step, so the server meets its own races.  A person who
only watches has the one order of all that happened; from it follows what everybody else
must have read.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from typing import NamedTuple

import pytest
from helpers import SMALL_BUFFER, Peer, Room, assert_next, joined, left

NAMES = ["Anna", "Bert", "Čeněk", "Дима", "Eva", "陽子"]
STEPS_IN_A_STORY = 2000
# What somebody does, and how often.
ACTIONS = {
    "joins": 25,
    "says": 20,
    "says much": 20,
    "says half": 8,
    "says nonsense": 4,
    "whispers": 6,
    "reads": 10,
    "quits": 2,
    "ends input": 2,
    "vanishes": 3,
    "vanishes unread": 4,
}


class Step(NamedTuple):
    """What somebody does; it is passed over if they cannot."""

    name: str
    action: str
    number: int  # makes what is said unique


def story_of(seed: int) -> list[Step]:
    """Return a random story, always the same one for a seed."""
    chance = random.Random(seed)
    actions = chance.choices([*ACTIONS], [*ACTIONS.values()], k=STEPS_IN_A_STORY)
    return [
        Step(chance.choice(NAMES), action, number)
        for number, action in enumerate(actions)
    ]


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

    def __init__(self, room: Room) -> None:
        self.room = room
        self.visits: dict[str, list[Visit]] = {name: [] for name in NAMES}
        self.now: dict[str, Visit] = {}
        self.watcher = self._connect()
        self.watcher.join("Watcher")
        self.order: list[str] = []

    def _connect(self) -> Peer:
        return self.room.connect(receive_buffer=SMALL_BUFFER)

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
        online = welcome.partition("Also online: ")[2].removesuffix(".").split(", ")
        visit = Visit(peer, {*online}, len(before))
        before.append(visit)
        self.now[name] = visit

    def _says(self, step: Step, visit: Visit, more: str = "") -> None:
        visit.peer.say(f"{step.number}{more}")
        visit.said.append(f"{visit.started}{step.number}{more}")
        visit.started = ""

    def _says_much(self, step: Step, visit: Visit) -> None:
        self._says(step, visit, "é" * 1500)

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
        visit.read += visit.peer.come()

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


@pytest.mark.parametrize("seed", [1, 2, 3, 4, None])
def test_everybody_sees_what_follows_from_the_one_order(
    narrow_room: Room, seed: int | None
) -> None:
    """A story takes its time for hundreds of steps and dozens of connections."""
    if seed is None:
        seed = time.time_ns() // 1_000_000
    print(f"seed {seed}")  # shown if the story goes wrong
    play = Play(narrow_room)

    for step in story_of(seed):
        play.do(step)
    play.end()

    play.check()
