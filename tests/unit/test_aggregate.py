"""The aggregator in this process, on a directory store, with deliveries that are written by hand."""

import hashlib
import json
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.aggregate import Aggregator, OuterState
from pretrain.config import RunConfig
from pretrain.journal import Journal
from pretrain.outer.fragments import cut_fragments
from tests.conftest import TinyConfig

Tensors = dict[str, Tensor]
OUTER = {"lr": 0.5, "momentum": 0.5, "num_fragments": 2}
ROUNDS = {"num_steps": 8, "lr": 0.003}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def start(config: RunConfig) -> tuple[Aggregator, OuterState]:
    Path(config.directory).mkdir(parents=True, exist_ok=True)
    aggregator = Aggregator(config, Journal(config, "aggregator", silo=None))
    return aggregator, aggregator.start()


def one_round(aggregator: Aggregator, state: OuterState) -> None:
    deliveries = aggregator.collect(state)
    divisor, metrics = aggregator.merge(state, deliveries)
    aggregator.commit(state, deliveries, divisor, metrics)


def times(state: OuterState, factor: float) -> Tensors:
    """Local parameters that are `factor` times the global ones."""
    return {name: value * factor for name, value in state.parameters.items()}


@dataclass(kw_only=True)
class Hand:
    """Writes a delivery as the design describes it, and spoils it on request."""

    tensors: Callable[[int, Tensors], Mapping[str, Tensor]] = lambda fragment, tensors: tensors
    """Changes what a fragment holds, before it is saved."""
    raw: bytes | None = None
    """Instead of a safetensors file, with the right checksum."""
    manifest: Callable[[dict[str, Any]], object] = lambda manifest: None
    """Changes the manifest."""
    folder: Callable[[Path], object] = lambda folder: None
    """Changes the files after their checksums were taken."""

    def deliver(self, config: RunConfig, silo: str, state: OuterState, local: Tensors, *, tokens: int = 100) -> None:
        store, round = Path(config.store_url), state.version + 1
        folder = store / "silos" / silo / f"{round:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        payloads = []
        for fragment, names in enumerate(cut_fragments({n: v.numel() for n, v in local.items()}, 2)):
            file = folder / f"{fragment:03d}.safetensors"
            save_file(dict(self.tensors(fragment, {f"parameter/{name}": local[name] for name in names})), file)
            if self.raw is not None:
                file.write_bytes(self.raw)
            data = file.read_bytes()
            payloads.append({"fragment": fragment, "file": file.name, "sha256": sha256(data), "num_bytes": len(data)})
        manifest = {
            "format": 1,
            "contract_sha256": sha256((store / "contract.json").read_bytes()),
            "silo": silo,
            "round": round,
            "base_version": state.version,
            "base_digest": state.parameters_digest,
            "codec": config.outer.codec,
            "payloads": payloads,
            "tokens": tokens,
            "steps": config.outer.sync_interval_steps,
            "tokens_total": tokens * round,
            "metrics": {"loss": 1.0},
            "signature": None,
        }
        self.manifest(manifest)
        self.folder(folder)
        temporary = folder / ".manifest.tmp"
        temporary.write_text(json.dumps(manifest))
        temporary.rename(folder / "manifest.json")


GOOD = Hand()


@pytest.fixture
def config(tmp_path: Path, tiny_config: TinyConfig) -> RunConfig:
    return tiny_config(tmp_path, inner=ROUNDS, outer=OUTER)


# ---- good rounds


def test_version_0_is_the_seeded_model_and_a_state_of_zeros(config: RunConfig) -> None:
    _, state = start(config)
    store = Path(config.store_url)
    commit = json.loads((store / "global" / "000000" / "commit.json").read_text())
    assert (commit["version"], commit["previous"], commit["contributors"], commit["divisor"]) == (0, None, [], 0)
    assert [p["file"] for p in commit["payloads"]] == ["parameters-000.safetensors", "parameters-001.safetensors"]
    assert state.parameters.keys() == state.velocity.keys()
    assert all(not value.any() for value in state.velocity.values())
    assert all(value.dtype == torch.float32 for value in state.parameters.values())
    stored = {n: v for p in commit["payloads"] for n, v in load_file(store / "global" / "000000" / p["file"]).items()}
    assert stored.keys() == {f"parameter/{name}" for name in state.parameters}
    assert all(torch.equal(stored[f"parameter/{name}"], value) for name, value in state.parameters.items())


def test_a_good_round_by_hand(config: RunConfig) -> None:
    aggregator, state = start(config)
    before = {name: value.double() for name, value in state.parameters.items()}
    # Locals 2p and 4p are pseudo-gradients -p and -3p; with 100 and 300 tokens their mean is -2.5p, and the first
    # Nesterov step with lr 0.5 and momentum 0.5 is p + 0.5 * 1.5 * 2.5p = 2.875p.
    GOOD.deliver(config, "beta", state, times(state, 4), tokens=300)
    GOOD.deliver(config, "alpha", state, times(state, 2), tokens=100)
    one_round(aggregator, state)
    assert state.version == 1
    for name, value in state.parameters.items():
        assert torch.equal(value, (before[name] * 2.875).float())
        assert torch.equal(state.velocity[name], (before[name] * -2.5).float())
    store = Path(config.store_url)
    first, second = (store / "global" / f"00000{version}" / "commit.json" for version in (0, 1))
    commit = json.loads(second.read_text())
    assert commit["previous"] == sha256(first.read_bytes())
    assert commit["divisor"] == 400
    assert [(c["silo"], c["weight"], c["tokens"]) for c in commit["contributors"]] == [
        ("alpha", 100, 100),
        ("beta", 300, 300),
    ]
    for contributor in commit["contributors"]:
        manifest = store / "silos" / contributor["silo"] / "000001" / "manifest.json"
        assert contributor["manifest_sha256"] == sha256(manifest.read_bytes())
    assert commit["metrics"]["cosine_mean"] == pytest.approx(1.0)  # both go the same way
    norm = sum(value.square().sum().item() for value in before.values()) ** 0.5
    assert commit["metrics"]["update_norm"] == pytest.approx(1.875 * norm, rel=1e-6)
    assert commit["parameters_digest"] == state.parameters_digest


def test_one_silo_with_sgd_of_lr_1_is_left_alone(tmp_path: Path, tiny_config: TinyConfig) -> None:
    outer = {"optimizer": "sgd", "lr": 1.0, "num_fragments": 2}
    config = tiny_config(tmp_path, silos={"beta": None}, outer=outer)
    aggregator, state = start(config)
    for _ in range(3):
        noise = torch.Generator().manual_seed(state.version)
        local = {n: v + 0.01 * torch.randn(v.shape, generator=noise) for n, v in state.parameters.items()}
        GOOD.deliver(config, "alpha", state, local, tokens=7)
        one_round(aggregator, state)
        assert all(torch.equal(state.parameters[name], value) for name, value in local.items())


def test_identical_silos_are_one_silo_to_the_last_bit(tmp_path: Path, tiny_config: TinyConfig) -> None:
    outer = {"lr": 0.7, "momentum": 0.9, "num_fragments": 2}
    states = []
    for name, silos in (("one", {"beta": None}), ("two", {}), ("three", {"gamma": {}})):
        config = tiny_config(tmp_path / name, silos=silos, outer=outer)
        aggregator, state = start(config)
        for _ in range(2):
            noise = torch.Generator().manual_seed(state.version)
            local = {n: v + 0.01 * torch.randn(v.shape, generator=noise) for n, v in state.parameters.items()}
            for index, silo in enumerate(config.full_roster):
                GOOD.deliver(config, silo, state, local, tokens=3 + 4 * index)
            one_round(aggregator, state)
        states.append(state)
    assert states[0].parameters_digest == states[1].parameters_digest == states[2].parameters_digest


def test_arrival_order_does_not_matter(tmp_path: Path, tiny_config: TinyConfig) -> None:
    names = ["alpha", "beta", "gamma"]
    digests = []
    for order in (names, names[::-1]):
        config = tiny_config(tmp_path / order[0], silos={"gamma": {}}, outer=OUTER)
        aggregator, state = start(config)
        box: list[Any] = []
        thread = threading.Thread(target=lambda box=box, a=aggregator, s=state: box.append(a.collect(s)), daemon=True)
        thread.start()
        for silo in order:
            GOOD.deliver(config, silo, state, times(state, 1.1 + names.index(silo)), tokens=10 + names.index(silo))
            time.sleep(0.15)  # three polls: each arrival is seen on its own
        thread.join(30)
        deliveries = box[0]
        assert [delivery.manifest.silo for delivery in deliveries] == names
        aggregator.commit(state, deliveries, *aggregator.merge(state, deliveries))
        digests.append(state.parameters_digest)
    assert digests[0] == digests[1]


def test_bf16_deliveries(tmp_path: Path, tiny_config: TinyConfig) -> None:
    outer = {"optimizer": "sgd", "lr": 1.0, "codec": "bf16", "num_fragments": 2}
    config = tiny_config(tmp_path, silos={"beta": None}, outer=outer)
    aggregator, state = start(config)
    before = {name: value.clone() for name, value in state.parameters.items()}
    GOOD.deliver(config, "alpha", state, {n: torch.full_like(v, 0.25).bfloat16() for n, v in before.items()})
    one_round(aggregator, state)
    assert all(torch.equal(state.parameters[name], value - 0.25) for name, value in before.items())


# ---- bad deliveries


def put(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.update(values)


def put_payload(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["payloads"][1].update(values)


def in_second(change: Callable[[Tensors], Tensors]) -> Callable[[int, Tensors], Tensors]:
    return lambda fragment, tensors: change(dict(tensors)) if fragment == 1 else tensors


def first_as(change: Callable[[Tensor], Tensor]) -> Callable[[int, Tensors], Tensors]:
    def changed(tensors: Tensors) -> Tensors:
        name = min(tensors)
        return tensors | {name: change(tensors[name])}

    return in_second(changed)


def with_last(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


def truncate(folder: Path) -> None:
    file = folder / "001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    file = folder / "001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def replace_by_folder(folder: Path) -> None:
    (folder / "001.safetensors").unlink()
    (folder / "001.safetensors").mkdir()


def drop_first(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name != min(tensors)}


BAD: dict[str, tuple[Hand, str]] = {
    "truncated payload": (Hand(folder=truncate), "truncated"),
    "flipped bit": (Hand(folder=flip_a_bit), "corrupted"),
    "payload is missing": (Hand(folder=lambda folder: (folder / "000.safetensors").unlink()), "is missing"),
    "payload is a folder": (Hand(folder=replace_by_folder), "001.safetensors"),
    "wrong shape": (Hand(tensors=first_as(lambda t: t.reshape(-1, 1))), "torch.float32 ["),
    "wrong dtype": (Hand(tensors=first_as(lambda t: t.double())), "torch.float64"),
    "other coding's dtype": (Hand(tensors=first_as(lambda t: t.bfloat16())), "torch.bfloat16"),
    "NaN": (Hand(tensors=first_as(with_last(float("nan")))), "values that are not finite"),
    "infinity": (Hand(tensors=first_as(with_last(float("-inf")))), "values that are not finite"),
    "missing tensor": (Hand(tensors=in_second(drop_first)), "other tensors"),
    "extra tensor": (Hand(tensors=in_second(lambda t: t | {"parameter/x": torch.zeros(1)})), "other tensors"),
    "tensors of another kind": (
        Hand(tensors=in_second(lambda t: {n.replace("parameter/", "velocity/"): v for n, v in t.items()})),
        "other tensors",
    ),
    "not safetensors": (Hand(raw=b"these are no tensors, they are words"), "no safetensors file"),
    "empty file": (Hand(raw=b""), "no safetensors file"),
    "pickle": (Hand(raw=pickle.dumps({"parameter/x": [1.0]})), "no safetensors file"),
    "header beyond the file": (Hand(raw=b"\xff" * 8 + b"{}"), "no safetensors file"),
    "other codec": (Hand(manifest=put(codec="bf16")), "its codec is 'bf16', not 'fp32'"),
    "other base": (Hand(manifest=put(base_digest="d" * 64)), "its base_digest is "),
    "other version": (Hand(manifest=put(base_version=7)), "its base_version is 7, not 0"),
    "other round": (Hand(manifest=put(round=2)), "its round is 2, not 1"),
    "other contract": (Hand(manifest=put(contract_sha256="c" * 64)), "its contract_sha256 is "),
    "another silo's name": (Hand(manifest=put(silo="beta")), "its silo is 'beta', not 'alpha'"),
    "no tokens": (Hand(manifest=put(tokens=0)), "it counts 0 tokens"),
    "more steps than a round has": (Hand(manifest=put(steps=5)), "its steps is 5, not 4"),
    "no steps": (Hand(manifest=put(steps=0)), "steps"),
    "tokens below zero": (Hand(manifest=put(tokens=-5)), "tokens: -5 given"),
    "missing fragment": (Hand(manifest=lambda m: m["payloads"].pop()), "it has not the 2 fragments"),
    "fragment twice": (Hand(manifest=put_payload(fragment=0)), "it has not the 2 fragments"),
    "fragments swapped": (Hand(manifest=lambda m: m["payloads"].reverse()), "it has not the 2 fragments"),
    "one file for two": (
        Hand(manifest=lambda m: m["payloads"][1].update(m["payloads"][0], fragment=1)),
        "other tensors",
    ),
    "path traversal": (Hand(manifest=put_payload(file="../../../contract.json")), "allowed: a plain file name"),
    "absolute path": (Hand(manifest=put_payload(file="/contract.json")), "allowed: a plain file name"),
    "payloads are no list": (Hand(manifest=put(payloads=2)), "payloads: 2 given"),
    "key missing": (Hand(manifest=lambda m: m.pop("metrics")), "has keys"),
    "other format": (Hand(manifest=put(format=2)), "format 2 given"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_delivery_is_refused_and_the_round_goes_on(case: str, config: RunConfig) -> None:
    hand, expected = BAD[case]
    aggregator, state = start(config)
    before = dict(times(state, 1))
    GOOD.deliver(config, "beta", state, times(state, 4), tokens=300)
    hand.deliver(config, "alpha", state, times(state, 2))
    folder = Path(config.store_url) / "silos" / "alpha" / "000001"
    manifest = (folder / "manifest.json").read_bytes()
    deliveries: list[Any] = []
    thread = threading.Thread(target=lambda: deliveries.extend(aggregator.collect(state)), daemon=True)
    thread.start()
    wait_for(folder / "refused-0.json", thread)
    refused = json.loads((folder / "refused-0.json").read_text())
    assert expected in refused["reason"]
    assert refused["manifest_sha256"] == sha256(manifest)
    assert not (folder / "manifest.json").exists()
    assert thread.is_alive()  # waits on
    if (folder / "001.safetensors").is_dir():
        (folder / "001.safetensors").rmdir()
    GOOD.deliver(config, "alpha", state, times(state, 2), tokens=100)
    thread.join(30)
    assert [delivery.manifest.silo for delivery in deliveries] == ["alpha", "beta"]
    divisor, _ = aggregator.merge(state, deliveries)
    assert divisor == 400
    assert all(torch.equal(state.parameters[n], (v.double() * 2.875).float()) for n, v in before.items())
    assert not (folder / "refused-1.json").exists()


def wait_for(path: Path, thread: threading.Thread) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert thread.is_alive(), "the aggregator ended"
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.01)
    time.sleep(0.02)  # the other half of a refusal


def test_what_is_no_manifest_is_refused(config: RunConfig) -> None:
    aggregator, state = start(config)
    GOOD.deliver(config, "beta", state, times(state, 1))
    folder = Path(config.store_url) / "silos" / "alpha" / "000001"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(b"\x80\x04 a pickle?")
    thread = threading.Thread(target=aggregator.collect, args=(state,), daemon=True)
    thread.start()
    wait_for(folder / "refused-0.json", thread)
    assert json.loads((folder / "refused-0.json").read_text())["reason"].startswith("not JSON")
    GOOD.deliver(config, "alpha", state, times(state, 1))
    thread.join(30)
    assert not thread.is_alive()
