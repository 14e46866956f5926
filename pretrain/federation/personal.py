"""A silo's own model: base, shared adapter and personal one, from that silo's newest checkpoint."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.federation.export import (
    check_export,
    empty_adapter,
    empty_model,
    finished,
    open_ledger,
    origin,
    write_adapter,
    write_card,
    write_export,
    writing,
)
from pretrain.outer.digest import digest_tensors
from pretrain.silo.model import trained_parameters
from pretrain.silo.named_state import PARAMETER, STATE, SavedState, complete_checkpoints
from pretrain.silo.personal import KEY, both_in_one, personal_shapes
from pretrain.silo.vocabulary import vocabulary_size
from pretrain.trust.ledger import RefusedError


def export_personal_model(
    config: RunConfig,
    directory: Path,
    *,
    silo: str = "",
    form: str = "",
    license: str = "",
    held_out: Callable[[dict[str, Any]], dict[str, str]] = lambda provenance: {},
) -> dict[str, Any]:
    """Write a silo's own model as `export_global_model` does the global one; returns its provenance.

    As an `adapter`, the shared and the personal one are one, which does what both do. Raises ConfigError.
    """
    check_export(config, directory, form, license)
    silo = _whose(config, silo)
    checkpoint, state = _newest(config, silo)
    shared = _shared(config, checkpoint, state)
    own, shapes = config.silos[silo].personal_adapter, _shapes(config, silo)
    saved = SavedState(checkpoint / STATE)
    personal = {name: saved.read(PARAMETER, name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}
    adapter, both = both_in_one(config.model.adapter, own, shared | personal)
    beside = replace(config, model=replace(config.model, adapter=adapter))
    model = empty_adapter(beside) if form == "adapter" else empty_model(beside)[0]
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(both[name])
    provenance = origin(config) | {
        "version": state["version"],
        "parameters_digest": digest_tensors(both.items()),
        "contract_sha256": state["contract_sha256"],
        "personal": {"silo": silo, "step": state["step"], "adapter": own.words},
    }
    with writing(directory, key="--output") as temporary:
        if form == "adapter":
            write_adapter(model, beside, provenance, temporary)
        else:
            write_export(finished(model, beside), beside, provenance, temporary)
        told: dict[str, Any] = {"license": license, "held_out": held_out(provenance), "is_adapter": form == "adapter"}
        write_card(model, config, provenance, temporary, **told)
    return provenance


def _whose(config: RunConfig, silo: str) -> str:
    have = sorted(name for name, settings in config.silos.items() if settings.personal_adapter.is_on)
    if not have:
        raise ConfigError(f"--personal: given; no silo of this run directory has a {KEY}; allowed: without it")
    if silo not in have and (silo or len(have) > 1):
        raise ConfigError(f"--silo: {silo!r} given; allowed: {named(have)}, which have a {KEY}")
    return silo or have[0]


def _newest(config: RunConfig, silo: str) -> tuple[Path, dict[str, Any]]:
    """A silo's newest checkpoint, and where that is."""
    directory = config.silo_directory(silo) / "checkpoints"
    if not (found := complete_checkpoints(directory)):
        raise ConfigError(f"--personal: given; there is no checkpoint in {directory} yet; allowed: when there is")
    state: dict[str, Any] = json.loads((found[-1] / "state.json").read_text())
    theirs, ours = state.get(KEY, "none"), config.silos[silo].personal_adapter.words
    if theirs != ours:
        raise ConfigError(f"{found[-1]}: it was written with {KEY} {theirs}, and this is {ours}; allowed: the same")
    return found[-1], state


def _shared(config: RunConfig, checkpoint: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """The shared factors as the silo has them from the others, which their commit names."""
    ledger, version = open_ledger(config), state["version"]
    shared = load_file(checkpoint / "global.safetensors")
    try:
        is_theirs = digest_tensors(shared.items()) == ledger.read_commit(version).parameters_digest
    except RefusedError as error:
        raise ConfigError(f"version {version}: {error}") from None
    if not is_theirs:
        raise ConfigError(
            f"{checkpoint}: its shared adapter is not that of version {version}; delete it, and an older one counts"
        )
    return shared


def _shapes(config: RunConfig, silo: str) -> dict[str, torch.Size]:
    settings, key = config.silos[silo].personal_adapter, f"silos.{silo}.{KEY}"
    return personal_shapes(config.model, vocabulary_size(config.tokenizer_file), settings, key)
