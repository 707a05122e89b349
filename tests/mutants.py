"""Break the program in many ways, one at a time, and see that a test notices each.

    python tests/mutants.py                          # all of them, a few minutes
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
AT_ONCE = 2
TEST_SECONDS = 15  # for one test
NAMED_SECONDS = 75.0  # for the tests that a mutant names, then they are killed
SUITE_SECONDS = 600.0  # for all of them


class Mutant(NamedTuple):
    """One way to break the program."""

    name: str
    file: str
    old: str  # occurs exactly once
    new: str
    tests: str  # what should notice it, as pytest -k takes it


class NotNoticedError(Exception):
    """No test notices a mutant, or it cannot be tried; str() of it says which."""


# Each with its name, the tests that should notice it as pytest -k takes them, what is
# searched for (it occurs exactly once), and what takes its place.
PROTOCOL_MUTANTS = r"""
long-name-in-full: test_a_long_name_is_refused_without_much_ado
- [: 4 * MAX_NAME_CHARS + 1]
+ 
name-cut-too-early: test_a_name_is_trimmed_and_brought_to_nfkc
- [: 4 * MAX_NAME_CHARS + 1]
+ [: 3 * MAX_NAME_CHARS]
line-limit-one-less: test_text_arrives_byte_for_byte
- if len(line) > MAX_LINE_BYTES:
+ if len(line) >= MAX_LINE_BYTES:
line-limit-one-more: test_a_line_above_the_limit
- if len(line) > MAX_LINE_BYTES:
+ if len(line) > MAX_LINE_BYTES + 1:
unfinished-line-limit-one-less: test_a_stream_gives_the_same_lines
- = max_bytes + 2
+ = max_bytes + 1
unfinished-line-limit-one-more: test_a_line_too_long_is_reported
- = max_bytes + 2
+ = max_bytes + 3
endless-line-kept: test_what_all_have_read_and_a_line_without_end
- lines[-1][: self._too_many]
+ lines[-1][: self._too_many]
+         self.__dict__.setdefault('kept', []).append(chunk + b'.')
bad-bytes-replaced: test_a_line_that_is_not_utf8_is_refused
- clean(line.decode(ENCODING))
+ clean(line.decode(ENCODING, "replace"))
splitlines: test_only_a_newline_ends_a_line
- .replace(b"\r\n", b"\n").split(b"\n")
+ .__add__(b'.').splitlines()
+         lines[-1] = lines[-1][:-1]
carriage-return-kept: test_the_end_of_a_line_does_not_count_towards_its_length
- .replace(b"\r\n", b"\n")
bidi-controls-pass: test_what_drives_a_terminal_or_reorders_text_is_replaced
- \u202a-\u202e\u2066-\u2069
c1-controls-pass: test_what_drives_a_terminal_or_reorders_text_is_replaced
- \x7f-\x9f
+ \x7f
tab-not-expanded: test_a_tab_becomes_four_spaces
- text.replace("\t", "    ")
+ text
blank-lines-pass: test_a_blank_line_has_no_text
- return "" if text.isspace() else text
+ return text
names-compared-with-case: test_names_that_differ_in_case_or_width_are_one
- name = unicodedata.normalize("NFKC", name.casefold())
+ name = unicodedata.normalize("NFKC", name)
names-compared-without-nfkc: test_names_that_differ_in_case_or_width_are_one
- name = unicodedata.normalize("NFKC", name.casefold())
+ name = name.casefold()
names-folded-once: test_the_key_of_a_key_is_itself
- for _ in range(2):
+ for _ in range(1):
names-shown-without-nfkc: test_a_name_is_trimmed_and_brought_to_nfkc
- name = unicodedata.normalize("NFKC", text.strip()[: 4 * MAX_NAME_CHARS + 1])
+ name = text.strip()
reserved-names-in-capitals-allowed: test_a_name_that_is_reserved
- if name_key(name) in RESERVED_NAMES:
+ if name in RESERVED_NAMES:
scripts-mixed: test_a_name_that_is_reserved_too_long_mixed
- .intersection(words)) > 1:
+ .intersection(words)) > 2:
server-not-cleaned: test_line_from_the_server_is_cleaned
- return clean(line.decode(ENCODING, "replace"))
+ return line.decode(ENCODING, "replace")
shown-line-not-cut: test_line_from_the_server_is_cleaned_and_cut
- if len(line) <= MAX_SHOWN_BYTES:
+ if True:
command-in-capitals-unknown: test_who_lists_all
- return command.lower(), rest.lstrip()
+ return command, rest.lstrip()
"""
SERVER_MUTANTS = r"""
port-not-reused: test_a_signal_ends_the_server_in_order
- listener = socket.create_server(address, family=family, backlog=LISTEN_BACKLOG)
+ listener = socket.socket(family)
+     listener.bind(address)
+     listener.listen(LISTEN_BACKLOG)
interrupted-with-a-traceback: test_an_interrupt_while_python_imports
-     _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
+     pass
older-python-not-told: test_an_older_python_is_told_what_is_needed
- if sys.version_info < (3, 11):
+ if False:
odd-host-name-with-a-traceback: test_an_unknown_host_is_explained_in_one_line
- os.fsencode(host), port
+ host, port
stdout-must-be-there: test_the_server_runs_without_a_stdout
- sys.stdout or open(os.devnull, "w")  # noqa: SIM115
+ sys.stdout
no-pause-without-descriptors: test_out_of_descriptors_the_server_serves_those_inside_and_does_not_spin
- ACCEPT_PAUSE_SECONDS = 0.1
+ ACCEPT_PAUSE_SECONDS = 0
open-file-limit-not-raised: test_the_server_raises_its_limit_of_open_files
- needed = clients + SPARE_DESCRIPTORS
+ needed = 0
lack-ends-the-server: test_what_accept_tells_of_one_costs_no_other_one
- if isinstance(error, OSError) and error.errno in BROKEN:
+ if isinstance(error, OSError):
any-accept-error-passed-over: test_a_bug_in_accepting_ends_the_server
- if isinstance(error, OSError) and error.errno in BROKEN:
+ if False:
no-thread-left-ends-the-server: test_out_of_threads_the_server_serves_those_inside
- except (OSError, RuntimeError) as error:
+ except OSError as error:
turned-away-without-a-word: test_members_join_up_to_the_limit
- self._broadcaster.append(_Entry(client, b"", protocol.refusal(why)))
+ pass
no-thread-left-not-told: test_out_of_threads_the_server_serves_those_inside
-         except RuntimeError:
+         except KeyError:
silence-never-ends: test_who_has_not_joined_in_time_is_told_so_and_closed
- self._unjoined[client] = time.monotonic() + JOIN_SECONDS
+ self._unjoined[client] = FOREVER
busy-stranger-stays: test_who_has_not_joined_in_time_is_told_so_and_closed
- if client.dropped or closed.is_set():
+ if closed.is_set():
sixth-name-heard: test_after_five_refused_names_the_connection_is_closed
- MAX_NAMES_TRIED = 5
+ MAX_NAMES_TRIED = 6
fifth-name-not-heard: test_after_five_refused_names_the_connection_is_closed
- MAX_NAMES_TRIED = 5
+ MAX_NAMES_TRIED = 4
welcome-names-too-many: test_the_welcome_names_twenty_and_how_many_more
- MAX_NAMES_LISTED = 20
+ MAX_NAMES_LISTED = 21
taken-name-by-its-letters: test_after_a_refused_name_another_one_may_be_sent
- if protocol.name_key(name) in self._owners:
+ if name in self.clients:
name-checked-outside-lock: test_one_of_fifty_claims_of_a_name_at_one_moment_wins
-             self._check_free(name)
-             welcome
+             self._check_free(name)
+             self._lock.release()
+             select.select([], [], [], 0.01)
+             self._lock.acquire()
+             welcome
newcomer-hears-the-past: test_everybody_sees_what_follows or test_all_members_and_the_terminal_see_one_order
- client.faces.append((start, text, end))
+ heard = self._end - len(self._stream) if entry.joins else end
+         client.faces.append((start, text, heard))
welcome-holds-no-stream: test_a_newcomer_that_reads_slowly
- min(client.place, client.faces[0][0] if client.faces else self._end)
+ min(client.place, self._end)
author-hears-itself: test_a_message_goes_to_every_member_but_its_sender
- self._submit(_Entry(sender, encoded), "".join
+ self._submit(_Entry(sender, encoded, encoded), "".join
outbox-backwards: test_all_members_and_the_terminal_see_one_order or test_everybody_sees
- entries, self._outbox = self._outbox, []
+ entries, self._outbox = self._outbox[::-1], []
terminal-told-outside-the-lock: test_all_members_and_the_terminal_see_one_order
-             if told:
-                 self._tell(told)
+             if told:
+                 threading.Timer(0.001, self._tell, [told]).start()
send-blocks: test_a_slow_reader_is_dropped_and_others_go_on
- client.socket.send(block, MSG_DONTWAIT)
+ client.socket.send(block, 0)
rest-of-a-send-forgotten: test_what_a_socket_takes_in_pieces_arrives_whole_once
- client.place += client.socket.send(block, MSG_DONTWAIT)
+ client.place += len(block) if client.socket.send(block, MSG_DONTWAIT) else 0
slow-reader-watched-for-ever: test_an_idle_server_uses_no_cpu
-             self._unwatch(client)
-         elif client not in
+             pass
+         elif client not in
stream-not-forgotten: test_what_all_have_read_and_a_line_without_end
- del self._stream[: place - (self._end - len(self._stream))]
+ pass
unsent-copied: test_a_thousand_stalled_members_share_what_waits
-             client, start = entry.client, self._end
+             client, start = entry.client, self._end
+             to_others = entry.to_others
+             for member in self._slow:  # a part of each is enough to notice
+                 member.__dict__.setdefault("copies", []).append(to_others[:100] + b".")
unsent-limit-one-less: test_a_slow_reader_is_dropped_above_the_limit_and_not_at_it
- if unsent > MAX_UNSENT_BYTES:
+ if unsent >= MAX_UNSENT_BYTES:
unsent-limit-one-more: test_a_slow_reader_is_dropped_above_the_limit_and_not_at_it
- if unsent > MAX_UNSENT_BYTES:
+ if unsent > MAX_UNSENT_BYTES + 1:
refusals-wait-without-limit: test_answers_that_are_not_read_are_bounded
- unsent = self._slow[client] = self._end - first + client.own_bytes
+ unsent = self._slow[client] = self._end - first
stuck-one-slows-all: test_who_reads_nothing_does_not_slow
- if self._slow.get(client, 0) > MAX_UNSENT_BYTES / 2:
+ if True:
wakes-once-in-vain: test_a_bug_in_waking
-             self._selector.wake()
-             self._rests = False
+             self._rests = False
+             self._selector.wake()
answers-for-the-gone: test_answers_for_one_that_is_gone
- if not client.lost:
+ if True:
answers-at-the-end: test_a_shutdown_does_not_wait_for_answers
- if client.dropped or closed.is_set():
+ if client.dropped:
no-back-pressure: test_who_reads_four_megabytes_a_second_stays
- FULL_PASS_SECONDS = 0.08
+ FULL_PASS_SECONDS = 0
back-pressure-too-hard: test_a_trickle_reader_delays_nobody
- FULL_PASS_SECONDS = 0.08
+ FULL_PASS_SECONDS = 0.8
password-of-one-that-is-gone-forgotten: test_what_the_owner_sent_before_a_reset
- while not (client.dropped or self._stopped):
+ while not (client.dropped or self._stopped or client.is_gone()):
back-pressure-not-for-private-messages: test_who_reads_four_megabytes_a_second_stays
- self._taken += entry.size()
+ pass
rate-ignored: test_a_line_above_the_burst_is_read_later_not_lost
- rate = self._lines_per_second or 10**9
+ rate = 10**9
burst-one-less: test_a_burst_up_to_ten_seconds_worth_arrives_at_once
- now - BURST_SECONDS)
+ now - BURST_SECONDS + 1 / rate)
burst-one-more: test_a_line_above_the_burst_is_read_later_not_lost
- now - BURST_SECONDS)
+ now - BURST_SECONDS - 1 / rate)
leaving-announced-twice: test_a_leaving_is_announced_once_and_the_name_is_free
- _Entry(client, left, leaves=True)
+ _Entry(client, left * 2, leaves=True)
name-stays-taken: test_a_leaving_is_announced_once_and_the_name_is_free
- del self._owners[protocol.name_key(client.name)]
+ pass
ghosts-stay: test_the_flood_of_one_that_is_gone
- if now > read_until:
+ if False:
gone-at-once: test_the_flood_of_one_that_is_gone
- if now > read_until:
+ if True:
write-error-discards-input: test_what_was_sent_is_delivered_though_writing_fails
-                 client.lost = protocol.reason_of(error)
-                 client.place
+                 client.dropped = protocol.reason_of(error)
+                 client.place
closed-with-input-unread: test_what_is_sent_after_q_costs_nobody
- (is_over and (is_slow or client.has_ended())):
+ is_over:
last-send-not-awaited: test_who_leaves_still_receives_what_was_said_before
-                 self._leaving[client] = time.monotonic() + seconds
+                 self._leaving[client] = time.monotonic() + seconds
+                 client.place = OVER
+                 self._note_progress(client)
stalled-leaver-kept: test_who_leaves_without_reading_is_not_waited_for
- if until <= now or (is_over
+ if (is_over
own-faces-unlimited: test_what_members_alone_see_is_bounded
- while sum([client.own_bytes for client in self._slow]) > MAX_OWN_BYTES:
+ while False:
bug-in-reading-ends-all: test_a_bug_in_reading_ends_one_connection
- except Exception:  # noqa: BLE001
+ except KeyError:
shutdown-outlasts-the-last-client: test_a_shutdown_is_over_once_all_clients_have_hung_up
- while self._clients or self._outbox or not self.closed.is_set():
+ while True:
bug-ends-with-status-0: test_a_bug_in_sending
- return 1 if bugs else 0
+ return 0
no-last-notice: test_a_signal_ends_the_server_in_order
- self._broadcaster.append(_Entry(client, b"", notice, ends=True))
+ self._broadcaster.append(_Entry(client, b"", ends=True))
second-signal-ignored: test_a_second_interrupt_ends_the_server_at_once
-         signal.signal(signal.SIGINT, signal.SIG_DFL)
-         signal.signal(signal.SIGTERM, signal.SIG_DFL)
+         pass
shutdown-waits-for-all: test_a_stalled_member_does_not_hold_up_the_end
- self._end_at = time.monotonic() + SHUTDOWN_SECONDS
+ self._end_at = time.monotonic() + SHUTDOWN_SECONDS + 60
left-out-not-counted: test_up_to_ten_thousand_lines_wait_for_the_terminal
- self._left_out += len(items[space:])
+ pass
recorder-unbounded: test_up_to_ten_thousand_lines_wait_for_the_terminal
- space = MAX_UNWRITTEN - len(self._unwritten)
+ space = MAX_UNWRITTEN
recorder-one-less: test_up_to_ten_thousand_lines_wait_for_the_terminal
- space = MAX_UNWRITTEN -
+ space = MAX_UNWRITTEN - 1 -
room-in-the-file-promised-twice: test_all_is_kept_in_the_order
- self._due += messages
+ pass
hanging-file-waited-for: test_a_file_that_hangs
- self._fail("it takes too long")
+ pass
journal-not-passed-over: test_a_file_whose_program_died
- "immutable=1"
+ "mode=ro"
log-passed-over: test_a_file_whose_program_died
- "mode=ro" if
+ "immutable=1" if
foreign-database-taken: test_what_is_no_file_of_this_chat
- if look.execute(_READ_COLUMNS).fetchall() != _COLUMNS:
+ if False:
flood-holds-all-up: test_a_flood_waits_for_the_file_and_who_just
- MAX_UNWRITTEN if messages == 1 else MAX_UNWRITTEN // 2
+ MAX_UNWRITTEN // 2
account-not-waited-for: test_scrypt_with_a_salt_each
- self._wait(lambda: item not in self._unwritten)
+ True
unknown-command-said-to-all: test_an_unknown_command_tells_the_room_nothing
- if command not in self._commands:
+ if command not in self._commands and not client.said.append(command):
who-names-too-many-in-a-line: test_who_names_at_most_twenty_in_a_line
- ", ".join(names[first : first + MAX_NAMES_LISTED])
+ ", ".join(names[first : first + MAX_NAMES_LISTED + 1])
private-message-lost-at-leaving: test_a_private_message_to_one_that_has_just_left
- if not has_space or entry.client.socket not in self._connections:
+ if not has_space:
secret-on-the-terminal: test_the_terminal_shows_one_line_for_each_event
- told = f"Private message from {client.name} to {recipient.name}"
+ told = f"Private message from {client.name} to {recipient.name}: {text}"
batch-said-after-its-commands: test_what_two_say_to_each_other_and_to_all_keeps_order
-                 self._say(client)
-                 if command
+                 if command
"""

CLIENT_MUTANTS = r"""
main-thread-not-woken: test_killed_server_is_told_within_a_second
-             self._end = end
-             self._terminal.wake()
+             self._end = end
full-server-not-noticed: test_full_server_says_so_once_1_was_chosen
- self._full = line
+ pass
no-reconnect: test_connection_that_ended_at_the_menu_or_at_the_name
-                 self._connect(LEAVE_SECONDS)
+                 raise OSError("no")
no-look-at-the-menu: test_server_that_cannot_be_reached_again
-             self._status = 1  # until it is in
-         self._check_connection()
+             self._status = 1  # until it is in
any-line-is-the-answer: test_lines_in_pieces
-         elif mark:
-             if self._answer:
+         else:
+             if self._answer:
endless-line-not-shown: test_lines_in_pieces_are_shown_whole
- protocol.LineSplitter(protocol.MAX_SHOWN_BYTES)
+ protocol.LineSplitter(1 << 30)
closes-before-the-server: test_all_that_was_piped_reaches
- self._input_ended and not (in_chat or self._ahead)
+ self._input_ended and not self._ahead
sending-not-watched: test_server_that_hangs_holds_up_the_leaving
- self._wait(is_sent, [self._socket])
+ self._socket.sendall(unsent)
answer-not-watched: test_server_that_hangs or test_pipe_that_ends_before
-             if now >= self._deadline:
+             if now >= self._deadline and writable:
ends-when-the-connection-is-lost: test_half_typed_line_is_typed_on_after
- if self._full or not self._terminal.person:
+ if True:
pipe-stays-when-the-connection-is-lost: test_piped_client_ends_by_itself
- if self._full or not self._terminal.person:
+ if self._full:
name-not-offered: test_half_typed_line_is_typed_on_after
-  or self._name):
+ ):
half-typed-line-lost: test_half_typed_line_is_typed_on_after
- self._line = self.draft if prompt == MESSAGE else Line()
+ self._line = Line()
loss-forgotten-by-the-status: test_killed_server_is_told_within_a_second
-             except ConnectionLost as lost:
-                 self._status = 1
+             except ConnectionLost as lost:
line-being-sent-lost: test_pasted_lines_that_were_not_sent
- self._terminal.draft.before = text + self._terminal.draft.before
+ pass
status-of-a-loss-kept-after-joining: test_half_typed_line_is_typed_on_after
- self._status, self._name = 0, name
+ self._name = name
pipe-that-never-got-in-succeeds: test_pipe_that_leaves_before_the_chat
-             self._status = 1  # until it is in
+             pass
bug-in-the-receiver-not-told: test_bug_in_the_receiver
-         except OSError as error:
-             end = ConnectionLost
+         except (OSError, ArithmeticError) as error:
+             end = ConnectionLost
password-sent-as-a-name: test_password_at_the_name_is_not_shown
- self._exchange(self._terminal.ask(PASSWORD))
+ secret = self._terminal.ask(PASSWORD)
+                 self._check_connection()
+                 self._exchange(secret)
password-shown: test_password_in_the_chat or test_password_in_a_pipe
- PASSWORD = "Password: "
+ MESSAGE = PASSWORD = "Password: "
question-not-waited-for: test_password_in_a_pipe
- if command == SECRET_COMMAND:
+ if False:
password-typed-ahead-said: test_password_in_the_chat_is_hidden
-             self._terminal.forget_typed()  # the
+             pass  # the
earlier-refusal-taken-for-the-answer: test_piped_password_is_said
- self._exchange(command, refusal=f"! {command} ")
+ self._exchange(command)
pasted-q-without-blank: test_pasted_q_is_text
- return f"{line.text} " if leaves else line.text
+ return line.text
interrupt-while-importing-told: test_ctrl_c_while_python_imports
-     _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
+     pass
old-python-not-told: test_old_python_is_one_line
- if sys.version_info < (3, 11):
+ if False:
missing-streams-not-filled: test_stream_without_a_descriptor
-         if getattr(sys, name) is None:
+         if False:
escapes-on-a-dumb-terminal: test_session_at_a_terminal_which_gets_plain_lines
- os.environ.get("TERM") == "dumb" or not
+ not
ctrl-c-status-wrong: test_interrupted_piped_client_leaves_with_status_130
- INTERRUPTED = 130
+ INTERRUPTED = 1
rest-of-the-sentence-left-for-the-menu: test_rest_of_the_sentence
-                 self._terminal.forget_typed()
-
+                 pass
+
"""

TERMINAL_MUTANTS = r"""
cursor-jumps-to-the-end: test_lines_of_others_appear_above
-             if lines:
+             self._line.before, self._line.after = self._line.text, ""
+             if lines:
full-row-misdrawn: test_lines_of_others_appear_above
- " \r" if end_row
+ "" if end_row
wide-as-narrow: test_lines_of_others_appear_above
- return 2 if unicodedata.east_asian_width(char) in "WF" else 1
+ return 1
combining-as-a-cell: test_lines_of_others_appear_above
- ("Mn", "Me", "Cf")
+ ("Me", "Cf")
joined-emoji-counted-apart: test_joined_emoji_in_the_line
- joined = category[0] == "S" and
+ joined = False and
all-of-a-huge-line-drawn: test_huge_pasted_line
- before, text = before[start:], before[start:] + after[:near]
+ text = before + after
colours-in-spite-of-no-color: test_no_color_means_no_colours
- not os.environ.get("NO_COLOR")
+ True
private-like-public: test_private_messages_and_the_own_name_stand_out
-         if mark or private:
+         if mark:
own-name-like-any-word: test_private_messages_and_the_own_name_stand_out
- rf"(?<!\w){re.escape(unicodedata.normalize('NFKC', name))}(?!\w)"
+ re.escape(name)
times-left-out: test_times_stand_before
- time.strftime("%H:%M ") if self._times else ""
+ ""
window-size-not-followed: test_change_of_the_windows_size_keeps
- columns, rows = os.get_terminal_size(self._screen)
+ columns, rows = 80, 24
history-with-all-answers: test_up_and_down_go_through or test_password
- if prompt == MESSAGE and line.text.strip():
+ if line.text.strip():
words-end-inside-a-character: test_editing_keys
-             index = further
+             index += by
long-paste-not-asked-about: test_long_paste_is_sent
- if len(lines) > MAX_PASTED_LINES:
+ if False:
no-means-yes: test_no_to_a_long_paste
- in ("y", "yes")
+ in ("y", "yes", "")
paste-never-ends: test_paste_without_an_end_is_taken
-         elif self._reader.pasting and time.monotonic() >= self._read_at + PASTE_SECONDS:
+         elif False:
stopped-in-a-paste: test_paste_without_an_end_is_taken
- number == signal.SIGTSTP and not self._reader.pasting
+ number == signal.SIGTSTP
paste-kept-open-by-others: test_paste_without_an_end_is_taken
-             seconds = min(seconds, self._read_at + PASTE_SECONDS - time.monotonic())
+             seconds = min(seconds, PASTE_SECONDS)
+             self._read_at = time.monotonic()
corrected-typo-not-seen: test_server_that_hangs
-             line.edit(key)
+             line.before += key
words-of-the-past-as-names: test_tab_completes
- told = text.partition(": ")[0] + ": " if text.startswith("[") else text
+ told = text
tab-goes-on-after-a-paste: test_tab_completes
- self._line.edit(first)
+ self._line.before += first
recalled-q-leaves: test_up_and_down
- self.is_text = self._recalled < -1
+ pass
paste-not-cleaned: test_pasted_q_is_text_as_all_that_is_pasted
- first, *more = map(protocol.clean, 
+ first, *more = map(str, 
brackets-left-on: test_leaving_at_a_terminal
- "\x1b[?2004h" if off else "\x1b[?2004l"
+ "\x1b[?2004h"
typed-ahead-left-for-the-shell: test_what_is_typed_ahead
- typed = True
+ typed = False
rest-of-a-paste-left-for-the-shell: test_paste_that_goes_on_after_the_end
- PASTE_SECONDS if self._reader.pasting else QUIET_SECONDS
+ QUIET_SECONDS
modes-not-restored: test_leaving_at_a_terminal
-             self.empty_keyboard()
-             signal.set_wakeup
+             signal.set_wakeup
modes-not-restored-by-second-ctrl-c: test_what_is_typed_ahead
-                 self.empty_keyboard()
-                 os._exit
+                 os._exit
termination-not-noticed: test_client_that_is_terminated
- for number in signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, *_JOB_SIGNALS:
+ for number in _JOB_SIGNALS:
tab-only-once: test_tab_completes
- self._fitting = cycle([
+ self._fitting = iter([
prompts-not-echoed: test_piped_session_reads_like_one_at_a_terminal
- if (entered or text) and (self._edits or not self.person):
+ if (entered or text) and self._edits:
prompts-before-the-answer: test_prompt_in_a_pipe_appears_only_with_its_answer
- prompt = self._prompt if self.person else ""
+ prompt = self._prompt
prompt-after-the-answer-with-tee: test_no_escape_sequence_if_only_one
- self.person = sys.stdin.isatty()
+ self.person = sys.stdin.isatty() and sys.stdout.isatty()
last-line-lost: test_all_that_was_piped_reaches
- self._rest += "\n"  # the last line counts
+ pass
"""


def parse(file: str, text: str) -> list[Mutant]:
    """Return the mutants of a module."""
    parsed = []
    for mutant in re.split(r"\n(?![-+])", text.strip("\n")):
        head, *lines = mutant.split("\n")
        name, _, tests = head.partition(": ")
        old, new = (
            "\n".join([line[2:] for line in lines if line[0] == sign]) for sign in "-+"
        )
        parsed.append(Mutant(name, file, old, new, tests))
    return parsed


MUTANTS = [
    *parse("protocol.py", PROTOCOL_MUTANTS),
    *parse("server.py", SERVER_MUTANTS),
    *parse("client.py", CLIENT_MUTANTS),
    *parse("client.py", TERMINAL_MUTANTS),
]


def main() -> int:
    """Try the mutants; return the exit status."""
    options = parse_arguments()
    mutants = [m for m in MUTANTS if not options.only or m.name in options.only]
    began = time.monotonic()
    noticed = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tests = " or ".join({f"({mutant.tests})": None for mutant in mutants})
        unbroken = pool.submit(fails_by_itself, tests)
        tries = [pool.submit(noticed_by, mutant) for mutant in mutants]
        try:
            for mutant, attempt in zip(mutants, tries, strict=True):
                try:
                    text = attempt.result()
                    noticed += 1
                except NotNoticedError as error:
                    text = str(error)
                print(f"{mutant.name:36} {text}", flush=True)
            failing = unbroken.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failing:
        print(f"FAILS BY ITSELF: {failing}")
    seconds = time.monotonic() - began
    print(f"{noticed} of {len(mutants)} mutants were noticed, in {seconds:.0f} s")
    return 0 if noticed == len(mutants) and not failing else 1


def parse_arguments() -> argparse.Namespace:
    """Return the flags."""
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
    parser = argparse.ArgumentParser(description="See that the tests notice mistakes.")
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME",
        help="try this one, and no others; may be given several times",
    )  # fmt: skip
    return parser.parse_args()


def noticed_by(mutant: Mutant) -> str:
    """Return the test that notices a mutant.  Raises NotNoticedError."""
    with scratch_copy() as copy:
        apply(mutant, copy)
        if test := failing_test(copy, NAMED_SECONDS, "-k", mutant.tests):
            return test
        if test := failing_test(copy, SUITE_SECONDS):
            return f"{test}, which is not the one expected"
    raise NotNoticedError("SURVIVED")


def fails_by_itself(tests: str) -> str:
    """Return one of these tests that fails though nothing is broken; "" if none does."""
    with scratch_copy() as copy:
        try:
            return failing_test(copy, SUITE_SECONDS, "-k", tests)
        except NotNoticedError as error:
            return str(error)


@contextmanager
def scratch_copy() -> Iterator[Path]:
    """Copy the working tree, as far as the tests need it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        copy = Path(directory)
        for file in (*PROJECT.glob("*.py"), PROJECT / "pyproject.toml"):
            shutil.copy(file, copy)
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / "tests", copy / "tests", ignore=unwanted)
        yield copy


def apply(mutant: Mutant, copy: Path) -> None:
    """Change the copy.  Raises NotNoticedError if the text does not fit."""
    path = copy / mutant.file
    source = path.read_text(encoding="utf-8")
    found = source.count(mutant.old)
    if found != 1:
        raise NotNoticedError(f"Its text is {found} times in {mutant.file}.")
    source = source.replace(mutant.old, mutant.new)
    try:
        compile(source, mutant.file, "exec")
    except SyntaxError as error:
        raise NotNoticedError(f"Line {error.lineno} is not Python then.") from None
    path.write_text(source, encoding="utf-8")


def failing_test(copy: Path, seconds: float, *selection: str) -> str:
    """Return the first test that fails in the copy; "" if none does.

    Raises NotNoticedError if pytest cannot run these tests.
    """
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=line",
        "--timeout", str(TEST_SECONDS), *selection, "tests",
    ]  # fmt: skip
    report = copy / "report"
    # A file, since a pipe would stay open as long as any process has it.
    with report.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=copy, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
            killed = False
        except subprocess.TimeoutExpired:
            status, killed = 1, True
        finally:
            # Also what a test has left behind; the group is gone if there is nothing.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = report.read_text(encoding="utf-8", errors="replace")
    if status == 0:
        return ""
    if status != 1:  # pytest has not come to run them
        last = text.strip().rpartition("\n")[2]
        raise NotNoticedError(f"pytest has exit status {status}: {last}")
    found = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", text, re.MULTILINE)
    test = found[1] if found else "a test that never ends"
    return f"{test} (hang guard)" if killed or "Timeout (>" in text else test


if __name__ == "__main__":
    sys.exit(main())
