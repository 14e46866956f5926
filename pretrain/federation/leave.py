"""A silo's word that it takes part no more. No torch."""

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.exchange.store import StoreExchange
from pretrain.host.lock import lock_directory
from pretrain.trust.contract import build_contract, check_same_contract


def say_left(config: RunConfig, silo: str) -> int:
    """Leave word in the store that a stopped silo has left; returns the newest version then. Raises ConfigError."""
    exchange = check_can_leave(config, silo)
    if config.silo_directory(silo).is_dir():  # here it runs, if it does
        lock_directory(config.silo_directory(silo), f"silo {silo}")
    newest = exchange.newest_version()
    exchange.announce(silo, left=True, version=newest)
    exchange.objects.close_egress()
    return newest


def check_can_leave(config: RunConfig, silo: str) -> StoreExchange:
    """The store in which a silo can say that it has left. Raises ConfigError."""
    if config.exchange.kind != "store":
        raise ConfigError(
            f"exchange.kind: {config.exchange.kind!r} given; a silo can leave only a run through a 'store'"
        )
    if silo not in config.full_roster:
        raise ConfigError(f"--silo: {silo!r} given; allowed: {named(config.full_roster)}")
    if not config.membership.is_elastic:
        raise ConfigError("membership.quorum: null given; without a quorum every version waits for all of the roster")
    exchange = StoreExchange.of_run(config)
    exchange.speak_as(config, silo)
    stored = exchange.read_contract()
    if stored is None:
        raise ConfigError(f"exchange.url: {config.store_url} given; there is no run in it (no contract.json)")
    check_same_contract(build_contract(config), stored, config.store_url)
    word = exchange.membership(silo)
    if word is None or word.left:
        what = "has left already" if word else "has never joined"
        raise ConfigError(f"--silo: {silo!r} given; this silo {what} in {config.store_url}")
    return exchange
