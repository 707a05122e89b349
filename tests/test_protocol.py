"""The rules of the wire: literals in, literals out."""

from __future__ import annotations

import time
from itertools import combinations_with_replacement

import pytest

import protocol
from protocol import LineSplitter, ProtocolError

# Written out here a second time on purpose: code points that may reach nobody.
UNSAFE = [
    *range(9), *range(10, 0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0x061C, 0x200E,
    0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A),
]  # fmt: skip
SURROGATES = range(0xD800, 0xE000)


# --- bytes to lines -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "stream", "expected"),
    [
        (10, b"one\r\ntwo\n\nth\rree\r\r\n\xc3\xa9\nrest",
         [b"one", b"two", b"", b"th\rree\r", b"\xc3\xa9"]),
        (4, b"1234\r\n123456789abc\r\n1234\n12345\n\n1\n",
         [b"1234", b"too long", b"1234", b"too long", b"", b"1"]),
    ],
    ids=["good lines", "a line too long is reported once"],
)  # fmt: skip
def test_a_stream_gives_the_same_lines_wherever_it_is_cut(
    limit: int, stream: bytes, expected: list[bytes]
) -> None:
    for first, second in combinations_with_replacement(range(len(stream) + 1), 2):
        splitter = LineSplitter(limit)

        lines = splitter.feed(stream[:first])
        lines += splitter.feed(stream[first:second]) + splitter.feed(stream[second:])

        good = [line if len(line) <= limit else b"too long" for line in lines]
        assert good == expected, (first, second)


def test_the_end_of_a_line_does_not_count_towards_its_length() -> None:
    splitter = LineSplitter(4)

    assert splitter.feed(b"1234\n1234\r\n") == [b"1234", b"1234"]
    assert splitter.feed(b"1234\r") == []  # it may be the end of the line
    assert splitter.feed(b"\r\n") == [b"1234\r"]


def test_a_line_too_long_is_reported_before_its_newline_comes() -> None:
    splitter = LineSplitter(4)

    assert splitter.feed(b"1234") == []
    assert splitter.feed(b"56") == [b"123456"]
    assert splitter.feed(b"7" * 100) == []
    assert splitter.feed(b"\nnext\n") == [b"next"]


def test_only_a_newline_ends_a_line() -> None:
    stream = "a\x0bb\x0cc\x1cd\x1ee\x85f\u2028g\u2029h\ri\n".encode()

    assert LineSplitter(100).feed(stream) == [stream[:-1]]


# --- text that is safe to show ------------------------------------------------------


def test_what_drives_a_terminal_or_reorders_text_is_replaced() -> None:
    passed = [code for code in UNSAFE if protocol.clean(f"a{chr(code)}b") != "a\ufffdb"]

    assert passed == []


def test_every_other_character_is_left_alone() -> None:
    codes = set(range(0x110000)).difference(UNSAFE, SURROGATES, [ord("\t")])
    text = "".join(map(chr, sorted(codes)))

    cleaned = protocol.clean(text)

    # Not `cleaned == text`: a failure would print a million characters.
    assert [hex(ord(a)) for a, b in zip(text, cleaned) if a != b] == []
    assert len(cleaned) == len(text)


def test_a_tab_becomes_four_spaces_and_cleaning_twice_changes_nothing_more() -> None:
    once = protocol.clean("\x1b[2J\t\u202eabc\x00\x9b\u2028é")

    assert once == "\ufffd[2J    \ufffdabc\ufffd\ufffd\ufffdé"
    assert protocol.clean(once) == once


@pytest.mark.parametrize(
    "text",
    [
        # Joined, with a variation selector, a skin tone, tag characters, a keycap.
        "👩‍👩‍👧‍👦 ❤️ 👍🏽 🇩🇪 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣",
        "e\u0301 می\u200cخواهم a\u3000b\u00a0c\ufeffd\u00ade",
        "\U0001faea\U0010ffff\ue000\ufffe",  # newer than any table, private, no one's
        "  two  ",
        "x" * 4096,
        "é" * 2048,
    ],
    ids=len,
)
def test_text_arrives_byte_for_byte(text: str) -> None:
    assert protocol.decode_message(text.encode()).encode() == text.encode()


@pytest.mark.parametrize("line", ["", " ", "\t \t", "\u3000", "\u00a0\u2003"])
def test_a_blank_line_has_no_text(line: str) -> None:
    assert protocol.decode_message(line.encode()) == ""


@pytest.mark.parametrize(
    "bad",
    [
        *(b"\xff", b"\x80", b"\xf8\x88\x80\x80\x80", "hé".encode("utf-16")),
        *(b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xc0\x8a"),  # overlong
        *(b"\xed\xa0\xbd", b"\xed\xb8\x80", b"\xed\xa0\xbd\xed\xb8\x80"),  # surrogates
        b"\xf4\x90\x80\x80",  # above U+10FFFF
        b"\xc3",  # cut in a character
    ],
    ids=repr,
)
def test_a_line_that_is_not_utf8_is_refused(bad: bytes) -> None:
    for line in (bad, b"before " + bad, bad + b" after"):
        with pytest.raises(ProtocolError, match="UTF-8"):
            protocol.decode_message(line)


@pytest.mark.parametrize("text", ["x" * 4097, "é" * 2048 + "e"], ids=len)
def test_a_line_above_the_limit_in_bytes_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="4096"):
        protocol.decode_message(text.encode())


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"x" * 32 * 1024, "x" * 32 * 1024),
        (b"x" * (32 * 1024 + 1), "x" * 32 * 1024 + "…"),
        (b"x" * (32 * 1024 - 1) + "é".encode(), "x" * (32 * 1024 - 1) + "…"),
        (b"a\xff\x1b[2J\tb", "a\ufffd\ufffd[2J    b"),
    ],
    ids=["at the limit", "above it", "in a character", "any bytes"],
)
def test_a_shown_line_is_cleaned_and_cut_above_its_limit(
    line: bytes, shown: str
) -> None:
    # Not one "==" on the texts: a failure would print them.
    text = protocol.decode_shown(line)

    assert len(text) == len(shown)
    assert text[-10:] == shown[-10:]


def test_the_longest_message_fits_into_a_shown_line() -> None:
    longest_name = ("\U00020000" * protocol.MAX_NAME_CHARS).encode()
    text = protocol.decode_message(b"\t" * (protocol.MAX_LINE_BYTES - 1) + b"x")

    assert protocol.decode_shown(longest_name + f": {text}".encode())[-5:] == "    x"


# --- names --------------------------------------------------------------------------


# The vowel signs in some are marks; nobody mistakes the scripts in one for each other.
@pytest.mark.parametrize("name", [
    "a", "7", "Alex", "Зоя", "Ζωή", "李小龍", "अनिता", "מֹשֶׁה", "٣", "a_b-c.d", "x--", "Đorđe",
    "日本Alex", "a" * 32, "you1", "servers", "qq",
])  # fmt: skip
def test_a_name_of_any_script_is_taken_as_it_is(name: str) -> None:
    assert protocol.check_name(name) == name


@pytest.mark.parametrize(("text", "name"), [
    ("  Alex\t", "Alex"), ("\u3000Alex\u00a0", "Alex"), ("ＡＬＥＸ", "ALEX"), ("①", "1"),
    ("e\u0301" * 32, "é" * 32), ("α\u0313\u0300\u0345" * 32, "\u1f82" * 32), (" " + "ﬁ" * 16 + " ", "fi" * 16), ("x²", "x2"),
])  # fmt: skip
def test_a_name_is_trimmed_and_brought_to_nfkc(text: str, name: str) -> None:
    assert protocol.check_name(text) == name


@pytest.mark.parametrize("text", [
    "", " ", "a b", "a:b", "a*", "a!", "a,b", "a@b", "a/b", "/a", "a\ufffdb", "a\x1bb",
    "a\u200db", "a\u00adb", "a\ufeffb",  # a joiner, a soft hyphen, a mark of order
    "😀", "a€", "ↀ", "½x",  # numbers, but no digits
    "\ue000", "\U0001faea", "a\udcff",
    "*", "!", "?", "* x", "! x", "? x", "a: b", "/who", "a (private)",  # kinds of line
], ids=ascii)  # fmt: skip
def test_a_name_holds_letters_marks_digits_and_three_signs(text: str) -> None:
    with pytest.raises(ProtocolError):
        protocol.check_name(text)


def test_a_long_name_is_refused_without_much_ado() -> None:
    """To bring so many marks into their order takes 6 ms, of all others too."""
    started = time.thread_time()

    for _ in range(300):
        with pytest.raises(ProtocolError):
            protocol.check_name("\u0301\u0327" * 1000)

    assert time.thread_time() - started < 0.3


@pytest.mark.parametrize(("part", "texts"), [
    ("begins", ["_a", "-a", ".a", "\u0301a", "\u0903a", "_"]),
    ("32", ["a" * 33, "ﬁ" * 16 + "x"]),
    # The first letters are Cyrillic and Greek; the last two are Latin, though their
    # names do not say so.
    ("mix", ["Аlex", "Алехa", "Αlex", "Ζоя", "aбγ", "Ωhm", "µm", "aбⲁ"]),
    ("mix", ["б\u214e", "б\u2184"]),
    ("reserved", ["you", "server", "q", "You", "SERVER", "Q", "ｑ", " q "]),
])  # fmt: skip
def test_a_name_that_is_reserved_too_long_mixed_or_begins_badly_is_refused(
    part: str, texts: list[str]
) -> None:
    for text in texts:
        with pytest.raises(ProtocolError, match=part):
            protocol.check_name(text)


def test_a_name_holds_nothing_that_shows_nothing() -> None:
    for code in [
        *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, 0x180F),
        *(*range(0x180B, 0x180E), *range(0xFE00, 0xFE10), 0xE0100, 0xE01EF),
    ]:
        for text in (chr(code), f"a{chr(code)}", f"a{chr(code)}b"):
            with pytest.raises(ProtocolError):
                protocol.check_name(text)


# The folded forms of the last two differ but for NFKC.
@pytest.mark.parametrize(("one", "other"), [
    ("alex", "Alex"), ("alex", "ＡＬＥＸ"), ("straße", "STRASSE"), ("Σίσυφος", "ΣΊΣΥΦΟΣ"),
    ("é", "E\u0301"), ("ǆ", "ǅ"), ("ﬁn", "FIN"), ("\u0390", "\u03aa\u0301"),
])  # fmt: skip
def test_names_that_differ_in_case_or_width_are_one(one: str, other: str) -> None:
    keys = {protocol.name_key(protocol.check_name(text)) for text in (one, other)}

    assert len(keys) == 1


@pytest.mark.parametrize(("one", "other"), [("alex", "alex1"), ("e", "é"), ("а", "a")])
def test_other_names_are_not(one: str, other: str) -> None:
    assert protocol.name_key(one) != protocol.name_key(other)


def test_the_key_of_a_key_is_itself() -> None:
    for code in set(range(0x3000)).difference(SURROGATES):
        key = protocol.name_key(chr(code))

        assert protocol.name_key(key) == key, hex(code)


# --- lines from the server, commands ------------------------------------------------


@pytest.mark.parametrize(("line", "parts"), [
    ("* Alex has joined the chat.", ("*", "", "Alex has joined the chat.")),
    ("! That name is taken.", ("!", "", "That name is taken.")),
    ("? Which password?", ("?", "", "Which password?")),
    ("Alex: Hello", ("", "Alex", "Hello")),
    ("Alex: a: b", ("", "Alex", "a: b")),
    ("Alex: * b", ("", "Alex", "* b")),
    ("* a: b", ("*", "", "a: b")),
    ("Alex:  two ", ("", "Alex", " two ")),
    ("neither", ("", "", "neither")),
    ("*neither", ("", "", "*neither")),
    ("a:neither", ("", "", "a:neither")),
    ("", ("", "", "")),
    ("Alex (private): psst", ("", "Alex", "psst", True)),
    ("Alex: (private): no", ("", "Alex", "(private): no")),
    (" (private): x", ("", "", " (private): x")),
])  # fmt: skip
def test_the_kinds_of_line_from_the_server_are_told_apart(
    line: str, parts: tuple[str, str, str]
) -> None:
    assert protocol.parse_server_line(line) == protocol.ServerLine(*parts)


def test_each_kind_of_line_from_the_server_is_one_line() -> None:
    assert protocol.notice("Zoé has left.") == "* Zoé has left.\n".encode()
    assert protocol.refusal(ProtocolError("No.")) == b"! No.\n"
    assert protocol.question("Password?") == b"? Password?\n"
    assert protocol.private_message("Sam", "psst") == b"Sam (private): psst\n"


@pytest.mark.parametrize(("text", "command", "rest"), [
    ("Hello", "", "Hello"), ("a /who", "", "a /who"), (" /who", "", " /who"),
    ("//who", "", "/who"), ("///", "", "//"), ("/who", "/who", ""),
    ("/WHO ", "/who", ""), ("/msg Sam  two ", "/msg", "Sam  two "),
    ("/msg    Sam x", "/msg", "Sam x"), ("/", "/", ""), ("/ who", "/", "who"),
])  # fmt: skip
def test_a_command_is_told_from_a_message(text: str, command: str, rest: str) -> None:
    assert protocol.split_command(text) == (command, rest)


# --- flags --------------------------------------------------------------------------


def read_number(text: str, lowest: int = 1) -> int:
    flags = protocol.CommandLine("A program.")
    flags.add_number("--number", lowest, 10, default=5, help="some")
    number: int = flags.parse_args([f"--number={text}"]).number
    return number


def test_a_whole_number_within_its_limits_is_read() -> None:
    assert [read_number(text) for text in ("1", "9", "10")] == [1, 9, 10]


@pytest.mark.parametrize(
    ("text", "lowest"),
    [*[(text, 1) for text in ("0", "11", "-1", "x", "", "1.5")]]
    + [(text, 0) for text in ("+1", "-1", "0x1", "9" * 5000)],
)
def test_a_number_that_is_none_or_out_of_its_limits_is_one_line(
    text: str, lowest: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        read_number(text, lowest)

    (line,) = capsys.readouterr().err.splitlines()
    assert f"is not a whole number, {lowest} to 10" in line
