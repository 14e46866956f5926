"""Every reader of bytes that another party wrote, given anything: the one intended exception, one line, or a value.

What is given is arbitrary JSON, arbitrary bytes, and what the reader should accept, spoiled in a few places. The suite
takes some hundred inputs a reader, the same ones always; mutations.py as many millions as are asked for.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from pretrain.trust.ledger import RefusedError
from tests.fuzz.mutations import answer
from tests.fuzz.readers import READERS, SNIPPETS, Reader

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


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
            found[draw(st.sampled_from(sorted(found)))] = draw(VALUES)
            return json.dumps(found).encode()
    data = bytearray(accepted)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(st.sampled_from(SNIPPETS) | st.binary(max_size=4))
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


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_million_inputs_in_bounded_memory() -> None:
    command = [sys.executable, "-m", "tests.fuzz.mutations", "--inputs", "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [(KeyError("a"), "KeyError: 'a'"), (RefusedError("two\nlines"), "several lines: 'two\\nlines'"), (None, "")],
)
def test_what_is_no_refusal_is_a_finding(wrong: Exception | None, expected: str, tmp_path: Path) -> None:
    def read(data: bytes, folder: Path) -> None:
        if wrong:
            raise wrong

    assert answer(Reader(read=read, accepted=b"", refuses=RefusedError), b"", tmp_path) == expected
