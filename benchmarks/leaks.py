"""What an attacker learns of one silo's text from a federation, measured on real runs; docs/privacy.md has the tables.

    python -m benchmarks.leaks [--corpora DIR] [--silo NAME] [--with NAME:key=value,key=value ...] [key=value ...]

DIR is a folder of folders with train.jsonl, each of which is a silo; without it, the text of `atoll demo`. The first
`--silos` of them, the attacked one among them, train the demo's model with its settings and the key=value given; every
`--with` is one more run, with changes of its own (`silos=4` among them: more silos). A run that has finished in the
directory is not repeated. Of each silo's documents a third is what it has, a third is held out, and a third is what the
attacker has, for a model of its own. Into every silo's text go canaries: codes of three digits, said once, 4 and 16
times.

Who attacks: the aggregator, who has the silo's delivery; a member, who has the deliveries, too, where it can open them,
and else all versions and what it sent itself; and whoever has the final model alone.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.leak_attacks import (
    Floats,
    TokensFound,
    advantage,
    auc,
    auc_noise,
    ending_losses,
    exposure,
    find_tokens,
    mean_losses,
    moment_features,
    row_features,
    true_positives,
)
from benchmarks.leak_texts import CODES, HELD_OUT, REFERENCE, REPEATS, Canary, make_canaries, write_texts
from benchmarks.leak_views import Named, Opened, View, check_readable, readable
from benchmarks.runs import finished
from data_tools.corpora import write_python_corpora
from launch.demo import SETTINGS, prepare_text
from launch.start.local import local_commands
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import load_config
from pretrain.federation.export import empty_model
from pretrain.silo.data import Mixture, PackedTokens
from pretrain.silo.vocabulary import read_tokenizer, vocabulary_size
from pretrain.train import open_data
from tests.distributed.federation import warm

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
KINDS = ("tokens", "texts")
BATCH = 64
NUM_SEQUENCES = 512  # of a split, at most
CANARY = "access code of"


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

    def config(self, column: Column) -> RunConfig:
        """The configuration of a run, whose directory is another one for other settings."""
        if column.num_silos > len(self.corpora):
            raise ConfigError(f"silos: {column.num_silos} given; allowed: up to {len(self.corpora)}, one a corpus")
        silos = sorted(self.corpora[: column.num_silos])
        digest = hashlib.sha256(json.dumps([silos, column.overrides, column.part]).encode()).hexdigest()[:8]
        run = self.directory / f"{re.sub(r'[^A-Za-z0-9]+', '-', column.name)}-{digest}"
        here = [f"directory={json.dumps(str(run))}", f"tokenizer={json.dumps(str(self.tokenizer))}"]
        for name in silos:
            packed = self.packed[name + column.part]
            silo = {"data": [str(packed / "train")], "valid": {name: str(packed / "valid")}}
            here.append(f"silos.{name}={json.dumps(silo)}")
        return load_config([SETTINGS], [*RUN, *here, *column.overrides])


def make_text(corpora: Path | None, directory: Path, silo: str, *, num_characters: int, num_canaries: int) -> Text:
    """Corpora dealt out, tokenizer and packed shards in a folder of their own below `directory`; what is there is kept.

    Raises ConfigError.
    """
    if corpora is None:
        write_python_corpora(directory / "python")
        corpora = directory / "python"
    folders = sorted(path.name for path in corpora.iterdir() if path.is_dir()) if corpora.is_dir() else []
    if len(folders) < 2:
        raise ConfigError(
            f"--corpora: {str(corpora)!r} given; allowed: a folder of two folders or more with train.jsonl"
        )
    attacked = silo or folders[0]
    if attacked not in folders:
        raise ConfigError(f"--silo: {silo!r} given; allowed: {', '.join(folders)}")
    names = [attacked, *(name for name in folders if name != attacked)]
    canaries = {name: make_canaries(num_canaries, seed=number) for number, name in enumerate(folders)}
    own = directory / f"{num_characters}-characters-{num_canaries}-canaries"
    if not (own / "corpora").is_dir():
        write_texts(corpora, own / "corpora", num_characters=num_characters, canaries=canaries)
    packed, tokenizer = prepare_text(own, own / "corpora")
    return Text(packed=packed, tokenizer=tokenizer, corpora=names, canaries=canaries, directory=own)


class Attacked:
    """One silo of a finished run, and what it really trained on."""

    def __init__(self, config: RunConfig, silo: str, attacker: str) -> None:
        """`attacker` is the silo that attacks."""
        self.config, self.silo, self.attacker = config, silo, attacker
        self.run, self.last = Path(config.directory), config.num_rounds
        self.operator = Opened(self.run, OPERATOR)

    @cached_property
    def can_read(self) -> bool:
        """Whether the attacking silo can open the other's deliveries."""
        return readable(self.run, self.attacker, self.silo, self.last)

    @cached_property
    def _member(self) -> Opened:
        return Opened(self.run, self.attacker)

    def views(self, version: int) -> dict[str, View]:
        """What aggregator and member have of the silo's delivery; of a secure sum the one has the mean of all."""
        own = self.own(version)
        if self.config.outer.secure_sum:
            merged, moments = self.operator.merged(version), self.operator.versions[version].moments
            delivered = View(base=own.base, pseudo_gradient=merged, moments=moments)
        else:
            delivered = self.operator.delivery(self.silo, version)
        if self.can_read:
            return {"aggregator, member": delivered}
        return {"aggregator": delivered, "member": self._member.subtracted(version, own)}

    def own(self, version: int) -> View:
        """What the attacking silo delivered itself."""
        party = self._member if self.config.outer.secure_sum else self.operator
        return party.delivery(self.attacker, version)

    def mixture(self, silo: str) -> Mixture:
        """A silo's sequences in the order in which it reads them."""
        return open_data(self.config, silo)[0]

    def positions(self, silo: str, version: int) -> range:
        """Which of them a round was trained on."""
        num = self.config.outer.sync_interval_steps * self.config.silos[silo].global_batch_sequences
        return range((version - 1) * num, version * num)

    def counts(self, silo: str, version: int) -> Floats:
        """How often each token of the vocabulary occurred in a round, as input or as target. # (V,)"""
        batch = self.mixture(silo).batch(self.positions(silo, version))
        tokens = torch.cat([batch.inputs, batch.targets], 1).flatten()
        return np.bincount(tokens.numpy(), minlength=vocabulary_size(self.config.tokenizer_file)).astype(np.float64)

    def model(self, parameters: Named) -> nn.Module:
        """The model with these parameters."""
        model, filled = empty_model(self.config)
        for name, value in filled.items():
            value.copy_(parameters[name])
        return model.eval()


# ---- tokens of a round


def attack_tokens(attacked: Attacked) -> dict[str, dict[str, TokensFound]]:
    """Who, and from what (rows, moments), to the tokens found: means over the run's quarters."""
    vocab_size = vocabulary_size(attacked.config.tokenizer_file)
    found: dict[str, dict[str, list[TokensFound]]] = {}
    for version in sorted({max(1, round(attacked.last * quarter / 4)) for quarter in (1, 2, 3, 4)}):
        known = attacked.own(version)
        counts = [attacked.counts(silo, version) for silo in (attacked.attacker, attacked.silo)]
        for who, view in attacked.views(version).items():
            rows = row_features(known.pseudo_gradient, vocab_size), row_features(view.pseudo_gradient, vocab_size)
            moments = moment_features(known.moments, vocab_size), moment_features(view.moments, vocab_size)
            for what, (own, other) in (("rows", rows), ("moments", moments)):
                if own is not None and other is not None:
                    made = find_tokens(own, counts[0], other, counts[1])
                    found.setdefault(who, {}).setdefault(what, []).append(made)
    return {who: {what: _means(some) for what, some in of.items()} for who, of in found.items()}


def _means(found: Sequence[TokensFound]) -> TokensFound:
    return TokensFound(**{key: mean(getattr(one, key) for one in found) for key in vars(found[0])})


# ---- passages and canaries


@dataclass(frozen=True, kw_only=True)
class TextsFound:
    """What a model gives away of the text that it was trained on."""

    auc: float
    """Of passages by their loss alone."""
    calibrated: float
    """By how much less it is than the attacker's own model's."""
    advantage: float
    """The same guess's."""
    sure: float
    """Its true positives at one per cent of false ones."""
    of_round: float | None
    """AUC of passages of the last round, by how much their loss fell in it; None: who has only one model."""
    exposures: list[float]
    """Mean bits of a code said so often as `REPEATS`."""
    num_read: list[int]
    """How many codes of each are the likeliest of all."""


class Passages:
    """Sequences that the silo has trained on, such as those that it has not, and the canaries."""

    def __init__(self, attacked: Attacked, text: Text) -> None:
        tokenizer = read_tokenizer(text.tokenizer)
        mixture, positions = attacked.mixture(attacked.silo), attacked.positions(attacked.silo, attacked.last)
        (own,) = mixture.corpora
        held_out = PackedTokens(
            [text.packed[f"{text.corpora[0]}-{HELD_OUT}"] / "train"], sequence_tokens=own.sequence_tokens
        )
        trained = {mixture.locate(position)[1] for position in range(positions.stop)}
        clean = [i for i in sorted(trained) if CANARY not in tokenizer.decode(own.sequence(i).tolist())]
        newest = {mixture.locate(position)[1] for position in positions}
        self.members = batches(own, clean[:NUM_SEQUENCES])
        self.of_round = batches(own, [index for index in clean if index in newest][:NUM_SEQUENCES])
        self.others = batches(held_out, range(min(NUM_SEQUENCES, held_out.num_sequences)))
        self.mask_at = own.manifests[0].end_of_text_id if attacked.config.document_masking else None
        self.canaries = text.canaries[attacked.silo]
        self.sentences = [
            [tokenizer.encode(canary.text(code)).ids for code in range(CODES)] for canary in self.canaries
        ]

    def losses(self, model: nn.Module) -> tuple[Floats, Floats]:
        """A model's of members, and of others."""
        return mean_losses(model, self.members, self.mask_at), mean_losses(model, self.others, self.mask_at)

    def exposures(self, model: nn.Module) -> list[list[float]]:
        """Bits of every canary, by `REPEATS`."""
        found: dict[int, list[float]] = {number: [] for number in REPEATS}
        for canary, sentences in zip(self.canaries, self.sentences, strict=True):
            of_codes = ending_losses(model, sentences)
            found[canary.num_repeats].append(exposure(of_codes[canary.code], of_codes))
        return list(found.values())


def batches(tokens: PackedTokens, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of some sequences of a split."""
    return [tokens.batch(indices[start : start + BATCH])[:2] for start in range(0, len(indices), BATCH)]


def attack_texts(model: nn.Module, passages: Passages, *, own: nn.Module, base: nn.Module | None) -> TextsFound:
    """What one model says; `own` is the attacker's, `base` what the last round began with."""
    members, others = passages.losses(model)
    better = [of_own - found for of_own, found in zip(passages.losses(own), (members, others), strict=True)]
    of_round = None
    if base:
        newest = [mean_losses(one, passages.of_round, passages.mask_at) for one in (base, model)]
        of_round = auc(newest[0] - newest[1], passages.losses(base)[1] - others)
    bits = passages.exposures(model)
    return TextsFound(
        auc=auc(-members, -others),
        calibrated=auc(*better),
        advantage=advantage(*better),
        sure=true_positives(*better),
        of_round=of_round,
        exposures=[mean(of) for of in bits],
        num_read=[sum(one > np.log2(CODES / 2) for one in of) for of in bits],
    )


# ---- the tables

TOKENS_HEAD = (
    "| run | who | AUC | precision / recall | recall of rare ones | guessing all "
    "| from second moments: AUC | precision / recall |"
)
TEXTS_HEAD = (
    "| run | who | passages: AUC by loss | against a model of one's own | advantage | found at 1 % false "
    "| of the last round: AUC | canaries, bits | canaries read |"
)


def rule(head: str) -> str:
    """The line under a table's head."""
    return "|" + "---|" * (head.count("|") - 1)


def token_rows(name: str, found: dict[str, dict[str, TokensFound]]) -> list[str]:
    """A line for everybody who attacks."""
    lines = []
    for who, of in found.items():
        rows, moments = of["rows"], of.get("moments")
        cells = [name, who, f"{rows.auc:.3f}", f"{rows.precision:.2f} / {rows.recall:.2f}"]
        rare = "-" if math.isnan(rows.rare_recall) else f"{rows.rare_recall:.2f}"
        cells += [rare, f"{rows.base:.2f}"]
        cells += [f"{moments.auc:.3f}", f"{moments.precision:.2f} / {moments.recall:.2f}"] if moments else ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def text_row(name: str, who: str, found: TextsFound, num_each: int) -> str:
    """One model's line."""
    cells = [name, who, f"{found.auc:.3f}", f"{found.calibrated:.3f}", f"{found.advantage:.2f}", f"{found.sure:.1%}"]
    cells.append("-" if found.of_round is None else f"{found.of_round:.3f}")
    cells.append(", ".join(f"{bits:.1f}" for bits in found.exposures))
    cells.append(", ".join(f"{number}/{num_each}" for number in found.num_read))
    return f"| {' | '.join(cells)} |"


def attack_run(attacked: Attacked, text: Text, reference: Named, name: str) -> list[str]:
    """Lines of what everybody can say of the silo's text by what they have of one run."""
    passages, lines = Passages(attacked, text), []
    num_each, own = len(passages.canaries) // len(REPEATS), attacked.model(reference)
    for who, view in attacked.views(attacked.last).items():
        base = attacked.model(view.base)
        found = attack_texts(attacked.model(view.local), passages, own=own, base=base)
        lines.append(text_row(name, who, found, num_each))
    final = attacked.model(attacked.operator.versions[-1].parameters)
    found = attack_texts(final, passages, own=own, base=None)
    return [*lines, text_row(name, "model's user", found, num_each)]


def chance(attacked: Attacked, text: Text, reference: Named) -> str:
    """What the attacker's own model says, which has seen none of it, and how far from chance that may be."""
    passages = Passages(attacked, text)
    model = attacked.model(reference)
    members, others = passages.losses(model)
    bits = [mean(of) for of in passages.exposures(model)]
    noise = auc_noise(len(members), len(others))
    return (
        f"chance: a model that has seen neither tells {len(members)} passages from {len(others)} others with AUC "
        f"{auc(-members, -others):.3f} (0.5, to within {noise:.3f} in 19 of 20 cases), and canaries by "
        f"{', '.join(f'{one:.1f}' for one in bits)} bits (1.4; all: {np.log2(CODES):.1f})"
    )


def main() -> None:
    """Train what has not been trained yet, attack it, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, help="folder of corpus folders; default: the text of atoll demo")
    parser.add_argument("--directory", type=Path, default=Path("runs/leaks"))
    parser.add_argument("--silo", default="", help="the one that is attacked; default: the first")
    parser.add_argument("--silos", type=int, default=2, help="how many train together (default 2)")
    parser.add_argument("--characters", type=int, default=60_000, help="of each silo's text (default 60,000)")
    parser.add_argument("--canaries", type=int, default=4, help="of each number of repeats (default 4)")
    parser.add_argument("--with", dest="columns", action="append", default=[], metavar="NAME:key=value,...")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("overrides", nargs="*", help="key=value of all runs")
    arguments = parser.parse_intermixed_args()
    try:
        measure(arguments)
    except ConfigError as error:
        parser.error(str(error))


def measure(arguments: argparse.Namespace) -> None:
    """All of it. Raises ConfigError."""
    torch.set_num_threads(1)  # models are so small that a second one costs more than it brings
    if arguments.silos < 2 or arguments.canaries < 1:
        raise ConfigError(
            f"--silos {arguments.silos} --canaries {arguments.canaries} given; allowed: 2, and 1, or more"
        )
    overrides = tuple(arguments.overrides)
    plain = Column(name="nothing", num_silos=arguments.silos, overrides=overrides)
    columns = [plain, *(parse_column(text, arguments.silos, overrides) for text in arguments.columns)]
    if len({column.name for column in columns}) < len(columns):
        raise ConfigError(f"--with: {', '.join(column.name for column in columns)} given; allowed: a name once")
    for column in columns:  # a mistake must not cost the preparation
        silos = [f"silos.any-{number}={{}}" for number in range(column.num_silos)]
        check_readable(load_config([SETTINGS], [*silos, *RUN, *column.overrides]))
    text = make_text(
        arguments.corpora,
        arguments.directory,
        arguments.silo,
        num_characters=arguments.characters,
        num_canaries=arguments.canaries,
    )
    silo, attacker = text.corpora[:2]
    configs = {column.name: text.config(column) for column in columns}
    own = text.config(dataclasses.replace(plain, name="own", part=f"-{REFERENCE}"))
    log, tables = text.directory / "launch.log", {kind: list[str]() for kind in KINDS}
    reference: Named = {}
    if "texts" in arguments.only:
        finished(own, log, warm(local_commands))
        reference = Opened(Path(own.directory), OPERATOR).versions[-1].parameters
    for name, config in configs.items():
        finished(config, log, warm(local_commands))
        attacked = Attacked(config, silo, attacker)
        rows = {"tokens": token_rows(name, attack_tokens(attacked)) if "tokens" in arguments.only else []}
        rows["texts"] = attack_run(attacked, text, reference, name) if reference else []
        for kind, found in rows.items():
            tables[kind] += found
            print("\n".join(found), end="\n" if found else "", flush=True)
    for kind, head in (("tokens", TOKENS_HEAD), ("texts", TEXTS_HEAD)):
        if tables[kind]:
            print("\n".join(["", head, rule(head), *tables[kind]]))
    if reference:
        print(f"\n{chance(Attacked(configs['nothing'], silo, attacker), text, reference)}")


if __name__ == "__main__":
    main()
