"""Raw text to packed shards: what is kept and counted, resuming, and what a user is told."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from tokenizers import Tokenizer

from data_tools.clean import Cleaning
from data_tools.pack import Recipe, prepare
from data_tools.sources import Source, load_sources
from data_tools.tokenizer import train_tokenizer
from data_tools.workers import StoppedError
from pretrain.config.load import load_config
from pretrain.silo.data import PackedTokens
from pretrain.silo.shards import Manifest, tokenizer_sha256, verify_shards
from pretrain.silo.verify import verify_tokens
from tests.support import TinyText, mounted, one_line_error, packed_hashes, pseudo_text, tiny_settings
from tests.text_files import TEXTS, save_dataset, write_csv, write_jsonl, write_parquet


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TEXTS, vocab_size=280, output=tmp_path_factory.mktemp("tokenizer"))


def recipe(tokenizer: Path, *paths: Path, **changes: Any) -> Recipe:
    sources = tuple(Source(path=str(path)) for path in paths)
    return Recipe(**{"sources": sources, "tokenizer": tokenizer, "held_out": 0.0} | changes)


def decoded(split: Path, tokenizer: Path) -> list[str]:
    """The documents of a packed split, checked, read through memory maps and decoded."""
    encoder, manifest = Tokenizer.from_file(str(tokenizer)), verify_shards(split)
    verify_tokens(split, manifest)
    tokens = PackedTokens([split], sequence_tokens=manifest.num_tokens - 1).sequence(0)
    ends = np.flatnonzero(tokens == manifest.end_of_text_id)
    assert len(ends) == manifest.num_documents
    return [encoder.decode(part[part != manifest.end_of_text_id]) for part in np.split(tokens, ends[:-1])]


def counted(output: Path, source: str = "text") -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())["sources"][source]


# --- what is written ---


@pytest.mark.parametrize("shard_tokens", [7, 1_000_000])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_round_trip(tokenizer: Path, tmp_path: Path, shard_tokens: int, num_workers: int) -> None:
    source = write_jsonl(tmp_path / "text.jsonl.gz", TEXTS)
    settings = recipe(tokenizer, source, shard_tokens=shard_tokens)
    manifests = prepare(settings, tmp_path / "packed", num_workers=num_workers)
    manifest = manifests["train"]
    assert manifests == {"train": verify_shards(tmp_path / "packed" / "train")}
    assert manifest.tokenizer_sha256 == tokenizer_sha256(tokenizer)
    assert decoded(tmp_path / "packed" / "train", tokenizer) == TEXTS
    assert manifest.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.token_type == "uint16"
    assert all(shard.num_tokens <= shard_tokens for shard in manifest.shards)
    assert len(manifest.shards) == -(-manifest.num_tokens // shard_tokens)
    names = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "packed").iterdir())
    assert names == ["packed/report.json", "packed/report.png", "packed/silo.yaml", "packed/train"]
    assert not (tmp_path / "packed.partial").exists()


def test_every_format_gives_the_same_shards(tokenizer: Path, tmp_path: Path) -> None:
    files = {
        "jsonl": write_jsonl(tmp_path / "1" / "text.jsonl.zst", TEXTS),
        "csv": write_csv(tmp_path / "2" / "text.csv", TEXTS),
        "parquet": write_parquet(tmp_path / "3" / "text.parquet", TEXTS),
        "saved": save_dataset(tmp_path / "4" / "text", TEXTS),
    }
    made = {kind: prepare(recipe(tokenizer, file), tmp_path / kind)["train"] for kind, file in files.items()}
    assert len({manifest.shards for manifest in made.values()}) == 1
    assert decoded(tmp_path / "saved" / "train", tokenizer) == TEXTS


def test_a_tokenizer_that_truncates_does_not_truncate_documents(tokenizer: Path, tmp_path: Path) -> None:
    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(3)
    encoder.enable_padding(length=999)
    encoder.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    prepare(recipe(tmp_path, source), tmp_path / "packed")
    assert decoded(tmp_path / "packed" / "train", tokenizer) == TEXTS


def test_a_large_vocabulary_gets_the_wider_type(tmp_path: Path) -> None:
    encoder = Tokenizer.from_str(
        Tokenizer.from_file(str(train_tokenizer(TEXTS, vocab_size=280, output=tmp_path))).to_str()
    )
    encoder.add_tokens([f"<unused {number}>" for number in range(70_000)])
    (tmp_path / "large").mkdir()
    encoder.save(str(tmp_path / "large" / "tokenizer.json"))
    source = write_jsonl(tmp_path / "text.jsonl", [*TEXTS, "<unused 69999>"])
    manifest = prepare(recipe(tmp_path / "large", source), tmp_path / "packed")["train"]
    assert (manifest.token_type, manifest.vocab_size) == ("uint32", 70_280)
    assert decoded(tmp_path / "packed" / "train", tmp_path / "large" / "tokenizer.json")[:3] == TEXTS


def test_several_sources_make_one_silo(tokenizer: Path, tmp_path: Path, tiny_text: TinyText) -> None:
    write_jsonl(tmp_path / "raw" / "notes" / "a.jsonl", pseudo_text("a", 2_000))
    write_jsonl(tmp_path / "raw" / "letters.jsonl.gz", pseudo_text("b", 3_000))
    listed = {
        "sources": [
            {"path": str(tmp_path / "raw" / "notes"), "weight": 3},
            {"path": str(tmp_path / "raw" / "*.gz"), "name": "post", "weight": 1},
        ]
    }
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(listed))
    sources = tuple(load_sources(tmp_path / "sources.yaml"))
    output = tmp_path / "packed"
    manifests = prepare(Recipe(sources=sources, tokenizer=tokenizer, held_out=0.2), output)
    assert sorted(manifests) == ["notes/train", "notes/valid", "post/train", "post/valid"]
    overlay = yaml.safe_load((output / "silo.yaml").read_text())
    assert overlay["silo"] == {
        "data": [str(output / "notes" / "train"), str(output / "post" / "train")],
        "data_weights": [3.0, 1.0],
        "valid": {"notes": str(output / "notes" / "valid"), "post": str(output / "post" / "valid")},
    }
    settings = tiny_settings(tmp_path, tiny_text)
    settings["silos"] = {"hospital": None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    loaded = load_config([tmp_path / "run.yaml", output / "silo.yaml"], [])
    assert loaded.silos["hospital"].data_weights == [3.0, 1.0]


def test_the_held_out_split_is_stable_when_documents_are_added(tokenizer: Path, tmp_path: Path) -> None:
    documents = sorted(set(pseudo_text("stable", 60_000)))
    first, more = documents[::2], documents
    held_out = {}
    for name, texts in (("first", first), ("more", more)):
        source = write_jsonl(tmp_path / name / "text.jsonl", texts)
        prepare(recipe(tokenizer, source, held_out=0.2), tmp_path / name / "packed")
        held_out[name] = set(decoded(tmp_path / name / "packed" / "valid", tokenizer))
        trained = set(decoded(tmp_path / name / "packed" / "train", tokenizer))
        assert held_out[name].isdisjoint(trained)
        assert held_out[name] | trained == set(texts)
    assert held_out["first"] == held_out["more"] & set(first)
    assert 0.1 < len(held_out["more"]) / len(more) < 0.3


# --- cleaning ---


def test_every_document_is_accounted_for(tokenizer: Path, tmp_path: Path) -> None:
    long = pseudo_text("long", 40_000)
    held, similar = "\n".join(long[:3]), " ".join(long[10:30])
    write_jsonl(tmp_path / "text" / "valid.jsonl", [held])
    texts = [
        "ﬁve words are enough for this document, which nobody drops",
        "  \n ",
        "short",
        "x" * 9_000,
        similar,
        similar,
        similar + " and a few words more",
        "Before it. " + " ".join(held.split()[:20]) + " and after it.",
        "please drop me, says the user's own filter to this document",
    ]
    write_jsonl(tmp_path / "text" / "train.jsonl", texts)
    cleaning = Cleaning(
        normalize="NFKC",
        min_characters=20,
        max_characters=8_000,
        drop_duplicates=True,
        near_duplicates=0.8,
        drop_overlap=True,
        filter="tests.unit.data_tools.test_pack:keep",
    )
    output = tmp_path / "packed"
    prepare(recipe(tokenizer, tmp_path / "text", cleaning=cleaning), output)
    assert decoded(output / "train", tokenizer) == [
        "five words are enough for this document, which nobody drops",
        similar,
    ]
    assert decoded(output / "valid", tokenizer) == [held]
    counts = counted(output)
    assert {reason: dropped["documents"] for reason, dropped in counts["dropped"].items()} == {
        "blank": 1,
        "short": 1,
        "long": 1,
        "filter": 1,
        "overlap": 1,
        "duplicate": 1,
        "near duplicate": 1,
    }
    assert counts["documents"] == 10
    assert {split: kept["documents"] for split, kept in counts["kept"].items()} == {"train": 2, "valid": 1}
    assert sum(counts["lengths_kept"]) == 3
    assert sum(counts["lengths_dropped"]) == 7


def keep(text: str) -> bool:
    """The filter of the test above."""
    return not text.startswith("please drop me")


def test_too_little_held_out_text_is_said_with_a_share_that_would_do(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = pseudo_text("held out", 300_000)
    source = write_jsonl(tmp_path / "law.jsonl", documents)

    def warnings(held_out: float) -> list[str]:
        settings = recipe(tokenizer, source, held_out=held_out)
        manifests = prepare(settings, tmp_path / f"packed-{held_out}")
        if held_out:
            assert manifests["valid"].num_documents > 0
        return [line for line in capsys.readouterr().err.splitlines() if "warning" in line]

    (line,) = warnings(0.01)
    # So many tokens are more of this text than so many documents.
    num_tokens = json.loads((tmp_path / "packed-0.01" / "report.json").read_text())["sources"]["law"]["kept"]
    share = math.ceil(51_200 * 100 / sum(one["tokens"] for one in num_tokens.values())) / 100
    assert line.startswith("law: warning: --held-out 0.01 holds out ")
    assert line.endswith(f"too few for a loss that says much: --held-out {share:g} would do, at another --output")
    assert not warnings(share + 0.04)
    assert not warnings(0.0)
    few = write_jsonl(tmp_path / "few.jsonl", documents[:200])
    prepare(recipe(tokenizer, few, held_out=0.1), tmp_path / "few")
    assert "--held-out 0.2 is the most that makes sense" in capsys.readouterr().err


# --- stopping and going on ---


def test_stopped_and_resumed_at_every_block(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.sources.BLOCK_BYTES", 4_000)
    documents = pseudo_text("resume", 30_000)
    write_jsonl(tmp_path / "text" / "a.jsonl", documents[:40])
    write_jsonl(tmp_path / "text" / "b.jsonl.gz", documents[30:70])
    (tmp_path / "text" / "c.txt").write_text("\n<|endoftext|>\n".join(documents[60:]))
    cleaning = Cleaning(drop_duplicates=True, near_duplicates=0.7, drop_overlap=True)
    settings = recipe(tokenizer, tmp_path / "text", held_out=0.1, shard_tokens=3_000, cleaning=cleaning)
    prepare(settings, tmp_path / "undisturbed")
    with pytest.raises(StoppedError):  # in the first reading, for the held-out 13-grams
        prepare(settings, tmp_path / "stopped", asked_to_stop=lambda: True)
    num_stops, read = 0, tmp_path / "stopped.partial" / "held_out_grams.npy"
    while not (tmp_path / "stopped").exists():
        try:  # after every block from then on
            prepare(settings, tmp_path / "stopped", asked_to_stop=read.exists, commit_seconds=1e9)
        except StoppedError:
            num_stops += 1
    assert num_stops >= 5
    assert packed_hashes(tmp_path / "stopped") == packed_hashes(tmp_path / "undisturbed")
    assert len(packed_hashes(tmp_path / "stopped")) > 5
    without_time = [
        json.loads((tmp_path / name / "report.json").read_text())["sources"] for name in ("stopped", "undisturbed")
    ]
    assert without_time[0] == without_time[1]


def test_workers_do_not_change_the_bytes(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.sources.BLOCK_BYTES", 3_000)
    source = write_jsonl(tmp_path / "text.jsonl", pseudo_text("workers", 60_000))
    outputs = [tmp_path / f"workers-{number}" for number in (0, 1, 3)]
    for number, output in zip((0, 1, 3), outputs, strict=True):
        prepare(recipe(tokenizer, source, shard_tokens=5_000), output, num_workers=number)
    assert packed_hashes(outputs[0]) == packed_hashes(outputs[1]) == packed_hashes(outputs[2])


def test_preparing_again_keeps_the_same_and_refuses_another(tokenizer: Path, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "text.jsonl", TEXTS), tmp_path / "packed"
    first = prepare(recipe(tokenizer, source), output)
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    (tmp_path / "packed.partial").mkdir()  # of a process that was killed between its last two steps
    assert prepare(recipe(tokenizer.parent, source), output) == first
    assert not (tmp_path / "packed.partial").exists()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == written
    assert one_line_error(prepare, recipe(tokenizer, source, held_out=0.5), output) == (
        f"--output: {output} was prepared with other held_out: delete it or choose another --output"
    )
    write_jsonl(source, TEXTS[:1])
    assert "was prepared with other text: delete it" in one_line_error(prepare, recipe(tokenizer, source), output)
    assert decoded(output / "train", tokenizer) == TEXTS
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "exists and is no prepared text" in one_line_error(prepare, recipe(tokenizer, source), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


FIRST_OPTIONS = {  # of the first version that prepared text
    "normalize": "",
    "min_characters": 0,
    "max_characters": 0,
    "drop_duplicates": False,
    "near_duplicates": 0.0,
    "drop_overlap": False,
    "filter": "",
}


def test_what_an_option_came_later_for_is_no_other_recipe(tokenizer: Path, tmp_path: Path) -> None:
    """A new option of Cleaning, Recipe or Part that is not used may not show here: add it where it is used alone."""
    source, output = write_jsonl(tmp_path / "text.jsonl", TEXTS), tmp_path / "packed"
    prepare(recipe(tokenizer, source), output)
    report = json.loads((output / "report.json").read_text())
    stat = source.stat()
    text = ["text", "text.jsonl", "jsonl", "text", "", stat.st_size, stat.st_mtime_ns, "", ""]
    assert report["recipe"] == {
        "text": [text],
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "cleaning": FIRST_OPTIONS,
        "held_out": 0.0,
        "shard_tokens": 100_000_000,
    }
    assert recipe_sha256(output) == hashlib.sha256(canonical(report["recipe"])).hexdigest()
    for unused in ({}, {"personal_data": ""}):  # by the first version, and by one that told what it did not use
        report["recipe"]["cleaning"] = FIRST_OPTIONS | unused
        (output / "report.json").write_text(json.dumps(report))
        prepare(recipe(tokenizer, source), output)
    report["recipe"]["cleaning"] = FIRST_OPTIONS | {"personal_data": "mask"}
    (output / "report.json").write_text(json.dumps(report))
    assert "was prepared with other cleaning: " in one_line_error(prepare, recipe(tokenizer, source), output)


def canonical(terms: dict[str, Any]) -> bytes:
    return json.dumps(terms, sort_keys=True, separators=(",", ":")).encode()


def recipe_sha256(output: Path) -> str:
    return str(json.loads((output / "train" / "manifest.json").read_text())["recipe_sha256"])


def test_work_begun_with_another_recipe_is_not_mixed(tokenizer: Path, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "text.jsonl", TEXTS), tmp_path / "packed"
    with pytest.raises(StoppedError):
        prepare(recipe(tokenizer, source), output, asked_to_stop=lambda: True)
    other = recipe(tokenizer, source, cleaning=Cleaning(normalize="NFC"), shard_tokens=9)
    assert one_line_error(prepare, other, output) == (
        f"--output: {output}.partial was begun with other cleaning, shard_tokens: delete it, or choose another --output"
    )
    prepare(recipe(tokenizer, source), output)
    assert decoded(output / "train", tokenizer) == TEXTS


# --- what a user is told ---


BAD_LINES = {
    "broken line": b'{"text": "a"',
    "wrong encoding": b'{"text": "\xff"}',
    "missing field": b'{"txt": "a"}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_record_stops_or_is_skipped_and_counted(tokenizer: Path, tmp_path: Path, line: bytes) -> None:
    source, output = tmp_path / "text.jsonl", tmp_path / "packed"
    source.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good, too"}\n')
    message = one_line_error(prepare, recipe(tokenizer, source), output)
    assert message.startswith(f"{source}, line 2: ")
    assert message.endswith("or give --on-bad skip")
    assert not output.exists()
    prepare(recipe(tokenizer, source), output, on_bad="skip")
    assert decoded(output / "train", tokenizer) == ["good", "good, too"]
    assert list(counted(output)["bad"].values()) == [1]
    assert counted(output)["bad_examples"][0] in message


def test_a_parquet_file_of_another_schema_is_named_or_skipped(tokenizer: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "text" / "a.parquet", TEXTS)
    other = write_parquet(tmp_path / "text" / "b.parquet", [1, 2, 3], text_type=pa.int64())
    message = one_line_error(prepare, recipe(tokenizer, tmp_path / "text"), tmp_path / "out")
    assert message.startswith(f"{other}: no column of text named 'text'; it has id (int64), text (int64)")
    prepare(recipe(tokenizer, tmp_path / "text"), tmp_path / "out", on_bad="skip")
    assert decoded(tmp_path / "out" / "train", tokenizer) == TEXTS
    assert counted(tmp_path / "out")["bad"] == {"no such column": 1}


def test_an_empty_file_is_named(tokenizer: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "text" / "a.jsonl", TEXTS)
    (tmp_path / "text" / "b.jsonl").touch()
    assert str(tmp_path / "text" / "b.jsonl") in one_line_error(
        prepare, recipe(tokenizer, tmp_path / "text"), tmp_path / "out"
    )
    prepare(recipe(tokenizer, tmp_path / "text"), tmp_path / "out", on_bad="skip")
    assert counted(tmp_path / "out")["bad"] == {"empty file": 1}


def test_settings_that_cannot_be_are_said(tokenizer: Path, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "text.jsonl", TEXTS), tmp_path / "packed"
    changes: dict[str, dict[str, Any]] = {
        "--held-out: 1.0 given; allowed: 0 to below 1": {"held_out": 1.0},
        "--shard-tokens: 0 given; allowed: 1 or more": {"shard_tokens": 0},
        "--normalize: 'nfc' given; allowed: NFC NFD NFKC NFKD": {"cleaning": Cleaning(normalize="nfc")},
    }
    for expected, change in changes.items():
        assert one_line_error(prepare, recipe(tokenizer, source, **change), output) == expected
    assert one_line_error(prepare, recipe(tokenizer, source), output, on_bad="guess") == (
        "--on-bad: 'guess' given; allowed: stop, skip"
    )
    assert one_line_error(prepare, recipe(tokenizer), output).startswith(
        "corpus: nothing given; allowed: files, folders"
    )
    assert one_line_error(prepare, recipe(tokenizer, source, source), output).startswith(
        "corpus: sources named text, text given; allowed: each name once"
    )
    assert not output.exists()
    all_dropped = recipe(tokenizer, source, cleaning=Cleaning(min_characters=9_999))
    assert one_line_error(prepare, all_dropped, output) == "corpus: no document to train on is left of 3 that were read"


@pytest.mark.soak
def test_a_full_disk_is_said_and_the_work_goes_on_after_room_is_made(tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "text.jsonl", [f"{i} {text}" for i in range(20) for text in pseudo_text("disk", 70_000)]
    )
    with mounted(tmp_path / "disk", num_bytes=1 << 20) as disk:
        output = disk / "packed"
        command = [sys.executable, "-m", "launch.cli", "data", "prepare", str(source)]
        command += ["--tokenizer", str(tokenizer), "--output", str(output), "--drop-duplicates"]
        failed = subprocess.run(command, check=False, capture_output=True, text=True)
        assert failed.returncode == 2
        assert failed.stderr.count("\n") == 2  # the first says what is read for what
        assert f"--output: {output}: No space left on device: mend it (make room)" in failed.stderr
        assert not output.exists()
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        subprocess.run(command, check=True, capture_output=True)
        prepare(recipe(tokenizer, source, held_out=0.01, cleaning=Cleaning(drop_duplicates=True)), tmp_path / "roomy")
        assert packed_hashes(output) == packed_hashes(tmp_path / "roomy")


def test_another_process_at_the_same_output_is_named(tokenizer: Path, tmp_path: Path) -> None:
    from pretrain.host.lock import lock_directory

    source = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    held = lock_directory(tmp_path / "packed.partial", "a test")
    try:
        assert f"runs there already (process {os.getpid()})" in one_line_error(
            prepare, recipe(tokenizer, source), tmp_path / "packed"
        )
    finally:
        os.close(held)


def test_manifests_name_their_recipe(tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    made: list[Manifest] = [
        prepare(recipe(tokenizer, source, held_out=share), tmp_path / str(share))["train"] for share in (0.0, 0.0001)
    ]
    assert made[0].shards == made[1].shards
    assert made[0].recipe_sha256 != made[1].recipe_sha256
