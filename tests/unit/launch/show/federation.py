"""A run of five silos that the real aggregator has merged, with all that a page of it has to show.

version   1 2 3 4 5 6 7    8 to 10
alpha     # # # # # # #    # # #
beta      # # # # . . #    # # #     absent in 5 and 6
delta     # # # # # # #    # # #
epsilon         # # # #    # # #     joins after 3
gamma     # # # # # # #    # . .     leaves after 8
                         5           7 is rolled back to 5, whereupon 6 and 7 are made again
"""

import os
from pathlib import Path

from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config
from pretrain.exchange.lease import Lease
from pretrain.exchange.rollback import roll_back
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Beat, Evaluation
from tests.support import TinyText, tiny_silo, write_settings
from tests.unit.merge.test_membership import join
from tests.unit.test_aggregate import Hand, one_version, plus_noise, start

SILOS = ("alpha", "beta", "delta", "epsilon", "gamma")
BEGAN = 1_600_000_000
MINUTE = 60
REASON = '<script>document.title="taken"</script><img src="http://127.0.0.1:9/x" onerror="alert(1)"> \x1b[2J ${x}'
HOSTILE = "<b>$x^</b><script>1</script>"  # a corpus
NEWEST = 10
TOKENS = {"alpha": 1_000_000, "beta": 250_000, "delta": 600_000, "epsilon": 40_000, "gamma": 400_000}


def loss(silo: str, version: int) -> float:
    """What a silo tells in the manifest of a version."""
    return round(8.0 - 0.4 * version + 0.25 * SILOS.index(silo), 4)


def held_out(silo: str, version: int) -> float:
    """What a silo finds the version to be worth on its own corpus, which has its name."""
    return round(9.0 - 0.25 * version + 0.5 * SILOS.index(silo), 4)


def present(version: int, *, again: bool) -> list[str]:
    """Who delivers for a version."""
    absent = {"beta"} if version in (5, 6) and not again else set()
    absent |= {"epsilon"} if version <= 3 else set()
    absent |= {"gamma"} if version > 8 else set()
    return [silo for silo in SILOS if silo not in absent]


def make_federation(directory: Path, text: TinyText, **changes: object) -> RunConfig:
    """Make its store, with an eleventh version under way, and give all objects times ten minutes a version apart."""
    rules = {"quorum": 3, "deadline_floor_seconds": 0.02, "deadline_ceiling_seconds": 0.02, "away_after_versions": 9}
    settings = {
        "name": "five-silos",
        "inner": {"num_steps": 80},
        "silos": {name: tiny_silo(text, "gamma") for name in SILOS if name not in ("alpha", "beta")},
        "membership": rules,
        "exchange": {"keep_versions": 10},
    }
    config = load_config([write_settings(directory, text, **(settings | changes))])
    store = StoreExchange(config.store_url)
    lease = Lease(store, seconds=600)
    _advance(config, range(1, 8), again=False)
    lease.release()
    roll_back(_opened(config), 1, to=5, reason=REASON)
    lease = Lease(store, seconds=600)
    _advance(config, range(6, NEWEST + 1), again=True)
    store = _opened(config)
    _tell(store, "alpha", {HOSTILE: 3.5}, version=NEWEST)
    for silo, loss in (("alpha", 6.0), ("beta", 7.0)):
        _tell(store, silo, {silo: loss}, label="central", digest="c" * 64, tokens=9_000_000)
    for silo, lease_seconds in (("alpha", 300.0), ("beta", 300.0), ("epsilon", 3.0)):
        store.say(f"silos/{silo}/beats/000001", Beat(lease_seconds=lease_seconds), silo)
    store.say_waiting(NEWEST + 1, ["beta", "delta", "epsilon"], deadline_seconds=1200.0)
    _give_times(Path(config.store_url))
    return config


def _opened(config: RunConfig) -> StoreExchange:
    exchange = StoreExchange(config.store_url)
    exchange.read_contract()
    return exchange


def _advance(config: RunConfig, versions: range, *, again: bool) -> None:
    aggregator, state = start(config)
    if versions.start == 1:
        join(config, [silo for silo in SILOS if silo != "epsilon"])
    for version in versions:
        if version == 4:
            join(config, ["epsilon"], version=3)
        for index, silo in enumerate(present(version, again=again)):
            told = {"loss": loss(silo, version), "pseudo_gradient_norm": 1.0 + index / 4, "epochs": version / 4}
            hand = Hand(manifest=lambda manifest, told=told: manifest.update(metrics=told))
            hand.deliver(config, silo, state, plus_noise(state, seed=index), tokens=TOKENS[silo])
        one_version(aggregator, state)
        for silo in present(version, again=again):
            _tell(_opened(config), silo, {silo: held_out(silo, version)}, version=version)
        if version == 8:
            _opened(config).announce("gamma", left=True, version=8)
    if again:
        Hand().deliver(config, "alpha", state, plus_noise(state), tokens=TOKENS["alpha"])


def _tell(
    store: StoreExchange,
    silo: str,
    losses: dict[str, float],
    *,
    version: int | None = None,
    label: str = "",
    digest: str = "",
    tokens: int | None = None,
) -> None:
    digest = digest if version is None else store.read_commit(version).parameters_digest
    told = {"losses": losses, "sequences": dict.fromkeys(losses, 64), "tokens": tokens}
    store.tell_evaluation(silo, Evaluation(version=version, label=label, parameters_digest=digest, **told))


def _give_times(store: Path) -> None:
    """Version v is of 10 v minutes; each silo had delivered for it a minute before the next; the end is 108."""
    after = dict.fromkeys(store.rglob("*"), 0)
    for version in range(1, NEWEST + 1):
        late = 25 if version > 5 else 0  # the rollback was at minute 70
        after |= dict.fromkeys(store.glob(f"global/{version:06d}/*"), 10 * version + late)
        for index, silo in enumerate(SILOS):
            after |= dict.fromkeys(store.glob(f"silos/{silo}/{version:06d}/*"), 10 * version + late - 1 - index)
    end = 10 * NEWEST + 25
    for pattern, minutes in (
        ("silos/epsilon/membership/*", 30),
        ("silos/gamma/membership/000001.json", 106),
        ("rollbacks/*", 72),
        ("rolled-back/**/*", 72),
        ("aggregator/000002*", 80),
        ("silos/alpha/*11/*", end + 4),
        ("silos/alpha/beats/*", end + 8),
        ("silos/beta/beats/*", end + 7),
        ("silos/epsilon/beats/*", end - 30),
        ("aggregator/*2.beat*", end + 8),
    ):
        found = list(store.glob(pattern))
        assert found, pattern
        after |= dict.fromkeys(found, minutes)
    for path, minutes in after.items():
        os.utime(path, (BEGAN + MINUTE * minutes,) * 2)
