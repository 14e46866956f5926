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
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.allowed import CODECS
from pretrain.config.keys import RunConfig
from pretrain.host.journal import Journal
from pretrain.outer.codec import apply_change, decoded, encode
from pretrain.outer.digest import digest_tensors
from tests.conftest import TinyConfig
from tests.waiting import PATIENCE_SECONDS, wait_for

Tensors = dict[str, Tensor]
OUTER = {"lr": 0.5, "momentum": 0.5, "num_fragments": 2}
ROUNDS = {"num_steps": 8, "lr": 0.003}  # two of four steps: with two fragments, versions 1 to 5


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def start(config: RunConfig) -> tuple[Aggregator, OuterState]:
    Path(config.directory).mkdir(parents=True, exist_ok=True)
    aggregator = Aggregator(config, Journal(config, "aggregator", silo=None))
    return aggregator, aggregator.start()


def one_version(aggregator: Aggregator, state: OuterState) -> None:
    deliveries = aggregator.collect(state)
    merged = aggregator.merge(state, deliveries)
    aggregator.commit(state, deliveries, merged)
    aggregator.finish()


def times(state: OuterState, factor: float) -> Tensors:
    """Local parameters that are `factor` times the global ones."""
    return {name: value * factor for name, value in state.parameters.items()}


def plus_noise(state: OuterState, seed: int = 0) -> Tensors:
    """Local parameters near the global ones, others for each version and seed."""
    noise = torch.Generator().manual_seed(100 * seed + state.version)
    return {n: v + 0.01 * torch.randn(v.shape, generator=noise) for n, v in sorted(state.parameters.items())}


def fragment_names(config: RunConfig, state: OuterState, version: int) -> list[str]:
    """Names of what a version changes."""
    sizes = {name: value.numel() for name, value in state.parameters.items()}
    return config.cut(sizes)[version % config.outer.num_fragments]


def commit_of(config: RunConfig, version: int) -> dict[str, Any]:
    return json.loads((Path(config.store_url) / "global" / f"{version:06d}" / "commit.json").read_bytes())


def stored(config: RunConfig, version: int, file: str) -> Tensors:
    return load_file(Path(config.store_url) / "global" / f"{version:06d}" / file)


@dataclass(kw_only=True)
class Hand:
    """Writes a delivery as the design describes it, and spoils it on request."""

    codec: str | None = None
    """Codes the tensors with another codec than the manifest says."""
    holds: int | None = None
    """Holds the tensors that another version changes."""
    tensors: Callable[[Tensors], Mapping[str, Tensor]] = lambda tensors: tensors
    """Changes what the payload holds, before it is saved."""
    raw: bytes | None = None
    """Instead of a safetensors file, with the right checksum."""
    manifest: Callable[[dict[str, Any]], object] = lambda manifest: None
    """Changes the manifest."""
    folder: Callable[[Path], object] = lambda folder: None
    """Changes the files after their checksums were taken."""

    def deliver(self, config: RunConfig, silo: str, state: OuterState, local: Tensors, *, tokens: int = 100) -> None:
        store, version, schedule = Path(config.store_url), state.version + 1, config.schedule
        folder = store / "silos" / silo / f"{version:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        names, codec = fragment_names(config, state, version), config.outer.codec
        payload = {}
        for name in fragment_names(config, state, self.holds or version):
            for part, value in encode(self.codec or codec, state.parameters[name], local[name]).items():
                payload[f"parameter/{part}/{name}"] = value
        file = folder / f"{version:06d}.safetensors"
        save_file(dict(self.tensors(payload)), file)
        if self.raw is not None:
            file.write_bytes(self.raw)
        data = file.read_bytes()
        row = {
            "fragment": version % config.outer.num_fragments,
            "file": file.name,
            "blake3": blake3(data).hexdigest(),
            "num_bytes": len(data),
        }
        manifest = {
            "format": 3,
            "contract_sha256": sha256((store / "contract.json").read_bytes()),
            "silo": silo,
            "version": version,
            "base_version": max(0, version - config.outer.num_fragments),
            "base_digest": digest_tensors((name, state.parameters[name]) for name in names),
            "cosigned": sha256((store / f"global/{version - 1:06d}/commit.json").read_bytes()),
            "codec": codec,
            "payloads": [row],
            "tokens": tokens,
            "steps": schedule.steps(version),
            "tokens_total": tokens * version,
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


# ---- good versions


def test_version_0_is_the_seeded_model_and_a_state_of_zeros(config: RunConfig) -> None:
    _, state = start(config)
    commit = commit_of(config, 0)
    assert (commit["version"], commit["previous"], commit["contributors"], commit["divisor"]) == (0, None, [], 0)
    assert [p["file"] for p in commit["payloads"]] == ["parameter-000.safetensors", "parameter-001.safetensors"]
    assert commit["outer_digest"] == "", "an outer state of zeros is not written"
    assert state.parameters.keys() == state.kept["velocity"].keys()
    assert all(not value.any() for value in state.kept["velocity"].values())
    assert all(value.dtype == torch.float32 for value in state.parameters.values())
    found = {n: v for p in commit["payloads"] for n, v in stored(config, 0, p["file"]).items()}
    assert found.keys() == {f"parameter/values/{name}" for name in state.parameters}
    assert all(torch.equal(found[f"parameter/values/{name}"], value) for name, value in state.parameters.items())


def test_two_good_versions_by_hand(config: RunConfig) -> None:
    aggregator, state = start(config)
    before = {name: value.double() for name, value in state.parameters.items()}
    # Locals 2p and 4p are pseudo-gradients -p and -3p; with 100 and 300 tokens their mean is -2.5p, and the first
    # Nesterov step with lr 0.5 and momentum 0.5 is p + 0.5 * 1.5 * 2.5p = 2.875p.
    for version in (1, 2):
        changed = fragment_names(config, state, version)
        GOOD.deliver(config, "beta", state, times(state, 4), tokens=300)
        GOOD.deliver(config, "alpha", state, times(state, 2), tokens=100)
        others = {name: value.clone() for name, value in state.parameters.items() if name not in changed}
        one_version(aggregator, state)
        assert state.version == version
        for name in changed:
            assert torch.equal(state.parameters[name], (before[name] * 2.875).float())
            assert torch.equal(state.kept["velocity"][name], (before[name] * -2.5).float())
        assert all(torch.equal(state.parameters[name], value) for name, value in others.items())
        check_commit(config, state, changed, before)


def check_commit(config: RunConfig, state: OuterState, changed: list[str], before: Tensors) -> None:
    """The newest commit of the run above."""
    store, version = Path(config.store_url), state.version
    commit = commit_of(config, version)
    assert commit["previous"] == sha256((store / "global" / f"{version - 1:06d}" / "commit.json").read_bytes())
    assert commit["divisor"] == 400
    assert [(c["silo"], c["weight"], c["tokens"]) for c in commit["contributors"]] == [
        ("alpha", 100, 100),
        ("beta", 300, 300),
    ]
    for contributor in commit["contributors"]:
        manifest = store / "silos" / contributor["silo"] / f"{version:06d}" / "manifest.json"
        assert contributor["manifest_sha256"] == sha256(manifest.read_bytes())
    assert commit["metrics"]["cosine_mean"] == pytest.approx(1.0)  # both go the same way
    norm = sum(before[name].square().sum().item() for name in changed) ** 0.5
    assert commit["metrics"]["update_norm"] == pytest.approx(1.875 * norm, rel=1e-6)
    assert commit["parameters_digest"] == state.parameters_digest == digest_tensors(state.parameters.items())
    fragment = version % 2
    assert [p["file"] for p in commit["payloads"]] == [f"parameter-{fragment:03d}.safetensors"]
    assert commit["outer_digest"] == ""  # no snapshot: these are every second step's
    assert stored(config, version, f"parameter-{fragment:03d}.safetensors").keys() == {
        f"parameter/values/{name}" for name in changed
    }


def test_one_silo_with_sgd_of_lr_1_is_left_alone(tmp_path: Path, tiny_config: TinyConfig) -> None:
    outer = {"optimizer": "sgd", "lr": 1.0, "num_fragments": 2}
    config = tiny_config(tmp_path, silos={"beta": None}, inner=ROUNDS, outer=outer)
    aggregator, state = start(config)
    for version in range(1, 6):
        local = plus_noise(state)
        GOOD.deliver(config, "alpha", state, local, tokens=7)
        one_version(aggregator, state)
        for name in fragment_names(config, state, version):
            assert torch.equal(state.parameters[name], local[name])


def test_identical_silos_are_one_silo_to_the_last_bit(tmp_path: Path, tiny_config: TinyConfig) -> None:
    outer = {"lr": 0.7, "momentum": 0.9, "num_fragments": 2}
    states = []
    for name, silos in (("one", {"beta": None}), ("two", {}), ("three", {"gamma": {}})):
        config = tiny_config(tmp_path / name, silos=silos, outer=outer)
        aggregator, state = start(config)
        for _ in range(4):
            local = plus_noise(state)
            for index, silo in enumerate(config.full_roster):
                GOOD.deliver(config, silo, state, local, tokens=3 + 4 * index)
            one_version(aggregator, state)
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
        thread.join(PATIENCE_SECONDS)
        deliveries = box[0]
        assert [delivery.manifest.silo for delivery in deliveries] == names
        merged = aggregator.merge(state, deliveries)
        aggregator.commit(state, deliveries, merged)
        digests.append(state.parameters_digest)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("codec", CODECS)
def test_coded_deliveries(codec: str, tmp_path: Path, tiny_config: TinyConfig) -> None:
    """With one silo, SGD and lr 1 the pseudo-gradient that arrived is taken as it is."""
    outer = {"optimizer": "sgd", "lr": 1.0, "codec": codec, "num_fragments": 2}
    config = tiny_config(tmp_path, silos={"beta": None}, outer=outer)
    aggregator, state = start(config)
    before, local = {name: value.clone() for name, value in state.parameters.items()}, plus_noise(state)
    GOOD.deliver(config, "alpha", state, local)
    one_version(aggregator, state)
    for name in fragment_names(config, state, 1):
        arrived = decoded(codec, before[name], encode(codec, before[name], local[name]))
        assert torch.equal(state.parameters[name], (before[name].double() - arrived).float())


@pytest.mark.parametrize("codec", CODECS)
def test_coded_commits(codec: str, tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Whoever applies the changes from version 0 on holds what each commit's digest names; the target is followed."""
    outer = {"optimizer": "sgd", "lr": 1.0, "downlink_codec": codec, "num_fragments": 2}
    config = tiny_config(tmp_path, silos={"beta": None}, inner=ROUNDS, outer=outer)
    aggregator, state = start(config)
    holder = {
        n.split("/", 2)[2]: v for f in (0, 1) for n, v in stored(config, 0, f"parameter-{f:03d}.safetensors").items()
    }
    target = {name: value.double() for name, value in state.parameters.items()}
    for version in range(1, 6):
        names = fragment_names(config, state, version)
        local = plus_noise(state)
        for name in names:
            target[name] += local[name].double() - state.parameters[name].double()
        GOOD.deliver(config, "alpha", state, local)
        one_version(aggregator, state)
        commit = commit_of(config, version)
        assert commit["codec"] == codec
        arrived = stored(config, version, commit["payloads"][0]["file"])
        for name in names:
            parts = {key.split("/", 2)[1]: value for key, value in arrived.items() if key.split("/", 2)[2] == name}
            torch.testing.assert_close(state.target[name].double(), target[name], rtol=0, atol=1e-6)
            whole = encode(codec, holder[name], state.target[name])  # also what the fragment's last change left out
            assert all(torch.equal(parts[part], value) for part, value in whole.items())
            apply_change(codec, holder[name], parts)
        assert commit["parameters_digest"] == digest_tensors(holder.items()) == state.parameters_digest
    same = [torch.equal(state.target[name], value) for name, value in state.parameters.items()]
    assert all(same) == (codec == "fp32")


# ---- bad deliveries


def put(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.update(values)


def put_payload(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["payloads"][0].update(values)


def first_as(change: Callable[[Tensor], Tensor], part: str = "values") -> Callable[[Tensors], Tensors]:
    def changed(tensors: Tensors) -> Tensors:
        name = min(name for name in tensors if f"/{part}/" in name)
        return tensors | {name: change(tensors[name])}

    return changed


def with_last(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def truncate(folder: Path) -> None:
    file = folder / "000001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    file = folder / "000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def replace_by_folder(folder: Path) -> None:
    (folder / "000001.safetensors").unlink()
    (folder / "000001.safetensors").mkdir()


def drop_first(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name != min(tensors)}


def twice(manifest: dict[str, Any]) -> None:
    manifest["payloads"] *= 2


FOREIGN_KEY = "given; allowed: parameter/PART/NAME"
BAD: dict[str, tuple[Hand, str]] = {
    "truncated payload": (Hand(folder=truncate), "truncated"),
    "flipped bit": (Hand(folder=flip_a_bit), "corrupted"),
    "payload is missing": (Hand(folder=lambda folder: (folder / "000001.safetensors").unlink()), "is missing"),
    "payload is a folder": (Hand(folder=replace_by_folder), "000001.safetensors"),
    "wrong shape": (Hand(tensors=first_as(lambda t: t.reshape(-1, 1))), "{'values': 'torch.float32 ["),
    "wrong dtype": (Hand(tensors=first_as(lambda t: t.half())), "dtype F16 given; allowed: F32, I32, I64, BF16, U8"),
    "another dtype": (Hand(tensors=first_as(lambda t: t.int())), "torch.int32"),
    "twice as much": (Hand(tensors=first_as(lambda t: t.double())), "its payload has "),
    "other coding's dtype": (Hand(tensors=first_as(lambda t: t.bfloat16())), "{'values': 'torch.bfloat16 ["),
    "NaN": (Hand(tensors=first_as(with_last(float("nan")))), "infinite or NaN given; allowed: finite values"),
    "infinity": (Hand(tensors=first_as(with_last(float("-inf")))), "infinite or NaN given; allowed: finite values"),
    "missing tensor": (Hand(tensors=drop_first), "other tensors"),
    "extra tensor": (Hand(tensors=lambda t: t | {"parameter/values/x": torch.zeros(1)}), "other tensors"),
    "tensors of another fragment": (Hand(holds=2), "its payload has "),
    "a header without end": (
        Hand(raw=(60_000).to_bytes(8, "little") + b"{" + b" " * 70_000),
        "no safetensors file: its header has 60000 bytes; allowed: ",
    ),
    "tensors of another kind": (Hand(tensors=renamed("parameter/", "velocity/")), FOREIGN_KEY),
    "tensors of no part": (Hand(tensors=renamed("/values/", "/")), "given; allowed: "),
    "payload of another codec": (Hand(codec="int4"), "{'codes': 'torch.uint8 ["),
    "not safetensors": (Hand(raw=b"these are no tensors, they are words"), "no safetensors file"),
    "empty file": (Hand(raw=b""), "no safetensors file"),
    "pickle": (Hand(raw=pickle.dumps({"parameter/values/x": [1.0]})), "no safetensors file"),
    "header beyond the file": (Hand(raw=b"\xff" * 8 + b"{}"), "no safetensors file"),
    "other codec": (Hand(manifest=put(codec="bf16")), "its codec is 'bf16', not 'fp32'"),
    "unknown codec": (Hand(manifest=put(codec="zip")), "its codec is 'zip', not 'fp32'"),
    "other base": (Hand(manifest=put(base_digest="d" * 64)), "its base_digest is "),
    "other base version": (Hand(manifest=put(base_version=7)), "its base_version is 7, not 0"),
    "a commit of another history": (
        Hand(manifest=put(cosigned="e" * 64)),
        "silo alpha had adopted commit eeeeeeeeeeee when it delivered for version 1, which is none of this chain",
    ),
    "version of another time": (Hand(manifest=put(version=2)), "its version is 2, not 1"),
    "other contract": (Hand(manifest=put(contract_sha256="c" * 64)), "its contract_sha256 is "),
    "another silo's name": (Hand(manifest=put(silo="beta")), "its silo is 'beta', not 'alpha'"),
    "no tokens": (Hand(manifest=put(tokens=0)), "it counts 0 tokens"),
    "more steps than the fragment made": (Hand(manifest=put(steps=5)), "its steps is 5, not 2"),
    "no steps": (Hand(manifest=put(steps=0)), "its steps is 0, not 2"),
    "tokens beyond all sense": (Hand(manifest=put(tokens=(1 << 53) - 1)), "tokens, not 1 to 68719476736"),
    "a step beyond fp32": (
        Hand(tensors=first_as(with_last(-3.4e38))),
        "its pseudo-gradient has norm 3.4e+38; allowed: ",
    ),
    "tokens below zero": (Hand(manifest=put(tokens=-5)), "tokens: -5 given"),
    "no payload": (Hand(manifest=put(payloads=[])), "it has not just fragment 1"),
    "fragment twice": (Hand(manifest=twice), "it has not just fragment 1"),
    "other fragment": (Hand(manifest=put_payload(fragment=0)), "it has not just fragment 1"),
    "path traversal": (Hand(manifest=put_payload(file="../../../contract.json")), "allowed: a plain file name"),
    "absolute path": (Hand(manifest=put_payload(file="/contract.json")), "allowed: a plain file name"),
    "payloads are no list": (Hand(manifest=put(payloads=2)), "payloads: 2 given"),
    "key missing": (Hand(manifest=lambda m: m.pop("metrics")), "has keys"),
    "other format": (Hand(manifest=put(format=1)), "format 1 given; this version reads 3"),
}
BAD_INT4: dict[str, tuple[Hand, str]] = {
    "values instead": (Hand(codec="fp32"), "its payload has "),
    "finer than agreed": (Hand(codec="int8"), "its payload has "),
    "sparser than agreed": (Hand(codec="topk"), "parts ['codes', 'indices', 'scales'] given; allowed: ['codes', "),
    "scale is NaN": (Hand(tensors=first_as(with_last(float("nan")), "scales")), "a scale is negative, infinite, NaN"),
    "a scale too few": (Hand(tensors=first_as(lambda t: t[:-1], "scales")), "part scales of torch.bfloat16 ["),
    "no code of int4": (Hand(tensors=first_as(with_last(0x80), "codes")), "a code of -8 given; allowed: -7 to 7"),
    "no scales": (
        Hand(tensors=lambda t: {name: value for name, value in t.items() if "/scales/" not in name}),
        "parts ['codes'] given; allowed: ['codes', 'scales']",
    ),
}


def refused_then_taken(hand: Hand, expected: str, config: RunConfig) -> tuple[Aggregator, OuterState]:
    """A bad delivery is refused with its reason, the aggregator waits on, takes a good one, and merges."""
    aggregator, state = start(config)
    local = times(state, 2)
    GOOD.deliver(config, "beta", state, times(state, 4), tokens=300)
    hand.deliver(config, "alpha", state, local)
    folder = Path(config.store_url) / "silos" / "alpha" / "000001"
    manifest = (folder / "manifest.json").read_bytes()
    deliveries: list[Any] = []
    thread = threading.Thread(target=lambda: deliveries.extend(aggregator.collect(state)), daemon=True)
    thread.start()
    wait_for_refusal(folder, thread)
    refused = json.loads((folder / "refused-0.json").read_text())
    assert expected in refused["reason"]
    assert "\n" not in refused["reason"]
    assert refused["manifest_sha256"] == sha256(manifest)
    assert not (folder / "manifest.json").exists()
    assert thread.is_alive()  # waits on
    if (folder / "000001.safetensors").is_dir():
        (folder / "000001.safetensors").rmdir()
    GOOD.deliver(config, "alpha", state, local, tokens=100)
    thread.join(PATIENCE_SECONDS)
    assert [delivery.manifest.silo for delivery in deliveries] == ["alpha", "beta"]
    weights = aggregator.merge(state, deliveries).weights
    assert weights == [100, 300]
    assert not (folder / "refused-1.json").exists()
    return aggregator, state


def wait_for_refusal(folder: Path, thread: threading.Thread) -> None:
    """Until the first one is there; the aggregator, in its thread, has to wait on."""
    wait_for((folder / "refused-0.json").exists, poll_seconds=0.01, meanwhile=thread.is_alive)
    time.sleep(0.02)  # the other half of a refusal


@pytest.mark.parametrize("case", BAD)
def test_a_bad_delivery_is_refused_and_the_version_goes_on(case: str, config: RunConfig) -> None:
    _, state = refused_then_taken(*BAD[case], config)
    for name in fragment_names(config, state, 1):
        before = stored(config, 0, "parameter-001.safetensors")[f"parameter/values/{name}"]
        assert torch.equal(state.parameters[name], (before.double() * 2.875).float())


@pytest.mark.parametrize("case", BAD_INT4)
def test_a_badly_coded_delivery_is_refused(case: str, tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, inner=ROUNDS, outer=OUTER | {"codec": "int4"})
    _, state = refused_then_taken(*BAD_INT4[case], config)
    assert all(value.isfinite().all() for value in state.parameters.values())


def test_what_is_no_manifest_is_refused(config: RunConfig) -> None:
    aggregator, state = start(config)
    GOOD.deliver(config, "beta", state, times(state, 1))
    folder = Path(config.store_url) / "silos" / "alpha" / "000001"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(b"\x80\x04 a pickle?")
    thread = threading.Thread(target=aggregator.collect, args=(state,), daemon=True)
    thread.start()
    wait_for_refusal(folder, thread)
    assert json.loads((folder / "refused-0.json").read_text())["reason"].startswith("not JSON")
    GOOD.deliver(config, "alpha", state, times(state, 1))
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
