"""Going back to an earlier version: whole at every instant, on record, and the run goes on from there."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from launch import cli
from launch.show.status import print_status
from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import RunConfig
from pretrain.exchange.history import History
from pretrain.exchange.objects import Objects
from pretrain.exchange.rollback import (
    Rollback,
    explain,
    finish_rollbacks,
    is_rolling_back,
    roll_back,
    roll_back_store,
)
from pretrain.exchange.store import StoreExchange
from pretrain.trust.ledger import Commit, RefusedError, sha256_bytes
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.test_aggregate import GOOD, one_version, plus_noise, start

SILOS = ("alpha", "beta")
NEWEST = 5
STREAMS: dict[int, dict[str, Any]] = {
    1: {"num_fragments": 1, "lr": 0.5, "momentum": 0.5},
    2: {"num_fragments": 2, "lr": 0.5, "momentum": 0.5, "codec": "int8", "downlink_codec": "int4"},
}
Files = dict[str, bytes]


def advance(config: RunConfig, aggregator: Aggregator, state: OuterState) -> None:
    for index, silo in enumerate(SILOS):
        GOOD.deliver(config, silo, state, plus_noise(state, seed=index), tokens=3 + index)
    one_version(aggregator, state)


def files(store: Path) -> Files:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def opened(store: Path) -> StoreExchange:
    exchange = StoreExchange(str(store))
    exchange.read_contract()
    return exchange


@pytest.fixture(scope="module", params=STREAMS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> RunConfig:
    """A run of five versions, with a sixth under way; never write into it. With one fragment 2 and 4 are snapshots."""
    outer, exchange = STREAMS[request.param], {"snapshot_versions": 3 - request.param}
    config = tiny_config(tmp_path_factory.mktemp("run"), inner={"num_steps": 24}, outer=outer, exchange=exchange)
    aggregator, state = start(config)
    exchange = opened(Path(config.store_url))
    for version in range(1, NEWEST + 1):
        advance(config, aggregator, state)
        exchange.mark_resumable("alpha", version)
    exchange.mark_resumable("beta", 2)
    GOOD.deliver(config, "alpha", state, plus_noise(state))
    exchange.say_waiting(NEWEST + 1, ["beta"], deadline_seconds=None)
    manifest = exchange.delivery("alpha", NEWEST + 1)
    assert manifest
    exchange.refuse("alpha", NEWEST + 1, manifest, "for a test")
    exchange.announce("alpha", left=False, version=NEWEST)
    unfinished = Path(config.store_url, "global", f"{NEWEST + 1:06d}")
    unfinished.mkdir()
    (unfinished / "parameter-000.safetensors").write_bytes(b"left by an aggregator that died")
    return config


@pytest.fixture
def store(run: RunConfig, tmp_path: Path) -> Path:
    """A copy of that run's store."""
    return shutil.copytree(run.store_url, tmp_path / "run" / "store")


def elsewhere(run: RunConfig, store: Path) -> RunConfig:
    """The same run at a copy of its store."""
    return dataclasses.replace(run, directory=str(store.parent))


# ---- the whole way


def test_what_goes_what_stays_and_what_is_kept_aside(run: RunConfig, store: Path) -> None:
    before, commits = files(store), [opened(store).commit_bytes(version) for version in range(NEWEST + 1)]
    record = roll_back(opened(store), run.outer.num_fragments, to=2, reason="bad\n text")
    assert record == Rollback(
        previous=None,
        from_version=NEWEST,
        to_version=2,
        commit_sha256=sha256_bytes(commits[2]),
        discarded=[sha256_bytes(commit) for commit in commits[3:]],
        reason="bad text",
    )
    after = files(store)
    assert json.loads(after.pop("rollbacks/000001.json")) == {
        "format": 2,
        "signature": None,
        "previous": None,
        "from_version": 5,
        "to_version": 2,
        "commit_sha256": record.commit_sha256,
        "discarded": record.discarded,
        "reason": "bad text",
    }
    assert after.pop("rollbacks/000001.done") == b"{}\n"
    aside = {name.removeprefix("rolled-back/000001/"): after.pop(name) for name in list(after) if "rolled" in name}
    expected = {f"global/{version:06d}/commit.json" for version in (3, 4, 5)}
    expected |= {f"silos/{silo}/{version:06d}/manifest.json" for silo in SILOS for version in (3, 4, 5)}
    assert aside == {name: before[name] for name in expected | {"silos/alpha/000006/refused-0.json"}}
    gone = {name for name in before if name not in after}
    assert after == {name: data for name, data in before.items() if name not in gone}
    assert {name for name in gone if not any(f"{version:06d}" in name for version in (3, 4, 5, 6))} == set()
    assert not [name for name in after if any(f"/{version:06d}" in name for version in (3, 4, 5, 6))]
    assert opened(store).membership("alpha") == opened(Path(run.store_url)).membership("alpha")


def test_the_aggregator_goes_on_from_there(run: RunConfig, store: Path) -> None:
    config, num_fragments = elsewhere(run, store), run.outer.num_fragments
    exchange, before = opened(store), files(store)
    roll_back(exchange, num_fragments, to=2)
    aggregator, state = start(config)
    assert state.version == 2
    assert Commit.from_bytes(exchange.commit_bytes(2)).parameters_digest == state.parameters_digest
    GOOD.deliver(config, "alpha", state, plus_noise(state, seed=7))  # another history from here on
    GOOD.deliver(config, "beta", state, plus_noise(state, seed=8))
    one_version(aggregator, state)
    assert exchange.read_commit(3).previous == sha256_bytes(exchange.commit_bytes(2))
    assert exchange.commit_bytes(3) != before["global/000003/commit.json"]

    advance(config, aggregator, state)
    second = roll_back(exchange, num_fragments, to=1, reason="once more")
    first_bytes = (store / "rollbacks/000001.json").read_bytes()
    assert (second.from_version, second.to_version, second.previous) == (4, 1, sha256_bytes(first_bytes))
    assert len(second.discarded) == 3
    assert (store / "rolled-back/000001/global/000003/commit.json").read_bytes() == before["global/000003/commit.json"]
    assert (store / "rolled-back/000002/global/000003/commit.json").is_file()
    aggregator, state = start(config)
    while state.version < NEWEST:
        advance(config, aggregator, state)
    # The same deliveries as in the beginning: the same ledger, byte by byte.
    made_again = files(store)
    assert {n: made_again[n] for n in before if n.startswith("global/") and "000006" not in n} == {
        n: data for n, data in before.items() if n.startswith("global/") and "000006" not in n
    }


def test_what_a_silo_holds_is_explained(run: RunConfig, store: Path) -> None:
    exchange, config = opened(store), elsewhere(run, store)
    shas = [sha256_bytes(exchange.commit_bytes(version)) for version in range(NEWEST + 1)]
    assert {explain(exchange, version, sha) for version, sha in enumerate(shas)} == {"same"}
    roll_back(exchange, run.outer.num_fragments, to=2)
    told = [explain(exchange, version, sha) for version, sha in enumerate(shas)]
    assert told == ["same"] * 3 + ["rolled back"] * 3
    assert explain(exchange, 2, shas[1]) == "foreign"
    assert explain(exchange, 9, "0" * 64) == "foreign"
    aggregator, state = start(config)
    advance(config, aggregator, state)
    assert explain(exchange, 3, shas[3]) == "same", "the same deliveries came to the same commit"
    assert explain(exchange, 4, shas[4]) == "rolled back"
    backup = opened(shutil.copytree(store, store.parent / "backup"))
    advance(config, aggregator, state)
    newest = sha256_bytes(exchange.commit_bytes(4))
    shutil.rmtree(store.parent / "backup/rollbacks")
    assert explain(backup, 4, newest) == "foreign", "the store is older than what the silo holds"


def test_back_to_the_initial_state(run: RunConfig, store: Path) -> None:
    roll_back(opened(store), run.outer.num_fragments, to=0)
    aggregator, state = start(elsewhere(run, store))
    assert state.version == 0
    advance(elsewhere(run, store), aggregator, state)
    assert files(store)["global/000001/commit.json"] == files(Path(run.store_url))["global/000001/commit.json"]


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_object_stores_come_to_the_same(run: RunConfig, store: Path, kind: str, request: pytest.FixtureRequest) -> None:
    """They have no folders: one is gone with the last object in it."""
    url = f"{request.getfixturevalue('s3_url') if kind == 's3' else 'memory:/'}/{uuid.uuid4().hex}"
    exchange = StoreExchange(url)
    for name, data in files(store).items():
        exchange.objects.write(name, data)
    roll_back(opened(store), run.outer.num_fragments, to=0)
    assert exchange.read_contract()
    roll_back(exchange, run.outer.num_fragments, to=0)
    filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    found = {path.removeprefix(f"{root}/"): filesystem.cat_file(path) for path in filesystem.find(root)}
    assert found == files(store)


# ---- interrupted


class Interrupted(BaseException):
    """Ends a rollback as a kill does."""


class Failing:
    """Objects whose n-th use is the last."""

    def __init__(self, objects: Objects, num_uses: int) -> None:
        self._objects, self._left = objects, num_uses

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._objects, name)

        def use(*arguments: Any, **named: Any) -> Any:
            if not self._left:
                raise Interrupted
            self._left -= 1
            return verb(*arguments, **named)

        return use if callable(verb) else verb


def interrupted(store: Path, num_uses: int, action: Callable[[StoreExchange], object]) -> bool:
    """Whether the action was ended before the use of an object that comes after `num_uses` others."""
    exchange = opened(store)
    exchange.objects = Failing(exchange.objects, num_uses)  # type: ignore[assignment]
    try:
        action(exchange)
    except Interrupted:
        return True
    return False


def assert_committed_versions_are_whole(found: Files, whole: Files) -> None:
    """Also deliveries: whoever names a payload has it, as before."""
    for name in found:
        if name.endswith(("commit.json", "manifest.json")) and not name.startswith("rolled-back"):
            record = json.loads(found[name])
            for payload in record["payloads"]:
                payload_name = f"{name.rsplit('/', 1)[0]}/{payload['file']}"
                assert found[payload_name] == whole[payload_name]
    versions = {int(name.split("/")[1]) for name in found if name.startswith("global/") and "commit" in name}
    assert versions == set(range(len(versions))), "a chain without gaps"


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.soak)])
def test_interrupted_anywhere_it_comes_to_the_same_store(
    run: RunConfig, store: Path, tmp_path: Path, stride: int
) -> None:
    """At every use of an object, or at every seventh."""

    def action(exchange: StoreExchange) -> None:
        roll_back(exchange, run.outer.num_fragments, to=2, reason="why")

    before = files(store)
    shutil.copytree(store, tmp_path / "undisturbed")
    action(opened(tmp_path / "undisturbed"))
    undisturbed = files(tmp_path / "undisturbed")
    num_uses, num_begun = 0, 0
    while True:
        copy = shutil.copytree(store, tmp_path / "copy", copy_function=os.link)  # nothing is written in place
        was_interrupted = interrupted(copy, num_uses, action)
        found = files(copy)
        assert_committed_versions_are_whole(found, before)
        has_begun = "rollbacks/000001.json" in found
        assert has_begun or found == before
        assert is_rolling_back(opened(copy)) == (has_begun and was_interrupted)
        if has_begun and was_interrupted:
            num_begun += 1
            assert explain(opened(copy), 4, sha256_bytes(before["global/000004/commit.json"])) == "rolled back"
        # Interrupted twice, at various places.
        interrupted(copy, num_uses * 7 % 31, finish_rollbacks)
        assert_committed_versions_are_whole(files(copy), before)
        finish_rollbacks(opened(copy))
        assert files(copy) == (undisturbed if has_begun else before)
        assert finish_rollbacks(opened(copy)) == []
        shutil.rmtree(copy)
        if not was_interrupted:
            break
        num_uses += stride
    assert num_begun * stride > 60


def test_the_same_command_again_completes_it(run: RunConfig, store: Path, capsys: Any) -> None:
    num_fragments = run.outer.num_fragments
    assert interrupted(store, 100, lambda exchange: roll_back(exchange, num_fragments, to=2, reason="why"))
    print_status(str(store))
    words = "rolled back from 5 to 2: why (interrupted; the aggregator completes it when it starts)"
    assert words in capsys.readouterr().out
    record = roll_back(opened(store), num_fragments, to=2, reason="why")
    assert (record.from_version, record.to_version) == (NEWEST, 2)
    assert opened(store).newest_version() == 2
    assert not (store / "rollbacks/000002.json").exists()


# ---- refused


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """stdout of the real command, or its one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["atoll", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert ended.value.code == (2 if captured.err else 0)
    assert captured.err.count("\n") == bool(captured.err)
    return captured.err or captured.out


WITHOUT = {
    1: "it goes on from version 3 by the ledger, with a fresh inner optimizer",
    2: "it cannot go on (fragments in turn or overlap, and no quorum)",
}


def test_nobody_to_ask(run: RunConfig, store: Path, monkeypatch: Any, capsys: Any) -> None:
    before = files(store)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert command(["rollback", str(store), "--to", "4"], monkeypatch, capsys) == (
        "atoll: --yes: not given, and there is no terminal to ask at; nothing is changed: version 5 is discarded for "
        "ever, and what 7 tokens of all silos have taught them; silo alpha has a checkpoint of version 5: if it has "
        f"none of 4 or older, {WITHOUT[run.outer.num_fragments].replace('version 3', 'version 4')}\n"
    )
    assert files(store) == before


@pytest.mark.parametrize("answer", ["y", "n"])
def test_the_question_on_a_terminal(run: RunConfig, store: Path, answer: str) -> None:
    before = files(store)
    ours, theirs = os.openpty()
    os.write(ours, f"{answer}\n".encode())
    arguments = [sys.executable, "-m", "launch.cli", "rollback", str(store), "--to", "4"]
    ended = subprocess.run(arguments, stdin=theirs, capture_output=True, text=True, check=False, timeout=120)
    os.close(ours)
    os.close(theirs)
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("version 5 is discarded for ever")
    assert lines[1].startswith("silo alpha has a checkpoint of version 5")
    if answer == "y":
        assert (ended.returncode, lines[2:]) == (0, ["Roll back to version 4? [y/N]: rolled back from version 5 to 4"])
        assert opened(store).newest_version() == 4
    else:
        assert (ended.returncode, lines[2:]) == (1, ["Roll back to version 4? [y/N]: nothing is changed"])
        assert files(store) == before


def test_an_interrupted_one_is_completed_without_a_question(
    run: RunConfig, store: Path, monkeypatch: Any, capsys: Any
) -> None:
    assert interrupted(store, 100, lambda exchange: roll_back(exchange, run.outer.num_fragments, to=2))
    assert command(["rollback", str(store), "--to", "2"], monkeypatch, capsys).endswith(" 5 to 2\n")
    assert opened(store).newest_version() == 2


def test_the_command_and_the_status_after_it(run: RunConfig, store: Path, monkeypatch: Any, capsys: Any) -> None:
    where = str(store.parent)
    shown = command(["rollback", where, "--to", "3", "--reason", "bad text", "--yes"], monkeypatch, capsys)
    tokens = 2 * (3 + 4)
    lines = [
        f"versions 4 to 5 are discarded for ever, and what {tokens} tokens of all silos have taught them",
        "silo alpha has a checkpoint of version 5: if it has none of 3 or older, " + WITHOUT[run.outer.num_fragments],
        "rolled back from version 5 to 3",
    ]
    assert shown.splitlines() == lines
    again = command(["rollback", str(store), "--to", "2", "--yes"], monkeypatch, capsys).splitlines()
    without = WITHOUT[run.outer.num_fragments].replace("version 3", "version 2")
    assert again[0] == "version 3 is discarded for ever, and what 7 tokens of all silos have taught them"
    assert again[1] == f"silo alpha has no checkpoint that is known here: if it has none of 2 or older, {without}"
    assert again[2:] == ["rolled back from version 3 to 2"]
    lines = [line.rstrip() for line in command(["status", where], monkeypatch, capsys).splitlines()]
    assert lines[1:3] == ["rolled back from 5 to 3: bad text", "rolled back from 3 to 2"]
    assert (store / "aggregator/000002.ended").is_file(), "nobody holds the store any more"


@pytest.mark.parametrize("to", [-1, NEWEST, NEWEST + 1, 99])
def test_not_an_earlier_version(run: RunConfig, store: Path, to: int) -> None:
    message = one_line_error(roll_back_store, StoreExchange(str(store)), to=to)
    assert message == f"--to: {to} given; allowed: 0 to 4, what is kept before the newest version (5)"
    assert opened(store).newest_version() == NEWEST


def test_a_version_whose_tensors_were_pruned(run: RunConfig, store: Path) -> None:
    num_fragments, exchange = run.outer.num_fragments, opened(store)
    History(exchange, num_fragments).prune([], NEWEST, 2)
    before = files(store)
    message = one_line_error(roll_back, exchange, num_fragments, to=3)
    assert message == "--to: 3 given; allowed: 4, what is kept before the newest version (5)"
    assert files(store) == before
    further = opened(shutil.copytree(store, store.parent / "further"))
    History(further, num_fragments).prune([], NEWEST, 1)
    if num_fragments == 2:
        message = one_line_error(roll_back, further, num_fragments, to=4)
        assert message == "--to: 4 given; allowed: none, as no version before the newest (5) is kept"
    else:
        roll_back(further, num_fragments, to=4)  # a snapshot, of which 5 was made
    roll_back(exchange, num_fragments, to=4)
    assert start(elsewhere(run, store))[1].version == 4


def test_what_is_damaged_is_found_before_anything_is_discarded(run: RunConfig, store: Path) -> None:
    before = files(store)
    tensors = next((store / "global/000002").glob("velocity-*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    message = one_line_error(roll_back_store, StoreExchange(str(store)), to=2)
    assert message.startswith(f"store: '{store}' given; it cannot be rolled back: global/000002/velocity-00")
    assert message.endswith(": corrupted")
    after = {name: data for name, data in files(store).items() if not name.startswith("aggregator/")}
    assert {name for name in before | after if before.get(name) != after.get(name)} == {str(tensors.relative_to(store))}
    tensors.write_bytes(b"")
    with pytest.raises(RefusedError, match=r"^global/000002/velocity-00\d\.safetensors is truncated: it has not the "):
        roll_back(opened(store), run.outer.num_fragments, to=2)


def test_a_commit_that_is_damaged_is_a_reason_to_roll_back(run: RunConfig, store: Path) -> None:
    (store / "global/000004/commit.json").write_bytes(b"{")
    (store / "global/000003/commit.json").unlink()
    message = one_line_error(roll_back, opened(store), run.outer.num_fragments, to=3)
    assert message == "--to: 3 given; allowed: 0 to 2, what is kept before the newest version (5)"
    record = roll_back(opened(store), run.outer.num_fragments, to=2)
    assert record.discarded[0] == sha256_bytes(b"{")
    assert len(record.discarded) == 2
    assert start(elsewhere(run, store))[1].version == 2


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("000001.json", b"{", r"rollbacks/000001\.json: not JSON: .*"),
        ("000003.json", None, r"rollbacks/000003\.json does not follow the rollback before it"),
        ("000002.json", None, r"rollbacks/000002\.json does not follow the rollback before it"),
        ("000001.done", None, "rollback 1 goes to another version 2 than the one here"),
    ],
)
def test_records_that_do_not_fit(run: RunConfig, store: Path, name: str, content: bytes | None, expected: str) -> None:
    exchange = opened(store)
    roll_back(exchange, run.outer.num_fragments, to=2)
    folder = store / "rollbacks"
    if name.endswith(".done"):
        (folder / name).unlink()
        (store / "global/000002/commit.json").write_bytes(b"another")
    else:
        (folder / name).write_bytes(content or (folder / "000001.json").read_bytes())
    with pytest.raises(RefusedError, match=f"^{expected}$"):
        finish_rollbacks(exchange)
    assert not (store / "rolled-back/000001/global/000002").exists()


def test_an_aggregator_at_work_is_named(store: Path) -> None:
    code = (
        "import sys; from pretrain.exchange.lease import Lease; from pretrain.exchange.store import StoreExchange; "
        "lease = Lease(StoreExchange(sys.argv[1]), seconds=1.0); print('holds', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "holds\n"
        message = one_line_error(roll_back_store, StoreExchange(str(store)), to=2)
        holder.communicate("\n")
    assert f", process {holder.pid} works on this store; stop it first" in message
    assert opened(store).newest_version() == NEWEST


def test_what_is_no_store_of_a_run(run: RunConfig, store: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def refused(where: Path) -> str:
        before = files(tmp_path)
        message = command(["rollback", str(where), "--to", "2"], monkeypatch, capsys)
        assert files(tmp_path) == before
        return message

    nowhere = tmp_path / "nowhere"
    assert refused(nowhere) == f"atoll: store: '{nowhere}' given; there is no run in it (no contract.json)\n"
    collective = "only a run whose kind is 'store' can be rolled back\n"
    ledger = tmp_path / "other/silos/alpha/ledger"
    shutil.copytree(store, ledger, ignore=shutil.ignore_patterns("silos"))
    assert refused(ledger) == f"atoll: exchange.kind: 'collective' given in {ledger}; {collective}"
    whole = tmp_path / "other"
    assert refused(whole) == f"atoll: exchange.kind: 'collective' given in {whole}; {collective}"
    for content in ("{}", "[]", "{"):
        (store / "contract.json").write_text(content)
        assert refused(store) == f"atoll: store: '{store}' given; its contract.json has no outer.num_fragments\n"
