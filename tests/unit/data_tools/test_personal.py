"""Personal data that has a form: found, masked, dropped, and counted the same however the work is stopped."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from data_tools.clean import Cleaning
from data_tools.pack import Recipe, prepare
from data_tools.personal import masked
from data_tools.report import print_report
from data_tools.sources import Source
from data_tools.tokenizer import load_tokenizer, train_tokenizer
from data_tools.workers import StoppedError
from pretrain.config.errors import ConfigError
from pretrain.silo.shards import open_shard, read_manifest
from tests.support import one_line_error, packed_hashes
from tests.text_files import write_jsonl

pytest.importorskip("stdnum", reason="pip install 'atoll[personal]'")
pytest.importorskip("phonenumbers", reason="pip install 'atoll[personal]'")

# The numbers are examples of ISO 13616, of card issuers and of the numbering plans: nobody has them.
LETTER = (
    "Write to anna.b+x@clinic.example.org. IBAN GB82 WEST 1234 5698 7654 32 AND card 4111 1111 1111 1111; "
    "+44 20 7946 0958"
)
MASKED = "Write to [e-mail]. IBAN [account] AND card [card]; [telephone]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LETTER, MASKED),
        ("m\u00fcller@b\u00fccher.example, a@b.co.uk", "[e-mail], [e-mail]"),
        ("DE89370400440532013000 DE89 3704 0044 0532 0130 00", "[account] [account]"),
        ("(5500-0000-0000-0004), 378282246310005.", "([card]), [card]."),
        ("call +1 650-253-0000 or +49 30 123456!", "call [telephone] or [telephone]!"),
    ],
)
def test_what_has_a_form_is_masked(text: str, expected: str) -> None:
    assert masked(text)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "user@localhost, @property, a @ b.c, x@y",
        "DE88 3704 0044 0532 0130 00",  # another check digit
        "4111 1111 1111 1112, 3.1415926535897932, 4111111111111111.5",
        "1 + 2 = 3, 030 123456, +0 000 0000, C++ 11 2011 2014",
        "Anna Berger, born 1 May 1970, lives in Bonn",  # not found, and said so
    ],
)
def test_what_has_none_stays(text: str) -> None:
    assert masked(text) == (text, {})


def test_counted_masked_and_dropped_the_same_after_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_tools.sources.BLOCK_BYTES", 300)
    texts = [LETTER + f" {number}" if number % 3 == 0 else f"nobody {number}, a@b.co" for number in range(30)]
    source = Source(path=str(write_jsonl(tmp_path / "law.jsonl", texts)))
    tokenizer = train_tokenizer([MASKED, LETTER], vocab_size=280, output=tmp_path)

    def packed(name: str, personal_data: str, *, stop: bool = False) -> dict[str, dict[str, dict[str, int]]]:
        cleaning = Cleaning(personal_data=personal_data)
        recipe = Recipe(sources=(source,), tokenizer=tokenizer, cleaning=cleaning, held_out=0.0)
        while not (tmp_path / name).exists():
            with contextlib.suppress(StoppedError):  # after every block
                prepare(recipe, tmp_path / name, num_workers=0, asked_to_stop=lambda: stop)
                print_report(json.loads((tmp_path / name / "report.json").read_text()), Console())
        report = json.loads((tmp_path / name / "report.json").read_text())
        return {key: report["sources"]["law"][key] for key in ("personal", "dropped")}

    found = {"e-mail": {"found": 30, "documents": 30}}
    found |= {kind: {"found": 10, "documents": 10} for kind in ("account", "card", "telephone")}
    assert packed("counted", "count") == {"personal": found, "dropped": {}}
    assert packed("masked", "mask") == packed("stopped", "mask", stop=True) == {"personal": found, "dropped": {}}
    assert packed_hashes(tmp_path / "masked") == packed_hashes(tmp_path / "stopped")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines.count(["account", "found", "10"]) == 3
    manifest = read_manifest(tmp_path / "masked" / "train", key="")
    tokens = open_shard(tmp_path / "masked" / "train", manifest, manifest.shards[0])
    text = load_tokenizer(tokenizer).decode(tokens.tolist(), skip_special_tokens=False)
    assert text.startswith(f"{MASKED} 0<|endoftext|>nobody 1, [e-mail]<|endoftext|>")
    with pytest.raises(ConfigError, match="no document to train on is left of 30"):
        packed("dropped", "drop")


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_line_error(Cleaning(personal_data="hide").check) == (
        "--personal-data: 'hide' given; allowed: count, mask, drop"
    )
    monkeypatch.setitem(sys.modules, "stdnum", None)
    assert one_line_error(Cleaning(personal_data="mask").check) == (
        "--personal-data: 'mask' given; it needs packages that are not installed: type pip install 'atoll[personal]'"
    )
