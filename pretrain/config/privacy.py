"""What cannot be with a secure sum, or beside a private silo. Imports no torch."""

from pretrain.config.errors import named, require
from pretrain.config.keys import RunConfig

FEWEST_SUMMED, MOST_SUMMED = 3, 100  # silos of a secure sum: of two, each knows the other's part; shares are n times n


def check_private(config: RunConfig) -> None:
    """Refuse what would tell of a private silo's text beside the noised gradients, or count its sequences otherwise."""
    outer, rules = config.outer, config.membership
    for name, silo in config.silos.items():
        if not silo.is_private:
            continue
        key, given = f"silos.{name}", f"with silos.{name}.private.epsilon={silo.private.epsilon}"
        stage, weights = silo.zero_stage, silo.data_weights
        stages = f"0, 1, 2 {given}: stage 3 has no whole gradient of one sequence"
        require(stage < 3, f"{key}.deepspeed.zero_optimization.stage", stage, stages)
        once = f"{given}, for which each sequence counts once an epoch"
        require(not weights, f"{key}.data_weights", weights, f"none {once}")
        require(not silo.accept_other_data, f"{key}.accept_other_data", True, f"false {once}")
        floor, rise = outer.quality_floor, rules.max_loss_rise
        require(floor is None, "outer.quality_floor", floor, f"null {given}: a loss has no noise")
        require(rise is None, "membership.max_loss_rise", rise, f"null {given}: a loss has no noise")
        require(rules.steps == "equal", "membership.steps", rules.steps, f"equal {given}: nor have its seconds")


def check_secure_sum(config: RunConfig) -> None:
    """Refuse what cannot be where a delivery cannot be looked at, and all that a silo tells is its part of a sum."""
    outer, rules, trust = config.outer, config.membership, config.trust
    if not outer.secure_sum:
        return
    key, norm, roster = "outer.secure_sum", "trust.metrics.pseudo_gradient_norm", config.full_roster
    for name, given, wanted, why in (
        ("exchange.kind", config.exchange.kind, "store", "silos of a collective merge each other's parts"),
        ("outer.merge", outer.merge, "mean", "all other ways look at each delivery"),
        ("outer.codec", outer.codec, "fp32", "a sum takes one scale for all, and sends whole numbers of 32 bits"),
        ("outer.max_share", outer.max_share, 1.0, "a silo weighs its delivery before it knows the others' weights"),
        ("outer.quality_floor", outer.quality_floor, None, "no delivery can be left out once masks are shared with it"),
        ("membership.stale_weight", rules.stale_weight, 0.0, "masks are of one version"),
        ("membership.sample", rules.sample, None, "masks are shared by all of the roster"),
        ("membership.steps", rules.steps, "equal", "nobody is told how fast a silo is"),
        ("membership.max_norm_ratio", rules.max_norm_ratio, None, "nobody knows how long a delivery is"),
        (norm, trust.metrics["pseudo_gradient_norm"], "member", "it tells of a delivery"),
        ("trust.added", sorted(trust.added), [], "masks are shared by the contract's roster"),
    ):
        allowed = f"{'null' if wanted is None else wanted} with {key}: {why}"
        require(given == wanted, name, given, allowed)
    batch, allowed = outer.max_batch_sequences, f"a number with {key}: weights are shares of the largest there can be"
    require(batch is not None, "outer.max_batch_sequences", batch, allowed)
    clip, told = config.inner.clip_norm, outer.second_moments == "shared" or outer.control_variates > 0
    why = "it bounds what is told of gradients, and so says how it is rounded"
    require(clip > 0 or not told, "inner.clip_norm", clip, f"above 0 with {key} and shared moments: {why}")
    fits = FEWEST_SUMMED <= len(roster) <= MOST_SUMMED
    require(fits, "roster", named(roster), f"{FEWEST_SUMMED} to {MOST_SUMMED} silos with {key}")
    fewest = 2 * len(roster) // 3 + 1
    fits = rules.quorum is None or rules.quorum >= fewest
    allowed = f"null, or {fewest} or more of {len(roster)} with {key}, so that no two sets of silos are answered"
    require(fits, "membership.quorum", rules.quorum, allowed)
    amend = trust.amend
    fits = amend == "all" or (amend.isdigit() and int(amend) >= fewest)
    allowed = f"all, or {fewest} or more with {key}: fewer could put keys of their own in the place of the others'"
    require(fits, "trust.amend", amend, allowed)
    # A local launch of all silos makes their keys later.
    fits = bool(trust.keys) or roster == sorted(config.silos)
    require(fits, key, True, "false without trust.keys: it is the members' keys that masks follow from")
