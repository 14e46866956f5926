"""What may leave a silo: a file under its own control, which wins over any contract. No torch.

What a contract or a configuration requires and the policy forbids ends the start in one line, before anything is
written. What is known only later is checked where bytes leave: how long a pseudo-gradient is, bytes a day (egress.py).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pretrain.config.allowed import CODECS, SUM32
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OuterConfig, RunConfig
from pretrain.trust.ledger import Manifest

POLICY_BYTES = 64 << 10
NO_POLICY = "no policy"
WANDB = (False, "offline", "online")  # each allows what is before it, too
# What the numbers of records are called that tell a number of a manifest, or from which it follows.
TELLS = {
    "loss": ("*/loss", "*/loss/*", "step/reward_*"),
    "held_out": ("eval/*",),
    "pseudo_gradient_norm": ("*/pseudo_gradient_norm", "*/norm/*"),
    "seconds_per_step": ("*/seconds_per_step/*", "*/tokens_per_second", "*/mfu", "*/seconds_training"),
    "tokens": ("*/tokens", "*/trained_tokens", "*/tokens_per_second", "*/mfu", "*/divisor"),
    "epochs": (),
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One silo's rules; a key that is not given forbids nothing."""

    codecs: list[str] | None = None
    """Formats in which pseudo-gradients may leave; sum32 is that of a secure sum."""
    max_norm: float | None = None
    """The longest pseudo-gradient of a version that may leave."""
    least_silos: int | None = None
    """The fewest silos of which a value may be that what we deliver is merged into, ours counted."""
    bytes_a_day: int | None = None
    """Bytes of objects that may leave on one day (UTC)."""
    hosts: list[str] | None = None
    """Where bytes may go: hosts, with * for any part of a name, and folders of this machine, from / on."""
    metrics: list[str] | None = None
    """Numbers that a manifest, an evaluation or Weights & Biases may have, by name, with * for any part of it."""
    wandb: bool | str | None = None
    """false, offline or online."""
    second_moments: bool | None = None
    """Whether second moments may leave: their rows tell which words a text has."""
    mean_gradients: bool | None = None
    """Whether mean gradients may leave."""
    tiers: dict[str, str] = field(default_factory=dict)
    """The contract's `trust.metrics`, than which `metrics` can only be stricter."""
    file: str = ""
    """Where it was read."""
    sha256: str = ""
    """Of the file's bytes."""

    def rule(self, *keys: str) -> str:
        """What the egress ledger says allowed an object: the file, and those of some keys that are given."""
        if not self.file:
            return NO_POLICY
        given = [key for key in keys if getattr(self, key) is not None]
        return f"{self.sha256}: {', '.join(given) or 'no key'}"

    def allows_metric(self, name: str) -> bool:
        """Whether a number of this name may leave."""
        is_allowed = self.metrics is None or any(fnmatchcase(name, allowed) for allowed in self.metrics)
        return is_allowed and self.tiers.get(name) != "member"

    @property
    def shows(self) -> Callable[[str], bool] | None:
        """Whether a number of Weights & Biases may be shown there, by its name; None: all may."""
        kept = [pattern for name, tier in self.tiers.items() if tier != "public" for pattern in TELLS[name]]
        if not kept and self.metrics is None:
            return None
        return lambda name: self.allows_metric(name) and not any(fnmatchcase(name, pattern) for pattern in kept)

    def allows_place(self, place: str) -> bool:
        """Whether bytes may go to a host, or to a folder of this machine, which begins with /."""
        if self.hosts is None:
            return True
        if not place.startswith("/"):
            return any(fnmatchcase(place.lower(), allowed.lower()) for allowed in self.hosts)
        folders = [Path(allowed).expanduser().resolve() for allowed in self.hosts if allowed[:1] in ("/", "~")]
        return any(Path(place).resolve().is_relative_to(folder) for folder in folders)

    def check_place(self, place: str, key: str) -> None:
        """Raise ConfigError unless bytes may go where a key of the configuration leads them."""
        if not self.allows_place(place):
            raise self._forbids([("hosts", key, place)])

    def check_config(self, config: RunConfig) -> None:
        """Raise ConfigError, one line that names both sides, for a contract or configuration that this forbids."""
        outer, rules = config.outer, config.membership
        found: list[tuple[str, str, object]] = []
        if self.wandb is not None and WANDB.index(self.wandb) < _wandb_level(config.wandb.mode):
            found.append(("wandb", "wandb.mode", config.wandb.mode))
        if config.exchange.kind == "none":
            return self._raise_for(found)
        if self.codecs is not None and outer.sent_codec not in self.codecs:
            found.append(("codecs", "the contract's outer.codec", outer.sent_codec))
        if self.bytes_a_day is not None and config.exchange.kind == "collective":
            found.append(("bytes_a_day", "exchange.kind", "collective, in which nobody can wait for a day"))
        if self.least_silos is not None:
            found += self._too_few(config, self.least_silos)
        if rules.steps == "speed" and not self.allows_metric("seconds_per_step"):
            found.append(("metrics", "the contract's membership.steps", "speed, which needs seconds_per_step"))
        if outer.quality_floor is not None and not self.allows_metric("loss"):
            found.append(
                ("metrics", "the contract's outer.quality_floor", f"{outer.quality_floor:g}, which needs loss")
            )
        if self.second_moments is False and outer.second_moments != "local":
            found.append(("second_moments", "the contract's outer.second_moments", outer.second_moments))
        if self.mean_gradients is False and outer.control_variates > 0:
            found.append(("mean_gradients", "the contract's outer.control_variates", outer.control_variates))
        return self._raise_for(found)

    @staticmethod
    def _too_few(config: RunConfig, least: int) -> list[tuple[str, str, object]]:
        """What of a contract merges among fewer silos than so many, if anything does."""
        outer, fewest, term = config.outer, len(config.full_roster), "the contract's roster"
        for name in ("sample", "quorum"):
            if (given := getattr(config.membership, name)) is not None:
                fewest, term = given, f"the contract's membership.{name}"
        if fewest < least:
            return [("least_silos", term, f"{fewest} silos" if term.endswith("roster") else fewest)]
        if outer.quality_floor is not None and (left := (fewest + 1) // 2) < least:
            told = f"{outer.quality_floor:g}, with which {left} of {fewest} may be all that count"
            return [("least_silos", "the contract's outer.quality_floor", told)]
        if (left := in_one_value(outer, fewest)) < least:
            told = f"{outer.merge}, with which each value is of {left} of {fewest}"
            return [("least_silos", "the contract's outer.merge", told)]
        return []

    def check_norm(self, silo: str, version: int, norm: float) -> None:
        """Raise ConfigError for a pseudo-gradient that is too long to leave."""
        if self.max_norm is not None and not norm <= self.max_norm:
            raise ConfigError(
                f"trust.policy: {self.file} given; its max_norm is {self.max_norm:g}, and the pseudo-gradient of silo "
                f"{silo} for version {version} is {norm:.6g} long; it was not sent"
            )

    def leaving(self, manifest: Manifest) -> Manifest:
        """A manifest of ours with the numbers that may leave. Raises ConfigError if what it describes is too long."""
        if self.max_norm is not None:  # the file may say less now than when this was coded
            self.check_norm(manifest.silo, manifest.version, manifest.metrics["pseudo_gradient_norm"])
        metrics = {name: number for name, number in manifest.metrics.items() if self.allows_metric(name)}
        return replace(manifest, metrics=metrics)

    def check_merged(self, version: int, num_silos: int) -> None:
        """Raise ConfigError for a commit that has a delivery of ours with too few others: nothing more is sent."""
        if self.least_silos is not None and num_silos < self.least_silos:
            raise ConfigError(
                f"trust.policy: {self.file} given; its least_silos is {self.least_silos}, and commit {version} has "
                f"merged what we delivered among {num_silos}; change either, or take no part"
            )

    def _raise_for(self, found: list[tuple[str, str, object]]) -> None:
        if found:
            raise self._forbids(found)

    def _forbids(self, found: list[tuple[str, str, object]]) -> ConfigError:
        said = "; ".join(
            f"its {ours} is {_said(getattr(self, ours))}, and {term} is {theirs}" for ours, term, theirs in found
        )
        return ConfigError(f"trust.policy: {self.file} given; {said}; change either, or take no part")


def in_one_value(outer: OuterConfig, num_silos: int) -> int:
    """Of how many silos' values each one is that a merge of so many silos makes, at least."""
    if outer.merge in ("krum", "median"):
        return 1
    return num_silos - 2 * outer.num_malicious if outer.merge == "trimmed_mean" else num_silos


def is_public(config: RunConfig, name: str) -> bool:
    """Whether the contract lets what a silo tells of its training be shown to anybody."""
    return config.trust.metrics.get(name, "public") == "public"


def _wandb_level(mode: str) -> int:
    return WANDB.index("offline" if mode == "offline" else "online") if mode != "disabled" else 0


def _said(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "an empty list"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(type(text) is str and text.isprintable() and text for text in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


# Key to what it may be, and how that is said.
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "codecs": (lambda v: _is_texts(v) and {*v} <= {*CODECS, SUM32}, f"a list of {', '.join((*CODECS, SUM32))}"),
    "max_norm": (_is_number, "a number above 0"),
    "least_silos": (lambda v: type(v) is int and v >= 1, "a whole number, 1 or more"),
    "bytes_a_day": (lambda v: type(v) is int and v >= 1, "a whole number, 1 or more"),
    "hosts": (_is_texts, "a list of hosts, and of folders from / on"),
    "metrics": (_is_texts, "a list of names of numbers"),
    "wandb": (lambda v: v is False or v in ("offline", "online"), "false, offline, online"),
    "second_moments": (lambda v: type(v) is bool, "true, false"),
    "mean_gradients": (lambda v: type(v) is bool, "true, false"),
}


def read_policy(config: RunConfig) -> Policy:
    """The policy that a configuration names; one that forbids nothing if it names none.

    Raises ConfigError for a file that cannot be read, or says anything but these keys, each once and of its type.
    """
    if not config.trust.policy:
        return Policy(tiers=config.trust.metrics)
    path = Path(config.trust.policy)
    given = f"trust.policy: {path} given"
    try:
        with path.open("rb") as file:
            data = file.read(POLICY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{given}; it cannot be read: {error.strerror}") from None
    if len(data) > POLICY_BYTES:
        raise ConfigError(f"{given}; allowed: a file of up to {POLICY_BYTES} bytes")
    said = _mapping(data, given)
    for key, value in said.items():
        if key not in ALLOWED:
            raise ConfigError(f"{given}; its {key!r} is no key of a policy; allowed: {', '.join(ALLOWED)}")
        is_allowed, allowed = ALLOWED[key]
        if not is_allowed(value):
            raise ConfigError(f"{given}; its {key} is {value!r}; allowed: {allowed}")
    return Policy(**said, tiers=config.trust.metrics, file=str(path), sha256=hashlib.sha256(data).hexdigest())


def _mapping(data: bytes, given: str) -> dict[str, Any]:
    """What YAML or JSON says; a key twice is refused, as one of them would be passed over."""
    try:
        created = OmegaConf.create(data.decode())
        found = OmegaConf.to_container(created, resolve=False) if isinstance(created, DictConfig) else None
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, ValueError, AssertionError, RecursionError) as error:
        raise ConfigError(f"{given}; it is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{given}; allowed: a file of keys and values, one at least: {', '.join(ALLOWED)}")
    return {str(key): value for key, value in found.items()}
