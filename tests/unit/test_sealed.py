"""Deliveries that are sealed: the real aggregator and a silo's real exchange, and a store whose keeper reads along."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from launch import cli
from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.base import Outgoing
from pretrain.exchange.history import History
from pretrain.exchange.payload import read_parameters
from pretrain.exchange.sealed import given_group_key, read_as_a_member, take_group_key
from pretrain.exchange.store import StoreExchange, file_payload
from pretrain.federation.preflight import check_silo
from pretrain.federation.relay import Relay
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.contract import build_contract
from pretrain.trust.keys import CommandSigner, load_signer, new_key
from pretrain.trust.ledger import GroupKey, Manifest, RefusedError
from pretrain.trust.members import OwnKeys, own_sealer, with_keys
from pretrain.trust.seal import sealed_bytes
from tests.conftest import TinyConfig
from tests.distributed.federation import assert_same_bits
from tests.support import one_line_error
from tests.unit.federation.test_verify import verified
from tests.unit.test_aggregate import GOOD, one_version, plus_noise, start
from tests.unit.test_aggregate_restart import assert_same_state
from tests.unit.test_signed import as_member, begin, manifest_file, sign_delivery
from tests.waiting import PATIENCE_SECONDS, wait_for

INT4 = {"codec": "int4", "downlink_codec": "int4", "lr": 0.5, "momentum": 0.5}


@pytest.fixture
def sealed(tmp_path: Path, tiny_config: TinyConfig) -> RunConfig:
    return make(tiny_config, tmp_path / "sealed")


def make(tiny_config: TinyConfig, directory: Path, *, seal: bool = True, **changes: Any) -> RunConfig:
    usual: dict[str, Any] = {"outer": INT4, "exchange": {"snapshot_versions": 4}, "inner": {"num_steps": 40}}
    return with_keys(tiny_config(directory, trust={"directory": "", "seal": seal}, **usual | changes), make=True)


def outgoing(config: RunConfig, state: OuterState, silo: str) -> tuple[ThroughStore, Outgoing]:
    """A silo's exchange, and what it is about to deliver for the next version, as its loop makes it."""
    GOOD.deliver(config, silo, state, plus_noise(state, ord(silo[0])))
    there = manifest_file(config, silo, state.version + 1)
    manifest = Manifest.from_bytes(there.read_bytes())
    file = config.silo_directory(silo) / "outbox" / f"{manifest.version:06d}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(there.with_name(file.name), file)
    there.unlink()
    through = ThroughStore(config, silo)
    through._store.read_contract()
    manifest = dataclasses.replace(manifest, contract_sha256=through.terms_sha256(manifest.version))
    payload = through.sealed(file_payload(file, manifest.payloads[0].fragment), file, manifest.version)
    return through, Outgoing(dataclasses.replace(manifest, payloads=[payload]), file)


def advance(config: RunConfig, num_versions: int) -> tuple[Aggregator, OuterState]:
    aggregator, state = begin(config)
    while state.version < num_versions:
        go_on(config, aggregator, state, config.full_roster)
    return aggregator, state


def go_on(config: RunConfig, aggregator: Aggregator, state: OuterState, silos: Sequence[str]) -> None:
    """The next version."""
    for silo in silos:
        through, sent = outgoing(config, state, silo)
        through.deliver(sent)
        through.close("")
    one_version(aggregator, state)


def payload_file(config: RunConfig, silo: str, version: int) -> Path:
    return manifest_file(config, silo, version).with_name(f"{version:06d}.safetensors")


@pytest.mark.parametrize("outer", [{}, {"num_fragments": 2}])
def test_a_sealed_run_comes_to_the_bits_of_one_that_is_not(
    outer: dict[str, Any], tmp_path: Path, tiny_config: TinyConfig
) -> None:
    found = {}
    for seal in (False, True):
        config = make(tiny_config, tmp_path / str(seal), seal=seal, outer=INT4 | outer)
        found[seal] = config, advance(config, 3)[1]
    (open_config, open_state), (config, state) = found.values()
    assert_same_state(open_state, state)
    assert_same_state(start(config)[1], state)  # a restart opens what came since the snapshots once more
    open_store, store = Path(open_config.store_url), Path(config.store_url)
    plain_files = sorted(open_store.rglob("*.safetensors"))
    assert len(plain_files) >= 3 * 2 + 3 + 1
    for file in plain_files:
        plain, there = file.read_bytes(), (store / file.relative_to(open_store)).read_bytes()
        assert len(there) == sealed_bytes(len(plain))
        pieces = [plain[at : at + 12] for at in range(0, len(plain) - 12, 12)]
        assert not [piece for piece in pieces if len(set(piece)) > 4 and piece in there]
    for silo in config.full_roster:  # its own copy is as it was
        file = Path("silos") / silo / "000002" / "000002.safetensors"
        assert (config.silo_directory(silo) / "outbox" / file.name).read_bytes() == (open_store / file).read_bytes()
    assert not left_open(config)


def left_open(config: RunConfig) -> list[str]:
    """What lies on the aggregator's machine of what it has opened, and what others may read there."""
    inbox = Path(config.directory) / "aggregator" / "inbox"
    return [*(file.name for file in inbox.iterdir()), *(["mode"] if inbox.stat().st_mode & 0o077 else [])]


def test_a_silo_that_starts_again_delivers_the_same_manifest(sealed: RunConfig) -> None:
    _, state = begin(sealed)
    first, sent = outgoing(sealed, state, "alpha")
    first.deliver(sent)
    before = manifest_file(sealed, "alpha", 1).read_bytes()
    bytes_before = payload_file(sealed, "alpha", 1).read_bytes()
    shutil.rmtree(sent.file.parent)
    again, sent = outgoing(sealed, state, "alpha")
    again.deliver(sent)
    assert manifest_file(sealed, "alpha", 1).read_bytes() == before
    assert payload_file(sealed, "alpha", 1).read_bytes() == bytes_before
    for through in (first, again):
        through.close("")


# ---- what is not opened


def from_another_place(config: RunConfig, state: OuterState) -> None:
    """Beta delivers what alpha has sealed, under its own signature."""
    shutil.copy(payload_file(config, "alpha", 1), payload_file(config, "beta", 1))
    file = manifest_file(config, "beta", 1)
    alphas = json.loads(manifest_file(config, "alpha", 1).read_bytes())["payloads"]
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"payloads": alphas}))


def not_sealed(config: RunConfig, state: OuterState) -> None:
    GOOD.deliver(config, "beta", state, plus_noise(state))


def too_large(config: RunConfig, state: OuterState) -> None:
    file = manifest_file(config, "beta", 1)
    manifest = json.loads(file.read_bytes())
    manifest["payloads"][0]["num_bytes"] += 10**6
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (from_another_place, "its payload cannot be opened: chunk 1 of 1 is not as beta sealed it for version 1"),
        (not_sealed, "its payload is not sealed, as the contract says it is"),
        (too_large, "its payload has "),
    ],
)
def test_what_cannot_be_opened_is_refused_and_delivered_again(
    spoil: Callable[[RunConfig, OuterState], None],
    reason: str,
    sealed: RunConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    aggregator, state = begin(sealed)
    for silo in sealed.full_roster:
        through, sent = outgoing(sealed, state, silo)
        through.deliver(sent)
    spoil(sealed, state)
    sign_delivery(sealed, "beta", 1, "beta")
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(aggregator.collect, state)
        wait_for(lambda: not manifest_file(sealed, "beta", 1).exists())
        through.deliver(sent)
        assert len(collecting.result(PATIENCE_SECONDS)) == 2
    (refusal,) = as_member(sealed, "beta").refusals("beta", 1)
    assert refusal.reason.startswith(reason)
    assert f"version 1: refused the delivery of silo beta: {reason}" in capsys.readouterr().out
    assert not left_open(sealed)


# ---- what comes back


def newest_parameters(exchange: StoreExchange, scratch: Path, version: int) -> dict[str, Tensor]:
    return read_parameters(exchange, History(exchange, 1).parameters(version, 0), scratch)


def test_every_member_reads_the_versions_and_nobody_else(sealed: RunConfig, tmp_path: Path) -> None:
    _, state = advance(sealed, 2)
    silo = ThroughStore(sealed, "alpha")
    silo.join()
    assert_same_bits(silo.initial().values, start_values := newest_parameters(silo._store, tmp_path / "0", 0))
    received = silo.receive(1, None, start_values)
    assert_same_bits(silo.receive(2, None, received.values).values, state.parameters)
    silo.close("")
    exchange = StoreExchange(sealed.store_url)
    exchange.read_contract()
    with pytest.raises(RefusedError, match=r"parameter-000.safetensors: it is sealed for the members of this run"):
        newest_parameters(exchange, tmp_path / "none", 0)
    assert list((tmp_path / "none").iterdir()) == []
    read_as_a_member(exchange, sealed)  # as the first silo that this machine has the key of
    assert_same_bits(newest_parameters(exchange, tmp_path / "1", 2), state.parameters)
    sealed.key_file("alpha").unlink()
    sealed.key_file("beta").unlink()
    exchange.members.sealer = None
    read_as_a_member(exchange, sealed)  # the operator's own
    assert_same_bits(newest_parameters(exchange, tmp_path / "2", 2), state.parameters)


def test_the_groups_key_is_the_operators_word_to_one_member(
    sealed: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(sealed)
    alpha, folder = as_member(sealed, "alpha"), Path(sealed.store_url) / "keys"
    alpha.members.sealer = own_sealer(alpha.members, sealed, "alpha")
    (epoch,) = alpha.members.epochs()
    before = (folder / "alpha.json").read_bytes()
    shutil.copy(folder / "beta.json", folder / "alpha.json")
    with pytest.raises(RefusedError, match=r"^keys/alpha.json, the key of what is sealed for all, is not there"):
        take_group_key(alpha)
    forged = GroupKey(contract_sha256=alpha.contract_sha256, member="alpha", sealed="00" * 48)
    (folder / "alpha.json").write_bytes(as_member(sealed, "beta").members.sign(forged).to_bytes())
    assert given_group_key(alpha, epoch, "alpha") is None
    assert "keys/alpha.json is passed over: " in capsys.readouterr().out
    betas = GroupKey.from_bytes((folder / "beta.json").read_bytes())
    with pytest.raises(RefusedError, match="the group's key cannot be opened"):
        alpha.members.sealer.take(epoch, betas.sealed)
    start(sealed)  # the operator writes it again, the same
    assert (folder / "alpha.json").read_bytes() == before
    take_group_key(alpha)


def test_a_relay_hands_on_what_is_sealed_as_it_is(sealed: RunConfig, tmp_path: Path) -> None:
    _, state = advance(sealed, 2)
    here = dataclasses.replace(
        sealed,
        directory=str(tmp_path / "site"),
        exchange=dataclasses.replace(sealed.exchange, url=str(tmp_path / "here")),
        silos={"alpha": sealed.silos["alpha"]},
        roster=sealed.full_roster,
        trust=dataclasses.replace(sealed.trust, directory=str(sealed.key_file("alpha").parent)),
    )
    relay = Relay(here, sealed.store_url)
    relay.start()
    relay.copy()
    for file in ("keys/alpha.json", "global/000002/change-000.safetensors"):
        assert (tmp_path / "here" / file).read_bytes() == (Path(sealed.store_url) / file).read_bytes()
    alpha = as_member(here, "alpha")
    read_as_a_member(alpha, here)
    assert_same_bits(newest_parameters(alpha, tmp_path / "scratch", 2), state.parameters)


# ---- atoll verify


def test_without_the_operators_key_all_but_the_merges_is_verified(sealed: RunConfig, tmp_path: Path) -> None:
    advance(sealed, 3)
    found = verified(sealed, tmp_path / "scratch")
    assert (found.findings, found.is_sealed, found.merged) == ([], True, [])
    assert (found.num_versions, found.num_manifests) == (4, 6)
    said = CliRunner().invoke(cli.app, ["verify", sealed.store_url])
    assert said.exit_code == 0
    assert "none merged again: deliveries are sealed, and only --key aggregator.key opens them" in said.stdout
    said = CliRunner().invoke(cli.app, ["verify", sealed.store_url, "--key", str(sealed.key_file(OPERATOR))])
    assert (said.exit_code, "3 merged again from their deliveries" in said.stdout) == (0, True)
    file = payload_file(sealed, "beta", 2)
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    (finding,) = verified(sealed, tmp_path / "scratch").findings
    assert finding.name == "silos/beta/000002/000002.safetensors"


def test_another_key_opens_nothing(sealed: RunConfig) -> None:
    advance(sealed, 1)
    said = CliRunner().invoke(cli.app, ["verify", sealed.store_url, "--key", str(sealed.key_file("beta"))])
    assert str(said.exception).startswith(f"--key: {sealed.key_file('beta')}, the key ")


# ---- mistakes


def test_sealing_takes_the_private_half_of_the_agreement_key(sealed: RunConfig) -> None:
    """With a command that signs, the file has the public line alone."""
    file = sealed.key_file("alpha")
    own = OwnKeys("alpha", file, load_signer(file))
    own.holding(public := new_key(file.with_name("alpha.key.1"), "alpha"))
    command = CommandSigner(public=public, command=("true",))
    line = one_line_error(OwnKeys("alpha", file, command).private, public)
    assert line.startswith(
        f"trust.directory: {file.parent} given, where of {public.fingerprint}, a key of alpha, there "
    )
    assert "no trust.key_command has" in line


def test_sealing_takes_keys_and_a_store(tmp_path: Path, tiny_config: TinyConfig) -> None:
    seal: dict[str, Any] = {"trust": {"seal": True}}
    assert one_line_error(tiny_config, tmp_path, roster=["alpha", "beta", "gamma"], **seal) == (
        "trust.seal: True given; allowed: false without trust.keys: it is the members' keys that seal"
    )
    exchange = {"kind": "none"}
    assert one_line_error(tiny_config, tmp_path, exchange=exchange, silos={"beta": None}, **seal).startswith(
        "trust.seal: True given; allowed: false with exchange.kind=none"
    )
    config = tiny_config(tmp_path, **seal)  # a local launch would make the keys
    check_silo(config, "alpha")
    for without in (lambda: build_contract(config), lambda: ThroughStore(config, "alpha"), lambda: start(config)):
        assert one_line_error(without).startswith("trust.seal: true given without trust.keys; allowed: with the key")


def test_sealing_is_part_of_the_contract(sealed: RunConfig) -> None:
    begin(sealed)
    other = dataclasses.replace(sealed, trust=dataclasses.replace(sealed.trust, seal=False))
    assert "trust.seal is false here and true there" in one_line_error(ThroughStore(other, "alpha").join)
