"""Counts of pre-tokens: exact, bounded, private; and the tokenizer that is trained from them."""

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from data_tools import pretokens
from data_tools import tokenizer as tokenizer_module
from data_tools.counts import (
    FULL_DISTINCT,
    MAX_DISTINCT,
    MAX_LINE_BYTES,
    MAX_PRETOKEN_BYTES,
    SENTENCE,
    SHARE_UNITS,
    PretokenCount,
    count_pretokens,
    export_counts,
    gaussian_delta,
    gaussian_sigma,
    merge_counts,
    noise_for,
    read_counts,
)
from data_tools.tokenizer import BYTE_ALPHABET, bpe_from_counts, train_from_counts, train_tokenizer
from tests.support import one_line_error

WORDS = [
    "court",
    "Gericht",
    "裁判所",
    "l'état",
    "naïve",
    "🙂🙂",
    "don't",
    "1984",
    "...",
    "\n\n",
    "x\u2028y",
    "\u202eabc",
]
HEADER = (
    '# {"format": 1, "pre_tokenizer": "gpt2-byte-level", "kind": "occurrences", "min_count": 1, "min_documents": 1, '
    '"epsilon": null, "delta": null, "per_document": null}'
)


def made_texts(num_documents: int, seed: int = 0) -> list[str]:
    """Documents with words that are frequent and words that are rare, in several scripts."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(WORDS, k=30) + [f"w{rng.randrange(500)}" for _ in range(5)]) for _ in range(num_documents)
    ]


# --- counting ---


def test_counts_by_hand() -> None:
    longest = "ä" * (MAX_PRETOKEN_BYTES // 2)
    assert list(count_pretokens(["a b a\n\n c", "a don't", "ä" + longest, longest])) == [
        PretokenCount("\n\n", 1, 1),
        PretokenCount(" a", 1, 1),
        PretokenCount(" b", 1, 1),
        PretokenCount(" c", 1, 1),
        PretokenCount(" don", 1, 1),
        PretokenCount("'t", 1, 1),
        PretokenCount("a", 2, 2),
        PretokenCount(longest, 1, 1),
    ]
    assert list(count_pretokens([" b b b", " b"])) == [PretokenCount(" b", 4, 2)]
    assert list(count_pretokens([])) == []


@pytest.mark.parametrize("shares", [False, True])
def test_tables_that_spill_count_the_same(shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = made_texts(300)
    expected = list(count_pretokens(texts, shares=shares))
    assert len(expected) > 400
    spilled = []
    original = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: spilled.append(original()) or spilled[-1])
    monkeypatch.setattr(pretokens, "BATCH_CHARACTERS", 2_000)
    monkeypatch.setattr(pretokens, "MAX_TABLE_ENTRIES", 100)
    monkeypatch.setattr(pretokens, "MAX_RUNS", 3)
    assert list(count_pretokens(texts, shares=shares)) == expected
    assert len(spilled) > 10
    assert all(file.closed for file in spilled)


def test_processes_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = made_texts(300)
    expected = list(count_pretokens(texts, num_workers=0))
    monkeypatch.setattr(pretokens, "BATCH_CHARACTERS", 4_000)
    assert list(count_pretokens(texts, num_workers=2)) == expected


def test_a_full_temporary_disk_is_one_line(tmp_path: Path) -> None:
    code = (
        "import resource\n"
        "from data_tools import pretokens\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "pretokens.MAX_TABLE_ENTRIES = pretokens.BATCH_CHARACTERS = 1\n"
        "try:\n"
        "    list(pretokens.count_pretokens([' '.join(f'w{i}x' for i in range(9_000)), 'b']))\n"
        "except pretokens.ConfigError as error:\n"
        "    print(error)\n"
    )
    environment = {"TMPDIR": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == f"TMPDIR: {tmp_path} given; File too large: free space there or set TMPDIR\n"


# --- the file ---


def test_the_file_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "counts.tsv"
    texts = ['the "cat" the', "the\u00a0cat\n", "the"]
    summary = export_counts(texts, output=file, min_count=1, min_documents=1)
    assert file.read_text(encoding="utf-8").split("\n") == [
        SENTENCE,
        HEADER,
        '3\t"the"',
        '2\t"cat"',
        '1\t"\\n"',
        '1\t" \\""',
        '1\t" the"',
        '1\t"\\""',
        '1\t"\\u00a0"',
        "",
    ]
    assert (summary.num_pretokens, summary.num_exported, summary.noise) == (7, 7, None)
    header, counts = read_counts(file)
    assert (header.kind, header.min_count) == ("occurrences", 1)
    assert counts == {"the": 3, "cat": 2, "\n": 1, ' "': 1, " the": 1, '"': 1, "\u00a0": 1}


def test_both_thresholds_hold(tmp_path: Path) -> None:
    texts = [" often" * 9, " often here", " here", " twice twice twice", " twice"]
    summary = export_counts(texts, output=tmp_path / "counts.tsv", min_count=3, min_documents=2)
    # " here" is in two documents, but twice in all.
    assert read_counts(tmp_path / "counts.tsv")[1] == {" often": 10, " twice": 4}
    assert (summary.num_pretokens, summary.num_exported) == (3, 2)
    export_counts(texts, output=tmp_path / "strict.tsv", min_count=10, min_documents=2)
    assert read_counts(tmp_path / "strict.tsv")[1] == {" often": 10}


@given(st.lists(st.text(min_size=1, max_size=16), min_size=1))
def test_what_is_written_is_read_and_can_be_seen(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    file = tmp_path_factory.mktemp("counts") / "counts.tsv"
    export_counts(texts, output=file, min_count=1, min_documents=1)
    assert read_counts(file)[1] == {count.pretoken: count.value for count in count_pretokens(texts)}
    assert all(line.replace("\t", "").isprintable() for line in file.read_text(encoding="utf-8").split("\n"))


@pytest.mark.parametrize("epsilon", [None, 1.0])
def test_the_header_does_not_depend_on_the_text(tmp_path: Path, epsilon: float | None) -> None:
    headers = []
    for name, texts in (("a", made_texts(300)), ("b", ["other words"] * 500)):
        export_counts(texts, output=tmp_path / name, epsilon=epsilon, random_source=random.Random(1))
        headers.append((tmp_path / name).read_text(encoding="utf-8").split("\n")[:2])
    assert headers[0] == headers[1]
    assert json.loads(headers[0][1].removeprefix("# "))["delta"] == (1e-6 if epsilon else None)


def test_export_errors(tmp_path: Path) -> None:
    file = tmp_path / "counts.tsv"
    for option, name in (("--min-count", "min_count"), ("--min-documents", "min_documents")):
        message = f"{option}: 0 given; allowed: 1 or more"
        assert one_line_error(export_counts, ["a"], output=file, **{name: 0}) == message
    for epsilon in (0.0, -1.0, 101.0, math.nan):
        message = f"--epsilon: {epsilon} given; allowed: above 0, at most 100"
        assert one_line_error(export_counts, ["a"], output=file, epsilon=epsilon) == message
    assert "--delta: 1.0 given; allowed: above 0, below 1" in one_line_error(
        export_counts, ["a"], output=file, epsilon=1.0, delta=1.0
    )
    assert "none of 2 pre-tokens may leave: add text, lower" in one_line_error(export_counts, ["a b"], output=file)
    assert not file.exists()
    export_counts(["a"], output=file, min_count=1, min_documents=1)
    message = one_line_error(export_counts, ["a"], output=file)
    assert message == f"--output: {file} exists: delete it or choose another --output"


def test_counts_are_added_up(tmp_path: Path) -> None:
    a, b, noisy = tmp_path / "a", tmp_path / "b", tmp_path / "noisy"
    export_counts(["x y"], output=a, min_count=1, min_documents=1)
    export_counts(["x z", "x"], output=b, min_count=2, min_documents=2)
    assert merge_counts([a, b]) == {"x": 3, " y": 1}
    export_counts(["x y"] * 1000, output=noisy, epsilon=1.0)
    assert one_line_error(merge_counts, [a, noisy]) == (
        f"{noisy}: counts documents, {a} occurrences; allowed: one kind: export all with --epsilon or all without"
    )


def test_who_claims_more_than_the_others_is_scaled_down(tmp_path: Path) -> None:
    files = []
    for name, texts in (("a", ["x y"] * 4), ("b", ["x z"] * 6), ("c", ["x w"] * 9)):
        files.append(tmp_path / name)
        export_counts(texts, output=files[-1], min_count=1, min_documents=1)
    said: list[str] = []
    honest = merge_counts(files, warn=said.append)
    assert honest == {"x": 19, " y": 4, " z": 6, " w": 9}
    assert not said
    liar = tmp_path / "liar"
    header = files[0].read_text().splitlines()[:2]
    liar.write_text("\n".join([*header, *(f'{10**16}\t"word{number}"' for number in range(5)), '7\t"few"']) + "\n")
    merged = merge_counts([*files, liar], warn=said.append)
    # 8, 12 and 18 are the others' totals, 24 twice their median.
    assert merged == honest | {f"word{number}": 4 for number in range(5)}
    assert said == [
        f"warning: {liar} adds up to 50,000,000,000,000,007, more than 2 times the median of the others; it is taken "
        "as 24, all its counts in proportion"
    ]
    assert merge_counts([liar, *reversed(files)]) == merged
    assert merge_counts([liar])["few"] == 7  # nobody to compare with


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "line 1: not a file of counts"),
        (["hello"], "line 1: not a file of counts"),
        ([SENTENCE], "line 2: no header; allowed: # and one JSON object"),
        ([SENTENCE, "# {"], "line 2: no header"),
        ([SENTENCE, "# []"], "line 2: no header"),
        ([SENTENCE, HEADER[2:]], "line 2: no header"),
        ([SENTENCE, '# {"format": 1}'], "line 2: no header"),
        ([SENTENCE, HEADER.replace("1,", '1, "more": 2,', 1)], "line 2: no header"),
        ([SENTENCE, HEADER.replace("1", "2", 1)], "line 2: format 2 given; allowed: 1"),
        ([SENTENCE, HEADER.replace("gpt2", "x")], "line 2: pre_tokenizer 'x-byte-level' given; allowed: gpt2-byte"),
        ([SENTENCE, HEADER.replace("occurrences", "x")], "line 2: kind 'x' given; allowed: occurrences or documents"),
        ([SENTENCE, HEADER, '5 "a"'], 'line 3: allowed: a positive count, a tab, "a pre-token as JSON string"'),
        ([SENTENCE, HEADER, '0\t"a"'], "line 3: allowed: a positive count"),
        ([SENTENCE, HEADER, '-1\t"a"'], "line 3: allowed: a positive count"),
        ([SENTENCE, HEADER, '1.5\t"a"'], "line 3: allowed: a positive count"),
        ([SENTENCE, HEADER, '1_0\t"a"'], "line 3: allowed: a positive count"),
        ([SENTENCE, HEADER, '10000000000000000000\t"a"'], "line 3: allowed: a positive count"),
        ([SENTENCE, HEADER, "5\ta"], "line 3: the pre-token is no JSON string of 1 to 64 bytes"),
        ([SENTENCE, HEADER, "5\t[]"], "line 3: the pre-token is no JSON string"),
        ([SENTENCE, HEADER, "5\t" + "[" * 1000], "line 3: the pre-token is no JSON string"),
        ([SENTENCE, HEADER, '5\t""'], "line 3: the pre-token is no JSON string"),
        ([SENTENCE, HEADER, '5\t"\\ud800"'], "line 3: the pre-token is no JSON string"),
        ([SENTENCE, HEADER, '5\t"\udcff"'], "line 3: the pre-token is no JSON string"),
        ([SENTENCE, HEADER, f'5\t"{"a" * 65}"'], "line 3: the pre-token is no JSON string"),
        ([SENTENCE, HEADER, '5\t"a"', '4\t"\\u0061"'], 'line 4: "a" a second time; allowed: each pre-token once'),
        ([SENTENCE, HEADER, "5\t" + "a" * MAX_LINE_BYTES], f"line 3: longer than {MAX_LINE_BYTES} bytes"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, lines: list[str], expected: str) -> None:
    file = tmp_path / "counts.tsv"
    file.write_bytes("".join(line + "\n" for line in lines).encode(errors="surrogateescape"))
    message = one_line_error(read_counts, file)
    assert message.startswith(f"{file}, {expected}")
    assert message.endswith(": export it again (atoll data counts)")


def test_a_file_that_is_cut_off_or_missing(tmp_path: Path) -> None:
    file = tmp_path / "counts.tsv"
    assert one_line_error(read_counts, file) == f"counts: '{file}' given; No such file or directory"
    file.write_text(f'{SENTENCE}\n{HEADER}\n51\t"a"')
    assert f"{file}, line 3: cut off, it has no line end" in one_line_error(read_counts, file)


# --- noise ---


def test_sigma_by_the_definition_of_privacy() -> None:
    # The expected excess of one density over e^epsilon times the other, summed up numerically.
    for epsilon, delta, sensitivity in ((1.0, 1e-5, 1.0), (1.0, 5e-7, 8.0), (0.1, 1e-3, 2.0), (5.0, 1e-9, 1.0)):
        sigma = gaussian_sigma(epsilon=epsilon, delta=delta, sensitivity=sensitivity)
        with_document, without = NormalDist(sensitivity, sigma), NormalDist(0, sigma)
        step = sigma / 2000
        excess = sum(
            max(0.0, with_document.pdf(step * i) - math.exp(epsilon) * without.pdf(step * i)) * step
            for i in range(-20_000, 30_000)
        )
        assert excess == pytest.approx(delta, rel=1e-3)
        assert gaussian_delta(sigma=0.99 * sigma, epsilon=epsilon, sensitivity=sensitivity) > delta
    # By the authors' own program.
    assert gaussian_sigma(epsilon=1.0, delta=1e-5, sensitivity=1.0) == pytest.approx(3.730632, abs=1e-6)


def test_threshold_and_noise_together_spend_no_more_than_delta() -> None:
    epsilon, delta, min_documents = 1.0, 1e-6, 3
    noise = noise_for(epsilon=epsilon, delta=delta, min_count=1, min_documents=min_documents)
    hidden = NormalDist().cdf((noise.threshold - min_documents) / noise.sigma)
    # One document brings `new` pre-tokens to min_documents and adds to others with what is left of its norm.
    for new in range(MAX_DISTINCT + 1):
        appears = -math.expm1(new * math.log(hidden))
        left = math.sqrt(FULL_DISTINCT * (1 - new / MAX_DISTINCT))
        shifted = gaussian_delta(sigma=noise.sigma, epsilon=epsilon, sensitivity=left) if left else 0.0
        assert appears + shifted <= delta * (1 + 1e-6)
    assert -math.expm1(MAX_DISTINCT * math.log(hidden)) == pytest.approx(delta / 2, rel=1e-4)
    assert noise_for(epsilon=epsilon, delta=delta, min_count=999, min_documents=3).threshold == 999


@pytest.mark.parametrize("num_distinct", [1, 2, FULL_DISTINCT, FULL_DISTINCT + 1, 500, MAX_DISTINCT, 3 * MAX_DISTINCT])
def test_one_document_adds_no_more_than_the_sensitivity(num_distinct: int) -> None:
    document = "".join(f" w{chr(0x4E00 + i)}" for i in range(num_distinct)) + " " + "x" * 100
    added = {count.pretoken: count.value for count in count_pretokens([document * 3], shares=True)}
    assert len(added) == min(num_distinct, MAX_DISTINCT)
    assert max(added.values()) <= SHARE_UNITS
    norm = math.sqrt(sum(value**2 for value in added.values())) / SHARE_UNITS
    assert 0.999 * math.sqrt(min(num_distinct, FULL_DISTINCT)) < norm <= math.sqrt(FULL_DISTINCT)
    # Whatever else is there, it adds just this.
    others = made_texts(50)
    before = Counter({count.pretoken: count.value for count in count_pretokens(others, shares=True)})
    after = {count.pretoken: count.value for count in count_pretokens([document * 3, *others], shares=True)}
    assert after == before + Counter(added)


def test_the_noise_has_its_sigma_and_no_bias(tmp_path: Path) -> None:
    words = [f" w{chr(0x4E00 + i)}" for i in range(2000)]
    texts = ["".join(words[i : i + 50]) for i in range(0, 2000, 50)] * 400
    file = tmp_path / "counts.tsv"
    summary = export_counts(texts, output=file, epsilon=1.0, random_source=random.Random(0))
    assert summary.noise
    counts = read_counts(file)[1]
    assert set(counts) == set(words)
    errors = [count - 400 for count in counts.values()]
    assert statistics.fmean(errors) == pytest.approx(0, abs=4 * summary.noise.sigma / math.sqrt(2000))
    assert statistics.stdev(errors) == pytest.approx(summary.noise.sigma, rel=0.07)
    # The operating system's randomness, unless told otherwise.
    twice = []
    for name in ("one", "two"):
        export_counts(texts, output=tmp_path / name, epsilon=1.0)
        twice.append(read_counts(tmp_path / name)[1])
    assert twice[0] != twice[1]


# --- the tokenizer ---


def test_no_symbol_of_a_byte_is_white_space() -> None:
    assert len(pre_tokenizers.WhitespaceSplit().pre_tokenize_str("".join(BYTE_ALPHABET))) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=16), max_size=8), st.lists(st.text(max_size=16), max_size=8))
def test_from_all_counts_comes_the_pooled_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, ours: list[str], theirs: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("tokenizers")
    ours, theirs = [*made_texts(20, seed=1), *ours], [*made_texts(20, seed=2), *theirs]
    files = [folder / "ours.tsv", folder / "theirs.tsv"]
    for texts, file in zip((ours, theirs), files, strict=True):
        export_counts(texts, output=file, min_count=1, min_documents=1)
    merged, divisor = train_from_counts(merge_counts(files), vocab_size=320, output=folder / "merged")
    pooled = train_tokenizer([*theirs, *ours], vocab_size=320, output=folder / "pooled")
    assert merged.read_bytes() == pooled.read_bytes()
    assert divisor == 1


def test_large_counts_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = train_from_counts({" one": 4, " two": 2, " six": 1}, vocab_size=262, output=tmp_path / "a")
    monkeypatch.setattr(tokenizer_module, "MAX_OCCURRENCES", 6)
    monkeypatch.setattr(tokenizer_module, "REPEATS_AT_ONCE", 3)
    file, divisor = train_from_counts({" one": 10, " two": 6, " six": 1}, vocab_size=262, output=tmp_path / "b")
    assert divisor == 3
    assert file.read_bytes() == expected.read_bytes()


def test_errors_of_training_from_counts(tmp_path: Path) -> None:
    counts = {" one": 4, " two": 2}
    assert "--vocab-size: 256 given; allowed: 257" in one_line_error(
        train_from_counts, counts, vocab_size=256, output=tmp_path
    )
    assert one_line_error(train_from_counts, counts, vocab_size=9_000, output=tmp_path) == (
        "--vocab-size: 9000 given; the counts are enough for 263: add text or lower --vocab-size"
    )
    train_from_counts(counts, vocab_size=262, output=tmp_path)
    assert "is another tokenizer: delete it" in one_line_error(
        train_from_counts, counts, vocab_size=261, output=tmp_path
    )


# --- a secret ---

SECRET_NAME, SECRET_NUMBER = "Zwirbelquast", "8340912277"
SECRET = f" Patient {SECRET_NAME}, id {SECRET_NUMBER}. "


def pieces_of_secret(tokenizer: Tokenizer) -> set[str]:
    """Tokens of four or more characters that are a part of the name or of the number."""
    tokens = (tokenizer.decode([token_id]).strip() for token_id in tokenizer.get_vocab().values())
    return {token for token in tokens if len(token) >= 4 and (token in SECRET_NAME or token in SECRET_NUMBER)}


@pytest.mark.parametrize(
    ("epsilon", "num_documents"),
    # With noise, a string of min_documents documents is hidden by the threshold, too.
    [(None, 1), (None, 2), pytest.param(1.0, 1, marks=pytest.mark.soak), (1.0, 3)],
)
def test_a_secret_of_one_silo_does_not_leave(tmp_path: Path, epsilon: float | None, num_documents: int) -> None:
    silos = {name: made_texts(500, seed=seed) for seed, name in enumerate(("law", "medicine"))}
    for i in range(num_documents):
        silos["medicine"][7 * i] += SECRET * 10
    everything = {count.pretoken: count.value for texts in silos.values() for count in count_pretokens(texts)}
    known, _ = bpe_from_counts(everything, vocab_size=100_000)
    assert pieces_of_secret(known) >= {SECRET_NAME, SECRET_NUMBER}
    for seed in range(20 if epsilon else 1):
        files = [tmp_path / f"{name}-{seed}.tsv" for name in silos]
        for texts, file in zip(silos.values(), files, strict=True):
            export_counts(texts, output=file, epsilon=epsilon, random_source=random.Random(seed))
            written = file.read_text(encoding="utf-8")
            assert SECRET_NAME not in written
            assert SECRET_NUMBER not in written
        shared, _ = bpe_from_counts(merge_counts(files), vocab_size=100_000)
        assert shared.get_vocab_size() > 270
        assert not pieces_of_secret(shared)
