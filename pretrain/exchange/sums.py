"""What a secure sum leaves in a store, for either side of it (trust/sums.py has the protocol). No torch.

silos/NAME/000017/shares.json   what the silo has dealt with its delivery; written before the manifest
sums/000017.json                whose deliveries are added up; written by the aggregator once they are all there
silos/NAME/000017/answer.json   what the silo lays open for that
"""

from typing import Any

from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.store import StoreExchange, delivery_path
from pretrain.trust.ledger import Manifest, RefusedError
from pretrain.trust.masks import Masker
from pretrain.trust.members import OwnKeys
from pretrain.trust.sums import Answer, Shares, Survivors, laid_open

FOLDER = "sums"


def shares_path(silo: str, version: int) -> str:
    """What a silo has dealt."""
    return f"{delivery_path(silo, version)}/shares.json"


def answer_path(silo: str, version: int) -> str:
    """What a silo has laid open."""
    return f"{delivery_path(silo, version)}/answer.json"


def survivors_path(version: int) -> str:
    """Whose deliveries a version adds up."""
    return f"{FOLDER}/{version:06d}.json"


def check_no_sum(config: RunConfig, given: str, why: str) -> None:
    """Raise ConfigError, for what has no meaning in a run of secure sums."""
    if config.outer.secure_sum:
        raise ConfigError(f"{given}; allowed: in a run without outer.secure_sum, as {why}")


class Sums:
    """Of one store."""

    def __init__(self, config: RunConfig, exchange: StoreExchange) -> None:
        self._config, self.exchange = config, exchange

    def silos(self, version: int) -> list[str]:
        """Those that have a key at a version, sorted."""
        return sorted({*self.exchange.members.keys_at(version)} - {OPERATOR})

    def threshold(self, version: int) -> int:
        """How many have to deliver, and to answer."""
        return self._config.membership.quorum or len(self.silos(version))

    def masker(self, silo: str, version: int) -> Masker:
        """Our secrets of a version. Raises ConfigError where our private key is not here, or counts no more."""
        members = self.exchange.members
        keys, own = members.keys_at(version), members.signer
        assert isinstance(own, OwnKeys), "nobody here masks"
        if silo not in keys:
            raise ConfigError(
                f"trust.keys.{silo}: {own.public.text} given, which counts nothing at version {version}, as the "
                "contract is amended; allowed: a member with a key"
            )
        threshold = self.threshold(version)
        return Masker(
            silo,
            own.private(keys[silo]).agreement,
            {name: keys[name].agreement for name in self.silos(version)},
            f"{self.exchange.terms_sha256(version)} {version} {threshold}\n".encode(),
            threshold,
        )

    def shares(self, manifest: Manifest) -> Shares:
        """What a silo has dealt with a delivery. Raises RefusedError for what does not go with it."""
        name = shares_path(manifest.silo, manifest.version)
        try:
            found = self.exchange.checked_record(Shares, name, manifest.silo, **self._with(manifest))
        except FileNotFoundError:
            raise RefusedError(f"{name} is missing") from None
        return self._whole(found, name)

    def shares_if_there(self, manifest: Manifest) -> Shares | None:
        """The same; None, and a line, for what that silo has not signed, or with another delivery."""
        name = shares_path(manifest.silo, manifest.version)
        found = self.exchange.record(Shares, name, manifest.silo, **self._with(manifest))
        return self._whole(found, name) if found else None

    def survivors(self, version: int) -> Survivors | None:
        """Whose deliveries a version adds up, once the aggregator has said so; what it has not signed counts as not
        there. Raises RefusedError for what it cannot have meant.
        """
        found = self.exchange.record(Survivors, survivors_path(version), OPERATOR, **self._of(version))
        if found is None:
            return None
        known = {*self.silos(version)}
        if found.silos != sorted({*found.silos} & known) or len(found.manifests) != len(found.silos):
            raise RefusedError(f"{survivors_path(version)} does not name silos of this run, each once, with a manifest")
        if len(found.silos) < (least := self.threshold(version)):
            raise RefusedError(f"{survivors_path(version)} has {len(found.silos)} silos; allowed: {least} or more")
        return found

    def answer(self, silo: str, version: int, survivors: Survivors, sha256: str) -> Answer | None:
        """What a silo has laid open for a record with this hash; None while it has not, or not as it should be."""
        of = self._of(version) | {"silo": silo, "survivors_sha256": sha256}
        found = self.exchange.record(Answer, name := answer_path(silo, version), silo, **of)
        if found and len(found.shares) != len(laid_open(survivors, self.silos(version))):
            self.exchange.pass_over(name, "it has not just the shares that were asked for")
            return None
        return found

    def answered(self, silo: str, version: int) -> Answer | None:
        """What a silo has laid open for whatever record."""
        of = self._of(version) | {"silo": silo}
        return self.exchange.record(Answer, answer_path(silo, version), silo, **of)

    def _whole(self, shares: Shares, name: str) -> Shares:
        if {len(shares.sealed), len(shares.seeds)} != {len(self.silos(shares.version))}:
            raise RefusedError(f"{name} has not just one row for each silo")
        return shares

    def _with(self, manifest: Manifest) -> dict[str, Any]:
        """What shares have that go with a delivery."""
        return self._of(manifest.version) | {"silo": manifest.silo, "blake3": manifest.payloads[0].blake3}

    def _of(self, version: int) -> dict[str, Any]:
        return {"contract_sha256": self.exchange.terms_sha256(version), "version": version}
