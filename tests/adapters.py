"""What tests of adapters share: a base on disk, and the section of a run that trains an adapter beside it."""

from pathlib import Path
from typing import Any

from pretrain.config.keys import ModelConfig
from pretrain.silo.model import build_initial
from tests.support import VOCAB_SIZE, TinyText, tiny_settings


def save_base(directory: Path, text: TinyText, *, seed: int = 1) -> Path:
    """A `transformers` directory of the tiny settings' model."""
    settings = ModelConfig(config=tiny_settings(directory, text)["model"]["config"], seed=seed)
    build_initial(settings, VOCAB_SIZE).save_pretrained(directory)  # type: ignore[operator]
    return directory


def prompt_model(base: Path, **changes: Any) -> dict[str, Any]:
    """The same with a prompt."""
    adapter = {"kind": "prompt", "tokens": 3, "text": "bada gefi"}
    return {"config": None, "checkpoint": str(base), "adapter": adapter | changes}


def adapter_model(base: Path, **changes: Any) -> dict[str, Any]:
    """The section `model` of a run with a LoRA adapter."""
    return {"config": None, "checkpoint": str(base), "adapter": {"kind": "lora", "rank": 2, "alpha": 4.0, **changes}}
