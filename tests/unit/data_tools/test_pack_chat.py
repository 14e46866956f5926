"""Conversations to packed rows: `atoll data prepare --chat`, its files, its stops, and what a user is told."""

import io
import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from rich.console import Console
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from data_tools import rows
from data_tools.clean import Cleaning
from data_tools.cli import app
from data_tools.pack import ChatRecipe, Recipe, prepare
from data_tools.show import print_conversations
from data_tools.sources import Source
from data_tools.tokenizer import train_tokenizer
from data_tools.workers import StoppedError
from pretrain.silo.exported import with_tokenizer
from pretrain.silo.shards import open_documents, open_mask, open_shard, template_sha256, trained, verify_shards
from pretrain.silo.verify import verify_tokens
from tests.conversations import RECORDS, assistant, user
from tests.support import one_line_error, packed_hashes
from tests.text_files import pack as packed_bytes

TEXT = "the court of appeal said that a case about water and fire may be heard on monday by any judge"
WORDS = TEXT.split()
CALLS = [RECORDS[kind] for kind in ("calls", "text and call", "reasoning", "system")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer([TEXT] * 5, vocab_size=290, output=tmp_path_factory.mktemp("t"), chat=True)


def talk(seed: str, number: int) -> list[dict[str, Any]]:
    """Conversations at random, of one to three turns."""
    chance = random.Random(seed)

    def words() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, 12)))

    turns = [
        [turn for _ in range(chance.randint(1, 3)) for turn in (user(words()), assistant(words()))]
        for _ in range(number)
    ]
    return [{"messages": one} for one in turns]


def write_records(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed_bytes(path.name, "".join(json.dumps(record) + "\n" for record in records).encode()))
    return path


def recipe(tokenizer: Path, *paths: Path, sequence_tokens: int = 256, too_long: str = "stop", **changes: Any) -> Recipe:
    sources = tuple(Source(path=str(path)) for path in paths)
    chat = ChatRecipe(sequence_tokens=sequence_tokens, too_long=too_long)
    return Recipe(**{"sources": sources, "tokenizer": tokenizer, "held_out": 0.0, "chat": chat} | changes)


def conversations(split: Path, tokenizer: Path) -> list[tuple[str, str]]:
    """Each conversation of a packed split as text, and what of it is learned; checked, and without what fills rows."""
    decoder, manifest = Tokenizer.from_file(str(tokenizer)), verify_shards(split)
    verify_tokens(split, manifest)
    tokens = np.concatenate([open_shard(split, manifest, shard) for shard in manifest.shards])
    bits = np.concatenate([trained(open_mask(split, shard), 0, shard.num_tokens) for shard in manifest.shards])
    assert bits.sum() == manifest.num_trained_tokens
    ends = open_documents(split, manifest)[:-1].astype(int)
    found = []
    for piece, mask in zip(np.split(tokens, ends), np.split(bits, ends), strict=True):
        if mask.any():
            decoded = (decoder.decode(one.tolist(), skip_special_tokens=False) for one in (piece, piece[mask]))
            found.append(tuple(decoded))
        else:
            assert set(piece.tolist()) == {manifest.end_of_text_id}
    return found  # type: ignore[return-value]


def expected(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """As ChatML has them, of those without calls and reasoning."""
    found = []
    for record in records:
        turns = [f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in record["messages"]]
        said = [f"{one['content']}<|im_end|>\n" for one in record["messages"] if one["role"] == "assistant"]
        found.append(("".join(turns), "".join(said)))
    return found


def test_every_conversation_is_packed_once_and_learned_where_the_assistant_speaks(
    tokenizer: Path, tmp_path: Path
) -> None:
    records = talk("all", 150)
    source = write_records(tmp_path / "law.jsonl.gz", records)
    [manifest] = prepare(recipe(tokenizer, source, shard_tokens=900), tmp_path / "packed").values()
    assert sorted(conversations(tmp_path / "packed/train", tokenizer)) == sorted(expected(records))
    assert len(manifest.shards) > 5
    assert {shard.num_tokens % 256 for shard in manifest.shards} == {0}
    assert manifest.chat
    assert manifest.chat.sequence_tokens == 256
    template = tokenizer.with_name("chat_template.jinja")
    assert (
        manifest.chat.template_sha256
        == template_sha256(template)
        == template_sha256(tmp_path / "packed" / template.name)
    )
    report = json.loads((tmp_path / "packed/report.json").read_text())
    num_rows = manifest.num_tokens // 256
    kept = report["sources"]["law"]["kept"]["train"]
    assert report["rows"]["train"] == {
        "rows": num_rows,
        "row_tokens": 256,
        "trained_tokens": manifest.num_trained_tokens,
        "padding_tokens": manifest.num_tokens - kept["tokens"],
    }
    assert (kept["documents"], kept["trained"]) == (150, manifest.num_trained_tokens)
    assert 0 <= report["rows"]["train"]["padding_tokens"] < 0.05 * manifest.num_tokens


def as_row(record: dict[str, Any]) -> dict[str, Any]:
    """As tables hold it: objects with other keys in each row are JSON, and what is not there is null."""
    messages = json.loads(json.dumps(record["messages"]))
    for call in (call["function"] for message in messages for call in message.get("tool_calls", ())):
        call["arguments"] = json.dumps(call["arguments"])
    return {"id": 1, "messages": messages, "tools": json.dumps(record["tools"]) if "tools" in record else None}


def test_every_format_gives_the_same_rows(tokenizer: Path, tmp_path: Path) -> None:
    records = [*talk("formats", 20), *CALLS]
    write_records(tmp_path / "a/text.jsonl", records)
    (tmp_path / "a/readme.txt").write_text("No conversation.")
    write_records(tmp_path / "b/text.json.zst", records)
    table = pa.Table.from_pylist([as_row(record) for record in records])
    (tmp_path / "c").mkdir()
    pa.parquet.write_table(table, tmp_path / "c/text.parquet", row_group_size=7)
    datasets.Dataset(table).save_to_disk(tmp_path / "d")
    expected_hashes = None
    for name in "abcd":
        prepare(recipe(tokenizer, tmp_path / name, sequence_tokens=512), tmp_path / "packed" / name)
        found = packed_hashes(tmp_path / "packed" / name)
        bytes_alone = {file: sha256 for file, sha256 in found.items() if "manifest" not in file}
        assert len(bytes_alone) == 3
        assert (expected_hashes := expected_hashes or bytes_alone) == bytes_alone
    assert json.loads((tmp_path / "packed/a/report.json").read_text())["left_out"] == {"a": {".txt": 1}}


def test_stopped_and_resumed_at_every_block(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.sources.BLOCK_BYTES", 4_000)
    monkeypatch.setattr(rows, "WINDOW_TOKENS", 3_000)
    monkeypatch.setattr(rows, "WINDOW_ROWS", 1)
    records = talk("resume", 160)
    write_records(tmp_path / "text/a.jsonl", records[:90])
    write_records(tmp_path / "text/b.jsonl.gz", records[80:])
    settings = recipe(
        tokenizer, tmp_path / "text", held_out=0.2, shard_tokens=3_000, cleaning=Cleaning(drop_duplicates=True)
    )
    prepare(settings, tmp_path / "undisturbed", num_workers=2)
    num_stops = 0
    while not (tmp_path / "stopped").exists():
        try:
            prepare(settings, tmp_path / "stopped", asked_to_stop=lambda: True, commit_seconds=1e9, num_workers=0)
        except StoppedError:
            num_stops += 1
    assert num_stops >= 5
    assert packed_hashes(tmp_path / "stopped") == packed_hashes(tmp_path / "undisturbed")
    assert len(packed_hashes(tmp_path / "stopped")) > 8
    for split in ("train", "valid"):
        assert conversations(tmp_path / "stopped" / split, tokenizer)
    packed = [one for split in ("train", "valid") for one in conversations(tmp_path / "stopped" / split, tokenizer)]
    assert sorted(packed) == sorted(expected(records))


def test_the_held_out_split_is_by_the_conversation_whatever_the_template(tokenizer: Path, tmp_path: Path) -> None:
    records = talk("held out", 100)
    source = write_records(tmp_path / "text.jsonl", records)
    other = tmp_path / "other.jinja"
    other.write_text(tokenizer.with_name("chat_template.jinja").read_text().replace("<|im_start|>'", "<|im_start|>:'"))
    chosen = ChatRecipe(sequence_tokens=300, chat_template=other)
    prepare(recipe(tokenizer, source, held_out=0.3), tmp_path / "one")
    prepare(recipe(tokenizer, source, held_out=0.3, chat=chosen), tmp_path / "two")
    said = [sorted(said for _, said in conversations(tmp_path / name / "valid", tokenizer)) for name in ("one", "two")]
    assert said[0] == said[1]
    assert 15 < len(said[0]) < 45


def test_work_of_another_recipe_is_not_mixed(tokenizer: Path, tmp_path: Path) -> None:
    source = write_records(tmp_path / "text.jsonl", talk("mixed", 20))
    with pytest.raises(StoppedError):
        prepare(recipe(tokenizer, source), tmp_path / "packed", asked_to_stop=lambda: True, num_workers=0)
    other = recipe(tokenizer, source, sequence_tokens=512)
    assert "was begun with other chat: delete it" in one_line_error(prepare, other, tmp_path / "packed")
    as_text = Recipe(sources=(Source(path=str(source), text="messages"),), tokenizer=tokenizer)
    assert "was begun with other" in one_line_error(prepare, as_text, tmp_path / "packed")
    prepare(recipe(tokenizer, source), tmp_path / "packed")
    assert "was prepared with other chat: delete it" in one_line_error(prepare, other, tmp_path / "packed")


def test_what_cannot_be_used_stops_or_is_counted(tokenizer: Path, tmp_path: Path) -> None:
    long = {"messages": [user("Hi"), assistant("fire " * 300)]}
    records = [*talk("bad", 10), long, {"messages": [user("Hi")]}, {"prompt": "A", "chosen": "B", "rejected": "C"}]
    source = write_records(tmp_path / "text.jsonl", records)
    message = one_line_error(prepare, recipe(tokenizer, source, too_long="skip"), tmp_path / "packed")
    assert message.startswith(f"{source}, line 12: no turn of the assistant to learn from")
    assert message.endswith("mend or drop it, or give --on-bad skip")
    message = one_line_error(prepare, recipe(tokenizer, source), tmp_path / "packed2", on_bad="skip")
    assert message.startswith(f"{source}, line 11: a conversation of 622 tokens given; allowed: --seq")
    prepare(recipe(tokenizer, source, too_long="skip"), tmp_path / "packed3", on_bad="skip")
    counts = json.loads((tmp_path / "packed3/report.json").read_text())["sources"]["text"]
    assert counts["bad"] == {"no assistant turn": 1, "preference pair": 1}
    assert counts["dropped"]["too long"]["documents"] == 1
    assert counts["kept"]["train"]["documents"] == 10
    assert len(conversations(tmp_path / "packed3/train", tokenizer)) == 10


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def test_options_that_cannot_be_are_said(tokenizer: Path, tmp_path: Path) -> None:
    source = write_records(tmp_path / "text.jsonl", talk("options", 3))
    (tmp_path / "text.txt").write_text("Hi")
    (tmp_path / "list.json").write_text("[\n{}]")
    given = ("prepare", source, "--tokenizer", tokenizer, "--output", tmp_path / "packed")
    for options, said in {
        ("--sequence-tokens", 8): "--sequence-tokens: 8 given; allowed: with --chat, for conversations",
        ("--prompt-tokens", 8): "--prompt-tokens: 8 given; allowed: with --chat, for conversations",
        ("--too-long", "skip"): "--too-long: skip given; allowed: with --chat",
        ("--chat",): "--sequence-tokens: nothing given; allowed with --chat: 2 or more, those of the run",
        ("--chat", "--sequence-tokens", 1): "--sequence-tokens: 1 given",
        ("--chat", "--sequence-tokens", 64, "--too-long", "cut"): "--too-long: 'cut' given; allowed: stop, skip",
        (
            "--chat",
            "--sequence-tokens",
            64,
            "--normalize",
            "NFC",
        ): "--normalize: NFC given; allowed with --chat: --drop",
        ("--chat", "--sequence-tokens", 64, "--as-text", "*.md"): "--as-text: given; allowed with --chat",
        ("--chat", "--sequence-tokens", 64, "--chat-template", tmp_path): "--chat-template: ",
        ("--chat", "--sequence-tokens", 64, "--chat-date", "today"): "--chat-date: 'today' given",
    }.items():
        code, output = run(*given, *options)
        assert code
        assert said in output
        assert not (tmp_path / "packed").exists()
        assert not (tmp_path / "packed.partial").exists()
    for name, said in {"text.txt": "allowed: conversations in .jsonl", "list.json": "jq -c '.[]' makes lines"}.items():
        message = one_line_error(prepare, recipe(tokenizer, tmp_path / name), tmp_path / "packed")
        assert said in message
    other = pa.Table.from_pylist([{"text": "Hi"}])
    pa.parquet.write_table(other, tmp_path / "other.parquet")
    message = one_line_error(prepare, recipe(tokenizer, tmp_path / "other.parquet"), tmp_path / "packed")
    assert "no column of conversations; it has text (string): leave it out" in message


def test_a_tokenizer_without_tokens_for_turns_is_told(tokenizer: Path, tmp_path: Path) -> None:
    source = write_records(tmp_path / "text.jsonl", talk("plain", 3))
    plain = train_tokenizer([TEXT] * 5, vocab_size=290, output=tmp_path / "plain")
    message = one_line_error(prepare, recipe(plain, source), tmp_path / "packed")
    assert message.startswith(
        f"--chat: {tmp_path}/plain has no chat template (chat_template.jinja, or chat_template in "
    )
    assert message.endswith("--chat-template FILE, or what atoll data tokenizer --chat makes")
    template = tokenizer.with_name("chat_template.jinja")
    chat = ChatRecipe(sequence_tokens=64, chat_template=template)
    message = one_line_error(prepare, recipe(plain, source, chat=chat), tmp_path / "packed")
    assert f"{template}: it writes '<|im_start|>', which is no token of the tokenizer; allowed: a tokenizer" in message


def test_from_a_tokenizer_to_verified_rows_by_commands_alone(tmp_path: Path) -> None:
    source = write_records(tmp_path / "law.jsonl", talk("commands", 200))
    (tmp_path / "text.txt").write_text(TEXT * 20)
    made = ("tokenizer", tmp_path / "text.txt", "--vocab-size", 280, "--output", tmp_path / "tokenizer")
    code, output = run(*made[:3], 258, *made[4:], "--chat")
    assert code
    assert "--vocab-size: 258 given; allowed: 259 (all bytes, ends of text and turns) or more" in output
    assert run(*made, "--chat")[0] == 0
    code, output = run(
        *("prepare", source, "--chat", "--sequence-tokens", 512, "--held-out", 0.2),
        *("--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "packed", "--drop-duplicates"),
    )
    assert code == 0
    assert "rows of 512 tokens, " in output
    assert " % padding" in output
    code, output = run("verify", tmp_path / "packed", "--tokenizer", tmp_path / "tokenizer")
    assert (code, output.count("whole")) == (0, 2)
    assert "% trained" in output


def test_conversations_are_shown_with_what_is_learned(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_records(tmp_path / "text.jsonl", [{"messages": [user("Hi \x1b[31m"), assistant("[Hello]")]}])
    prepare(recipe(tokenizer, source, sequence_tokens=64), tmp_path / "packed")
    for split in ("", "train"):
        code, output = run("show", tmp_path / "packed" / split, "--tokenizer", tokenizer, "--samples", 5)
        assert code == 0
        assert output == (
            "train, document 0, 34 tokens, 9 learned\n<|im_start|>user\nHi \\x1b[31m<|im_end|>\n<|im_start|>assistant\n"
            "[[[Hello]<|im_end|>\n]]\n\n"
        )
    for no_color, expected_text in {"1": "[[[Hello]<|im_end|>\n]]", "": "\x1b[1;32m[Hello]<|im_end|>"}.items():
        monkeypatch.setenv("NO_COLOR", no_color)
        console = Console(file=(written := io.StringIO()), force_terminal=True, color_system="standard")
        print_conversations([tmp_path / "packed"], tokenizer, num_samples=1, seed=0, console=console)
        assert expected_text in written.getvalue()
    code, output = run("show", tmp_path / "packed", "--samples", 0, "--tokenizer", tokenizer)
    assert "--samples: 0 given; allowed: 1 or more" in output
    assert "--tokenizer: nothing given" in run("show", tmp_path / "packed")[1]
    text = Recipe(sources=(Source(path=str(source), as_text=("*.jsonl",)),), tokenizer=tokenizer, held_out=0.0)
    prepare(text, tmp_path / "text")
    assert (
        "train given, which is of text; allowed: conversations"
        in run("show", tmp_path / "text", "--tokenizer", tokenizer)[1]
    )
    code, output = run("inspect", tmp_path / "packed", tmp_path / "text", "--tokenizer", tokenizer)
    assert code == 0
    assert "14.1 %" in output


def test_room_for_a_prompt_is_left_before_every_conversation(tokenizer: Path, tmp_path: Path) -> None:
    long = {"messages": [user("Hi"), assistant("fire " * 12)]}
    records = [*talk("prompt", 40), long]
    source = write_records(tmp_path / "text.jsonl", records)
    plain = prepare(recipe(tokenizer, source, sequence_tokens=512), tmp_path / "plain", num_workers=0)["train"]
    chat = ChatRecipe(sequence_tokens=512, prompt_tokens=7)
    [manifest] = prepare(recipe(tokenizer, source, chat=chat), tmp_path / "packed", num_workers=0).values()
    assert manifest.chat
    assert manifest.chat.prompt_tokens == 7
    assert plain.chat
    assert plain.chat.prompt_tokens is None
    assert "prompt_tokens" not in (tmp_path / "plain/train/manifest.json").read_text()
    assert manifest.num_trained_tokens == plain.num_trained_tokens
    room = "<|endoftext|>" * 7
    found = conversations(tmp_path / "packed/train", tokenizer)
    assert sorted(found) == sorted((room + text, said) for text, said in expected(records))
    overlay = yaml.safe_load((tmp_path / "packed/silo.yaml").read_text())
    assert overlay["model"] == {"adapter": {"kind": "prompt", "tokens": 7}}
    code, output = run("show", tmp_path / "packed", "--tokenizer", tokenizer, "--samples", 2)
    assert code == 0
    assert "<|endoftext|>" not in output
    code, output = run("inspect", tmp_path / "packed", "--tokenizer", tokenizer)
    assert code == 0
    assert "prompts of" in output
    assert "was prepared with other chat" in one_line_error(
        prepare, recipe(tokenizer, source, sequence_tokens=512), tmp_path / "packed"
    )


def test_what_does_not_fit_behind_a_prompt_stops_or_is_counted(tokenizer: Path, tmp_path: Path) -> None:
    records = [*talk("fits", 10), {"messages": [user("Hi"), assistant("fire " * 100)]}]
    source = write_records(tmp_path / "text.jsonl", records)
    prepare(recipe(tokenizer, source), tmp_path / "plain", num_workers=0)
    stops, skips = (ChatRecipe(sequence_tokens=256, prompt_tokens=40, too_long=way) for way in ("stop", "skip"))
    message = one_line_error(prepare, recipe(tokenizer, source, chat=stops), tmp_path / "packed", num_workers=0)
    assert message.startswith(
        f"{source}, line 11: a conversation of 262 tokens, 40 of them of the prompt before it, given"
    )
    prepare(recipe(tokenizer, source, chat=skips), tmp_path / "packed", num_workers=0)
    counts = json.loads((tmp_path / "packed/report.json").read_text())["sources"]["text"]
    assert counts["dropped"]["too long"]["documents"] == 1
    assert len(conversations(tmp_path / "packed/train", tokenizer)) == 10
    for number in (-1, 255):
        chat = ChatRecipe(sequence_tokens=256, prompt_tokens=number)
        message = one_line_error(prepare, recipe(tokenizer, source, chat=chat), tmp_path / "other")
        assert message.startswith(f"--prompt-tokens: {number} given; allowed: 0 to 254")


def test_what_a_model_says_ends_where_a_turn_does(tokenizer: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=290, **sizes))
    vocabulary = with_tokenizer(model, tokenizer).get_vocab()
    assert model.generation_config.eos_token_id == [vocabulary["<|endoftext|>"], vocabulary["<|im_end|>"]]
