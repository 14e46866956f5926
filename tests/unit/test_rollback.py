"""Rolling a ledger back: whatever is interrupted is completed, and no version is ever there by half."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import RunConfig
from pretrain.exchange.objects import Objects
from pretrain.exchange.store import StoreExchange, version_path
from pretrain.rollback import explain, finish_rollbacks, records, roll_back
from pretrain.trust.ledger import sha256_bytes
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.test_aggregate import OUTER, ROUNDS, one_version, start
from tests.unit.test_aggregate_restart import deliver_all

WAYS: dict[str, dict[str, Any]] = {
    "one fragment": OUTER | {"num_fragments": 1},
    "two fragments, coded": OUTER | {"downlink_codec": "int4"},
}


class KilledError(Exception):
    """The process ends here."""


def make_run(directory: Path, tiny_config: TinyConfig, way: str) -> tuple[RunConfig, StoreExchange]:
    """A run to its last version but one, all versions kept."""
    config = tiny_config(directory, inner=ROUNDS | {"num_steps": 16}, outer=WAYS[way], exchange={"keep_versions": 4})
    aggregator, state = start(config)
    for silo in ("alpha", "beta"):
        StoreExchange(config.store_url).mark_resumable(silo, 2)
    while state.version < config.schedule.num_versions - 1:
        deliver_all(config, state)
        one_version(aggregator, state)
    exchange = StoreExchange(config.store_url)
    exchange.read_contract()
    return config, exchange


def files(config: RunConfig) -> dict[str, bytes]:
    root = Path(config.store_url)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_anywhere_and_completed_it_is_the_same(
    way: str, tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, exchange = make_run(tmp_path, tiny_config, way)
    store, untouched, newest = Path(config.store_url), tmp_path / "untouched", exchange.newest_version()
    shutil.copytree(store, untouched)
    roll_back(exchange, newest - 2, "loss rose")
    expected, num_calls = files(config), 0
    for number in range(1, 200):
        shutil.rmtree(store)
        shutil.copytree(untouched, store)
        num_calls = 0

        def dying(real: Any, *, at: int = number) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal num_calls
                num_calls += 1
                if num_calls == at:
                    raise KilledError
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for verb in ("write", "delete"):
                patch.setattr(Objects, verb, dying(getattr(Objects, verb)))
            try:
                roll_back(exchange, newest - 2, "loss rose")
            except KilledError:
                pass
            else:
                break
        for version in range(1, exchange.newest_version() + 1):
            for payload in exchange.read_commit(version).payloads:
                assert exchange.objects.exists(f"{version_path(version)}/{payload.file}")
        if number == 1:  # not even the record
            roll_back(exchange, newest - 2, "loss rose")
        finish_rollbacks(exchange)
        assert files(config) == expected
    assert num_calls > 10


@pytest.mark.parametrize("way", WAYS)
def test_the_run_goes_on_from_there_and_can_be_rolled_back_again(
    way: str, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config, exchange = make_run(tmp_path, tiny_config, way)
    newest = exchange.newest_version()
    seen = {version: sha256_bytes(exchange.commit_bytes(version)) for version in range(newest + 1)}
    kept = exchange.read_commit(newest - 2)
    roll_back(exchange, newest - 2, "loss rose")
    aggregator, state = start(config)
    assert (state.version, state.parameters_digest) == (newest - 2, kept.parameters_digest)
    assert [explain(exchange, v, sha) for v, sha in list(seen.items())[-3:]] == ["same", "rolled back", "rolled back"]
    assert explain(exchange, newest, "0" * 64) == "foreign"
    deliver_all(config, state)
    one_version(aggregator, state)
    assert exchange.read_commit(newest - 1).previous == seen[newest - 2]
    roll_back(exchange, newest - 2, "again")
    first, second = records(exchange)
    assert (first["from"], first["to"], first["reason"], first["previous"]) == (newest, newest - 2, "loss rose", None)
    assert second["previous"] == sha256_bytes(exchange.objects.read("rollbacks/000001.json"))
    assert first["discarded"] == [seen[newest - 1], seen[newest]]
    aside = exchange.objects.read(f"rolled-back/000001/{version_path(newest)}/commit.json")
    assert sha256_bytes(aside) == seen[newest]
    manifest = f"rolled-back/000001/silos/alpha/{newest:06d}/manifest.json"
    assert json.loads(exchange.objects.read(manifest))["silo"] == "alpha"


def test_only_to_what_is_kept(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config, exchange = make_run(tmp_path, tiny_config, "one fragment")
    newest = exchange.newest_version()
    before = files(config)
    for to in (newest, newest + 1, -1):
        message = one_line_error(lambda to=to: roll_back(exchange, to, ""))
        assert message.startswith(f"--to: {to} given; allowed: ")
        assert message.endswith(f"the versions before {newest} that are kept")
    for file in Path(config.store_url, version_path(0)).glob("*.safetensors"):
        file.unlink()
    assert one_line_error(lambda: roll_back(exchange, 0, "")).startswith("--to: 0 given; allowed: 1, 2")
    assert files(config) == {name: data for name, data in before.items() if Path(config.store_url, name).exists()}
    nowhere = StoreExchange(str(tmp_path / "nowhere"))
    assert "there is no run in it" in one_line_error(lambda: roll_back(nowhere, 0, ""))
