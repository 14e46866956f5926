"""What `atoll eval` evaluates, and what a member publishes of it: a signed word in the store, as its silo's own are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.config.load import CONFIG_FILE, load_config
from pretrain.config.paths import expand_home
from pretrain.exchange.options import store_options
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import LABEL, Evaluation
from pretrain.federation.export import (
    exported_digest,
    load_exported_adapter,
    load_global_model,
    provenance_of,
)
from pretrain.federation.held_out import SplitLoss, evaluate_model
from pretrain.federation.preflight import check_policy
from pretrain.federation.reading import MODEL_CONFIG, check_not_given, exported, found_configuration
from pretrain.silo.model import load_checkpoint
from pretrain.silo.peft_directory import CONFIG as ADAPTER_CONFIG
from pretrain.silo.shards import template_sha256, tokenizer_sha256
from pretrain.silo.template import own_template, sha256_of
from pretrain.trust.contract import TEMPLATE, build_contract, check_same_contract, read_contract
from pretrain.trust.ledger import RefusedError
from pretrain.trust.members import with_keys

TOKENIZER_FILE = "tokenizer.json"


@dataclass(kw_only=True)
class Subject:
    """A model that is to be evaluated."""

    provenance: dict[str, Any]
    """Where it comes from; see export.py."""
    load: Callable[[], nn.Module]
    digest: Callable[[], str]
    """Of its parameters, as a commit has it."""
    sequence_tokens: int | None
    """Of its training sequences, if that is known."""
    tokenizer_file: Path
    template_file: Path | None = None
    """Its chat template, where that is another file than the tokenizer's folder has."""
    template: str | None = None
    """sha256 of its chat template's text; None: it has none."""
    directory: Path | None = None
    """Where it lies, if it was exported."""
    is_fresh: bool = False
    """Whether its run began with fresh weights, if it is a run's."""
    held_out: dict[str, Path] = field(default_factory=dict)
    """Corpus to the packed split of this machine's silos, if it is a run's; SILO/CORPUS where several have one."""

    def losses(self, splits: Mapping[str, Path], **options: Any) -> dict[str, SplitLoss]:
        """`evaluate_model` of it; conversations are of its own template, unless `options` have another one's sha256."""
        options = {"template": self.template} | options
        return evaluate_model(self.load, splits, self.provenance, tokenizer_sha256(self.tokenizer_file), **options)


def open_subject(
    where: str,
    *,
    version: int | None = None,
    paths: Sequence[Path] = (),
    tokenizer: Path | None = None,
    base: Path | None = None,
    publishes: bool = False,
) -> Subject:
    """The model of an exported directory, of a run directory, or of the store at a URL; of an adapter with its `base`.

    `paths` are of the reader's own configuration, or with `publishes` of the silo's that will sign. Raises ConfigError.
    """
    is_unused = paths and not publishes
    options = {"--version": version is not None, "--config": is_unused, "--tokenizer": tokenizer}
    run = Path(expand_home("model", where))
    if (run / ADAPTER_CONFIG).is_file() and not (run / MODEL_CONFIG).is_file():
        check_not_given(where, options)
        if base is None:
            raise ConfigError(f"--base: none given, and {where!r} is an adapter; allowed: its base's directory")
        return _of_directory(run, partial(load_exported_adapter, run, Path(expand_home("--base", str(base)))))
    if base:
        raise ConfigError(f"--base: given with {where!r}; allowed: with an adapter (atoll export --adapter)")
    if directory := exported(where, options=options):
        return _of_directory(directory, partial(load_checkpoint, directory, key="model"))
    own = () if publishes and (run / CONFIG_FILE).is_file() else paths
    try:
        config = found_configuration(where, paths=own, tokenizer=tokenizer)
    except ConfigError as error:
        if run.is_dir() or "://" in where:
            raise
        allowed = "an exported directory (see atoll export), a run directory, or the URL of a store"
        raise ConfigError(f"model: {where!r} given; allowed: {allowed}") from error
    model, provenance = load_global_model(config, version)
    return Subject(
        provenance=provenance,
        load=lambda: model,
        digest=lambda: str(provenance["parameters_digest"]),
        sequence_tokens=config.sequence_tokens,
        tokenizer_file=config.tokenizer_file,
        template_file=config.template_file,
        template=_template_of(config),
        is_fresh=not config.model.checkpoint,
        held_out=_held_out(config),
    )


def _template_of(config: RunConfig) -> str | None:
    """sha256 of a run's template: its own file's, or what the contract says, where the store alone is known."""
    if config.template_file:
        return template_sha256(config.template_file)
    if config.exchange.kind == "none":
        return None
    url = config.ledger_url(min(config.silos))
    contract = StoreExchange(url, options=store_options(config.exchange, url)).read_contract()
    return read_contract(contract, url)[0].get(TEMPLATE) if contract else None


def _of_directory(directory: Path, load: Callable[[], nn.Module]) -> Subject:
    provenance, template = provenance_of(directory), own_template(directory / TOKENIZER_FILE, key="model")
    return Subject(
        provenance=provenance,
        load=load,
        digest=lambda: exported_digest(directory),
        sequence_tokens=provenance.get("sequence_tokens"),
        tokenizer_file=directory / TOKENIZER_FILE,
        template=sha256_of(template[0]) if template else None,
        directory=directory,
    )


def _held_out(config: RunConfig) -> dict[str, Path]:
    """Corpus to split, of all silos of this machine."""
    places = [(silo, *one) for silo, found in config.silos.items() for one in found.valid.items()]
    several = {c for _, c, place in places if any(c == other and place != there for _, other, there in places)}
    return {f"{silo}/{corpus}" if corpus in several else corpus: Path(place) for silo, corpus, place in places}


class Publisher:
    """Says as a silo in its federation's store what it has found."""

    def __init__(self, where: str, silo: str, label: str, paths: Sequence[Path]) -> None:
        """`label` is what a model beside the run is called; empty: it is a version of the run's.

        Raises ConfigError, before anything is evaluated, for who may not, and where a contract or a policy forbids it.
        """
        if not paths and not (Path(expand_home("store", where)) / CONFIG_FILE).is_file():
            raise ConfigError(
                f"--config: none given, and {where!r} is no run directory; allowed with --publish: the signing silo's"
            )
        self._config = config = with_keys(load_config(paths), make=False) if paths else found_configuration(where)
        if config.exchange.kind != "store":
            allowed = "that of a silo which trains through a 'store'"
            raise ConfigError(f"--publish: given with exchange.kind={config.exchange.kind!r}; allowed: {allowed}")
        if label and not LABEL.fullmatch(label):
            raise ConfigError(f"--label: {label!r} given; allowed: {LABEL.pattern}")
        silos = sorted(config.silos)
        if silo not in silos and (silo or len(silos) != 1):
            raise ConfigError(f"--silo: {silo or 'none'} given; allowed with --publish: {named(silos)}")
        self._silo, self._label, policy = silo or silos[0], label, check_policy(config)
        if not policy.allows_metric("held_out"):
            who = policy.file if config.trust.metrics["held_out"] != "member" else "trust.metrics in the contract"
            raise ConfigError(f"--publish: given; {who} keeps held_out with its silo; allowed: without")
        self._tells_tokens = policy.allows_metric("tokens")
        self._exchange = StoreExchange.of_run(config)
        if (stored := self._exchange.read_contract()) is None:
            raise ConfigError(f"exchange.url: {config.store_url} given; there is no run in it (no contract.json)")
        check_same_contract(build_contract(config), stored, config.store_url)
        self._exchange.speak_as(config, self._silo)

    @property
    def held_out(self) -> dict[str, Path]:
        """Corpus to the silo's own packed split."""
        return {corpus: Path(place) for corpus, place in self._config.silos[self._silo].valid.items()}

    def take(self, subject: Subject) -> None:
        """Know of which model it will be. Raises ConfigError, without a label, for what is no version of the run."""
        self._version, self._digest = None, subject.digest()
        self._tokens = _tokens(subject.provenance) if self._label and self._tells_tokens else None
        if self._label:
            return
        version, newest = subject.provenance.get("version"), self._exchange.newest_version()
        self._version = version if type(version) is int and 0 <= version <= newest else None
        if self._version is None or self._digest_of(self._version) != self._digest:
            what = f"this model is none of the versions 0 to {newest} of {self._config.name}"
            raise ConfigError(f"--label: none given; {what}; allowed: a label, as of a model beside the run")

    def _digest_of(self, version: int) -> str:
        try:
            return self._exchange.read_commit(version).parameters_digest
        except RefusedError as error:
            raise ConfigError(f"--publish: given with {self._config.store_url!r}; {error}") from None

    def publish(self, found: Mapping[str, SplitLoss]) -> str:
        """Leave word of the losses by corpus; returns its name in the store. Raises ConfigError."""
        evaluation = Evaluation(
            version=self._version,
            label=self._label,
            parameters_digest=self._digest,
            losses={corpus: one.loss for corpus, one in found.items()},
            sequences={corpus: one.num_sequences for corpus, one in found.items()},
            tokens=self._tokens,
        )
        try:
            name = self._exchange.tell_evaluation(self._silo, evaluation)
        except RefusedError as error:
            raise ConfigError(f"--publish: given with {self._config.store_url!r}; {error}") from None
        self._exchange.objects.close_egress()
        return name


def _tokens(provenance: Mapping[str, Any]) -> int | None:
    """That a model was trained on, if its export says so, whoever has written that."""
    told = provenance.get("tokens")
    counts = [count for count in told.values() if type(count) is int and count > 0] if isinstance(told, dict) else []
    return sum(counts) or None
