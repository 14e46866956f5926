"""A silo's own record of a collective: the same bytes in every silo, and one line for what cannot be gone on from."""

from pathlib import Path

import pytest
import torch

from pretrain.config.keys import RunConfig
from pretrain.outer.digest import digest_rows
from pretrain.outer.fragments import cut_fragments
from pretrain.sync.among_silos import AmongSilos
from pretrain.sync.own_ledger import OwnLedger
from pretrain.trust.contract import build_contract
from pretrain.trust.ledger import Commit
from tests.conftest import TinyConfig
from tests.support import one_line_error

EXCHANGE = {"kind": "collective", "url": "tcp://127.0.0.1:1"}


@pytest.fixture
def config(tmp_path: Path, tiny_config: TinyConfig) -> RunConfig:
    return tiny_config(tmp_path, exchange=EXCHANGE, outer={"optimizer": "nesterov", "num_fragments": 2})


def opened(config: RunConfig, silo: str) -> OwnLedger:
    ledger = OwnLedger(config, silo)
    ledger.open(build_contract(config))
    return ledger


def write_next(config: RunConfig, ledger: OwnLedger) -> Commit:
    """Write the next version, in which the fragment's parameters are that much higher."""
    version, schedule = ledger.newest + 1, config.schedule
    rows, kept = ledger.load()
    first = ledger.received(0).values
    cut = cut_fragments({name: value.numel() for name, value in first.items()}, schedule.num_fragments)
    values = {name: first[name] + version for name in cut[schedule.fragment(version)]}
    mine = {kind: {key: value + version for key, value in of.items()} for kind, of in kept.items()}
    in_fragment = {kind: {k: v for k, v in of.items() if k.split("[")[0] in values} for kind, of in mine.items()}
    ledger.keep(version, in_fragment)
    terms = ledger.terms(version, digest_rows(rows.values()), outer_digest="0" * 64)
    signed = dict.fromkeys(ledger.record_names(version), b"what a silo has signed")  # who takes it looks at it
    ledger.write(terms, {schedule.fragment(version): values}, records=signed)
    return ledger.commit(version)


def test_every_silo_begins_with_the_same_bytes(config: RunConfig) -> None:
    ledgers = [opened(config, silo) for silo in ("alpha", "beta")]
    assert ledgers[0].words(0) == ledgers[1].words(0)
    rows, kept = ledgers[0].load()
    assert digest_rows(rows.values()) == ledgers[0].received(0).commit.parameters_digest
    other = ledgers[1].load()[1]
    assert kept.keys() == other.keys() == {"velocity"}
    assert not kept["velocity"].keys() & other["velocity"].keys()  # each keeps its own part
    shares = [sum(map(torch.numel, of["velocity"].values())) for of in (kept, other)]
    assert sum(shares) == sum(value.numel() for value in ledgers[0].received(0).values.values())


def test_goes_on_with_its_part_of_the_outer_state(config: RunConfig) -> None:
    ledger = opened(config, "alpha")
    folder = config.silo_directory("alpha") / "kept"
    for _ in range(5):
        write_next(config, ledger)
        (folder / f"{ledger.newest + 1:06d}-velocity.tmp").write_bytes(bytes(1 << 20))  # of one who died as it wrote
    again = opened(config, "alpha")
    assert again.newest == 5
    _, kept = again.load()
    found = sorted({value.view(-1)[0].item() for value in kept["velocity"].values()})
    assert found == [2.0 + 4.0, 1.0 + 3.0 + 5.0]  # fragment 0: versions 2 and 4; fragment 1: 1, 3 and 5
    versions = {int(file.name[:6]) for file in folder.glob("*.safetensors")}
    assert versions == {2, 3, 4, 5}  # two of each fragment: the next step is written over the older one


def test_takes_from_another_what_its_commit_names_and_nothing_else(config: RunConfig) -> None:
    giver, taker = (opened(config, silo) for silo in ("alpha", "beta"))
    commit = write_next(config, giver)
    data = giver.payload(1)
    message = one_line_error(taker.take, commit, data[:-1] + bytes([data[-1] ^ 1]), giver.records(1))
    assert message == "silos: another silo's version 1 is not what its commit says"
    assert taker.newest == 0
    taker.take(commit, data, giver.records(1))
    assert (taker.newest, taker.words(1), taker.payload(1)) == (1, giver.words(1), data)
    assert taker.records(1) == giver.records(1)


def test_a_lost_outer_state_is_one_line(config: RunConfig) -> None:
    ledger = opened(config, "alpha")
    write_next(config, ledger)
    file = config.silo_directory("alpha") / "kept" / "000001-velocity.safetensors"
    file.unlink()
    message = one_line_error(ledger.load)
    assert message == f"run directory: {file} is missing, outer state of version 1; restore it"


def test_an_outer_state_that_the_disk_never_had_is_one_line(config: RunConfig) -> None:
    ledger = opened(config, "alpha")
    write_next(config, ledger)
    file = config.silo_directory("alpha") / "kept" / "000001-velocity.safetensors"
    data = bytearray(file.read_bytes())
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], b""):
        file.write_bytes(damaged)
        message = one_line_error(ledger.load)
        assert message == (
            f"run directory: {file.parent}/000001-* are damaged, outer state of version 1: they do not have their "
            "digest; restore them"
        )
    file.write_bytes(data)
    ledger.load()


def test_a_ledger_of_another_contract_is_one_line(config: RunConfig, tmp_path: Path, tiny_config: TinyConfig) -> None:
    opened(config, "alpha")
    other = tiny_config(tmp_path, exchange=EXCHANGE, outer={"optimizer": "nesterov", "num_fragments": 2, "lr": 0.5})
    assert "outer.lr is 0.5 here and 0.7 there" in one_line_error(opened, other, "alpha")


def test_two_versions_behind_is_one_line(config: RunConfig) -> None:
    silo = AmongSilos(config, "alpha", None)
    assert one_line_error(silo._parley.catch_up, {"alpha": 4, "beta": 2}) == (
        "silos: 'beta' has version 2 in its run directory where 'alpha' has 4; restore its run directory, or start all "
        "silos anew in others"
    )
