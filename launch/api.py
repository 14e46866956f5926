"""Atoll from Python: a run or a store, its commits and metrics as pandas tables, its model (docs/python.md).

    from launch import api

    run = api.open_run("runs/demo")
    run.commits()
    run.metrics("step").groupby("silo")["loss"].last()
    model, tokenizer = run.model()

Everything is read as the commands read it: hashes and signatures are checked, and a mistake is a ConfigError of a line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.show.run import Run as Recorded
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import CONFIG_FILE, load_run
from pretrain.config.paths import expand_home
from pretrain.exchange.options import reached, store_options
from pretrain.exchange.store import StoreExchange
from pretrain.trust.ledger import Commit, RefusedError

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ConfigError", "Run", "open_run"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, seen from its directory, or from its store alone."""

    where: str
    """A run directory, or the URL of a store."""
    tokenizer: Path | None = None
    """The run's tokenizer.json: what the model of a store needs; of a run directory none."""
    configs: tuple[Path, ...] = ()
    """Or YAML files of this site's own, where the store is sealed or goes on from a checkpoint."""

    def commits(self) -> "pd.DataFrame":
        """A row a version, from 0: its round, how many silos, tokens, divisor, digest, and what the commit tells.

        Raises ConfigError for a run without commits, or a chain that is damaged.
        """
        agreed, commits = self._commits()
        return _table(
            commit.metrics
            | {
                "version": commit.version,
                "round": agreed.round_of(commit.version),
                "silos": len(commit.contributors),
                "tokens": sum(one.tokens for one in commit.contributors),
                "divisor": commit.divisor,
                "parameters_digest": commit.parameters_digest,
            }
            for commit in commits
        )

    def contributions(self) -> "pd.DataFrame":
        """A row a silo and version: delivered_for (another if it came late), tokens, steps, weight, and its share."""
        _, commits = self._commits()
        return _table(
            {
                "version": commit.version,
                "silo": one.silo,
                "delivered_for": one.version,
                "tokens": one.tokens,
                "tokens_total": one.tokens_total,
                "steps": one.steps,
                "weight": one.weight,
                "share": one.weight / commit.divisor,
            }
            for commit in commits
            for one in commit.contributors
        )

    def metrics(self, kind: str) -> "pd.DataFrame":
        """A row a record of metrics.jsonl of one kind (step, sync, eval, commit, ...), each once, in order.

        What a record has by corpus is a column each: val_loss/law. Raises ConfigError for a store alone, whose members
        keep such records to themselves, and for a kind that there is none of.
        """
        import pandas as pd

        if not self._is_directory:
            raise ConfigError(f"metrics: {self.where!r} given; allowed: a run directory, which has metrics.jsonl")
        records = Recorded.read(Path(expand_home("run", self.where))).records
        if not records.get(kind):
            there = ", ".join(name for name, found in records.items() if found)
            raise ConfigError(f"kind: {kind!r} given; allowed here: {there or 'none, as nothing was recorded'}")
        return pd.json_normalize(records[kind], sep="/").drop(columns="kind")

    def model(self, version: int | None = None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The fp32 model of a version (None: the newest), on the CPU, and its tokenizer. Raises ConfigError."""
        from pretrain.federation.export import load_global_model
        from pretrain.federation.reading import found_configuration
        from pretrain.silo.exported import with_tokenizer

        config = found_configuration(self.where, paths=self.configs, tokenizer=self.tokenizer)
        model, _ = load_global_model(config, version)
        return model, with_tokenizer(model, config.tokenizer_file, config.template_file)  # type: ignore[return-value]

    @property
    def _is_directory(self) -> bool:
        return (Path(expand_home("run", self.where)) / CONFIG_FILE).is_file()

    def _commits(self) -> tuple[RunConfig, list[Commit]]:
        """The contract's terms as a configuration, and all commits of the chain, checked."""
        from pretrain.federation.join import read_terms

        url, options = self._place()
        exchange = StoreExchange(url, options=options)
        contract = exchange.read_contract()
        if contract is None:
            raise ConfigError(f"run: {self.where!r} given; there is no contract.json, so no run, in {url}")
        try:
            commits = exchange.read_commits(0, exchange.newest_version())
        except RefusedError as error:
            raise ConfigError(f"run: {self.where!r} given; {error}") from None
        return read_terms(contract, url, of_collective=True)[3], commits

    def _place(self) -> tuple[str, dict[str, Any]]:
        if self._is_directory:
            config = load_run(Path(expand_home("run", self.where)))
            if config.exchange.kind == "none":
                raise ConfigError(f"run: {self.where!r} given; its silos train alone, so it has no commits")
            url = config.ledger_url(min(config.silos, default=""))
            return url, store_options(config.exchange, url)
        url, exchange = reached(self.where)
        return url, store_options(exchange, url)


def open_run(where: str | Path, *, tokenizer: str | Path | None = None, configs: Sequence[str | Path] = ()) -> Run:
    """A run by its directory or by the URL of its store; nothing is read yet. See `Run` for what else may be needed."""
    return Run(
        where=str(where),
        tokenizer=Path(tokenizer) if tokenizer else None,
        configs=tuple(Path(path) for path in configs),
    )


def _table(rows: Any) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(list(rows))
