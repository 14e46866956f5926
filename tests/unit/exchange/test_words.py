"""Small objects that whoever may write to the store has spoiled: one line that names them, and nobody ends by them."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.exchange.history import History
from pretrain.exchange.lease import Lease
from pretrain.exchange.rollback import finish_rollbacks, versions_above
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Evaluation, Holder, Identity, Membership, Refusal, Word, number
from pretrain.trust.ledger import RefusedError, sha256_bytes
from tests.support import one_line_error
from tests.unit.exchange.test_store import publish

WORDS: list[Word] = [
    Identity(identity="ab"),
    Membership(left=False, version=3),
    Refusal(reason="it was corrupted", final=True),
    Evaluation(version=3, parameters_digest="0" * 64, losses={"law": 2.5}, sequences={"law": 64}),
    Holder(holder="here", machine="this", pid=3, lease_seconds=30, nonce="ab"),
]
GARBAGE = [
    *(b"", b"\xff", b"[]", b"3", b"null", b"{}", b"[" * 100_000, b'{"left": 1e999}', b'{"left": "no", "version": 3}'),
    *(b'{"left": false, "version": -1}', b'{"left": false, "version": 3, "x": 1}', b'{"left": false, "version": true}'),
    b" " * (1 << 20),
]


@pytest.fixture
def exchange(tmp_path: Path) -> StoreExchange:
    return StoreExchange(str(tmp_path / "store"))


@pytest.mark.parametrize("word", WORDS, ids=lambda word: type(word).__name__)
def test_a_word_is_read_as_it_was_written(word: Word) -> None:
    assert type(word).from_bytes(word.to_bytes()) == word


@pytest.mark.parametrize("word", WORDS, ids=lambda word: type(word).__name__)
@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: repr(data[:12]))
def test_what_is_no_word_is_refused_in_one_line(word: Word, data: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        type(word).from_bytes(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "spoiled",
    [
        *({"version": None}, {"label": "central"}, {"version": None, "label": "Central"}, {"parameters_digest": "0"}),
        *({"losses": {}, "sequences": {}}, {"losses": {"law": -0.1}}, {"sequences": {"law": 0}}, {"tokens": 0.5}),
        *({"losses": {"law": float("nan")}}, {"losses": {"law": "2"}}, {"losses": {"law": 1.0, "prose": 1.0}}),
        *({"losses": {corpus: 1.0}, "sequences": {corpus: 8}} for corpus in ("", "a" * 65, "a\x1b[2J", "a\u202e")),
        {"losses": dict.fromkeys(map(str, range(65)), 1.0), "sequences": dict.fromkeys(map(str, range(65)), 8)},
    ],
    ids=repr,
)
def test_an_evaluation_that_says_nothing_is_refused_before_it_is_written(
    spoiled: dict[str, Any], exchange: StoreExchange
) -> None:
    word = Evaluation(version=3, parameters_digest="0" * 64, losses={"law": 2.5}, sequences={"law": 64})
    with pytest.raises(RefusedError) as caught:
        exchange.tell_evaluation("law", dataclasses.replace(word, **spoiled))
    assert str(caught.value).isprintable()
    assert exchange.objects.names("silos") == []
    assert exchange.tell_evaluation("law", word) == "silos/law/evaluations/000000.json"
    assert exchange.tell_evaluation("law", word) == "silos/law/evaluations/000001.json"


@pytest.mark.parametrize(
    "name",
    ["²", "17", "0000017", "00017 ", "\u0660\u0660\u0660\u0660\u0661\u0667", "-00017", "1e5", "9999999999", "zzz", ""],
)
def test_other_names_have_no_number(name: str) -> None:
    assert number(name) is None
    assert (number("000017"), number("1000000"), number("000017.json", after=".json")) == (17, 1_000_000, 17)


def test_a_bad_membership_counts_as_not_said(exchange: StoreExchange, capsys: pytest.CaptureFixture[str]) -> None:
    exchange.objects.write("silos/law/membership/000000.json", b"[]")
    assert exchange.membership("law") is None
    assert capsys.readouterr().out == (
        f"{exchange.objects.url}: silos/law/membership/000000.json is passed over: has keys [], not ['left', "
        "'version']\n"
    )
    exchange.announce("law", left=False, version=3)
    exchange.objects.write("silos/law/membership/000002.json", b"{")
    for name in ("zzz.json", "².json"):
        exchange.objects.write(f"silos/law/membership/{name}", b"{}")
    for _ in range(3):
        assert exchange.membership("law") == Membership(left=False, version=3)
    exchange.announce("law", left=True, version=4)
    assert exchange.membership("law") == Membership(left=True, version=4)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_bad_refusal_counts_as_none(exchange: StoreExchange) -> None:
    exchange.objects.write("silos/law/000001/refused-0.json", b"\xff")
    exchange.objects.write("silos/law/000001/refused-x.json", b"\xff")
    exchange.refuse("law", 1, b"", "bad\x1b[2J" + "x" * 10_000_000)
    (refusal,) = exchange.refusals("law", 1)
    assert refusal.reason.startswith("bad\\x1b[2Jxxx")
    assert len(refusal.reason) < 1100


def test_a_bad_identity_is_one_line(exchange: StoreExchange) -> None:
    exchange.objects.write("silos/law/identity.json", b'{"identity": 3}')
    assert one_line_error(exchange.claim_name, "law", "ab") == (
        f"silos: 'law' given; silos/law/identity.json in {exchange.objects.url}, which says whose name this is, cannot "
        "be read: identity: 3 given; allowed: <class 'str'>; delete it there if the name is ours"
    )


def test_marks_and_versions_that_are_no_numbers_are_nobodys(exchange: StoreExchange, tmp_path: Path) -> None:
    publish(exchange, 0, tmp_path)
    publish(exchange, 1, tmp_path)
    exchange.mark_resumable("law", 0)
    for name in ("global/²", "silos/law/resumable/²", "global/junk", "waiting/³.json"):
        exchange.objects.write(name, b"")
    exchange.mark_resumable("law", 1)
    assert History(exchange, 1, all_whole=True).prune(["law"], 1, 2) == []
    assert StoreExchange(exchange.objects.url).newest_version() == 1
    assert versions_above(exchange, 0) == [1]


def test_a_version_above_a_gap_is_none(
    exchange: StoreExchange, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(exchange, 0, tmp_path)
    publish(exchange, 1, tmp_path)
    exchange.objects.write("global/999999/commit.json", b"{}")
    assert exchange.newest_version() == 1
    assert capsys.readouterr().out == (
        f"{exchange.objects.url}: global/999999 is passed over: there is no version 2, which it would need\n"
    )
    publish(exchange, 2, tmp_path)
    assert exchange.newest_version() == 2


# ---- the lease


def spoil(tmp_path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """The record of term 1, as somebody else's."""
    Lease(StoreExchange(str(tmp_path)), seconds=30).release()
    (tmp_path / "aggregator" / "000001.ended").unlink()
    file = tmp_path / "aggregator" / "000001.json"
    record = json.loads(file.read_text()) | {"machine": "another"}
    change(record)
    file.write_text(json.dumps(record))


def test_a_lease_does_not_say_how_long_others_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(tmp_path, lambda record: record.update(lease_seconds=1e9, holder="\x1b[2Jme"))
    Lease(StoreExchange(str(tmp_path)), seconds=0.1).release()
    assert capsys.readouterr().out.splitlines() == [
        "the aggregator at \\x1b[2Jme holds this store: waiting 1 s for a sign of life",
        "the aggregator at \\x1b[2Jme has been silent for 1 s: taking over",
    ]


def test_a_bad_lease_is_watched_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(tmp_path, lambda record: record.pop("pid"))
    Lease(StoreExchange(str(tmp_path)), seconds=0.1).release()
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}: aggregator/000001.json does not say who holds this store: has keys [")
    assert others == [
        "whoever wrote aggregator/000001.json holds this store: waiting 0.1 s for a sign of life",
        "whoever wrote aggregator/000001.json has been silent for 0.1 s: taking over",
    ]


@pytest.mark.parametrize("term", [2, 999_999])
def test_any_newer_term_ends_the_holder(term: int, tmp_path: Path) -> None:
    lease = Lease(StoreExchange(str(tmp_path)), seconds=30)
    lease.check()
    (tmp_path / "aggregator" / f"{term:06d}.json").write_bytes(b"{}")
    assert one_line_error(lease.check) == (
        f"exchange.url: {tmp_path} given; whoever wrote aggregator/{term:06d}.json has taken over here"
    )
    lease.release()


@pytest.mark.timeout(20)
def test_a_term_that_cannot_be_taken_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "aggregator").mkdir()
    os.mkfifo(tmp_path / "aggregator" / "000001.json")
    assert one_line_error(lambda: Lease(StoreExchange(str(tmp_path)), seconds=30)) == (
        f"exchange.url: {tmp_path} given; aggregator/000001.json there is no lease; take it away"
    )


# ---- rollbacks


def rollback(exchange: StoreExchange, **changes: object) -> dict[str, object]:
    return {
        "format": 2,
        "signature": None,
        "previous": None,
        "from_version": 2,
        "to_version": 0,
        "commit_sha256": sha256_bytes(exchange.commit_bytes(0)),
        "discarded": [sha256_bytes(exchange.commit_bytes(version)) for version in (1, 2)],
        "reason": "",
    } | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"discarded": []}, "would discard version 1 without naming its commit; nothing was deleted"),
        ({"from_version": 1}, "goes from version 1 to 0, and the newest here is 2; nothing was deleted"),
        ({"from_version": "2"}, "from_version: '2' given"),
        ({"discarded": [[]]}, "discarded: "),
    ],
)
def test_a_rollback_deletes_what_it_names_only(
    changes: dict[str, object], expected: str, exchange: StoreExchange, tmp_path: Path
) -> None:
    for version in range(3):
        publish(exchange, version, tmp_path)
    exchange.objects.write("rollbacks/zzz.json", b"not one")
    exchange.objects.write("rollbacks/000001.json", json.dumps(rollback(exchange, **changes)).encode())
    with pytest.raises(RefusedError, match=r"^rollbacks/000001\.json") as caught:
        finish_rollbacks(exchange)
    assert expected in str(caught.value)
    assert exchange.newest_version() == 2


def test_a_rollback_that_fits_is_carried_out(exchange: StoreExchange, tmp_path: Path) -> None:
    for version in range(3):
        publish(exchange, version, tmp_path)
    exchange.objects.write("rollbacks/000001.json", json.dumps(rollback(exchange)).encode())
    assert len(finish_rollbacks(exchange)) == 1
    assert exchange.newest_version() == 0


def test_what_nobody_can_copy_does_not_hold_up_a_rollback(exchange: StoreExchange, tmp_path: Path) -> None:
    for version in range(3):
        publish(exchange, version, tmp_path)
    folder = tmp_path / "store" / "global" / "000001"
    (folder / "huge.json").write_bytes(bytes(5 << 20))
    (folder / "folder.safetensors").mkdir()
    (folder / "folder.json").mkdir()
    (folder / "link.json").symlink_to(tmp_path)
    exchange.objects.write("rollbacks/000001.json", json.dumps(rollback(exchange)).encode())
    finish_rollbacks(exchange)
    assert exchange.newest_version() == 0
    assert sorted(path.name for path in folder.iterdir()) == ["folder.json", "folder.safetensors", "link.json"]


@pytest.mark.timeout(20)
def test_names_that_something_else_has_are_one_line(exchange: StoreExchange, tmp_path: Path) -> None:
    (tmp_path / "store" / "silos" / "law" / "membership").mkdir(parents=True)
    takes: dict[str, Callable[[], object]] = {
        "contract.json": lambda: exchange.write_contract(b"{}"),
        "silos/law/identity.json": lambda: exchange.claim_name("law", "ab"),
        "silos/law/membership/000000.json": lambda: exchange.announce("law", left=False, version=0),
    }
    for name, take in takes.items():
        os.mkfifo(tmp_path / "store" / name)
        assert one_line_error(take).startswith(
            f"exchange.url: {exchange.objects.url} given; {name} was not there, and cannot be written: "
        )


def test_a_rollback_that_cannot_be_noted_is_one_line(exchange: StoreExchange, tmp_path: Path) -> None:
    for version in range(3):
        publish(exchange, version, tmp_path)
    exchange.objects.write("rollbacks/000001.json", json.dumps(rollback(exchange)).encode())
    os.mkfifo(tmp_path / "store" / "rollbacks" / "000001.done")
    with pytest.raises(RefusedError, match=r"^rollbacks/000001\.done is taken by what is no part of a rollback"):
        finish_rollbacks(exchange)
