"""A run as its directory holds it: configuration, records, held-out losses."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from launch.show.metrics import MetricsReader, Record, last_of_each
from pretrain.config.check import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_run


@dataclass(kw_only=True)
class Run:
    """A run as its directory holds it."""

    directory: Path
    config: RunConfig
    records: dict[str, list[Record]]
    """Records by kind, each once."""

    @classmethod
    def read(cls, run: RunConfig | str | Path) -> "Run":
        """Read a run from its configuration or directory; raises ConfigError if nothing was recorded there."""
        directory = Path(run.directory if isinstance(run, RunConfig) else run)
        path = directory / "metrics.jsonl"
        if not path.is_file():
            raise ConfigError(f"run directory: {str(directory)!r} given; it has no metrics.jsonl, so nothing ran there")
        config = run if isinstance(run, RunConfig) else load_run(directory)
        return cls(directory=directory, config=config, records=last_of_each(MetricsReader(path).read_new()))

    def of_silo(self, kind: str, silo: str) -> list[Record]:
        """The records of one kind from one silo, in order."""
        return [record for record in self.records[kind] if record.get("silo") == silo]

    @property
    def silos(self) -> list[str]:
        """Silos of the roster, then any that wrote metrics without being in this machine's roster."""
        seen = {str(record["silo"]) for record in self.records["step"] if "silo" in record}
        return [*self.config.silos, *sorted(seen - set(self.config.silos))]

    def tokens_at(self, silo: str, step: int) -> float:
        """Tokens that a silo had trained on after `step`; every step has as many."""
        steps = self.of_silo("step", silo)
        return 0.0 if not steps or not steps[-1]["step"] else steps[-1]["tokens"] * step / steps[-1]["step"]


@dataclass(kw_only=True)
class Evaluation:
    """Held-out loss at one version of the global model."""

    round: int
    """0 is before training."""
    tokens: float
    """Trained on by then, all silos together."""
    val_loss: dict[str, float]
    """Corpus to loss in nats, the mean over the silos that evaluated it."""

    @property
    def mean(self) -> float:
        """Mean over corpora, in nats."""
        return sum(self.val_loss.values()) / len(self.val_loss)


def evaluations(run: Run) -> list[Evaluation]:
    """One entry per evaluated round, in order."""
    losses: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    steps: dict[int, int] = defaultdict(int)
    for record in run.records["eval"]:
        steps[record["round"]] = max(steps[record["round"]], record["step"])
        for corpus, loss in (record.get("val_loss") or {}).items():
            losses[record["round"]][corpus].append(loss)
    return [
        Evaluation(
            round=number,
            tokens=sum(run.tokens_at(silo, steps[number]) for silo in run.silos),
            val_loss={corpus: sum(found) / len(found) for corpus, found in sorted(losses[number].items())},
        )
        for number in sorted(losses)
    ]
