"""Trajectories that are too long for a row: cut between turns, every turn learned once with what it answers."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer

from data_tools.chat import ChatEncoder, ChatJob
from data_tools.chat_template import find_template
from data_tools.conversations import Conversation, normalised
from data_tools.pack import ChatRecipe, Recipe, prepare
from data_tools.report import print_report
from data_tools.sources import Source
from data_tools.split import split_at_turns
from data_tools.tokenizer import train_tokenizer
from tests.conversations import TOOL, assistant, block, encoder, learned, user

ROW_TOKENS = 700
SYSTEM = {"role": "system", "content": "Be brief."}


def called(number: int) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": f"Bonn {number}"}}}
    return assistant("", tool_calls=[call])


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "content": text}


def trajectory(steps: list[int], *, system: bool = True) -> dict[str, Any]:
    """One question, so many calls with results of so many words, and an answer."""
    said = [message for place, words in enumerate(steps) for message in (called(place), result("12 C " * words))]
    messages = [*([SYSTEM] if system else []), user("Where is it cold?"), *said, assistant("In Bonn.")]
    return {"messages": messages, "tools": [TOOL]}


def size(conversation: Conversation) -> int:
    return len(json.dumps([conversation.messages, conversation.tools]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["where is it cold in Bonn? 12 C weather arguments city tool_call"] * 5
    return train_tokenizer(texts, vocab_size=300, output=tmp_path_factory.mktemp("tokenizer"), chat=True)


def test_a_piece_begins_with_system_question_and_the_step_before_it() -> None:
    whole = normalised(trajectory([1, 1, 1]))
    messages = whole.messages
    split = split_at_turns(whole, lambda one: len(one.messages) <= 5)
    assert split.num_cut == 0
    first, second, third = split.pieces
    assert first.messages == messages[:5]  # up to the second call; its result, which nothing follows, is left out
    assert first.untrained == frozenset()
    assert second.messages == [*messages[:2], *messages[4:7]]
    assert second.untrained == {2}  # which the first has taught
    assert third.messages == [*messages[:2], *messages[6:9]]
    assert third.untrained == {2}
    assert all(piece.tools == whole.tools for piece in split.pieces)
    # Where a piece begins at a question, nothing before it is needed.
    turns = normalised({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})
    split = split_at_turns(turns, lambda one: len(one.messages) <= 2)
    assert [piece.messages for piece in split.pieces] == [turns.messages[:2], turns.messages[2:]]
    assert [piece.untrained for piece in split.pieces] == [frozenset(), frozenset()]


def test_a_turn_after_too_long_a_result_is_cut_and_counted_and_the_next_is_not() -> None:
    whole = normalised(trajectory([1, 500, 1, 1]))
    split = split_at_turns(whole, lambda one: size(one) <= 900)
    assert split.num_cut == 1
    said = [piece.messages[place] for piece in split.pieces for place in learned_places(piece)]
    assert said == [whole.messages[place] for place in (2, 4, 8, 10)]  # 6 answers the long result
    assert split.pieces[1].messages[2] == whole.messages[6]  # there to be read
    untaught = Conversation(messages=whole.messages, tools=whole.tools, untrained=frozenset({6}))
    assert split_at_turns(untaught, lambda one: size(one) <= 900).num_cut == 0


def learned_places(piece: Conversation) -> list[int]:
    turns = [place for place, message in enumerate(piece.messages) if message["role"] == "assistant"]
    return [place for place in turns if place not in piece.untrained]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12),
    st.integers(300, 1500),
    st.sets(st.integers(0, 30)),
    st.booleans(),
)
def test_every_turn_is_learned_once_or_counted(steps: list[int], most: int, weightless: set[int], system: bool) -> None:
    record = trajectory(steps, system=system)
    for place, message in enumerate(record["messages"]):
        if message["role"] == "assistant" and place in weightless and place + 1 < len(record["messages"]):
            message["weight"] = 0
    whole = normalised(record)
    split = split_at_turns(whole, lambda one: size(one) <= most)
    said = [piece.messages[place] for piece in split.pieces for place in learned_places(piece)]
    wanted = [whole.messages[place] for place in learned_places(whole)]
    assert len(said) == len(wanted) - split.num_cut
    assert said == [message for message in wanted if any(message is one for one in said)]  # each once, in order
    for piece in split.pieces:
        assert size(piece) <= most
        roles = [message["role"] for message in piece.messages]
        assert roles[: 1 + system] == [*(["system"] if system else []), "user"]
        normalised({"messages": piece.messages, "tools": piece.tools})  # a conversation like any other


def test_prepared_pieces_fit_and_what_was_cut_is_counted_and_said(tokenizer: Path, tmp_path: Path) -> None:
    long, short = trajectory([1, 1, 300, 1, 1, 1]), {"messages": [user("Hi"), assistant("Hello.")]}
    made = encoder(tokenizer, find_template(tokenizer, None, ""), sequence_tokens=ROW_TOKENS, too_long="split")
    encoded = made.encode(block(long, short))
    assert not encoded.bad
    assert not encoded.dropped
    assert encoded.document_tokens.max() <= ROW_TOKENS
    said = learned(encoded, tokenizer)
    calls = [f'"Bonn {number}"' for number in range(6)]
    found = [[one for one in calls if one in text] for piece in said[:-1] for text in piece]
    assert found == [*([calls[place]] for place in (0, 1, 2, 4, 5)), []]  # 3 answers the long result; the last one says
    assert encoded.split["conversations"] == 1
    assert encoded.split["pieces"] == len(encoded.document_tokens) - 1
    assert encoded.split["turns_cut"] == 1
    whole = encoder(tokenizer, find_template(tokenizer, None, "")).encode(block(long))
    assert whole.trained is not None
    assert encoded.trained is not None
    cut = Tokenizer.from_file(str(tokenizer)).encode(learned(whole, tokenizer)[0][3], add_special_tokens=False).ids
    assert encoded.split["trained_tokens"] == whole.trained.sum()
    assert encoded.split["piece_trained_tokens"] == whole.trained.sum() - len(cut)

    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (long, short)))
    chat = ChatRecipe(sequence_tokens=ROW_TOKENS, too_long="split")
    recipe = Recipe(sources=(Source(path=str(file)),), tokenizer=tokenizer, held_out=0.0, chat=chat)
    prepare(recipe, tmp_path / "packed", num_workers=0, console=Console(quiet=True))
    report = json.loads((tmp_path / "packed" / "report.json").read_text())
    assert report["sources"]["long"]["split"] == dict(encoded.split)
    shown = io.StringIO()
    print_report(report, Console(width=300, file=shown))
    pieces = encoded.split["pieces"]
    assert (
        f"long: 1 conversations too long for a row split into {pieces} pieces, each with system text"
        in shown.getvalue()
    )
    assert "1 turns too long even so cut" in shown.getvalue()
    assert report["recipe"]["chat"]["too_long"] == "split"


def test_pieces_of_one_conversation_are_held_out_together(tokenizer: Path) -> None:
    job = ChatJob(
        tokenizer=tokenizer,
        template=find_template(tokenizer, None, ""),
        sequence_tokens=ROW_TOKENS,
        too_long="split",
        held_out=0.4,
    )
    records = [trajectory([1] * 4) for _ in range(10)]
    for number, record in enumerate(records):
        record["messages"][1] = user(f"Question {number}?")
    encoded = ChatEncoder(job).encode(block(*records))
    decoder = Tokenizer.from_file(str(tokenizer))
    held_out: dict[str, list[bool]] = {}
    pieces = np.split(encoded.tokens, np.cumsum(encoded.document_tokens)[:-1])
    for piece, is_valid in zip(pieces, encoded.held_out, strict=True):
        held_out.setdefault(decoder.decode(piece.tolist()).split("Question ")[1].split("?")[0], []).append(is_valid)
    assert len(held_out) == 10
    assert all(len(flags) > 1 and len({*flags}) == 1 for flags in held_out.values())
    assert 0 < sum(flags[0] for flags in held_out.values()) < 10
