"""`atoll eval --chat`: what the assistant says, rendered by the model's own template as it was prepared; every token
weighs the same."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_tools.chat_template import find_template
from data_tools.pack import ChatRecipe, Recipe, prepare
from data_tools.sources import Source
from data_tools.tokenizer import CHAT_TOKENS
from launch.evaluate import evaluate
from pretrain.config.keys import ModelConfig
from pretrain.federation.evaluation import open_subject
from pretrain.federation.generate import Sampling, open_speaker
from pretrain.silo.exported import export
from pretrain.silo.model import build_initial
from pretrain.silo.shards import template_sha256
from pretrain.silo.vocabulary import vocabulary_size
from tests.conftest import TinyConfig
from tests.conversations import ONE, RECORDS, TURNS, assistant, block, encoder, user, with_tokens
from tests.support import ROOT, TinyText, one_line_error
from tests.unit.test_aggregate import start

CHATML = (ROOT / "data_tools" / "chatml.j2").read_text()
# As Llama 3 has it: what begins a conversation is no token with which text ever began or ended.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}"
)
NAMES = ("<|begin|>", "<|head|>", "<|/head|>", "<|eot|>")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
# With tied embeddings and large ones, a model without training says the last token once more.
CHATS = {kind: RECORDS[kind] for kind in ("turns", "calls", "reasoning")}
CHATS["one turn"] = {"messages": [user("Hi"), assistant("zzzzzzzz")]}
ROW_TOKENS = 512


def tokenizer_with(
    folder: Path, text: TinyText, names: tuple[str, ...], template: str, config: dict[str, Any] | None = None
) -> Path:
    """A tokenizer's folder with these tokens and this template."""
    made = with_tokens(text.tokenizer, names, folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(template)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return made


def exported(tokenizer: Path, directory: Path, *, trained_tokens: int = ROW_TOKENS) -> Path:
    settings = ModelConfig(config=LLAMA | {"tie_word_embeddings": True, "initializer_range": 0.05}, seed=3)
    model = build_initial(settings, vocabulary_size(tokenizer))
    export(model, tokenizer, directory, trained_tokens=trained_tokens)
    told = {"sequence_tokens": trained_tokens, "document_masking": True, "eval_sequences": 1}
    (directory / "atoll.json").write_text(json.dumps(told))
    return directory


@pytest.fixture
def chatml(tmp_path: Path, tiny_text: TinyText) -> Path:
    return tokenizer_with(tmp_path / "tokenizer", tiny_text, CHAT_TOKENS, CHATML)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "chats.jsonl"
    found.write_text("".join(json.dumps(record) + "\n" for record in CHATS.values()))
    return found


def lines_of(said: str) -> dict[str, tuple[float, float, int, str]]:
    """Of each line its name, loss, share that is right, tokens and sequences."""
    form = re.compile(
        r"([\d.]+) nats  perplexity [\d.]+  ([\d.]+)% right  ([\d,]+) tokens  (\d+ of \d+) sequences  (.+)"
    )
    found = [form.fullmatch(line) for line in said.splitlines()]
    return {m[5]: (float(m[1]), float(m[2]) / 100, int(m[3].replace(",", "")), m[4]) for m in found if m}


def by_hand(model: Path, tokenizer: Path) -> dict[str, tuple[float, int, int]]:
    """Of each kind the sum of losses, tokens and how many of them are right: each conversation by itself, unpadded."""
    plain = AutoModelForCausalLM.from_pretrained(model)
    made = encoder(tokenizer, find_template(tokenizer, None, ""))
    found = {}
    for kind, record in CHATS.items():
        encoded = made.encode(block(record))
        row, mask = torch.tensor(encoded.tokens.astype(int))[None], torch.tensor(encoded.trained)[1:]
        with torch.no_grad():
            logits = plain(row).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none")[mask]
        right = (logits.argmax(-1) == row[0, 1:])[mask]
        found[kind] = losses.sum().item(), int(mask.sum()), int(right.sum())
    return found


def test_files_and_splits_of_conversations_have_the_loss_of_each_by_itself(
    tmp_path: Path, chatml: Path, file: Path, said: Callable[[], str]
) -> None:
    model = exported(chatml, tmp_path / "model")
    expected = by_hand(model, chatml)
    loss, num_tokens, num_right = (sum(one[place] for one in expected.values()) for place in range(3))
    evaluate(str(model), chat=True, data=[str(file)])
    found = lines_of(said())
    names = {"one turn": "one turn", "turns": "several turns", "calls": "with calls", "reasoning": "with reasoning"}
    assert found.keys() == {f"{file}: {name}" for name in names.values()} | {str(file)}
    for kind, name in names.items():
        total, tokens, right = expected[kind]
        shares = [pytest.approx(one / tokens, abs=1e-4) for one in (total, right)]
        assert found[f"{file}: {name}"][:3] == (*shares, tokens)
    whole = pytest.approx(loss / num_tokens, abs=1e-4), pytest.approx(num_right / num_tokens, abs=1e-4), num_tokens
    assert found[str(file)][:3] == whole
    assert 0 < num_right < num_tokens
    by_kind = [total / tokens for total, tokens, _ in expected.values()]
    assert abs(sum(by_kind) / len(by_kind) - loss / num_tokens) > 1e-3  # which a mean of means would be

    recipe = Recipe(
        sources=(Source(path=str(file)),), tokenizer=chatml, held_out=0.0, chat=ChatRecipe(sequence_tokens=ROW_TOKENS)
    )
    prepare(recipe, tmp_path / "packed", num_workers=0)
    split = str(tmp_path / "packed" / "train")
    evaluate(str(model), data=[split], num_sequences=0)  # finds out by itself
    assert lines_of(said())[split][:3] == whole
    evaluate(str(model), chat=True, data=[split, f"file={file}"], num_sequences=0)
    both = lines_of(said())
    assert both["all conversations"][:3] == (*whole[:2], 2 * num_tokens)
    assert "file" in both


def test_another_template_than_the_models_is_refused(
    tmp_path: Path, chatml: Path, file: Path, tiny_text: TinyText, capsys: pytest.CaptureFixture[str]
) -> None:
    model = exported(chatml, tmp_path / "model")
    other = tokenizer_with(tmp_path / "other", tiny_text, CHAT_TOKENS, CHATML + " ")
    recipe = Recipe(
        sources=(Source(path=str(file)),), tokenizer=other, held_out=0.0, chat=ChatRecipe(sequence_tokens=ROW_TOKENS)
    )
    prepare(recipe, tmp_path / "packed", num_workers=0)
    split = str(tmp_path / "packed" / "train")
    for chat in (False, True):
        refused = one_line_error(evaluate, str(model), chat=chat, data=[split])
        assert refused.startswith(f"--data: {split} was prepared with another template than the model's: ")
    given = other.with_name("chat_template.jinja")
    assert "which is another template than the model's" in one_line_error(
        evaluate, str(model), chat=True, data=[str(file)], chat_template=given
    )
    text = str(tiny_text.packed["alpha"] / "valid")
    assert one_line_error(evaluate, str(model), chat=True, data=[text]) == (
        f"--data: {text!r} given, which is text; allowed with --chat: conversations"
    )
    assert one_line_error(evaluate, str(model), data=[split], chat_date="2026-01-02").startswith("--chat-date: given ")
    assert one_line_error(evaluate, str(model), data=[str(file)]).endswith("or with --chat a file of conversations")

    base = Path(shutil.copytree(model, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    capsys.readouterr()
    evaluate(str(base), chat=True, data=[split])
    assert "this model has no chat template" in capsys.readouterr().err
    assert "has no chat template (chat_template.jinja" in one_line_error(
        evaluate, str(base), chat=True, data=[str(file)]
    )
    evaluate(str(base), chat=True, data=[str(file)], chat_template=chatml.with_name("chat_template.jinja"))
    short = exported(chatml, tmp_path / "short", trained_tokens=64)
    evaluate(str(short), chat=True, data=[str(file)])
    assert "conversations of more than 64 tokens are left out" in capsys.readouterr().err


def test_an_export_renders_what_was_prepared_with_its_first_token(
    tmp_path: Path, tiny_text: TinyText, said: Callable[[], str]
) -> None:
    special = {"bos_token": "<|begin|>", "eos_token": {"content": "<|eot|>"}}
    tokenizer = tokenizer_with(tmp_path / "tokenizer", tiny_text, NAMES, HEADERS, special)
    prepared = encoder(tokenizer, find_template(tokenizer, None, "")).encode(block({"messages": TURNS})).tokens.tolist()
    directory = exported(tokenizer, tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(directory)
    assert loaded.apply_chat_template(TURNS, return_dict=False) == prepared
    assert loaded.convert_ids_to_tokens(prepared[:2]) == ["<|begin|>", "<|head|>"]
    again = find_template(directory / "tokenizer.json", None, "")
    assert dict(again.special_tokens) == {"bos_token": "<|begin|>", "eos_token": "<|eot|>"}

    speaker = open_speaker(str(directory))
    spoken = speaker.answer([user("Hi")], Sampling(num_tokens=1), lambda piece: None)
    prompt = loaded.apply_chat_template([user("Hi")], add_generation_prompt=True, return_dict=False)
    assert spoken.num_given == len(prompt)
    assert prompt == prepared[: len(prompt)]
    assert speaker.model.generation_config.eos_token_id == [
        *(loaded.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|eot|>"))
    ]
    # Text began after an end of text, which no conversation has.
    assert speaker.begins_with == loaded.convert_tokens_to_ids("<|endoftext|>")
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"messages": [*ONE, user("?"), assistant("!")]}) + "\n")
    evaluate(str(directory), chat=True, data=[str(one)])
    assert list(lines_of(said())) == [str(one)]


def test_a_store_says_of_which_template_its_model_is(tmp_path: Path, tiny_config: TinyConfig) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    config = tiny_config(tmp_path, chat_template=str(tmp_path / "chat.jinja"), document_masking=True)
    start(config)
    subject = open_subject(config.store_url, tokenizer=config.tokenizer_file)
    assert (subject.template, subject.template_file) == (template_sha256(tmp_path / "chat.jinja"), None)
