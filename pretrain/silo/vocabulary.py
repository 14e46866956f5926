"""The tokenizer of a run, as all who need it read it, and how many tokens it has. No torch."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from pretrain.config.errors import ConfigError
from pretrain.host.foreign import shown
from pretrain.silo.shards import tokenizer_sha256


def read_tokenizer(file: Path, *, key: str = "tokenizer") -> Tokenizer:
    """A tokenizer.json as it is. Raises ConfigError, naming `key`, when it is missing or is no tokenizer."""
    tokenizer_sha256(file, key=key)
    try:
        with _silent_library():
            return Tokenizer.from_file(str(file))
    except BaseException as error:  # the library raises nothing narrower than Exception, and panics beyond that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{key}: {file} is not a tokenizer ({shown(' '.join(str(error).split()))})") from None


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """One more than the largest token id: ids may have gaps, and a model needs a row for each up to the last."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def vocabulary_size(file: Path, *, key: str = "tokenizer") -> int:
    """`vocab_size_of` a tokenizer.json. Raises ConfigError as `read_tokenizer` does."""
    return vocab_size_of(read_tokenizer(file, key=key))


@contextlib.contextmanager
def _silent_library() -> Iterator[None]:
    """The library prints where it panics to the process's stderr, beside raising an error."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
