"""The global model of a run as a `transformers` directory, and the loss of such a directory on packed text."""

import json
import math
import shlex
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig, RunConfig, SiloConfig
from pretrain.exchange.history import History
from pretrain.exchange.options import store_options
from pretrain.exchange.payload import read_parameters
from pretrain.exchange.sealed import read_as_a_member
from pretrain.exchange.store import StoreExchange
from pretrain.federation.card import CARD, check_license, model_card
from pretrain.host.foreign import loads
from pretrain.outer.digest import digest_tensors
from pretrain.silo.adapter import merge_adapter
from pretrain.silo.base import fill_base
from pretrain.silo.batch import Batch
from pretrain.silo.data import PackedTokens
from pretrain.silo.evaluate import held_out_sums, sequences_evaluated
from pretrain.silo.exported import export, save_tokenizer, with_tokenizer
from pretrain.silo.model import (
    build_empty,
    build_without_memory,
    check_causality,
    check_document_masking,
    go_by_documents,
    load_checkpoint,
    target_losses,
    token_losses,
    trained_parameters,
)
from pretrain.silo.peft_directory import CONFIG as ADAPTER_CONFIG
from pretrain.silo.peft_directory import read_factors, read_settings, save_adapter
from pretrain.silo.shards import atomic_path, file_sha256, read_manifest, tokenizer_sha256
from pretrain.silo.template import own_template, sha256_of
from pretrain.silo.vocabulary import vocabulary_size
from pretrain.silo.weights import checkpoint_files
from pretrain.trust.contract import check_same_terms, model_terms, read_contract
from pretrain.trust.ledger import RefusedError
from pretrain.trust.policy import is_public

PROVENANCE = "atoll.json"
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
    """What others load, once its trained parameters are filled: with an adapter, that merged into its base."""
    if config.model.checkpoint and config.model.adapter.is_on:
        fill_base(model, config.model.checkpoint)
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
    }


def _eval_sequences(config: RunConfig) -> int:
    """What the silos of this machine evaluate on, or the default where they differ."""
    found = {silo.eval_sequences for silo in config.silos.values()}
    return found.pop() if len(found) == 1 else config.silo.eval_sequences


def _fill(config: RunConfig) -> Callable[[RunConfig, dict[str, Tensor], int | None], dict[str, Any]]:
    """What fills trained parameters with those of a version, and says where they come from."""
    return _fill_from_silo if config.exchange.kind == "none" else _fill_from_store


def _fill_from_store(config: RunConfig, parameters: dict[str, Tensor], version: int | None) -> dict[str, Any]:
    url = config.ledger_url(min(config.silos))
    exchange = StoreExchange(url, options=store_options(config.exchange, url))
    if (contract := exchange.read_contract()) is None:
        raise ConfigError(f"exchange.url: {url} given; there is no contract.json, so no run, in it")
    if config.model.adapter.is_on:  # the base may be another by now
        terms, _ = read_contract(contract, url)
        check_same_terms({"model": model_terms(config)}, {"model": terms["model"]}, url)
    newest = exchange.newest_version()
    version = newest if version is None else version
    if not 0 <= version <= newest:
        raise ConfigError(f"--version: {version} given; allowed: 0 to {newest}")
    history = History(exchange, config.outer.num_fragments)
    try:
        read_as_a_member(exchange, config)
        commit = exchange.read_commit(version)
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
    }
    if is_public(config, "tokens"):
        found["tokens"] = {silo: exchange.tokens_total(silo, version) for silo in config.full_roster}
    return found


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

    Of an adapter `form` says whether it is `merged` into its base, or, an `adapter`, a directory of peft. `held_out` is
    asked what the card says of its loss: corpus to words. Raises ConfigError if `directory` is there.
    """
    _check_form(config, form)
    if directory.exists():
        raise ConfigError(f"--output: {str(directory)!r} given; it exists already, and nothing is overwritten")
    check_license(license)
    is_adapter = form == "adapter"
    model, provenance = _load_adapter(config, version) if is_adapter else load_global_model(config, version)
    with writing(directory, key="--output") as temporary:
        if is_adapter:
            _write_adapter(model, config, provenance, temporary)
        else:
            write_export(model, config, provenance, temporary)
        told = held_out(provenance)
        write_card(model, config, provenance, temporary, license=license, held_out=told, is_adapter=is_adapter)
    return provenance


def _check_form(config: RunConfig, form: str) -> None:
    if config.model.adapter.is_on and not form:
        raise ConfigError(
            "atoll export: neither --merged nor --adapter given, and this run trained an adapter; allowed: --merged (a "
            "transformers directory, with it in the base's matrices), --adapter (a peft directory, without the base)"
        )
    if form and not config.model.adapter.is_on:
        raise ConfigError(
            f"--{form}: given; this run trained all of its model; allowed: neither --merged nor --adapter"
        )


def _load_adapter(config: RunConfig, version: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The factors of a version, beside a model without memory."""
    model = build_without_memory(config.model, vocabulary_size(config.tokenizer_file))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(torch.zeros(parameter.shape)))
    return model, origin(config) | _fill(config)(config, trained_parameters(model), version)


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


def _write_adapter(model: nn.Module, config: RunConfig, provenance: dict[str, Any], directory: Path) -> None:
    """Write factors with the tokenizer, which base they belong to, and where they come from, to a new directory."""
    directory.mkdir()
    save_adapter(directory, trained_parameters(model), config.model.adapter)
    tokenizer = with_tokenizer(model, config.tokenizer_file, config.template_file)
    save_tokenizer(tokenizer, config.tokenizer_file, directory)
    told = provenance | {"base": model_terms(config)["checkpoint"]}
    (directory / PROVENANCE).write_text(json.dumps(told, indent=1) + "\n")


def write_export(model: nn.Module, config: RunConfig, provenance: dict[str, Any], directory: Path) -> None:
    """Write a model with its tokenizer, and where it comes from, to a new directory."""
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


@dataclass(frozen=True, kw_only=True)
class SplitLoss:
    """Held-out loss of a model on one split."""

    loss: float
    """Nats per token."""
    num_sequences: int
    """Sequences that were evaluated, evenly spread over the split, ..."""
    of_sequences: int
    """... and how many it has."""
    num_tokens: int
    """Tokens of those sequences that have a loss; of conversations, what the assistant says."""
    num_right: int | None = None
    """Of conversations: how many of these tokens are the likeliest, after the true ones before them."""
    bytes_per_token: float | None = None
    """UTF-8 bytes of text a token, of the whole split; None of conversations, where some tokens have no loss."""

    @property
    def is_chat(self) -> bool:
        """Whether it is of conversations."""
        return self.num_right is not None

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers."""
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    @property
    def accuracy(self) -> float | None:
        """Share of the tokens that greedy decoding gets right with the true ones before it; None of text."""
        return self.num_right / self.num_tokens if self.num_right is not None else None


def together(splits: Sequence[SplitLoss]) -> SplitLoss:
    """Of several splits of conversations as one: each token weighs the same."""
    num_tokens = sum(split.num_tokens for split in splits)
    return SplitLoss(
        loss=sum(split.loss * split.num_tokens for split in splits) / num_tokens,
        num_sequences=sum(split.num_sequences for split in splits),
        of_sequences=sum(split.of_sequences for split in splits),
        num_tokens=num_tokens,
        num_right=sum(split.num_right or 0 for split in splits),
    )


def describe_export(config: RunConfig, directory: Path, provenance: dict[str, Any]) -> str:
    """Where an exported model is, of what length of text it has learned, and what to do next."""
    whose = f"version {provenance['version']}" if "version" in provenance else f"silo {provenance['silo']}'s last"
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


def evaluate_directory(directory: Path, data: Sequence[Path], **options: Any) -> dict[str, SplitLoss]:
    """Loss of a `transformers` directory on packed splits, each named by its path.

    See `evaluate_model` for `options`. Raises ConfigError if there is no model, too.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model: {str(directory)!r} given; allowed: a transformers directory (see atoll export)")
    tokenizer, splits = tokenizer_sha256(directory / "tokenizer.json"), {str(path): path for path in data}
    template = own_template(directory / "tokenizer.json")

    def load() -> nn.Module:
        return load_checkpoint(directory, key="model")

    known = sha256_of(template[0]) if template else None
    return evaluate_model(load, splits, provenance_of(directory), tokenizer, template=known, **options)


def evaluate_model(
    load: Callable[[], nn.Module],
    data: Mapping[str, Path],
    provenance: Mapping[str, Any],
    tokenizer: str,
    *,
    template: str | None = None,
    sequence_tokens: int | None = None,
    document_masking: bool | None = None,
    num_sequences: int | None = None,
    batch_sequences: int = 8,
    whole: Collection[str] = (),
    tell: Callable[[str, int, int], None] = lambda split, num_done, num_sequences: None,
) -> dict[str, SplitLoss]:
    """Loss of a model on packed splits by name, which are of the tokenizer with this sha256, and conversations of the
    template with that one (None: of any); on a GPU where there is one.

    `sequence_tokens`, `document_masking` and `num_sequences` (0: all) are those of the run that it is from, as
    `provenance` has them, unless they are given; of the splits in `whole` are all. `tell` is called after each batch:
    split, sequences done, and of how many. Conversations of one row are kept apart in any case. Raises ConfigError if
    the text was packed with another tokenizer, or conversations with another template.
    """
    sequence_tokens = sequence_tokens or provenance.get("sequence_tokens") or _rows_of(data.values())
    if document_masking is None:
        document_masking = provenance.get("document_masking", False)
    if num_sequences is None:
        num_sequences = int(provenance.get("eval_sequences", SiloConfig().eval_sequences))
    read = {"sequence_tokens": sequence_tokens, "tokenizer_sha256": tokenizer, "template_sha256": template}
    corpora = {name: PackedTokens([path], key="--data", **read) for name, path in data.items()}  # type: ignore[arg-type]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load().eval().to(device)
    check_causality(model, device)
    mask_at = next(iter(corpora.values())).manifests[0].end_of_text_id
    if document_masking or any(tokens.is_chat for tokens in corpora.values()):
        if device.type == "cpu":
            go_by_documents(model, mask_at, device)  # where the type of model allows it; else there is a mask
        check_document_masking(model, mask_at, device)
    found = {}
    for name, tokens in corpora.items():
        values_of = partial(_values, model, device, mask_at if document_masking or tokens.is_chat else None)
        chosen = 0 if name in whole else num_sequences
        sequences = sequences_evaluated({name: tokens}, chosen)[name]
        sums = held_out_sums(
            values_of,
            {name: tokens},
            num_sequences=chosen,
            micro_batch_sequences=batch_sequences,
            tell=lambda split, num_done, of=sequences[0]: tell(split, num_done, of),  # type: ignore[misc]
        )
        found[name] = _split_loss(sums[name], tokens, sequences)
    return found


def _rows_of(data: Iterable[Path]) -> int:
    """The length of the first conversations' rows. Raises ConfigError where there are none to go by."""
    manifests = (read_manifest(path, key="--data") for path in data)
    found = next((manifest.chat.sequence_tokens for manifest in manifests if manifest.chat), None)
    if found is None:
        raise ConfigError("--sequence-tokens: none given; this model was not exported by atoll, so say how many")
    return found


def _values(model: nn.Module, device: torch.device, mask_at: int | None, batch: Batch) -> tuple[Tensor, ...]:
    """Of every target its loss and, of conversations, whether it is the likeliest token; documents are kept apart with
    `mask_at`."""
    placed, right = batch.placed(lambda tensor: tensor.to(device)), list[Tensor]()

    def compared(logits: Tensor, targets: Tensor) -> Tensor:
        right.append(logits.argmax(-1) == targets)  # never of an ignored one, which no token is
        return target_losses(logits, targets)

    is_chat = placed.positions is not None
    losses = token_losses(
        model,
        *placed[:2],
        mask_at,
        positions=placed.positions,
        cross_entropy=compared if is_chat else target_losses,
    )
    return losses, *(one.view_as(losses) for one in right)


def _split_loss(sums: list[float], tokens: PackedTokens, sequences: list[int]) -> SplitLoss:
    loss, *right, num_tokens = sums
    num_bytes = sum(manifest.num_bytes for manifest in tokens.manifests)
    num_sequences, of_sequences = sequences
    return SplitLoss(
        loss=loss / num_tokens,
        num_sequences=num_sequences,
        of_sequences=of_sequences,
        num_tokens=round(num_tokens),
        num_right=round(right[0]) if right else None,
        bytes_per_token=None if tokens.is_chat else num_bytes / tokens.num_tokens,
    )
