"""What a base says of packed preference pairs: the log-probability of each document, computed once (`atoll data
reference`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_tools.inspect import find_splits
from pretrain.config.allowed import PRECISIONS
from pretrain.config.errors import ConfigError
from pretrain.silo.reference import base_hashes, read_reference, write_reference
from pretrain.silo.shards import Manifest, verify_shards

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

KEY = "reference"


def refer(
    directories: Sequence[Path], base: Path | None, *, precision: str = "fp32", batch_sequences: int = 8
) -> Iterator[str]:
    """Write the log-probabilities of all splits among some folders; says of each what was done. Raises ConfigError."""
    if base is None:
        raise ConfigError("--base: none given; allowed: the checkpoint that the run goes on from (model.checkpoint)")
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision: {precision!r} given; allowed: {', '.join(PRECISIONS)}")
    hashes, model = base_hashes(base, key="--base"), None
    manifests = {directory: verify_shards(directory, key=KEY) for directory in find_splits(directories)}
    for directory, manifest in manifests.items():
        if manifest.chat is None or manifest.chat.num_pairs is None:
            allowed = "preference pairs (atoll data prepare --chat --pairs)"
            raise ConfigError(f"{KEY}: {directory} given; allowed: {allowed}")
    for directory, manifest in manifests.items():
        found = read_reference(directory, manifest, key=KEY)
        if found and (found.base, found.precision) == (hashes, precision):
            yield f"{directory}  there already"
            continue
        model = model or _loaded(base, manifest, precision)
        values = log_probabilities(model, directory, manifest, batch_sequences)
        write_reference(directory, manifest, values, hashes, precision)
        assert manifest.chat
        num_pairs, mean = manifest.chat.num_pairs, values.sum() / manifest.num_trained_tokens
        yield f"{directory}  {num_pairs:,} pairs  {mean:.4f} nats a token"


def _device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _loaded(base: Path, manifest: Manifest, precision: str) -> "PreTrainedModel":
    """The base as a silo computes with it: its parameters in the silo's precision, all else as it is."""
    import torch

    from pretrain.silo.model import check_document_masking, go_by_documents, load_checkpoint

    model = load_checkpoint(base, key="--base").eval()
    if model.config.vocab_size < manifest.vocab_size:
        given = f"--base: {str(base)!r} given, with {model.config.vocab_size} tokens"
        raise ConfigError(f"{given}; allowed: one of the {manifest.vocab_size} tokens that the pairs were packed with")
    if precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    model.to(_device())  # type: ignore[arg-type]
    if _device().type == "cpu":
        go_by_documents(model, manifest.end_of_text_id, _device())
    check_document_masking(model, manifest.end_of_text_id, _device())
    return model


def log_probabilities(
    model: "PreTrainedModel", directory: Path, manifest: Manifest, batch_sequences: int
) -> npt.NDArray[np.float64]:
    """Of each document of a split the sum over its trained tokens, in fp64. # (num_documents,)"""
    import torch

    from pretrain.silo.data import PackedTokens
    from pretrain.silo.model import token_losses

    assert manifest.chat
    tokens = PackedTokens([directory], sequence_tokens=manifest.chat.sequence_tokens, key=KEY)
    found = np.zeros(manifest.num_documents)
    with torch.no_grad():
        for first in range(0, tokens.num_sequences, batch_sequences):
            rows = range(first, min(first + batch_sequences, tokens.num_sequences))
            batch = tokens.batch(rows).placed(lambda tensor: tensor.to(_device()))
            assert batch.positions is not None
            losses = token_losses(model, *batch[:2], manifest.end_of_text_id, positions=batch.positions)
            for row, values, positions in zip(rows, losses.double().cpu().numpy(), batch.positions.cpu(), strict=True):
                begins = np.flatnonzero(positions.numpy() == 0)
                found[tokens.documents_of(row)] = -np.add.reduceat(values, begins)
    return found
