"""A run as its directory holds it: configuration, records, held-out losses."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from launch.show.metrics import MetricsReader, Record, last_of_each
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_run
from pretrain.trust.policy import is_public, read_policy


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

    def rollbacks_at(self, where: str) -> list[float]:
        """Where the run was rolled back to: on an axis of its `step`, `round` or `tokens`, of all silos together."""
        found = self.records["rollback"]
        if where == "tokens":
            return [sum(self.tokens_at(silo, record["step"]) for silo in self.silos) for record in found]
        return [float(record[where]) for record in found]

    def tokens_at(self, silo: str, step: int) -> float:
        """Tokens that a silo had trained on after a step of the schedule, between what it told of steps around it."""
        told = [(one["step"], one["tokens"]) for kind in ("start", "step") for one in self.of_silo(kind, silo)]
        before = max((one for one in told if one[0] <= step), default=(0, 0))
        after = min((one for one in told if one[0] > step), default=before)
        share = (step - before[0]) / (after[0] - before[0]) if after != before else 0.0
        return float(before[1] + (after[1] - before[1]) * share)


@dataclass(kw_only=True)
class Evaluation:
    """Held-out loss at one version of the global model."""

    round: int
    """0 is before training."""
    tokens: float
    """Trained on by then, all silos together; NaN: not known, or not told."""
    val_loss: dict[str, float]
    """Corpus to loss in nats, the mean over the silos that evaluated it."""
    sequences: dict[str, str]
    """Corpus to how many of its sequences that is of: "64 of 406"."""

    @property
    def mean(self) -> float:
        """Mean over corpora, in nats."""
        return sum(self.val_loss.values()) / len(self.val_loss)


def evaluations(run: Run) -> list[Evaluation]:
    """One entry per evaluated round, in order; a silo that holds out nothing has evaluated nothing."""
    by_round: dict[int, list[Record]] = defaultdict(list)
    for record in (one for one in run.records["eval"] if one.get("val_loss")):
        by_round[record["round"]].append(record)
    return [_evaluation(run, number, by_round[number]) for number in sorted(by_round)]


def held_out_of(run: RunConfig, version: int | None, personal: Record | None = None) -> dict[str, str]:
    """What this machine's silos have found a version's held-out loss to be (None: the last), in words for a model card.

    Of a `personal` model, by its provenance: what its silo has found with its own adapter, at the step of the export.
    Empty where nothing was evaluated, and without what contract and site do not make public.
    """
    policy = read_policy(run)
    if not (Path(run.directory) / "metrics.jsonl").is_file() or not is_public(run, "held_out"):
        return {}
    found = Run.read(run)
    records = [one for one in found.records["eval"] if version is None or one.get("version") == version]
    if personal:
        of_silo = [one for one in records if (one.get("silo"), one["step"]) == (personal["silo"], personal["step"])]
        records = [one | {"val_loss": one["personal_loss"]} for one in of_silo if "personal_loss" in one]
    if not records:
        return {}
    last = max(one["round"] for one in records)
    told = _evaluation(found, last, [one for one in records if one["round"] == last])
    shows = policy.shows or (lambda name: True)
    return {
        corpus: f"{loss:.4f} (of {told.sequences[corpus]} sequences)"
        for corpus, loss in told.val_loss.items()
        if shows(f"eval/{corpus}")
    }


def _evaluation(run: Run, number: int, records: list[Record]) -> Evaluation:
    losses: dict[str, list[float]] = defaultdict(list)
    sequences: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for corpus, loss in (record.get("val_loss") or {}).items():
            losses[corpus].append(loss)
        for corpus, (evaluated, of) in (record.get("sequences") or {}).items():
            sequences[corpus].add(f"{evaluated} of {of}")
    step = max(record["step"] for record in records)
    told = {str(record.get("silo")): record["tokens"] for record in records if "tokens" in record}
    return Evaluation(
        round=number,
        tokens=sum(told[silo] if silo in told else run.tokens_at(silo, step) for silo in run.silos),
        val_loss={corpus: sum(found) / len(found) for corpus, found in sorted(losses.items())},
        sequences={corpus: ", ".join(sorted(found)) for corpus, found in sorted(sequences.items())},
    )
