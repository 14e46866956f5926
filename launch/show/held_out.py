"""Held-out losses as silos have published them in a store: of the run's versions, and of models beside it."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean

from launch.show.opened import EVALUATION, Opened
from launch.show.run import Evaluation
from pretrain.exchange.words import MOST_CORPORA
from pretrain.exchange.words import Evaluation as Word

BEYOND = 1e12  # what no loss and no norm is: an axis that reached so far would show nothing else
MOST_WORDS = 4096  # of a silo, the newest: whoever writes to a store may write any number
MOST_BESIDE = 8  # models beside the run of a silo, the newest
MOST_NAMED = 3  # silos


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What is known of them."""

    of_silos: dict[str, dict[int, Word]] = field(default_factory=dict)
    """By silo and version, where the parameters that were evaluated are those of the version's commit."""
    beside: dict[str, dict[str, Word]] = field(default_factory=dict)
    """By label and silo, the last of each."""

    def curve(self, silo: str) -> list[tuple[int, float]]:
        """A silo's mean over its corpora, by version."""
        return [(number, fmean(word.losses.values())) for number, word in sorted(self.of_silos.get(silo, {}).items())]

    @property
    def versions(self) -> dict[int, dict[str, float]]:
        """By version and corpus, the mean over the silos that have evaluated it."""
        return {number: _means(words) for number, words in self._by_version().items()}

    def _by_version(self) -> dict[int, list[Word]]:
        found: defaultdict[int, list[Word]] = defaultdict(list)
        for words in self.of_silos.values():
            for number, word in words.items():
                found[number].append(word)
        return dict(sorted(found.items()))

    @property
    def means(self) -> list[tuple[int, float]]:
        """Mean over corpora, by version."""
        return [(number, fmean(losses.values())) for number, losses in self.versions.items()]

    @property
    def beside_means(self) -> dict[str, float]:
        """Mean over corpora, by label."""
        return {label: fmean(_means(words.values()).values()) for label, words in self.beside.items()}

    def evaluations(self, tokens: Mapping[int, float]) -> list[Evaluation]:
        """One a version, which stands for the round; `tokens`: what all silos had trained on by then, if it is told."""
        return [
            _evaluation(words, number, tokens.get(number, math.nan)) for number, words in self._by_version().items()
        ]

    def evaluations_beside(self, *, with_tokens: bool) -> dict[str, Evaluation]:
        """By what a model is called and who has evaluated it. Of several models of a name tokens are added up."""
        found = {}
        for label, words in self.beside.items():
            models = {word.parameters_digest: word.tokens for word in words.values()}.values()
            known = [tokens for tokens in models if tokens is not None]
            is_known = with_tokens and len(known) == len(models)
            whose = ", ".join(words) if len(words) <= MOST_NAMED else f"{len(words)} silos"
            found[f"{label}, by {whose}"] = _evaluation(words.values(), 0, sum(known) if is_known else math.nan)
        return found


def read_held_out(opened: Opened, silos: Iterable[str]) -> HeldOut:
    """All that silos have published; each word is read once (see `Opened`)."""
    digests = {number: commit.parameters_digest for number, commit in opened.commits.items()}
    of_silos, beside = dict[str, dict[int, Word]](), defaultdict[str, dict[str, Word]](dict)
    for silo in silos:
        paths = list(opened.store.numbered(EVALUATION.format(silo)).values())[-MOST_WORDS:]
        words = map(_sane, opened.parsed(paths, Word.from_bytes, for_ever=True).values())
        versions: dict[int, Word] = {}
        labels: dict[str, Word] = {}
        for word in (word for word in words if word.losses):
            if word.version is None:
                labels.pop(word.label, None)
                labels[word.label] = word
            elif word.parameters_digest == digests.get(word.version):
                versions[word.version] = _joined(versions.get(word.version), word)
        of_silos |= {silo: versions} if versions else {}
        for label in list(labels)[-MOST_BESIDE:]:
            beside[label][silo] = labels[label]
    return HeldOut(of_silos=of_silos, beside=dict(sorted(beside.items())))


def _sane(word: Word) -> Word:
    losses = {corpus: loss for corpus, loss in word.losses.items() if loss <= BEYOND}
    return replace(word, losses=losses)


def _joined(before: Word | None, word: Word) -> Word:
    """What was said of a version at several times: of each corpus the last; of too many only what was said last."""
    losses = word.losses if before is None else before.losses | word.losses
    if before is None or len(losses) > MOST_CORPORA:
        return word
    return replace(word, losses=losses, sequences=before.sequences | word.sequences)


def _means(words: Iterable[Word]) -> dict[str, float]:
    losses: defaultdict[str, list[float]] = defaultdict(list)
    for word in words:
        for corpus, loss in word.losses.items():
            losses[corpus].append(loss)
    return {corpus: fmean(found) for corpus, found in sorted(losses.items())}


def _evaluation(words: Iterable[Word], round: int, tokens: float) -> Evaluation:
    words, counts = list(words), defaultdict[str, set[str]](set)
    for word in words:
        for corpus in word.losses:
            counts[corpus].add(f"{word.sequences[corpus]:g}")
    sequences = {corpus: ", ".join(sorted(found)) for corpus, found in sorted(counts.items())}
    return Evaluation(round=round, tokens=tokens, val_loss=_means(words), sequences=sequences)
