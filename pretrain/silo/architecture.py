"""What a model's configuration may say: checked key by key, and run once through all shapes without memory."""

import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig
from pretrain.host.foreign import shown

# Not of one type of model: which implementation computes, and names that rope_parameters had.
COMPUTING = ("attn_implementation", "experts_implementation")
OLD_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")
OLD_ROPE_KEYS = ("type", "alpha", "long_mscale", "short_mscale")
# Every configuration has these, and they do nothing for a model that is trained here.
WITHOUT_EFFECT = {field.name for field in dataclasses.fields(PretrainedConfig)}
NAME = re.compile(r"[a-z][a-z0-9_]*")  # another implementation could be of a repository


def model_config(settings: ModelConfig, vocab_size: int) -> PretrainedConfig:
    """The `transformers` configuration; a missing vocab_size is the tokenizer's `vocab_size`.

    Raises ConfigError for an unknown model type or key, a wrong value, a vocabulary smaller than the tokenizer's, or
    a loss of the model's own, which would not be trained.
    """
    key = "model.checkpoint" if settings.checkpoint else "model.config"
    if not settings.checkpoint:
        check_keys(settings.config)
    try:
        if settings.checkpoint:
            config = AutoConfig.from_pretrained(settings.checkpoint, local_files_only=True, trust_remote_code=False)
        else:
            given: dict[str, Any] = {"vocab_size": vocab_size, **settings.config}
            config = AutoConfig.for_model(**given)
    except Exception as error:  # each type of model has checks of its own, and raises what it likes
        raise ConfigError(f"{key}: {one_line(error)}") from None
    _check_type(config.model_type, f"{key}.model_type" if settings.config else f"{key}: model_type")
    has = getattr(config, "vocab_size", None)
    if not isinstance(has, int) or config.get_text_config() is not config:
        raise ConfigError(
            f"{key}: {config.model_type} given, which is not of text alone; allowed: a model of text alone"
        )
    if has < vocab_size:
        raise ConfigError(f"model.config.vocab_size: {has} given; allowed: {vocab_size} (the tokenizer's) or more")
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and not -has <= pad < has:
        raise ConfigError(
            f"{key}.pad_token_id: {pad} given; allowed: null (packed text has no padding), or below {has}"
        )
    if getattr(config, "output_router_logits", False):
        raise ConfigError(
            f"{key}: output_router_logits: true given; the load-balancing loss that it asks for is not trained here; "
            f"allowed: false{f' (in {settings.checkpoint}/config.json)' if settings.checkpoint else ''}"
        )
    return config


def check_keys(given: dict[str, Any]) -> None:
    """Raise ConfigError for a key that the model type's configuration does not have, with the nearest that it has."""
    kind = given.get("model_type")
    _check_type(kind, "model.config.model_type")
    cls = CONFIG_MAPPING[str(kind)]
    own = {field.name for field in dataclasses.fields(cls)} - WITHOUT_EFFECT
    known = {name for name in {*own, *cls.attribute_map} if not name.startswith("_")}
    known |= {
        "model_type",
        "vocab_size",
        "tie_word_embeddings",
        *COMPUTING,
        *(OLD_ROPE if "rope_parameters" in own else ()),
    }
    read = {name for name in given if name not in known and _is_read(str(name), cls)}
    _check_known(given, known | read, "model.config", f"keys of {kind}")
    for name in COMPUTING:
        value = given.get(name)
        if value is not None and not (isinstance(value, str) and NAME.fullmatch(value)):
            raise ConfigError(f"model.config.{name}: {value!r} given; allowed: a name, as eager or sdpa")
    for name in ("rope_parameters", "rope_scaling"):
        _check_rope(given.get(name), f"model.config.{name}")


def _is_read(name: str, cls: type[PretrainedConfig]) -> bool:
    """Whether code of the model reads a key that its configuration does not declare, as some do with head_dim."""
    if name in WITHOUT_EFFECT or not NAME.fullmatch(name) or hasattr(cls, name):
        return False
    modules = sys.modules[cls.__module__], sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[cls].__module__]
    read = re.compile(rf"\bconfig\.{name}\b|config, \"{name}\"|kwargs\.(pop|get)\(\"{name}\"")
    return any(read.search(inspect.getsource(module)) for module in modules)


def _check_rope(given: Any, key: str) -> None:
    """Its keys, which transformers only warns of; of one kind of layer after another, where it is said for each."""
    if given is None:
        return
    if not isinstance(given, dict):
        raise ConfigError(f"{key}: {given!r} given; allowed: a section of keys and values")
    if given and all(isinstance(value, dict) for value in given.values()):
        for kind, inner in given.items():
            _check_rope(inner, f"{key}.{kind}")
        return
    _check_known(given, {*RopeParameters.__annotations__, *OLD_ROPE_KEYS}, key, "keys of it")


def _check_known(given: Iterable[str], known: set[str], key: str, allowed: str) -> None:
    for name in given:
        if name not in known:
            names = ", ".join(near(str(name), known)) or ", ".join(sorted(known)[:8]) + ", ..."
            raise ConfigError(f"{key}.{shown(name)}: unknown key given; allowed: {allowed}, such as {names}")


def _check_type(given: Any, key: str) -> None:
    if given not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        names = ", ".join(near(str(given), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)) or "llama, qwen3, gpt2"
        raise ConfigError(f"{key}: {shown(given)!r} given; allowed: a decoder that transformers has, such as {names}")


def near(given: str, known: Iterable[str]) -> list[str]:
    """At most three names that are like the given one."""
    return difflib.get_close_matches(given, list(known), n=3)


def one_line(error: BaseException) -> str:
    """What another's library says, as one line that is not too long."""
    text = shown(" ".join(str(error).split()), limit=300)
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
