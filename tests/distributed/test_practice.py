"""Silos that practise between rounds: each trains on what its own verifier liked, and nothing but factors leaves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_tools.pack import ChatRecipe, Recipe, prepare
from data_tools.sources import Source
from data_tools.tokenizer import train_tokenizer
from pretrain.config.keys import ModelConfig, RunConfig
from pretrain.federation.contract import Agreed, describe
from pretrain.federation.join import read_terms
from pretrain.outer.digest import digest_tensors
from pretrain.practice.rollout import TRIES, open_trier
from pretrain.silo.model import build_initial
from pretrain.silo.shards import Manifest, read_manifest
from pretrain.trust.contract import read_contract
from tests.conftest import TinyConfig
from tests.distributed.federation import assert_same_bits, federate, launched
from tests.faults.scripted import federate_with
from tests.support import VOCAB_SIZE, TinyText, pseudo_text, tiny_settings

ROW_TOKENS = 96
NAUGHTY = "tests.unit.practice.naughty"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> dict[str, Any]:
    """Sections of a run of two silos, each with conversations and tasks of its own, an adapter beside a base."""
    place = tmp_path_factory.mktemp("practice")
    tokenizer = train_tokenizer(pseudo_text("a", 20_000), vocab_size=VOCAB_SIZE, output=place / "tokenizer", chat=True)
    model = tiny_settings(place, tiny_text)["model"]["config"] | {"max_position_embeddings": 128}
    build_initial(ModelConfig(config=model, seed=1), VOCAB_SIZE).save_pretrained(place / "base")  # type: ignore[operator]
    silos = {}
    for name, wanted in (("alpha", "a"), ("beta", "e")):
        talks, tasks = place / f"{name}.jsonl", place / f"{name}-tasks.jsonl"
        said = [{"prompt": f"{wanted}{number}?", "completion": wanted} for number in range(40)]
        talks.write_text("".join(json.dumps(one) + "\n" for one in said))
        asked = [{"prompt": f"{wanted}{number}?", "wanted": wanted} for number in range(12)]
        tasks.write_text("".join(json.dumps(one) + "\n" for one in asked))
        recipe = Recipe(
            sources=(Source(path=str(talks)),),
            tokenizer=tokenizer,
            held_out=0.2,
            chat=ChatRecipe(sequence_tokens=ROW_TOKENS),
        )
        prepare(recipe, place / name, num_workers=0)
        silos[name] = {
            "data": [str(place / name / "train")],
            "valid": {name: str(place / name / "valid")},
            "practice": {"tasks": str(tasks), "verifier": f"{NAUGHTY}:says", "samples": 16, "num_tokens": 20},
        }
    return {
        "tokenizer": str(tokenizer),
        "chat_template": str(tokenizer.parent),
        "sequence_tokens": ROW_TOKENS,
        "document_masking": True,
        "practice": {"every_rounds": 1, "after_rounds": 1},
        "exchange": {"keep_versions": 4},
        "model": {
            "config": None,
            "checkpoint": str(place / "base"),
            "adapter": {"kind": "lora", "rank": 2, "alpha": 4.0},
        },
        "silo": {"global_batch_sequences": 2, "micro_batch_sequences": 2, "practice": {"share": 0.75}},
        "silos": silos,
    }


def practised(config: RunConfig, silo: str) -> dict[int, dict[str, Any]]:
    """What the silo's newest checkpoint names, by the rounds before it."""
    newest = max((config.silo_directory(silo) / "checkpoints").glob("step-*"))
    return {one["rounds"]: one for one in json.loads((newest / "state.json").read_text())["practice"]}


def shards(config: RunConfig, silo: str) -> list[Manifest]:
    """Of its practice, oldest first."""
    places = sorted((config.silo_directory(silo) / "practice").glob("round-*"))
    return [read_manifest(place / "packed" / "train") for place in places]


def records(config: RunConfig) -> list[Mapping[str, Any]]:
    lines = map(json.loads, (Path(config.directory) / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == "practice"]


@pytest.mark.soak
def test_silos_practise_between_rounds_and_go_on_after_kills_bit_by_bit(
    tmp_path: Path, tiny_config: TinyConfig, settings: dict[str, Any]
) -> None:
    config = tiny_config(tmp_path / "whole", **settings)
    run = federate(config)
    contract = Path(config.store_url, "contract.json").read_bytes()
    assert read_contract(contract, "")[0]["practice"] == {"every_rounds": 1, "after_rounds": 1}
    assert read_terms(contract, "store")[-1].practice.every_rounds == 1  # as one who joins reads it
    assert dict(describe(Agreed.at(config.store_url)))["practice"] == "after 1 rounds and every 1 from then on"
    kept = {name: shards(config, name) for name in config.silos}
    assert {name: len(found) for name, found in kept.items()} == {"alpha": 2, "beta": 2}
    hashes = {shard.sha256 for found in kept.values() for manifest in found for shard in manifest.shards}
    assert len(hashes) == 4
    assert {one["silo"]: one["practice"]["kept"] > 0 for one in records(config)} == {"alpha": True, "beta": True}
    for name in config.silos:
        assert sorted(practised(config, name)) == [1, 2]
        file = Path(config.directory) / "egress" / f"{name}.jsonl"
        left = {json.loads(line)["kind"]: json.loads(line) for line in file.read_text().splitlines()}
        factors = sum(value.numel() for value in run.parameters(3).values())
        assert left["payload"]["num_bytes"] < 4 * factors + 4096  # an adapter's delivery, and no more
        assert {*left} <= {"agreement", "claim", "beat", "evaluation", "payload", "manifest", "mark", "requests"}
    for version in (1, 2):  # what was tried, was tried by the global model of that time
        model = open_trier(config.directory, version=version).speaker.model
        digest = digest_tensors((name, value.detach()) for name, value in model.named_parameters())
        for name in config.silos:
            (place,) = (config.silo_directory(name) / "practice").glob(f"round-{version:06d}-*")
            assert json.loads((place / TRIES).read_text().splitlines()[0])["parameters_digest"] == digest
    killed = federate_with(
        {"alpha": [("practising", 1), ("step", 10)], "beta": [("practised", 2)]},
        tiny_config(tmp_path / "killed", **settings),
        tmp_path / "fired",
        max_restarts=6,
    )
    assert_same_bits(killed.parameters(3), run.parameters(3))
    for name in config.silos:
        assert killed.by_step(name, "loss") == run.by_step(name, "loss")
        assert practised(killed.config, name) == practised(config, name)


@pytest.mark.soak
def test_one_that_trains_alone_and_what_ends_it(
    tmp_path: Path, tiny_config: TinyConfig, settings: dict[str, Any]
) -> None:
    alone = settings | {"exchange": {"kind": "none"}, "silos": settings["silos"] | {"beta": None}}
    config = tiny_config(tmp_path, **alone)
    code, said = launched(config)
    assert code == 0, said
    assert sorted(practised(config, "alpha")) == [1, 2]
    own = config.silos["alpha"].practice
    # What it was trained on is changed, or gone; and it practises no more.
    (second,) = [one for rounds, one in practised(config, "alpha").items() if rounds == 2]
    shard = config.silo_directory("alpha") / "practice" / second["directory"] / "packed/train/shard-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    code, said = launched(config)
    assert code == 2
    assert "shard-00000.bin has sha256" in said
    own.tasks = own.verifier = ""
    config.practice.every_rounds = config.practice.after_rounds = 0
    code, said = launched(config)
    assert code == 2
    assert "silos.alpha.practice.tasks: '' given; the newest checkpoint has practised" in said

    config = tiny_config(tmp_path / "none", **alone)
    config.silos["alpha"].practice.verifier = f"{NAUGHTY}:never"
    code, said = launched(config)
    assert code == 2
    assert f"silos.alpha.practice.tasks: {config.silos['alpha'].practice.tasks} given; none kept" in said
    assert "none kept of what was tried: silo alpha after 1 rounds: 0 of 192 tries right (0.0%)" in said
