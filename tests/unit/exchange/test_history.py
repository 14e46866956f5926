"""What the versions in a store are made of, and what is pruned when nobody can need it again."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretrain.exchange.history import History
from pretrain.exchange.objects import Objects
from pretrain.exchange.store import StoreExchange, delivery_path, file_payload, version_path
from pretrain.trust.ledger import Commit, Payload, Snapshot, sha256_bytes
from tests.unit.exchange.test_store import deliver, make_commit, make_file, publish

# ---- pruning

ROSTER = ["law", "medicine"]


def tensors(exchange: StoreExchange) -> list[str]:
    """Folders that still hold tensors."""
    folders = [version_path(v) for v in range(10)] + [delivery_path(silo, v) for silo in ROSTER for v in range(10)]
    return [f for f in folders if any(name.endswith(".safetensors") for name in exchange.objects.names(f))]


def whole(exchange: StoreExchange) -> History:
    return History(exchange, 1, all_whole=True)


def fill(exchange: StoreExchange, num_versions: int, scratch: Path) -> None:
    publish(exchange, 0, scratch)
    for version in range(1, num_versions):
        for silo in ("law", "medicine"):
            deliver(exchange, silo, version, b"x", scratch)
        publish(exchange, version, scratch)


def kept(first: int, num_versions: int) -> list[str]:
    delivered = [delivery_path(silo, v) for silo in ROSTER for v in range(max(first, 1), num_versions)]
    return [version_path(v) for v in range(first, num_versions)] + delivered


def test_pruning_keeps_versions_and_what_a_resume_needs(exchange: StoreExchange, tmp_path: Path) -> None:
    fill(exchange, 6, tmp_path)
    assert whole(exchange).prune(ROSTER, 5, 2) == []  # nobody has a checkpoint yet: all may be needed
    exchange.mark_resumable("law", 5)
    assert whole(exchange).prune(ROSTER, 5, 2) == []  # the other one has none
    exchange.mark_resumable("medicine", 2)
    assert whole(exchange).prune(ROSTER, 5, 2) == [1, 0]
    assert tensors(exchange) == kept(2, 6)
    exchange.mark_resumable("medicine", 5)
    assert exchange.objects.names("silos/medicine/resumable") == ["000005"]
    assert whole(exchange).prune(ROSTER, 5, 2) == [3, 2]  # versions 4 and 5 stay by keep_versions
    assert tensors(exchange) == kept(4, 6)
    assert whole(exchange).prune(ROSTER, 5, 2) == []
    assert [exchange.read_commit(version).version for version in range(6)] == list(range(6))  # the ledger stays
    assert all(exchange.delivery(silo, version) for silo in ROSTER for version in range(1, 6))


def test_the_aggregator_ignores_marks_that_are_no_versions(exchange: StoreExchange, tmp_path: Path) -> None:
    fill(exchange, 4, tmp_path)
    for silo in ROSTER:
        exchange.mark_resumable(silo, 3)
    exchange.objects.write("silos/law/resumable/junk", b"")
    assert whole(exchange).prune(ROSTER, 3, 1) == [2, 1, 0]


def test_marking_goes_up_only_and_twice_is_once(exchange: StoreExchange) -> None:
    for version in (1, 3, 3):
        exchange.mark_resumable("law", version)
    assert exchange.objects.names("silos/law/resumable") == ["000003"]


def test_pruning_that_was_killed_is_finished_the_next_time(tmp_path: Path) -> None:
    """Killed before its first, second, ... deletion: the next pruning comes to the same store every time."""
    fill(StoreExchange(str(tmp_path / "full")), 4, tmp_path)
    num_deletions = 3 + 2 * 2  # versions 0 to 2, and two silos' deliveries for versions 1 and 2
    for killed_before in range(num_deletions):
        copy = tmp_path / f"killed-{killed_before}"
        shutil.copytree(tmp_path / "full", copy)
        exchange = StoreExchange(str(copy))
        for silo in ROSTER:
            exchange.mark_resumable(silo, 3)
        exchange.objects = Dying(str(copy), lives=killed_before)
        with pytest.raises(KeyboardInterrupt):
            whole(exchange).prune(ROSTER, 3, 1)
        again = StoreExchange(str(copy))
        whole(again).prune(ROSTER, 3, 1)
        assert tensors(again) == kept(3, 4), f"killed before deletion {killed_before}"


class Dying(Objects):
    """Objects of a process that is killed before one more deletion."""

    def __init__(self, url: str, *, lives: int) -> None:
        super().__init__(url)
        self._lives = lives

    def delete(self, name: str) -> None:
        if self._lives == 0:
            raise KeyboardInterrupt
        self._lives -= 1
        super().delete(name)


# ---- fragments


def snapshot(exchange: StoreExchange, commit: Commit, files: Sequence[tuple[Payload, Path]] = ()) -> None:
    """Of a version; where the codec is fp32 and the optimizer keeps nothing, there is nothing more in it."""
    record = Snapshot(
        contract_sha256=commit.contract_sha256,
        version=commit.version,
        commit_sha256=sha256_bytes(commit.to_bytes()),
        payloads=[payload for payload, _ in files],
    )
    History(exchange, 3).write_snapshot(record, files)


def publish_fragment(exchange: StoreExchange, version: int, codec: str, scratch: Path, *, every: int = 1) -> None:
    """As the aggregator does with three fragments and Nesterov: version 0 has all, every other one changes one. Each
    fragment has a snapshot at `every` so many of its steps.
    """
    codec, is_snapshot = codec if version else "fp32", -(-version // 3) % every == 0
    coded, whole = ("parameter", ["velocity"]) if codec == "fp32" else ("change", ["velocity", "parameter"])
    payloads: list[tuple[Payload, Path]] = []
    for kind in (coded, *(whole if version and is_snapshot else [])):
        for fragment in [version % 3] if version else range(3):
            file = make_file(scratch, f"{kind} of version {version}".encode(), f"{kind}-{fragment:03d}.safetensors")
            payloads.append((file_payload(file, fragment), file))
    num_coded = 1 if version else 3
    previous, rows = exchange.commit_bytes(version - 1) if version else None, [row for row, _ in payloads[:num_coded]]
    commit = dataclasses.replace(make_commit(version, previous, rows, exchange.contract_sha256), codec=codec)
    exchange.publish(commit, payloads[:num_coded])
    if files := payloads[num_coded:]:
        snapshot(exchange, commit, files)


def made_of(exchange: StoreExchange, version: int) -> list[str]:
    """Names of all that a version is made of."""
    return sorted(f"{folder}/{payload.file}" for folder, payload in History(exchange, 3).made_of(version))


def named(**kinds: list[tuple[int, int]]) -> list[str]:
    """Names of payloads: of each kind, versions and fragments."""
    return sorted(
        f"{version_path(version)}/{kind}-{fragment:03d}.safetensors"
        for kind, of in kinds.items()
        for version, fragment in of
    )


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_a_version_is_made_of_each_fragments_last_change(codec: str, tmp_path: Path) -> None:
    exchange = StoreExchange(str(tmp_path / "store"))
    last_changes = [(0, 0, 0), (0, 1, 0), (0, 1, 2), (3, 1, 2), (3, 4, 2), (3, 4, 5), (6, 4, 5)]
    for version, last_change in enumerate(last_changes):
        publish_fragment(exchange, version, codec, tmp_path)
        last = [(changed, fragment) for fragment, changed in enumerate(last_change)]
        assert made_of(exchange, version) == named(parameter=last, velocity=[row for row in last if row[0]])
    for silo, version in (("law", 6), ("medicine", 5)):
        exchange.mark_resumable(silo, version)
    assert History(exchange, 3).prune(ROSTER, 6, 1) == [2, 1, 0]  # 5 and 6 are made of 3 to 6
    assert all(History(exchange, 3).is_kept(version) for version in (5, 6))


# ---- snapshots


def test_between_snapshots_a_version_is_made_of_changes_and_deliveries(tmp_path: Path) -> None:
    """Three fragments, each with a snapshot at every second step: versions 4, 5, 6, then 10, 11, 12."""
    exchange = StoreExchange(str(tmp_path / "store"))
    for version in range(13):
        publish_fragment(exchange, version, "int4", tmp_path, every=2)
    snapshots = [(version, version % 3) for version in (4, 5, 6)]
    assert made_of(exchange, 6) == named(parameter=snapshots, velocity=snapshots)
    assert made_of(exchange, 8) == named(parameter=snapshots, velocity=snapshots, change=[(7, 1), (8, 2)])
    later = [(6, 0), (10, 1), (11, 2)]
    assert made_of(exchange, 11) == named(parameter=later, velocity=later, change=[(9, 0)])
    history = History(exchange, 3)

    def told(fragment: int, since: int) -> list[tuple[int, str]]:
        return [(version, codec) for version, _, codec in history.parameters(9, fragment, since=since)]

    assert told(0, since=-1) == [(6, ""), (9, "int4")]
    assert told(0, since=6) == told(0, since=8) == [(9, "int4")]
    assert told(0, since=3) == [(6, "int4"), (9, "int4")], "fewer bytes than version 6 whole, and the change of 9"
    assert told(0, since=0) == [(6, ""), (9, "int4")], "and those of 3, 6 and 9 are more"
    assert told(0, since=9) == told(1, since=7) == []
    assert [history.first_needed(version) for version in range(12)] == [0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 5, 6]
    # A late delivery for 10 was coded against 7, which follows from the snapshot before.
    assert [history.first_needed(version, late=True) for version in (11, 12)] == [0, 4]
    assert history.prune(ROSTER, 12, 6) == []  # nobody has a checkpoint yet
    for silo in ROSTER:
        exchange.mark_resumable(silo, 8)
    assert history.prune(ROSTER, 12, 6) == [3, 2, 1, 0]  # 7 is the oldest that is kept
    assert [version for version in range(13) if history.is_kept(version)] == [6, 7, 8, 9, 10, 11, 12]
    (tmp_path / "store" / version_path(3) / "commit.json").write_bytes(b"{")
    assert History(exchange, 3).first_needed(8) == 4, "whatever older commits are"


def test_a_whole_change_is_told_alone(tmp_path: Path) -> None:
    """With codec fp32 the parameters are in every version, and only the outer state is not."""
    exchange = StoreExchange(str(tmp_path / "store"))
    for version in range(12):
        publish_fragment(exchange, version, "fp32", tmp_path, every=2)
    history = History(exchange, 3)
    for since in (-1, 0, 6):
        assert [(version, codec) for version, _, codec in history.parameters(9, 0, since=since)] == [(9, "")]
    state = [(version, version % 3) for version in (4, 5, 6)]
    assert made_of(exchange, 8) == named(parameter=[*state, (7, 1), (8, 2)], velocity=state)
    assert history.first_needed(8, late=True) == 1  # a late delivery for 4 was coded against 1
