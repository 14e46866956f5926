"""`atoll launch join` up to the start: what it finds, says and refuses, in stores that a real aggregator has begun."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from launch.start.gpus import check_gpus
from launch.start.join import join
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import load_config
from pretrain.exchange.agreement import sign_contract
from pretrain.exchange.objects import Objects
from pretrain.exchange.store import StoreExchange
from pretrain.federation import join as joining
from pretrain.federation.preflight import check_run, check_store
from pretrain.federation.room import check_silo_room, silo_disk_bytes
from pretrain.host import software
from pretrain.host.identity import own_identity
from pretrain.silo.exported import export
from pretrain.silo.model import build_initial
from pretrain.sync.through_store import ThroughStore
from pretrain.trust import contract
from pretrain.trust.contract import build_contract, contract_bytes, first_contract
from pretrain.trust.keys import new_key
from tests.conftest import TinyConfig
from tests.support import VOCAB_SIZE, TinyText, merged, one_line_error, tiny_settings, tiny_silo
from tests.unit.merge.test_membership import join as announce
from tests.unit.test_aggregate import GOOD, one_version, plus_noise, start
from tests.unit.test_signed import as_member
from tests.waiting import PATIENCE_SECONDS, wait_for

OWN = ("directory", "tokenizer", "silo", "wandb")


@dataclasses.dataclass(kw_only=True)
class Site:
    """An institution that has a store's URL, its own text, and a short configuration."""

    directory: Path
    url: str
    text: TinyText

    def configure(self, **changes: Any) -> Path:
        """Write silo.yaml: what the contract does not say."""
        settings = tiny_settings(self.directory, self.text)
        own = {key: settings[key] for key in OWN} | {"silos": {"beta": tiny_silo(self.text, "beta")}}
        self.directory.mkdir(exist_ok=True)
        path = self.directory / "silo.yaml"
        path.write_text(yaml.safe_dump(merged(own, changes)))
        return path

    def join(self, *overrides: str, sites: list[Path] | None = None, **changes: Any) -> dict[str, list[str]]:
        """What a dry run says, by the first word of each line."""
        console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
        path = self.configure(**changes)
        assert join(self.url, [path], overrides, sites=sites or [], dry_run=True, console=console) == 0
        said: dict[str, list[str]] = {}
        for line in console.export_text().splitlines():
            said.setdefault(line[:11].strip(), []).append(line[11:])
        return said

    def refusal(self, *overrides: str, **changes: Any) -> str:
        """Why it does not join; nothing is written."""
        path, before = self.configure(**changes), self.files()
        message = one_line_error(join, self.url, [path], overrides, dry_run=True, console=Console(quiet=True))
        assert self.files() == before
        return message

    def files(self) -> set[Path]:
        """Of the store and this site."""
        return {path for folder in (Path(self.url), self.directory) for path in folder.rglob("*")}


@pytest.fixture
def begin(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> Callable[..., tuple[Site, RunConfig]]:
    """Begin a federation with a real aggregator; returns the site that is about to join as beta, and the federation."""

    def begin(**changes: Any) -> tuple[Site, RunConfig]:
        url = str(tmp_path / "store")
        config = tiny_config(tmp_path / "there", **merged({"exchange": {"url": url}}, changes))
        start(config)
        return Site(directory=tmp_path / "here", url=config.store_url, text=tiny_text), config

    return begin


Begin = Callable[..., tuple[Site, RunConfig]]


def test_a_short_configuration_becomes_the_contracts(begin: Begin) -> None:
    site, there = begin(
        model={"config": {"attn_implementation": "sdpa"}},
        inner={"lr": 0.004},
        outer={"codec": "int8", "num_fragments": 2},
    )
    before = site.files()
    said = site.join()
    assert said["contract"][0].startswith("tiny, sha256 ")
    assert said["training"] == ["12 steps of adamw, lr 0.004: 3 rounds of H = 4"]
    assert said["syncs"] == ["int8 up, fp32 down, 2 fragments, overlap 0; outer nesterov, lr 0.7; merged by mean"]
    assert said["roster"] == ["alpha, beta; every version waits for all"]
    assert said["now"] == ["version 0 of 7; silos alive: none; aggregator never seen"]
    assert said["warning"] == ["without an aggregator there is no commit: until it runs, silos wait"]
    assert said["software"][0].startswith(f"atoll {software.VERSION}, torch ")
    assert said["name"] == ["beta, on the roster and free"]
    assert said["parameters"] == ["39,840; version 0 fits"]
    assert "Mbit/s up, " in said["link"][0]
    assert said["enters"] == ["beta begins with version 0"]
    assert said["sends"][0].endswith("; no text leaves")
    directory = site.directory / "run"
    assert f"atoll train --config {directory}/config.yaml --silo beta" in said["dry run"][0]
    assert {path for path in site.files() - before if path.is_file() and path.name != "silo.yaml"} == {
        directory / "config.yaml"
    }
    here = load_config([directory / "config.yaml"])
    assert first_contract(build_contract(here) | {"run_id": "tiny"}) == (Path(site.url) / "contract.json").read_bytes()
    assert (list(here.silos), here.full_roster, here.store_url) == (["beta"], there.full_roster, site.url)
    assert here.silos["beta"] == dataclasses.replace(there.silos["beta"])
    assert site.join()["name"] == ["beta, on the roster and free"]  # a dry run has not taken it


def test_what_it_sends_is_what_a_silo_sends(begin: Begin) -> None:
    site, config = begin(outer={"codec": "int4", "num_fragments": 2})
    federation = joining.find_federation(site.url, [site.configure()], [])
    here = joining.joined_config(federation, [site.configure()], [])
    size = joining.measure_size(federation, here, "beta", 0)
    aggregator, state = start(config)
    sent = []
    for version in range(1, 5):
        for silo in ("alpha", "beta"):
            GOOD.deliver(config, silo, state, plus_noise(state, seed=version))
        one_version(aggregator, state)
        (payload,) = (Path(site.url) / f"silos/beta/{version:06d}").glob("*.safetensors")
        sent.append(payload.stat().st_size)
    assert size.sync_bytes[0] == max(sent)
    assert sent[:2] == sent[2:]
    assert size.sent_bytes == 4 * sent[0] + 3 * sent[1]
    assert joining.measure_size(federation, here, "beta", 2).sent_bytes == 3 * sent[0] + 2 * sent[1]
    found = site.join()
    assert found["now"][0].startswith("version 4 of 7; ")
    assert found["link"][0].endswith(" of the time between commits")


def test_a_federation_with_a_quorum_is_entered_at_its_newest_version(begin: Begin) -> None:
    site, config = begin(membership={"quorum": 1, "deadline_floor_seconds": 0, "deadline_ceiling_seconds": 0})
    aggregator, state = start(config)
    announce(config, ["alpha"])
    GOOD.deliver(config, "alpha", state, plus_noise(state))
    one_version(aggregator, state)
    said = site.join()
    assert said["roster"] == ["alpha, beta; 1 are enough for a version"]
    assert said["enters"] == ["beta takes over version 1, or the newest by then, and trains for the next"]


def test_a_silo_that_takes_part_goes_on(begin: Begin) -> None:
    site, _ = begin()
    site.join()
    config = load_config([site.directory / "run" / "config.yaml"])
    folder = config.silo_directory("beta")
    folder.mkdir(parents=True)
    silo = ThroughStore(config, "beta")
    silo.join()
    silo.close("")
    said = site.join()
    assert said["name"] == [f"beta, which {config.directory} has taken"]
    assert said["enters"] == ["beta begins with version 0"]
    checkpoint = folder / "checkpoints" / "step-00000004" / "state.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("{}")
    assert site.join()["enters"] == ["beta goes on from its newest checkpoint"]
    needed = silo_disk_bytes(config, "beta", {"weight": _Shape()})
    checkpoint.write_bytes(bytes(1000))
    assert silo_disk_bytes(config, "beta", {"weight": _Shape()}) == needed - 998
    (folder / "identity.json").unlink()
    assert "another run directory takes part under this name" in site.refusal()


class _Shape(tuple[int, ...]):
    def numel(self) -> int:
        return 1_000_000


def test_mistakes_are_one_line_and_write_nothing(begin: Begin, tmp_path: Path) -> None:
    site, _ = begin()
    refusal, url = site.refusal, site.url
    other = f"exchange.url: {url} given; it holds a run with another contract: "
    assert refusal("inner.lr=0.1").startswith(other + "inner.lr is 0.1 here and 0.003 there; change")
    assert refusal(name="mine", roster=["beta"]).startswith(
        other + 'name is "mine" here and "tiny" there; roster is ["beta"] here and ["alpha", "beta"] there'
    )
    assert refusal("outer.sync_interval_steps=0").startswith(other + "outer.sync_interval_steps is 0 here and 4 there")
    assert refusal("model.config.hidden_size=64").startswith(other + "model.config.hidden_size is 64 here and 32")
    assert refusal("exchange.kind=none") == (
        "exchange.kind: 'none' given; a silo can join only a run through a 'store'"
    )
    assert refusal("exchange.url=s3://other") == (
        f"exchange.url: 's3://other' given; allowed: '{url}', or a relay's directory for nodes that do not reach it"
    )
    assert refusal(silos={"gamma": tiny_silo(site.text, "gamma"), "beta": None}) == (
        "silos: 'gamma' given; allowed: names of the roster: alpha, beta; a member adds another by atoll contract "
        f"amend {url} ... trust.keys.gamma=... (docs/clusters.md)"
    )
    assert refusal(silos={"alpha": {}}) == "silos: alpha, beta given; allowed: one, this institution's"
    assert refusal(tokenizer=None).startswith("tokenizer: none given; allowed: a tokenizer.json, or a directory")
    changed = json.loads(site.text.tokenizer.read_text())
    changed["version"] = "2.0"
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert "allowed: the federation's, with " in refusal(f"tokenizer={tmp_path}/tokenizer.json")
    assert refusal("silos.beta.data=[/nowhere]").startswith("silos.beta.data: '/nowhere' given; it has no manifest")
    assert refusal("silos.beta.micro_batch_sequences=3").startswith("silos.beta.global_batch_sequences: 4 given")
    assert refusal("inner.lrr=1").startswith("inner.lrr: unknown key given")


def test_a_silo_of_several_nodes_needs_a_scheduler_or_torchrun(begin: Begin) -> None:
    site, _ = begin()
    changes: dict[str, Any] = {"silos": {"beta": {"num_nodes": 2, "micro_batch_sequences": 2}}}
    path = site.configure(**changes)
    message = one_line_error(join, site.url, [path], [], console=Console(quiet=True))
    assert message.startswith("silos.beta.num_nodes: 2 given; allowed: 1 without --site; or join with --dry-run")
    assert "dry run" in site.join(**changes)


def test_a_url_without_a_run_is_one_line(begin: Begin, tmp_path: Path) -> None:
    site, _ = begin()
    for url, expected in {
        "nowhere://run": "exchange.url: 'nowhere://run' given; ",
        "tcp://host:29500": "exchange.url: 'tcp://host:29500' given; ",
        str(tmp_path / "none"): f"store: '{tmp_path}/none' given; there is no run in it (no contract.json)",
    }.items():
        assert dataclasses.replace(site, url=url).refusal().startswith(expected)


def change_contract(url: str, **changes: Any) -> None:
    """Write another contract.json into a store; a change to None takes the key out."""
    file = Path(url) / "contract.json"
    file.write_bytes(contract_bytes(merged(json.loads(file.read_bytes()), changes)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"format": 3, "software": {"atoll": "0.9.1"}},
            "its run is of atoll 0.9.1, and this is atoll 0.1.0; install 0.9",
        ),
        ({"format": 1}, "its contract.json has format 1, and this atoll (0.1.0) reads 3; install the atoll"),
        ({"run_id": None}, "its contract.json has run_id null; allowed: [a-z0-9_-]{0,64}"),
        ({"run_id": "\x1b"}, r'its contract.json has run_id "\u001b"; allowed: '),
        ({"inner": None}, "its contract.json is not of this version of atoll: it has no inner"),
        ({"tokenizer_sha256": None}, "is not of this version of atoll: it has no tokenizer_sha256"),
        ({"inner": {"speed": 1}}, "is not of this version of atoll: inner.speed: unknown key given"),
        ({"outer": {"sync_interval_steps": 0}}, "outer.sync_interval_steps: 0 given; allowed: 1 or more"),
        ({"num_versions": 4}, "it holds a run with another contract: num_versions is 3 here and 4 there"),
        ({"model": {"config": {"hidden_size": "${oc.env:HOME}"}}}, "holds '${oc.env:HOME}', which no silo should"),
        ({"name": "a --output=/x"}, "holds 'a --output=/x', which no silo should"),
        ({"name": "a\x1b[2J"}, r"holds 'a\x1b[2J', which no silo should"),
        ({"model": {"config": {"auto_map": {"AutoModel": "x--y"}}}}, "holds 'auto_map', which no silo"),
        ({"model": {"config": {"attn_implementation": "x/y"}}}, "holds 'attn_implementation', which no silo"),
        ({"model": {"config": {"num_hidden_layers": 10**6}}}, "has num_hidden_layers of 1e+06; allowed: up to 1,000"),
        ({"model": {"config": {"hidden_size": 10**12}}}, "has hidden_size of 1e+12; allowed: up to 2,147,483,648"),
        ({"roster": [f"s{i}" for i in range(2000)]}, "has roster of 2000; allowed: up to 1,000"),
        ({"model": {"config": {"a": [{"_attn_implementation": "x/y"}]}}}, "holds '_attn_implementation', which no"),
    ],
)
def test_a_contract_that_cannot_be_taken_over(begin: Begin, changes: dict[str, Any], expected: str) -> None:
    site, _ = begin()
    change_contract(site.url, **changes)
    assert expected in site.refusal()


def test_a_contract_in_other_bytes_and_one_without_versions(begin: Begin) -> None:
    site, _ = begin()
    file = Path(site.url) / "contract.json"
    terms = json.loads(file.read_bytes())
    file.write_text(json.dumps(terms))
    assert site.refusal().endswith("its contract.json says the same in other bytes than atoll's")
    shutil.rmtree(Path(site.url) / "global")
    file.write_bytes(contract_bytes(merged(terms, {"software": None})))
    assert "there is no version 0 in it yet" in site.refusal()


# ---- software


def test_a_federation_of_other_versions(begin: Begin, monkeypatch: Any, capsys: Any) -> None:
    there = software.installed() | {"torch": "1.13.1+cu117", "transformers": "5.999.0"}
    monkeypatch.setattr(contract, "installed", lambda: there)
    site, config = begin()
    monkeypatch.undo()
    here, why = software.installed(), "the models may differ in their last bits"
    expected = [
        f"torch {here['torch']} here, 1.13.1+cu117 there: {why}",
        f"transformers {here['transformers']} here, 5.999.0 there: {why}",
    ]
    assert site.join()["warning"][1:] == expected
    start(config)  # whoever upgrades goes on
    capsys.readouterr()
    check_run(config)
    assert capsys.readouterr().out.splitlines() == [f"warning: {line}" for line in expected]
    config.silo_directory("beta").mkdir(parents=True)
    silo = ThroughStore(config, "beta")
    silo.join()
    silo.close("")
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "trust.keys: none given; nothing is signed: whoever can write to the store may speak for all",
        *expected,
    ]


def test_a_patch_is_no_difference() -> None:
    here = software.installed()
    assert list(here) == ["atoll", *software.PACKAGES]
    assert not software.differences({name: f"{software.minor(version)}.999+cpu" for name, version in here.items()})
    assert software.differences({"torch": "9.9", "flash": "1.0"})[1].startswith("flash none here, 1.0 there: ")


def test_another_atoll_is_refused_before_anything_starts(begin: Begin) -> None:
    site, config = begin()
    change_contract(site.url, software={"atoll": "0.2.3"})
    expected = f"exchange.url: {site.url} given; its run is of atoll 0.2.3, and this is atoll 0.1.0; install 0.2 here"
    assert one_line_error(check_store, config) == expected
    assert one_line_error(start, config) == expected
    assert one_line_error(ThroughStore(config, "alpha").join) == expected
    change_contract(site.url, software={"atoll": "0.1.99"})
    assert check_store(config) == []


def test_another_contract_is_refused_before_anything_is_submitted(begin: Begin) -> None:
    _, config = begin()
    config.inner.lr = 0.5
    assert "another contract: inner.lr is 0.5 here and 0.003 there" in one_line_error(check_store, config)


# ---- this machine


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 3}, "global/000000 has other parameters than this model; "),
        ({"num_hidden_layers": 900, "hidden_size": 4096}, "global/000000 has other parameters than this model; "),
        ({"to_dict": 1}, "model.config.to_dict: unknown key given; allowed: keys of llama"),
        ({"_name_or_path": "x"}, "model.config._name_or_path: unknown key given"),
        ({"hidden_act": "no"}, "model.config: KeyError: 'no'"),
        ({"rope_scaling": "no"}, "model.config.rope_scaling: 'no' given; allowed: a section"),
        ({"num_attention_heads": 0}, "model.config: ZeroDivisionError: "),
        ({"model_type": "vit"}, "model.config.model_type: 'vit' given; allowed: a decoder that"),
        ({"attn_implementation": "flash_attention_2"}, "model.config: ImportError: FlashAttention2"),
        ({"quantization_config": {"quant_method": "x"}}, "model.config.quantization_config: unknown key given"),
    ],
)
def test_a_model_that_is_built_otherwise_here(begin: Begin, changes: dict[str, Any], expected: str) -> None:
    site, _ = begin()
    federation = joining.find_federation(site.url, [site.configure()], [])
    config = joining.joined_config(federation, [site.configure()], [])
    config.model.config |= changes
    assert expected in one_line_error(joining.measure_size, federation, config, "beta", 0)


def test_a_checkpoints_bytes(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Parameters, two moments, and the global parameters: of fp32 each, whatever the precision and ZeRO stage."""
    silo, counted = {"keep_checkpoints": 1}, 16
    needed = silo_disk_bytes(tiny_config(tmp_path, silo=silo), "beta", {"weight": _Shape()})
    assert needed == (2 * counted + 12) * 1_000_000
    feedback = tiny_config(tmp_path, silo=silo, outer={"codec": "topk"})
    assert silo_disk_bytes(feedback, "beta", {"weight": _Shape()}) == needed + 8_000_000


def test_too_little_disk_and_too_few_gpus(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path)
    free = check_silo_room(config, "beta", 1)
    assert free > 0
    message = one_line_error(check_silo_room, config, "beta", 1 << 60)
    assert message.startswith(f"directory: '{tmp_path}/run' given; silo beta needs 1,152,921,504.607 GB there, and ")
    assert message.endswith(" GB are free; make room, name another directory, or lower silo.keep_checkpoints")
    assert not (tmp_path / "run").exists()
    for num_gpus in (0, 4, 8):
        check_gpus("law", 4, num_gpus, "of this machine")
    assert one_line_error(check_gpus, "law", 4, 2, "of this machine") == (
        "silos.law.processes_per_node: 4 given; allowed: up to 2, the GPUs of this machine"
    )


def test_no_probe_is_left_when_it_cannot_be_read(begin: Begin, monkeypatch: Any) -> None:
    site, _ = begin()
    federation, before = joining.find_federation(site.url, [site.configure()], []), site.files()

    def interrupted(objects: Objects, name: str, **limits: int) -> bytes:
        assert objects.exists(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(Objects, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        joining.measure_link(federation)
    assert site.files() == before


# ---- other kinds of federation


def test_a_federation_that_goes_on_from_a_checkpoint(begin: Begin, tmp_path: Path, tiny_text: TinyText) -> None:
    model = load_model_settings(tmp_path, tiny_text)
    for folder in ("model", "other"):
        export(build_initial(model.model, VOCAB_SIZE), tiny_text.tokenizer, tmp_path / folder)
        model.model.seed += 1
    site, _ = begin(model={"config": None, "checkpoint": str(tmp_path / "model")})
    assert site.refusal() == (
        "model.checkpoint: null given; this federation goes on from 2 files; allowed: a directory that has them"
    )
    message = site.refusal(f"model.checkpoint={tmp_path}/other")
    assert "another contract: model.checkpoint.model.safetensors is " in message
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    said = site.join(f"model.checkpoint={tmp_path}/copy")
    assert said["model"] == ["from a checkpoint, sequences of 16 tokens"]
    assert load_config([site.directory / "run/config.yaml"]).model.checkpoint == str(tmp_path / "copy")


def load_model_settings(directory: Path, text: TinyText) -> RunConfig:
    path = directory / "model.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(directory, text)))
    return load_config([path])


def test_a_finished_run(begin: Begin) -> None:
    site, config = begin(inner={"num_steps": 4})
    aggregator, state = start(config)
    for silo in ("alpha", "beta"):
        GOOD.deliver(config, silo, state, plus_noise(state))
    one_version(aggregator, state)
    assert site.refusal().endswith("its run is finished, with version 1; there is nothing to join")
    folder = site.directory / "run" / "silos" / "beta"
    folder.mkdir(parents=True)
    StoreExchange(site.url).claim_name("beta", own_identity(folder))
    assert site.join()["now"][0].startswith("version 1 of 1; ")


def test_a_bucket_and_a_relay(begin: Begin, s3_url: str, tmp_path: Path) -> None:
    site, _ = begin(exchange={"url": f"{s3_url}/join"})
    said = site.join()
    assert said["link"]
    objects = Objects(site.url)
    assert objects.names("") == ["contract.json", "global"]
    said = site.join(f"exchange.url={tmp_path}/shared")
    path = site.directory / "run" / "config.yaml"
    relay = f"atoll relay --config {path} --remote {site.url}"
    assert said["relay"] == [f"the silo's store is {tmp_path}/shared; {relay} must run where both are reached"]
    assert load_config([path]).store_url == f"{tmp_path}/shared"
    assert not (tmp_path / "shared").exists()


def test_a_signed_federation_waits_for_whom_it_is_joined_by(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before beta signs there is no version 0: it looks, is told what it lacks, and its start signs."""
    keys = tmp_path / "keys"
    keys.mkdir()
    public = {name: new_key(keys / f"{name}.key", name).text for name in ("alpha", "beta", OPERATOR)}
    trust = {"keys": public, "directory": str(keys)}
    config = tiny_config(tmp_path / "there", exchange={"url": str(tmp_path / "store")}, trust=trust)
    pool = ThreadPoolExecutor(1)
    starting = pool.submit(start, config)
    try:
        signed = (tmp_path / "store" / "signatures").glob
        wait_for(lambda: [path.name for path in signed("*")] == [f"{OPERATOR}.json"])  # and no file on its way there
        site = Site(directory=tmp_path / "here", url=config.store_url, text=tiny_text)
        assert "the private half of trust.keys.beta; allowed: where atoll keys new beta made it" in site.refusal()
        here = {"directory": str(tmp_path / "here" / "keys")}
        (tmp_path / "here" / "keys").mkdir()
        shutil.copy(keys / "alpha.key", tmp_path / "here" / "keys" / "beta.key")
        assert site.refusal(trust=here).startswith("trust.keys.beta: atoll-key-1:")
        (tmp_path / "here" / "keys" / "beta.key").unlink()
        shutil.copy(keys / "beta.key", tmp_path / "here" / "keys" / "beta.key")
        said = site.join(trust=here)
        assert said["now"][0].startswith("no version yet; ")
        assert said["parameters"] == ["39,840; version 0 is made when all have signed the contract, as this start does"]
        sign_contract(as_member(config, "beta"), "beta")
        assert site.join(trust=here)["parameters"] == said["parameters"], "its start waits for alpha, too"
        own = load_config([tmp_path / "here" / "run" / "config.yaml"])
    finally:
        for name in ("alpha", "beta"):
            sign_contract(as_member(config, name), name)  # or the aggregator waits for ever
        state = starting.result(PATIENCE_SECONDS)[1]
    assert (state.version, own.trust.keys) == (0, public)
