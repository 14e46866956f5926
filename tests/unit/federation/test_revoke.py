"""`atoll revoke`: the model without a member is the one of an aggregator to which the member never delivered."""

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor
from typer.testing import CliRunner

from launch import cli
from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.store import StoreExchange
from pretrain.federation.contract import Agreed, rotate
from pretrain.federation.exit import write_bundle
from pretrain.federation.export import exported_digest
from pretrain.federation.revoke import Revoked, Revoker
from pretrain.outer.digest import digest_tensors
from pretrain.trust.ledger import Manifest
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error
from tests.unit.federation.test_verify import INT4, files, signed
from tests.unit.test_aggregate import GOOD, Tensors, fragment_names, one_version, plus_noise, start
from tests.unit.test_contract_amended import make_version, propose
from tests.unit.test_contract_amended import sign as agree_to
from tests.unit.test_sealed import advance as advance_sealed
from tests.unit.test_sealed import make as sealed_run
from tests.unit.test_signed import as_member, begin, manifest_file, sign_delivery

SILOS = ("alpha", "beta", "gamma", "delta")
FIRST, LAST = 4, 6
EXCHANGE = {"snapshot_versions": 2, "keep_versions": 20}
ADAM = {"optimizer": "adam", "lr": 0.1, "num_fragments": 3, "overlap_steps": 1}
ADAM_INT8 = "int8, three fragments, overlap, adam"
LONGER = ("bf16, median", "topk, clip, max share")
WAYS: dict[str, dict[str, Any]] = {
    "int4": INT4,
    ADAM_INT8: ADAM | {"codec": "int8", "downlink_codec": "int4"},
    "bf16, median": {"codec": "bf16", "merge": "median"},
    "topk, clip, max share": INT4 | {"codec": "topk", "merge": "clip", "max_share": 0.6},
}


def quorum(tiny_config: TinyConfig, directory: Path, **settings: Any) -> RunConfig:
    """Four silos, of which three are enough, and nothing is pruned."""
    usual = {"membership": {"quorum": 3}, "silos": {"gamma": {}, "delta": {}}, "inner": {"num_steps": 40}}
    return signed(tiny_config, directory, **usual | {"exchange": EXCHANGE} | settings)


def noise(state: OuterState, silo: str) -> Tensors:
    return plus_noise(state, SILOS.index(silo))


def noisy(config: RunConfig, state: OuterState, silo: str) -> None:
    """A delivery of its own for every version and silo, of more tokens the later the silo's name."""
    GOOD.deliver(config, silo, state, noise(state, silo), tokens=100 + 37 * SILOS.index(silo))
    sign_delivery(config, silo, state.version + 1, silo)


Write = Callable[[str, OuterState], None]
"""Delivers as a silo for the version after a state."""


def played(
    config: RunConfig, write: Write, *, late: Collection[tuple[str, int]] = (), without: str = "", last: int = LAST
) -> tuple[Aggregator, OuterState]:
    """All versions; who is `late` for one delivers after its commit; who is `without` has no part from FIRST on."""
    aggregator, state = begin(config)
    states: dict[int, OuterState] = {}
    while state.version < last:
        states[at := state.version + 1] = copy.deepcopy(state)
        for silo in config.full_roster:
            for version in (at - 1, at):
                comes = version >= 1 and ((silo, version) in late) == (version < at)
                if comes and not (silo == without and at >= FIRST):
                    write(silo, states[version])
        one_version(aggregator, state)
    return aggregator, state


def history(config: RunConfig, **options: Any) -> tuple[Aggregator, OuterState]:
    return played(config, lambda silo, state: noisy(config, state, silo), **options)


def history_without(config: RunConfig, of: RunConfig, **options: Any) -> tuple[Aggregator, OuterState]:
    """What beta's contributions from FIRST on are not in; all else are the payloads of another run."""

    def write(silo: str, state: OuterState) -> None:
        the_same_to(config, of, silo, state.version + 1, base_digest(config, state))

    return played(config, write, without="beta", **options)


def base_digest(config: RunConfig, state: OuterState) -> str:
    return digest_tensors((name, state.parameters[name]) for name in fragment_names(config, state, state.version + 1))


def the_same_to(config: RunConfig, of: RunConfig, silo: str, version: int, digest: str) -> None:
    """What a silo delivered in another run, the very payload, where the base has become another."""
    folder = shutil.copytree(manifest_file(of, silo, version).parent, manifest_file(config, silo, version).parent)
    manifest, member = Manifest.from_bytes((folder / "manifest.json").read_bytes()), as_member(config, silo)
    cosigned = hashlib.sha256(member.commit_bytes(version - 1)).hexdigest()
    changed = dataclasses.replace(
        manifest, base_digest=digest, contract_sha256=member.contract_sha256, cosigned=cosigned
    )
    (folder / "manifest.json").write_bytes(member.members.sign(changed).to_bytes())


def revoked(config: RunConfig, scratch: Path, member: str = "beta", first: int = FIRST, **options: Any) -> Revoked:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    exchange = StoreExchange(config.store_url)
    assert exchange.read_contract()
    return Revoker(config, exchange, scratch, tell=lambda line: None).revoke(member, first, **options)


@pytest.fixture(scope="module")
def over(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> RunConfig:
    """A run directory with a signed run in it."""
    config = quorum(tiny_config, tmp_path_factory.mktemp("over"), outer=INT4)
    history(config)
    save_config(config, Path(config.directory) / "config.yaml")
    return config


def newest(config: RunConfig) -> OuterState:
    """What an aggregator that starts again goes on from."""
    return start(config)[1]


@pytest.mark.parametrize("way", ["int4", ADAM_INT8, *(pytest.param(way, marks=pytest.mark.soak) for way in LONGER)])
def test_it_is_what_an_aggregator_makes_of_the_others(
    way: str, over: RunConfig, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    """To the last bit, parameters and outer state, given the same coded deliveries without the member's."""
    config = over if way == "int4" else quorum(tiny_config, tmp_path / "with", outer=WAYS[way])
    ends = newest(over) if way == "int4" else history(config)[1]
    before = files(config)
    found = revoked(config, tmp_path / "scratch")
    assert files(config) == before
    other = quorum(tiny_config, tmp_path / "without", outer=WAYS[way])
    _, state = history_without(other, config)
    assert found.record.parameters_digest == state.parameters_digest != ends.parameters_digest
    assert all(torch.equal(found.parameters[name], value) for name, value in state.parameters.items())
    assert found.kept.keys() == state.kept.keys()
    for kind, of in state.kept.items():
        assert all(torch.equal(found.kept[kind][name], value) for name, value in of.items())
    assert all(torch.equal(found.original[name], value) for name, value in ends.parameters.items())
    commits = [StoreExchange(other.store_url).peek_commits([version])[0] for version in range(FIRST, LAST + 1)]
    assert [one.divisor_left for one in found.versions] == [commit.divisor for commit in commits]
    assert found.distance == pytest.approx(length(found.parameters[n] - p for n, p in ends.parameters.items()))
    assert found.relative == pytest.approx(found.distance / length(ends.parameters.values()))


def length(tensors: Iterable[Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).double().norm().item()


@pytest.mark.soak
def test_late_deliveries_count_with_the_share_that_they_had(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Gamma's for version 5 came after its commit, and is in 6; beta's for 3 is in 4, and is taken out of it."""
    late, rules = {("gamma", 5), ("beta", 3)}, {"quorum": 2, "stale_weight": 0.5}
    config, other = (quorum(tiny_config, tmp_path / name, outer=INT4, membership=rules) for name in ("with", "without"))
    _, ends = history(config, late=late)
    _, state = history_without(other, config, late=late)
    found = revoked(config, tmp_path / "scratch")
    assert found.record.parameters_digest == state.parameters_digest != ends.parameters_digest
    assert [one.weight for one in found.versions] == [137 + 68, 137, 137]


def test_values_count_for_what_they_were_away_from_where_they_began(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Codec fp32, sgd with lr 1: the others' mean pseudo-gradient, as it was, comes off the model without beta."""
    config = quorum(tiny_config, tmp_path, outer={"optimizer": "sgd", "lr": 1.0})
    states: dict[int, OuterState] = {}

    def write(silo: str, state: OuterState) -> None:
        states[state.version] = state
        noisy(config, state, silo)

    played(config, write)
    found = revoked(config, tmp_path / "scratch")
    weights = {silo: 100 + 37 * SILOS.index(silo) for silo in SILOS if silo != "beta"}
    for name, value in states[FIRST - 1].parameters.items():
        expected = value.double()
        for version in range(FIRST - 1, LAST):
            for silo, weight in weights.items():
                away = states[version].parameters[name].double() - noise(states[version], silo)[name].double()
                expected -= away * weight / sum(weights.values())
        assert torch.allclose(found.parameters[name].double(), expected, rtol=0, atol=1e-6)


def test_a_version_of_which_nobody_is_left_changes_nothing(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = quorum(tiny_config, tmp_path, outer=INT4, membership={"quorum": 1})
    aggregator, state = begin(config)
    for version in (1, 2, 3):
        for silo in SILOS if version < 3 else ("beta",):
            noisy(config, state, silo)
        one_version(aggregator, state)
    found = revoked(config, tmp_path / "scratch", first=3)
    assert (found.unchanged, [one.divisor_left for one in found.versions]) == ([3], [0])
    exchange = as_member(config, "alpha")
    assert found.record.parameters_digest == exchange.read_commit(2).parameters_digest


# ---- what cannot be


def test_what_is_pruned_or_wrong_is_one_line(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = quorum(tiny_config, tmp_path, outer=INT4, exchange={"snapshot_versions": 2, "keep_versions": 2})
    history(config)  # nobody has said that he is there, so that nothing is kept for his sake

    def line(*arguments: Any, **options: Any) -> str:
        return one_line_error(revoked, config, tmp_path / "scratch", *arguments, **options)

    assert line(first=4) == (
        "--from: 4 given; what versions before 5 would be merged again from is pruned; allowed: 5 to 6 "
        "(trust.keep_deliveries keeps more)"
    )
    assert revoked(config, tmp_path / "scratch", first=5).record.from_version == 5
    assert line(first=8) == "--from: 8 given; allowed: 1 to 6"
    assert line(first=6, last=9) == "--until: 9 given; allowed: 1 to 6"
    assert line("epsilon") == "member: 'epsilon' given; allowed: alpha, beta, delta, gamma"
    manifest_file(config, "alpha", 6).with_name("000006.safetensors").unlink()
    assert line(first=6).endswith("allowed: none (trust.keep_deliveries keeps more)")


def test_too_few_for_a_robust_merge_is_one_line(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = quorum(tiny_config, tmp_path, outer={"merge": "trimmed_mean"}, silos={"gamma": {}})
    history(config, last=FIRST)
    assert one_line_error(revoked, config, tmp_path / "scratch").endswith(
        "version 4 cannot be merged without it, as outer.merge=trimmed_mean says: 2 silos given; allowed: more than "
        "twice 1 malicious ones"
    )


# ---- the command


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["revoke", "beta", *map(str, arguments)])


def test_the_model_without_a_member_is_written_compared_and_gone_on_from(
    over: RunConfig, tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    target, valid = tmp_path / "model", tiny_text.packed["beta"] / "valid"
    said = command(over.directory, "--from", 4, "--to", target, "--valid", f"beta={valid}", "--reason", "withdrawn")
    assert said.exit_code == 0, said.output
    lines = said.stdout.splitlines()
    assert lines[1].split() == ["4", "137", "137", "622", "485"]
    assert lines[4] == "without     beta, versions 4 to 6: 411 tokens of 3 versions taken out"
    assert lines[5].startswith("distance    ")
    assert lines[6].startswith("loss        beta: ")
    record = json.loads((target / "revocation.json").read_bytes())
    assert (record["member"], record["from_version"], record["to_version"]) == ("beta", 4, 6)
    assert (record["reason"], record["signer"], record["signature"]) == ("withdrawn", "", None)
    commit = (Path(over.store_url) / "global/000006/commit.json").read_bytes()
    assert record["commit_sha256"] == hashlib.sha256(commit).hexdigest()
    assert exported_digest(target) == record["parameters_digest"]
    again = command(over.directory, "--from", 4, "--to", target)
    assert str(again.exception) == f"--to: {str(target)!r} given; it exists already, and nothing is overwritten"
    # From its store alone, with the tokenizer, comes the same.
    told = command(over.store_url, "--from", 4, "--json", "--tokenizer", over.tokenizer)
    assert json.loads(told.stdout)["record"]["parameters_digest"] == record["parameters_digest"]
    # A federation begins a new run with it.
    new = tiny_config(tmp_path / "new", model={"config": None, "checkpoint": str(target)})
    assert start(new)[1].parameters_digest == record["parameters_digest"]


def test_members_sign_what_they_come_to(over: RunConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(over, directory=str(shutil.copytree(over.directory, tmp_path / "run")))

    def signs(silo: str, *more: object) -> Result:
        return command(config.directory, "--from", 4, "--sign", "--silo", silo, *more)

    assert str(command(config.directory, "--from", 4, "--sign").exception) == (
        "--silo: '' given; allowed with --sign: aggregator, alpha, beta, delta, gamma"
    )
    assert command(config.directory, "--check").stdout == "nobody has signed a revocation of beta\n"
    first = signs("alpha", "--reason", "withdrawn")
    assert first.exit_code == 0, first.output
    assert first.stdout.endswith(", signed by alpha\n")
    assert signs(OPERATOR, "--json").exit_code == 0  # with alpha's reason
    folder = Path(config.store_url) / "revocations" / "beta-000004-000006"
    assert sorted(file.name for file in folder.iterdir()) == ["aggregator.json", "alpha.json"]
    assert "has signed parameters" in str(signs("gamma", "--reason", "another").exception)
    shutil.copy(folder / "alpha.json", folder / "gamma.json")
    digest = json.loads((folder / "alpha.json").read_bytes())["parameters_digest"]
    checked = command(config.directory, "--check")
    assert (checked.exit_code, checked.stdout.splitlines()) == (
        1,
        [
            f"revocations/beta-000004-000006: parameters {digest}; reason: withdrawn",
            "  signed by aggregator, alpha; not by beta, delta, gamma",
            "  WRONG gamma: it is of another run, member, version or signer",
        ],
    )
    # Somebody who can write to the store has changed what is merged: nobody signs the outcome.
    file = manifest_file(config, "gamma", 5).with_name("000005.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    words = "version 5 cannot be merged again: silos/gamma/000005/000005.safetensors has not the"
    assert words in str(signs("gamma").exception)
    assert json.loads(command(config.directory, "--check", "--json").stdout)[0]["signed"] == ["aggregator", "alpha"]


def test_sealed_deliveries_take_the_operators_key(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """And come to the parameters of the same run without seals."""
    digests = []
    for seal in (False, True):
        config = sealed_run(tiny_config, tmp_path / str(seal), seal=seal)
        advance_sealed(config, 3)
        save_config(config, Path(config.directory) / "config.yaml")
        key = config.key_file(OPERATOR).rename(tmp_path / f"{seal}.key")
        if seal:
            line = str(command(config.directory, "--from", 2).exception)
            assert line.startswith("--key: none given; deliveries are sealed; allowed: ")
        said = command(config.directory, "--from", 2, "--json", "--key", key)
        assert said.exit_code == 0, said.output
        digests.append(json.loads(said.stdout)["record"]["parameters_digest"])
    assert digests[0] == digests[1]


def test_an_amended_run_goes_by_what_held_at_each_version(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Another learning rate and another key of alpha's from version 3 on: merged again so, signed so, left so."""
    config = signed(tiny_config, tmp_path, outer=INT4, exchange=EXCHANGE, membership={"quorum": 1})
    aggregator, state = begin(config)
    propose(config, "alpha", 3, "outer.lr=0.25")
    assert agree_to(config, "beta") == []
    rotate(Agreed.at(config.store_url), "alpha", Path(config.directory) / "keys", 3)
    while state.version < 4:
        make_version(config, aggregator, state)
    save_config(config, Path(config.directory) / "config.yaml")
    found = revoked(config, tmp_path / "scratch", first=2)  # and its own history comes to the digests of its commits
    assert found.record.to_version == 4
    said = command(config.directory, "--from", 2, "--sign", "--silo", "alpha")
    assert said.exit_code == 0, said.output
    assert "signed by alpha; not by aggregator, beta\n" in command(config.directory, "--check").stdout
    write_bundle(config, "alpha", tmp_path / "bundle", tell=lambda line: None)
    assert CliRunner().invoke(cli.app, ["verify", str(tmp_path / "bundle")]).exit_code == 0
