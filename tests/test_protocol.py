"""The rules of the wire: literals in, literals out."""

from __future__ import annotations

import tracemalloc
from itertools import combinations_with_replacement

import pytest

import protocol
from protocol import LineSplitter, ProtocolError

# Written out here a second time on purpose: code points that may reach nobody.
UNSAFE = [
    *range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0x061C, 0x200E, 0x200F,
    *range(0x202A, 0x202F), *range(0x2066, 0x206A),
]  # fmt: skip
UNSAFE.remove(ord("\t"))
SURROGATES = range(0xD800, 0xE000)


def feed_all(splitter: LineSplitter, *chunks: bytes) -> list[bytes]:
    """Return the lines of all chunks."""
    return [line for chunk in chunks for line in splitter.feed(chunk)]


# --- bytes to lines -----------------------------------------------------------------


def test_a_stream_gives_the_same_lines_wherever_it_is_cut() -> None:
    stream = b"one\r\ntwo\n\nth\rree\r\r\n\xc3\xa9\nrest"

    for cuts in combinations_with_replacement(range(len(stream) + 1), 2):
        first, second = cuts
        chunks = stream[:first], stream[first:second], stream[second:]

        lines = feed_all(LineSplitter(10), *chunks)

        assert lines == [b"one", b"two", b"", b"th\rree\r", b"\xc3\xa9"], chunks


def test_a_line_too_long_is_reported_once_wherever_it_is_cut() -> None:
    stream = b"1234\r\n123456789abc\r\n1234\n12345\n\n1\n"

    for cuts in combinations_with_replacement(range(len(stream) + 1), 2):
        first, second = cuts
        chunks = stream[:first], stream[first:second], stream[second:]

        lines = feed_all(LineSplitter(4), *chunks)

        good = [line if len(line) <= 4 else b"too long" for line in lines]
        assert good == [b"1234", b"too long", b"1234", b"too long", b"", b"1"], chunks


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize(("length", "good"), [(9, True), (10, True), (11, False)])
def test_the_end_of_a_line_does_not_count_towards_its_length(
    length: int, end: bytes, good: bool
) -> None:
    line = b"x" * length

    lines = feed_all(LineSplitter(10), line, end)

    assert lines == [line]
    assert (len(lines[0]) <= 10) is good


def test_a_carriage_return_without_newline_counts_towards_the_length() -> None:
    splitter = LineSplitter(4)

    assert splitter.feed(b"1234\r") == []
    assert splitter.feed(b"\r\n") == [b"1234\r"]


def test_a_line_too_long_is_reported_before_its_newline_comes() -> None:
    splitter = LineSplitter(4)

    assert splitter.feed(b"1234") == []
    assert splitter.feed(b"5") == [b"12345"]
    assert splitter.feed(b"6" * 100) == []
    assert splitter.feed(b"\nnext\n") == [b"next"]


def test_only_a_newline_ends_a_line() -> None:
    stream = "a\x0bb\x0cc\x1cd\x1ee\x85f\u2028g\u2029h\ri\n".encode()

    assert LineSplitter(100).feed(stream) == [stream[:-1]]


@pytest.mark.parametrize("chunk", [b"x" * 4096, b"\r" * 4096])
def test_the_splitter_keeps_little_of_an_endless_line(chunk: bytes) -> None:
    splitter = LineSplitter(protocol.MAX_LINE_BYTES)

    tracemalloc.start()
    for _ in range(5000):  # 20 MB
        splitter.feed(chunk)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 100_000


# --- text that is safe to show ------------------------------------------------------


@pytest.mark.parametrize("code", UNSAFE, ids=hex)
def test_what_drives_a_terminal_or_reorders_text_is_replaced(code: int) -> None:
    assert protocol.clean(f"a{chr(code)}b") == "a\ufffdb"


def test_every_other_character_is_left_alone() -> None:
    codes = set(range(0x110000)).difference(UNSAFE, SURROGATES, [ord("\t")])
    text = "".join(map(chr, sorted(codes)))

    # Not `clean(text) == text`: a failure would print a million characters.
    changed = [hex(ord(a)) for a, b in zip(text, protocol.clean(text)) if a != b]
    assert changed == []
    assert len(protocol.clean(text)) == len(text)


def test_a_tab_becomes_four_spaces() -> None:
    assert protocol.clean("\ta\tb") == "    a    b"


def test_cleaning_twice_changes_nothing_more() -> None:
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
    ],
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


@pytest.mark.parametrize("length", [4095, 4096])
def test_a_line_up_to_the_limit_is_good(length: int) -> None:
    assert protocol.decode_message(b"x" * length) == "x" * length


def test_a_line_above_the_limit_is_refused() -> None:
    with pytest.raises(ProtocolError, match="4096"):
        protocol.decode_message(b"x" * 4097)


def test_the_limit_of_a_line_counts_bytes() -> None:
    assert protocol.decode_message(("é" * 2048).encode()) == "é" * 2048

    with pytest.raises(ProtocolError):
        protocol.decode_message(("é" * 2048 + "e").encode())


@pytest.mark.parametrize(
    ("length", "shown"),
    [
        (32 * 1024 - 1, "x" * (32 * 1024 - 1)),
        (32 * 1024, "x" * 32 * 1024),
        (32 * 1024 + 1, "x" * 32 * 1024 + "…"),
    ],
)
def test_a_shown_line_is_cut_above_its_limit(length: int, shown: str) -> None:
    # Not one "==" on the texts: a failure would print them.
    text = protocol.decode_shown(b"x" * length)

    assert len(text) == len(shown)
    assert text[-3:] == shown[-3:]


def test_a_shown_line_is_not_cut_inside_a_character() -> None:
    line = b"x" * (32 * 1024 - 1) + "é".encode()

    assert protocol.decode_shown(line)[-3:] == "xx…"


def test_a_shown_line_may_be_any_bytes() -> None:
    assert protocol.decode_shown(b"a\xff\x1b[2J\tb") == "a\ufffd\ufffd[2J    b"


def test_the_longest_message_fits_into_a_shown_line() -> None:
    longest_name = ("\U00020000" * protocol.MAX_NAME_CHARS).encode()
    text = protocol.decode_message(b"\t" * (protocol.MAX_LINE_BYTES - 1) + b"x")

    line = longest_name + b": " + text.encode()

    assert len(line) <= protocol.MAX_SHOWN_BYTES
    assert protocol.decode_shown(line).endswith("    x")


@pytest.mark.parametrize(
    ("text", "line"),
    [("", b"\n"), ("é", b"\xc3\xa9\n"), ("a\udcffb", b"a\xffb\n")],
)
def test_a_text_becomes_one_line_of_bytes(text: str, line: bytes) -> None:
    assert protocol.encode_line(text) == line


# --- names --------------------------------------------------------------------------


# The vowel signs in some are marks; the scripts in the last nobody mistakes.
@pytest.mark.parametrize("name", [
    "a", "7", "Alex", "Зоя", "Ζωή", "李小龍", "अनिता", "מֹשֶׁה", "٣", "a_b-c.d", "x--", "Đorđe",
    "日本Alex",
])  # fmt: skip
def test_a_name_of_any_script_is_taken_as_it_is(name: str) -> None:
    assert protocol.check_name(name) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("  Alex\t", "Alex"),
        ("\u3000Alex\u00a0", "Alex"),
        ("ＡＬＥＸ", "ALEX"),
        ("e\u0301", "é"),
        ("ﬁn", "fin"),
        ("①", "1"),
        ("x²", "x2"),
        ("Ⅳ", "IV"),
    ],
)
def test_a_name_is_trimmed_and_brought_to_nfkc(text: str, name: str) -> None:
    assert protocol.check_name(text) == name


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "a b",
            "a:b",
            "a*",
            "a!",
            "a,b",
            "a@b",
            "a/b",
            "/a",
            "a\ufffdb",
            "a\x1bb",
        ),
        *(
            "a\u200db",
            "a\u00adb",
            "a\ufeffb",
        ),  # a joiner, a soft hyphen, a mark of order
        *("😀", "a€", "ↀ", "½x"),  # numbers, but no digits
        *("\ue000", "\U0001faea", "a\udcff"),
    ],
)
def test_a_name_holds_letters_marks_digits_and_three_signs(text: str) -> None:
    with pytest.raises(ProtocolError):
        protocol.check_name(text)


@pytest.mark.parametrize("text", ["_a", "-a", ".a", "\u0301a", "\u0903a", "_"])
def test_a_name_begins_with_a_letter_or_a_digit(text: str) -> None:
    with pytest.raises(ProtocolError, match="begins"):
        protocol.check_name(text)


@pytest.mark.parametrize("length", [1, 31, 32])
def test_a_name_up_to_the_limit_is_good(length: int) -> None:
    assert protocol.check_name("a" * length) == "a" * length


@pytest.mark.parametrize("text", ["a" * 33, "ﬁ" * 16 + "x"])
def test_a_name_above_the_limit_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="32"):
        protocol.check_name(text)


def test_the_length_of_a_name_is_that_of_what_is_shown() -> None:
    assert protocol.check_name(" " + "ﬁ" * 16 + " ") == "fi" * 16
    assert protocol.check_name("e\u0301" * 32) == "é" * 32


@pytest.mark.parametrize(
    "code",
    [
        *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, 0x180F),
        *(*range(0x180B, 0x180E), *range(0xFE00, 0xFE10), 0xE0100, 0xE01EF),
    ],
    ids=hex,
)
def test_a_name_holds_nothing_that_shows_nothing(code: int) -> None:
    for text in (chr(code), f"a{chr(code)}", f"a{chr(code)}b"):
        with pytest.raises(ProtocolError):
            protocol.check_name(text)


# The first letters are Cyrillic and Greek; the last two are Latin, though their names do
# not say so.
@pytest.mark.parametrize("text", [
    "Аlex", "Алехa", "Αlex", "Ζоя", "aбγ", "Ωhm", "µm", "aбⲁ", "б\u214e", "б\u2184",
])  # fmt: skip
def test_a_name_does_not_mix_scripts_that_look_alike(text: str) -> None:
    with pytest.raises(ProtocolError, match="mix"):
        protocol.check_name(text)


@pytest.mark.parametrize(
    "text", ["you", "server", "q", "You", "SERVER", "Q", "ｑ", " q "]
)
def test_a_reserved_name_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="reserved"):
        protocol.check_name(text)


@pytest.mark.parametrize("text", ["you1", "servers", "qq"])
def test_a_name_that_holds_a_reserved_one_is_good(text: str) -> None:
    assert protocol.check_name(text) == text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("alex", "Alex"),
        ("alex", "ＡＬＥＸ"),
        ("straße", "STRASSE"),
        ("Σίσυφος", "ΣΊΣΥΦΟΣ"),
        ("é", "E\u0301"),
        ("ǆ", "ǅ"),
        ("ﬁn", "FIN"),
        ("\u0390", "\u03aa\u0301"),  # their folded forms differ but for NFKC
    ],
)
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


# --- lines from the server ----------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("* Alex has joined the chat.", ("*", "", "Alex has joined the chat.")),
        ("! That name is taken.", ("!", "", "That name is taken.")),
        ("? Which password?", ("?", "", "Which password?")),
        ("Alex: Hello", ("", "Alex", "Hello")),
        ("Alex: a: b", ("", "Alex", "a: b")),
        ("Alex: * b", ("", "Alex", "* b")),
        ("Alex: ! b", ("", "Alex", "! b")),
        ("* a: b", ("*", "", "a: b")),
        ("! a: b", ("!", "", "a: b")),
        ("Alex:  two ", ("", "Alex", " two ")),
        ("neither", ("", "", "neither")),
        ("*neither", ("", "", "*neither")),
        ("a:neither", ("", "", "a:neither")),
        ("", ("", "", "")),
        ("Alex (private): psst", ("", "Alex", "psst", True)),
        ("Alex: (private): no", ("", "Alex", "(private): no")),
        (" (private): x", ("", "", " (private): x")),
    ],
)
def test_the_kinds_of_line_from_the_server_are_told_apart(
    line: str, parts: tuple[str, str, str]
) -> None:
    assert protocol.parse_server_line(line) == protocol.ServerLine(*parts)


def test_no_name_looks_like_the_start_of_another_kind_of_line() -> None:
    for mark in ("*", "!", "?", "* x", "! x", "? x", "a: b", "/who", "a (private)"):
        with pytest.raises(ProtocolError):
            protocol.check_name(mark)


def test_each_kind_of_line_from_the_server_is_one_line() -> None:
    assert protocol.notice("Zoé has left.") == "* Zoé has left.\n".encode()
    assert protocol.refusal(ProtocolError("No.")) == b"! No.\n"
    assert protocol.question("Password?") == b"? Password?\n"
    assert protocol.private_message("Sam", "psst") == b"Sam (private): psst\n"


@pytest.mark.parametrize(
    ("text", "command", "rest"),
    [
        ("Hello", "", "Hello"),
        ("a /who", "", "a /who"),
        (" /who", "", " /who"),
        ("//who", "", "/who"),
        ("///", "", "//"),
        ("/who", "/who", ""),
        ("/WHO ", "/who", ""),
        ("/msg Sam  two ", "/msg", "Sam  two "),
        ("/msg    Sam x", "/msg", "Sam x"),
        ("/", "/", ""),
        ("/ who", "/", "who"),
    ],
)
def test_a_command_is_told_from_a_message(text: str, command: str, rest: str) -> None:
    assert protocol.split_command(text) == (command, rest)


def test_q_alone_leaves() -> None:
    assert {b"q", b"Q"} == protocol.QUIT_LINES


# --- flags --------------------------------------------------------------------------


def read_number(text: str, lowest: int = 1) -> int:
    flags = protocol.CommandLine("A program.")
    flags.add_number("--number", lowest, 10, default=5, metavar="N", help="some")
    number: int = flags.parse_args([f"--number={text}"]).number
    return number


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("9", 9), ("10", 10)])
def test_a_whole_number_within_its_limits_is_read(text: str, number: int) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize(
    ("text", "lowest"),
    [*[(text, 1) for text in ("0", "11", "-1", "x", "", "1.5")]]
    + [(text, 0) for text in ("", "+1", "-1", "1.0", "0x1", "9" * 5000)],
)
def test_a_number_that_is_none_or_out_of_its_limits_is_one_line(
    text: str, lowest: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        read_number(text, lowest)

    (line,) = capsys.readouterr().err.splitlines()
    assert f"is not a whole number, {lowest} to 10" in line


@pytest.mark.parametrize(
    ("text", "host"),
    [("[::1]", "::1"), ("::1", "::1"), ("a", "a"), ("[", "["), ("", "")],
)
def test_an_ipv6_address_may_have_brackets(text: str, host: str) -> None:
    assert protocol.host_name(text) == host
