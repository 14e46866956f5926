"""What a gate's rule has to be so that it can be kept, and decided. Imports no torch."""

import re

from pretrain.config.errors import require
from pretrain.config.gate import OF_PUBLIC, OF_SILOS, RISES, GateConfig
from pretrain.config.keys import RunConfig

SHA256 = re.compile(r"[0-9a-f]{64}")


def check_gate(config: RunConfig) -> None:
    """Refuse a rule that nobody can keep, and one that nobody can decide. Raises ConfigError."""
    gate = config.gate
    if not gate.is_on:
        for name in gate.changed:
            default = getattr(GateConfig(), name)
            require(False, f"gate.{name}", getattr(gate, name), f"{default!r} without gate.every_versions")
        return
    kind, most = config.exchange.kind, config.schedule.num_versions
    allowed = f"0 with exchange.kind={kind}, where there is no operator who decides"
    require(kind == "store", "gate.every_versions", gate.every_versions, allowed)
    allowed = f"0 to {most}, the versions of the run: else none is a candidate"
    require(gate.every_versions <= most, "gate.every_versions", gate.every_versions, allowed)
    _check_splits(config)
    _check_limits(gate)
    _check_waiting(config)


def _check_splits(config: RunConfig) -> None:
    """Which splits judge, and that silos may tell what they find."""
    gate, tier = config.gate, config.trust.metrics.get("held_out")
    for name, digest in gate.data.items():
        silo, slash, corpus = name.partition("/")
        fits = bool(slash and corpus) and silo in config.agreed_roster
        require(fits, "gate.data", name, f"SILO/CORPUS, of a silo of the roster: {', '.join(config.agreed_roster)}")
        require(bool(SHA256.fullmatch(digest)), f"gate.data.{name}", digest, "a sha256, as atoll contract gate says it")
    for name, digest in gate.public.items():
        allowed = "a sha256, as atoll contract gate says it"
        require(bool(SHA256.fullmatch(digest)), f"gate.public.{name}", digest, allowed)
    for name in gate.places:
        allowed = f"names of gate.public: {', '.join(sorted(gate.public)) or 'none'}"
        require(name in gate.public, "gate.places", name, allowed)
    allowed = "public, consortium with gate.data: results that stay with their silo decide nothing"
    require(not gate.data or tier != "member", "trust.metrics.held_out", tier, allowed)


def _check_limits(gate: GateConfig) -> None:
    limits = gate.limits
    allowed = f"one or more of {', '.join((*OF_SILOS, *OF_PUBLIC))}: without a limit there is nothing to decide"
    require(bool(limits), "gate", sorted(limits), allowed)
    for names, key, splits in ((OF_SILOS, "data", gate.data), (OF_PUBLIC, "public", gate.public)):
        for name in names:
            allowed = f"null without gate.{key}: there is no result to decide it by"
            require(name not in limits or bool(splits), f"gate.{name}", limits.get(name), allowed)
    for rise, level in RISES.items():
        # The current one keeps the level, so that from there a candidate's loss would have to be below 0.
        most, lower = limits.get(level), -limits.get(rise, 0.0)
        fits = most is None or lower < most
        allowed = f"above {-(most or 0):g} with gate.{level}={most}: no loss is below 0, and nobody could keep both"
        require(fits, f"gate.{rise}", limits.get(rise), allowed)


def _check_waiting(config: RunConfig) -> None:
    """Until when who is waited for, and what follows."""
    gate, rules, outer = config.gate, config.membership, config.outer
    judges = len(gate.silos)
    fits = gate.quorum is None or 1 <= gate.quorum <= judges
    require(fits, "gate.quorum", gate.quorum, f"null, or 1 to the {judges} silos of gate.data")
    fits = gate.quorum is None or gate.deadline_seconds is not None
    require(fits, "gate.quorum", gate.quorum, "null without gate.deadline_seconds, until which all are waited for")
    may_miss = rules.is_elastic or rules.sample is not None
    key = "membership.quorum" if rules.is_elastic else "membership.sample"
    fits = gate.deadline_seconds is not None or not (gate.data and may_miss)
    require(fits, "gate.deadline_seconds", None, f"a number with {key}, as a silo may be away for ever")
    if gate.otherwise == "go_back":
        in_turns = outer.num_fragments > 1 or outer.overlap_steps > 0
        allowed = "go_on with outer.num_fragments above 1 or outer.overlap_steps above 0, and no membership.quorum"
        require(rules.is_elastic or not in_turns, "gate.otherwise", gate.otherwise, allowed)
        allowed = "go_on with outer.secure_sum, as no silo answers twice for a version"
        require(not outer.secure_sum, "gate.otherwise", gate.otherwise, allowed)
