"""Published chat templates: what is learned by their marks is what is learned by prefixes, or they are refused by name.

The templates are those that the package trl carries, of some 25 families of models, half of them with marks.
tests/golden/chat_templates.json says of each which kind of conversation it can be learned from, and why not.
"""

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from data_tools.chat_template import Renderer, Template, find_template
from data_tools.conversations import NoConversationError, normalised
from data_tools.tokenizer import train_tokenizer
from pretrain.config.errors import ConfigError
from tests.conversations import RECORDS, block, encoder, learned, names_in, template, with_tokens
from tests.support import ROOT

GOLDEN = ROOT / "tests" / "golden" / "chat_templates.json"
_trl = importlib.util.find_spec("trl")
assert _trl
assert _trl.origin
TEMPLATES = {
    file.stem: file.read_text() for file in sorted((Path(_trl.origin).parent / "chat_templates").glob("*.jinja"))
}
# Marks and prefixes differ here, and both are right.
DIFFERS = {
    ("diffusion_gemma_training", "calls"): "<|tool_response>, on which the model stops for a call, is not marked",
    ("llava_next_training", "one turn"): "a space after the end of a turn is not marked",
    ("llava_next_training", "turns"): "as above",
    ("llava_next_training", "system"): "as above",
}
# Their marks have more than is learned: how a turn begins, which stands in its prompt.
MARK_PROMPTS = {
    *("deepseek_r1_distill_training", "deepseekv3_training", "gptoss_training", "muse_glimmer_training"),
    *("nemotron_3_5_lightning_training", "nemotron_3_nano_training", "nemotron_3_super_training"),
    *("nemotron_3_ultra_training", "qwen2_5_training", "qwen3_5_nothink_training", "qwen3_5_think_training"),
    *("qwen3_6_training", "qwen3_8_training"),
}


def outcome(name: str, kind: str) -> str:
    """What becomes of a kind of conversation: how it is learned, or the line that refuses it."""
    try:
        renderer = Renderer(template(TEMPLATES[name], name), names_in(TEMPLATES[name]) | {"<|endoftext|>"})
        conversation = normalised(RECORDS[kind])
        rendered = renderer.render(conversation)
    except (ConfigError, NoConversationError) as error:
        return f"refused: {error.what if isinstance(error, NoConversationError) else error}"
    assert rendered.learned
    if not renderer.has_marks:
        return "by prefixes"
    try:
        by_prefixes = renderer.by_prefixes(conversation)
    except ConfigError as error:
        return f"by marks alone: {error}"
    if (name, kind) in DIFFERS:
        assert by_prefixes.text == rendered.text
        assert by_prefixes.learned != rendered.learned
        return f"by marks, other than by prefixes: {DIFFERS[name, kind]}"
    assert by_prefixes == rendered, f"{name}, {kind}"
    return "by marks as by prefixes"


@pytest.mark.parametrize("kind", RECORDS)
def test_marks_and_prefixes_say_the_same(kind: str) -> None:
    found = {name: outcome(name, kind) for name in TEMPLATES}
    version = importlib.metadata.version("trl")
    golden: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"trl": version}
    if os.environ.get("ATOLL_RENEW_GOLDEN") == "1":
        golden |= {"trl": version, kind: found}
        GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
    if golden["trl"] != version:
        pytest.skip(f"the golden file is of trl {golden['trl']}, not of {version}")
    assert found == golden[kind]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["Hello, is it cold? Bye then. The weather tells it: 12 C in Bonn."] * 9
    return train_tokenizer(texts, vocab_size=290, output=tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", [name for name, source in TEMPLATES.items() if "endgeneration" in source])
def test_the_mask_is_that_of_transformers_without_prompts(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """Tokens and their mask from `apply_chat_template`, which knows nothing of ours, with the same tokenizer."""
    file = with_tokens(tokenizer, names_in(TEMPLATES[name]), tmp_path / "tokenizer.json")
    chosen = template(TEMPLATES[name], name)
    ours = encoder(file, chosen).encode(block(RECORDS["turns"]))
    assert not ours.bad
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(file), chat_template=chosen.source, **dict(chosen.special_tokens)
    )
    as_parts = "llava" in name or "idefics" in name or "smolvlm" in name
    messages = [
        one | ({"content": [{"type": "text", "text": one["content"]}]} if as_parts else {})
        for one in RECORDS["turns"]["messages"]
    ]
    theirs = reference.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert ours.trained is not None
    more = np.array(theirs["assistant_masks"], np.bool_) & ~ours.trained
    assert not (ours.trained & ~np.array(theirs["assistant_masks"], np.bool_)).any()
    assert more.any() == (name in MARK_PROMPTS)
    prompt = reference.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert reference.decode(ours.tokens[more][: more.sum() // 2]) in prompt


def test_the_end_of_every_turn_is_learned(tokenizer: Path, tmp_path: Path) -> None:
    file = with_tokens(tokenizer, ["<|im_start|>", "<|im_end|>"], tmp_path / "tokenizer.json")
    for name in ("qwen3_training", "qwen2_5", "lfm2_v2"):
        chosen = template(TEMPLATES[name], name)
        found = learned(encoder(file, chosen).encode(block(RECORDS["calls"], RECORDS["turns"])), file)
        assert [len(one) for one in found] == [2, 2]
        assert all(turn.endswith("<|im_end|>\n") for turns in found for turn in turns)


# --- which template ---


def saved(folder: Path, tokenizer: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def test_the_template_is_the_given_one_or_lies_beside_the_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    special = {"eos_token": "<|endoftext|>", "bos_token": {"__type": "AddedToken", "content": "<s>"}, "pad_token": None}
    special["model_max_length"] = int(1e30)  # what transformers writes where it knows none
    in_config = saved(tmp_path / "a", tokenizer, chat_template="A", **special)
    assert find_template(in_config, None, "") == Template(
        source="A",
        name=str(tmp_path / "a/tokenizer_config.json"),
        special_tokens=(("bos_token", "<s>"), ("eos_token", "<|endoftext|>")),
    )
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert find_template(saved(tmp_path / "b", tokenizer, chat_template=named), None, "").source == "D"
    (tmp_path / "a/chat_template.jinja").write_text("B")
    assert find_template(in_config, None, "").source == "B"
    (tmp_path / "c.jinja").write_text("C")
    assert find_template(in_config, tmp_path / "c.jinja", "").source == "C"
    alone = find_template(saved(tmp_path / "d", tokenizer), tmp_path / "c.jinja", "")
    assert dict(alone.special_tokens) == {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path / "a")
    assert reference.special_tokens_map == dict(find_template(in_config, None, "").special_tokens)


def test_what_is_no_template_is_said(tokenizer: Path, tmp_path: Path) -> None:
    plain = saved(tmp_path / "a", tokenizer)
    with pytest.raises(
        ConfigError, match=r"--chat: .*/a has no chat template \(chat_template.jinja, or chat_template in"
    ):
        find_template(plain, None, "")
    with pytest.raises(ConfigError, match=r"--chat-template: '.*none' given; .*No such file.*; allowed: a file"):
        find_template(plain, tmp_path / "none", "")
    damaged = saved(tmp_path / "b", tokenizer, chat_template=[{"name": "other"}])
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is no tokenizer's configuration"):
        find_template(damaged, None, "")
    dated = saved(tmp_path / "c", tokenizer, chat_template=TEMPLATES["llama3_2"])
    with pytest.raises(ConfigError, match=r"--chat-date: nothing given, and .* writes today's date"):
        find_template(dated, None, "")
    with pytest.raises(ConfigError, match="--chat-date: 'today' given; allowed: a day as YYYY-MM-DD"):
        find_template(dated, None, "today")


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ messages[0].content + '<e>' }}", "it renders no question and answer: it leaves out what is said"),
        ("{{ nothing.content }}", "it renders no question and answer: the template says: 'nothing' is undefined"),
        ("{% for one in %}", "the template says: Expected an expression"),
        ("{{ raise_exception('Not today') }}", "the template says: Not today"),
        ("{% for one in messages %}<|b|>{{ one.content }}<e>{% endfor %}", "it writes '<|b|>', which is no token of"),
        ("{% for one in messages %}{{ one.content }}\n{% endfor %}", "it does not end a turn, so that the model would"),
        ("{% for one in messages %}{{ one.content }}</e>{% endfor %}", "ends the assistant's turn with '</e>', which"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_by_name(source: str, what: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Renderer(template(source, "folder/chat_template.jinja"), {"<e>"})
    assert str(refused.value).startswith("--chat: folder/chat_template.jinja: ")
    assert what in str(refused.value)


def test_the_date_is_the_given_one_whatever_day_it_is() -> None:
    names = names_in(TEMPLATES["llama3_2"]) | {"<|endoftext|>"}
    renderer = Renderer(template(TEMPLATES["llama3_2"]), names)
    assert "Today Date: 02 Jan 2026" in renderer.render(normalised(RECORDS["one turn"])).text


def test_turns_that_are_not_to_be_learned_are_left_out() -> None:
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "So?"},
    ]
    record = {"prompt": prompt, "completion": "Yes."}
    for name in ("qwen3_instruct_2507", "qwen3_instruct_2507_training"):
        rendered = Renderer(template(TEMPLATES[name]), names_in(TEMPLATES[name])).render(normalised(record))
        assert [rendered.text[begin:end] for begin, end in rendered.learned] == ["Yes.<|im_end|>\n"]
