"""What cannot be with a secure sum, or beside a private silo. Imports no torch."""

from pretrain.config.budgets import MemberPrivacyConfig, PrivateConfig
from pretrain.config.errors import named, require
from pretrain.config.keys import RunConfig

FEWEST_SUMMED, MOST_SUMMED = 3, 100  # silos of a secure sum: of two, each knows the other's part; shares are n times n
MEMBER = "outer.member_privacy"
UNNOISED = ("loss", "held_out", "epochs")  # what a silo tells of its text, unless the contract keeps it there


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


def check_member(config: RunConfig) -> None:
    """Refuse what would tell of a silo beside the noised sum, or be more of it than what was clipped."""
    outer, rules, trust, given = config.outer, config.membership, config.trust, config.outer.member_privacy
    _check_clip_norms(config)
    if given.epsilon is None:
        return
    roster, beside = config.full_roster, f"with {MEMBER}.epsilon={given.epsilon:g}"
    allowed = "null without outer.secure_sum: a delivery by itself has but its share of the noise"
    require(outer.secure_sum, f"{MEMBER}.epsilon", given.epsilon, allowed)
    for name, value, wanted, why in (
        ("outer.merge", outer.merge, "mean", "it is the sum that is noised"),
        ("outer.weight_power", outer.weight_power, 0.0, "all silos are as much of the sum, whatever their tokens"),
        ("outer.second_moments", outer.second_moments, "local", "moments would be a second release"),
        ("outer.control_variates", outer.control_variates, 0.0, "mean gradients would be a second release"),
        ("membership.max_loss_rise", rules.max_loss_rise, None, "a loss has no noise"),
        *((f"trust.metrics.{name}", trust.metrics[name], "member", "it has no noise") for name in UNNOISED),
    ):
        require(value == wanted, name, value, f"{'null' if wanted is None else wanted} {beside}: {why}")
    fits, allowed = given.delta * len(roster) < 1, f"below {1 / len(roster):.3g}, 1 / the {len(roster)} silos"
    require(fits, f"{MEMBER}.delta", given.delta, allowed)
    least = rules.quorum or len(roster)
    allowed = f"0 to {least - 1}, so that one of the {least} silos of a sum is left whose noise counts"
    require(given.num_colluding < least, f"{MEMBER}.num_colluding", given.num_colluding, allowed)


def _check_clip_norms(config: RunConfig) -> None:
    """Refuse one that means nothing, where the other budget is given: it may be meant for that."""
    member = config.outer.member_privacy
    for name, silo in config.silos.items():
        own = f"silos.{name}.private"
        if member.epsilon is not None and not silo.is_private and silo.private.clip_norm != PrivateConfig.clip_norm:
            allowed = f"{MEMBER}.clip_norm, of a silo's whole delivery; this one is of a sequence, with {own}.epsilon"
            require(False, f"{own}.clip_norm", silo.private.clip_norm, allowed)
        if member.epsilon is None and silo.is_private and member.clip_norm != MemberPrivacyConfig.clip_norm:
            allowed = f"{own}.clip_norm, of one sequence's gradient; this one is of a delivery, with {MEMBER}.epsilon"
            require(False, f"{MEMBER}.clip_norm", member.clip_norm, allowed)
