"""A secure sum is answered once for a version, and is what was answered for: other run directories, stores, commits."""

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.aggregate import Aggregator
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.sums import Sums, answer_path, shares_path, survivors_path
from pretrain.host.identity import own_identity
from pretrain.sync.answered import Answered
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.keys import new_key
from pretrain.trust.ledger import Commit, Manifest, Record, sha256_bytes
from pretrain.trust.sums import Answer, Shares, Survivors
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error
from tests.unit.federation.test_verify import verified
from tests.unit.summing import Asked, Silo, advance, four, make
from tests.unit.test_contract_amended import propose, sign
from tests.unit.test_signed import as_member, begin, manifest_file


@pytest.fixture
def config(tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path) -> RunConfig:
    return make(tiny_config, tiny_text, tmp_path)


@pytest.fixture
def asked(config: RunConfig) -> Iterator[Asked]:
    found = Asked(config)
    yield found
    for silo in found.silos.values():
        silo.through.close("")
    found.aggregator.stop()


@pytest.fixture
def begun(config: RunConfig) -> Iterator[Aggregator]:
    aggregator, _ = begin(config)
    yield aggregator
    aggregator.stop()


def elsewhere(config: RunConfig, directory: Path) -> RunConfig:
    """The same contract and keys in another run directory, at a copy of the store."""
    found = copy.deepcopy(config)
    found.trust.directory = found.trust.directory or str(Path(config.directory) / "keys")
    found.directory, found.exchange.url = str(directory / "run"), str(directory / "store")
    shutil.copytree(config.store_url, found.exchange.url)
    return found


def join(config: RunConfig, silo: str) -> None:
    through = ThroughStore(config, silo)
    try:
        through.join()
    finally:
        through.close("")


def file_of(config: RunConfig, name: str) -> Path:
    return Path(config.store_url) / name


def write_as(config: RunConfig, member: str, name: str, record: Record) -> None:
    file_of(config, name).write_bytes(as_member(config, member).members.sign(record).to_bytes())


def note_of(config: RunConfig, silo: str) -> Path:
    store = as_member(config, silo)
    return Answered(config.key_file(silo), store.contract_sha256, silo).file


# ---- one run directory


@pytest.mark.usefixtures("begun")
def test_another_run_directory_of_one_contract_delivers_nothing(config: RunConfig, tmp_path: Path) -> None:
    other = elsewhere(config, tmp_path / "other")
    join(config, "alpha")
    assert note_of(config, "alpha").read_text() == (
        f"\nrun {own_identity(config.silo_directory('alpha'))} {config.silo_directory('alpha').absolute()}\n"
    )
    there = {file: file.stat().st_mtime_ns for file in Path(other.store_url).rglob("*")}
    said = one_line_error(join, other, "alpha")
    assert said.startswith(
        f"directory: '{other.silo_directory('alpha')}' given; under this contract silo alpha delivers from "
    )
    assert {file: file.stat().st_mtime_ns for file in Path(other.store_url).rglob("*")} == there
    assert not (other.silo_directory("alpha") / "identity.json").exists()
    join(config, "alpha")  # which goes on
    join(other, "beta")  # whose first is the other one
    assert "under this contract silo beta delivers from" in one_line_error(join, config, "beta")
    shutil.move(other.directory, tmp_path / "moved")
    other.directory = str(tmp_path / "moved")
    join(other, "beta")


def test_an_older_copy_of_the_run_directory_knows_what_was_answered(asked: Asked, tmp_path: Path) -> None:
    here = asked.config.silo_directory("alpha")
    shutil.copytree(here, tmp_path / "older")
    asked.answer("alpha")
    survivors = Survivors.from_bytes(file_of(asked.config, survivors_path(1)).read_bytes())
    sign_anew(asked, "gamma")
    file_of(asked.config, answer_path("alpha", 1)).unlink()
    shutil.rmtree(here)
    shutil.copytree(tmp_path / "older", here)
    assert "has answered for version 1, and is asked for another set" in one_line_error(asked.answer, "alpha")
    assert not asked.noted("alpha")
    put_back(asked, "gamma", survivors)
    asked.answer("alpha")  # the same


def test_two_copies_of_a_run_directory_answer_one_set(asked: Asked, tmp_path: Path) -> None:
    """Both alive, at two copies of the store, whose operator has the same key."""
    other = elsewhere(asked.config, tmp_path / "other")
    shutil.copytree(asked.config.silo_directory("alpha"), other.silo_directory("alpha"))
    asked.answer("alpha")
    asked.config = other
    sign_anew(asked, "gamma")
    assert "has answered for version 1, and is asked for another set" in one_line_error(asked.answer, "alpha")


def test_a_silo_that_forgot_all_finds_its_own_answer_in_the_store(asked: Asked) -> None:
    asked.answer("alpha")
    note_of(asked.config, "alpha").unlink()
    assert " is missing, and " in one_line_error(join, asked.config, "alpha")
    asked.noted("alpha")[0].unlink()
    asked.answer("alpha")
    note_of(asked.config, "alpha").unlink()
    asked.noted("alpha")[0].unlink()
    sign_anew(asked, "gamma")
    assert "has answered for version 1, and is asked for another set" in one_line_error(asked.answer, "alpha")


def sign_anew(asked: Asked, silo: str) -> None:
    """A silo that lies with the operator delivers another part, which is asked for."""
    file = manifest_file(asked.config, silo, 1)
    other = dataclasses.replace(Manifest.from_bytes(file.read_bytes()), metrics={"loss": 2.0})
    file.write_bytes(as_member(asked.config, silo).members.sign(other).to_bytes())
    asked.ask(manifests=[sha256_bytes(manifest_file(asked.config, name, 1).read_bytes()) for name in asked.silos])


def put_back(asked: Asked, silo: str, survivors: Survivors) -> None:
    """What it has delivered first, and the operator asked for."""
    asked.silos[silo].sum._exchange.objects.delete(f"silos/{silo}/000001/manifest.json")
    asked.silos[silo].through.deliver(asked.sent[silo])
    asked.ask(silos=survivors.silos, manifests=survivors.manifests)


# ---- the commit of what was answered


def contributor_left_out(commit: Commit) -> dict[str, Any]:
    left = commit.contributors[:2]
    return {"contributors": left, "divisor": sum(one.weight for one in left)}


def other_delivery(commit: Commit) -> dict[str, Any]:
    first = dataclasses.replace(commit.contributors[0], manifest_sha256="0" * 64)
    return {"contributors": [first, *commit.contributors[1:]]}


def other_weight(commit: Commit) -> dict[str, Any]:
    first = dataclasses.replace(commit.contributors[0], weight=commit.contributors[0].weight + 1)
    return {"contributors": [first, *commit.contributors[1:]], "divisor": commit.divisor + 1}


FORGED: dict[str, tuple[Callable[[Commit], dict[str, Any]], str]] = {
    "a part is left out": (
        contributor_left_out,
        "its commit has the deliveries of alpha, beta, and they, or what they ",
    ),
    "another delivery": (
        other_delivery,
        "of alpha, beta, gamma, and they, or what they count, are not what silo beta ",
    ),
    "another weight": (other_weight, "are not what silo beta has answered for: what was added up is another sum"),
    "another divisor": (
        lambda commit: {"divisor": commit.divisor - 1},
        "its divisor is 599, and not the sum of the weights of alpha, beta, gamma, 600",
    ),
}


def test_a_silo_adopts_no_commit_but_that_of_what_it_answered(config: RunConfig) -> None:
    aggregator, state = begin(config)
    before = {name: value.clone() for name, value in state.parameters.items()}
    commit = advance(config, aggregator, state)
    aggregator.stop()
    for forgery, (change, message) in FORGED.items():
        write_as(config, OPERATOR, "global/000001/commit.json", dataclasses.replace(commit, **change(commit)))
        silo = Silo(config, "beta")  # started again
        said = one_line_error(silo.through.receive, 1, None, before)
        assert said.startswith("silo beta: version 1 in the store cannot be used: its "), forgery
        assert message in said, forgery
        silo.through.close("")
    assert not list(config.silo_directory("beta").glob("inbox/*"))
    write_as(config, OPERATOR, "global/000001/commit.json", commit)
    silo = Silo(config, "beta")
    assert silo.through.receive(1, None, before).commit == commit
    silo.through.close("")


# ---- what others put in the place of what belongs to a sum


def test_what_is_gone_or_nobodys_is_waited_for(asked: Asked, said: Callable[[], str]) -> None:
    """By somebody without a key, between the question and the answers."""
    for number, file in enumerate(
        (manifest_file(asked.config, "beta", 1), file_of(asked.config, shares_path("beta", 1)))
    ):
        for put in (b"", b"{}", file.read_bytes().replace(b'"version": 1', b'"version": 2')):
            there = file.read_bytes()
            file.write_bytes(put)
            asked.answer("alpha")
            assert not file_of(asked.config, answer_path("alpha", 1)).exists()
            file.write_bytes(there)
        there = file.read_bytes()
        file.unlink()
        asked.answer("alpha")
        name = file.relative_to(asked.config.store_url)
        assert f"sums/000001.json is passed over: {name} is not there, or not its silo's; it may come again" in said()
        if number:
            asked.answer("beta")  # sees that, too
        else:
            asked.silos["beta"].through.deliver(asked.sent["beta"])
        assert file.read_bytes() == there
    asked.answer("alpha")
    assert file_of(asked.config, answer_path("alpha", 1)).exists()


def test_an_answer_comes_again(asked: Asked) -> None:
    file = file_of(asked.config, answer_path("alpha", 1))
    silo = asked.silos["alpha"].sum
    silo.answer(1)
    there = file.read_bytes()
    for put in (b"", b"{}", file_of(asked.config, shares_path("alpha", 1)).read_bytes()):
        file.write_bytes(put)
        silo.answer(1)
        assert file.read_bytes() == there
    file.unlink()
    silo.answer(1)
    assert file.read_bytes() == there


def test_what_was_said_elsewhere_counts_as_not_said(asked: Asked, said: Callable[[], str]) -> None:
    """Records that their authors have signed, elsewhere: of another version, contract or silo."""
    unmasker, config = asked.unmasker, asked.config
    assert unmasker
    for silo in asked.silos:
        asked.answer(silo)
    sums = unmasker._sums
    survivors = sums.survivors(1)
    assert survivors
    sha256 = sha256_bytes(survivors.to_bytes())
    file = file_of(config, answer_path("alpha", 1))
    honest = Answer.from_bytes(file.read_bytes())
    assert sums.answer("alpha", 1, survivors, sha256)
    for change in ({"contract_sha256": "0" * 64}, {"version": 2}, {"silo": "beta"}, {"survivors_sha256": "0" * 64}):
        write_as(config, "alpha", answer_path("alpha", 1), dataclasses.replace(honest, **change))
        assert not sums.answer("alpha", 1, survivors, sha256), change
    write_as(config, "beta", answer_path("alpha", 1), honest)
    assert not sums.answer("alpha", 1, survivors, sha256)
    for change in ({"contract_sha256": "0" * 64}, {"version": 2}):
        write_as(config, OPERATOR, survivors_path(1), dataclasses.replace(survivors, **change))
        assert sums.survivors(1) is None, change
    write_as(config, "beta", survivors_path(1), survivors)
    assert sums.survivors(1) is None
    assert "sums/000001.json is passed over" in said()


def test_shares_of_another_are_found(asked: Asked) -> None:
    """Beta seals to alpha what it had sealed to gamma, or copies what alpha has dealt."""
    name = shares_path("beta", 1)
    honest = Shares.from_bytes(file_of(asked.config, name).read_bytes())
    other = Shares.from_bytes(file_of(asked.config, shares_path("alpha", 1)).read_bytes())
    swapped = [honest.sealed[2], honest.sealed[1], honest.sealed[0]]
    for change in ({"sealed": swapped}, {"sealed": other.sealed}, {"salt": other.salt}):
        write_as(asked.config, "beta", name, dataclasses.replace(honest, **change))
        assert "the shares that silo beta has sealed to alpha cannot be opened" in one_line_error(asked.answer, "alpha")
        assert not asked.noted("alpha")
    write_as(asked.config, "beta", name, honest)
    asked.answer("alpha")


def test_of_no_version_two_sets_are_answered_after_the_store_was_put_back(config: RunConfig, tmp_path: Path) -> None:
    """An operator keeps a copy of the store, and asks for another sum of a version that was made."""
    asked = Asked(config)
    shutil.copytree(config.store_url, tmp_path / "kept")
    for silo in asked.silos:
        asked.answer(silo)
    asked.aggregator.commit(asked.state, asked.deliveries, asked.aggregator.merge(asked.state, asked.deliveries))
    asked.aggregator.stop()
    shutil.rmtree(config.store_url)
    shutil.copytree(tmp_path / "kept", config.store_url)
    sign_anew(asked, "gamma")
    for silo in ("alpha", "beta"):
        assert "is asked for another set of deliveries" in one_line_error(asked.answer, silo)
    for one in asked.silos.values():
        one.through.close("")


def test_a_member_is_taken_away_in_the_middle_and_none_is_added(
    tiny_config: TinyConfig, tiny_text: TinyText, tmp_path: Path
) -> None:
    """From its version on sums are of three, of all who have a key, and masks follow from the amendment."""
    config = four(tiny_config, tiny_text, tmp_path)
    aggregator, state = begin(config)
    advance(config, aggregator, state)
    new = new_key(tmp_path / "echo.key", "echo").text
    assert "trust.added: ['echo'] given; allowed: []" in one_line_error(
        propose, config, "alpha", 3, f"trust.keys.echo={new}"
    )
    propose(config, "alpha", 3, "trust.keys.delta=")
    assert [sign(config, silo) for silo in ("beta", "gamma")] == [["gamma"], []]
    advance(config, aggregator, state)
    commit = advance(config, aggregator, state, without=("delta",))
    assert [one.silo for one in commit.contributors] == ["alpha", "beta", "gamma"]
    assert commit.contract_sha256 != as_member(config, "alpha").contract_sha256
    assert Sums(config, as_member(config, "alpha")).silos(3) == ["alpha", "beta", "gamma"]
    said = one_line_error(propose, config, "alpha", 5, "trust.keys.gamma=")
    assert said.startswith("trust.keys.gamma: '' given; allowed: with a membership.quorum of 2 or less")
    aggregator.stop()
    found = verified(config, tmp_path / "scratch")
    assert (found.findings, found.merged, found.num_amendments) == ([], [1, 2, 3], 1)
