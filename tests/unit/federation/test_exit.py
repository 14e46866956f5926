"""`atoll exit`: a member's bundle, which is checked with nothing else there, and in which every change is found."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import cli
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.words import Evaluation
from pretrain.federation.bundle import BundleVerifier, Exit, VerifiedBundle, is_bundle
from pretrain.federation.exit import write_bundle
from pretrain.trust.members import own_signer
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.federation.test_verify import INT4, advance, files, signed
from tests.unit.test_aggregate import one_version
from tests.unit.test_sealed import advance as advance_sealed
from tests.unit.test_sealed import make as sealed_run
from tests.unit.test_signed import as_member, deliver

NUM_VERSIONS = 3


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> RunConfig:
    """A signed run that is over, with a bundle of each member beside it: alpha, beta."""
    place = tmp_path_factory.mktemp("left")
    config = signed(tiny_config, place, outer=INT4)
    advance(config, NUM_VERSIONS)
    for silo in config.full_roster:
        write_bundle(config, silo, place / silo, tell=lambda line: None)
    return config


@pytest.fixture
def bundle(left: RunConfig, tmp_path: Path) -> Path:
    """Alpha's, to spoil."""
    return shutil.copytree(Path(left.directory).parent / "alpha", tmp_path / "bundle")


def verified(bundle: Path) -> VerifiedBundle:
    scratch = bundle.parent / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return BundleVerifier(bundle, scratch, tell=lambda line: None).verify()


def test_a_bundle_is_whole_without_any_other_party(bundle: Path, left: RunConfig) -> None:
    found = verified(bundle)
    assert found.findings == []
    record = Exit.from_bytes((bundle / "exit.json").read_bytes())
    assert (found.member, record.version, record.missing) == ("alpha", NUM_VERSIONS, found.missing)
    assert found.store
    assert (found.store.num_versions, found.store.is_signed) == (NUM_VERSIONS + 1, True)
    assert (found.store.merged, found.missing) == ([1, 2, 3], [])
    store = Path(left.store_url)
    for name in ("contract.json", "signatures/beta.json", "silos/beta/000001/manifest.json"):
        assert (bundle / "store" / name).read_bytes() == (store / name).read_bytes()
    for silo in ("alpha", "beta"):
        assert (bundle / f"store/silos/{silo}/000002/000002.safetensors").is_file()
    shards = Path(left.silos["alpha"].data[0]) / "manifest.json"
    assert (bundle / "data/train/000/manifest.json").read_bytes() == shards.read_bytes()
    assert not [*bundle.rglob("*.bin")]
    assert len((bundle / "keys.txt").read_text().splitlines()) == 3


def test_it_is_checked_by_its_own_software_with_no_network(bundle: Path, tmp_path: Path) -> None:
    """Only what its requirements name is there (and not all of it: numba saves time), and nothing can be dialled."""
    software = shutil.copytree(bundle / "software", tmp_path / "copy")
    needed = {line.split("==")[0] for line in (software / "requirements.txt").read_text().splitlines()}
    assert {"torch", "blake3", "cryptography", "transformers"} <= needed
    code = f"""
import socket, sys
for missing in "deepspeed datasets wandb pyarrow matplotlib jinja2 datasketch zstandard numba".split():
    sys.modules[missing] = None
def refuse(*_): raise AssertionError("dialled")
socket.socket.connect = refuse
from launch.cli import main
import pretrain
assert pretrain.__file__.startswith({str(software)!r}), pretrain.__file__
sys.argv = ["atoll", "verify", {str(bundle)!r}, "--json"]
main()
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(software)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout[ran.stdout.index("{") :])
    assert (found["member"], found["findings"], found["store"]["merged"]) == ("alpha", [], [1, 2, 3])
    assert verified(bundle).findings == []  # it has written nothing into the bundle


# ---- what somebody has changed


def flip(rng: random.Random, file: Path, _: Path) -> None:
    data = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bytes(data))


def truncate(rng: random.Random, file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def remove(_rng: random.Random, file: Path, _: Path) -> None:
    file.unlink()


def add(rng: random.Random, file: Path, _: Path) -> None:
    file.with_name(f"added-{rng.randrange(1000)}{file.suffix}").write_bytes(file.read_bytes())


def swap(rng: random.Random, file: Path, bundle: Path) -> None:
    """With another file of the same kind that has other bytes."""
    others = [f for f in sorted(bundle.rglob(f"*{file.suffix}")) if f.is_file() and f.read_bytes() != file.read_bytes()]
    other = rng.choice(others)
    data = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(data)


def link(_rng: random.Random, file: Path, bundle: Path) -> None:
    """The same bytes, from elsewhere."""
    outside = bundle.parent / "outside"
    file.rename(outside)
    file.symlink_to(outside)


WAYS = (flip, truncate, remove, add, swap, link)


@pytest.mark.parametrize("num_spoilings", [12, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
def test_every_spoiling_is_found_by_name(num_spoilings: int, bundle: Path, tmp_path: Path) -> None:
    """Seeded, of every way and every kind of file in turn; exit.json among them."""
    rng = random.Random(num_spoilings)
    kinds: dict[str, list[str]] = {}
    for file in sorted(f.relative_to(bundle) for f in bundle.rglob("*") if f.is_file() and f.stat().st_size):
        kinds.setdefault("/".join(file.parts[:2]) if file.parts[0] == "store" else file.parts[0], []).append(str(file))
    assert {"exit.json", "model", "software", "data", "store/global", "store/silos", "store/contract.json"} <= {*kinds}
    for spoiling in range(num_spoilings):
        way = WAYS[spoiling % len(WAYS)]
        name = rng.choice(kinds[sorted(kinds)[spoiling % len(kinds)]])
        spoiled = shutil.copytree(bundle, tmp_path / "spoiled")
        way(rng, spoiled / name, spoiled)
        found = verified(spoiled).findings
        expected = Path(name).parent / "added-" if way is add else name
        names = [finding.name for finding in found]
        assert any(one.startswith(str(expected)) for one in names), (way.__name__, name, names)
        shutil.rmtree(spoiled)
        (tmp_path / "outside").unlink(missing_ok=True)


def relisted(bundle: Path, **changes: Any) -> None:
    """Somebody without alpha's key writes the list anew."""
    from pretrain.federation.bundle import listed

    record = Exit.from_bytes((bundle / "exit.json").read_bytes())
    changed = dataclasses.replace(record, files=listed(bundle), **changes)
    (bundle / "exit.json").write_bytes(changed.to_bytes())


def other_list(bundle: Path, left: RunConfig) -> None:
    """Beta's list and signature in place of alpha's."""
    shutil.copy(Path(left.directory).parent / "beta" / "exit.json", bundle / "exit.json")


def signed_by_beta(bundle: Path, left: RunConfig) -> None:
    (bundle / "keys.txt").write_text("nobody\n")
    relisted(bundle)
    record = Exit.from_bytes((bundle / "exit.json").read_bytes())
    (bundle / "exit.json").write_bytes(as_member(left, "beta").members.sign(record).to_bytes())


def other_weights(bundle: Path, left: RunConfig, *, by: str = "") -> None:
    """One bit of one weight; listed anew, and with alpha's own signature if it is alpha who does it."""
    file = bundle / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    relisted(bundle)
    if by:
        record = Exit.from_bytes((bundle / "exit.json").read_bytes())
        (bundle / "exit.json").write_bytes(as_member(left, by).members.sign(record).to_bytes())


def without_the_newest(bundle: Path, left: RunConfig) -> None:
    """Alpha itself says that the run ended earlier: its model is not of that version."""
    shutil.rmtree(bundle / "store" / "global" / "000003")
    relisted(bundle)
    record = Exit.from_bytes((bundle / "exit.json").read_bytes())
    (bundle / "exit.json").write_bytes(as_member(left, "alpha").members.sign(record).to_bytes())


def a_mere_store(bundle: Path, _: RunConfig) -> None:
    """All that says what it was, but for the model."""
    for name in ("exit.json", "keys.txt"):
        (bundle / name).unlink()
    for name in ("software", "data"):
        shutil.rmtree(bundle / name)
    assert is_bundle(bundle)


@pytest.mark.parametrize(
    ("spoil", "name", "what"),
    [
        (other_list, "keys.txt", ""),
        (other_list, "data/train/000/manifest.json", "it was changed"),
        (signed_by_beta, "exit.json", "signature of the exit: not of these bytes"),
        (other_weights, "exit.json", "signature of the exit"),
        (other_weights, "model", "its parameters are not those of version 3"),
        (lambda b, left: other_weights(b, left, by="alpha"), "model", "its parameters are not those of version 3"),
        (without_the_newest, "model", "its parameters are not those of version 2"),
        (without_the_newest, "exit.json", "of the store here it is"),
        (lambda b, left: relisted(b, member="gamma"), "exit.json", "gamma is not on the contract's roster"),
        (lambda b, left: relisted(b, signature=None), "exit.json", "the exit is not signed"),
        (lambda b, left: (b / "exit.json").unlink(), "exit.json", "it is missing"),
        (a_mere_store, "exit.json", "it is missing"),
    ],
)
def test_a_list_that_was_written_anew_is_found(
    spoil: Callable[[Path, RunConfig], object], name: str, what: str, bundle: Path, left: RunConfig
) -> None:
    if spoil is other_list and name == "keys.txt":
        (bundle / "keys.txt").write_text("changed too\n")
    spoil(bundle, left)
    found = {finding.name: finding.what for finding in verified(bundle).findings}
    assert what in found.get(name, "not found"), found


# ---- what cannot be


def test_a_broken_chain_and_other_mistakes_are_one_line_and_write_nothing(
    left: RunConfig, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    store = shutil.copytree(left.store_url, tmp_path / "store")
    config = dataclasses.replace(left, exchange=dataclasses.replace(left.exchange, url=str(store)))
    target = tmp_path / "targets" / "bundle"

    def refused(silo: str = "alpha", config: RunConfig = config, **options: bool) -> str:
        line = one_line_error(write_bundle, config, silo, target, **options)
        assert not target.parent.exists() or not [*target.parent.iterdir()]
        return line

    (store / "silos/beta/000002/manifest.json").unlink()
    assert "its chain is broken: version 2: silos/beta/000002/manifest.json: silos/beta/000002" in refused()
    shutil.copy(Path(left.store_url) / "silos/beta/000002/manifest.json", store / "silos/beta/000002")
    (store / "global/000003/change-000.safetensors").write_bytes(b"")
    assert refused().startswith(
        f"exchange.url: {store} given; its chain is broken: version 3: global/000003/change-000"
    )
    assert refused("gamma") == "--silo: 'gamma' given; allowed: alpha, beta, which run here"
    assert refused(leave=True).startswith("membership.quorum: null given; without a quorum")
    line = refused(config=tiny_config(tmp_path / "c", exchange={"kind": "none"}, silos={"beta": None}))
    assert line == "exchange.kind: 'none' given; a bundle is made of a run through a 'store', or a 'collective'"
    target.parent.rmdir()
    target.parent.write_text("no folder")
    assert one_line_error(write_bundle, left, "alpha", target) == (
        f"--to: {str(target)!r} given; it cannot be written: File exists"
    )
    target.parent.unlink()
    target.mkdir(parents=True)
    assert one_line_error(write_bundle, left, "alpha", target) == (
        f"--to: {str(target)!r} given; it exists already, and nothing is overwritten"
    )


# ---- the commands


def test_leaving_with_a_bundle(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """What is pruned is said; the word that it has left is in the bundle; an outbox is taken along."""
    config = signed(
        tiny_config,
        tmp_path,
        outer=INT4,
        membership={"quorum": 1},
        exchange={"snapshot_versions": 2, "keep_versions": 1},
    )
    aggregator, state = advance(config, 4)
    alpha = as_member(config, "alpha")
    alpha.announce("alpha", left=False, version=0)
    for silo in config.full_roster:
        as_member(config, silo).mark_resumable(silo, 9)
        deliver(config, state, silo)
    one_version(aggregator, state)  # and prunes up to the snapshot of version 4
    as_member(config, OPERATOR).refuse("beta", 6, b"", "it is too long")
    digest = alpha.read_commit(1).parameters_digest
    found = Evaluation(version=1, parameters_digest=digest, losses={"law": 2.5}, sequences={"law": 8})
    evaluated = alpha.tell_evaluation("alpha", found)
    outbox = config.silo_directory("alpha") / "outbox"
    outbox.mkdir(parents=True)
    (outbox / "000006.safetensors").write_bytes(b"in flight")
    said_by_alpha = Path(config.store_url) / "silos/alpha/membership"
    shutil.copytree(said_by_alpha, said_by_alpha.parents[1] / "beta/membership")  # not beta's word
    save_config(config, Path(config.directory) / "config.yaml")
    before = files(config)
    target = tmp_path / "bundle"
    arguments = ["exit", config.directory, "--silo", "alpha", "--to", str(target), "--leave"]
    said = CliRunner().invoke(cli.app, arguments)
    assert said.exit_code == 0, said.output
    assert "missing     payloads of its deliveries for versions 1 to 3: pruned\n" in said.stdout
    assert "missing     payloads of versions 1 to 4: pruned, so that these are not merged again\n" in said.stdout
    forged = "silos/beta/membership/000000.json"
    assert f"missing     {forged}, which counts for nothing: signature of the word: not of these bytes" in said.stdout
    assert not (target / "store" / forged).exists()
    assert said.stdout.endswith(f"exit.json   signed by alpha\nnext: atoll verify {target}\n")
    (word,) = {*files(config)} - {*before}
    assert word.name == "000001.json"
    assert (target / "store/silos/alpha/membership/000001.json").read_bytes() == word.read_bytes()
    assert (target / "store" / evaluated).is_file()
    assert (target / "store/silos/beta/000006/refused-0.json").is_file()
    assert (target / "own/000006.safetensors").read_bytes() == b"in flight"
    shutil.rmtree(config.directory)
    said = CliRunner().invoke(cli.app, ["verify", str(target)])
    assert said.exit_code == 0, said.output
    assert said.stdout.startswith(f"bundle      of alpha under contract {alpha.contract_sha256[:12]}: ")
    assert said.stdout.endswith("all is as it should be\n")
    (target / "store/signatures/beta.json").unlink()
    said = CliRunner().invoke(cli.app, ["verify", str(target)])
    assert (said.exit_code, "WRONG       store/signatures/beta.json: it is missing\n" in said.stdout) == (1, True)


def test_an_unsigned_run_is_left_with_an_unsigned_list(tmp_path: Path, tiny_config: TinyConfig) -> None:
    from tests.unit.test_aggregate_replay import advance as advance_unsigned

    config = tiny_config(tmp_path)
    assert own_signer(config, "alpha") is None
    advance_unsigned(config, 2)
    record = write_bundle(config, "alpha", tmp_path / "bundle", tell=lambda line: None)
    assert record.signature is None
    assert verified(tmp_path / "bundle").findings == []


def test_deliveries_that_the_contract_keeps_are_in_the_bundle(tmp_path: Path, tiny_config: TinyConfig) -> None:
    exchange = {"snapshot_versions": 1, "keep_versions": 1}
    config = signed(tiny_config, tmp_path, exchange=exchange, trust={"keep_deliveries": 2})
    advance(config, 1)
    for silo in config.full_roster:
        as_member(config, silo).mark_resumable(silo, 9)
    advance(config, 4)
    write_bundle(config, "alpha", tmp_path / "bundle", tell=lambda line: None)
    found = verified(tmp_path / "bundle")
    assert found.findings == []
    assert found.store
    assert found.store.merged == [3, 4]


def test_a_bundle_of_a_sealed_run_is_checked_as_far_as_its_member_can(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """The model is open; with the operator's key all versions are merged again."""
    config = sealed_run(tiny_config, tmp_path / "sealed")
    advance_sealed(config, 3)
    key = config.key_file(OPERATOR).rename(tmp_path / "operator.key")
    record = write_bundle(config, "alpha", tmp_path / "bundle", tell=lambda line: None)
    assert record.missing == [
        "what opens sealed deliveries: only the operator has it, so that no version was merged again"
    ]
    found = verified(tmp_path / "bundle")
    assert found.findings == []
    assert found.store
    assert (found.store.is_sealed, found.store.merged) == (True, [])
    said = CliRunner().invoke(cli.app, ["verify", str(tmp_path / "bundle"), "--key", str(key)])
    assert said.exit_code == 0, said.output
    assert "versions    4 in one chain, 3 merged again from their deliveries\n" in said.stdout
