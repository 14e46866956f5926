"""Every reader of bytes that another party wrote, given anything: the one intended exception, one line, or a value.

What is given is arbitrary JSON, arbitrary bytes, and what the reader should accept, spoiled in a few places. The suite
takes some hundred inputs a reader, the same ones always; `make soak` a million in all, and `make fuzz` any number
(many.py).
"""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from tests.fuzz import many
from tests.fuzz.readers import READERS, SPOILS, Reader
from tests.support import one_line_error

MANY = 1_000_000

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SNIPPETS = st.sampled_from(SPOILS)


@st.composite
def inputs(draw: st.DrawFn, accepted: bytes) -> bytes:
    """Arbitrary bytes or JSON; or what is accepted with a value of its own replaced, or with places overwritten."""
    kind = draw(st.sampled_from(["bytes", "json", "member", "places", "places", "places"]))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "json":
        return json.dumps(draw(VALUES)).encode()
    if kind == "member":
        try:
            found = json.loads(accepted)
        except ValueError:
            kind = "places"
        else:
            keys = sorted(found) if isinstance(found, dict) else range(len(found))
            found[draw(st.sampled_from(keys))] = draw(VALUES)
            return json.dumps(found).encode()
    data = bytearray(accepted)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(SNIPPETS | st.binary(max_size=4))
    return bytes(data)


def fuzz(reader: Reader, folder: Path, num_inputs: int) -> None:
    """Give a reader so many inputs; whatever else it raises, or a message of several lines, fails."""
    check = settings(
        max_examples=num_inputs, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )

    @check
    @given(inputs(reader.accepted))
    def run(data: bytes) -> None:
        said = ""
        try:
            reader.read(data, folder)
        except SafetensorError:  # the library's own words; whoever catches it makes a line of them
            pass
        except reader.refuses as error:
            said = str(error)
        assert "\n" not in said

    run()


@pytest.mark.parametrize("name", READERS)
def test_anything_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    fuzz(READERS[name], tmp_path, 150)


@pytest.mark.parametrize("name", READERS)
def test_what_a_reader_should_accept_it_accepts(name: str, tmp_path: Path) -> None:
    READERS[name].read(READERS[name].accepted, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_million_inputs_in_bounded_memory() -> None:
    rows = many.run(MANY)
    assert {row.reader for row in rows} == set(READERS)
    assert not [line for row in rows for line in row.findings]


@pytest.mark.parametrize("digits", ["9" * 300, "\u0661" * 5])
def test_a_shard_has_the_name_that_packing_gives(digits: str, tmp_path: Path) -> None:
    """Found by many inputs: a name that no file system takes."""
    reader = READERS["packed split"]
    shard = {"file": f"shard-{digits}.bin", "num_tokens": 2, "sha256": ""}
    data = json.dumps(json.loads(reader.accepted) | {"shards": [shard]}).encode()
    assert "shards disagree" in one_line_error(reader.read, data, tmp_path)


def test_many_inputs_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same seed finds it again."""

    def read(data: bytes, folder: Path) -> None:
        if data.startswith(b"["):
            raise KeyError("no reader of ours")

    monkeypatch.setitem(READERS, "json", Reader(read=read, accepted=b'{"a": 1}', refuses=ValueError))
    found = many.fuzz("json", "0", 300)
    assert "KeyError" in found.findings[0]
    assert found.findings == many.fuzz("json", "0", 300).findings
