"""The relay between a directory and the federation's store: what it copies, in which order, and killed at any write."""

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.exchange.gated import Gated, judged_path
from pretrain.exchange.history import History
from pretrain.exchange.objects import Objects
from pretrain.exchange.rollback import explain, finish_rollbacks, is_rolling_back, roll_back
from pretrain.exchange.store import Refusal, StoreExchange
from pretrain.exchange.words import Evaluation
from pretrain.federation.relay import Relay
from pretrain.trust.contract import build_contract, contract_bytes
from pretrain.trust.ledger import sha256_bytes
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.exchange.test_history import publish_fragment, snapshot
from tests.unit.exchange.test_store import deliver, publish
from tests.waiting import PATIENCE_SECONDS, wait_for

Files = dict[str, bytes]
EVALUATION = Evaluation(version=2, parameters_digest="0" * 64, losses={"law": 2.5}, sequences={"law": 8})


class Site:
    """A run of alpha and beta, of which alpha is here; `here` and `there` are directories."""

    def __init__(self, directory: Path, tiny_config: TinyConfig, **changes: Any) -> None:
        self._lie_in(directory)
        exchange = {"url": self.here.objects.url, "poll_seconds": 0.05}
        usual: dict[str, Any] = {"silos": {"beta": None}, "roster": ["alpha", "beta"]}
        self.config = tiny_config(directory, exchange=exchange, **(usual | changes))
        self.there.write_contract(contract_bytes(build_contract(self.config)))

    def _lie_in(self, directory: Path) -> None:
        self.directory, self.scratch = directory, directory / "scratch"
        self.here, self.there = (StoreExchange(str(directory / name)) for name in ("here", "there"))

    def copied(self, directory: Path) -> "Site":
        """The same, to try something out."""
        site = copy.copy(self)
        site._lie_in(directory)
        for mine, its in ((self.here, site.here), (self.there, site.there)):
            shutil.copytree(mine.objects.url, its.objects.url)
        exchange = dataclasses.replace(self.config.exchange, url=site.here.objects.url)
        site.config = dataclasses.replace(self.config, directory=str(directory / "run"), exchange=exchange)
        return site

    def relay(self) -> Relay:
        relay = Relay(self.config, self.there.objects.url)
        relay.start()
        return relay


@pytest.fixture
def site(tmp_path: Path, tiny_config: TinyConfig) -> Site:
    return Site(tmp_path, tiny_config)


def files(exchange: StoreExchange) -> Files:
    root = Path(exchange.objects.url)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def tensors_of(exchange: StoreExchange, version: int) -> list[str]:
    return [name for name in exchange.objects.names(f"global/{version:06d}") if name != "commit.json"]


# ---- what is copied


def test_versions_come_and_deliveries_go(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relay, here, there = site.relay(), site.here, site.there
    for version in range(3):
        publish_fragment(there, version, "int4", tmp_path)
        deliver(there, "beta", version + 1, b"of another site", tmp_path)
        there.say_waiting(version + 1, ["alpha"], deadline_seconds=None)
    there.objects.write("aggregator/000001.json", b"{}\n")
    relay.copy()
    expected = {f"global/{version:06d}/commit.json" for version in range(3)} | {"contract.json"}
    expected |= {f"global/000000/parameter-00{fragment}.safetensors" for fragment in range(3)}
    expected |= {f"global/00000{version}/change-00{version}.safetensors" for version in (1, 2)}
    expected |= {f"snapshots/00000{version}.json" for version in (1, 2)}  # what they are of stays there
    assert files(here) == {name: data for name, data in files(there).items() if name in expected}

    here.claim_name("alpha", "identity")
    here.mark_resumable("alpha", 2)
    here.objects.write("silos/alpha/000003/000003.safetensors", b"not whole yet")
    before = files(there)
    relay.copy()
    assert there.delivery("alpha", 3) is None
    deliver(here, "alpha", 3, b"whole", tmp_path)
    here.mark_resumable("alpha", 3)
    here.tell_evaluation("alpha", EVALUATION)
    relay.copy()
    sent = {name: data for name, data in files(here).items() if name.startswith("silos/")}
    assert {name.removeprefix("silos/alpha/") for name in sent} == {
        "identity.json",
        "resumable/000003",
        "evaluations/000000.json",
        "000003/000003.safetensors",
        "000003/manifest.json",
    }
    assert files(there) == before | sent
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said] == [
        *(f"version {version}: came" for version in range(3)),
        "version 3: the delivery of silo alpha went",
    ]


def test_what_a_version_between_snapshots_is_made_of_comes_after_a_rollback(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    """Also what was pruned here, as this site's silo needed it no longer."""
    site = Site(tmp_path, tiny_config, outer={"num_fragments": 3})
    for version in range(9):
        publish_fragment(site.there, version, "int4", tmp_path, every=2)
    relay, history = site.relay(), History(site.here, 3)
    site.here.claim_name("alpha", "identity")
    site.here.mark_resumable("alpha", 8)
    relay.copy()
    assert site.here.read_contract()
    assert [version for version in range(9) if tensors_of(site.here, version)] == [4, 5, 6, 7, 8]
    assert not history.has_parameters(8)  # silos of a fixed roster read changes alone
    roll_back(site.there, 3, to=5)
    relay.copy()
    assert site.here.newest_version() == 5
    assert history.has_parameters(5)
    made = [(version, codec) for fragment in range(3) for version, _, codec in history.parameters(5, fragment)]
    assert made == [(0, ""), (3, "int4"), (4, ""), (5, "")]


@pytest.mark.parametrize("why", ["quorum", "rollback"])
def test_whole_parameters_come_where_a_silo_may_need_them(why: str, tmp_path: Path, tiny_config: TinyConfig) -> None:
    rules: dict[str, Any] = {"membership": {"quorum": 1}} if why == "quorum" else {}
    site = Site(tmp_path, tiny_config, outer={"num_fragments": 3}, **rules)
    for version in range(3):
        publish_fragment(site.there, version, "int4", tmp_path)
    relay = site.relay()
    relay.copy()
    whole, coded = ["change-001.safetensors", "parameter-001.safetensors"], ["change-001.safetensors"]
    assert tensors_of(site.here, 1) == (whole if why == "quorum" else coded)
    if why == "rollback":
        roll_back(site.there, 3, to=1)
        relay.copy()
        assert tensors_of(site.here, 1) == whole
        assert tensors_of(site.here, 2) == []


def test_signs_of_life_and_words(tmp_path: Path, tiny_config: TinyConfig) -> None:
    site = Site(tmp_path, tiny_config, membership={"quorum": 1})
    relay, here, there = site.relay(), site.here, site.there
    here.claim_name("alpha", "identity")
    for number in (7, 8):
        here.objects.write(f"silos/alpha/beats/{number:06d}", b"{}\n")
        relay.copy_beats()
        assert there.objects.names("silos/alpha/beats") == [f"{number:06d}"]
        here.objects.delete(f"silos/alpha/beats/{number:06d}")
    relay.copy_beats()
    assert there.objects.names("silos/alpha/beats") == []
    here.announce("alpha", left=False, version=0)
    relay.copy()
    there.announce("alpha", left=True, version=1)  # as `atoll leave` does, elsewhere
    relay.copy()
    here.announce("alpha", left=False, version=2)
    relay.copy()
    words = here.objects.names("silos/alpha/membership")
    assert words == there.objects.names("silos/alpha/membership") == ["000000.json", "000001.json", "000002.json"]
    assert there.membership("alpha") == here.membership("alpha")


def test_results_for_the_gate_go(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Each once."""
    gate = {"every_versions": 2, "max_worst": 9.0, "data": {"alpha/law": "a" * 64, "beta/law": "b" * 64}}
    site = Site(tmp_path, tiny_config, gate=gate)
    relay, here, there = site.relay(), site.here, site.there
    here.claim_name("alpha", "identity")
    for version in range(3):
        publish(there, version, tmp_path)
    relay.copy()
    results = {judged_path("alpha", version) for version in (0, 2)}
    for version in (0, 2):
        Gated(here, site.config.gate).tell("alpha", dataclasses.replace(EVALUATION, version=version))
        relay.copy()
    assert {name for name in files(there) if name.endswith("judged.json")} == results
    for name in results:
        assert there.objects.read(name) == here.objects.read(name)
    before = files(there)
    relay.copy()
    site.relay().copy()
    assert files(there) == before
    there.objects.delete(judged_path("alpha", 2))
    relay.copy()
    assert judged_path("alpha", 2) not in files(there)  # what was handed on is not looked for again


def test_what_comes_too_late_does_not_go_unless_it_counts(tmp_path: Path, tiny_config: TinyConfig) -> None:
    for weight, gone in ((0.0, [3]), (0.5, [2, 3])):
        site = Site(tmp_path / str(weight), tiny_config, membership={"quorum": 1, "stale_weight": weight})
        site.here.claim_name("alpha", "identity")
        for version in range(3):
            publish(site.there, version, tmp_path)
            deliver(site.here, "alpha", version + 1, b"x", tmp_path)
        site.relay().copy()
        assert [version for version in (1, 2, 3) if site.there.delivery("alpha", version)] == gone


def test_pruned_here_and_not_fetched_again(site: Site, tmp_path: Path) -> None:
    relay, here, there = site.relay(), site.here, site.there
    here.claim_name("alpha", "identity")
    for version in range(5):
        snapshot(there, publish(there, version, tmp_path))
        relay.copy()
        if version:
            here.mark_resumable("alpha", version)
        deliver(here, "alpha", version + 1, b"x", tmp_path)
        relay.copy()
    kept = [version for version in range(5) if tensors_of(here, version)]
    assert kept == [3, 4]
    before = files(here)
    site.relay().copy()
    assert files(here) == before
    # Of a store that has pruned, what is left comes.
    there.mark_resumable("beta", 4)
    assert History(there, 1).prune(["alpha", "beta"], 4, 2) == [2, 1, 0]
    assert there.objects.names("snapshots") == ["000003.json", "000004.json"]
    shutil.rmtree(here.objects.url)
    site.relay().copy()
    assert [version for version in range(5) if tensors_of(StoreExchange(here.objects.url), version)] == [3, 4]


# ---- what is removed


def test_a_refusal_comes_and_the_next_delivery_goes(site: Site, tmp_path: Path) -> None:
    relay, here, there = site.relay(), site.here, site.there
    here.claim_name("alpha", "identity")
    publish(there, 0, tmp_path)
    for count in (1, 2):
        manifest = deliver(here, "alpha", 1, b"the same", tmp_path).to_bytes()
        relay.copy()
        relay.copy()  # a refused payload lies there: the first look was not enough
        assert there.delivery("alpha", 1) == manifest
        there.refuse("alpha", 1, manifest, "not finite", final=count == 2)
        relay.copy()
        assert here.delivery("alpha", 1) is None
        refusals = [Refusal(reason="not finite", final=number == 2) for number in range(1, count + 1)]
        assert here.refusals("alpha", 1) == there.refusals("alpha", 1) == refusals
        relay.copy()
        assert there.delivery("alpha", 1) is None


def test_a_manifest_that_vanished_without_a_reason(site: Site, tmp_path: Path) -> None:
    """The reason is on its way, or was lost with an aggregator that was killed."""
    relay, here, there = site.relay(), site.here, site.there
    here.claim_name("alpha", "identity")
    manifest = deliver(here, "alpha", 1, b"x", tmp_path).to_bytes()
    relay.copy()
    there.objects.delete("silos/alpha/000001/manifest.json")
    relay.copy()
    assert there.delivery("alpha", 1) is None
    relay.copy()
    assert there.delivery("alpha", 1) == manifest


def rolled_back_halfway(site: Site, tmp_path: Path) -> str:
    """Versions 0 to 4 are here, too, and a delivery for 5 that has not gone; there, a rollback to 2 has begun."""
    here, there = site.here, site.there
    here.claim_name("alpha", "identity")
    for version in range(5):
        publish(there, version, tmp_path)
        if version:
            deliver(here, "alpha", version, b"x", tmp_path)
    relay = site.relay()
    relay.copy()
    here.mark_resumable("alpha", 4)
    relay.copy()
    deliver(here, "alpha", 5, b"of what is taken back", tmp_path)
    sha256 = sha256_bytes(there.commit_bytes(4))
    delete, taken = there.objects.delete, []

    def die(name: str) -> None:
        taken.append(name)
        if len(taken) == 3:
            raise KeyboardInterrupt
        delete(name)

    there.objects.delete = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        roll_back(there, 1, to=2)
    there.objects.delete = delete  # type: ignore[method-assign]
    assert not there.objects.exists("global/000004/commit.json")
    return sha256


def test_a_rollback_comes(site: Site, tmp_path: Path) -> None:
    discarded = rolled_back_halfway(site, tmp_path)
    here, there, relay = site.here, site.there, site.relay()
    before = files(here)
    relay.copy()  # nothing goes on before it is complete there, and silos wait
    assert is_rolling_back(here)
    assert {name for name in files(here) if name not in before} == {"rollbacks/000001.json"}
    assert there.delivery("alpha", 5) is None
    finish_rollbacks(there)
    relay.copy()
    relay.copy()
    assert not is_rolling_back(here)
    assert (here.newest_version(), there.newest_version()) == (2, 2)
    assert explain(here, 4, discarded) == "rolled back"
    for exchange in (here, there):
        left = [name for name in files(exchange) if not name.startswith(("rollbacks/", "rolled-back/"))]
        assert not [name for name in left if any(f"00000{version}" in name for version in (3, 4, 5))]
    assert files(here)["rolled-back/000001/global/000004/commit.json"]
    publish(there, 3, tmp_path)
    relay.copy()
    assert here.newest_version() == 3


# ---- killed


class Mortal(Objects):
    """Objects of a process that is killed before one more write or deletion in any of its stores."""

    def __init__(self, url: str, lives: list[int]) -> None:
        super().__init__(url)
        self._lives = lives

    def _create(self, name: str, *more: Callable[..., Any], **named: Any) -> None:
        self._live()
        super()._create(name, *more, **named)

    def delete(self, name: str) -> None:
        self._live()
        super().delete(name)

    def _live(self) -> None:
        if self._lives[0] == 0:
            raise KeyboardInterrupt
        self._lives[0] -= 1


def rolled_back(site: Site, tmp_path: Path) -> int:
    """A rollback, versions, words, and a delivery that was begun; returns the version in progress."""
    here, there = site.here, site.there
    rolled_back_halfway(site, tmp_path)
    here.announce("alpha", left=False, version=2)
    there.announce("alpha", left=True, version=2)
    finish_rollbacks(there)
    for version in (3, 4):
        publish_fragment(there, version, "int4", tmp_path)
    there.objects.write("silos/alpha/000005/000005.safetensors", b"begun")
    return 5


def refused(site: Site, tmp_path: Path) -> int:
    """The newest delivery was refused; returns its version."""
    site.here.claim_name("alpha", "identity")
    publish(site.there, 0, tmp_path)
    deliver(site.here, "alpha", 1, b"spoilt on its way", tmp_path)
    relay = site.relay()
    relay.copy()
    site.there.refuse("alpha", 1, deliver(site.there, "alpha", 1, b"x", tmp_path).to_bytes(), "for a test")
    return 1


def settle(site: Site, version: int) -> tuple[Files, Files]:
    """Both stores after the relay was started again, and the silo has delivered as it does when nothing stands here."""
    relay = site.relay()
    relay.copy()
    deliver(site.here, "alpha", version, b"anew", site.scratch)
    site.here.mark_resumable("alpha", version - 1)
    for _ in range(3):
        relay.copy()
    assert site.there.delivery("alpha", version)
    return files(site.here), files(site.there)


@pytest.mark.parametrize(("prepare", "min_writes"), [(rolled_back, 30), (refused, 3)])
def test_killed_before_any_write_it_comes_to_the_same(
    prepare: Callable[[Site, Path], int], min_writes: int, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    made = Site(tmp_path / "made", tiny_config, membership={"quorum": 1})
    version = prepare(made, tmp_path)

    def killed(site: Site, num_writes: int) -> bool:
        lives, relay = [num_writes], site.relay()
        relay._here.objects, relay._there.objects = (Mortal(e.objects.url, lives) for e in (site.here, site.there))
        try:
            for _ in range(2):
                relay.copy()
        except KeyboardInterrupt:
            return True
        return False

    undisturbed = settle(made.copied(tmp_path / "undisturbed"), version)
    num_writes = 0
    while killed(site := made.copied(tmp_path / f"killed-{num_writes}"), num_writes):
        assert settle(site, version) == undisturbed, f"killed before write {num_writes}"
        num_writes += 1
    assert num_writes >= min_writes


# ---- mistakes


def said(site: Site, *, remote: str | None = None, **changes: Any) -> str:
    exchange = dataclasses.replace(site.config.exchange, **changes)

    def start() -> None:
        relay = Relay(dataclasses.replace(site.config, exchange=exchange), remote or site.there.objects.url)
        relay.start()
        relay.copy()

    return one_line_error(start)


def test_stores_that_cannot_be_relayed(site: Site) -> None:
    allowed = "a directory that the compute nodes share, and exchange.kind=store"
    for kind, url in (("store", "s3://bucket/run"), ("collective", "tcp://a:1")):
        expected = f"exchange.url: '{url}' given with exchange.kind={kind}; allowed: {allowed}"
        assert said(site, kind=kind, url=url) == expected
    here = site.here.objects.url
    assert said(site, remote=here) == f"--remote: '{here}' given; allowed: another store than exchange.url"


def test_another_runs_directory(tmp_path: Path, tiny_config: TinyConfig) -> None:
    site, other = Site(tmp_path / "one", tiny_config), Site(tmp_path / "other", tiny_config, sequence_tokens=8)
    here, there = site.here.objects.url, site.there.objects.url
    message = said(site, remote=other.there.objects.url)
    assert message.startswith(f"exchange.url: {other.there.objects.url} given; it holds a run with another contract: ")
    site.here.write_contract(b"{}\n")
    assert said(site) == f"exchange.url: {here} given; its contract is not that of {there}; name another one"


def test_another_history(site: Site, tmp_path: Path) -> None:
    here, there = site.here.objects.url, site.there.objects.url
    publish(site.there, 0, tmp_path)
    site.relay().copy()
    site.there.objects.delete("global/000000/commit.json")
    expected = f"exchange.url: {there} given, whose newest version is -1; {here} holds version 0 with commit "
    assert said(site).startswith(expected)


def test_a_silo_under_a_name_that_is_taken(site: Site) -> None:
    site.here.claim_name("alpha", "one")
    site.there.claim_name("alpha", "another")
    assert said(site).startswith("silos: 'alpha' given; another run directory takes part under this name in ")


def test_a_silo_of_another_directory_is_told(site: Site) -> None:
    site.there.claim_name("alpha", "another")
    site.relay().copy()
    assert "another run directory takes part under this name" in one_line_error(site.here.claim_name, "alpha", "one")


# ---- the process


def test_the_command(site: Site, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "relay", "--config", str(tmp_path / "tiny.yaml")]
    command += ["--remote", site.there.objects.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        publish(site.there, 0, tmp_path)
        wait_for(lambda: site.here.newest_version() == 0, seconds=60)
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert second.stderr.count("\n") == 1
        assert f"a relay runs there already (process {process.pid})" in second.stderr
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(PATIENCE_SECONDS) == 75
        assert time.monotonic() - began < 20
    finally:
        process.kill()
        said, _ = process.communicate()
    assert said.splitlines()[-1] == "stopped; start it again to go on"
    for version in range(1, site.config.schedule.num_versions + 1):
        publish(site.there, version, tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "done: version 3 is here, and this site's silos have ended"
    assert json.loads(site.here.commit_bytes(3))["version"] == 3
