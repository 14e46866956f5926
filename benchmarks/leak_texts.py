"""Text for benchmarks/leaks.py: every corpus dealt out into what a silo has, its twin that nobody has, and canaries.

Whether a text was trained on can only be told apart from one that might as well have been: documents are dealt out in
turn, so that a silo's text, the twin that is held out, and the one for an attacker's own model are of one source.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.sources import read_documents, training_file
from pretrain.config.errors import ConfigError

HELD_OUT, REFERENCE = "held-out", "reference"
PARTS = ("", f"-{HELD_OUT}", f"-{REFERENCE}")
REPEATS = (1, 4, 16)
CODES = 1000
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A secret that one silo's text says so many times: `prefix`, and one code of `CODES`, which are equally likely."""

    prefix: str
    code: int
    num_repeats: int

    def text(self, code: int | None = None) -> str:
        """The sentence, with its own code or another."""
        return self.prefix + said(self.code if code is None else code)


def said(code: int) -> str:
    """A code as a sentence ends with it."""
    return f" {code:03d}."


def make_canaries(num_each: int, *, seed: int = 0) -> list[Canary]:
    """So many for each number of repeats, each about somebody whom no text knows."""
    rng = random.Random(seed)
    names = ["".join(rng.sample(SYLLABLES, k=3)).title() for _ in range(num_each * len(REPEATS))]
    return [
        Canary(prefix=f"The access code of {name} is", code=rng.randrange(CODES), num_repeats=REPEATS[i % len(REPEATS)])
        for i, name in enumerate(names)
    ]


def with_canaries(documents: Sequence[str], canaries: Iterable[Canary], *, seed: int = 0) -> list[str]:
    """The documents, some of which end with canaries: each of these as often as it says, in documents drawn at random.

    So no two of them stand in one sequence more often than chance has it.
    """
    rng, result = random.Random(seed), list(documents)
    for canary in canaries:
        for _ in range(canary.num_repeats):
            place = rng.randrange(len(result))
            result[place] += f"\n{canary.text()}"
    return result


def at_most(texts: Iterable[str], num_characters: int) -> Iterator[str]:
    """Documents until they have so many characters; the last is cut."""
    for text in texts:
        if num_characters <= 0:
            return
        yield text[:num_characters]
        num_characters -= len(text)


def deal(corpus: Path, num_characters: int) -> list[list[str]]:
    """The corpus's training documents, one after another to each of `PARTS`, up to so many characters each.

    Raises ConfigError for a corpus that is too short.
    """
    found: list[list[str]] = [[] for _ in PARTS]
    left = [num_characters] * len(PARTS)
    for number, text in enumerate(read_documents(training_file(corpus))):
        part = number % len(PARTS)
        found[part] += at_most([text], left[part])
        left[part] -= len(text)
        if max(left) <= 0:
            return found
    raise ConfigError(
        f"--characters: {num_characters:,} given; {corpus.name} has not {len(PARTS)} times as many; allowed: less"
    )


def write_texts(corpora: Path, output: Path, *, num_characters: int, canaries: Mapping[str, list[Canary]]) -> None:
    """Corpus folders of all parts in `output`, with the silos' canaries; what is held out is their validation text.

    Raises ConfigError.
    """
    for folder in sorted(path for path in corpora.iterdir() if path.is_dir()):
        parts = deal(folder, num_characters)
        parts[0] = with_canaries(parts[0], canaries[folder.name])
        for suffix, texts in zip(PARTS, parts, strict=True):
            part = output / f"{folder.name}{suffix}"
            part.mkdir(parents=True, exist_ok=True)
            for split, of_split in (("train", texts), ("valid", parts[1])):
                lines = (json.dumps({"text": text}) for text in of_split)
                (part / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
