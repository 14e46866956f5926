"""How long a run will take: what a sync costs on a given link, and for how long training stands still for it.

docs/plan.md has the model, its constants, and how far it was from what was measured.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.outer.schedule import Schedule
from pretrain.outer.state import kept_kinds
from pretrain.plan.bytes import Shapes, Traffic, model_shapes, traffic, vocabulary
from pretrain.silo.cards import PEAK_TFLOPS
from pretrain.silo.flops import flops_per_token
from pretrain.silo.model import build_without_memory

UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
# Of a full Ethernet frame of 1,514 bytes, TCP with timestamps carries 1,448.
PAYLOAD_SHARE = 1448 / 1514

# Seconds for each element that a version changes: 65 million parameters and more, two cores, files on a local disk,
# int4. An earlier run (`work_factor`) scales all of them.
DELIVER_SECONDS, ADOPT_SECONDS = 1e-9, 1e-9  # out of and into the engine: nothing hides it
CODE_SECONDS, DECODE_SECONDS = 2e-9, 2e-9
MERGE_SECONDS, MERGE_SILO_SECONDS = 3e-9, 1.5e-9  # the outer step and its files; each delivery
STATE_SECONDS = 2e-9  # each kind of outer state in a collective
DISK_SECONDS = 7e-9  # each kind of what is in files of the aggregator: parameters, and outer state

# Requests that wait for one another: of a silo, of the aggregator for each silo, and for itself.
SILO_TRIPS, VERIFY_TRIPS, COMMIT_TRIPS = 10, 4, 8
WORDS, WORD_SECONDS = 2, 0.01  # what all silos of a collective tell all about a version, and how long until it is seen

MAX_ROUNDS = 50  # that are gone through; later ones are like these


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a plan is told beside the configuration."""

    link_bits_per_second: float
    """Of a silo's link, in each direction."""
    latency_seconds: float
    """There and back: from a silo, or the aggregator, to the store; in a collective, from silo to silo. With a
    `work_factor` what the link adds to the earlier run's."""
    tokens_per_second: Mapping[str, float]
    """What each silo of the configuration trains on while it trains."""
    work_factor: float = 1.0
    """Times as long as the constants say for coding, merging, checksums and files."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The run in seconds; evaluations and checkpoints are in none of them."""

    sync_seconds: float
    """Of the largest fragment, from its delivery to its adoption, with nothing else on the link."""
    link_seconds: float
    """Of these, the payload's on the link."""
    seconds: float
    """Of the run."""
    utilisation: float
    """Training over training and waiting, all silos together."""


def parse_bandwidth(text: str) -> float:
    """Bits per second of `100mbit`, `2.5gbit`, as tc writes them. Raises ConfigError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmgt]?bit)", text.strip().lower())
    if not found or not float(found[1]):
        raise ConfigError(f"--bandwidth: {text!r} given; allowed: a number and its unit, {', '.join(UNITS)}: 100mbit")
    return float(found[1]) * UNITS[found[2]]


def card_speeds(config: RunConfig, card: str, mfu: float) -> dict[str, float]:
    """Tokens per second of each silo, if each of its ranks makes use of the share `mfu` of the peak of such a card.

    Raises ConfigError for a card, or a model, of which nothing is known.
    """
    if card not in PEAK_TFLOPS:
        names = get_close_matches(card, PEAK_TFLOPS, n=3, cutoff=0.3) or ["NVIDIA H100 80GB HBM3"]
        raise ConfigError(f"--card: {card!r} given; allowed: a name that torch has for one, such as {', '.join(names)}")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu: {mfu:g} given; allowed: above 0, to 1")
    operations = flops_per_token(build_without_memory(config.model, vocabulary(config)), config.sequence_tokens)
    if operations is None:
        raise ConfigError(
            f"--card: {card!r} given; of this type of model it is not known what a token takes; allowed: "
            "--tokens-per-second"
        )
    one = mfu * PEAK_TFLOPS[card] * 1e12 / operations
    return {name: one * silo.num_nodes * silo.processes_per_node for name, silo in config.silos.items()}


def run_pace(config: RunConfig, shapes: Shapes, given: Given) -> Pace:
    """Go through the run as its silos do: the slowest sets the pace, and the others wait for it."""
    moved = traffic(config, shapes, next(iter(config.silos)))
    stages = [_stage_seconds(config, one, given) for one in moved]
    work = [one.num_elements * given.work_factor for one in moved]
    engine = [(DELIVER_SECONDS * elements, ADOPT_SECONDS * elements) for elements in work]
    steps = step_seconds(config, given)
    slowest, num_steps = max(steps.values()), config.inner.num_steps
    rounds = min(config.num_rounds, MAX_ROUNDS)
    part = dataclasses.replace(config.schedule, num_steps=rounds * config.outer.sync_interval_steps)
    waiting = _waiting_seconds(part, stages, engine, slowest) * config.num_rounds / rounds
    seconds = slowest * num_steps + waiting
    # With steps by speed, all train as long as the slowest.
    training = [slowest if config.membership.steps == "speed" else one for one in steps.values()]
    largest = max(range(len(moved)), key=lambda fragment: moved[fragment].num_elements)
    return Pace(
        sync_seconds=sum(stages[largest]) + sum(engine[largest]),
        link_seconds=sum(_link_seconds(moved[largest], given)),
        seconds=seconds,
        utilisation=statistics.mean(training) * num_steps / seconds,
    )


def step_seconds(config: RunConfig, given: Given) -> dict[str, float]:
    """Of an inner step of each silo of the configuration."""
    return {
        name: silo.global_batch_sequences * config.sequence_tokens / given.tokens_per_second[name]
        for name, silo in config.silos.items()
    }


def work_factor(config: RunConfig, wait_seconds: Sequence[float]) -> float:
    """How many times as long as the constants say the work of an earlier run took, by its waits for each version.

    1 where they do not tell: with overlap, or with nothing waited for. Its link is taken for a fast one.
    """
    if config.outer.overlap_steps or not wait_seconds:
        return 1.0
    shapes, rate = model_shapes(config, vocabulary(config)), dict.fromkeys(config.silos, 1.0)

    def expected(factor: float) -> float:
        given = Given(link_bits_per_second=math.inf, latency_seconds=0.0, tokens_per_second=rate, work_factor=factor)
        return run_pace(config, shapes, given).sync_seconds

    return max(0.0, statistics.median(wait_seconds) - expected(0.0)) / (expected(1.0) - expected(0.0))


def _stage_seconds(config: RunConfig, moved: Traffic, given: Given) -> list[float]:
    """What a version goes through one after another; each stage takes one version at a time.

    In the store: coding, the link up, the aggregator, the link down, decoding. In a collective one thread does all
    behind coding.
    """
    outer, exchange, num_silos = config.outer, config.exchange, len(config.full_roster)
    work, latency, elements = given.work_factor, given.latency_seconds, moved.num_elements
    before, after = _link_seconds(moved, given)
    num_kinds = len(kept_kinds(outer.optimizer, outer.downlink_codec))
    state = STATE_SECONDS * num_kinds if exchange.kind == "collective" else 0.0  # a store's is written beside training
    state += DISK_SECONDS * (1 + num_kinds) if outer.state == "disk" else 0.0
    merging = (MERGE_SECONDS + MERGE_SILO_SECONDS * num_silos + state) * elements
    code, decode = CODE_SECONDS * elements * work, DECODE_SECONDS * elements * work
    if exchange.kind == "collective":
        trips = WORDS * (num_silos + 3) + 2
        words = WORDS * WORD_SECONDS + trips * latency
        return [code, before + after + words + merging / num_silos * work + decode]
    # Aggregator and silo each look once in poll_seconds: half of it on the average.
    poll = exchange.poll_seconds / 2
    trips = VERIFY_TRIPS * num_silos + COMMIT_TRIPS
    return [
        code,
        before + SILO_TRIPS / 2 * latency,
        merging * work + trips * latency + poll,
        after + SILO_TRIPS / 2 * latency + poll,
        decode,
    ]


def _link_seconds(moved: Traffic, given: Given) -> list[float]:
    """Of the payload before the merge and after it; both directions of the link are used at once."""
    return [8 * max(phase) / given.link_bits_per_second / PAYLOAD_SHARE for phase in (moved.before, moved.after)]


def _waiting_seconds(
    schedule: Schedule, stages: Sequence[Sequence[float]], engine: Sequence[tuple[float, float]], step_seconds: float
) -> float:
    """For how long training stands still in the run."""
    clock, step, free = 0.0, 0, [0.0] * len(stages[0])
    ready: dict[int, float] = {}
    for at, what, version in _events(schedule):
        clock, step = clock + (at - step) * step_seconds, at
        fragment = schedule.fragment(version)
        deliver_seconds, adopt_seconds = engine[fragment]
        if what == "adopt":
            clock = max(clock, ready.pop(version)) + adopt_seconds
            continue
        clock += deliver_seconds
        done = clock
        for number, seconds in enumerate(stages[fragment]):
            free[number] = done = max(done, free[number]) + seconds
        ready[version] = done
    return clock - schedule.num_steps * step_seconds


def _events(schedule: Schedule) -> Iterator[tuple[int, str, int]]:
    """Step, what and version of all that a silo does, in its order."""
    versions = range(1, schedule.num_versions + 1)
    sent = adopted = 0
    for step in sorted({of(version) for version in versions for of in (schedule.sent, schedule.adopted)}):
        for what, version in schedule.due(step, sent=sent, adopted=adopted):
            sent, adopted = (version, adopted) if what == "deliver" else (sent, version)
            yield step, what, version
