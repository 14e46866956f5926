"""What values a configuration may have. Imports no torch; a mistake is said before anything starts."""

import math
import os
import re
from difflib import get_close_matches
from typing import Any

from pretrain.config.adapters import check_adapter, check_kind, check_personal
from pretrain.config.allowed import ALLOWED, METRICS, TIERS, Numbers
from pretrain.config.deepspeed_keys import KNOWN, OWNED
from pretrain.config.errors import ConfigError, named, require
from pretrain.config.gates import check_gate
from pretrain.config.keys import OPERATOR, ModelConfig, OuterConfig, RunConfig, SiloConfig
from pretrain.config.practising import check_practice
from pretrain.config.preference import check_preference
from pretrain.config.privacy import MEMBER, check_member, check_private, check_secure_sum

MOST_TOGETHER = 380  # silos of a collective: each one's record of a version has a number for every two of them
FEWEST_JUDGED = 3  # silos of which the others can say that one is worse than they are
# What s3fs, gcsfs, adlfs and the libraries under them call a secret, or a name that goes with one.
SECRET_NAME = re.compile(r"secret|token|passw|credential|connection_string|authorization|username|key$|key_id$", re.I)
SECRET_VALUE = re.compile(r"://[^/\s]*:[^/\s]*@")
RUN_ID = re.compile(r"[a-z0-9_-]{0,64}")
# Kinds of fsspec that are in one process, or that copy what is elsewhere and do not look again.
OWN_MEMORY = ("memory", "data", "blockcache", "cached", "filecache", "simplecache", "reference", "zip", "tar")
SILO_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
# It may come from another institution, and goes into batch scripts.
RUN_NAME = re.compile(r"[\w.-]{1,100}")


def check_config(config: RunConfig) -> None:
    """Check the values; raises ConfigError naming the key."""
    require(bool(RUN_ID.fullmatch(config.run_id)), "run_id", config.run_id, f"{RUN_ID.pattern}, or empty")
    check_kind(config.model.adapter)
    _check_each(config)
    require(bool(RUN_NAME.fullmatch(config.name)), "name", config.name, "up to 100 letters, digits, and _ . -")
    fits = bool(config.directory) and config.directory.isprintable()
    require(fits, "directory", config.directory, "a path without control characters")
    _check_numbers(config)
    _check_rates(config)
    _check_streaming(config.outer)
    _check_model(config.model)
    _check_roster(config)
    _check_conversations(config)
    for check in (
        _check_trust,
        _check_quality,
        _check_tiers,
        _check_store,
        _check_options,
        _check_collective,
        _check_membership,
        _check_merge,
        check_secure_sum,
        check_member,
        _check_muon,
        check_private,
        check_adapter,
        check_personal,
        check_gate,
        check_practice,
        check_preference,
    ):
        check(config)


def _check_each(config: RunConfig) -> None:
    """Every key by itself."""
    silos: list[tuple[str, Any]] = [(f"silos.{name}.", silo) for name, silo in config.silos.items()]
    silos = silos or [("silo.", config.silo)]
    private = [(f"{prefix}private.", silo.private) for prefix, silo in silos]
    sections: dict[str, list[tuple[str, Any]]] = {"": [("", config)], "silo": silos, "silo.private": private}
    sections[MEMBER] = [(f"{MEMBER}.", config.outer.member_privacy)]
    sections["model.adapter"] = [("model.adapter.", config.model.adapter)]
    sections["silo.personal_adapter"] = [(f"{prefix}personal_adapter.", of.personal_adapter) for prefix, of in silos]
    sections["silo.practice"] = [(f"{prefix}practice.", of.practice) for prefix, of in silos]
    for key, allowed in ALLOWED.items():
        section, _, name = key.rpartition(".")
        for prefix, settings in sections.get(section) or [(f"{section}.", getattr(config, section))]:
            value = getattr(settings, name)
            words = allowed.words if isinstance(allowed, Numbers) else ", ".join(allowed)
            is_optional = type(settings).__dataclass_fields__[name].default is None
            fits = is_optional if value is None else value in allowed
            given = "null" if value is None else repr(value)
            if not fits:
                raise ConfigError(f"{prefix}{name}: {given} given; allowed: {'null, or ' * is_optional}{words}")


def _check_numbers(config: RunConfig) -> None:
    largest = max((silo.global_batch_sequences for silo in config.silos.values()), default=1)
    most = config.outer.max_batch_sequences
    key, allowed = "outer.max_batch_sequences", f"null, or {largest} or more, as a silo's batch is"
    require(most is None or most >= largest, key, most, allowed)
    require(
        config.inner.num_steps % config.outer.sync_interval_steps == 0 or config.exchange.kind == "none",
        "inner.num_steps",
        config.inner.num_steps,
        f"a multiple of outer.sync_interval_steps={config.outer.sync_interval_steps}",
    )


def _check_rates(config: RunConfig) -> None:
    inner, outer = config.inner, config.outer
    for section, settings in (("inner", inner), ("outer", outer)):
        betas = settings.betas
        fits = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        require(fits, f"{section}.betas", betas, "two numbers from 0 to below 1")
    ramp_steps = inner.warmup_steps + (inner.decay_steps if inner.schedule == "wsd" else 0)
    fitting = f"warm-up and decay within inner.num_steps={inner.num_steps}"
    require(ramp_steps <= inner.num_steps, "inner.warmup_steps", ramp_steps, fitting)
    ramp_rounds = outer.warmup_rounds + (outer.decay_rounds if outer.schedule == "wsd" else 0)
    fitting = f"warm-up and decay within the {config.num_rounds} rounds"
    require(ramp_rounds <= config.num_rounds, "outer.warmup_rounds", ramp_rounds, fitting)


def _check_muon(config: RunConfig) -> None:
    for name, silo in config.silos.items() if config.inner.optimizer == "muon" else ():
        _check_muon_silo(name, silo.deepspeed.get("zero_optimization", {}))


def _check_muon_silo(name: str, zero: dict[str, Any]) -> None:
    """Refuse what splits the matrices, or the work on them, in ways that Muon does not follow."""
    offload = zero.get("offload_optimizer") or {}
    refused = {
        "offload_optimizer.ratio": offload.get("ratio", 1) != 1,
        "offload_optimizer.super_offload": offload.get("super_offload"),
        "zenflow": zero.get("zenflow"),
    }
    for key in filter(refused.get, refused):
        raise ConfigError(
            f"inner.optimizer: 'muon' given with silos.{name}.deepspeed.zero_optimization.{key} at stage "
            f"{zero.get('stage', 0)}; allowed: any stage, on the device or with offload_optimizer to cpu, without {key}"
        )


def _check_trust(config: RunConfig) -> None:
    keys, amend = config.trust.keys, config.trust.amend
    most = len(config.agreed_roster)
    fits = amend in ("all", *map(str, range(1, most + 1)))
    require(fits, "trust.amend", amend, f"all, or 1 to the {most} silos of the roster")
    kind, seal = config.exchange.kind, config.trust.seal
    _check_archive(config)
    require(not seal or kind == "store", "trust.seal", seal, f"false with exchange.kind={kind}, where no file travels")
    fits = not config.trust.added or bool(keys and kind == "store")
    require(fits, "trust.added", sorted(config.trust.added), "none without trust.keys and a store")
    if both := sorted(config.trust.added.keys() & {OPERATOR, *config.agreed_roster}):
        raise ConfigError(f"trust.added: {named(both)} given; allowed: silos that the contract does not have")
    if not keys:
        # A local launch of all silos makes their keys later.
        fits = not seal or config.full_roster == sorted(config.silos)
        require(fits, "trust.seal", seal, "false without trust.keys: it is the members' keys that seal")
        return
    require(kind != "none", "trust.keys", sorted(keys), "none with exchange.kind=none, where nobody else is")
    operator = {OPERATOR} if kind == "store" else set()  # a collective has none
    members = {*config.agreed_roster} | operator
    if missing := sorted(members - keys.keys()):
        raise ConfigError(
            f"trust.keys: none given of {named(missing)}; allowed: one of every silo of the roster"
            f"{f' and of {OPERATOR}' if operator else ''}, or none at all"
        )
    if unknown := sorted(keys.keys() - members):
        raise ConfigError(f"trust.keys: one of {named(unknown)} given; allowed: {named(sorted(members))}")


def _check_archive(config: RunConfig) -> None:
    archive, kind = config.trust.archive, config.exchange.kind
    if not archive:
        return
    require(kind == "store", "trust.archive", archive, f"none with exchange.kind={kind}, where nobody prunes a store")
    check_url(archive, "trust.archive")
    places = [url if "://" in url else os.path.abspath(url) for url in (archive, config.store_url)]
    ours, store = (f"{place.rstrip('/')}/" for place in places)
    apart = not ours.startswith(store) and not store.startswith(ours)
    require(apart, "trust.archive", archive, f"a place of its own, outside of the store {config.store_url}")


def _check_quality(config: RunConfig) -> None:
    floor, merge, key = config.outer.quality_floor, config.outer.merge, "outer.quality_floor"
    if floor is None:
        return
    fits = merge in ("mean", "importance", "clip")
    require(
        fits, key, floor, f"null with outer.merge={merge}, which counts all alike; it has its own way with the worst"
    )
    fewest = config.membership.sample or len(config.full_roster)
    what = "membership.sample" if config.membership.sample else "roster"
    allowed = f"null with a {what} of {fewest}: of fewer than {FEWEST_JUDGED} nobody can say which is worse"
    require(fewest >= FEWEST_JUDGED, key, floor, allowed)


def _check_tiers(config: RunConfig) -> None:
    tiers, rules, key = config.trust.metrics, config.membership, "trust.metrics"
    require({*tiers} == {*METRICS}, key, sorted(tiers), f"a tier for each of {', '.join(METRICS)}")
    needed = {
        "loss": config.outer.quality_floor is not None and f"outer.quality_floor={config.outer.quality_floor}",
        "pseudo_gradient_norm": rules.max_norm_ratio is not None
        and f"membership.max_norm_ratio={rules.max_norm_ratio}",
        "seconds_per_step": rules.steps == "speed" and "membership.steps=speed",
        "tokens": "outer.weight_power and every restart",
    }
    for name, tier in tiers.items():
        require(tier in TIERS, f"{key}.{name}", tier, ", ".join(TIERS))
        rule = needed.get(name)
        allowed = f"{', '.join(TIERS[:2])} with {rule}, for which others have to know it"
        require(tier != "member" or not rule, f"{key}.{name}", tier, allowed)


def _check_streaming(outer: OuterConfig) -> None:
    interval = outer.sync_interval_steps
    gap = f"outer.sync_interval_steps={interval}"
    require(outer.num_fragments <= interval, "outer.num_fragments", outer.num_fragments, f"1 to {gap}")
    require(
        outer.overlap_steps < interval,
        "outer.overlap_steps",
        outer.overlap_steps,
        f"below {gap}, the steps between two syncs of a fragment",
    )
    decay = outer.error_feedback
    require(
        not decay or outer.codec != "fp32", "outer.error_feedback", decay, "null or 0: codec fp32 leaves nothing out"
    )


def _check_model(model: ModelConfig) -> None:
    require(
        bool(model.config) != bool(model.checkpoint),
        "model",
        {"config": model.config, "checkpoint": model.checkpoint},
        "either model.config or model.checkpoint",
    )
    if model.config:
        require("model_type" in model.config, "model.config", model.config, "a mapping with model_type")


def _check_conversations(config: RunConfig) -> None:
    """Conversations of one row must not see each other, whatever text may."""
    needs = bool(config.chat_template) and not config.document_masking
    require(not needs, "document_masking", False, "true with chat_template, as conversations are kept apart")


def _check_roster(config: RunConfig) -> None:
    if not config.roster or config.exchange.kind != "store":  # whoever only runs the aggregator has no silo of its own
        check_has_silo(config)
    require(len(set(config.roster)) == len(config.roster), "roster", config.roster, "each name once")
    for name in config.full_roster:
        key = "roster" if config.roster else "silos"
        fits = SILO_NAME.fullmatch(name) and name != OPERATOR
        require(bool(fits), key, name, "names of a-z, 0-9, _ and -, and not aggregator")
    for name, silo in config.silos.items():
        require(name in config.full_roster, "silos", name, f"names of the roster: {named(config.full_roster)}")
        _check_silo(name, silo, masked=config.document_masking)


def check_has_silo(config: RunConfig) -> None:
    """For what starts or plans silos. Raises ConfigError."""
    require(bool(config.silos), "silos", {}, "at least one silo")


def _check_membership(config: RunConfig) -> None:
    """Raises ConfigError too for rules that mean nothing without a quorum."""
    rules, key = config.membership, "membership"
    floor, ceiling = rules.deadline_floor_seconds, rules.deadline_ceiling_seconds
    require(ceiling >= floor, f"{key}.deadline_ceiling_seconds", ceiling, f"{floor} or more")
    roster = len(config.full_roster)
    fits = rules.sample is None or 1 <= rules.sample <= roster
    require(fits, f"{key}.sample", rules.sample, f"null, or 1 to the {roster} silos of the roster")
    if config.outer.num_fragments > 1 or config.outer.overlap_steps > 0:
        allowed = "with outer.num_fragments above 1 or outer.overlap_steps above 0"
        require(rules.sample is None, f"{key}.sample", rules.sample, f"null {allowed}")
        require(rules.steps == "equal", f"{key}.steps", rules.steps, f"equal {allowed}")
    most = roster if rules.sample is None else rules.sample
    if rules.quorum is not None:
        what = f"the {roster} silos of the roster" if rules.sample is None else f"{key}.sample={most}"
        require(1 <= rules.quorum <= most, f"{key}.quorum", rules.quorum, f"null, or 1 to {what}")
        return
    for name, field in type(rules).__dataclass_fields__.items():
        if name.startswith(("deadline_", "away_", "stale_", "max_loss_")):
            given = getattr(rules, name)
            require(given == field.default, f"{key}.{name}", given, f"{field.default} without {key}.quorum")


def _check_merge(config: RunConfig) -> None:
    """A robust merge stands `num_malicious` silos only among enough others, in the smallest commit too."""
    outer, rules = config.outer, config.membership
    shares = outer.second_moments == "shared"
    allowed = "local with inner.optimizer=sgd, which has none"
    require(not shares or config.inner.optimizer != "sgd", "outer.second_moments", outer.second_moments, allowed)
    share, muon = outer.control_variates, config.inner.optimizer == "muon"
    allowed = "0 to 1" if muon else "0 unless inner.optimizer=muon"
    require(0 <= share <= int(muon), "outer.control_variates", share, allowed)
    if outer.merge == "importance":
        require(shares, "outer.second_moments", outer.second_moments, "shared with outer.merge=importance")
    if outer.merge in ("mean", "importance"):
        return
    require(
        config.exchange.kind != "collective",
        "outer.merge",
        outer.merge,
        "mean, importance with exchange.kind=collective",
    )
    require(outer.num_malicious >= 1, "outer.num_malicious", outer.num_malicious, "1 or more")
    # Of one silo both what came too late and what comes in time may be in a commit.
    stale, allowed = rules.stale_weight, f"0 with outer.merge={outer.merge}, among which a silo must not count twice"
    require(stale == 0, "membership.stale_weight", stale, allowed)
    fewest = rules.quorum or rules.sample or len(config.full_roster)
    needed = 2 * outer.num_malicious + (3 if outer.merge == "krum" else 1)
    key = "membership.quorum" if rules.quorum else "membership.sample" if rules.sample else "silos"
    allowed = f"{needed} or more with outer.merge={outer.merge} and outer.num_malicious={outer.num_malicious}"
    require(fewest >= needed, key, fewest, allowed)


def _check_collective(config: RunConfig) -> None:
    exchange = config.exchange
    if exchange.kind != "collective":
        return
    fits = re.fullmatch(r"tcp://([^/:]+|\[[0-9a-fA-F:]+\]):[1-9]\d{0,4}", exchange.url)
    require(bool(fits), "exchange.url", exchange.url, "tcp://HOST:PORT with exchange.kind=collective")
    state, num_silos = config.outer.state, len(config.full_roster)
    require(state == "memory", "outer.state", state, "memory with exchange.kind=collective, which has no aggregator")
    require(num_silos <= MOST_TOGETHER, "silos", num_silos, f"up to {MOST_TOGETHER} with exchange.kind=collective")
    for name, silo in config.silos.items():
        num_ranks = silo.fewest_nodes * silo.processes_per_node
        lanes = f"1 to the {num_ranks} ranks of silo {name}"
        require(1 <= exchange.num_lanes <= num_ranks, "exchange.num_lanes", exchange.num_lanes, lanes)
    for name, field in type(config.membership).__dataclass_fields__.items():
        given, allowed = getattr(config.membership, name), f"{field.default} with exchange.kind=collective"
        require(given == field.default, f"membership.{name}", given, allowed)


def check_url(url: str, key: str) -> None:
    """Refuse a store's URL that is a slip of the pen, or that no other process would find. Raises ConfigError."""
    import fsspec  # takes a sixth of the time in which atoll --help is there

    for link in url.split("::"):
        found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(/*)(.?)", link)
        if not found:
            continue  # a directory
        scheme, slashes, rest = found.groups()
        if len(slashes) < 2 or not (rest or slashes[2:]):
            raise ConfigError(f"{key}: {url!r} given; allowed: {scheme}://..., or a directory, as ./{url}")
        if scheme.lower() in OWN_MEMORY:
            allowed = f"a store that other processes see, too, which {scheme}:// is not"
            raise ConfigError(f"{key}: {url!r} given; allowed: {allowed}")
        if scheme.lower() not in fsspec.available_protocols():
            raise ConfigError(f"{key}: {url!r} given; allowed: a directory, s3://, gs://, az:// or another of fsspec's")


def _check_store(config: RunConfig) -> None:
    if config.exchange.kind == "store":
        check_url(config.exchange.url, "exchange.url")


def _check_options(config: RunConfig) -> None:
    options, key = config.exchange.options, "exchange.options"
    client = options.get("client_kwargs", {})
    require(isinstance(client, dict), f"{key}.client_kwargs", client, "a mapping")
    _refuse_secrets(options, key)


def _refuse_secrets(given: dict[str, Any], key: str) -> None:
    """At any depth, and without showing them: configurations are copied and kept."""
    for name, value in given.items():
        inner = f"{key}.{name}"
        if SECRET_NAME.search(str(name)) or (isinstance(value, str) and SECRET_VALUE.search(value)):
            raise ConfigError(
                f"{inner}: a secret given; allowed: none in a configuration; put it into the environment or a file "
                "that the store's library reads, as AWS_SHARED_CREDENTIALS_FILE names"
            )
        if isinstance(value, dict):
            _refuse_secrets(value, inner)


def _check_silo(name: str, silo: SiloConfig, *, masked: bool) -> None:
    key = f"silos.{name}"
    weights = silo.data_weights
    require(all(silo.data), f"{key}.data", silo.data, "directories of packed shards")
    for split, directory in silo.valid.items():
        require(bool(directory), f"{key}.valid.{split}", directory, "a directory of packed shards")
    require(
        len(weights) in (0, len(silo.data)),
        f"{key}.data_weights",
        weights,
        f"none, or one weight for each of the {len(silo.data)} entries of {key}.data",
    )
    require(all(0 < weight < math.inf for weight in weights), f"{key}.data_weights", weights, "numbers above 0")
    for owned, ours in OWNED.items():
        if owned in silo.deepspeed:
            raise ConfigError(f"{key}.deepspeed.{owned}: {silo.deepspeed[owned]!r} given; set {ours} instead")
    _check_deepspeed(silo.deepspeed, f"{key}.deepspeed", "")
    zero = silo.deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    require(stage in (0, 1, 2, 3), f"{key}.deepspeed.zero_optimization.stage", stage, "0, 1, 2, 3")
    # DeepSpeed 0.19 reorders the parameters, but not where it says that their fp32 values are.
    turns = zero.get("round_robin_gradients", False)
    allowed = "false, at ZeRO stages 1 and 2"
    require(not turns or stage in (0, 3), f"{key}.deepspeed.zero_optimization.round_robin_gradients", turns, allowed)
    require(silo.attention != "documents" or masked, f"{key}.attention", "documents", "with document_masking=true")
    require(not (silo.compile and stage == 3), f"{key}.compile", True, "false at ZeRO stage 3; true at 0, 1 and 2")
    again, every = silo.activation_checkpointing, silo.activation_checkpointing_every
    fits = again in ("none", "layers") or (again == "selective" and stage < 3)  # there gathers differ between passes
    require(fits, f"{key}.activation_checkpointing", again, "none, layers, and selective at ZeRO stages 0, 1 and 2")
    fits = every == 1 or (every > 1 and again != "none")
    require(fits, f"{key}.activation_checkpointing_every", every, "1, or with layers or selective more")
    allowed = f"up to num_nodes {silo.num_nodes}"
    require(silo.min_nodes <= silo.num_nodes, f"{key}.min_nodes", silo.min_nodes, allowed)
    for num_nodes in (silo.fewest_nodes, silo.num_nodes):
        accumulation_steps(name, silo, num_nodes * silo.processes_per_node)


def _check_deepspeed(given: dict[str, Any], key: str, section: str) -> None:
    """Refuse keys that DeepSpeed would pass over in silence, or with a traceback."""
    for name, value in given.items():
        if name not in KNOWN[section]:
            near = get_close_matches(str(name), KNOWN[section], n=1) or KNOWN[section][:8]
            raise ConfigError(f"{key}.{name}: unknown key given; allowed: DeepSpeed's, such as {', '.join(near)}")
        inner = f"{section}.{name}" if section else name
        if inner in KNOWN:
            require(isinstance(value, dict), f"{key}.{name}", value, "a section of keys and values")
            _check_deepspeed(value, f"{key}.{name}", inner)


def accumulation_steps(name: str, silo: SiloConfig, num_ranks: int) -> int:
    """What a silo's configuration says, or what follows: global batch = micro batch x accumulation x ranks.

    Raises ConfigError, with all four numbers, or the numbers of ranks that divide the batch.
    """
    whole, micro, accumulation = silo.global_batch_sequences, silo.micro_batch_sequences, silo.accumulation_steps
    given = f"silos.{name}.global_batch_sequences: {whole} given"
    if not accumulation and whole % (micro * num_ranks):
        sizes = [str(ranks) for ranks in range(1, whole + 1) if whole % (micro * ranks) == 0]
        raise ConfigError(
            f"{given} with {num_ranks} ranks and micro_batch_sequences {micro}; allowed: a multiple of "
            f"{micro * num_ranks}" + (f", or one of these numbers of ranks: {', '.join(sizes)}" if sizes else "")
        )
    if accumulation and whole != micro * accumulation * num_ranks:
        raise ConfigError(
            f"{given}; allowed: micro_batch_sequences {micro} x accumulation_steps {accumulation} x ranks {num_ranks} "
            f"= {micro * accumulation * num_ranks}; with accumulation_steps 0 it follows from the others"
        )
    return accumulation or whole // (micro * num_ranks)
