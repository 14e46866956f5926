"""JSON and text of other parties: bounded when it is read, harmless when it is shown."""

import pytest

from pretrain.host.foreign import LIMIT_DEPTH, loads, shown


def test_what_is_json_is_read() -> None:
    assert loads(b'{"a": [1, 2.5, null, true, "x"]}') == {"a": [1, 2.5, None, True, "x"]}
    assert loads("[" * LIMIT_DEPTH + "]" * LIMIT_DEPTH)
    assert loads(str((1 << 64) - 1)) == (1 << 64) - 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"NaN",
        b"[-Infinity]",
        b"1e999",
        b"18446744073709551616",
        b"1" * 10_000,
        b"[" * 100_000,
        "[" * (LIMIT_DEPTH + 1) + "]" * (LIMIT_DEPTH + 1),
        b'{"a":' * 100_000,
    ],
)
def test_what_is_none_or_out_of_bounds_is_one_line(data: bytes | str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - whatever the line says
        loads(data)
    assert "\n" not in str(caught.value)


def test_what_is_too_large_is_not_parsed() -> None:
    with pytest.raises(ValueError, match="11 bytes of JSON given; allowed: 10"):
        loads(b'"123456789"', limit_bytes=10)


def test_nothing_that_a_terminal_obeys_is_shown() -> None:
    assert shown("\x1b[2Jred\nline\u202etxt\x07 é") == "\\x1b[2Jred\\nline\\u202etxt\\x07 é"
    assert shown("x" * 300) == "x" * 200 + "..."
