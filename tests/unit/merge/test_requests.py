"""What a version costs an aggregator in requests to a bucket: each is one that a reader can count in the code."""

import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.httpsession import AIOHTTPSession

from pretrain.aggregate import Aggregator, OuterState
from pretrain.config.keys import RunConfig
from pretrain.exchange.history import History
from pretrain.exchange.store import StoreExchange
from pretrain.merge.collect import _medians_of_others
from pretrain.merge.past import NORMS, Past
from pretrain.trust.members import Members
from tests.conftest import TinyConfig, TinyText
from tests.support import tiny_silo
from tests.unit.test_aggregate import GOOD, one_version, plus_noise, start

NAMES = ("alpha", "beta", "gamma")
ONE_FRAGMENT = {"optimizer": "sgd", "lr": 1.0, "codec": "int4", "downlink_codec": "int4"}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """All requests that reach the network meanwhile: the verb, and what of which object, without its numbers."""
    found: Counter[str] = Counter()
    send = AIOHTTPSession.send

    async def counting(session: Any, request: Any) -> Any:
        path, _, query = request.url.partition("?")
        name = re.search(r"prefix=([^&]*)", query)
        place = name[1].replace("%2F", "/") if name else path.split("/run/")[-1]
        verb = "LIST" if name else request.method
        found[f"{verb} {re.sub(r'[0-9]{6}', 'N', re.sub('|'.join(NAMES), 'SILO', place).split('/run/')[-1])}"] += 1
        return await send(session, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AIOHTTPSession, "send", counting)
        yield found


@pytest.fixture
def make(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, s3_url: str) -> Any:
    def make(**membership: Any) -> RunConfig:
        return tiny_config(
            tmp_path,
            inner={"num_steps": 24},
            outer=ONE_FRAGMENT,
            silos={name: tiny_silo(tiny_text, name) for name in NAMES[2:]},
            membership=membership,
            exchange={"url": f"{s3_url}/{tmp_path.name}/run", "snapshot_versions": 100},
        )

    return make


def deliver(config: RunConfig, state: OuterState, silos: tuple[str, ...]) -> None:
    """Write deliveries by hand in a folder, and bring them into the bucket."""
    exchange, version = StoreExchange(config.store_url), f"{state.version + 1:06d}"
    folder = Path(config.directory) / "by hand"
    here = dataclasses.replace(config, exchange=dataclasses.replace(config.exchange, url=str(folder)))
    folder.mkdir(exist_ok=True)
    (folder / "contract.json").write_bytes(exchange.read_contract() or b"")
    commit = folder / "global" / f"{state.version:06d}" / "commit.json"
    commit.parent.mkdir(parents=True, exist_ok=True)
    commit.write_bytes(exchange.commit_bytes(state.version))
    for silo in silos:
        GOOD.deliver(here, silo, state, plus_noise(state))
        for name in (f"{version}.safetensors", "manifest.json"):
            exchange.objects.upload(folder / "silos" / silo / version / name, f"silos/{silo}/{version}/{name}")


def versions(aggregator: Aggregator, state: OuterState, config: RunConfig, silos: tuple[str, ...]) -> Counter[str]:
    """The requests of the third of three versions."""
    for _ in range(2):
        deliver(config, state, silos)
        one_version(aggregator, state)
    deliver(config, state, silos)
    with counted() as found:
        one_version(aggregator, state)
    return found


A_SILO = {"GET silos/SILO/N/manifest.json": 1, "GET silos/SILO/N/N.safetensors": 1}
A_VERSION = {
    "GET global/N/commit.json": 2,  # whether ours is still the newest, and nobody's is the next
    "DELETE global/N/change-000.safetensors": 1,
    "PUT global/N/change-000.safetensors": 1,
    "PUT global/N/commit.json": 1,
    "DELETE waiting/N.json": 1,
}
# s3fs asks again whether it is an object
NO_SNAPSHOT = {"LIST snapshots/": 1, "LIST ": 1}
NO_CHECKPOINT = {"LIST silos/SILO/resumable/": 1, "LIST silos/SILO/": 1}


@pytest.mark.parametrize("quorum", [None, 3])
def test_a_silo_and_version_is_two_requests(make: Any, quorum: int | None) -> None:
    """And one silo's checkpoints are asked for, as it has none that is newer than what is kept: it is behind."""
    config = make() if quorum is None else make(quorum=quorum)
    aggregator, state = start(config)
    exchange = StoreExchange(config.store_url)
    for silo in NAMES:
        if quorum:
            exchange.announce(silo, left=False, version=0)
    found = versions(aggregator, state, config, NAMES)
    assert (
        found
        == {name: len(NAMES) * number for name, number in A_SILO.items()} | A_VERSION | NO_SNAPSHOT | NO_CHECKPOINT
    )


def test_only_who_is_behind_all_others_is_asked_for_its_checkpoint(make: Any) -> None:
    """Beta's is the oldest, and after it has come on, gamma's; alpha's is far on."""
    config = make()
    exchange = StoreExchange(config.store_url)
    history = History(exchange, 1)
    for silo, version in (("alpha", 90), ("beta", 2), ("gamma", 5)):
        exchange.mark_resumable(silo, version)

    def asked() -> tuple[int, int]:
        with counted() as found:
            oldest = history._oldest_resumable(NAMES, 50)
        assert found.keys() <= {"LIST silos/SILO/resumable/"}
        return oldest, found.total()

    assert asked() == (2, 4)  # each once, as none was known; and beta again
    assert asked() == (2, 1)
    exchange.mark_resumable("beta", 20)
    assert asked() == (5, 2)
    exchange.mark_resumable("gamma", 60)
    assert asked() == (20, 2)
    exchange.mark_resumable("beta", 70)
    assert asked() == (50, 1)  # no more versions than so many are to go
    assert asked() == (50, 0)


def test_who_is_missing_is_asked_whether_it_has_left_once_there_are_enough(make: Any) -> None:
    config = make(quorum=2, deadline_floor_seconds=0.0, deadline_ceiling_seconds=0.01)
    aggregator, state = start(config)
    exchange = StoreExchange(config.store_url)
    for silo in NAMES:
        exchange.announce(silo, left=False, version=0)
    found = versions(aggregator, state, config, ("alpha", "beta"))
    assert found["GET silos/SILO/N/N.safetensors"] == 2
    # Gamma's, whose word is known; and after this commit, the third that it has missed, whether it joins again.
    assert found["LIST silos/SILO/membership/"] == 2
    assert not [name for name in found if name.startswith("GET silos/SILO/membership")]


# ---- and in memory, and at a start


@pytest.mark.parametrize(
    ("num_silos", "membership", "num_needed"),
    [
        (1000, {}, 1),
        (1000, {"quorum": 500}, 3),  # away_after_versions
        (1000, {"quorum": 500, "max_norm_ratio": 10.0}, NORMS),
        (1000, {"quorum": 5, "sample": 50}, 3 * 2 * 20),  # each trains in one of twenty rounds, on average
    ],
)
def test_few_commits_are_needed_however_many_silos(
    make: Any, num_silos: int, membership: dict[str, Any], num_needed: int
) -> None:
    config = make()
    roster = [f"silo-{index:04d}" for index in range(num_silos)]
    rules = dataclasses.replace(config.membership, **membership)
    assert Past(dataclasses.replace(config, roster=roster, membership=rules), Members()).num_needed == num_needed


@pytest.mark.parametrize(
    "values", [[], [1.0], [3.0, 1.0], [2.0, 2.0, 1.0], [5.0, 1.0, 4.0, 1.0], [0.5, 3.0, 1.0, 9.0, 2.0]]
)
def test_the_median_of_all_others(values: list[float]) -> None:
    named = {str(place): value for place, value in enumerate(values)}
    expected = {
        name: statistics.median([other for one, other in named.items() if one != name])
        for name in named
        if len(named) > 1
    }
    assert _medians_of_others(named) == expected
