"""What the server and the client agree on: bytes and text, nothing else.

Both directions of a connection are UTF-8 in lines that end in a newline.  This module
cuts a stream of bytes into such lines (LineSplitter), turns them into text that is safe
to show (decode_message, clean), rules on names (check_name, name_key), tells commands
from messages (split_command) and the kinds of line from the server apart
(parse_server_line), and reads the flags that both programs have (CommandLine).  It opens
no socket and starts no thread.
"""

from __future__ import annotations

import argparse
import re
import unicodedata
from functools import partial
from operator import methodcaller
from typing import NamedTuple, NoReturn

ENCODING = "utf-8"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 12345

# To the server, in bytes without the newline: a long paragraph fits, a file does not.
MAX_LINE_BYTES = 4096
# From the server, in bytes.  The longest line an honest server can send is a message of
# tabs: 4 * MAX_LINE_BYTES, and a name before it.
MAX_SHOWN_BYTES = 32 * 1024
# In characters: a full name fits, and a message behind it still fits on a screen.
MAX_NAME_CHARS = 32

QUIT_LINES = frozenset({b"q", b"Q"})
RESERVED_NAMES = frozenset({"you", "server", "q"})
PASSWORD_CHARS = range(8, 129)  # fewer are guessed, more are no safer
# How the refusal of a full server begins; the client shows it and ends.
FULL = "The chat is full"


class ProtocolError(ValueError):
    """A line that is refused; str() of it is the reason, to be shown to its author."""


def reason_of(error: Exception) -> str:
    """Return why the system refused something, in its own words, without a number."""
    return getattr(error, "strerror", None) or str(error)


class LineSplitter:
    """Cuts a stream of bytes into lines, in bounded memory.

    max_bytes: the length up to which a line is good, without its newline and a carriage
    return right before that.  Memory: at most max_bytes + 2 bytes between two calls.
    """

    def __init__(self, max_bytes: int) -> None:
        self._too_many = max_bytes + 2  # bytes: no good line, whatever follows
        self._tail = b""  # the beginning of a line whose newline is still to come

    def feed(self, chunk: bytes) -> list[bytes]:
        """Add received bytes and return the lines they complete, without line ends.

        chunk: whatever one recv() gave, any length, cut anywhere.  Of a line that is too
        long, more than max_bytes are returned once, at its end or before.  The rest of
        it, however long, is dropped.
        """
        was_returned = len(self._tail) == self._too_many
        lines = (self._tail + chunk).replace(b"\r\n", b"\n").split(b"\n")
        self._tail = lines[-1][: self._too_many]
        if len(self._tail) < self._too_many:
            del lines[-1]  # it may still be a good one
        return lines[1:] if was_returned else lines


# What drives a terminal or reorders text: C0, DEL, C1, line and paragraph separators,
# and the bidirectional controls (Unicode Standard Annex #9, "Explicit Formatting").
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def clean(text: str) -> str:
    """Return text with tabs as four spaces and all that drives a terminal as U+FFFD.

    Idempotent, so both ends apply it.  Lone surrogates, which stand for bytes that are
    not UTF-8, are left alone.
    """
    if text.isprintable():  # nothing unsafe is printable, and most lines are
        return text
    return _UNSAFE.sub("\ufffd", text.replace("\t", "    "))


def decode_message(line: bytes) -> str:
    """Return the text of a line to the server, cleaned; "" if the line is blank.

    Raises ProtocolError if the line is too long or not UTF-8.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"That line is longer than {MAX_LINE_BYTES} bytes.")
    try:
        text = clean(line.decode(ENCODING))
    except UnicodeDecodeError:
        raise ProtocolError("That line is not UTF-8.") from None
    return "" if text.isspace() else text


def decode_shown(line: bytes) -> str:
    """Return a line from the server as it may be shown, cut with "…" if too long."""
    if len(line) <= MAX_SHOWN_BYTES:
        return clean(line.decode(ENCODING, "replace"))
    # "ignore": the cut may have gone through a character.
    return clean(line[:MAX_SHOWN_BYTES].decode(ENCODING, "ignore")) + "…"


def check_password(line: bytes) -> bytes:
    """Return a password to be kept.  Raises ProtocolError if it may not be used."""
    decode_message(line)  # raises it: too long, or not UTF-8
    if len(line.decode(ENCODING)) not in PASSWORD_CHARS:
        shortest, longest = PASSWORD_CHARS[0], PASSWORD_CHARS[-1]
        reason = f"A password has {shortest} to {longest} characters: /register again."
        raise ProtocolError(reason)
    return line


def encode_line(text: str) -> bytes:
    """Return one line of text as it goes over the wire.

    Lone surrogates become the bytes that they stand for (os.fsdecode's convention), so
    that the server can refuse them.
    """
    return text.encode(ENCODING, "surrogateescape") + b"\n"


# Letters, marks and decimal digits.
_NAME_CATEGORIES = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd"}
# Those of them that show nothing (Unicode 16, DerivedCoreProperties.txt,
# Default_Ignorable_Code_Point).
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)
# Scripts with letters that look alike; Unicode names say which one a letter is of.
_LOOKALIKE_SCRIPTS = {"LATIN", "GREEK", "CYRILLIC"}
# But not of these, which are Latin (Scripts.txt).
_UNNAMED_LATIN = re.compile("[\u1d2f\u1d3b\u1d4e\u2132\u214e\u2183\U00010780]")


def check_name(text: str) -> str:
    """Return a username in the form in which it is shown: trimmed, and in NFKC.

    Raises ProtocolError with the reason if it may not be used.
    """
    # Four become one at most; to bring 4,000 marks into their order takes milliseconds.
    name = unicodedata.normalize("NFKC", text.strip()[: 4 * MAX_NAME_CHARS + 1])
    if not 1 <= len(name) <= MAX_NAME_CHARS:
        raise ProtocolError(f"A name has 1 to {MAX_NAME_CHARS} characters.")
    categories = {unicodedata.category(char) for char in name if char not in "_-."}
    if not categories <= _NAME_CATEGORIES or _IGNORABLE.search(name):
        raise ProtocolError('A name is made of letters, digits, "_", "-" and ".".')
    if not name[0].isalnum():
        raise ProtocolError("A name begins with a letter or a digit.")
    letters = filter(str.isalpha, _UNNAMED_LATIN.sub("a", name))
    words = " ".join([unicodedata.name(letter, "") for letter in letters]).split()
    if len(_LOOKALIKE_SCRIPTS.intersection(words)) > 1:
        raise ProtocolError("A name does not mix Latin, Greek and Cyrillic letters.")
    if name_key(name) in RESERVED_NAMES:
        raise ProtocolError(f"The name {name} is reserved.")
    return name


def name_key(name: str) -> str:
    """Return what two names have in common if they are to count as one.

    name: as check_name returned it.  Folding can undo NFKC and the other way round, so
    both are done twice (Unicode Standard, section 3.13, compatibility caseless match).
    """
    for _ in range(2):
        name = unicodedata.normalize("NFKC", name.casefold())
    return name


def split_command(text: str) -> tuple[str, str]:
    """Return the command of a line to the server, with its slash, and the rest.

    text: as decode_message returned it.  The command is in lower case, the rest trimmed
    on the left; for a message the command is "", and the rest is what it says.
    """
    if not text.startswith("/") or text.startswith("//"):
        return "", text.removeprefix("/")
    command, _, rest = text.partition(" ")
    return command.lower(), rest.lstrip()


_PRIVATE = " (private)"  # no name contains a blank


class ServerLine(NamedTuple):
    """One line from the server, taken apart."""

    mark: str  # "*" a notice, "!" a refusal, "?" asks for a secret; "" for a message
    name: str  # the author of the message; "" if it has none
    text: str  # the rest, behind the mark or the name
    private: bool = False  # the message is for the reader alone


def parse_server_line(line: str) -> ServerLine:
    """Tell the kinds of line apart; one that is of no kind is a text without a name."""
    if line.startswith(("* ", "! ", "? ")):
        return ServerLine(line[0], "", line[2:])
    name, colon, text = line.partition(": ")
    author = name.removesuffix(_PRIVATE)
    if not (author and colon):
        return ServerLine("", "", line)
    return ServerLine("", author, text, private=author != name)


def _marked(mark: str, text: object) -> bytes:
    return encode_line(f"{mark} {text}")


# Each takes a text and returns the line that goes over the wire.
notice = partial(_marked, "*")
refusal = partial(_marked, "!")
question = partial(_marked, "?")  # its answer should not be shown


def private_message(author: str, text: str) -> bytes:
    """Return a message to one member as it goes over the wire."""
    return encode_line(f"{author}{_PRIVATE}: {text}")


class CommandLine(argparse.ArgumentParser):
    """Reads flags; --help shows each with its default, an error is one line."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.formatter_class = argparse.ArgumentDefaultsHelpFormatter

    def add_address(self, host_help: str, lowest_port: int, port_help: str) -> None:
        """Add --host and --port."""
        # A socket takes an IPv6 address without the brackets that it may have.
        bare = methodcaller("strip", "[]")
        self.add_argument("--host", type=bare, default=DEFAULT_HOST, help=host_help)
        self.add_number("--port", lowest_port, 65535, DEFAULT_PORT, port_help, "PORT")

    def add_number(
        self, flag: str, low: int, high: int, default: int, help: str, value: str = "N"
    ) -> None:
        """Add a flag that takes a whole number within these limits; value: its name."""

        def read(text: str) -> int:
            # Not of very many digits: int() refuses these in its own words.
            if text.isdecimal() and len(text) < 20 and low <= int(text) <= high:
                return int(text)
            reason = f"{text!r} is not a whole number, {low} to {high}"
            raise argparse.ArgumentTypeError(reason)

        help += f"; {low} to {high}"
        self.add_argument(flag, type=read, default=default, help=help, metavar=value)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line on stderr, and exit with status 2."""
        reason = clean(f"{self.prog}: {message} (--help explains the flags)")
        self.exit(2, f"{reason}\n")
