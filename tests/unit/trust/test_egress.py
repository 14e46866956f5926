"""The egress ledger: nothing leaves without a line, and no line can be changed or taken out unseen."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.egress import totals
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.agreement import sign_contract
from pretrain.exchange.client import StopWaitingError
from pretrain.exchange.objects import Objects
from pretrain.federation.egress import Checked, check_ledgers, ledgers
from pretrain.federation.relay import Relay
from pretrain.trust.egress import DAY_SECONDS, Egress, Line, egress_file, kind_of, read_lines, to_peers, tracked
from pretrain.trust.ledger import sha256_bytes
from pretrain.trust.members import with_keys
from pretrain.trust.policy import Policy
from tests.conftest import TinyConfig
from tests.support import fill, mounted, one_line_error
from tests.unit.test_aggregate import one_version
from tests.unit.test_signed import as_member, begin, deliver


def lines(file: Path) -> list[Line]:
    found = [line for line, _ in read_lines(file)]
    assert None not in found
    return [line for line in found if line]


def objects_of(tmp_path: Path, policy: Policy | None = None, name: str = "law") -> tuple[Objects, Path]:
    file = egress_file(tmp_path, name)
    objects = Objects(str(tmp_path / "store"))
    objects.told_to(Egress(file=file, policy=policy or Policy()))
    return objects, file


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("silos/law/000017/000017.safetensors", "payload"),
        ("silos/law/000017/manifest.json", "manifest"),
        ("silos/law/000017/refused-0.json", "word"),
        ("silos/law/beats/000003", "beat"),
        ("silos/law/resumable/000003", "mark"),
        ("silos/law/identity.json", "claim"),
        ("silos/law/membership/000000.json", "word"),
        ("silos/law/evaluations/000003.json", "evaluation"),
        ("global/000017/change-000.safetensors", "payload"),
        ("global/000017/commit.json", "commit"),
        ("aggregator/000001.beat-000001", "beat"),
        ("aggregator/000001.json", "lease"),
        ("contract.json", "contract"),
        ("something/new", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_line_is_there_before_the_bytes(tmp_path: Path) -> None:
    objects, file = objects_of(tmp_path)
    file.mkdir(parents=True)  # no line can be written
    said = one_line_error(objects.write, "silos/law/identity.json", b"{}\n")
    assert said == (
        f"run directory: '{file}' cannot be written: Is a directory; silos/law/identity.json was not sent, as nothing "
        "leaves without a line"
    )
    assert not (tmp_path / "store").exists()
    file.rmdir()
    payload = tmp_path / "payload"
    payload.write_bytes(b"x" * 3_000_000)
    objects.write("silos/law/identity.json", b"{}\n")
    objects.upload(payload, "silos/law/000002/000002.safetensors", of={"version": 2, "tokens": 7})
    claim, sent = lines(file)
    assert (claim.kind, claim.num_bytes, claim.where) == ("claim", 3, str(tmp_path / "store"))
    assert (sent.kind, sent.num_bytes, sent.of) == ("payload", 3_000_000, {"version": 2, "tokens": 7})
    assert objects.download(sent.name, tmp_path / "back", limit_bytes=1 << 30) == (sent.blake3, sent.num_bytes)
    with pytest.raises(FileExistsError):
        objects.write("silos/law/identity.json", b"other\n")  # on the way to a bucket it would have left
    assert len(lines(file)) == 3


def test_several_writers_make_one_chain(tmp_path: Path) -> None:
    """Instances in threads, as an aggregator and its lease have."""
    writers = [objects_of(tmp_path)[0] for _ in range(4)]

    def write(number: int) -> None:
        for i in range(20):
            writers[number].write(f"damaged/000001/w{number}-{i}", b"{}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    file = egress_file(tmp_path, "law")
    assert len(lines(file)) == 80
    assert not check_ledgers([file], None).findings


def test_a_torn_line_is_taken_away_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    objects, file = objects_of(tmp_path)
    objects.write("damaged/000001/a", b"1")
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:100])
    again, _ = objects_of(tmp_path)
    again.write("damaged/000001/b", b"2")
    assert [line.name[-1] for line in lines(file)] == ["a", "b"]
    assert lines(file)[1].previous == sha256_bytes(whole)
    assert not check_ledgers([file], None).findings
    file.write_bytes(file.read_bytes() + bytes(200) + b"\n")
    said = one_line_error(objects_of(tmp_path)[0].write, "damaged/000001/c", b"3")
    assert said.startswith(f"run directory: '{file}', the record of what has left, is damaged: its last line is none: ")
    assert not (tmp_path / "store" / "damaged" / "000001" / "c").exists()


def write_many(objects: Objects) -> None:
    for number in range(100):
        objects.write(f"damaged/000002/{number:03d}", b"2")


def test_a_full_disk_lets_nothing_out(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", num_bytes=1 << 16) as small:
        objects, file = Objects(str(tmp_path / "store")), egress_file(small, "law")
        objects.told_to(Egress(file=file))
        objects.write("damaged/000001/a", b"1")
        filler = fill(small)
        said = one_line_error(write_many, objects)  # some find room in the file's last page
        number = len(list((tmp_path / "store/damaged/000002").glob("*")))
        assert f"cannot be written: No space left on device; damaged/000002/{number:03d} was not sent" in said
        assert len(lines(file)) == number + 1
        filler.unlink()
        objects.write(f"damaged/000002/{number:03d}", b"2")
        assert len(lines(file)) == number + 2
        assert not check_ledgers([file], None).findings


# ---- bytes a day


def send(objects: Objects, tmp_path: Path, version: int, num_bytes: int) -> None:
    file = tmp_path / "payload"
    file.write_bytes(bytes(num_bytes))
    objects.upload(file, f"silos/law/{version:06d}/{version:06d}.safetensors")


def test_payloads_beyond_a_days_bytes_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = Policy(bytes_a_day=1000, file="p.yaml", sha256="5" * 64)
    objects, file = objects_of(tmp_path, policy)
    send(objects, tmp_path, 1, 600)
    again, _ = objects_of(tmp_path, policy)  # a restart forgets nothing
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(send, again, tmp_path, 2, 500)
        time.sleep(0.2)
        again.write("silos/law/beats/000001", b"{}")  # words do not wait
        assert not waiting.done()
        again._closing.set()
        with pytest.raises(StopWaitingError):
            waiting.result(10)
    assert "silos/law/000002/000002.safetensors waits " in capsys.readouterr().out
    assert [line.kind for line in lines(file)] == ["payload", "beat"]
    assert lines(file)[0].rule == f"{policy.sha256}: bytes_a_day"
    send(objects_of(tmp_path, policy)[0], tmp_path, 3, 398)  # with the beat's two bytes all that is left


def test_yesterdays_bytes_do_not_count(tmp_path: Path) -> None:
    policy = Policy(bytes_a_day=1000, file="p.yaml")
    objects, file = objects_of(tmp_path, policy)
    send(objects, tmp_path, 1, 900)
    (line,) = lines(file)
    file.write_bytes(dataclasses.replace(line, time=line.time - DAY_SECONDS).to_bytes())
    send(objects_of(tmp_path, policy)[0], tmp_path, 2, 900)
    said = one_line_error(send, objects_of(tmp_path, policy)[0], tmp_path, 3, 1001)
    assert said.startswith("trust.policy: p.yaml given; its bytes_a_day is 1000, and a payload has 1001: it was not")


def test_a_clock_that_was_put_back_gives_no_days_bytes_once_more(tmp_path: Path, tiny_config: TinyConfig) -> None:
    policy = Policy(bytes_a_day=1000, file="p.yaml")
    objects, file = objects_of(tmp_path, policy)
    send(objects, tmp_path, 1, 900)
    (line,) = lines(file)
    file.write_bytes(dataclasses.replace(line, time=line.time + DAY_SECONDS / 2).to_bytes())  # by some hours
    assert objects_of(tmp_path, policy)[0]._egress.leaves("s", "silos/law/2/2.safetensors", 900, "") > 0  # type: ignore[union-attr]
    config = tiny_config(tmp_path)
    for years, year in ((100, 2126), (1e30, "a time beyond all calendars")):
        file = egress_file(config.directory, "alpha")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(dataclasses.replace(line, time=line.time + years * 365.2425 * DAY_SECONDS).to_bytes())
        said = one_line_error(Egress.of_run, config, "alpha", None, policy)
        assert said.startswith("trust.policy: p.yaml given; its bytes_a_day needs the day, and by this machine's clock")
        assert f"has a line of {year}" in said
        Egress.of_run(config, "alpha", None, Policy())  # nobody asks for the day
        assert totals(file)["day"]


def test_requests_without_an_object_are_counted(tmp_path: Path) -> None:
    objects = Objects(f"memory://{tmp_path.name}/run")
    file = egress_file(tmp_path, "law")
    objects.told_to(Egress(file=file))
    for _ in range(3):
        objects.names("global")
    objects.write("silos/law/000001/manifest.json", b"{}")
    objects.delete("silos/law/000001/manifest.json")
    objects.close_egress()
    counted = [line.of for line in lines(file) if line.kind == "requests"]
    assert counted[0] == {"ls": 3}
    assert counted[1] == {"pipe_file": 1, "rm_file": 1}


# ---- a signed federation, checked


@pytest.fixture
def run(tiny_config: TinyConfig, tmp_path: Path) -> RunConfig:
    """One version of two silos; what alpha wrote went through its ledger."""
    config = with_keys(tiny_config(tmp_path, exchange={"snapshot_versions": 1}, trust={"directory": ""}), make=True)
    aggregator, state = begin(config)
    for silo in config.full_roster:
        deliver(config, state, silo)
    exchange = as_member(config, "alpha")
    exchange.speak_as(config, "alpha")
    exchange.claim_name("alpha", "x")
    manifest_file = Path(config.store_url) / "silos/alpha/000001/manifest.json"
    manifest = manifest_file.read_bytes()
    exchange.objects.delete("silos/alpha/000001/manifest.json")
    exchange.objects.write("silos/alpha/000001/manifest.json", manifest)
    for file in manifest_file.parent.glob("*.safetensors"):
        copy = Path(config.directory) / file.name
        file.rename(copy)
        exchange.objects.upload(copy, f"silos/alpha/000001/{file.name}")
    exchange.objects.delete("signatures/alpha.json")
    sign_contract(exchange, "alpha")
    exchange.objects.close_egress()
    one_version(aggregator, state)
    aggregator.stop()
    save_config(config, Path(config.directory) / "config.yaml")
    return config


def changed(change: Callable[[list[bytes]], list[bytes]], file: Path) -> None:
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))


def verdict(config: RunConfig) -> tuple[int, list[str]]:
    found = CliRunner().invoke(app, ["egress", "verify", config.directory, "--json"])
    return found.exit_code, [finding["what"] for finding in json.loads(found.stdout)["findings"]]


def test_a_whole_ledger_and_what_is_wrong_with_others(run: RunConfig) -> None:
    assert verdict(run) == (0, [])
    files, _ = ledgers(Path(run.directory))
    assert [file.stem for file in files] == [OPERATOR, "alpha"]
    file = files[1]
    before = file.read_bytes()
    numbers = [line.kind for line in lines(file)]
    for change, what in (
        (lambda rows: [rows[0], *rows[2:]], "line 2: it does not follow the line before"),
        (lambda rows: [rows[0].replace(b'"num_bytes":', b'"num_bytes":1'), *rows[1:]], "line 2: it does not follow"),
        (
            lambda rows: [*rows[:-1], rows[-1].replace(b'"kind":"requests"', b'"kind":"word"')],
            "signature of the egress",
        ),
        (lambda rows: [b"{}\n", *rows], "line 1: no line of a ledger"),
    ):
        changed(change, file)
        code, found = verdict(run)
        assert code == 1
        assert any(what in one for one in found), (what, found)
        file.write_bytes(before)
    assert "manifest" in numbers
    assert "payload" in numbers


def test_what_lies_in_the_store_in_our_name(run: RunConfig) -> None:
    store = Path(run.store_url)
    manifest = store / "silos/alpha/000001/manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole + b" ")
    assert verdict(run) == (1, ["silos/alpha/000001/manifest.json in the store has other bytes than those that left"])
    manifest.write_bytes(whole)
    (store / "silos/alpha/000009").mkdir()
    (store / "silos/alpha/000009/manifest.json").write_bytes(whole)
    assert verdict(run) == (1, ["silos/alpha/000009/manifest.json is in the store, and no line says that it left"])
    (store / "silos/alpha/000009/manifest.json").unlink()
    commit = store / "global/000000/commit.json"
    moved = store / "rolled-back/000001/global/000000"
    moved.mkdir(parents=True)
    assert verdict(run)[0] == 0
    before = commit.read_bytes()
    commit.unlink()
    assert verdict(run) == (1, ["global/000000/commit.json left, and is not in the store any more"])
    (moved / "commit.json").write_bytes(before)  # a rollback has done it
    assert verdict(run)[0] == 0
    commit.write_bytes(before)
    assert verdict(run)[0] == 0
    (store / "global/000001/commit.json").write_bytes(b"{}")
    assert verdict(run) == (1, ["global/000001/commit.json in the store has other bytes than those that left"])


def test_show(run: RunConfig) -> None:
    found = CliRunner().invoke(app, ["egress", "show", run.directory, "--json"])
    alpha = json.loads(found.stdout)["alpha"]
    size = sum(file.stat().st_size for file in (Path(run.store_url) / "silos/alpha").rglob("*.*"))
    assert alpha["kind"]["manifest"][0] == 1
    assert alpha["bytes"] == size + alpha["kind"]["agreement"][1]
    assert alpha["rules"] == ["no policy"]
    assert "no policy" in CliRunner().invoke(app, ["egress", "show", run.directory]).stdout
    missing = CliRunner().invoke(app, ["egress", "show", str(Path(run.directory) / "nowhere")])
    assert "ledger: " in str(missing.exception)


def test_no_policy_speaks_for_the_aggregator(run: RunConfig) -> None:
    assert {line.rule for line in lines(egress_file(run.directory, OPERATOR))} == {"no policy"}


# ---- what goes elsewhere


def signed_lines(file: Path) -> list[str]:
    return [f"{line.kind} {line.name}".strip() for line in lines(file) if line.signature]


def checked(config: RunConfig, name: str) -> Checked:
    return check_ledgers([egress_file(config.directory, name)], config)


def test_a_collectives_rounds_are_one_signed_line_each(tiny_config: TinyConfig, tmp_path: Path) -> None:
    collective = {"kind": "collective", "url": "tcp://localhost:1"}
    config = with_keys(tiny_config(tmp_path, exchange=collective, trust={"directory": ""}), make=True)
    tells = to_peers(config, "alpha")
    for what in ("facts", "lane", "1/manifest", "lane", "1/outcome", "lane", "2/manifest", "lane", "lane"):
        for peer in ("beta", "gamma"):
            tells(peer, what, 1000 if what == "lane" else what.encode())
    tells.close()
    tells.close()
    file = egress_file(tmp_path / "run", "alpha")
    assert signed_lines(file) == ["collective 1/manifest", "collective 2/manifest", "requests"]
    assert [line.of.get("version") for line in lines(file)] == [None] * 4 + [1.0] * 8 + [2.0] * 6 + [None]
    found = checked(config, "alpha")
    assert (found.findings, found.num_signed, found.num_unsigned_at_end) == ([], 3, 0)
    changed(lambda rows: [row.replace(b'"num_bytes":1000', b'"num_bytes":1001') for row in rows], file)
    assert checked(config, "alpha").findings


def test_what_a_tracker_was_handed_is_signed_at_the_end(run: RunConfig) -> None:
    tells = tracked(run, "alpha", Policy())
    tells.close()  # nothing was said
    before = len(lines(egress_file(run.directory, "alpha")))
    tells("wandb", "init", {"project": "atoll"})
    tells("wandb", "step", {"loss": 1.5})
    assert checked(run, "alpha").num_unsigned_at_end == 2
    tells.close()
    assert (verdict(run), checked(run, "alpha").num_unsigned_at_end) == ((0, []), 0)
    assert len(lines(egress_file(run.directory, "alpha"))) == before + 3


def test_a_relay_signs_with_a_key_of_its_site(run: RunConfig, tmp_path: Path, said: Callable[[], str]) -> None:
    here = dataclasses.replace(
        run,
        directory=str(tmp_path / "site"),
        roster=run.full_roster,
        silos={"beta": run.silos["beta"]},
        exchange=dataclasses.replace(run.exchange, url=str(tmp_path / "site" / "store")),
        trust=dataclasses.replace(run.trust, directory=f"{run.directory}/keys"),
    )
    for is_there in (True, False):
        shutil.rmtree(Path(run.store_url) / "silos/beta", ignore_errors=True)
        trust = here.trust if is_there else dataclasses.replace(here.trust, directory=str(tmp_path / "none"))
        relay = Relay(dataclasses.replace(here, trust=trust), run.store_url)
        relay._there.objects.write(f"silos/beta/{8 + is_there:06d}/manifest.json", b"{}")
        relay._there.objects.write(f"damaged/{8 + is_there:06d}/beta", b"{}")
        relay.close()
        signed = ["manifest silos/beta/000009/manifest.json", "requests"] if is_there else []
        file = egress_file(here.directory, "relay")
        assert signed_lines(file) == signed
        found = checked(here, "relay")
        assert (found.findings, found.num_signed) == ([], len(signed))
        if is_there:
            changed(lambda rows: [row.replace(b'"num_bytes":2', b'"num_bytes":3') for row in rows], file)
            assert "signature of the egress" in checked(here, "relay").findings[0].what
        file.unlink()
    assert "egress/relay.jsonl is not signed: no key of beta is on this machine\n" in said()
