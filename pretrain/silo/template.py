"""A tokenizer's own chat template, and the special tokens that a template may name; imports no torch."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pretrain.config.errors import ConfigError
from pretrain.host.foreign import shown
from pretrain.silo.shards import END_OF_TEXT_NAMES, TEMPLATE_FILE, template_text
from pretrain.silo.vocabulary import read_tokenizer

CONFIG_FILE = "tokenizer_config.json"
NAMED = re.compile(r"(bos|eos|pad|unk|sep|cls|mask)_token")


def special_tokens(tokenizer_file: Path, *, key: str = "tokenizer") -> dict[str, str]:
    """bos_token, eos_token and so on, as the tokenizer's configuration beside it has them; without one both are the end
    of text.

    Whoever renders a template has these and no others, so that it says the same everywhere. Raises ConfigError, naming
    `key`.
    """
    config = _configuration(tokenizer_file, key)
    if config is None:
        vocabulary = read_tokenizer(tokenizer_file, key=key).get_vocab()
        name = next((one for one in END_OF_TEXT_NAMES if one in vocabulary), "")
        return {"bos_token": name, "eos_token": name}
    try:
        found = {
            name: str(value if isinstance(value, str) else value["content"])
            for name, value in config.items()
            if NAMED.fullmatch(name) and value is not None
        }
    except (LookupError, TypeError) as error:
        raise _no_configuration(tokenizer_file, key, error) from None
    return dict(sorted(found.items()))


def own_template(tokenizer_file: Path, *, key: str = "tokenizer") -> tuple[str, Path] | None:
    """The template that lies beside a tokenizer, or else is in its configuration, and the file that it is from.

    Raises ConfigError, naming `key`, for a file that is none.
    """
    if (file := tokenizer_file.with_name(TEMPLATE_FILE)).is_file():
        return read_template(file, key=key), file
    given = (_configuration(tokenizer_file, key) or {}).get("chat_template") or ""
    try:
        source = given if isinstance(given, str) else {one["name"]: one["template"] for one in given}["default"]
    except (LookupError, TypeError) as error:
        raise _no_configuration(tokenizer_file, key, error) from None
    return (str(source), tokenizer_file.with_name(CONFIG_FILE)) if source else None


def read_template(file: Path, *, key: str) -> str:
    """`template_text` of a file. Raises ConfigError, naming `key`."""
    try:
        return template_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {str(file)!r} given; {shown(error)}; allowed: a file") from None


def sha256_of(source: str) -> str:
    """What names a template, in contracts and manifests, in hexadecimal."""
    return hashlib.sha256(source.encode()).hexdigest()


def _configuration(tokenizer_file: Path, key: str) -> dict[str, Any] | None:
    if not (file := tokenizer_file.with_name(CONFIG_FILE)).is_file():
        return None
    try:
        found = json.loads(file.read_bytes())  # many have a model_max_length of 1e30, as a whole number
    except (OSError, ValueError, RecursionError) as error:
        raise _no_configuration(tokenizer_file, key, error) from None
    if not isinstance(found, dict):
        raise _no_configuration(tokenizer_file, key, "no object")
    return found


def _no_configuration(tokenizer_file: Path, key: str, why: object) -> ConfigError:
    file = tokenizer_file.with_name(CONFIG_FILE)
    return ConfigError(f"{key}: {file} is no tokenizer's configuration ({shown(why)})")
