"""An adapter as peft has it: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.config.adapter import PROMPT, AdapterConfig
from pretrain.config.errors import ConfigError
from pretrain.host.foreign import loads, shown
from pretrain.outer.fragments import FACTORS
from pretrain.silo.adapter import lora_settings
from pretrain.silo.weights import ADAPTER

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
ROWS = "prompt_embeddings"  # what peft calls the vectors of a prompt, whatever embedding they stand beside
PREFIX, NAME = "base_model.model.", ".default."  # peft's own wrapper; the adapter's name, which files do not have


def save_adapter(directory: Path, factors: Mapping[str, Tensor], settings: AdapterConfig) -> None:
    """Write the factors of a trained adapter. It names no base, which is a place: who loads it has that already."""
    if settings.kind == PROMPT:
        _save_prompt(directory, factors)
        return
    from peft import LoraConfig

    targets = [name.partition(FACTORS[0])[0] for name in factors if FACTORS[0] in name]
    found: dict[str, Any] = LoraConfig(**lora_settings(settings, targets), task_type="CAUSAL_LM").to_dict()
    found |= {"target_modules": targets, "inference_mode": True}
    (directory / CONFIG).write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    tensors = {f"{PREFIX}{name.replace(NAME, '.')}": value.contiguous() for name, value in factors.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def _save_prompt(directory: Path, parameters: Mapping[str, Tensor]) -> None:
    ((name, rows),) = parameters.items()
    found = {  # the other keys of peft's PromptTuningConfig say how a prompt begins, or are the base's
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": rows.shape[0],
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
    }
    (directory / CONFIG).write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    save_file({ROWS: rows.contiguous()}, directory / WEIGHTS, metadata={"format": "pt", "parameter": name})


def read_factors(directory: Path) -> dict[str, Tensor]:
    """The same factors, or a prompt, by the names that they are trained under."""
    with safe_open(directory / WEIGHTS, framework="pt") as tensors:
        if name := (tensors.metadata() or {}).get("parameter"):
            return {name: tensors.get_tensor(ROWS)}
    found = {}
    for name, value in load_file(directory / WEIGHTS).items():
        stem, _, last = name.removeprefix(PREFIX).rpartition(".")
        found[f"{stem}{NAME}{last}"] = value
    return found


def read_settings(directory: Path) -> AdapterConfig:
    """What an adapter is. Raises ConfigError for what is none of ours."""
    try:
        found = loads((directory / CONFIG).read_bytes())
        if "num_virtual_tokens" in found:
            return AdapterConfig(kind=PROMPT, tokens=found["num_virtual_tokens"])
        return AdapterConfig(
            kind="lora", rank=found["r"], alpha=float(found["lora_alpha"]), targets=list(found["target_modules"])
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"model: {str(directory)!r} given; its {CONFIG} is not one of atoll's: {shown(error)}"
        ) from None
