"""The federations that benchmarks/leaks.py trains and attacks: what they train on, and how they differ."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.leak_audit import Designed, design, plant
from benchmarks.leak_texts import REFERENCE, Canary, make_canaries, write_texts
from data_tools.corpora import write_python_corpora
from launch.demo import SETTINGS, prepare_text
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config
from pretrain.silo.data import PackedTokens

RUN = [
    "inner.num_steps=100",
    "inner.warmup_steps=10",
    "outer.sync_interval_steps=20",
    "silo.eval_interval_rounds=0",
    "silo.checkpoint_interval_steps=1000000",
    "silo.log_interval_steps=20",
    "exchange.keep_versions=1000000",  # the attackers have kept all that ever lay there
    "exchange.poll_seconds=0.05",
    "wandb.mode=disabled",
]
PLANTED = "-planted"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One run that is attacked: its name, and how it differs."""

    name: str
    num_silos: int
    overrides: tuple[str, ...] = ()
    part: str = ""
    """The part of their corpora that its silos train on, as their folders' names end."""


def parse_column(text: str, num_silos: int, overrides: Sequence[str]) -> Column:
    """NAME:key=value,key=value, where silos=N is the number of silos. Raises ConfigError."""
    name, colon, rest = text.partition(":")
    changes = re.split(r",(?=[A-Za-z0-9_.]+=)", rest)
    if not (name and colon and all("=" in change for change in changes)):
        raise ConfigError(f"--with: {text!r} given; allowed: NAME:key=value,key=value")
    for change in [change for change in changes if change.startswith("silos=")]:
        if not (number := change.removeprefix("silos=")).isdecimal() or int(number) < 2:
            raise ConfigError(f"--with: {change!r} given; allowed: silos=2 or more")
        num_silos = int(number)
        changes.remove(change)
    return Column(name=name, num_silos=num_silos, overrides=(*overrides, *changes))


@dataclass(frozen=True, kw_only=True)
class Text:
    """What the runs train on."""

    packed: dict[str, Path]
    """Of every corpus and its other parts."""
    tokenizer: Path
    corpora: list[str]
    """The attacked silo's first."""
    canaries: dict[str, list[Canary]]
    """Of each silo."""
    directory: Path
    """Where it lies, and the runs that train on it."""
    designed: dict[str, Designed] = field(default_factory=dict)
    """Of each silo, the canaries that are made to be remembered; the packed split of a silo `-planted` has them."""
    seed: int = 0
    """Of weights, order of text and canaries."""

    @property
    def num_planted(self) -> int:
        """Of these, in every silo's text; they come first in it."""
        return len(self.designed[self.corpora[0]].inside) if self.designed else 0

    def attacked(self, silo: str) -> "Text":
        """The same, with another silo attacked."""
        return dataclasses.replace(self, corpora=[silo, *(name for name in self.corpora if name != silo)])

    def config(self, column: Column) -> RunConfig:
        """The configuration of a run, whose directory is another one for other settings."""
        if column.num_silos > len(self.corpora):
            raise ConfigError(f"silos: {column.num_silos} given; allowed: up to {len(self.corpora)}, one a corpus")
        silos = sorted(self.corpora[: column.num_silos])
        planted = [self.num_planted] if self.num_planted and not column.part else []
        digest = hashlib.sha256(json.dumps([silos, column.overrides, column.part, *planted]).encode()).hexdigest()[:8]
        run = self.directory / f"{re.sub(r'[^A-Za-z0-9]+', '-', column.name)}-{digest}"
        here = [f"directory={json.dumps(str(run))}", f"tokenizer={json.dumps(str(self.tokenizer))}"]
        for name in silos:
            packed = self.packed[name + column.part]
            before = [str(self.packed[name + PLANTED])] if planted else []
            silo = {"data": [*before, str(packed / "train")], "valid": {name: str(packed / "valid")}}
            here.append(f"silos.{name}={json.dumps(silo)}")
        seeds = [f"model.seed={self.seed}", f"silo.data_seed={self.seed}"] if self.seed else []
        return load_config([SETTINGS], [*RUN, *here, *seeds, *column.overrides])


def corpora_in(corpora: Path | None, directory: Path, silos: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder of corpora, and which are attacked: the first one unless some are given. Raises ConfigError."""
    if corpora is None:
        write_python_corpora(directory / "python")
        corpora = directory / "python"
    folders = sorted(path.name for path in corpora.iterdir() if path.is_dir()) if corpora.is_dir() else []
    if len(folders) < 2:
        raise ConfigError(
            f"--corpora: {str(corpora)!r} given; allowed: a folder of two folders or more with train.jsonl"
        )
    for silo in silos:
        if silo not in folders:
            raise ConfigError(f"--silo: {silo!r} given; allowed: {', '.join(folders)}")
    return corpora, list(silos) or folders[:1]


def make_text(
    corpora: Path, directory: Path, *, num_characters: int, num_canaries: int, num_planted: int = 0, seed: int = 0
) -> Text:
    """Corpora dealt out, tokenizer and packed shards in a folder of their own below `directory`; what is there is kept.

    Raises ConfigError.
    """
    names = sorted(path.name for path in corpora.iterdir() if path.is_dir())
    of_silos = {name: len(names) * seed + number for number, name in enumerate(names)}
    canaries = {name: make_canaries(num_canaries, seed=of) for name, of in of_silos.items()}
    own = directory / f"{num_characters}-characters-{num_canaries}-canaries{f'-seed-{seed}' if seed else ''}"
    if not (own / "corpora").is_dir():
        write_texts(corpora, own / "corpora", num_characters=num_characters, canaries=canaries)
    packed, tokenizer = prepare_text(own, own / "corpora")
    designed = {}
    for name in names if num_planted else ():
        text, passages = split_of(packed[name]), split_of(packed[f"{name}-{REFERENCE}"])
        designed[name] = design(text, passages, num_planted, seed=of_silos[name])
        packed[name + PLANTED] = own / f"{num_planted}-planted" / name
        plant(designed[name].inside, text, packed[name + PLANTED])
    return Text(
        packed=packed,
        tokenizer=tokenizer,
        corpora=names,
        canaries=canaries,
        directory=own,
        designed=designed,
        seed=seed,
    )


def split_of(packed: Path) -> PackedTokens:
    """What a silo trains on, of one packed corpus."""
    return PackedTokens([packed / "train"], sequence_tokens=load_config([SETTINGS], ["silos.any={}"]).sequence_tokens)
