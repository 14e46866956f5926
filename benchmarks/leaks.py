"""What an attacker learns of one silo's text from a federation, measured on real runs; docs/privacy.md has the tables.

    python -m benchmarks.leaks [--corpora DIR] [--silo NAME ...] [--seeds N ...] [--planted N]
        [--with NAME:key=value,key=value ...] [key=value ...]

DIR is a folder of folders with train.jsonl, each of which is a silo; without it, the text of `atoll demo`. The first
`--silos` of them, the attacked one among them, train the demo's model with its settings and the key=value given; every
`--with` is one more run, with changes of its own (`silos=4` among them: more silos). A run that has finished in the
directory is not repeated. Of each silo's documents a third is what it has, a third is held out, and a third is what the
attacker has, for a model of its own. Into every silo's text go canaries: codes of three digits, said once, 4 and 16
times; and `--planted` sequences that are made to be remembered (benchmarks/leak_audit.py). A row is the mean of all
silos and seeds given, with the least and the greatest.

Who attacks: the aggregator, who has the silo's delivery; a member, who has the deliveries, too, where it can open them,
and else all versions and what it sent itself; and whoever has the final model alone. What a member has of a run that is
sealed is worked out of every run, as sealing changes nothing else.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from benchmarks.leak_attacks import TokensFound, auc, find_tokens, moment_features, row_features, true_positives
from benchmarks.leak_audit import Designed, Scores, epsilon_bound, most_provable, pooled, scores
from benchmarks.leak_passages import Passages, attack_run, chance
from benchmarks.leak_runs import RUN, Column, Text, corpora_in, make_text, parse_column
from benchmarks.leak_tables import Cell, Table, shown
from benchmarks.leak_texts import REFERENCE
from benchmarks.leak_views import Attacked, Opened, check_readable
from benchmarks.runs import finished
from launch.demo import SETTINGS
from launch.start.local import local_commands
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.config.load import load_config
from pretrain.silo.vocabulary import vocabulary_size
from tests.distributed.federation import warm

KINDS = ("tokens", "texts", "audit")

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


# ---- canaries made to be remembered


def attack_designed(attacked: Attacked, canaries: Designed, own: nn.Module) -> dict[str, Scores]:
    """Who tells those that are in from others, and how well.

    By how much their loss fell in all rounds of the silo, and, who has one model alone, by how much less it is than the
    attacker's own model's.
    """
    fell: dict[str, list[tuple[nn.Module, nn.Module]]] = {}
    for version in range(1, attacked.last + 1):
        for who, view in attacked.views(version).items():
            fell.setdefault(who, []).append((attacked.model(view.base), attacked.model(view.local)))
    final = attacked.model(attacked.operator.versions[-1].parameters)
    return {who: scores(canaries, of) for who, of in [*fell.items(), ("model's user", [(own, final)])]}


def audit_cells(several: Sequence[Scores], promised: RunConfig) -> list[Cell]:
    """As `AUDIT_HEAD` names them, of the canaries of all silos and seeds together."""
    found, private = pooled(several), promised.silo.private
    budget = math.nan if private.epsilon is None else private.epsilon
    delta = private.delta if private.epsilon is not None else 0.0
    return [
        Cell(values=[len(found.inside), len(found.outside)], form="d"),
        Cell(values=[auc(found.inside, found.outside)]),
        Cell(values=[true_positives(found.inside, found.outside)], form=".1%"),
        Cell(values=[epsilon_bound(found, delta)], form=".2f"),
        Cell(values=[most_provable(len(found.inside), delta)], form=".2f"),
        Cell(values=[budget], form="g"),
    ]


# ---- the tables

TOKENS_HEAD = (
    "| run | who | AUC | precision / recall | recall of rare ones | guessing all "
    "| from second moments: AUC | precision / recall |"
)
TEXTS_HEAD = (
    "| run | who | passages: AUC by loss | against a model of one's own | advantage | found at 1 % false "
    "| of the last round: AUC | canaries, bits | canaries read | held-out loss |"
)
AUDIT_HEAD = (
    "| run | who | canaries in, out | AUC | found at 1 % false | epsilon is at least | the most that so many show "
    "| promised |"
)


def token_cells(of: dict[str, TokensFound]) -> list[Cell]:
    """As `TOKENS_HEAD` names them."""
    rows, moments = of["rows"], of.get("moments")
    return [
        Cell(values=[rows.auc]),
        Cell(values=[rows.precision, rows.recall], form=".2f", between=" / "),
        Cell(values=[rows.rare_recall], form=".2f"),
        Cell(values=[rows.base], form=".2f"),
        Cell(values=[moments.auc] if moments else []),
        Cell(values=[moments.precision, moments.recall] if moments else [], form=".2f", between=" / "),
    ]


def main() -> None:
    """Train what has not been trained yet, attack it, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, help="folder of corpus folders; default: the text of atoll demo")
    parser.add_argument("--directory", type=Path, default=Path("runs/leaks"))
    parser.add_argument("--silo", nargs="+", default=[], help="those that are attacked, in turn; default: the first")
    parser.add_argument("--silos", type=int, default=2, help="how many train together (default 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights, order and canaries (default 0)")
    parser.add_argument("--characters", type=int, default=60_000, help="of each silo's text (default 60,000)")
    parser.add_argument("--canaries", type=int, default=4, help="of each number of repeats (default 4)")
    parser.add_argument("--planted", type=int, default=0, help="sequences made to be remembered (default 0)")
    parser.add_argument("--with", dest="columns", action="append", default=[], metavar="NAME:key=value,...")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("overrides", nargs="*", help="key=value of all runs")
    arguments = parser.parse_intermixed_args()
    try:
        measure(arguments, checked_columns(arguments))
    except ConfigError as error:
        parser.error(str(error))


def checked_columns(arguments: argparse.Namespace) -> list[Column]:
    """The runs that are asked for. Raises ConfigError: a mistake must not cost the preparation."""
    if arguments.silos < 2 or arguments.canaries < 1 or arguments.planted < 0:
        raise ConfigError(
            f"--silos {arguments.silos} --canaries {arguments.canaries} --planted {arguments.planted} given; allowed: "
            "2, 1, and 0, or more"
        )
    overrides = tuple(arguments.overrides)
    plain = Column(name="nothing", num_silos=arguments.silos, overrides=overrides)
    columns = [plain, *(parse_column(text, arguments.silos, overrides) for text in arguments.columns)]
    if len({column.name for column in columns}) < len(columns):
        raise ConfigError(f"--with: {', '.join(column.name for column in columns)} given; allowed: a name once")
    for column in columns:
        silos = [f"silos.any-{number}={{}}" for number in range(column.num_silos)]
        check_readable(load_config([SETTINGS], [*silos, *RUN, *column.overrides]))
    return columns


@dataclass(kw_only=True)
class Found:
    """What was found until now."""

    num_silos: int
    """That train the attacker's own model together."""
    tables: dict[str, Table]
    audited: dict[tuple[str, str], list[Scores]] = field(default_factory=dict)
    """Of every run and attacker, each silo's and seed's."""
    said: list[str] = field(default_factory=list)
    """How far from chance mere chance is."""


def measure(arguments: argparse.Namespace, columns: Sequence[Column]) -> None:
    """All of it. Raises ConfigError."""
    torch.set_num_threads(1)  # models are so small that a second one costs more than it brings
    corpora, silos = corpora_in(arguments.corpora, arguments.directory, arguments.silo)
    heads = {"tokens": TOKENS_HEAD, "texts": TEXTS_HEAD, "audit": AUDIT_HEAD}
    tables = {kind: Table(head=head) for kind, head in heads.items()}
    found = Found(num_silos=arguments.silos, tables=tables)
    for seed in arguments.seeds:
        text = make_text(
            corpora,
            arguments.directory,
            num_characters=arguments.characters,
            num_canaries=arguments.canaries,
            num_planted=arguments.planted,
            seed=seed,
        )
        for column, silo in itertools.product(columns, silos):
            attack(arguments.only, text.attacked(silo), column, found)
    for (name, who), several in found.audited.items():
        column = next(column for column in columns if column.name == name)
        found.tables["audit"].add(name, who, audit_cells(several, text.config(column)))
    print("\n".join(line for table in found.tables.values() for line in table.lines()))
    print("\n".join(["", *found.said]))


def attack(kinds: Sequence[str], text: Text, column: Column, found: Found) -> None:
    """Train one run, unless it was, and add to what was found what everybody says of one of its silos."""
    silo, attacker = text.corpora[:2]
    config, log = text.config(column), text.directory / "launch.log"
    finished(config, log, warm(local_commands))
    attacked, what = Attacked(config, silo, attacker), f"{column.name}, {silo}, seed {text.seed}"
    for who, of in attack_tokens(attacked).items() if "tokens" in kinds else ():
        found.tables["tokens"].add(column.name, who, token_cells(of))
    if {"texts", "audit"} & {*kinds}:
        reference = text.config(Column(name="own", num_silos=found.num_silos, part=f"-{REFERENCE}"))
        finished(reference, log, warm(local_commands))
        own = attacked.model(Opened(Path(reference.directory), OPERATOR).versions[-1].parameters)
    if "texts" in kinds:
        passages = Passages(attacked, text)
        for who, told in attack_run(attacked, passages, own).items():
            found.tables["texts"].add(column.name, who, told.cells)
            print(f"{what}, {who}: {' | '.join(shown([cell]) for cell in told.cells)}", flush=True)
        if column.name == "nothing":
            found.said.append(f"{silo}, seed {text.seed}: {chance(passages, own)}")
    if "audit" in kinds and text.designed:
        for who, score in attack_designed(attacked, text.designed[silo], own).items():
            found.audited.setdefault((column.name, who), []).append(score)
            print(f"{what}, {who}: {' | '.join(shown([cell]) for cell in audit_cells([score], config))}", flush=True)


if __name__ == "__main__":
    main()
