"""Passages and codes of a silo's text, and how well a model gives them away: for benchmarks/leaks.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from torch import Tensor, nn

from benchmarks.leak_attacks import (
    Floats,
    advantage,
    auc,
    auc_noise,
    ending_losses,
    exposure,
    mean_losses,
    true_positives,
)
from benchmarks.leak_runs import Text
from benchmarks.leak_tables import Cell
from benchmarks.leak_texts import CODES, HELD_OUT, REPEATS
from benchmarks.leak_views import Attacked
from pretrain.silo.data import PackedTokens
from pretrain.silo.vocabulary import read_tokenizer

BATCH = 64
NUM_SEQUENCES = 512  # of a split, at most
CANARY = "access code of"


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
    of_round: float
    """AUC of passages of the last round, by how much their loss fell in it; NaN: who has only one model."""
    exposures: list[float]
    """Mean bits of a code said so often as `REPEATS`."""
    num_read: list[int]
    """How many codes of each are the likeliest of all."""
    held_out: float
    """Mean loss of passages that it was not trained on."""

    @property
    def cells(self) -> list[Cell]:
        """As `TEXTS_HEAD` names them."""
        return [
            *(Cell(values=[value]) for value in (self.auc, self.calibrated)),
            Cell(values=[self.advantage], form=".2f"),
            Cell(values=[self.sure], form=".1%"),
            Cell(values=[self.of_round]),
            Cell(values=self.exposures, form=".1f"),
            Cell(values=self.num_read, form=".3g"),
            Cell(values=[self.held_out], form=".2f"),
        ]


class Passages:
    """Sequences that the silo has trained on, such as those that it has not, and the canaries."""

    def __init__(self, attacked: Attacked, text: Text) -> None:
        tokenizer = read_tokenizer(text.tokenizer)
        mixture, positions = attacked.mixture(attacked.silo), attacked.positions(attacked.silo, attacked.last)
        (own,) = mixture.corpora
        held_out = PackedTokens(
            [text.packed[f"{attacked.silo}-{HELD_OUT}"] / "train"], sequence_tokens=own.sequence_tokens
        )
        trained = {mixture.locate(position)[1] for position in range(positions.stop)}
        passages = [index for index in sorted(trained) if index >= text.num_planted]
        clean = [index for index in passages if CANARY not in tokenizer.decode(own.sequence(index).tolist())]
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
    of_round = math.nan
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
        held_out=float(others.mean()),
    )


def attack_run(attacked: Attacked, passages: Passages, own: nn.Module) -> dict[str, TextsFound]:
    """What everybody can say of the silo's text by what they have of one run; `own` is the attacker's own model."""
    found = {}
    for who, view in attacked.views(attacked.last).items():
        base = attacked.model(view.base)
        found[who] = attack_texts(attacked.model(view.local), passages, own=own, base=base)
    final = attacked.model(attacked.operator.versions[-1].parameters)
    return found | {"model's user": attack_texts(final, passages, own=own, base=None)}


def chance(passages: Passages, own: nn.Module) -> str:
    """What the attacker's own model says, which has seen none of it, and how far from chance that may be."""
    members, others = passages.losses(own)
    bits = [mean(of) for of in passages.exposures(own)]
    noise = auc_noise(len(members), len(others))
    return (
        f"chance: a model that has seen neither tells {len(members)} passages from {len(others)} others with AUC "
        f"{auc(-members, -others):.3f} (0.5, to within {noise:.3f} in 19 of 20 cases), and canaries by "
        f"{', '.join(f'{one:.1f}' for one in bits)} bits (1.4; all: {np.log2(CODES):.1f})"
    )
