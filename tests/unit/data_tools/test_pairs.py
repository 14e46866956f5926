"""Preference pairs: what is one, what of it is learned, and how they lie in rows."""

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.conversations import NoConversationError, parse_pair
from data_tools.pack import ChatRecipe, Recipe, prepare
from data_tools.reference import refer
from data_tools.sources import Source
from data_tools.tokenizer import train_tokenizer
from data_tools.workers import StoppedError
from pretrain.silo.data import PackedTokens
from pretrain.silo.reference import VALUES_FILE, check_reference, verify_reference
from pretrain.silo.shards import open_documents, open_mask, open_shard, read_manifest, trained, verify_shards
from pretrain.silo.verify import verify_tokens
from tests.conversations import RESULT, TOOL, assistant, user
from tests.support import one_line_error, packed_hashes

TEXT = "the court of appeal said that a case about water and fire may be heard on monday by any judge"
ROW = 160
QUESTION = [user("Hi"), assistant("Hello."), user("And then?")]
FORMS: list[dict[str, Any]] = [
    {"prompt": QUESTION, "chosen": [assistant("Bye.")], "rejected": [assistant("No.")]},
    {"chosen": [*QUESTION, assistant("Bye.")], "rejected": [*QUESTION, assistant("No.")]},
    {"prompt": QUESTION, "chosen": [*QUESTION, assistant("Bye.")], "rejected": [*QUESTION, assistant("No.")]},
    {
        "conversations": [
            *({"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}),
            {"from": "human", "value": "And then?"},
        ],
        "chosen": {"from": "gpt", "value": "Bye."},
        "rejected": {"from": "gpt", "value": "No."},
    },
]


def pairs(number: int, seed: str = "a") -> list[dict[str, Any]]:
    chance, words = random.Random(seed), TEXT.split()

    def said() -> str:
        return " ".join(chance.choices(words, k=chance.randint(1, 9)))

    return [{"prompt": f"{said()} {n}", "chosen": f"{said()} yes", "rejected": f"{said()} no"} for n in range(number)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer([TEXT] * 5, vocab_size=290, output=tmp_path_factory.mktemp("t"), chat=True)


def recipe(folder: Path, tokenizer: Path, records: list[dict[str, Any]], **chat: Any) -> Recipe:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    given = ChatRecipe(sequence_tokens=ROW, pairs=True, **chat)
    return Recipe(sources=(Source(path=str(file)),), tokenizer=tokenizer, held_out=0.2, chat=given)


@pytest.mark.parametrize("form", FORMS)
def test_what_both_sides_begin_with_is_not_learned(form: dict[str, Any]) -> None:
    chosen, rejected = parse_pair(json.dumps(form))
    assert chosen.messages == [*QUESTION, assistant("Bye.")]
    assert rejected.messages == [*QUESTION, assistant("No.")]
    assert chosen.untrained == rejected.untrained == {1}


def test_text_tools_and_a_system_turn() -> None:
    chosen, rejected = parse_pair(json.dumps({"prompt": "Hi", "chosen": "A", "rejected": "B", "system": "Be brief."}))
    assert [one["role"] for one in chosen.messages] == ["system", "user", "assistant"]
    assert (chosen.messages[2]["content"], rejected.messages[2]["content"]) == ("A", "B")
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    record = {"prompt": "Cold?", "tools": [TOOL], "rejected": "Cold."}
    chosen, rejected = parse_pair(
        json.dumps(record | {"chosen": [assistant("", tool_calls=[call]), RESULT, assistant("Cold.")]})
    )
    assert chosen.tools == rejected.tools == [TOOL]
    assert len(chosen.messages) == 4


@pytest.mark.parametrize(
    ("record", "reason", "said"),
    [
        ({"prompt": "Hi", "chosen": "A"}, "half a pair", "rejected: nothing given; allowed: chosen and rejected, both"),
        ({"prompt": "Hi", "rejected": "A", "chosen": None}, "half a pair", "chosen: nothing given"),
        ({"messages": QUESTION}, "half a pair", "chosen: nothing given"),
        ({"prompt": "Hi", "chosen": "A", "rejected": "A"}, "equal sides", "chosen and rejected are the same"),
        ({"chosen": "A", "rejected": "B"}, "mixed-up order", "assistant given first"),
        ({"prompt": "Hi", "chosen": "A", "rejected": 3}, "no conversation", "rejected: a number given"),
        ({"prompt": "Hi", "chosen": "A", "rejected": " "}, "empty assistant turn", "message 2"),
    ],
)
def test_what_is_no_pair(record: dict[str, Any], reason: str, said: str) -> None:
    with pytest.raises(NoConversationError) as no:
        parse_pair(json.dumps(record))
    assert no.value.reason == reason
    assert said in no.value.what


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("p")
    prepare(recipe(folder, tokenizer, pairs(40)), folder / "packed", num_workers=0)
    return folder / "packed"


def test_both_sides_lie_in_one_row_and_answers_alone_are_trained(packed: Path, tokenizer: Path) -> None:
    given, manifests = pairs(40), {split: read_manifest(packed / split) for split in ("train", "valid")}
    words, found = Tokenizer.from_file(str(tokenizer)), []
    for split in ("train", "valid"):
        directory = packed / split
        manifest = verify_shards(directory)
        verify_tokens(directory, manifest)
        assert manifest == manifests[split]
        assert manifest.chat
        tokens = PackedTokens([directory], sequence_tokens=ROW)
        ends = open_documents(directory, manifest).astype(int)
        shard, mask = open_shard(directory, manifest, manifest.shards[0]), open_mask(directory, manifest.shards[0])
        for row in range(tokens.num_sequences):
            documents = tokens.documents_of(row)
            bounds = [row * ROW, *ends[documents]]
            texts = []
            for begin, end in itertools.pairwise(bounds):
                bits = trained(mask, begin, end)
                texts.append((words.decode(shard[begin:end]), words.decode(shard[begin:end][bits])))
            assert tokens.num_pairs(row) == len(texts) // 2 >= 1
            found += [pair for pair in zip(texts[::2], texts[1::2], strict=False) if pair[0][1]]
        assert sum(tokens.num_pairs(row) for row in range(tokens.num_sequences)) == manifest.chat.num_pairs
    assert len(found) == len(given) == sum(one.chat.num_pairs for one in manifests.values() if one.chat)  # type: ignore[misc]
    for record in given:
        ((chosen, rejected),) = [pair for pair in found if f"{record['prompt']}\n" in pair[0][0]]
        assert f"{record['prompt']}\n" in rejected[0]
        assert (chosen[1].strip(), rejected[1].strip()) == (record["chosen"], record["rejected"])
    told = yaml.safe_load((packed / "silo.yaml").read_text())
    assert told["inner"] == {"loss": "dpo"}


@pytest.mark.soak  # two reports with pictures
def test_the_bytes_do_not_depend_on_stops(tmp_path: Path, tokenizer: Path) -> None:
    given = recipe(tmp_path, tokenizer, pairs(30))
    prepare(given, tmp_path / "whole", num_workers=0)
    stops = iter([True, False])
    with pytest.raises(StoppedError):
        prepare(given, tmp_path / "stopped", num_workers=0, asked_to_stop=lambda: next(stops, True), commit_seconds=0)
    prepare(given, tmp_path / "stopped", num_workers=0)
    assert packed_hashes(tmp_path / "stopped") == packed_hashes(tmp_path / "whole")


def test_what_a_user_is_told(tmp_path: Path, tokenizer: Path) -> None:
    def said(records: list[dict[str, Any]], **chat: Any) -> str:
        return one_line_error(prepare, recipe(tmp_path, tokenizer, records, **chat), tmp_path / "no", num_workers=0)

    half = [*pairs(3), {"prompt": "Hi", "chosen": "A"}]
    assert f"{tmp_path}/pairs.jsonl, line 4: rejected: nothing given; allowed: chosen and rejected, both" in said(half)
    assert said(pairs(1), prompt_tokens=2).startswith("--prompt-tokens: 2 given with --pairs; allowed: 0, ")
    long = [{"prompt": TEXT * 2, "chosen": "A", "rejected": "B"}]
    assert " a pair of " in said(long)
    assert not (tmp_path / "no").exists()
    result = CliRunner().invoke(app, ["prepare", "x", "--pairs", "--output", "y", "--tokenizer", str(tokenizer)])
    assert "--pairs: True given; allowed: with --chat, for conversations" in str(result.exception)


def base_of(folder: Path, **changes: Any) -> Path:
    settings = {"vocab_size": 290, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**settings | {"num_attention_heads": 2} | changes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_what_the_base_says_is_written_once_and_known_by_its_hash(tmp_path: Path, packed: Path) -> None:
    shutil.copytree(packed, tmp_path / "packed")
    base, train = base_of(tmp_path / "base"), tmp_path / "packed" / "train"
    lines = [*refer([tmp_path / "packed"], base)]
    assert len(lines) == 2
    assert all(" pairs  -" in line for line in lines)
    written = (train / VALUES_FILE).stat().st_mtime_ns
    assert [*refer([train], base)] == [f"{train}  there already"]
    assert (train / VALUES_FILE).stat().st_mtime_ns == written
    manifest = read_manifest(train)
    tokens = PackedTokens([train], sequence_tokens=ROW, of_pairs=True)
    reference = tokens.row(0).reference
    assert reference is not None
    assert np.count_nonzero(reference) == 2 * tokens.num_pairs(0)

    def said(base: dict[str, str], precision: str = "fp32") -> str:
        return one_line_error(check_reference, train, manifest, base, precision, key="silos.law.data")

    hashes = json.loads((train / "reference.json").read_text())["base"]
    check_reference(train, manifest, hashes, "fp32", key="k")
    assert said(hashes | {"model.safetensors": "0"}).startswith(
        f"silos.law.data: {train} has log-probabilities of another base than model.checkpoint: model.safetensors differ"
    )
    assert said(hashes, "bf16").endswith(f"type atoll data reference {train} --base CHECKPOINT --precision bf16")
    (train / VALUES_FILE).write_bytes(bytes((train / VALUES_FILE).stat().st_size))
    assert "reference.bin is not what reference.json says" in one_line_error(verify_reference, train, manifest, key="k")
    (train / "reference.json").unlink()
    assert " has preference pairs without the log-probabilities of the base: type " in said(hashes)

    def refused(*given: Any, **options: Any) -> str:
        return one_line_error(lambda: [*refer(*given, **options)])

    assert refused([train], None).startswith("--base: none given; allowed: the checkpoint ")
    assert refused([train], base, precision="fp16") == "--precision: 'fp16' given; allowed: fp32, bf16"
    small = base_of(tmp_path / "small", vocab_size=100)
    assert "given, with 100 tokens; allowed: one of the 290 tokens" in refused([train], small)
