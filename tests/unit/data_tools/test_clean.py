"""Cleaning of documents, and the register of those that were seen."""

import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools import clean as clean_module
from data_tools.clean import (
    DROP_REASONS,
    NUM_PERMUTATIONS,
    Cleaner,
    Cleaning,
    document_hash,
    is_held_out,
    text_grams,
    write_grams,
)
from data_tools.duplicates import Seen
from tests.support import one_line_error

WHERE = "notes.jsonl, line 3"


def cleaned(text: str, cleaning: Cleaning) -> tuple[str, str | None]:
    cleaning.check()
    return Cleaner(cleaning, None).clean(text, WHERE)


# --- settings ---


@pytest.mark.parametrize(
    ("cleaning", "expected"),
    [
        (Cleaning(normalize="nfc"), "--normalize: 'nfc' given; allowed: NFC NFD NFKC NFKD"),
        (Cleaning(min_characters=-1), "--min-characters: -1 given; allowed: 0 or more"),
        (
            Cleaning(min_characters=9, max_characters=8),
            "--max-characters: 8 given; allowed: 0 (no bound), or --min-characters (9) or more",
        ),
        (
            Cleaning(max_characters=-1),
            "--max-characters: -1 given; allowed: 0 (no bound), or --min-characters (0) or more",
        ),
        (Cleaning(near_duplicates=1.0), "--near-duplicates: 1.0 given; allowed: 0 (off), or 0.1 to 0.98"),
        (Cleaning(near_duplicates=float("nan")), "--near-duplicates: nan given; allowed: 0 (off), or 0.1 to 0.98"),
        (Cleaning(filter="module.function"), "--filter: 'module.function' given; allowed: package.module:function"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(cleaning: Cleaning, expected: str) -> None:
    assert one_line_error(cleaning.check) == expected


# --- one text ---


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("", "\ufb01le\u0301 \u00e9"),
        ("NFC", "\ufb01l\u00e9 \u00e9"),
        ("NFD", "\ufb01le\u0301 e\u0301"),
        ("NFKC", "fil\u00e9 \u00e9"),
        ("NFKD", "file\u0301 e\u0301"),
    ],
)
def test_normal_forms(form: str, expected: str) -> None:
    assert cleaned("\ufb01le\u0301 \u00e9", Cleaning(normalize=form)) == (expected, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "blank"), (" \n\u3000", "blank"), ("ab", "short"), ("abc", None), ("abcde", None), ("abcdef", "long")],
)
def test_length_bounds_are_inclusive(text: str, reason: str | None) -> None:
    assert cleaned(text, Cleaning(min_characters=3, max_characters=5)) == (text, reason)
    assert cleaned(text, Cleaning()) == (text, "blank" if reason == "blank" else None)
    assert reason is None or reason in DROP_REASONS


FILTERS = """
import re

def keep(text):
    if "\u00e9" in text:
        return False
    return re.sub("[0-9]", "", text) if "id" in text else True

def forgets(text):
    pass

def fails(text):
    raise ValueError("first line\\nsecond line " + "x " * 200)

def halves(text):
    return "\\ud800"

number = 3
"""


@pytest.fixture
def filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory."""
    (tmp_path / "hospital").mkdir()
    (tmp_path / "hospital" / "rules.py").write_text(FILTERS)
    (tmp_path / "hospital" / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("hospital", "hospital.rules"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "hospital.rules"


def test_a_users_filter_keeps_drops_and_replaces(filters: str) -> None:
    cleaning = Cleaning(normalize="NFC", min_characters=3, filter=f"{filters}:keep")
    assert cleaned("text", cleaning) == ("text", None)
    assert cleaned("id 12", cleaning) == ("id ", None)
    assert cleaned("id12", cleaning) == ("id", "short")
    assert cleaned("cafe\u0301", cleaning) == ("caf\u00e9", "filter")  # the filter sees normalised text
    assert cleaned("id", Cleaning(filter=f"{filters}:keep")) == ("id", None)


def test_errors_of_a_users_filter_name_the_document(filters: str) -> None:
    def error(name: str) -> str:
        return one_line_error(lambda: cleaned("text", Cleaning(filter=name)))

    at = f"given; at {WHERE} it"
    assert error(f"{filters}:forgets") == (
        f"--filter: '{filters}:forgets' {at} returned a NoneType; allowed: True, False or a str"
    )
    raised = error(f"{filters}:fails")
    assert raised.startswith(f"--filter: '{filters}:fails' {at} raised ValueError: first line second line x")
    assert raised.endswith("[...]: mend it")
    assert len(raised) < 350
    assert error(f"{filters}:halves") == (
        f"--filter: '{filters}:halves' {at} returned half of a surrogate pair; allowed: text as UTF-8"
    )
    assert error("hospital.rule:keep") == (
        "--filter: 'hospital.rule:keep' given; importing hospital.rule raised ModuleNotFoundError: No module named "
        "'hospital.rule'; allowed: a module on the Python path or in the current directory"
    )
    assert "importing hospital.broken raised ZeroDivisionError: division by zero;" in error("hospital.broken:keep")
    for name in (f"{filters}:number", f"{filters}:none"):
        assert error(name) == f"--filter: '{name}' given; allowed: a function in {Path.cwd()}/hospital/rules.py"


# --- the held-out split ---


def test_hashes_are_the_same_everywhere() -> None:
    assert document_hash("é").hex() == "4a99557e4033c3539de2eb65472017ca"
    text = "one two three four five six seven eight nine ten eleven twelve Thirteen, 14"
    assert text_grams(text).tolist() == [2104777124591597118, 15891483168751753807]


def test_the_held_out_split_is_near_its_share_and_grows_only() -> None:
    hashes = [document_hash(f"document {number}") for number in range(10_000)]
    chosen = {digest for digest in hashes if is_held_out(digest, 0.01)}
    assert 60 <= len(chosen) <= 140  # four standard deviations
    assert chosen <= {digest for digest in hashes if is_held_out(digest, 0.05)}
    assert not any(is_held_out(digest, 0.0) for digest in hashes)
    lowest, highest = bytes(16), b"\xff" * 16
    assert is_held_out(lowest, 1e-30)
    assert is_held_out(highest, 1.0)
    assert not is_held_out(highest, 1 - 2**-53)
    assert is_held_out(bytes([63]) + highest[1:], 0.25)
    assert not is_held_out(bytes([64]) + lowest[1:], 0.25)


# --- overlap ---


def naive_grams(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
    return {tuple(words[first : first + 13]) for first in range(len(words) - 12)}


words = st.lists(st.sampled_from(["a", "b", "Ünd", "3"]), max_size=30)


@st.composite
def held_out_and_training(draw: st.DrawFn) -> tuple[list[str], str]:
    """Held-out texts and a training text; it quotes 10 to 16 words of one of them, in other case and punctuation."""
    held_out = draw(st.lists(words, max_size=4))
    training = draw(words)
    if held_out:
        source = draw(st.sampled_from(held_out))
        first, num_words = draw(st.integers(0, len(source))), draw(st.integers(10, 16))
        place = draw(st.integers(0, len(training)))
        training[place:place] = [word.upper() for word in source[first : first + num_words]]
    return [" ".join(text) for text in held_out], draw(st.sampled_from([" ", ", ", "\n", "-"])).join(training)


@given(held_out_and_training())
def test_texts_overlap_exactly_when_they_share_thirteen_words(
    tmp_path_factory: pytest.TempPathFactory, texts: tuple[list[str], str]
) -> None:
    held_out, training = texts
    file = tmp_path_factory.mktemp("grams") / "grams"
    expected = set().union(*map(naive_grams, held_out))
    assert write_grams(file, map(text_grams, held_out)) == len(expected)
    assert Cleaner(Cleaning(), file).overlaps(training) == bool(expected & naive_grams(training))


def test_quotes_are_found_among_many_grams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the table of first bits is far too small to rule anything out."""
    held_out = [" ".join(f"w{number + i}" for i in range(60)) for number in range(0, 60_000, 60)]
    write_grams(tmp_path / "grams", map(text_grams, held_out))
    for max_prefix_bits in (clean_module.MAX_PREFIX_BITS, 4):
        monkeypatch.setattr(clean_module, "MAX_PREFIX_BITS", max_prefix_bits)
        cleaner = Cleaner(Cleaning(), tmp_path / "grams")
        for number, text in enumerate(held_out):
            parts = text.split()[number % 48 :]
            assert cleaner.overlaps("before " + " ".join(parts[:13]))
            assert not cleaner.overlaps("before " + " ".join([*parts[:12], "after", *parts[12:24]]))


def test_short_texts_overlap_nothing(tmp_path: Path) -> None:
    short = "Table of contents"
    assert write_grams(tmp_path / "grams", [text_grams(short)]) == 0
    assert not Cleaner(Cleaning(), tmp_path / "grams").overlaps(short)
    assert not Cleaner(Cleaning(), None).overlaps(short * 20)


def test_runs_without_end_are_cut_into_words() -> None:
    assert len(text_grams("acgt" * 16 * 13)) == 1
    assert len(text_grams("acgt" * 16 * 13 + " t")) == 2


# --- exact duplicates ---


def memory() -> sqlite3.Connection:
    return sqlite3.connect(":memory:")


@given(st.lists(st.integers(0, 9) | st.sampled_from(["commit", "rollback"]), max_size=60))
def test_first_is_a_set_that_goes_back_to_the_last_commit(steps: list[int | str]) -> None:
    connection = memory()
    seen = Seen(connection)
    expected: set[int] = set()
    committed: set[int] = set()
    for step in steps:
        if step == "commit":
            connection.commit()
            committed = set(expected)
        elif step == "rollback":
            connection.rollback()
            expected = set(committed)
        else:
            assert isinstance(step, int)
            assert seen.first(document_hash(str(step))) == (step not in expected)
            expected.add(step)


KILLED = """
import os, signal, sqlite3, sys
from data_tools.duplicates import Seen

connection = sqlite3.connect(sys.argv[1])
seen = Seen(connection, near_threshold=0.8)
for number in range(20):
    if number == 10:
        connection.commit()
    assert seen.first(bytes([number] * 16))
    assert seen.first_near(bytes([number] * 512))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_what_was_not_committed_and_nothing_else(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "state.db")], check=False)
    assert killed.returncode == -signal.SIGKILL
    seen = Seen(sqlite3.connect(tmp_path / "state.db"), near_threshold=0.8)
    assert [seen.first(bytes([number] * 16)) for number in range(20)] == [False] * 10 + [True] * 10
    assert [seen.first_near(bytes([number] * 512)) for number in range(20)] == [False] * 10 + [True] * 10


# --- near duplicates ---


def shingles(text: str) -> set[tuple[str, ...]]:
    parts = text.split()
    return {tuple(parts[first : first + 5]) for first in range(len(parts) - 4)}


def similarity(one: str, other: str) -> float:
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def planted(seed: int, num_changed: int) -> tuple[str, str]:
    """A text of 1,000 words, and the same with some of them replaced."""
    generator = random.Random(seed)
    text = [f"w{generator.randrange(5_000)}" for _ in range(1_000)]
    other = list(text)
    for place in generator.sample(range(1_000), num_changed):
        other[place] = f"changed{place}"
    return " ".join(text), " ".join(other)


@pytest.fixture(scope="module")
def signature() -> Callable[[str], bytes]:
    return Cleaner(Cleaning(near_duplicates=0.8), None).signature


@pytest.mark.parametrize("seed", range(20))
def test_near_duplicates_are_found_and_others_kept(signature: Callable[[str], bytes], seed: int) -> None:
    connection = memory()
    seen = Seen(connection, near_threshold=0.8)
    text, near = planted(seed, 6)
    _, far = planted(seed, 60)
    assert similarity(text, near) > 0.92
    assert 0.5 < similarity(text, far) < 0.65
    assert seen.first_near(signature(text))
    assert not seen.first_near(signature(text))
    assert not seen.first_near(signature(near))
    assert seen.first_near(signature(far))
    assert not seen.first_near(signature(far))
    connection.rollback()
    assert seen.first_near(signature(near))


def test_signatures_estimate_the_similarity(signature: Callable[[str], bytes]) -> None:
    for num_changed in (0, 10, 50, 150, 400):
        text, other = planted(num_changed, num_changed)
        values = [np.frombuffer(signature(t), dtype="<u4") for t in (text, other)]
        assert len(values[0]) == NUM_PERMUTATIONS
        estimate = np.mean(values[0] == values[1])
        true = similarity(text, other)
        assert abs(estimate - true) <= 4 * np.sqrt(true * (1 - true) / NUM_PERMUTATIONS)


def test_signatures_of_short_texts_are_of_all_their_words(signature: Callable[[str], bytes]) -> None:
    assert signature("Yes, no") == signature("yes no!")
    assert signature("yes no") != signature("no yes")
    assert signature("...") == signature("...")
    assert signature("...") != signature("!!!")


def test_signatures_are_of_five_words(signature: Callable[[str], bytes]) -> None:
    assert signature("a b c d e a b c d") == signature("B c d e, a b c d e")  # of six words they differ
    assert signature("a b c d a b c") != signature("b c d a b c d")  # of four words they are equal


def test_a_long_text_is_permuted_in_parts(signature: Callable[[str], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    text = planted(0, 0)[0]
    whole = signature(text)
    monkeypatch.setattr(clean_module, "SHINGLES_AT_ONCE", 7)
    assert signature(text) == whole
