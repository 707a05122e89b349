"""Break the program in many ways, one at a time, and see that a test notices each.

    python tests/mutants.py                          # all of them, a few minutes
    python tests/mutants.py --list
    python tests/mutants.py --only send-blocks       # repeatable

A mutant is a search and replace in one module, done in a scratch copy of the working
tree.  The tests that should notice it run first; if they pass, the whole suite does.
A line per mutant says which test noticed it, or SURVIVED.  "(hang guard)" means that
the mutant made the test wait until its time was up.  The same tests run once on a copy
that nothing was done to: a test that fails anyway notices nothing.  The exit status
is 1 if one of them fails there, or a mutant survived or cannot be tried, for instance
since its text is not there any more.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
MODULES = ("protocol.py", "server.py", "client.py", "console.py")
AT_ONCE = 2
TEST_SECONDS = 15  # for one test
NAMED_SECONDS = 75.0  # for the tests that a mutant names, then they are killed
SUITE_SECONDS = 600.0  # for all of them

SURVIVED = "SURVIVED"


class Mutant(NamedTuple):
    """One way to break the program."""

    name: str
    file: str
    old: str  # occurs exactly once
    new: str
    tests: str  # what should notice it, as pytest -k takes it


class Outcome(NamedTuple):
    """What became of a mutant."""

    noticed: bool
    text: str


class CannotTryError(Exception):
    """A mutant that does not fit, or names no test; str() of it says why."""


PROTOCOL_MUTANTS = [
    # --- lines
    Mutant(
        "line-limit-one-less",
        "protocol.py",
        "if len(line) > MAX_LINE_BYTES:",
        "if len(line) >= MAX_LINE_BYTES:",
        "test_a_line_up_to_the_limit_is_good",
    ),
    Mutant(
        "line-limit-one-more",
        "protocol.py",
        "if len(line) > MAX_LINE_BYTES:",
        "if len(line) > MAX_LINE_BYTES + 1:",
        "test_a_line_above_the_limit_is_refused",
    ),
    Mutant(
        "unfinished-line-limit-one-less",
        "protocol.py",
        "> self._max_bytes:",
        ">= self._max_bytes:",
        "test_a_line_too_long_is_reported_before_its_newline_comes",
    ),
    Mutant(
        "unfinished-line-limit-one-more",
        "protocol.py",
        "> self._max_bytes:",
        "> self._max_bytes + 1:",
        "test_a_line_too_long_is_reported_before_its_newline_comes",
    ),
    Mutant(
        "endless-line-kept",
        "protocol.py",
        "        if self._skipping:\n",
        "        if self._skipping:\n"
        "            self.__dict__.setdefault('kept', []).append(chunk + b'.')\n",
        "test_the_splitter_keeps_little_of_an_endless_line",
    ),
    Mutant(
        "bad-bytes-replaced",
        "protocol.py",
        "clean(line.decode(ENCODING))",
        'clean(line.decode(ENCODING, "replace"))',
        "test_a_line_that_is_not_utf8_is_refused",
    ),
    Mutant(
        "splitlines",
        "protocol.py",
        '.replace(b"\\r\\n", b"\\n").split(b"\\n")\n',
        ".__add__(b'.').splitlines()\n        lines[-1] = lines[-1][:-1]\n",
        "test_only_a_newline_ends_a_line",
    ),
    Mutant(
        "carriage-return-kept",
        "protocol.py",
        '.replace(b"\\r\\n", b"\\n")',
        "",
        "test_the_end_of_a_line_does_not_count_towards_its_length",
    ),
    # --- text
    Mutant(
        "bidi-controls-pass",
        "protocol.py",
        r"\u202a-\u202e\u2066-\u2069",
        "",
        "test_what_drives_a_terminal_or_reorders_text_is_replaced",
    ),
    Mutant(
        "c1-controls-pass",
        "protocol.py",
        r"\x7f-\x9f",
        r"\x7f",
        "test_what_drives_a_terminal_or_reorders_text_is_replaced",
    ),
    Mutant(
        "tab-not-expanded",
        "protocol.py",
        'text.replace("\\t", "    ")',
        "text",
        "test_a_tab_becomes_four_spaces",
    ),
    Mutant(
        "blank-lines-pass",
        "protocol.py",
        'return "" if text.isspace() else text',
        "return text",
        "test_a_blank_line_has_no_text",
    ),
    # --- names
    Mutant(
        "names-compared-with-case",
        "protocol.py",
        'name = unicodedata.normalize("NFKC", name.casefold())',
        'name = unicodedata.normalize("NFKC", name)',
        "test_names_that_differ_in_case_or_width_are_one",
    ),
    Mutant(
        "names-compared-without-nfkc",
        "protocol.py",
        'name = unicodedata.normalize("NFKC", name.casefold())',
        "name = name.casefold()",
        "test_names_that_differ_in_case_or_width_are_one",
    ),
    Mutant(
        "names-folded-once",
        "protocol.py",
        "for _ in range(2):",
        "for _ in range(1):",
        "test_the_key_of_a_key_is_itself",
    ),
    Mutant(
        "names-shown-without-nfkc",
        "protocol.py",
        'name = unicodedata.normalize("NFKC", text.strip())',
        "name = text.strip()",
        "test_a_name_is_trimmed_and_brought_to_nfkc",
    ),
    Mutant(
        "reserved-names-allowed",
        "protocol.py",
        "if name_key(name) in RESERVED_NAMES:",
        "if False:",
        "test_a_reserved_name_is_refused",
    ),
    Mutant(
        "reserved-names-in-capitals-allowed",
        "protocol.py",
        "if name_key(name) in RESERVED_NAMES:",
        "if name in RESERVED_NAMES:",
        "test_a_reserved_name_is_refused",
    ),
    Mutant(
        "scripts-mixed",
        "protocol.py",
        "& _LOOKALIKE_SCRIPTS) > 1:",
        "& _LOOKALIKE_SCRIPTS) > 2:",
        "test_a_name_does_not_mix_scripts_that_look_alike",
    ),
    # --- what the client shows
    Mutant(
        "server-not-cleaned",
        "protocol.py",
        'return clean(line.decode(ENCODING, "replace"))',
        'return line.decode(ENCODING, "replace")',
        "test_line_from_the_server_is_cleaned_before_it_is_shown",
    ),
    Mutant(
        "shown-line-not-cut",
        "protocol.py",
        "if len(line) <= MAX_SHOWN_BYTES:",
        "if True:",
        "test_line_from_the_server_is_cut_at_32_kibibytes",
    ),
]

SERVER_MUTANTS = [
    # --- connections come
    Mutant(
        "port-not-reused",
        "server.py",
        "listener = socket.create_server(\n"
        "                address, family=family, backlog=LISTEN_BACKLOG\n"
        "            )",
        "listener = socket.socket(family)\n"
        "            listener.bind(address)\n"
        "            listener.listen(LISTEN_BACKLOG)",
        "test_a_signal_ends_the_server_in_order",
    ),
    Mutant(
        "no-pause-without-descriptors",
        "server.py",
        "self._arrivals.select(ACCEPT_PAUSE_SECONDS)",
        "self._arrivals.select(0)",
        "test_out_of_descriptors_the_server_serves_those_inside_and_does_not_spin",
    ),
    Mutant(
        "open-file-limit-not-raised",
        "server.py",
        "needed = clients + SPARE_DESCRIPTORS",
        "needed = 0",
        "test_the_server_raises_its_own_limit_of_open_files",
    ),
    Mutant(
        "full-room-refuses",
        "server.py",
        "longest_waiting = next(iter(self._waiting), None)",
        "longest_waiting = None",
        "test_the_longest_waiting_connection_makes_room_in_a_full_chat",
    ),
    Mutant(
        "newest-makes-room",
        "server.py",
        "longest_waiting = next(iter(self._waiting), None)",
        "longest_waiting = next(reversed(self._waiting), None)",
        "test_the_longest_waiting_connection_makes_room_in_a_full_chat",
    ),
    Mutant(
        "one-client-too-many",
        "server.py",
        "len(self._waiting) >= self._max_clients:",
        "len(self._waiting) > self._max_clients:",
        "test_members_up_to_the_limit_join_and_the_next_one_is_refused",
    ),
    Mutant(
        "silence-never-ends",
        "server.py",
        "self.join_by = time.monotonic() + JOIN_SECONDS",
        "self.join_by = FOREVER",
        "test_who_has_not_joined_in_time_is_told_so_and_closed",
    ),
    Mutant(
        "busy-stranger-stays",
        "server.py",
        "while lines and not client.cut_off:",
        "while lines:",
        "test_who_has_not_joined_in_time_is_closed_though_it_keeps_sending",
    ),
    # --- joining
    Mutant(
        "sixth-name-heard",
        "server.py",
        "MAX_NAMES_TRIED = 5",
        "MAX_NAMES_TRIED = 6",
        "test_after_five_refused_names_the_connection_is_closed",
    ),
    Mutant(
        "fifth-name-not-heard",
        "server.py",
        "MAX_NAMES_TRIED = 5",
        "MAX_NAMES_TRIED = 4",
        "test_the_fifth_name_may_be_the_good_one",
    ),
    Mutant(
        "welcome-names-too-many",
        "server.py",
        "MAX_NAMES_LISTED = 20",
        "MAX_NAMES_LISTED = 21",
        "test_the_welcome_names_twenty_people_and_how_many_more",
    ),
    Mutant(
        "taken-name-by-its-letters",
        "server.py",
        "if key in self._keys:",
        "if name in self.clients:",
        "test_a_name_that_differs_in_case_or_width_is_taken",
    ),
    Mutant(
        "name-checked-outside-lock",
        "server.py",
        "        with self._lock:\n            if client not in self._waiting:",
        "        taken = key in self._keys\n        time.sleep(0.01)\n"
        "        if not taken:\n            self._keys.discard(key)\n"
        "        with self._lock:\n            if client not in self._waiting:",
        "test_one_of_fifty_claims_of_a_name_at_one_moment_wins",
    ),
    Mutant(
        "newcomer-hears-the-past",
        "server.py",
        "first = 0 if move is _Move.JOIN else start",
        "first = start",
        "test_all_members_see_one_order",
    ),
    # --- messages
    Mutant(
        "author-hears-itself",
        "server.py",
        "self._append(_Entry(client, message, reply))",
        "self._append(_Entry(client, message, message + reply))",
        "test_a_message_goes_to_every_member_but_its_sender",
    ),
    Mutant(
        "log-backwards",
        "server.py",
        "entries = self._log\n",
        "entries = self._log[::-1]\n",
        "test_all_members_see_one_order",
    ),
    Mutant(
        "two-send-at-once",
        "server.py",
        "        if may_send and self._sending.acquire(blocking=False):\n"
        "            try:\n"
        "                if entries := self._take_log():\n"
        "                    self._send_round(entries)\n"
        "            finally:\n"
        "                self._sending.release()\n",
        "        if True:\n"
        "            if entries := self._take_log():\n"
        "                self._send_round(entries)\n",
        "test_all_members_see_one_order or test_all_see_one_order",
    ),
    Mutant(
        "entry-outside-lock",
        "server.py",
        "            self._append(_Entry(client, message, reply))\n",
        "        time.sleep(0.01)\n"
        "        self._append(_Entry(client, message, reply))\n",
        "test_all_that_was_logged_arrives_before_the_shutdown",
    ),
    # --- sending
    Mutant(
        "send-blocks",
        "server.py",
        "sent = client.send(data, MSG_DONTWAIT)\n            except BlockingIOError:\n"
        "                sent = 0",
        "sent = client.send(data, 0)\n            except BlockingIOError:\n"
        "                sent = 0",
        "test_a_slow_reader_is_dropped_and_others_keep_receiving",
    ),
    Mutant(
        "rest-of-a-send-forgotten",
        "server.py",
        "                self._hold(client, len(data) - sent)\n",
        "                pass\n",
        "test_messages_that_a_socket_takes_in_pieces_arrive_whole_and_once",
    ),
    # --- a round that grows
    Mutant(
        "rounds-do-not-grow",
        "server.py",
        "self._send_round(entries, may_grow=True)",
        "self._send_round(entries)",
        "test_the_rounds_of_the_broadcaster_grow",
    ),
    Mutant(
        "growth-waits-for-the-round",
        "server.py",
        "            if self._log and given >= grow_after:\n                break\n",
        "",
        "test_what_is_said_in_a_round_goes_to_the_next_member_at_once",
    ),
    Mutant(
        "batch-for-one-turn-less",
        "server.py",
        "under_way.append((turn + len(readers) + len(joining), entries))",
        "under_way.append((turn + len(readers) + len(joining) - 1, entries))",
        "test_everybody_gets_what_the_log_says",
    ),
    Mutant(
        "newcomers-before-the-others",
        "server.py",
        "turns = chain(islice(turns, len(readers)), joining)",
        "turns = chain(joining, islice(turns, len(readers)))",
        "test_everybody_gets_what_the_log_says",
    ),
    Mutant(
        "slow-readers-get-the-latest-only",
        "server.py",
        "kept = kept or (this_round if self._slow_readers else None)",
        "kept = this_round if self._slow_readers else None",
        "test_everybody_gets_what_the_log_says",
    ),
    Mutant(
        "growth-goes-on-with-slow-readers",
        "server.py",
        "                self._hold(client, len(data) - sent)\n"
        "                all_took = False\n",
        "                self._hold(client, len(data) - sent)\n",
        "test_everybody_gets_what_the_log_says",
    ),
    Mutant(
        "growth-goes-on-with-the-dropped",
        "server.py",
        "                self._drop(client, error)\n                all_took = False\n",
        "                self._drop(client, error)\n",
        "test_everybody_gets_what_the_log_says",
    ),
    Mutant(
        "chain-never-ends",
        "server.py",
        "self._last_link = self._keep(kept) if kept else None",
        "self._last_link = self._keep(kept) if kept else self._last_link",
        "test_everybody_gets_what_the_log_says",
    ),
    Mutant(
        "empty-sends",
        "server.py",
        "            if not data:\n                continue  # replies for others",
        "            if False:\n                continue  # replies for others",
        "test_a_reply_is_sent_to_nobody_else or test_a_reply_that_joins_a_round",
    ),
    Mutant(
        "growth-at-every-turn",
        "server.py",
        "may_grow_at = turn + math.ceil(len(readers) / GROWTHS_PER_ROUND)",
        "may_grow_at = turn",
        "test_a_round_grows_so_often_while_each_member_has_one_turn",
    ),
    Mutant(
        "growth-without-end",
        "server.py",
        "may_grow and len(this_round.block) < MAX_GROWING_BYTES",
        "may_grow and len(this_round.block) <= MAX_GROWING_BYTES",
        "test_a_round_grows_while_less_than_so_many_bytes_are_under_way",
    ),
    Mutant(
        "any-processor",
        "server.py",
        "    _stay_on_one_processor()  # the first",
        "    # the first",
        "test_the_server_stays_on_one_processor",
    ),
    Mutant(
        "processor-must-be-had",
        "server.py",
        "    except (AttributeError, OSError):\n        pass  # the system has",
        "    except AttributeError:\n        pass  # the system has",
        "test_the_server_runs_where_it_may_not_choose",
    ),
    Mutant(
        "backlog-copied",
        "server.py",
        "            size = len(this_round.data(client))\n",
        # A part of each is enough to notice, and spares the machine gigabytes.
        "            size = len(this_round.data(client))\n"
        "            copies = self.__dict__.setdefault('copies', [])\n"
        "            copies.append(this_round.data(client)[:128])\n",
        "test_a_thousand_stalled_members_share_what_waits_for_them",
    ),
    Mutant(
        "backlog-unlimited",
        "server.py",
        "if held > MAX_BACKLOG_BYTES:",
        "if False:",
        "test_a_slow_reader_is_dropped_above_the_limit_and_not_at_it",
    ),
    Mutant(
        "backlog-limit-one-less",
        "server.py",
        "if held > MAX_BACKLOG_BYTES:",
        "if held >= MAX_BACKLOG_BYTES:",
        "test_a_slow_reader_is_dropped_above_the_limit_and_not_at_it",
    ),
    Mutant(
        "no-brake",
        "server.py",
        "return FULL_ROUND_SECONDS * fullness",
        "return 0 * fullness",
        "test_who_reads_four_megabytes_a_second_stays_however_fast_others_write",
    ),
    Mutant(
        "each-round-a-link",
        "server.py",
        "if last.cut_bytes + len(last.block) + len(this_round.block) <= LINK_BYTES:",
        "if False:",
        "test_what_waits_costs_little_more_than_its_bytes",
    ),
    Mutant(
        "links-of-refusals-without-end",
        "server.py",
        "if last.cut_bytes + len(last.block) + len(this_round.block) <= LINK_BYTES:",
        "if len(last.block) + len(this_round.block) <= LINK_BYTES:",
        "test_refusals_that_have_been_read_do_not_count",
    ),
    Mutant(
        "cuts-in-the-wrong-place",
        "server.py",
        "_Cut(start + shift, end + shift, instead)",
        "_Cut(start, end, instead)",
        "test_a_slow_reader_that_speaks_sees_all_but_its_own_lines",
    ),
    Mutant(
        "cuts-of-others-kept",
        "server.py",
        "        this_round.keep_cuts_of(self._slow_readers)\n",
        "        this_round.keep_cuts_of(self._members)\n",
        "test_a_slow_reader or test_what_waits or test_model",
    ),
    Mutant(
        "refusals-wait-without-limit",
        "server.py",
        "held = behind - client.offset + client.cut_bytes",
        "held = behind - client.offset",
        "test_refusals_that_their_author_does_not_read_are_bounded",
    ),
    Mutant(
        "long-name-fills-the-log",
        "server.py",
        "taken = allowance.take(min(len(lines), most))",
        "taken = allowance.take(len(lines) if client.name else 1)",
        "test_what_goes_into_the_log_at_once_is_bounded_in_lines",
    ),
    Mutant(
        "joins-hold-up-others",
        "server.py",
        "MAX_JOIN_PAUSE_SECONDS = 0.02",
        "MAX_JOIN_PAUSE_SECONDS = 0.2",
        "test_what_is_said_after_a_join_waits_for_an_instant_only",
    ),
    Mutant(
        "every-join-told-at-once",
        "server.py",
        "        if joining:\n",
        "        if False:\n",
        "test_what_is_said_after_a_join_waits_for_an_instant_only",
    ),
    Mutant(
        "brake-too-hard",
        "server.py",
        "FULL_ROUND_SECONDS = 0.08",
        "FULL_ROUND_SECONDS = 0.8",
        "test_a_trickle_reader_delays_nobody",
    ),
    Mutant(
        "log-unlimited",
        "server.py",
        "while self._log and self._log_bytes + size > limit:",
        "while False:",
        "test_who_reads_four_megabytes_a_second_stays_however_fast_others_write",
    ),
    # --- the rate
    Mutant(
        "rate-ignored",
        "server.py",
        "if not self._per_second:",
        "if True:",
        "test_a_line_above_the_burst_is_read_later_and_not_lost",
    ),
    Mutant(
        "burst-one-less",
        "server.py",
        "int(self._lines)",
        "int(self._lines - 1)",
        "test_a_burst_up_to_ten_seconds_worth_arrives_at_once",
    ),
    Mutant(
        "burst-one-more",
        "server.py",
        "int(self._lines)",
        "int(self._lines + 1)",
        "test_a_line_above_the_burst_is_read_later_and_not_lost",
    ),
    # --- connections go
    Mutant(
        "leaving-announced-twice",
        "server.py",
        "_Entry(client, left, move=_Move.LEAVE)",
        "_Entry(client, left * 2, move=_Move.LEAVE)",
        "test_server and test_a_leaving_is_announced_once",
    ),
    Mutant(
        "leaving-never-announced",
        "server.py",
        "_Entry(client, left, move=_Move.LEAVE)",
        '_Entry(client, b"", move=_Move.LEAVE)',
        "test_server and test_a_leaving_is_announced_once",
    ),
    Mutant(
        "removed-twice",
        "server.py",
        "if self.clients.get(client.name) is not client_socket:",
        "if not client.name:",
        "test_removing_a_client_twice_is_announced_once",
    ),
    Mutant(
        "rival-removes-owner",
        "server.py",
        "if self.clients.get(client.name) is not client_socket:",
        "if client.name not in self.clients:",
        "test_removing_a_client_again_spares_the_next_owner_of_its_name",
    ),
    Mutant(
        "write-error-discards-input",
        "server.py",
        "client.broken = error.strerror or str(error)\n        self._members",
        "client.broken = client.cut_off = error.strerror or str(error)\n"
        "        self._members",
        "test_what_was_sent_before_closing_is_delivered_though_writing_fails",
    ),
    Mutant(
        "closed-with-input-unread",
        "server.py",
        "while (seconds := deadline - time.monotonic()) > 0:",
        "while (seconds := 0):",
        "test_who_leaves_still_receives_what_was_said_before",
    ),
    Mutant(
        "last-send-not-awaited",
        "server.py",
        "if not last_send.wait(LINGER_SECONDS):",
        "if False:",
        "test_who_leaves_still_receives_what_was_said_before",
    ),
    # --- the shutdown
    Mutant(
        "no-last-notice",
        "server.py",
        "self._append(_Entry(None, notice))",
        "pass",
        "test_a_signal_ends_the_server_in_order",
    ),
    Mutant(
        "second-signal-ignored",
        "server.py",
        "        signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_DFL)\n",
        "        pass\n",
        "test_a_second_interrupt_ends_the_server_at_once",
    ),
    Mutant(
        "shutdown-waits-for-all",
        "server.py",
        "self._give_up_at = deadline",
        "self._give_up_at = deadline + 60",
        "test_a_stalled_member_does_not_hold_up_the_shutdown",
    ),
    Mutant(
        "brake-outlasts-shutdown",
        "server.py",
        "elif self._closing.wait(ALLOWANCE_PAUSE_SECONDS):",
        "elif time.sleep(3) or self._closing.is_set():",
        "test_a_shutdown_wakes_one_who_is_braked",
    ),
    # --- the terminal
    Mutant(
        "left-out-not-counted",
        "server.py",
        "self._left_out_lines += len(lines)",
        "pass",
        "test_up_to_ten_thousand_lines_wait_for_the_terminal",
    ),
    Mutant(
        "log-writer-unbounded",
        "server.py",
        "if self._unwritten_lines + len(lines) > MAX_UNWRITTEN_LINES:",
        "if False:",
        "test_up_to_ten_thousand_lines_wait_for_the_terminal",
    ),
    Mutant(
        "log-writer-one-less",
        "server.py",
        "len(lines) > MAX_UNWRITTEN_LINES:",
        "len(lines) >= MAX_UNWRITTEN_LINES:",
        "test_up_to_ten_thousand_lines_wait_for_the_terminal",
    ),
    Mutant(
        "log-not-cleaned",
        "server.py",
        "protocol.clean(line) for line in record",
        "line for line in record",
        "test_whatever_is_logged_gets_to_the_terminal_cleaned",
    ),
]

CLIENT_MUTANTS = [
    # --- the connection
    Mutant(
        "main-thread-not-nudged",
        "client.py",
        "        self._end = end\n        self._terminal.nudge()\n",
        "        self._end = end\n",
        "test_killed_server_is_told_within_a_second",
    ),
    Mutant(
        "full-server-not-noticed",
        "client.py",
        'return line.mark == "!" and line.text.startswith(protocol.FULL)',
        "return False",
        "test_full_server_says_so_once_1_was_chosen",
    ),
    Mutant(
        "no-reconnect",
        "client.py",
        "            self._open(LEAVE_SECONDS)\n",
        '            raise OSError("no")\n',
        "test_connection_that_ended_at_the_menu_is_made_again",
    ),
    Mutant(
        "no-look-at-the-menu",
        "client.py",
        "            self._status = 1  # until it is in\n        self._check_connection()\n",
        "            self._status = 1  # until it is in\n",
        "test_server_that_cannot_be_reached_again_from_the_menu",
    ),
    Mutant(
        "any-line-is-the-answer",
        "client.py",
        "            elif line.mark:\n",
        "            elif self._awaits_answer:\n",
        "test_line_before_the_answer_to_the_name",
    ),
    Mutant(
        "endless-line-not-shown",
        "client.py",
        "protocol.LineSplitter(protocol.MAX_SHOWN_BYTES)",
        "protocol.LineSplitter(1 << 30)",
        "test_beginning_of_an_endless_line_is_shown_before_its_end",
    ),
    Mutant(
        "closes-before-the-server",
        "client.py",
        "patience = math.inf if patient else LEAVE_SECONDS",
        "patience = LEAVE_SECONDS",
        "test_piped_client_stays_until_the_server_has_had_its_say",
    ),
    Mutant(
        "hanging-server-waited-for-for-ever",
        "client.py",
        "interrupted or not 0 < unread < before",
        "False",
        "test_server_that_hangs_holds_up_the_leaving",
    ),
    Mutant(
        "sending-not-watched",
        "client.py",
        "self._terminal.wait(is_sent, patience, self._socket)",
        "self._terminal.wait(is_sent, math.inf, self._socket)",
        "test_leaving_in_the_middle_of_a_paste",
    ),
    Mutant(
        "answer-not-watched",
        "client.py",
        "return self._terminal.wait(fact, LEAVE_SECONDS)",
        "return self._terminal.wait(fact, math.inf)",
        "test_leaving_a_server_that_does_not_answer or test_pipe_that_ends_before",
    ),
    Mutant(
        "ends-when-the-connection-is-lost",
        "client.py",
        "                if not self._terminal.person:\n                    raise\n",
        "                raise\n",
        "test_half_typed_line_is_typed_on_after",
    ),
    Mutant(
        "pipe-stays-when-the-connection-is-lost",
        "client.py",
        "                if not self._terminal.person:\n                    raise\n",
        "",
        "test_piped_client_ends_by_itself_when_the_server_does",
    ),
    Mutant(
        "name-not-offered",
        "client.py",
        "or self._name:\n",
        ":\n",
        "test_half_typed_line_is_typed_on_after",
    ),
    Mutant(
        "half-typed-line-lost",
        "client.py",
        "                self._draft = woken.draft or self._draft\n",
        "                self._draft = self._draft\n",
        "test_half_typed_line_is_typed_on_after",
    ),
    Mutant(
        "loss-forgotten-by-the-status",
        "client.py",
        "                self._status = 1\n                if not",
        "                if not",
        "test_killed_server_is_told_within_a_second",
    ),
    Mutant(
        "status-of-a-loss-kept-after-joining",
        "client.py",
        "self._status, self._name = 0, name",
        "self._name = name",
        "test_half_typed_line_is_typed_on_after",
    ),
    Mutant(
        "pipe-that-never-got-in-succeeds",
        "client.py",
        "            self._status = 1  # until it is in\n",
        "            pass\n",
        "test_pipe_that_leaves_before_the_chat or test_pipe_whose_names",
    ),
    Mutant(
        "bug-in-the-receiver-not-told",
        "client.py",
        "            raise bug\n",
        "            pass\n",
        "test_bug_in_the_receiver",
    ),
    Mutant(
        "password-sent-as-a-name",
        "client.py",
        "None if password is None else self._exchange(password)",
        "None if password is None else self._send_name(password)",
        "test_password_is_never_sent_on_a_new_connection",
    ),
    Mutant(
        "password-shown",
        "client.py",
        '            "Password: ", hidden=True, until',
        '            "Password: ", hidden=False, until',
        "test_password_in_the_chat or test_password_in_a_pipe",
    ),
    Mutant(
        "question-not-waited-for",
        "client.py",
        "if protocol.split_command(text)[0] not in SECRET_COMMANDS:",
        "if True:",
        "test_password_in_a_pipe",
    ),
    Mutant(
        "pasted-q-without-blank",
        "client.py",
        '            text += " "',
        '            text += ""',
        "test_pasted_q_is_text",
    ),
    Mutant(
        "interrupt-while-importing-told",
        "client.py",
        "    signal.signal(signal.SIGINT, signal.SIG_DFL)",
        "    pass",
        "test_ctrl_c_while_python_imports",
    ),
    Mutant(
        "old-python-not-told",
        "client.py",
        "if sys.hexversion < 0x030B0000:",
        "if False:",
        "test_old_python_is_one_line",
    ),
    Mutant(
        "missing-streams-not-filled",
        "client.py",
        "    _fill_standard_streams()\n",
        "",
        "test_stream_without_a_descriptor",
    ),
    Mutant(
        "escapes-on-a-dumb-terminal",
        "client.py",
        ' or os.environ.get("TERM") == "dumb"',
        "",
        "test_dumb_terminal_gets_plain_lines",
    ),
    Mutant(
        "ctrl-c-status-wrong",
        "client.py",
        "INTERRUPTED = 130",
        "INTERRUPTED = 1",
        "test_interrupted_piped_client_leaves_with_status_130",
    ),
    # --- the screen
    Mutant(
        "cursor-jumps-to-the-end",
        "console.py",
        "            self._draw(text)\n",
        "            self._place = len(self._text)\n            self._draw(text)\n",
        "test_lines_of_others_appear_above",
    ),
    Mutant(
        "full-row-misdrawn",
        "console.py",
        '" \\r" if end_row',
        '"" if end_row',
        "test_lines_of_others_appear_above",
    ),
    Mutant(
        "wide-as-narrow",
        "console.py",
        'return 2 if unicodedata.east_asian_width(char) in "WF" else 1',
        "return 1",
        "test_lines_of_others_appear_above",
    ),
    Mutant(
        "combining-as-a-cell",
        "console.py",
        '("Mn", "Me", "Cf")',
        '("Me", "Cf")',
        "test_lines_of_others_appear_above",
    ),
    Mutant(
        "joined-emoji-counted-apart",
        "console.py",
        "if width and place and text[place - 1] == _JOINER:",
        "if False:",
        "test_joined_emoji_in_the_line",
    ),
    Mutant(
        "all-of-a-huge-line-drawn",
        "console.py",
        "    before, after = before[start:], after[:near]\n",
        "",
        "test_huge_pasted_line",
    ),
    Mutant(
        "colours-in-spite-of-no-color",
        "console.py",
        'not os.environ.get("NO_COLOR")',
        "True",
        "test_no_color_means_no_colours",
    ),
    Mutant(
        "private-like-public",
        "console.py",
        "        if line.private:\n            return",
        "        if False:\n            return",
        "test_private_message_looks_unlike",
    ),
    Mutant(
        "own-name-like-any-word",
        "console.py",
        'rf"(?<!\\w){re.escape(name)}(?!\\w)"',
        "re.escape(name)",
        "test_own_name_is_bold or test_bell",
    ),
    Mutant(
        "times-left-out",
        "console.py",
        'time.strftime("%H:%M ") if self._times else ""',
        '""',
        "test_times_stand_before",
    ),
    Mutant(
        "window-size-not-followed",
        "console.py",
        "signal.signal(signal.SIGWINCH, lambda *_: None)",
        "pass",
        "test_change_of_the_windows_size_keeps_what_was_typed",
    ),
    # --- the keyboard
    Mutant(
        "history-with-all-answers",
        "console.py",
        "if answer and until is not _never and not hidden:",
        "if answer:",
        "test_menu_answers_and_names_are_not or test_password",
    ),
    Mutant(
        "words-end-inside-a-character",
        "console.py",
        "            place = _right(text, place)\n",
        "            place += 1\n",
        "test_editing_keys",
    ),
    Mutant(
        "long-paste-not-asked-about",
        "console.py",
        "        if len(lines) <= MAX_PASTED_LINES:\n",
        "        if True:\n",
        "test_long_paste_is_sent",
    ),
    Mutant(
        "no-means-yes",
        "console.py",
        'in ("y", "yes")',
        'in ("y", "yes", "")',
        "test_no_to_a_long_paste",
    ),
    Mutant(
        "pasted-q-leaves",
        "console.py",
        "Pasted(self._pasted.popleft())",
        "self._pasted.popleft()",
        "test_pasted_q_is_text",
    ),
    Mutant(
        "paste-never-ends",
        "console.py",
        "if time.monotonic() - self._last_key_at >= PASTE_SECONDS:",
        "if False:",
        "test_paste_without_an_end_is_taken",
    ),
    Mutant(
        "paste-not-cleaned",
        "console.py",
        "first, *more = map(protocol.clean, ",
        "first, *more = map(str, ",
        "test_control_characters_in_a_paste",
    ),
    Mutant(
        "brackets-left-on",
        "console.py",
        "            self._write(_BRACKETS_OFF)\n\n    # --- Ctrl-Z",
        "            pass\n\n    # --- Ctrl-Z",
        "test_leaving_at_a_terminal",
    ),
    Mutant(
        "typed-ahead-left-for-the-shell",
        "console.py",
        "        self.forget_typed()\n        self._set_modes()\n",
        "        self._set_modes()\n",
        "test_what_is_typed_ahead",
    ),
    Mutant(
        "rest-of-a-paste-left-for-the-shell",
        "console.py",
        "return PASTE_SECONDS if self._keys.pasting else QUIET_SECONDS",
        "return QUIET_SECONDS",
        "test_paste_that_goes_on_after_the_end",
    ),
    Mutant(
        "rest-of-the-sentence-left-for-the-menu",
        "client.py",
        "                self._terminal.forget_typed()\n",
        "",
        "test_rest_of_the_sentence_is_no_answer_to_the_menu",
    ),
    Mutant(
        "modes-not-restored",
        "console.py",
        "        self._restore()\n        signal.set_wakeup",
        "        signal.set_wakeup",
        "test_leaving_at_a_terminal",
    ),
    Mutant(
        "modes-not-restored-by-second-ctrl-c",
        "console.py",
        "            self._restore()\n            os._exit",
        "            os._exit",
        "test_second_ctrl_c_ends_a_leaving or twice",
    ),
    Mutant(
        "termination-not-noticed",
        "console.py",
        "for number in signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT:",
        "for number in ():",
        "test_terminal_is_left_sane",
    ),
    Mutant(
        "tab-only-once",
        "console.py",
        "self._fitting = cycle(names)",
        "self._fitting = iter([names[0]] * 9)",
        "test_tab_completes",
    ),
    # --- pipes, and the end
    Mutant(
        "prompts-not-echoed",
        "console.py",
        "self.show(prompt if hidden else prompt + text)",
        "pass",
        "test_piped_session_reads_like_one_at_a_terminal",
    ),
    Mutant(
        "prompts-before-the-answer",
        "console.py",
        "            if self.person:\n                self._write(prompt)",
        "            self._write(prompt)",
        "test_prompt_in_a_pipe_appears_only_with_its_answer",
    ),
    Mutant(
        "prompt-after-the-answer-with-tee",
        "console.py",
        "self.person = os.isatty(keyboard)",
        "self.person = os.isatty(keyboard) and os.isatty(screen)",
        "test_prompt_goes_out_before",
    ),
    Mutant(
        "last-line-lost",
        "console.py",
        'chunk or b"\\n".removeprefix(self._last)',
        "chunk",
        "test_last_piped_line_without_newline_counts",
    ),
]

MUTANTS = [*PROTOCOL_MUTANTS, *SERVER_MUTANTS, *CLIENT_MUTANTS]


def main() -> int:
    """Try the mutants; return the exit status."""
    options = parse_arguments()
    mutants = [m for m in MUTANTS if not options.only or m.name in options.only]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name:36} {mutant.file:12} {mutant.tests}")
        return 0
    began = time.monotonic()
    noticed = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        unbroken = pool.submit(try_unbroken, mutants)
        tries = [pool.submit(try_mutant, mutant) for mutant in mutants]
        try:
            for mutant, attempt in zip(mutants, tries, strict=True):
                outcome = attempt.result()
                noticed += outcome.noticed
                print(f"{mutant.name:36} {outcome.text}", flush=True)
            baseline = unbroken.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(f"{'(nothing broken)':36} {baseline.text}")
    seconds = time.monotonic() - began
    print(f"{noticed} of {len(mutants)} mutants were noticed, in {seconds:.0f} s")
    return 0 if noticed == len(mutants) and not baseline.noticed else 1


def parse_arguments() -> argparse.Namespace:
    """Return the flags."""
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
    parser = argparse.ArgumentParser(description="See that the tests notice mistakes.")
    parser.add_argument("--list", action="store_true", help="only say which there are")
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME",
        help="try this one, and no others; may be given several times",
    )  # fmt: skip
    return parser.parse_args()


def try_mutant(mutant: Mutant) -> Outcome:
    """Say which test notices a mutant."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        copy = Path(directory)
        try:
            copy_project(copy)
            apply(mutant, copy)
            by = failing_test(copy, NAMED_SECONDS, "-k", mutant.tests)
            if not by and (by := failing_test(copy, SUITE_SECONDS)):
                by += ", which is not the one expected"
        except CannotTryError as error:
            return Outcome(False, f"CANNOT BE TRIED: {error}")
    return Outcome(by != "", by or SURVIVED)


def try_unbroken(mutants: Sequence[Mutant]) -> Outcome:
    """Say which test fails though nothing is broken."""
    tests = " or ".join({f"({mutant.tests})": None for mutant in mutants})
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        copy = Path(directory)
        copy_project(copy)
        try:
            by = failing_test(copy, SUITE_SECONDS, "-k", tests)
        except CannotTryError as error:
            by = str(error)
    return Outcome(by != "", f"FAILS BY ITSELF: {by}" if by else "all of them pass")


def copy_project(copy: Path) -> None:
    """Copy the working tree, as far as the tests need it."""
    for file in (*MODULES, "pyproject.toml"):
        shutil.copy(PROJECT / file, copy)
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / "tests", copy / "tests", ignore=unwanted)


def apply(mutant: Mutant, copy: Path) -> None:
    """Change the copy.  Raises CannotTryError if the text does not fit."""
    path = copy / mutant.file
    source = path.read_text(encoding="utf-8")
    found = source.count(mutant.old)
    if found != 1:
        raise CannotTryError(f"its text is {found} times in {mutant.file}")
    source = source.replace(mutant.old, mutant.new)
    try:
        compile(source, mutant.file, "exec")
    except SyntaxError as error:
        raise CannotTryError(f"line {error.lineno} is not Python then") from None
    path.write_text(source, encoding="utf-8")


def failing_test(copy: Path, seconds: float, *selection: str) -> str:
    """Return the first test that fails in the copy; "" if none does.

    Raises CannotTryError if pytest cannot run these tests.
    """
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=line",
        "--timeout", str(TEST_SECONDS), *selection, "tests",
    ]  # fmt: skip
    report = copy / "report"
    # A file, since a pipe would stay open as long as any process has it.
    with report.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=copy,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            killed = False
        except subprocess.TimeoutExpired:
            status, killed = 1, True
        finally:
            # Also what a test has left behind; the group is gone if there is nothing.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    text = report.read_text(encoding="utf-8", errors="replace")
    if status == 0:
        return ""
    if status != 1:  # pytest has not come to run them
        last = text.strip().rpartition("\n")[2]
        raise CannotTryError(f"pytest has exit status {status}: {last}")
    found = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", text, re.MULTILINE)
    test = found[1] if found else "a test that never ends"
    return f"{test} (hang guard)" if killed or "Timeout (>" in text else test


if __name__ == "__main__":
    sys.exit(main())
