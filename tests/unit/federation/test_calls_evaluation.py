"""`atoll eval --tools`: a model's own calls, in batches as one by one, kept as they come, of this model and file."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from data_tools.calls import calls_in
from data_tools.conversations import begun
from data_tools.tokenizer import CHAT_TOKENS
from launch.evaluate import evaluate
from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig
from pretrain.federation.answers import Answering
from pretrain.silo.exported import export
from pretrain.silo.model import build_initial
from pretrain.silo.vocabulary import vocabulary_size
from tests.conversations import TOOL, assistant, block, encoder, template, user
from tests.holding import held_elsewhere
from tests.support import TinyText, one_line_error
from tests.unit.federation.test_chat_evaluation import CHATML, LLAMA, tokenizer_with

TOOLS = [{"name": "a", "parameters": {"properties": {"x": {}}}}, {"name": "b"}]
# What is asked, and what is answered after training on it.
CALL, OTHER = {"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}
TAUGHT: dict[str, list[dict[str, Any]]] = {"one": [CALL], "two or more": [CALL, OTHER], "no": []}
# Calls as our own template has them, in fewer words around.
SHORT = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role[0] }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)
LINE = re.compile(r" *([\d.]+)% exact +([\d.]+)% right functions  (\d+) questions  (.*)")


def record(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    said = assistant("", tool_calls=calls) if calls else assistant("None.")
    return {"messages": [user(text), said], "tools": TOOLS}


def asked(text: str, expected: list[dict[str, Any]]) -> dict[str, Any]:
    return {"messages": [user(text)], "tools": TOOLS, "expected": expected}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    return tokenizer_with(tmp_path_factory.mktemp("calls") / "tokenizer", tiny_text, CHAT_TOKENS, SHORT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """One that has learned a few calls by heart."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 1024}
    made: Any = build_initial(
        ModelConfig(config=LLAMA | sizes | {"num_hidden_layers": 2}, seed=3), vocabulary_size(tokenizer)
    )
    encoded = encoder(tokenizer, template(SHORT)).encode(block(*(record(*one) for one in TAUGHT.items())))
    assert encoded.trained is not None
    ends, filling = encoded.document_tokens.cumsum()[:-1].tolist(), {"batch_first": True}
    tokens = pad_sequence([*torch.tensor(encoded.tokens.astype(int)).tensor_split(ends)], **filling)
    learned = pad_sequence([*torch.tensor(encoded.trained).tensor_split(ends)], **filling)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.01)
    loss = torch.tensor(1.0)
    while loss > 0.02:
        loss = made(input_ids=tokens, labels=torch.where(learned, tokens, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("calls") / "model"
    export(made, tokenizer, directory, trained_tokens=1024)
    return directory


def lines(file: Path, *records: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    return file


def shares(out: str) -> dict[str, tuple[float, float, int]]:
    found = (LINE.fullmatch(line) for line in out.splitlines())
    return {one[4]: (float(one[1]), float(one[2]), int(one[3])) for one in found if one}


def test_calls_are_counted_by_tool_and_by_silo(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = lines(tmp_path / "bank.jsonl", *(asked(*one) for one in TAUGHT.items()))
    court = lines(
        tmp_path / "court.jsonl",
        {"messages": [user("one")], "tools": TOOLS, "possible_answer": [{"a": {"x": [2, 1], "y": [""]}}]},
        asked("one", [{"name": "a", "arguments": {"x": 7}}]),
        asked("two or more", [OTHER, CALL]),
        asked("two or more", [CALL]),
        asked("no", [CALL]),
        asked("one", []),
    )
    evaluate(str(model), tools=[f"bank={bank}", f"court={court}"])
    out = capsys.readouterr().out
    assert shares(out) == {
        "bank: (no call)": (100, 100, 1),
        "bank: a": (100, 100, 2),
        "bank: b": (100, 100, 1),
        "court: (no call)": (0, 0, 1),
        "court: a": (40, 60, 5),
        "court: b": (100, 100, 1),
        "bank": (100, 100, 3),
        "court": (pytest.approx(100 / 3, abs=0.01), 50, 6),
        "all questions": (pytest.approx(500 / 9, abs=0.01), pytest.approx(600 / 9, abs=0.01), 9),
    }
    *_, wrong = out.splitlines()
    assert sorted(wrong.removeprefix("wrong: ").split(", ")) == [
        *("1 call not wanted", "1 no call", "1 other tool", "1 other value"),
    ]


def test_answers_are_kept_and_asked_for_once(
    model: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, answers = lines(tmp_path / "bank.jsonl", *(asked(*one) for one in TAUGHT.items())), tmp_path / "a" / "b.jsonl"
    evaluate(str(model), tools=[str(file)], answers=answers, batch_sequences=1)
    whole = capsys.readouterr().out
    head, *kept = answers.read_text().splitlines()
    assert json.loads(head).keys() == {"format", "model", "tokenizer", "template", "files", "num_tokens"}
    assert sorted(json.loads(one)["line"] for one in kept) == [1, 2, 3]
    # Killed while it wrote the second: what is there is not asked again, though the model would say something else.
    told = json.loads(kept[0]) | {"text": "Nothing."}
    answers.write_text("\n".join([head, json.dumps(told), kept[1][:9]]))
    evaluate(str(model), tools=[str(file)], answers=answers)
    again = [json.loads(one) for one in answers.read_text().splitlines()[1:]]
    assert again[0] == told
    assert sorted(one["line"] for one in again) == [1, 2, 3]
    assert {one["line"]: one["text"] for one in again[1:]} == {
        one["line"]: one["text"] for one in map(json.loads, kept[1:])
    }
    assert capsys.readouterr().out != whole
    answers.write_text("\n".join([head, *kept]) + "\n")
    before = answers.read_bytes()
    evaluate(str(model), tools=[str(file)], answers=answers)
    assert capsys.readouterr().out == whole
    assert answers.read_bytes() == before

    def refused(**options: Any) -> str:
        message = one_line_error(evaluate, str(options.pop("where", model)), answers=answers, **options)
        assert answers.read_bytes() == before
        return message

    with held_elsewhere(answers, json.loads(head)):
        assert "; another process writes to it; " in refused(tools=[str(file)])
    answers.write_bytes(before)
    of_other = f"--answers: {str(answers)!r} given; it was begun with other "
    assert refused(tools=[str(file)], num_tokens=5).startswith(f"{of_other}num_tokens; ")
    assert refused(tools=[f"x={file}"]).startswith(f"{of_other}files; ")
    other = tmp_path / "other"
    made = build_initial(ModelConfig(config=LLAMA, seed=4), vocabulary_size(tokenizer))
    export(made, tokenizer, other, trained_tokens=1024)
    assert refused(where=other, tools=[str(file)]).startswith(f"{of_other}model; ")
    lines(file, asked("one", []))
    assert refused(tools=[str(file)]).startswith(f"{of_other}files; ")
    answers.write_text('"text"\n')
    before = answers.read_bytes()
    assert refused(tools=[str(file)]).endswith("; it holds something else; allowed: a new one")
    answers.write_text(head + '\n{"silo": "other"}\n')
    before = answers.read_bytes()
    lines(file, *(asked(*one) for one in TAUGHT.items()))
    assert refused(tools=[str(file)]).endswith("; it holds more than answers; allowed: a new one")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_in_a_batch_are_those_of_each_alone(kind: str, tokenizer: Path) -> None:
    config: dict[str, Any] = LLAMA | {"initializer_range": 0.3, "max_position_embeddings": 40}
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
        config = {"model_type": "gpt2", "initializer_range": 0.3} | sizes
    vocabulary = vocabulary_size(tokenizer)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(4, vocabulary, (size,), generator=generator).tolist() for size in (3, 30, 7, 39, 12, 33, 3)
    ]

    def said(batch_sequences: int) -> dict[int, tuple[list[int], bool]]:
        made = build_initial(ModelConfig(config=config, seed=3), vocabulary)
        answering = Answering(made, range(60, 90), num_tokens=9, batch_sequences=batch_sequences)
        batches = [*answering.answers(prompts)]
        assert max(map(len, batches)) <= batch_sequences
        return {one.prompt: (one.tokens, one.is_cut) for batch in batches for one in batch}

    alone = said(1)
    assert sorted(alone) == [*range(7)]
    assert len(alone[3][0]) <= 1  # no more than its positions hold
    assert {True, False} == {is_cut for _, is_cut in alone.values()}
    assert said(4) == said(7) == alone


def test_a_model_that_heeds_what_is_beside_a_prompt_is_asked_one_by_one(tokenizer: Path) -> None:
    made: Any = build_initial(ModelConfig(config=LLAMA, seed=3), vocabulary_size(tokenizer))
    plain = made.forward

    def heedless(**given: Any) -> Any:
        return plain(**(given | {"attention_mask": None}))

    made.forward = heedless
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11, 12]]
    refused = one_line_error(lambda: [*Answering(made, [0], num_tokens=2, batch_sequences=2).answers(prompts)])
    assert refused.startswith("--batch-sequences: 2 given; what this model says depends on the prompts beside its own")
    assert len([*Answering(made, [0], num_tokens=2, batch_sequences=1).answers(prompts)]) == 2


def test_what_cannot_be_asked_is_said_in_a_line(
    model: Path, tokenizer: Path, tmp_path: Path, tiny_text: TinyText
) -> None:
    file = lines(tmp_path / "bank.jsonl", asked("one", [CALL]), asked("one", [{"name": "c", "arguments": {}}]))
    assert one_line_error(evaluate, str(model), tools=[str(file)]) == (
        f"{file}, line 2: expected[0] calls 'c'; allowed: a, b (its tools): mend or drop it"
    )
    lines(file, asked("one", []) | {"tools": [{"name": "a", "parameters": {"type": "dict"}}]})
    assert one_line_error(evaluate, str(model), tools=[str(file)]) == (
        f"{file}, line 1: tools[0].parameters.type: 'dict' given; allowed: 'object', as arguments have names: "
        "mend or drop it"
    )
    for given in ([str(tmp_path)], ["x=missing"], [f"={file}"], [f"x={file}", f"x={file}"]):
        assert one_line_error(evaluate, str(model), tools=given).startswith(f"--tools: {given[-1]!r} given; allowed: ")
    assert one_line_error(evaluate, str(model), answers=tmp_path / "a").startswith("--answers: given without --tools")

    # A template whose calls are written in no form that is read would have every answer wrong.
    source = SHORT.replace("<tool_call>", "@").replace("</tool_call>", "")
    other = tokenizer_with(tmp_path / "other", tiny_text, CHAT_TOKENS, source)
    made = build_initial(ModelConfig(config=LLAMA, seed=4), vocabulary_size(other))
    export(made, other, tmp_path / "unread", trained_tokens=1024)
    lines(file, asked("one", [CALL]))
    refused = one_line_error(evaluate, str(tmp_path / "unread"), tools=[str(file)])
    assert "template.jinja writes a call as '@{" in refused
    assert "; allowed: a template that writes it as <tool_call>" in refused


def test_prompts_are_rendered_and_read_as_in_training(tokenizer: Path) -> None:
    made = encoder(tokenizer, template(CHATML))
    whole = made.encode(block(record("say <|im_end|> one", [CALL])))
    assert whole.trained is not None
    prompt = made.prompt(begun({"messages": [user("say <|im_end|> one")], "tools": TOOLS}))
    assert prompt == whole.tokens[: whole.trained.argmax()].tolist()
    said = made.spelled(whole.tokens[whole.trained].tolist()).split("<|im_end|>")[0]
    [found] = calls_in(said)
    assert {"name": found.name, "arguments": found.arguments} == CALL
    bare = encoder(tokenizer, template(SHORT.replace("{{ tool.function.name }}", "")))
    conversation = begun({"messages": [user("one")], "tools": [TOOL]})
    with pytest.raises(ConfigError, match="leaves out the tools"):
        bare.prompt(conversation)
