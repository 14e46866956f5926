"""Between snapshots the outer state follows from deliveries: restarts, late joiners, rollbacks, pruning, bytes."""

import dataclasses
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import aggregate as module
from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import RunConfig
from pretrain.exchange.history import History
from pretrain.exchange.lease import Lease
from pretrain.exchange.rollback import roll_back
from pretrain.exchange.store import StoreExchange
from pretrain.federation.export import load_global_model
from pretrain.host.journal import Journal
from pretrain.merge.terms import snapshot_kinds, snapshot_versions
from pretrain.outer.digest import digest_tensors
from pretrain.outer.quantize import QUANTIZERS
from pretrain.sync.delivered import Delivered
from pretrain.sync.through_store import ThroughStore
from pretrain.trust.ledger import RefusedError
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.merge.test_shared_moments import telling
from tests.unit.test_aggregate import GOOD, commit_of, fragment_names, one_version, plus_noise, start
from tests.unit.test_aggregate_restart import assert_same_state, newest_file
from tests.waiting import PATIENCE_SECONDS

SILOS = ("alpha", "beta")
INT4: dict[str, Any] = {"codec": "int4", "downlink_codec": "int4", "lr": 0.5, "momentum": 0.5}


def deliver_all(config: RunConfig, state: OuterState) -> None:
    """Every silo has trained on other text, and tells of second moments if these are shared."""
    shares = config.outer.second_moments == "shared"
    names = fragment_names(config, state, state.version + 1)
    for index, silo in enumerate(config.full_roster):
        hand = telling(state, 1e-8 * (index + 1), only=names.__contains__) if shares else GOOD
        hand.deliver(config, silo, state, plus_noise(state, seed=index), tokens=3 + index)


def advance(config: RunConfig, num_versions: int) -> OuterState:
    """A run of so many versions, of an aggregator that is gone."""
    aggregator, state = start(config)
    while state.version < num_versions:
        deliver_all(config, state)
        one_version(aggregator, state)
    return state


def files(config: RunConfig, folder: str = "") -> dict[str, bytes]:
    store = Path(config.store_url)
    found = sorted(path for path in (store / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in found}


def opened(config: RunConfig) -> StoreExchange:
    exchange = StoreExchange(config.store_url)
    exchange.read_contract()
    return exchange


def snapshots_of(config: RunConfig) -> list[int]:
    return [int(name.removesuffix(".json")) for name in sorted(os.listdir(Path(config.store_url) / "snapshots"))]


# ---- restarts

WAYS: dict[str, dict[str, Any]] = {
    "one fragment, int4": INT4,
    "three fragments, int8, overlap": INT4 | {"num_fragments": 3, "overlap_steps": 1, "codec": "int8"},
    "three fragments, fp32": {"num_fragments": 3},
    "clip, bf16": {"merge": "clip", "codec": "bf16", "downlink_codec": "bf16"},
    "importance, e3m0, three fragments": {"merge": "importance", "second_moments": "shared", "codec": "e3m0"}
    | {"downlink_codec": "e3m0", "num_fragments": 3},
    "adam, topk": {"optimizer": "adam", "lr": 0.01, "codec": "topk", "downlink_codec": "topk"},
    "sgd, krum, int8 down": {"optimizer": "sgd", "lr": 0.7, "merge": "krum", "downlink_codec": "int8"},
}


LONGER = {"three fragments, fp32", "clip, bf16", "sgd, krum, int8 down"}


@pytest.mark.parametrize("way", [pytest.param(w, marks=[pytest.mark.soak] if w in LONGER else []) for w in WAYS])
def test_an_aggregator_that_starts_again_at_every_version_comes_to_the_same_bytes(
    way: str, tmp_path: Path, tiny_config: TinyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a snapshot at every third of a fragment's steps; killed with the merge done and nothing committed."""
    outer, ledgers, num_fragments = WAYS[way], [], WAYS[way].get("num_fragments", 1)
    for name in ("whole", "restarted"):
        config = tiny_config(
            tmp_path / name,
            inner={"num_steps": 16 if num_fragments > 1 else 28},
            outer=outer,
            silos={"gamma": {}},
            roster=[*("alpha", "beta", "gamma"), *(("delta", "eps") if outer.get("merge") == "krum" else ())],
            exchange={"snapshot_versions": 3},
        )
        aggregator, state = start(config)
        while state.version < config.schedule.num_versions:
            deliver_all(config, state)
            if name == "restarted":
                aggregator.merge(state, aggregator.collect(state))
                aggregator, again = start(config)
                assert again.version == state.version
                state = again
            one_version(aggregator, state)
        ledgers.append(files(config, "global"))
        assert_same_state(start(config)[1], state)
    assert ledgers[0] == ledgers[1]
    assert snapshots_of(config) == ([7, 8, 9] if num_fragments == 3 else [3, 6])
    if num_fragments == 3:
        assert "replaying versions 10 to 12 from snapshots 7 to 9 and 9 deliveries" in capsys.readouterr().out
    else:
        assert (
            f"replaying version 7 from snapshot 6 and {len(config.full_roster)} deliveries" in capsys.readouterr().out
        )


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_what_came_too_late_is_replayed_too(codec: str, tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Gamma's delivery for version 3, a snapshot, is in 4, and was coded against version 2; version 1 is pruned."""
    rules = {"quorum": 2, "deadline_floor_seconds": 0.3, "deadline_ceiling_seconds": 0.3, "stale_weight": 0.5}
    exchange = {"snapshot_versions": 3, "keep_versions": 1}
    outer = {"codec": codec, "downlink_codec": codec}
    config = tiny_config(
        tmp_path, inner={"num_steps": 40}, outer=outer, silos={"gamma": {}}, membership=rules, exchange=exchange
    )
    aggregator, state = start(config)
    store = opened(config)
    for silo in config.full_roster:
        store.announce(silo, left=False, version=0)
        store.mark_resumable(silo, 9)
    for version in range(1, 6):
        before = dataclasses.replace(
            state, parameters={n: p.clone() for n, p in state.parameters.items()}, rows=dict(state.rows)
        )
        for index, silo in enumerate(("alpha", "beta")):
            GOOD.deliver(config, silo, state, plus_noise(state, seed=index), tokens=3 + index)
        one_version(aggregator, state)
        if version == 3:
            before.version = 2
            GOOD.deliver(config, "gamma", before, plus_noise(before, seed=9), tokens=50)
        assert_same_state(start(config)[1], state)
    assert [(c["silo"], c["version"]) for c in commit_of(config, 4)["contributors"]][2:] == [("gamma", 3)]
    with_tensors = sorted({name.split("/")[1] for name in files(config, "global") if "safetensors" in name})
    assert with_tensors[0] == ("000002" if codec == "fp32" else "000000"), "of which version 2 is made"


def test_the_rule_may_change_between_two_starts(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """What was written is told by the commits, not by the configuration."""
    for number, every in enumerate((4, 1, None, 2)):
        config = tiny_config(tmp_path, inner={"num_steps": 40}, outer=INT4, exchange={"snapshot_versions": every})
        state = advance(config, 2 * number + 2)
        assert_same_state(start(config)[1], state)
    assert snapshots_of(config) == [3, 4, 8]
    assert [v for v in range(9) if commit_of(config, v)["outer_digest"]] == [3, 4, 8]


def test_a_snapshot_is_written_while_silos_train_on(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """The commit is there before it, deliveries for the next are taken meanwhile, and the next merge waits for it."""
    config = tiny_config(tmp_path, outer=INT4, exchange={"snapshot_versions": 1})
    may_write = threading.Event()

    class SlowLease(Lease):
        """The thread that writes snapshots is held up where it looks at the lease."""

        def check(self) -> None:
            if threading.current_thread() is not threading.main_thread():
                assert may_write.wait(PATIENCE_SECONDS)
            super().check()

    Path(config.directory).mkdir()
    take_lease = partial(SlowLease, seconds=60)
    aggregator = Aggregator(config, Journal(config, "aggregator", silo=None), take_lease=take_lease)
    state = aggregator.start()
    deliver_all(config, state)
    deliveries = aggregator.collect(state)
    aggregator.commit(state, deliveries, aggregator.merge(state, deliveries))
    assert opened(config).newest_version() == 1
    deliver_all(config, state)
    deliveries, before = aggregator.collect(state), state.parameters_digest
    with ThreadPoolExecutor(1) as pool:
        merging = pool.submit(aggregator.merge, state, deliveries)
        with pytest.raises(TimeoutError):
            merging.result(0.5)
        assert (state.parameters_digest, History(opened(config), 1).snapshots()) == (before, [])
        may_write.set()
        merged = merging.result(PATIENCE_SECONDS)
    assert snapshots_of(config) == [1]
    aggregator.commit(state, deliveries, merged)
    aggregator.snapshots.finish()
    aggregator.stop()
    assert_same_state(start(config)[1], state)


def test_a_snapshot_that_a_killed_aggregator_owes_is_written_by_the_next(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = tiny_config(tmp_path, inner={"num_steps": 40}, outer=INT4, exchange={"snapshot_versions": 3})
    advance(config, 6)
    whole, record = files(config), Path(config.store_url) / "snapshots" / "000006.json"
    record.unlink()  # its payloads were written, or some of them
    (Path(config.store_url) / "global/000006/velocity-000.safetensors").write_bytes(b"half")
    aggregator, _ = start(config)
    aggregator.snapshots.finish()
    assert files(config) == whole


def test_a_restart_reads_no_older_commits_than_it_needs(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """The snapshot is 18, and what is remembered of one silo are sixteen commits: 5 is the first one, and follows 4."""
    config = tiny_config(
        tmp_path, silos={"beta": None}, inner={"num_steps": 100}, outer=INT4, exchange={"snapshot_versions": 6}
    )
    state = advance(config, 20)
    for version in range(4):
        (Path(config.store_url) / "global" / f"{version:06d}" / "commit.json").write_bytes(b"{")
    assert_same_state(start(config)[1], state)


# ---- what is damaged


def rewritten(folder: str, name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda store: (store / folder / name).write_bytes(change((store / folder / name).read_bytes()))


PAYLOAD, MANIFEST = "000004.safetensors", "manifest.json"
CANNOT = "version 4 cannot be replayed: the delivery of silo beta for version 4: silos/beta/000004/"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no payload": (lambda store: (store / "silos/beta/000004" / PAYLOAD).unlink(), f"{CANNOT}{PAYLOAD} is missing"),
    "truncated": (
        rewritten("silos/beta/000004", PAYLOAD, lambda data: data[:-1]),
        f"{CANNOT}{PAYLOAD} is truncated: it has not the ",
    ),
    "corrupted": (
        rewritten("silos/beta/000004", PAYLOAD, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        f"{CANNOT}{PAYLOAD} has not the blake3 ",
    ),
    "no manifest": (lambda store: (store / "silos/beta/000004" / MANIFEST).unlink(), f"{CANNOT}{MANIFEST} is missing"),
    "another manifest": (
        rewritten("silos/beta/000004", MANIFEST, lambda data: data + b" "),
        f"{CANNOT}{MANIFEST} is not the one that was merged",
    ),
    "no snapshot": (
        lambda store: (store / "global/000003/velocity-000.safetensors").unlink(),
        "global/000003/velocity-000.safetensors is missing",
    ),
    "no commit": (lambda store: (store / "global/000004/commit.json").unlink(), "commit 4 is missing"),
    "an old commit": (
        rewritten("global/000004", "commit.json", lambda data: data.replace(b'"format": 4', b'"format": 3')),
        "format 3 given; this version reads 4",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_replay_needs_and_is_damaged_is_one_line(
    damage: str, tmp_path: Path, tiny_config: TinyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, inner={"num_steps": 40}, outer=INT4, exchange={"snapshot_versions": 3})
    advance(config, 5)
    newest_file(config).unlink()
    spoil, expected = DAMAGES[damage]
    spoil(Path(config.store_url))
    before, num_threads = files(config, "global"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["aggregate", "--config", str(tmp_path / "tiny.yaml")])
        assert module.main() == 2
    torch.set_num_threads(num_threads)
    error = capsys.readouterr().err
    assert error.startswith(f"atoll: {expected}")
    assert error.count("\n") == 1
    assert files(config, "global") == before
    if expected.startswith(CANNOT):
        assert error.endswith(f"; restore it, or go back: atoll rollback {config.store_url} --to 3\n")
        roll_back(opened(config), 1, to=3)
        assert start(config)[1].version == 3


def test_a_delivery_that_was_swapped_with_its_commit_is_no_replay(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Somebody who can rewrite the newest commit, too: what comes out is not what its digest says."""
    config = tiny_config(tmp_path, inner={"num_steps": 40}, outer=INT4, exchange={"snapshot_versions": 3})
    advance(config, 4)
    newest_file(config).unlink()
    commit = opened(config).read_commit(4)
    first, second = commit.contributors
    forged = dataclasses.replace(commit, contributors=[dataclasses.replace(first, weight=first.weight + 1), second])
    (Path(config.store_url) / "global/000004/commit.json").write_bytes(forged.to_bytes())
    with pytest.raises(RefusedError, match=r"^version 4, replayed, does not have the digest of its commit$"):
        start(config)


# ---- silos and rollbacks between snapshots


@pytest.mark.parametrize("num_fragments", [1, 3])
@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_a_late_joiner_follows_from_a_snapshot(
    codec: str, num_fragments: int, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    outer = INT4 | {"num_fragments": num_fragments, "downlink_codec": codec}
    config = tiny_config(tmp_path, inner={"num_steps": 24}, outer=outer, exchange={"snapshot_versions": 3})
    aggregator, state = start(config)
    Delivered(config.silo_directory("alpha") / "delivered.txt").begin(99)
    seen = {}
    while state.version < 5 * num_fragments:
        seen[state.version] = {name: value.clone() for name, value in state.parameters.items()}
        deliver_all(config, state)
        one_version(aggregator, state)
    silo = ThroughStore(config, "alpha")
    silo._store.read_contract()

    def holds(since: int) -> dict[str, torch.Tensor]:
        found = dict(seen.get(since, {}))
        for received in silo.changes(since, state.version, dict(found)):
            assert received.bytes_received > 0
            found |= received.values
        return found

    for since in (-1, 0, 1, state.version - 1):
        assert digest_tensors(holds(since).items()) == state.parameters_digest, since
    assert list(silo.changes(state.version, state.version, state.parameters)) == []
    for version in (state.version, 4 * num_fragments - 1):  # what is exported is read in the same way
        model = dict(load_global_model(config, version)[0].named_parameters())
        parameters = seen.get(version, state.parameters)
        assert all(torch.equal(model[name], value) for name, value in parameters.items())


@pytest.mark.parametrize("num_fragments", [1, 3])
def test_back_to_a_version_between_snapshots(num_fragments: int, tmp_path: Path, tiny_config: TinyConfig) -> None:
    outer = INT4 | {"num_fragments": num_fragments}
    config = tiny_config(tmp_path, inner={"num_steps": 24}, outer=outer, exchange={"snapshot_versions": 3})
    to, newest = 4 * num_fragments + (num_fragments > 1), 5 * num_fragments
    advance(config, newest)
    before = files(config, "global")
    copy = dataclasses.replace(config, directory=str(tmp_path / "copy"))
    shutil.copytree(config.store_url, copy.store_url)
    roll_back(opened(config), num_fragments, to=to)
    assert start(config)[1].version == to
    advance(config, newest)
    assert files(config, "global") == before
    # What the way there needs, and not only what is of the version itself.
    gone = Path(copy.store_url) / f"silos/beta/{to:06d}/{to:06d}.safetensors"
    gone.rename(gone.with_suffix(".away"))
    kept = f"0 to {to - 1}" if num_fragments == 1 else "0 to 12"
    assert one_line_error(roll_back, opened(copy), num_fragments, to=to).startswith(
        f"--to: {to} given; allowed: {kept}, what is kept before the newest version"
    )


# ---- pruning


def test_what_pruning_keeps_by_hand(tmp_path: Path, tiny_config: TinyConfig) -> None:
    exchange = {"snapshot_versions": 3, "keep_versions": 1}
    config = tiny_config(tmp_path, inner={"num_steps": 40}, outer=INT4, exchange=exchange)
    aggregator, state = start(config)
    store = opened(config)
    store.mark_resumable("beta", 5)

    def tensors() -> list[str]:
        return [name for name in files(config) if name.endswith(".safetensors")]

    def kept(snapshot: int, newest: int) -> list[str]:
        of_snapshot = [f"global/{snapshot:06d}/{kind}-000.safetensors" for kind in ("parameter", "target", "velocity")]
        changes = [f"global/{version:06d}/change-000.safetensors" for version in range(snapshot, newest + 1)]
        folders = [
            f"silos/{silo}/{version:06d}" for silo in ("alpha", "beta") for version in range(snapshot, newest + 1)
        ]
        deliveries = [f"{folder}/{folder[-6:]}.safetensors" for folder in folders]
        return sorted([*of_snapshot, *changes, *deliveries])

    while state.version < 5:
        deliver_all(config, state)
        store.mark_resumable("alpha", state.version)
        one_version(aggregator, state)
    assert tensors() == kept(3, 5)  # of alpha's checkpoint, version 4
    store.mark_resumable("alpha", 7)
    while state.version < 8:
        deliver_all(config, state)
        one_version(aggregator, state)
    assert tensors() == sorted({*kept(3, 8), *kept(6, 8)})  # beta's is version 5
    store.mark_resumable("beta", 7)
    deliver_all(config, state)
    one_version(aggregator, state)
    whole = {f"global/000009/{kind}-000.safetensors" for kind in ("parameter", "target", "velocity")}
    assert tensors() == sorted({*kept(6, 9), *whole})
    assert_same_state(start(config)[1], state)
    assert [version for version in range(10) if History(store, 1).is_kept(version)] == [6, 7, 8, 9]


# ---- bytes


@pytest.mark.parametrize("num_silos", [2, 8])
def test_what_a_version_writes_is_little_more_than_its_payloads(
    num_silos: int, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    """Of twenty versions with int4 both ways, by the files in the store; eight silos have a snapshot among them."""
    roster = ["alpha", "beta", *(f"other{number}" for number in range(num_silos - 2))]
    config = tiny_config(tmp_path, inner={"num_steps": 100}, outer=INT4, roster=roster)
    advance(config, 20)
    found = {name: len(data) for name, data in files(config).items() if not name.startswith("global/000000")}
    assert {name.split("/")[1] for name in found if "velocity" in name} == ({"000013"} if num_silos == 8 else set())
    written = [name for name in found if name.endswith(".safetensors")]
    payloads = [name for name in written if name.startswith("silos/") or "/change-" in name]
    assert len(payloads) == 20 * (num_silos + 1)
    assert sum(found[name] for name in written) <= 1.2 * sum(found[name] for name in payloads)


def test_how_often_by_bytes(tmp_path: Path, tiny_config: TinyConfig) -> None:
    def every(num_silos: int, optimizer: str, codec: str, downlink: str, given: int | None = None) -> int:
        config = tiny_config(
            tmp_path,
            roster=["alpha", "beta", *(f"other{number}" for number in range(num_silos - 2))],
            outer={"optimizer": optimizer, "codec": codec, "downlink_codec": downlink},
            exchange={"snapshot_versions": given},
        )
        num_bytes = (num_silos * QUANTIZERS[codec].bits + QUANTIZERS[downlink].bits) / 8
        found = snapshot_versions(config)
        assert given or 4 * len(snapshot_kinds(config.outer)) <= 0.2 * num_bytes * found
        return found

    assert every(2, "sgd", "fp32", "fp32") == 1  # all there is are the parameters, which the change has
    assert every(2, "sgd", "int4", "fp32", given=7) == 1
    assert every(2, "nesterov", "fp32", "fp32") == 2  # 5 * 4 / (4 + 4 + 4)
    assert every(2, "nesterov", "int4", "int4") == 39  # 5 * 12 / (3 * 4.125 / 8)
    assert every(8, "nesterov", "int4", "int4") == 13
    assert every(4, "adam", "topk", "int8") == 71  # 5 * 16 / ((4 * 0.2266 + 8.125) / 8)
    assert every(2, "nesterov", "int4", "int4", given=5) == 5
    for given in (0, -1):
        message = one_line_error(every, 2, "nesterov", "int4", "int4", given)
        assert message == f"exchange.snapshot_versions: {given} given; allowed: null, or 1 or more"
