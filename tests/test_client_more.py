"""The real client: leaving, stopping and losing the connection at odd moments."""

# ruff: noqa: F401, F811 - the fixtures of test_client
from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from helpers import needs_proc, wait_until
from test_client import (
    ARROW_LEFT,
    CTRL_D,
    CTRL_Z,
    ENTER,
    LEFT,
    SMALL_SEND_BUFFER,
    TERMINALS,
    Chat,
    Puppet,
    StartPiped,
    StartTerminal,
    changed,
    chat,
    go_to,
    join,
    paste,
    puppet,
    start_piped,
    start_terminal,
)

# The first connection is made; each later one hangs until something is typed.
HANGING_CONNECT = """
connect = client.socket.create_connection
def hang(*address):
    client.os.write(1, b"(connecting)\\n")
    client.select.select([0], [], [])
    raise TimeoutError("timed out")
def connect_once(*address):
    client.socket.create_connection = hang
    return connect(*address)
client.socket.create_connection = connect_once
"""


@TERMINALS
@pytest.mark.parametrize("keys", [CTRL_D, f"q{ENTER}"], ids=["Ctrl-D", "q"])
def test_leaving_while_a_new_connection_is_being_made(
    puppet: Puppet, start_terminal: StartTerminal, keys: str, kind: str
) -> None:
    alex = start_terminal(puppet.address, changed(HANGING_CONNECT), TERM=kind)
    join(puppet, alex).close()
    alex.wait_until(lambda: alex.screen.rows[-1] == "Enter your choice:")
    alex.type(f"1{ENTER}")
    alex.wait_for("(connecting)")

    alex.type(keys)

    assert alex.end() == 1
    assert alex.screen.rows[-3:] == [*LEFT, ""]


@needs_proc
def test_client_that_is_terminated_while_it_is_stopped_ends(chat: Chat) -> None:
    """Continued in the background it may not touch the terminal: that would stop it."""
    alex, bob = chat()
    process = alex.pid()
    alex.type(CTRL_Z)
    assert alex.status() == 128 + signal.SIGTSTP

    os.kill(process, signal.SIGTERM)
    os.kill(process, signal.SIGCONT)

    def has_ended() -> bool:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return True
        return stat.rpartition(")")[2].split()[0] == "Z"

    assert bob.line() == "* Alex has left the chat."
    wait_until(has_ended)
    assert alex.modes() == alex.modes_before


def test_no_to_a_long_paste_keeps_what_stood_behind_the_cursor(chat: Chat) -> None:
    alex, bob = chat()
    lines = [f"line {number}" for number in range(6)]

    alex.type(f"say now{ARROW_LEFT * 4}{paste(*lines, '')}")
    alex.wait_for("Send 6 lines?")
    alex.type(ENTER)
    alex.wait_until(lambda: alex.screen.rows[-1] == "You: sayline 0 now")
    alex.type(f"!{ENTER}")

    assert bob.line() == "Alex: sayline 0! now"


def test_pasted_lines_that_were_not_sent_are_counted_when_the_connection_is_lost(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address, changed(SMALL_SEND_BUFFER))
    caller = join(puppet, alex)
    alex.type(paste(*["x" * 1000] * 200, "") + f"y{ENTER}")
    alex.wait_until(lambda: "You: x" in alex.output)
    while not alex.is_silent(0.3):
        alex.drain()

    caller.reset()

    alex.wait_for("not sent")
    (unsent,) = re.findall(r"not sent: (\d+)", alex.output)
    assert 0 < int(unsent) == 200 - alex.output.count("You: x")


def test_password_on_a_dumb_terminal_is_not_shown_after_ctrl_z_and_fg(
    puppet: Puppet, start_terminal: StartTerminal
) -> None:
    alex = start_terminal(puppet.address, TERM="dumb")
    go_to("name", alex)
    alex.type(f"Alex{ENTER}")
    caller = puppet.accept()
    assert caller.line() == "Alex"
    caller.say("? Its password?")
    alex.wait_until(lambda: alex.screen.rows[-1] == "Password:")
    hidden = alex.modes()

    alex.type(CTRL_Z)
    assert alex.status() == 128 + signal.SIGTSTP
    assert alex.modes() == alex.modes_before
    alex.resume()
    wait_until(lambda: alex.modes() == hidden)
    alex.type(f"correct horse{ENTER}")

    assert caller.line() == "correct horse"
    assert "correct" not in alex.output


def test_reset_while_a_pipe_is_leaving_is_told_and_has_status_1(
    puppet: Puppet, start_piped: StartPiped
) -> None:
    piped = start_piped(puppet.address)
    piped.write("1\nAlex\nHello\nq\n")
    caller = puppet.welcome()
    piped.output.until("Leaving the chat...")

    caller.reset()

    lost = "Connection lost: Connection reset by peer."
    assert piped.end() == (1, [lost, "Connection closed."])
