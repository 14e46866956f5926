"""Splits of conversations: rows, masks, what is written of them, what is read, and what is refused."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.errors import ConfigError
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
    trained,
    verify_shards,
    write_manifest,
)
from pretrain.silo.verify import verify_tokens
from pretrain.silo.writer import SplitWriter
from tests.chats import END, TEMPLATE, Conversation, append, conversations, packed_rows, write_chat

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
    for raw, expected in ((b" \n", "which is empty"), (b"\xff", "it is no text in UTF-8")):
        file.write_bytes(raw)
        with pytest.raises(ConfigError, match=rf"chat_template: .*given[;,] {expected}; allowed: a chat template"):
            template_sha256(file)
    with pytest.raises(ConfigError, match=r"there is no such file; allowed: a chat .* or a folder with a chat"):
        template_sha256(tmp_path / "nowhere")
