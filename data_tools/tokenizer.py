"""The tokenizer that all silos share: byte-level BPE, trained once; every silo packs its own text with it."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pretrain.config.check import ConfigError
from pretrain.silo.shards import END_OF_TEXT_NAMES, atomic_path, tokenizer_sha256

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = END_OF_TEXT_NAMES[0]
BYTE_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# Some 120 MB of text to learn from.
MAX_OCCURRENCES = 20_000_000
REPEATS_AT_ONCE = 10_000


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, output: Path) -> Path:
    """Train on `texts` and write `output`/tokenizer.json; returns that file. Equal texts give equal files.

    Its vocabulary is the 256 bytes, the end-of-text token and merges, `vocab_size` in all. Raises ConfigError when
    `vocab_size` is too small for the bytes or too large for the texts, or when another tokenizer is already there.
    """
    tokenizer = _byte_level_bpe(texts, vocab_size, pre_tokenizers.ByteLevel(add_prefix_space=False))
    return _save(tokenizer, vocab_size=vocab_size, output=output, enough="the text is enough")


def train_from_counts(counts: Mapping[str, int], *, vocab_size: int, output: Path) -> tuple[Path, int]:
    """Train on merged counts of pre-tokens and write `output`/tokenizer.json, as `train_tokenizer` does.

    Returns the file, and by what the counts were divided (1: not at all). From the counts of all pre-tokens of a text
    comes the same file as from the text. Raises ConfigError as `train_tokenizer` does.
    """
    tokenizer, divisor = bpe_from_counts(counts, vocab_size=vocab_size)
    return _save(tokenizer, vocab_size=vocab_size, output=output, enough="the counts are enough"), divisor


def bpe_from_counts(counts: Mapping[str, int], *, vocab_size: int) -> tuple[Tokenizer, int]:
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
    return _byte_level_bpe(texts(), vocab_size, pre_tokenizers.WhitespaceSplit()), divisor


def _byte_level_bpe(texts: Iterable[str], vocab_size: int, learn_from: Any) -> Tokenizer:
    """Train on the pieces that the pre-tokenizer `learn_from` cuts `texts` into."""
    smallest = len(BYTE_ALPHABET) + 1
    if vocab_size < smallest:
        raise ConfigError(f"--vocab-size: {vocab_size} given; allowed: {smallest} (all bytes, end of text) or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = learn_from
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=BYTE_ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _save(tokenizer: Tokenizer, *, vocab_size: int, output: Path, enough: str) -> Path:
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
    return file


def tokenizer_file(path: Path) -> Path:
    """The tokenizer.json that `path` is or holds."""
    return path / TOKENIZER_FILE if path.is_dir() else path


def load_tokenizer(file: Path, *, key: str = "--tokenizer") -> Tokenizer:
    """Read a tokenizer.json to encode whole documents with, as plain text.

    What the file says about truncation and padding is switched off, and a special token's name within a text is
    encoded as the characters it has. Raises ConfigError, naming `key`, when the file is missing or is no tokenizer.
    """
    tokenizer_sha256(file, key=key)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
        raise ConfigError(f"{key}: {file} is not a tokenizer ({' '.join(str(error).split())})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """One more than the largest token id (added tokens may leave gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_text_id(tokenizer: Tokenizer, *, key: str = "--tokenizer") -> int:
    """The id of the token that ends a document. Raises ConfigError when the tokenizer has none that we know."""
    ids = (tokenizer.token_to_id(name) for name in END_OF_TEXT_NAMES)
    for token_id in ids:
        if token_id is not None:
            return int(token_id)
    raise ConfigError(f"{key}: no end-of-text token; allowed: one of {' '.join(END_OF_TEXT_NAMES)}")
