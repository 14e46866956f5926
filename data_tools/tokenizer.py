"""The tokenizer that all silos share: byte-level BPE, trained once; every silo packs its own text with it."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pretrain.config.errors import ConfigError
from pretrain.silo.shards import END_OF_TEXT_NAMES, TEMPLATE_FILE, atomic_path, tokenizer_sha256
from pretrain.silo.vocabulary import read_tokenizer, vocab_size_of

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = END_OF_TEXT_NAMES[0]
# ChatML: what begins and ends a turn. https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
BYTE_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# Characters that few vocabularies have.
UNUSUAL_TEXT = "a \u0378 \u2603 \U000e0fff \x00 \U0001f9ff"
# Words whose tokens a tokenizer keeps, in some 30 MB. The library's own 10,000 are soon full.
REMEMBERED_WORDS = 100_000
# Some 120 MB of text to learn from.
MAX_OCCURRENCES = 20_000_000
REPEATS_AT_ONCE = 10_000


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, output: Path, chat: bool = False) -> Path:
    """Train on `texts` and write `output`/tokenizer.json; returns that file. Equal texts give equal files.

    Its vocabulary is the 256 bytes, the end-of-text token and merges, `vocab_size` in all; with `chat` CHAT_TOKENS,
    too, and a chat template that writes them lies beside it. Raises ConfigError when
    `vocab_size` is too small for the bytes or too large for the texts, or when another tokenizer is already there.
    """
    tokenizer = _byte_level_bpe(texts, vocab_size, pre_tokenizers.ByteLevel(add_prefix_space=False), chat)
    return _save(tokenizer, vocab_size=vocab_size, output=output, enough="the text is enough", chat=chat)


def train_from_counts(
    counts: Mapping[str, int], *, vocab_size: int, output: Path, chat: bool = False
) -> tuple[Path, int]:
    """Train on merged counts of pre-tokens and write `output`/tokenizer.json, as `train_tokenizer` does.

    Returns the file, and by what the counts were divided (1: not at all). From the counts of all pre-tokens of a text
    comes the same file as from the text. Raises ConfigError as `train_tokenizer` does.
    """
    tokenizer, divisor = bpe_from_counts(counts, vocab_size=vocab_size, chat=chat)
    return _save(tokenizer, vocab_size=vocab_size, output=output, enough="the counts are enough", chat=chat), divisor


def bpe_from_counts(counts: Mapping[str, int], *, vocab_size: int, chat: bool = False) -> tuple[Tokenizer, int]:
    """The tokenizer of `train_from_counts`, smaller than `vocab_size` where the counts are not enough, and the divisor.

    The library learns from text only, so every pre-token is written down as often as it occurs. When that would be more
    than MAX_OCCURRENCES in all, the counts are divided by a whole number, each rounded up. Raises ConfigError when
    `vocab_size` is too small for the bytes.
    """
    divisor = max(1, -(-sum(counts.values()) // MAX_OCCURRENCES))
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def texts() -> Iterator[str]:
        for pretoken, count in counts.items():
            [(symbols, _)] = as_bytes.pre_tokenize_str(pretoken)
            num_left = -(-count // divisor)
            while num_left > 0:
                yield f"{symbols} " * min(num_left, REPEATS_AT_ONCE)
                num_left -= REPEATS_AT_ONCE

    # None of the 256 symbols that stand for bytes is white space.
    return _byte_level_bpe(texts(), vocab_size, pre_tokenizers.WhitespaceSplit(), chat), divisor


def _byte_level_bpe(texts: Iterable[str], vocab_size: int, learn_from: Any, chat: bool) -> Tokenizer:
    """Train on the pieces that the pre-tokenizer `learn_from` cuts `texts` into."""
    special_tokens = [END_OF_TEXT, *(CHAT_TOKENS if chat else ())]
    smallest = len(BYTE_ALPHABET) + len(special_tokens)
    if vocab_size < smallest:
        ends = "ends of text and turns" if chat else "end of text"
        raise ConfigError(f"--vocab-size: {vocab_size} given; allowed: {smallest} (all bytes, {ends}) or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = learn_from
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=BYTE_ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _save(tokenizer: Tokenizer, *, vocab_size: int, output: Path, enough: str, chat: bool) -> Path:
    if tokenizer.get_vocab_size() < vocab_size:
        raise ConfigError(
            f"--vocab-size: {vocab_size} given; {enough} for {tokenizer.get_vocab_size()}: "
            "add text or lower --vocab-size"
        )
    file = output / TOKENIZER_FILE
    with atomic_path(file) as temporary:
        tokenizer.save(str(temporary))
        if file.exists() and tokenizer_sha256(file) != tokenizer_sha256(temporary):
            raise ConfigError(f"--output: {file} is another tokenizer: delete it or choose another --output")
    if chat:
        with atomic_path(output / TEMPLATE_FILE) as temporary:
            temporary.write_bytes((files("data_tools") / "chatml.j2").read_bytes())
            there = output / TEMPLATE_FILE
            if there.exists() and there.read_bytes() != temporary.read_bytes():
                raise ConfigError(f"--output: {there} is another template: delete it or choose another --output")
    return file


def tokenizer_file(path: Path) -> Path:
    """The tokenizer.json that `path` is or holds."""
    return path / TOKENIZER_FILE if path.is_dir() else path


def load_tokenizer(file: Path, *, key: str = "--tokenizer") -> Tokenizer:
    """Read a tokenizer.json to encode whole documents with, as plain text.

    What the file says about truncation and padding is switched off, and a special token's name within a text is
    encoded as the characters it has. Raises ConfigError, naming `key`, when the file is missing or is no tokenizer.
    """
    tokenizer = read_tokenizer(file, key=key)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if isinstance(tokenizer.model, models.BPE | models.Unigram):
        tokenizer.model._resize_cache(REMEMBERED_WORDS)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer, *, key: str = "--tokenizer") -> int:
    """The id of the token that ends a document. Raises ConfigError when the tokenizer has none that we know."""
    ids = (tokenizer.token_to_id(name) for name in END_OF_TEXT_NAMES)
    for token_id in ids:
        if token_id is not None:
            return int(token_id)
    raise ConfigError(f"{key}: no end-of-text token; allowed: one of {' '.join(END_OF_TEXT_NAMES)}")


class PlainText:
    """Encodes documents so that nothing in them becomes a special token, whatever they spell.

    The library sees to that where a token is marked as special and no piece of the model's vocabulary. Text that spells
    another one is cut in the middle of its name, and what is before and after is encoded by itself.
    """

    def __init__(self, file: Path, *, key: str = "--tokenizer") -> None:
        """Of a tokenizer.json. Raises ConfigError as `load_tokenizer` does, or when it ends documents by itself."""
        self._tokenizer = load_tokenizer(file, key=key)
        self.end_id = end_of_text_id(self._tokenizer, key=key)
        self.vocab_size = vocab_size_of(self._tokenizer)
        self._key = key
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._names = {number: token.content for number, token in added if token.special and token.content}
        self._names[self.end_id] = str(self._tokenizer.id_to_token(self.end_id))
        self._spelled = re.compile("|".join(map(re.escape, self._names.values())))
        list(self.encode([UNUSUAL_TEXT, *(f"a {name}b{name}" for name in self._names.values())]))

    def encode(self, texts: list[str]) -> Iterator[list[int]]:
        """The token ids of each text, without an end."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, document in zip(texts, encoded, strict=True):
            ids = document.ids
            is_plain = self.end_id not in ids and not self._spelled.search(text)
            yield ids if is_plain else self._cut(text)

    def _cut(self, text: str) -> list[int]:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        cuts = [0]
        for number, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if number == self.end_id or self._names.get(number, text) in text[begin:end]:
                if end - begin > 1:
                    cuts.append((begin + end) // 2)
                elif number == self.end_id:
                    raise ConfigError(
                        f"{self._key}: it makes {self._names[number]!r}, which ends documents, of {text[begin:end]!a} "
                        "in their text; allowed: a tokenizer whose unknown token is another one"
                    )
        if len(cuts) == 1:
            return encoded.ids
        pieces = [text[begin:end] for begin, end in itertools.pairwise([*cuts, len(text)])]
        return [number for ids in self.encode(pieces) for number in ids]
