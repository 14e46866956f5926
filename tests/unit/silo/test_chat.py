"""Splits of conversations: rows, masks, what is written of them, what is read, and what is refused."""

import codecs
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.show.text import num_sequences
from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig
from pretrain.config.load import load_config
from pretrain.federation.held_out import evaluate_model
from pretrain.federation.preflight import check_silo
from pretrain.silo.batch import BY_TOKENS, IGNORED
from pretrain.silo.data import BadTokenError, Batches, Mixture, PackedTokens, held_out_batches
from pretrain.silo.evaluate import held_out_loss
from pretrain.silo.model import build_initial, token_losses
from pretrain.silo.shards import (
    DOCUMENT_END,
    DOCUMENTS_FILE,
    MANIFEST_FILE,
    Chat,
    Manifest,
    file_sha256,
    open_mask,
    open_shard,
    read_manifest,
    template_sha256,
    text_sha256,
    tokenizer_sha256,
    trained,
    verify_shards,
    write_manifest,
)
from pretrain.silo.template import read_template, sha256_of
from pretrain.silo.verify import verify_tokens
from pretrain.silo.writer import SplitWriter
from pretrain.trust.contract import build_contract, check_same_contract, first_contract
from tests.chats import END, TEMPLATE, Conversation, append, conversations, packed_rows, write_chat
from tests.conftest import TinyConfig
from tests.support import VOCAB_SIZE as TINY_VOCAB_SIZE
from tests.support import TinyText, one_line_error

TOKENIZER = "a1" * 32
VOCAB_SIZE = 50
SMALL: list[Conversation] = [([7, 3, 4, 0], [0, 0, 1, 1]), ([9, 8, 1], [1, 1, 0]), ([5, 6, 2, 1, 0], [0, 1, 0, 1, 1])]


def write(directory: Path, given: list[Conversation] = SMALL, *, row_tokens: int = 9, **options: int) -> Path:
    return write_chat(directory, given, row_tokens=row_tokens, vocab_size=VOCAB_SIZE, tokenizer=TOKENIZER, **options)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def whole(directory: Path, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and masks of all shards."""
    tokens = [open_shard(directory, manifest, shard) for shard in manifest.shards]
    masks = [trained(open_mask(directory, shard), 0, shard.num_tokens) for shard in manifest.shards]
    return np.concatenate(tokens), np.concatenate(masks)


def test_a_split_of_conversations_byte_by_byte(tmp_path: Path) -> None:
    split = write(tmp_path / "chat")
    manifest = verify_shards(split)
    verify_tokens(split, manifest)
    rows = [7, 3, 4, 0, 9, 8, 1, 0, 0, 5, 6, 2, 1, 0, 0, 0, 0, 0]
    assert np.frombuffer((split / "shard-00000.bin").read_bytes(), "<u2").tolist() == rows
    # The first token of a document is never trained: 9 was given as trained.
    #     3  2  1  0 of the first byte: 0 9 8 1 | 7 3 4 0
    assert (split / "shard-00000.mask").read_bytes() == bytes([0b00101100, 0b00110100, 0b00])
    assert np.frombuffer((split / DOCUMENTS_FILE).read_bytes(), DOCUMENT_END).tolist() == [4, 7, 9, 14, 18]
    loaded = json.loads((split / MANIFEST_FILE).read_text())
    assert loaded["chat"] == {"template_sha256": TEMPLATE, "sequence_tokens": 9, "num_trained_tokens": 6}
    assert loaded["shards"][0]["mask_sha256"] == hashlib.sha256((split / "shard-00000.mask").read_bytes()).hexdigest()
    assert (manifest.num_tokens, manifest.num_documents, manifest.num_trained_tokens) == (18, 5, 6)


@given(
    row_tokens=st.integers(9, 23),
    shard_tokens=st.integers(1, 150),
    at_once=st.integers(1, 7),
    cut=st.integers(0, 60),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=25, deadline=None)
def test_the_bytes_do_not_depend_on_calls_or_stops(
    tmp_path_factory: pytest.TempPathFactory, *, row_tokens: int, shard_tokens: int, at_once: int, cut: int, seed: int
) -> None:
    made, tmp_path = conversations(20, vocab_size=VOCAB_SIZE, seed=seed), tmp_path_factory.mktemp("chat")
    once = write(tmp_path / "once", made, row_tokens=row_tokens, shard_tokens=shard_tokens)
    terms = {
        "vocab_size": VOCAB_SIZE,
        "end_of_text_id": END,
        "shard_tokens": shard_tokens,
        "chat": Chat(template_sha256=TEMPLATE, sequence_tokens=row_tokens),
    }
    documents = [one for row in packed_rows(made, row_tokens) for one in row]
    pieces = [documents[first : first + at_once] for first in range(0, len(documents), at_once)]
    cut %= len(pieces)
    writer = SplitWriter(tmp_path / "twice", **terms)  # type: ignore[arg-type]
    for piece in pieces[:cut]:
        append(writer, piece)
    state = json.loads(json.dumps(writer.sync()))
    for piece in pieces[cut:]:  # is lost
        append(writer, piece)
    writer.close()
    writer = SplitWriter(tmp_path / "twice", **terms, state=state)  # type: ignore[arg-type]
    for piece in pieces[cut:]:
        append(writer, piece)
    manifest = writer.finish(tokenizer_sha256=TOKENIZER, recipe_sha256="c3" * 32)
    assert bytes_of(once) == bytes_of(tmp_path / "twice")
    verify_tokens(once, verify_shards(once))
    tokens, masks = whole(once, manifest)
    assert tokens.tolist() == [token for given, _ in documents for token in given]
    assert masks.tolist() == [bool(bit) for _, bits in documents for bit in bits]
    assert all(shard.num_tokens <= max(shard_tokens, row_tokens) for shard in manifest.shards)


def test_a_text_that_differs_only_in_its_mask_is_another(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    other = write(tmp_path / "other", [(tokens, [0, *bits[1:-1], 0]) for tokens, bits in SMALL])
    assert (one / "shard-00000.bin").read_bytes() == (other / "shard-00000.bin").read_bytes()
    assert text_sha256(read_manifest(one)) != text_sha256(read_manifest(other))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"chat": None}, "not a manifest of format 2"),
        ({"chat": {"sequence_tokens": 9}}, "not a manifest of format 2"),
        ({"chat": {"template_sha256": 3, "sequence_tokens": 9}}, "template_sha256: 3 given"),
        ({"chat": {"template_sha256": "", "sequence_tokens": 4}}, "its chat, num_documents or shards disagree"),
        ({"chat": {"template_sha256": "", "sequence_tokens": 0}}, "its chat, num_documents or shards disagree"),
        (
            {"chat": {"template_sha256": "", "sequence_tokens": 9, "num_trained_tokens": 14}},
            "its chat, num_documents or shards disagree",
        ),
        ({"num_documents": 1}, "its chat, num_documents or shards disagree"),
    ],
)
def test_manifests_of_conversations_are_checked(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    file = write(tmp_path / "chat") / MANIFEST_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        read_manifest(file.parent)
    assert str(caught.value).startswith(f"{file}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_has_no_masks(tmp_path: Path) -> None:
    file = write(tmp_path / "chat") / MANIFEST_FILE
    loaded = json.loads(file.read_text())
    del loaded["chat"]
    file.write_text(json.dumps(loaded))
    with pytest.raises(ConfigError, match="its chat, num_documents or shards disagree"):
        read_manifest(file.parent)


def test_broken_masks_are_said_in_one_line(tmp_path: Path) -> None:
    split = write(tmp_path / "chat")
    mask = split / "shard-00000.mask"
    raw = mask.read_bytes()
    mask.write_bytes(bytes([raw[0] ^ 2, *raw[1:]]))
    assert read_manifest(split)  # same size: only the full check can see it
    with pytest.raises(ConfigError, match=rf"silo.data: {mask} has sha256 .*: copy or prepare the split again"):
        verify_shards(split)
    mask.write_bytes(raw[:-1])
    with pytest.raises(ConfigError, match=rf"{mask} has 2 bytes, manifest.json says 3: copy or prepare the split"):
        read_manifest(split)
    mask.unlink()
    with pytest.raises(ConfigError, match=f"{mask} is missing"):
        read_manifest(split)


def rewritten(split: Path, *, mask: bytes | None = None, ends: list[int] | None = None) -> Manifest:
    """The split with another mask or index, as whoever wrote it wrongly would have left it."""
    manifest = read_manifest(split)
    if mask is not None:
        (split / "shard-00000.mask").write_bytes(mask)
        shard = dataclasses.replace(manifest.shards[0], mask_sha256=file_sha256(split / "shard-00000.mask"))
        manifest = dataclasses.replace(manifest, shards=(shard,))
    if ends is not None:
        (split / DOCUMENTS_FILE).write_bytes(np.array(ends, DOCUMENT_END).tobytes())
        sha256 = file_sha256(split / DOCUMENTS_FILE)
        manifest = dataclasses.replace(manifest, documents_sha256=sha256, num_documents=len(ends))
    write_manifest(split, manifest)
    return verify_shards(split)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ends": [4, 7, 14, 18]}, "disagree about where conversations end, as one does at the end of each row of 9"),
        ({"ends": [4, 9, 7, 14, 18]}, "disagree about where conversations end"),
        ({"ends": [4, 4, 9, 14, 18]}, "disagree about where conversations end"),
        ({"ends": [4, 7, 9, 14]}, "disagree about where conversations end"),
        ({"ends": [4, 7, 9, 14, 18, 20]}, "has 5 ends of documents and 6 trained tokens, manifest.json says 6 and 6"),
        ({"mask": bytes([0b00101101, 0b00110100, 0])}, "trains the first token of a document, or what fills a row"),
        ({"mask": bytes([0b00111100, 0b00110100, 0])}, "trains the first token of a document, or what fills a row"),
        ({"mask": bytes([0b00101100, 0b00110101, 0])}, "trains the first token of a document, or what fills a row"),
        ({"mask": bytes([0b00101100, 0b00110100, 2])}, "trains the first token of a document, or what fills a row"),
        ({"mask": bytes([0b00101000, 0b00110100, 0])}, "5 trained tokens, manifest.json says 5 and 6"),
    ],
)
def test_rows_and_masks_are_verified(tmp_path: Path, change: dict[str, list[int] | bytes], expected: str) -> None:
    split = write(tmp_path / "chat")
    manifest = rewritten(split, **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        verify_tokens(split, manifest, key="verify")
    assert str(caught.value).startswith("verify: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_is_known_by_its_text(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_bytes("{{ größe }}\r\n".encode())
    assert template_sha256(file) == hashlib.sha256("{{ größe }}\r\n".encode()).hexdigest()
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert template_sha256(file) == hashlib.sha256("{{ größe }}\r\n".encode()).hexdigest()
    assert sha256_of(read_template(file, key="chat_template")) == template_sha256(file)
    for raw, expected in ((b" \n", "which is empty"), (b"\xff", "it is no text in UTF-8")):
        file.write_bytes(raw)
        with pytest.raises(ConfigError, match=rf"chat_template: .*given[;,] {expected}; allowed: a chat template"):
            template_sha256(file)
    with pytest.raises(ConfigError, match=r"there is no such file; allowed: a chat .* or a folder with a chat"):
        template_sha256(tmp_path / "nowhere")


# --- reading ---


def test_rows_are_sequences_whose_targets_are_what_is_trained(tmp_path: Path) -> None:
    """In two splits, one after another, and two shards."""
    other: list[Conversation] = [([11, 12, 13], [0, 1, 1])]
    first, second = write(tmp_path / "first", shard_tokens=9), write(tmp_path / "second", other)
    tokens = PackedTokens([first, second], sequence_tokens=9)
    assert len(tokens.manifests[0].shards) == 2
    assert (tokens.num_sequences, tokens.num_tokens, tokens.is_chat) == (3, 27, True)
    batch = tokens.batch([2, 0, 1])
    assert batch.inputs.tolist() == [[11, 12, 13] + [END] * 6, [7, 3, 4, 0, 9, 8, 1, 0, 0], [5, 6, 2, 1] + [0] * 5]
    nothing = IGNORED
    assert batch.targets.tolist() == [
        [12, 13] + [nothing] * 7,
        [nothing, 4, 0, nothing, 8] + [nothing] * 4,
        [6, nothing, 1, 0] + [nothing] * 5,
    ]
    assert batch.positions is not None
    assert batch.positions.tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 0, 1, 2, 0, 1],
        [0, 1, 2, 3, 4, 0, 1, 2, 3],
    ]
    assert [tokens.num_trained(row) for row in (0, 1, 2)] == [3, 3, 2]
    batches = held_out_batches(tokens, num_sequences=0, micro_batch_sequences=2, rank=0, num_ranks=1)
    assert [batch.inputs[:, 0].tolist() for batch, _ in batches] == [[7, 5], [11, 11]]


def test_text_and_conversations_take_turns(tmp_path: Path) -> None:
    chat = write(tmp_path / "chat")
    text = SplitWriter(tmp_path / "text", vocab_size=VOCAB_SIZE, end_of_text_id=END, shard_tokens=100)
    text.write(np.arange(40), np.array([40]), 40)
    text.finish(tokenizer_sha256=TOKENIZER, recipe_sha256="c3" * 32)
    corpora = [PackedTokens([split], sequence_tokens=9) for split in (chat, tmp_path / "text")]
    mixture = Mixture(corpora, seed=0, silo="court")
    ranks = [
        Batches(mixture, micro_batch_sequences=1, accumulation_steps=2, rank=rank, num_ranks=2) for rank in range(2)
    ]
    for step in range(3):
        found = [next(rank) for rank in ranks for _ in range(2)]
        num_targets = sum(int((batch.targets != IGNORED).sum()) for batch in found)
        assert {batch.num_trained for batch in found} == {num_targets}
        assert num_targets == 2 * 9 + sum(corpora[0].num_trained(row) for row in (0, 1))
        for batch in found:
            assert batch.positions is not None
            is_text = bool((batch.positions == BY_TOKENS).all())
            assert is_text == (int((batch.targets != IGNORED).sum()) == 9)
        assert ranks[0].state() == 4 * (step + 1)
    assert Mixture(corpora[1:], seed=0, silo="court").batch([0]).positions is None
    message = one_line_error(lambda: PackedTokens([chat, tmp_path / "text"], sequence_tokens=9, key="silos.law.data"))
    assert message == (
        "silos.law.data: text and conversations given as one corpus; allowed: with data_weights, which take them in "
        "turns"
    )


def test_conversations_that_do_not_fit_a_run_are_said_in_one_line(tmp_path: Path) -> None:
    split = write(tmp_path / "chat")

    def message(**options: object) -> str:
        return one_line_error(
            lambda: PackedTokens([split], **{"sequence_tokens": 9, "key": "silos.law.data"} | options)
        )

    assert message(sequence_tokens=16) == (
        f"silos.law.data: {split} has rows of 9 tokens, and sequence_tokens is 16; allowed: sequence_tokens=9, or the "
        "conversations prepared again in rows of that length"
    )
    assert message(template_sha256="00" * 32) == (
        f"silos.law.data: {split} was prepared with another template than the contract's: {TEMPLATE[:12]}, and "
        "chat_template is 000000000000: prepare it again with that one"
    )
    assert message(template_sha256="") == (
        f"silos.law.data: {split} has conversations, and the run has no chat_template; allowed: the template that they "
        "were prepared with, as chat_template, or text"
    )
    write_chat(
        tmp_path / "mute",
        [(tokens, [0] * len(tokens)) for tokens, _ in SMALL],
        row_tokens=9,
        vocab_size=VOCAB_SIZE,
        tokenizer=TOKENIZER,
    )
    assert one_line_error(lambda: PackedTokens([tmp_path / "mute"], sequence_tokens=9)) == (
        f"silo.data: {tmp_path / 'mute'} has conversations of which not one token is trained: prepare it again from "
        "ones that have answers"
    )
    rewritten(split, ends=[4, 7, 14, 18])
    with pytest.raises(BadTokenError, match=r"documents do not end with the row: copy or prepare the split again"):
        PackedTokens([split], sequence_tokens=9).row(0)


def test_an_evaluation_without_a_trained_token_is_said(tmp_path: Path) -> None:
    split = write(tmp_path / "chat", [([7, 3, 4], [0, 0, 0]), *SMALL[:1]], row_tokens=4)
    tokens = PackedTokens([split], sequence_tokens=4, key="silos.law.valid.law")

    def evaluated(num_sequences: int) -> float:
        found = held_out_loss(
            lambda batch: torch.ones(batch.targets.shape) * (batch.targets != IGNORED),
            {"law": tokens},
            num_sequences=num_sequences,
            micro_batch_sequences=2,
        )
        return found["law"]

    assert evaluated(0) == 1
    assert one_line_error(evaluated, 1) == (
        "silos.law.valid.law: of the sequences that are evaluated not one token is trained; allowed: more of them "
        "(silo.eval_sequences), or all (0)"
    )


def test_a_model_is_evaluated_on_conversations_that_do_not_see_each_other(tmp_path: Path) -> None:
    """Whatever it was trained on: its run did not keep documents apart."""
    llama = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    settings = ModelConfig(config=llama | {"num_attention_heads": 2})
    model, split = build_initial(settings, VOCAB_SIZE).eval(), write(tmp_path / "chat")
    found = evaluate_model(lambda: model, {"chat": split}, {"sequence_tokens": 9}, TOKENIZER)["chat"]
    losses = []
    for tokens, bits in SMALL:
        targets = torch.tensor([[t if bit else IGNORED for t, bit in zip(tokens[1:], bits[1:], strict=True)]])
        with torch.no_grad():
            losses.append(token_losses(model, torch.tensor([tokens[:-1]]), targets))
    assert found.loss == pytest.approx(sum(one.sum().item() for one in losses) / 6, rel=1e-5)
    assert (found.bits_per_byte, found.num_sequences) == (None, 2)


# --- the run ---


def test_the_template_is_a_term_of_the_contract(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    text = tiny_config(tmp_path / "text")
    assert "chat_template_sha256" not in build_contract(text)
    (tmp_path / "a.jinja").write_text("a")
    (tmp_path / "b.jinja").write_text("b")
    split = write_chat(
        tmp_path / "chat",
        SMALL * 8,
        row_tokens=16,
        vocab_size=TINY_VOCAB_SIZE,
        tokenizer=tokenizer_sha256(tiny_text.tokenizer),
        template=template_sha256(tmp_path / "a.jinja"),
    )
    alpha = {"alpha": {"data": [str(split)]}}
    terms = {"document_masking": True, "silos": alpha}
    ours = tiny_config(tmp_path / "ours", chat_template=str(tmp_path / "a.jinja"), **terms)
    check_silo(ours, "alpha")
    assert num_sequences(ours, "alpha") == read_manifest(split).num_tokens // 16  # each row is one
    contract = first_contract(build_contract(ours))
    check_same_contract(build_contract(ours), contract, "store")
    theirs = tiny_config(tmp_path / "theirs", chat_template=str(tmp_path / "b.jinja"), **terms)
    assert "chat_template_sha256 is " in one_line_error(check_same_contract, build_contract(theirs), contract, "store")
    assert "was prepared with another template than the contract's" in one_line_error(check_silo, theirs, "alpha")
    without = tiny_config(tmp_path / "without", **terms)
    assert "chat_template_sha256 is null here" in one_line_error(
        check_same_contract, build_contract(without), contract, "store"
    )
    message = one_line_error(load_config, [tmp_path / "ours" / "tiny.yaml"], ["document_masking=false"])
    assert message == (
        "document_masking: False given; allowed: true with chat_template, as conversations are kept apart"
    )
