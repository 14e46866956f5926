"""How much text a silo has, how often a run reads it, and what would start."""

from collections.abc import Sequence
from pathlib import Path

from launch.show.report import format_count
from pretrain.config.check import accumulation_steps
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.silo.shards import Manifest, count_sequences, own_tokens, read_manifest


def epochs(config: RunConfig, silo: str) -> tuple[int, float]:
    """Tokens of a silo's text, and how many times a whole run reads them. Raises ConfigError without any."""
    settings, manifests = config.silos[silo], _manifests(config, silo)
    num_tokens, in_rows = sum(manifest.num_tokens for manifest in manifests), all(one.chat for one in manifests)
    own = own_tokens(config.sequence_tokens, config.model.adapter.prompt_tokens, in_rows=in_rows)
    return num_tokens, config.inner.num_steps * settings.global_batch_sequences * own / num_tokens


def num_sequences(config: RunConfig, silo: str) -> int:
    """Whole sequences of a silo's text, and rows of its conversations. Raises ConfigError without any."""
    manifests, prompt_tokens = _manifests(config, silo), config.model.adapter.prompt_tokens
    return sum(
        count_sequences(
            sum(manifest.num_tokens for manifest in manifests if bool(manifest.chat) == in_rows),
            own_tokens(config.sequence_tokens, prompt_tokens, in_rows=in_rows),
            in_rows=in_rows,
        )
        for in_rows in (False, True)
    )


def _manifests(config: RunConfig, silo: str) -> list[Manifest]:
    key, data = f"silos.{silo}.data", config.silos[silo].data
    if not data:
        raise ConfigError(f"{key}: [] given; allowed: at least one directory of packed shards")
    return [read_manifest(Path(place), key=key) for place in data]


def what_would_start(config: RunConfig, silos: Sequence[str], *, aggregator: bool) -> str:
    """A line for each process or silo. Raises ConfigError for a silo without text."""
    lines = []
    if aggregator and config.exchange.kind == "store":
        rounds = f"{config.num_rounds:,} rounds of H = {config.outer.sync_interval_steps:,}"
        lines.append(f"aggregator: {rounds}, {len(config.full_roster)} silos, in {config.store_url}")
    for name in silos:
        settings = config.silos[name]
        ranks = settings.num_nodes * settings.processes_per_node
        batch = f"{settings.micro_batch_sequences} x {ranks} x {accumulation_steps(name, settings, ranks)}"
        num_tokens, times = epochs(config, name)
        lines.append(
            f"{name}: {ranks} process{'es' if ranks > 1 else ''}, batch {batch} = {settings.global_batch_sequences:,} "
            f"sequences of {config.sequence_tokens:,}; reads its {format_count(num_tokens)} tokens {times:.2f} times"
        )
    return "\n".join([*lines, "dry run: nothing was started"])
