"""What an institution finds out before it joins a federation: from the store, and on its own machine.

Nothing is written but a probe into the store, which is deleted again.
"""

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config.check import RUN_NAME, check_config
from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.config.load import Section, load_unchecked
from pretrain.exchange.agreement import adding
from pretrain.exchange.options import is_directory, store_options
from pretrain.exchange.store import StoreExchange, version_path
from pretrain.federation.preflight import PROBE
from pretrain.federation.room import silo_disk_bytes
from pretrain.host.foreign import shown
from pretrain.host.identity import known_identity
from pretrain.silo.shards import template_sha256, tokenizer_sha256
from pretrain.trust.contract import (
    GATE,
    PRACTICE,
    RUN,
    SOFTWARE,
    TEMPLATE,
    agreed_settings,
    build_contract,
    check_same_contract,
    check_same_terms,
    contract_bytes,
    read_contract,
    without_operator,
)
from pretrain.trust.ledger import RefusedError
from pretrain.trust.seal import sealed_bytes

PROBE_BYTES = 8 << 20
COLLECTIVE = {"kind": "collective", "url": "tcp://localhost:1"}  # wherever it was
# A contract comes from others and goes into file names, batch scripts and what builds the model.
CODE_KEYS = ("auto_map", "trust_remote_code")
# What a contract may make this machine count and build before anything else can be compared.
MAX_SILOS, MAX_LAYERS, MAX_ENTRIES, MAX_NUMBER = 1000, 1000, 4000, 1 << 31


@dataclass(frozen=True, kw_only=True)
class Federation:
    """A store, and the contract in it."""

    url: str
    options: dict[str, Any]
    """What fsspec is told."""
    exchange: StoreExchange
    contract: bytes
    terms: dict[str, Any]
    settings: Section
    """The terms as keys of a configuration, ..."""
    agreed: RunConfig
    """... and with the defaults of all others, for showing."""
    software: dict[str, str]
    """Package to the version that the aggregator had when the run began."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the contract's model takes here."""

    num_parameters: int
    sync_bytes: tuple[int, int]
    """Sent and received with the largest fragment."""
    sent_bytes: int
    """From now to the end, if the silo takes part in every version."""
    disk_bytes: int
    """Checkpoints, and files on their way, less what is there already."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Measured bits a second to the store and back."""

    up: float
    down: float

    def seconds(self, num_bytes: tuple[int, int]) -> float:
        """To send and then receive as many bytes."""
        return 8 * (num_bytes[0] / self.up + num_bytes[1] / self.down)


def find_federation(url: str, paths: Sequence[Path], overrides: Sequence[str]) -> Federation:
    """Read the contract at `url`, with the exchange options of the silo's own configuration. Raises ConfigError."""
    url, own = _absolute(url), load_unchecked(paths, overrides)
    if own.exchange.kind != "store":
        raise ConfigError(f"exchange.kind: {own.exchange.kind!r} given; a silo can join only a run through a 'store'")
    options = store_options(own.exchange, url)
    exchange = StoreExchange(url, options=options)
    contract = exchange.read_contract()
    if contract is None:
        raise ConfigError(f"store: {url!r} given; there is no run in it (no contract.json)")
    terms, software, settings, agreed = read_terms(contract, url)
    return Federation(
        url=url,
        options=options,
        exchange=exchange,
        contract=contract,
        terms=terms,
        settings=settings,
        agreed=agreed,
        software=software,
    )


def read_terms(
    contract: bytes, url: str, *, of_collective: bool = False
) -> tuple[dict[str, Any], dict[str, str], Section, RunConfig]:
    """Terms and software of a contract, and the terms as a section and as a configuration; see `Federation`.

    Raises ConfigError for what no machine should build, for a contract of another version of atoll, and for one of a
    collective, by its keys, unless whoever asks can use that, too.
    """
    terms, software = read_contract(contract, url)
    _check_harmless(terms, software, url)
    _check_lengths(terms, url)
    settings = _settings(terms, url)
    agreed = _agreed(settings, url)
    if agreed.exchange.kind == "collective" and not of_collective:
        raise ConfigError(f"store: {url!r} given; it is a silo's own ledger of a collective; allowed: a store")
    return terms, software, settings, agreed


def _absolute(url: str) -> str:
    """A directory is named from the root on: a job starts elsewhere."""
    return str(Path(url).absolute()) if is_directory(url) and "://" not in url else url


def _check_harmless(terms: dict[str, Any], software: dict[str, str], url: str) -> None:
    """Refuse what would be more than a value here: interpolations, control characters, code from elsewhere."""
    texts = [text for key, value in _pairs([terms, software]) for text in (key, value) if isinstance(text, str)]
    wrong = [text for text in texts if "${" in text or not text.isprintable()]
    wrong += [name for name in [str(terms.get("name"))] if not RUN_NAME.fullmatch(name)]
    for key, value in _pairs(terms.get("model")):
        if key in CODE_KEYS or (key.endswith("_implementation") and "/" in str(value)):  # of a repository
            wrong.append(key)
    if wrong:
        raise ConfigError(
            f"store: {url!r} given; its contract.json holds '{shown(wrong[0])}', which no silo should take over"
        )


def _check_lengths(terms: dict[str, Any], url: str) -> None:
    """Refuse what would take this machine hours, or all its memory, to build."""
    model = terms.get("model")
    given = [("roster", terms.get("roster"), MAX_SILOS)]
    given += [(key, value, MAX_ENTRIES) for key, value in _pairs(model) if isinstance(value, list | dict)]
    found: list[tuple[str, float, int]] = [
        (key, len(value), most) for key, value, most in given if isinstance(value, list | dict)
    ]
    # Layers and experts are modules, each; all else is a size of tensors without memory.
    for key, value in _pairs(model):
        if isinstance(value, int | float):
            found.append((key, value, MAX_LAYERS if "layer" in key or "expert" in key else MAX_NUMBER))
    for key, number, most in found:
        if number > most:
            raise ConfigError(
                f"store: {url!r} given; its contract.json has {shown(key)} of {number:g}; allowed: up to {most:,}"
            )


def _pairs(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value at any depth, and its key."""
    yield key, value
    if isinstance(value, dict):
        for inner_key, inner in value.items():
            yield from _pairs(inner, inner_key)
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner, key)


def _settings(terms: dict[str, Any], url: str) -> Section:
    """The contract as a section of a configuration. Raises ConfigError if it lacks a term."""
    try:
        model, _ = terms["model"], terms["tokenizer_sha256"]
        settings = {key: terms[key] for key in (*agreed_settings(RunConfig()), *({GATE, PRACTICE} & terms.keys()))}
        given = ("adapter", "seed") if "adapter" in model else () if "checkpoint" in model else ("config", "seed")
        ours = {key: model[key] for key in given}
    except (KeyError, TypeError) as error:
        raise _unknown(url, f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)) from None
    return settings | {"model": ours, "exchange": {"url": url}}


def _agreed(settings: Section, url: str) -> RunConfig:
    """The same as everybody sees it, with silos as the defaults make them. Raises ConfigError for what cannot be."""
    try:
        model = settings["model"]
        below = settings | {"model": model if "config" in model else {"checkpoint": "."} | model}
        below |= {"silos": dict.fromkeys(settings["roster"])}
        if without_operator(settings["trust"]["keys"]):
            below |= {"exchange": COLLECTIVE}
        agreed = load_unchecked([], below=below)
        check_config(agreed)
    except (ConfigError, TypeError) as error:
        raise _unknown(url, str(error)) from None
    return agreed


def _unknown(url: str, what: str) -> ConfigError:
    return ConfigError(f"store: {url!r} given; its contract.json is not of this version of atoll: {what}")


def know_added(config: RunConfig, exchange: StoreExchange) -> None:
    """Put into `trust.added` those silos of this machine that an amendment adds, whether it holds yet or not."""
    for silo in config.silos.keys() - {*config.agreed_roster, *config.trust.added}:
        first = exchange.members.first_keys.get(silo)
        new = adding(exchange, silo) if first is None and exchange.members.keys else None
        if key := new.amendment.new_key[1] if new and new.amendment.new_key else first:
            config.trust.added[silo] = key.text


def joined_config(federation: Federation, paths: Sequence[Path], overrides: Sequence[str]) -> RunConfig:
    """The silo's own configuration with the contract's terms under it; raises ConfigError unless both are one."""
    terms, url = federation.terms, federation.url
    config = load_unchecked(paths, overrides, below=federation.settings)
    know_added(config, federation.exchange)
    agreed = agreed_settings(config)
    check_same_terms(agreed, {key: terms.get(key) for key in agreed}, url)  # before a wrong value blames a right one
    if "checkpoint" in terms["model"] and not config.model.checkpoint:
        raise ConfigError(
            f"model.checkpoint: null given; this federation goes on from {len(terms['model']['checkpoint'])} files; "
            "allowed: a directory that has them"
        )
    if strangers := sorted(config.silos.keys() - {*config.full_roster}):
        raise ConfigError(
            f"silos: {strangers[0]!r} given; allowed: names of the roster: {named(config.full_roster)}; a member adds "
            f"another by atoll contract amend {url} ... trust.keys.{strangers[0]}=... (docs/clusters.md)"
        )
    check_config(config)
    given = _absolute(config.exchange.url)
    if given != url and (is_directory(url) or not is_directory(given)):
        raise ConfigError(
            f"exchange.url: {given!r} given; allowed: {url!r}, or a relay's directory for nodes that do not reach it"
        )
    config.exchange.url = given
    if len(config.silos) != 1:
        raise ConfigError(f"silos: {', '.join(config.silos)} given; allowed: one, this institution's")
    tokenizer = tokenizer_sha256(config.tokenizer_file)
    if tokenizer != terms["tokenizer_sha256"]:
        raise ConfigError(
            f"tokenizer: {config.tokenizer!r} given, with sha256 {tokenizer[:12]}; allowed: the federation's, with "
            f"{str(terms['tokenizer_sha256'])[:12]}"
        )
    if template_sha256(config.template_file) != (theirs := terms.get(TEMPLATE, "")):
        allowed = f"the federation's, with {str(theirs)[:12]}" if theirs else "none, as it trains on text"
        raise ConfigError(
            f"chat_template: {config.chat_template or 'none'} given, another template than the contract's; "
            f"allowed: {allowed}"
        )
    ours = build_contract(config)
    check_same_contract(ours, federation.contract, url)
    record = {SOFTWARE: federation.software} if federation.software else {}
    record[RUN] = terms[RUN]
    if contract_bytes(ours | record) != federation.contract:
        raise ConfigError(f"store: {url!r} given; its contract.json says the same in other bytes than atoll's")
    return config


# ---- checks


def takes_part_already(federation: Federation, config: RunConfig, silo: str) -> bool:
    """Whether this run directory has the silo's name in the store. Raises ConfigError if another has it."""
    return federation.exchange.has_name(silo, known_identity(config.silo_directory(silo)))


def measure_size(federation: Federation, config: RunConfig, silo: str, newest: int | None) -> Size:
    """How large the model is and what it moves. Raises ConfigError if version 0 is not the model that is built here.

    `newest` is the newest version; None if there is none yet.
    """
    from pretrain.plan.bytes import fragments, model_shapes, payload_bytes, traffic, vocabulary
    from pretrain.silo.architecture import model_config
    from pretrain.silo.model import check_shapes

    there: dict[int, int] | None = None
    try:
        if newest is not None:
            there = {payload.fragment: payload.num_bytes for payload in federation.exchange.read_commit(0).payloads}
    except RefusedError as error:
        raise ConfigError(f"store: {federation.url!r} given; {error}") from None
    other = ConfigError(
        f"store: {federation.url!r} given; its {version_path(0)} has other parameters than this model; do all parties "
        "have the same version of transformers?"
    )
    vocab_size = vocabulary(config)
    sizes = model_config(config.model, vocab_size)
    layers, width = (getattr(sizes, name, 0) for name in ("num_hidden_layers", "hidden_size"))
    is_counted = isinstance(layers, int) and isinstance(width, int) and not config.model.adapter.is_on
    if there and is_counted and 4 * layers * width > sum(there.values()):
        raise other  # before it is built: every layer has a vector at least, of 4 bytes a number
    check_shapes(config.model, vocab_size, config.sequence_tokens)
    shapes = model_shapes(config, vocab_size)
    here = {fragment: payload_bytes("fp32", part) for fragment, part in enumerate(fragments(config, shapes))}
    if config.trust.seal:
        here = {fragment: sealed_bytes(num_bytes) for fragment, num_bytes in here.items()}
    if there not in (None, here):
        raise other
    moved, schedule = traffic(config, shapes, silo), config.schedule
    largest = max(moved, key=lambda one: one.num_elements)
    coming = range((newest or 0) + 1, schedule.num_versions + 1)
    return Size(
        num_parameters=sum(shape.numel() for shape in shapes.values()),
        sync_bytes=(largest.sent_bytes, largest.received_bytes),
        sent_bytes=sum(moved[schedule.fragment(version)].sent_bytes for version in coming),
        disk_bytes=silo_disk_bytes(config, silo, shapes),
    )


def num_gpus() -> int:
    """GPUs of this machine that torch sees."""
    import torch

    return torch.cuda.device_count()


def measure_link(federation: Federation) -> Link:
    """Write an object that cannot be compressed to the store, read it back, and delete it. Raises ConfigError."""
    objects, probe, data = federation.exchange.objects, f"{PROBE}{uuid.uuid4().hex}", os.urandom(PROBE_BYTES)
    try:
        began = time.monotonic()
        objects.write(probe, data)
        written = time.monotonic()
        objects.read(probe, limit_bytes=PROBE_BYTES)
        read = time.monotonic()
    except BaseException:
        with suppress(ConfigError):
            objects.delete(probe)
        raise
    objects.delete(probe)
    return Link(up=8 * PROBE_BYTES / (written - began), down=8 * PROBE_BYTES / (read - written))
