"""The global model of a run as a `transformers` directory."""

import json
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from pretrain.config.adapter import PROMPT
from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig, RunConfig
from pretrain.exchange.history import History
from pretrain.exchange.options import store_options
from pretrain.exchange.payload import read_parameters
from pretrain.exchange.sealed import read_as_a_member
from pretrain.exchange.store import StoreExchange
from pretrain.federation.card import CARD, check_license, model_card
from pretrain.federation.current import about_gate
from pretrain.host.foreign import loads
from pretrain.outer.digest import digest_tensors
from pretrain.silo.adapter import merge_adapter
from pretrain.silo.base import fill_base
from pretrain.silo.exported import export, save_tokenizer, with_tokenizer
from pretrain.silo.model import (
    build_empty,
    build_without_memory,
    load_checkpoint,
    trained_parameters,
)
from pretrain.silo.peft_directory import CONFIG as ADAPTER_CONFIG
from pretrain.silo.peft_directory import read_factors, read_settings, save_adapter
from pretrain.silo.shards import atomic_path, file_sha256
from pretrain.silo.vocabulary import vocabulary_size
from pretrain.silo.weights import checkpoint_files
from pretrain.trust.contract import check_same_terms, model_terms, read_contract
from pretrain.trust.ledger import RefusedError, sha256_bytes
from pretrain.trust.policy import is_public

PROVENANCE = "atoll.json"
PROMPT_TOKENS = "prompt_tokens"  # there, of a run that trained a prompt
disable_progress_bar()  # transformers' bars for a single file are noise


def load_global_model(config: RunConfig, version: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The fp32 model of `version` (None: the newest), checked against its commit, and where it comes from.

    An adapter is merged into its base. Of a run whose one silo trained alone, that silo's final model. Raises
    ConfigError if there is no such version, or its bytes are not what the commit says.
    """
    model, parameters = empty_model(config)
    fill = _fill(config)
    provenance = origin(config) | fill(config, parameters, version)
    return finished(model, config), provenance


def finished(model: nn.Module, config: RunConfig) -> nn.Module:
    """What others load, once its trained parameters are filled: with an adapter, that merged into its base.

    A prompt stays beside its base, as it is in no matrix of it.
    """
    if config.model.checkpoint and config.model.adapter.is_on:
        fill_base(model, config.model.checkpoint)
        if config.model.adapter.kind != PROMPT:
            merge_adapter(model)
    return model.eval()


def empty_model(config: RunConfig) -> tuple[nn.Module, dict[str, Tensor]]:
    """The fp32 model of a run, and its trained parameters by name, which are to be filled."""
    model = build_empty(config.model, vocabulary_size(config.tokenizer_file), dtype=torch.float32)
    return model, trained_parameters(model)


def origin(config: RunConfig) -> dict[str, Any]:
    """What an export says of its run, whatever is exported of it."""
    return {
        "run": config.name,
        "sequence_tokens": config.sequence_tokens,
        "document_masking": config.document_masking,
        "eval_sequences": _eval_sequences(config),
        **({PROMPT_TOKENS: prompt_tokens} if (prompt_tokens := config.model.adapter.prompt_tokens) else {}),
    }


def _eval_sequences(config: RunConfig) -> int:
    """What the silos of this machine evaluate on, or the default where they differ."""
    found = {silo.eval_sequences for silo in config.silos.values()}
    return found.pop() if len(found) == 1 else config.silo.eval_sequences


def _fill(config: RunConfig) -> Callable[[RunConfig, dict[str, Tensor], int | None], dict[str, Any]]:
    """What fills trained parameters with those of a version, and says where they come from."""
    return _fill_from_silo if config.exchange.kind == "none" else _fill_from_store


def open_ledger(config: RunConfig) -> StoreExchange:
    """Where a run's commits are. Raises ConfigError where no run is, or that of an adapter beside another base."""
    url = config.ledger_url(min(config.silos))
    exchange = StoreExchange(url, options=store_options(config.exchange, url))
    if (contract := exchange.read_contract()) is None:
        raise ConfigError(f"exchange.url: {url} given; there is no contract.json, so no run, in it")
    if config.model.adapter.is_on:  # the base may be another by now
        terms, _ = read_contract(contract, url)
        check_same_terms({"model": model_terms(config)}, {"model": terms["model"]}, url)
    return exchange


def _fill_from_store(config: RunConfig, parameters: dict[str, Tensor], version: int | None) -> dict[str, Any]:
    exchange = open_ledger(config)
    newest = exchange.newest_version()
    version = newest if version is None else version
    if not 0 <= version <= newest:
        raise ConfigError(f"--version: {version} given; allowed: 0 to {newest}")
    history = History(exchange, config.outer.num_fragments)
    try:
        read_as_a_member(exchange, config)
        commit, gate = exchange.read_commit(version), about_gate(config, exchange, version)
        with tempfile.TemporaryDirectory() as scratch:
            for fragment in range(config.outer.num_fragments):
                made = history.parameters(version, fragment)
                for name, value in read_parameters(exchange, made, Path(scratch)).items():
                    parameters[name].copy_(value)
        if digest_tensors(parameters.items()) != commit.parameters_digest:
            raise RefusedError("its parameters do not have the digest of its commit")
    except RefusedError as error:
        raise ConfigError(f"version {version}: {error} (pruned versions keep only their commit)") from None
    found: dict[str, Any] = {
        "version": version,
        "parameters_digest": commit.parameters_digest,
        "contract_sha256": commit.contract_sha256,
        "commit_sha256": sha256_bytes(commit.to_bytes()),
    }
    if is_public(config, "tokens"):
        found["tokens"] = {silo: exchange.tokens_total(silo, version) for silo in config.full_roster}
    return found | gate


def _fill_from_silo(config: RunConfig, parameters: dict[str, Tensor], version: int | None) -> dict[str, Any]:
    if version is not None or len(config.silos) != 1:
        raise ConfigError("run directory: its silos train alone; allowed: no --version, and a run of one silo")
    (name,) = config.silos
    if not config.final_parameters(name).is_file():
        raise ConfigError(f"run directory: silo {name} has not finished; there is no {config.final_parameters(name)}")
    with safe_open(config.final_parameters(name), framework="pt") as tensors:
        for one in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            parameters[one].copy_(tensors.get_tensor(one))
    found: dict[str, Any] = {"silo": name, "parameters_digest": digest_tensors(parameters.items())}
    if is_public(config, "tokens"):
        batch_tokens = config.silos[name].global_batch_sequences * config.sequence_tokens
        found["tokens"] = {name: config.inner.num_steps * batch_tokens}
    return found


def export_global_model(
    config: RunConfig,
    directory: Path,
    version: int | None = None,
    *,
    form: str = "",
    license: str = "",
    held_out: Callable[[dict[str, Any]], dict[str, str]] = lambda provenance: {},
) -> dict[str, Any]:
    """Write a version as a `transformers` directory with tokenizer and model card; returns its provenance.

    Of an adapter `form` says whether it is `merged` into its base, or, an `adapter`, a directory of peft, as a prompt
    always is. `held_out` is asked what the card says of its loss: corpus to words. Raises ConfigError if `directory` is
    there.
    """
    check_export(config, directory, form, license)
    is_adapter = form == "adapter"
    model, provenance = _load_adapter(config, version) if is_adapter else load_global_model(config, version)
    with writing(directory, key="--output") as temporary:
        if is_adapter:
            write_adapter(model, config, provenance, temporary)
        else:
            write_export(model, config, provenance, temporary)
        told = held_out(provenance)
        write_card(model, config, provenance, temporary, license=license, held_out=told, is_adapter=is_adapter)
    return provenance


def check_export(config: RunConfig, directory: Path, form: str, license: str) -> None:
    """Raise ConfigError for a form that a run does not have, a directory that is there, a license that is no name."""
    if config.model.adapter.kind == PROMPT and form != "adapter":
        raise ConfigError(
            f"{'--merged: given' if form else 'atoll export: no --adapter given'}; this run trained a prompt, which "
            "stands before the text and is in no matrix of the base; allowed: --adapter (a peft directory, without it)"
        )
    if config.model.adapter.is_on and not form:
        raise ConfigError(
            "atoll export: neither --merged nor --adapter given, and this run trained an adapter; allowed: --merged (a "
            "transformers directory, with it in the base's matrices), --adapter (a peft directory, without the base)"
        )
    if form and not config.model.adapter.is_on:
        raise ConfigError(
            f"--{form}: given; this run trained all of its model; allowed: neither --merged nor --adapter"
        )
    if directory.exists():
        raise ConfigError(f"--output: {str(directory)!r} given; it exists already, and nothing is overwritten")
    check_license(license)


def _load_adapter(config: RunConfig, version: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The factors of a version, beside a model without memory."""
    model = empty_adapter(config)
    return model, origin(config) | _fill(config)(config, trained_parameters(model), version)


def empty_adapter(config: RunConfig) -> nn.Module:
    """A model without memory, but for the factors beside it, which are to be filled."""
    model = build_without_memory(config.model, vocabulary_size(config.tokenizer_file))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(torch.zeros(parameter.shape)))
    return model


def load_exported_adapter(directory: Path, base: Path) -> nn.Module:
    """The model of an adapter's directory, merged into its base. Raises ConfigError without that very base."""
    settings = ModelConfig(checkpoint=str(base), adapter=read_settings(directory))
    ours, theirs = {p.name: file_sha256(p) for p in checkpoint_files(base)}, provenance_of(directory).get("base")
    if theirs not in (None, ours):
        raise ConfigError(f"--base: {str(base)!r} given; {directory} was trained beside another (atoll.json: base)")
    model = build_empty(settings, vocabulary_size(directory / "tokenizer.json"), dtype=torch.float32)
    factors, found = trained_parameters(model), read_factors(directory)
    if {name: one.shape for name, one in factors.items()} != {name: one.shape for name, one in found.items()}:
        raise ConfigError(f"--base: {str(base)!r} given; the adapter in {directory} does not fit it")
    for name, value in found.items():
        factors[name].data.copy_(value)
    return finished(model, RunConfig(model=settings))


def write_adapter(model: nn.Module, config: RunConfig, provenance: dict[str, Any], directory: Path) -> None:
    """Write factors with the tokenizer, which base they belong to, and where they come from, to a new directory."""
    directory.mkdir()
    save_adapter(directory, trained_parameters(model), config.model.adapter)
    tokenizer = with_tokenizer(model, config.tokenizer_file, config.template_file)
    save_tokenizer(tokenizer, config.tokenizer_file, directory)
    told = provenance | {"base": model_terms(config)["checkpoint"]}
    (directory / PROVENANCE).write_text(json.dumps(told, indent=1) + "\n")


def write_export(model: nn.Module, config: RunConfig, provenance: dict[str, Any], directory: Path) -> None:
    """Write a model with its tokenizer, and where it comes from, to a new directory; of a prompt, without its base."""
    if config.model.adapter.kind == PROMPT:
        write_adapter(model, config, provenance, directory)
        return
    is_fresh = not config.model.checkpoint
    export(
        model,
        config.tokenizer_file,
        directory,
        template_file=config.template_file,
        trained_tokens=config.sequence_tokens,
        is_fresh=is_fresh,
    )
    (directory / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")


def write_card(
    model: nn.Module,
    config: RunConfig,
    provenance: dict[str, Any],
    directory: Path,
    *,
    license: str = "",
    held_out: dict[str, str] | None = None,
    is_adapter: bool = False,
) -> None:
    """Write the model card beside an export."""
    counted = (p for p in model.parameters() if p.requires_grad or not is_adapter)
    num_parameters = sum(parameter.numel() for parameter in counted)
    told = {"license": license, "held_out": held_out, "is_adapter": is_adapter}
    card = model_card(config, provenance, num_parameters=num_parameters, **told)  # type: ignore[arg-type]
    (directory / CARD).write_text(card)


def provenance_of(directory: Path) -> dict[str, Any]:
    """Where an exported model comes from; empty for one that was made elsewhere. Raises ConfigError."""
    file = directory / PROVENANCE
    try:
        found = loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {str(directory)!r} given; its {PROVENANCE} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


@contextmanager
def writing(directory: Path, *, key: str = "--to") -> Iterator[Path]:
    """A new directory under another name, which has its own when all is in it. Raises ConfigError if it cannot be."""
    try:
        with atomic_path(directory) as temporary:
            yield temporary
    except OSError as error:
        raise ConfigError(f"{key}: {str(directory)!r} given; it cannot be written: {error.strerror or error}") from None


def exported_digest(directory: Path) -> str:
    """Digest of the parameters of an exported directory, as commits have it. Raises ConfigError."""
    if (directory / ADAPTER_CONFIG).is_file():
        return digest_tensors(read_factors(directory).items())
    return digest_tensors(trained_parameters(load_checkpoint(directory, key="model")).items())


def describe_export(config: RunConfig, directory: Path, provenance: dict[str, Any]) -> str:
    """Where an exported model is, of what length of text it has learned, and what to do next."""
    whose = f"version {provenance['version']}" if "version" in provenance else f"silo {provenance['silo']}'s last"
    if own := provenance.get("personal"):
        whose += f", with the personal adapter of {own['silo']} at step {own['step']},"
    if (directory / ADAPTER_CONFIG).is_file():
        return f"{directory}: {whose} of {config.name}, an adapter; peft loads it beside its base"
    trained, settings = config.sequence_tokens, json.loads((directory / "config.json").read_text())
    allowed = max(
        (settings.get(key) or 0 for key in ("max_position_embeddings", "n_positions", "seq_length")), default=0
    )
    untried = f"; its configuration allows {allowed:,}, more than it has seen" if allowed > trained else ""
    split = next((split for silo in config.silos.values() for split in silo.valid.values()), "PACKED/valid")
    return (
        f"{directory}: {whose} of {config.name}, trained on sequences of {trained:,} tokens{untried}\n"
        f"next: atoll eval {shlex.quote(str(directory))} {'--chat ' if config.chat_template else ''}--data "
        f"{shlex.quote(split)}"
    )
