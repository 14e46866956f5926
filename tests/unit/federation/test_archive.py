"""What pruning takes out of a store is in its archive first, whatever ends the aggregator or the archive."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import cli
from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.archive import Archive, archive_objects, read_archive
from pretrain.exchange.history import History
from pretrain.exchange.objects import Objects
from pretrain.exchange.rollback import consequences, is_rolling_back, read_rollbacks, roll_back
from pretrain.exchange.store import StoreExchange
from pretrain.federation.egress import check_ledgers, ledgers
from pretrain.federation.exit import write_bundle
from pretrain.trust.members import own_signer
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.federation.test_verify import INT4, signed
from tests.unit.test_aggregate import one_version, start
from tests.unit.test_signed import as_member, begin, deliver

NEWEST = 5
FEW = {"snapshot_versions": 2, "keep_versions": 1, "retry_seconds": 0}
Files = dict[str, bytes]


def files(directory: Path) -> Files:
    found = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in found}


def payloads(found: Files) -> Files:
    return {name: data for name, data in found.items() if name.endswith("safetensors") or name.startswith("snapshots")}


def archived(tiny_config: TinyConfig, directory: Path, **trust: Any) -> tuple[RunConfig, Path]:
    archive = directory / "archive"
    trust = {"archive": str(archive)} | trust
    return signed(tiny_config, directory, outer=INT4, exchange=FEW, trust=trust), archive


def advance(config: RunConfig, aggregator: Aggregator, state: OuterState, num_versions: int = NEWEST) -> None:
    while state.version < num_versions:
        for factor, silo in enumerate(config.full_roster, start=2):
            member = as_member(config, silo)
            read_rollbacks(member)
            member.mark_resumable(silo, 9)
            deliver(config, state, silo, factor=1 + 0.01 * factor)
        one_version(aggregator, state)


@pytest.fixture(scope="module")
def whole(tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The store of such a run of which nothing is pruned."""
    config = signed(tiny_config, tmp_path_factory.mktemp("whole"), outer=INT4, exchange=FEW | {"keep_versions": 9})
    advance(config, *begin(config))
    return payloads(files(Path(config.store_url)))


@pytest.fixture(scope="module")
def run(tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A pruned run, its archive beside it; nobody may change either."""
    config, _ = archived(tiny_config, tmp_path_factory.mktemp("archived"))
    aggregator, state = begin(config)
    advance(config, aggregator, state)
    aggregator.stop()
    save_config(config, Path(config.directory) / "config.yaml")
    return config


def test_the_archive_has_what_the_store_has_not_any_more(run: RunConfig, whole: Files) -> None:
    store, archive = files(Path(run.store_url)), files(Path(run.trust.archive))
    assert payloads(archive).keys() & store.keys() == set()
    both = payloads(archive | store)
    # Sizes, as keys and so signatures are of each run: snapshots' records alone are signed here.
    assert {name: len(data) for name, data in both.items()} == {name: len(data) for name, data in whole.items()}
    assert {name: data for name, data in both.items() if name.endswith("safetensors")} == {
        name: data for name, data in whole.items() if name.endswith("safetensors")
    }
    assert all(store[name] == data for name, data in archive.items() if name not in payloads(archive))
    assert {"contract.json", "silos/beta/000003/manifest.json", "global/000003/commit.json"} <= archive.keys()
    checked = check_ledgers(*ledgers(Path(run.directory)))
    assert checked.findings == []


def test_verify_merges_all_again_with_the_archive_and_the_store_alone_goes_as_far_as_before(run: RunConfig) -> None:
    alone = CliRunner().invoke(cli.app, ["verify", run.store_url])
    assert alone.exit_code == 0, alone.output
    assert "versions    6 in one chain, 1 merged again" in alone.stdout
    for arguments in ([run.directory], [run.store_url, "--archive", run.trust.archive]):
        said = CliRunner().invoke(cli.app, ["verify", *arguments])
        assert said.exit_code == 0, said.output
        assert "versions    6 in one chain, 5 merged again" in said.stdout
        assert "pruned" not in said.stdout
    said = CliRunner().invoke(cli.app, ["verify", run.store_url, "--archive", f"{run.trust.archive}/global"])
    assert isinstance(said.exception, Exception)
    assert str(said.exception).endswith("there is no archive in it (no contract.json)")


def test_what_was_changed_in_the_archive_is_found(run: RunConfig, tmp_path: Path) -> None:
    archive = shutil.copytree(run.trust.archive, tmp_path / "archive")
    file = archive / "silos/alpha/000002/000002.safetensors"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    said = CliRunner().invoke(cli.app, ["verify", run.store_url, "--archive", str(archive)])
    assert said.exit_code == 1
    assert "WRONG       version 2: silos/alpha/000002/000002.safetensors: " in said.stdout


def test_revoke_and_exit_read_it(run: RunConfig, tmp_path: Path) -> None:
    said = CliRunner().invoke(cli.app, ["revoke", "beta", run.directory, "--from", "1"])
    assert said.exit_code == 0, said.output
    record = write_bundle(run, "alpha", tmp_path / "bundle", tell=lambda line: None)
    assert record.missing == []
    assert "silos/beta/000001/000001.safetensors" in files(tmp_path / "bundle" / "store")


def test_in_a_bucket_and_back_to_what_is_there_alone(tmp_path: Path, tiny_config: TinyConfig, s3_url: str) -> None:
    """A rollback brings back what it goes back to, and the run comes to the same bits."""
    config, _ = archived(tiny_config, tmp_path, archive=f"{s3_url}/archive")
    aggregator, state = begin(config)
    advance(config, aggregator, state)
    aggregator.stop()
    save_config(config, Path(config.directory) / "config.yaml")
    archive = archive_objects(config.trust.archive, config.exchange)
    there = {name: archive.read(name) for name in names_below(archive)}
    assert len([name for name in there if name.endswith("safetensors")]) == 13
    before = as_member(config, "alpha").read_commit(NEWEST)

    alone = one_line_error(consequences, as_member(config, OPERATOR), to=1)
    assert alone == "--to: 1 given; allowed: 4, what is kept before the newest version (5)"
    said = CliRunner().invoke(cli.app, ["rollback", config.directory, "--to", "1", "--yes"])
    assert said.stdout.endswith("rolled back from version 5 to 1\n"), (said.output, said.exception)
    assert not [name for name in names_below(archive) if "000002" in name or "000003" in name]
    aggregator, state = start(dataclasses.replace(config, trust=dataclasses.replace(config.trust, archive="")))
    assert state.version == 1  # from what the store has alone
    aggregator.stop()
    aggregator, state = start(config)
    advance(config, aggregator, state)
    aggregator.stop()
    assert as_member(config, "alpha").read_commit(NEWEST) == before
    assert {name: archive.read(name) for name in names_below(archive)} == there
    said = CliRunner().invoke(cli.app, ["verify", config.store_url, "--archive", config.trust.archive])
    assert "5 merged again" in said.stdout, (said.output, said.exception)


def names_below(archive: Objects, prefix: str = "") -> list[str]:
    """Of all objects in an archive."""
    found = []
    for name in archive.names(prefix):
        path = f"{prefix}/{name}" if prefix else name
        found += [path] if "." in name else names_below(archive, path)
    return found


# ---- whatever happens


class Killed(BaseException):
    """SIGKILL: nothing in between catches it."""


def test_a_rollback_that_is_killed_comes_to_the_same(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every 17th use of store or archive, and once more while it is completed."""
    signer, real, left = own_signer(run, OPERATOR), Objects._try, 0

    def dying(self: Objects, name: str, verb: str, attempt: Callable[[], Any]) -> Any:
        nonlocal left
        if (left := left - 1) < 0:
            raise Killed
        return real(self, name, verb, attempt)

    def rolled_back(num_uses: int) -> bool:
        """Whether it was done."""
        nonlocal left
        left = 1 << 30
        exchange = StoreExchange(str(tmp_path / "store"))
        read_archive(exchange, str(tmp_path / "archive"), run.exchange)
        exchange.read_contract()
        exchange.members.signer = signer
        if exchange.newest_version() == 1 and not is_rolling_back(exchange):
            return True
        left = num_uses
        try:
            roll_back(exchange, 1, to=1)
        except Killed:
            return False
        return True

    monkeypatch.setattr(Objects, "_try", dying)
    expected: tuple[Files, Files] | None = None
    for num_uses in [1 << 30, *range(0, 1000, 17)]:
        for what, source in (("store", run.store_url), ("archive", run.trust.archive)):
            shutil.rmtree(tmp_path / what, ignore_errors=True)
            shutil.copytree(source, tmp_path / what, copy_function=os.link)
        is_done = rolled_back(num_uses)
        rolled_back(num_uses * 3 % 41)
        assert rolled_back(1 << 30)
        found = files(tmp_path / "store"), files(tmp_path / "archive")
        expected = expected or found
        assert found == expected, num_uses
        if is_done and num_uses < 1 << 30:
            break
    assert num_uses > 70


def test_killed_before_every_use_of_either_nothing_is_lost(
    tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, archive = archived(tiny_config, tmp_path)
    store, scratch = Path(config.store_url), tmp_path / "scratch"
    unpruned = tmp_path / "unpruned"
    aggregator, state = begin(config)
    monkeypatch.setattr(Archive, "prune", lambda self, prune: None)
    advance(config, aggregator, state)
    monkeypatch.undo()
    store.rename(unpruned)
    before = files(unpruned)
    left, real = 0, Objects._try

    def dying(self: Objects, name: str, verb: str, attempt: Callable[[], Any]) -> Any:
        nonlocal left
        if (left := left - 1) < 0:
            raise Killed
        return real(self, name, verb, attempt)

    def prune(num_uses: int) -> bool:
        """Whether it was killed."""
        nonlocal left
        exchange = as_member(config, OPERATOR)
        keeper = Archive.of_run(config, exchange, scratch)
        assert keeper
        left = num_uses
        with monkeypatch.context() as patch:
            patch.setattr(Objects, "_try", dying)
            try:
                keeper.prune(lambda keep: History(exchange, 1).prune(config.full_roster, NEWEST, 1, keep=keep))
            except Killed:
                return True
        return False

    num_uses, was_killed = 0, True
    expected: dict[str, Files] = {}
    while was_killed:
        shutil.copytree(unpruned, store, copy_function=os.link)
        was_killed = prune(num_uses)
        assert payloads(files(archive) | files(store)) == payloads(before), num_uses
        prune(num_uses * 7 % 41)  # once more, at another place
        assert payloads(files(archive) | files(store)) == payloads(before), num_uses
        prune(1 << 30)
        found = {"store": files(store), "archive": files(archive)}
        expected = expected or found
        assert found == expected
        shutil.rmtree(store)
        shutil.rmtree(archive)
        num_uses += 17  # every one in turn takes long, and finds nothing more
    assert len(payloads(expected["archive"])) == 14
    assert num_uses > 100


def test_an_archive_out_of_reach_stops_pruning_with_one_line_and_not_the_run(
    tmp_path: Path, tiny_config: TinyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config, archive = archived(tiny_config, tmp_path)
    archive.write_text("no directory")
    aggregator, state = begin(config)
    advance(config, aggregator, state, 4)
    assert (Path(config.store_url) / "silos/alpha/000001/000001.safetensors").exists()
    lines = [line for line in capsys.readouterr().out.splitlines() if "archive" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"trust.archive: {archive} given; contract.json cannot be ")
    assert lines[0].endswith("; nothing is pruned until it can be archived")
    archive.unlink()
    advance(config, aggregator, state)
    assert not (Path(config.store_url) / "silos/alpha/000001/000001.safetensors").exists()
    assert (archive / "silos/alpha/000001/000001.safetensors").exists()
    assert f"trust.archive: {archive} is reached again; what is there is pruned\n" in capsys.readouterr().out


def test_what_is_damaged_in_the_store_stays_there(
    tmp_path: Path, tiny_config: TinyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config, archive = archived(tiny_config, tmp_path)
    aggregator, state = begin(config)
    advance(config, aggregator, state, 1)
    name = "silos/alpha/000001/000001.safetensors"
    (Path(config.store_url) / name).write_bytes(b"other")
    advance(config, aggregator, state)
    assert (Path(config.store_url) / name).exists()
    assert not (archive / name).exists()
    assert (archive / "silos/beta/000001/000001.safetensors").exists()
    assert f"{name} is passed over: it is not archived, and stays: {name} is truncated" in capsys.readouterr().out


def test_bad_input_is_one_line(run: RunConfig, tmp_path: Path, tiny_config: TinyConfig) -> None:
    def line(archive: str, **settings: Any) -> str:
        return one_line_error(tiny_config, tmp_path, trust={"archive": archive}, **settings)

    assert line("s4://bucket").startswith("trust.archive: 's4://bucket' given; allowed: a directory, s3://")
    store = str(tmp_path / "run" / "store")
    outside = "a place of its own, outside of the store"
    for place in (store, f"{store}/archive", str(tmp_path)):
        assert line(place, exchange={"url": store}).endswith(f"allowed: {outside} {store}")
    kind = {"kind": "collective", "url": "tcp://localhost:1"}
    assert line("a", exchange=kind).endswith("allowed: none with exchange.kind=collective, where nobody prunes a store")
    config, archive = archived(tiny_config, tmp_path / "other")
    archive.mkdir(parents=True)
    (archive / "contract.json").write_text("{}")
    said = one_line_error(start, config)
    assert said == f"trust.archive: {archive} given; it is the archive of another run; allowed: one of this run's own"
