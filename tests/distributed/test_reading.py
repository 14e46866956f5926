"""What a silo reads: shards that are not what they were, weights and masking in a whole run."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config.keys import RunConfig
from pretrain.federation.evaluation import open_subject
from pretrain.federation.export import export_global_model
from pretrain.silo.data import Order, PackedTokens
from pretrain.silo.model import build_initial, token_losses
from pretrain.silo.shards import file_sha256, open_shard, read_manifest, write_manifest
from tests.conftest import TinyConfig
from tests.distributed.federation import federate, launched
from tests.support import TWO_RANKS, VOCAB_SIZE, TinyText


def copy_of(split: Path, directory: Path) -> Path:
    """A split that may be written into."""
    return Path(shutil.copytree(split, directory / "copy" / split.name))


def overwrite(split: Path, position: int, token: int) -> Path:
    """Change one token; returns the shard's file."""
    manifest = read_manifest(split)
    file = split / manifest.shards[0].file
    tokens = open_shard(split, manifest, manifest.shards[0]).copy()
    tokens[position] = token
    file.write_bytes(tokens.tobytes())
    return file


def assert_stopped_with(config: RunConfig, line: str) -> None:
    """A launch ends with exit code 2 and this one line, having delivered and saved nothing."""
    code, output = launched(config)
    assert code == 2, output
    errors = [shown for shown in output.splitlines() if "error:" in shown]
    assert len(errors) == 1
    assert errors[0].endswith(line)
    assert not list(Path(config.store_url).glob("silos/alpha/000001/*"))
    assert not list(config.silo_directory("alpha").glob("checkpoints/step-*"))


@pytest.mark.parametrize("part", ["data", "valid.alpha"])
def test_a_corrupted_shard_stops_all_ranks_before_anything_leaves(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, part: str
) -> None:
    split = copy_of(tiny_text.packed["alpha"] / ("train" if part == "data" else "valid"), tmp_path)
    manifest = read_manifest(split)
    file = overwrite(split, manifest.shards[0].num_tokens - 2, 1)
    silo = TWO_RANKS | ({"data": [str(split)]} if part == "data" else {"valid": {"alpha": str(split)}})
    config = tiny_config(tmp_path, silos={"alpha": silo, "beta": None})
    found, stated = file_sha256(file)[:12], manifest.shards[0].sha256[:12]
    line = f"{file} has sha256 {found}, manifest.json says {stated}: copy or prepare the split again"
    assert_stopped_with(config, f"error: alpha: silos.alpha.{part}: {line}")


def test_a_token_that_only_the_second_rank_reads_is_said_by_it(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    split = copy_of(tiny_text.packed["alpha"] / "train", tmp_path)
    order = Order(seed=0, silo="alpha", num_sequences=PackedTokens([split], sequence_tokens=16).num_sequences)
    file = overwrite(split, 16 * order.index(2) + 5, VOCAB_SIZE + 7)  # ranks read positions 0, 1 and 2, 3
    manifest = read_manifest(split)
    shards = (dataclasses.replace(manifest.shards[0], sha256=file_sha256(file)), *manifest.shards[1:])
    write_manifest(split, dataclasses.replace(manifest, shards=shards))
    config = tiny_config(tmp_path, silos={"alpha": TWO_RANKS | {"data": [str(split)]}, "beta": None})
    line = f"{file} holds token {VOCAB_SIZE + 7}, its vocab_size is {VOCAB_SIZE}: copy or prepare the split again"
    assert_stopped_with(config, f"error: alpha: silos.alpha.data: {line}")


def test_weights_and_masking_in_a_whole_run(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    silo = TWO_RANKS | {
        "data": [str(tiny_text.packed[name] / "train") for name in ("alpha", "gamma")],
        "data_weights": [3, 1],
    }
    config = tiny_config(tmp_path, document_masking=True, sequence_tokens=48, silos={"alpha": silo, "beta": None})
    run = federate(config)
    (summary,) = [record for record in run.records if record["kind"] == "summary"]
    assert summary["tokens_by_corpus"] == [12 * 3 * 48, 12 * 1 * 48]

    # The held-out loss of the run, that of its export, and that of a plain model which sees one document at a time.
    provenance = export_global_model(config, tmp_path / "model")
    assert provenance["document_masking"] is True
    split = Path(config.silos["alpha"].valid["alpha"])
    of_run = run.held_out("alpha")[3]["alpha"]
    found = open_subject(str(tmp_path / "model")).losses({"alpha": split}, num_sequences=8)
    assert found["alpha"].loss == pytest.approx(of_run, 1e-6)
    model = build_initial(config.model, VOCAB_SIZE)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(run.parameters(3)[name])
    tokens = PackedTokens([split], sequence_tokens=48)
    losses, num_parts = [], 0
    for sequence in (tokens.sequence(i * tokens.num_sequences // 8) for i in range(8)):
        begins = [0, *(np.flatnonzero(sequence[1:-1] == tokens.manifests[0].end_of_text_id) + 1), 48]
        for begin, end in itertools.pairwise(begins):
            num_parts += 1
            part = torch.from_numpy(sequence[begin : end + 1])[None]
            losses += token_losses(model, part[:, :-1], part[:, 1:]).flatten().tolist()
    assert len(losses) == 8 * 48
    assert num_parts > 8
    assert np.mean(losses) == pytest.approx(of_run, rel=1e-5)
