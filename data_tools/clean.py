"""Cleaning of documents: what worker processes do to each text before it is packed.

Every step depends on the text alone, or on the text and the held-out split. What depends on the documents before, exact
and near duplicates, is decided in order by data_tools/duplicates.py from the hashes and signatures that are made here.
"""

import functools
import hashlib
import importlib
import os
import re
import sys
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from data_tools import languages, personal
from pretrain.config.errors import ConfigError

Hashes = npt.NDArray[np.uint64]

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
NORMAL_FORMS: tuple[str, ...] = get_args(NormalForm)
DROP_REASONS = (
    *("blank", "filter", "personal data", "short", "long", "language"),
    *("duplicate", "near duplicate", "overlap"),
)
PERSONAL_DATA = ("count", "mask", "drop")
# What a recipe says whatever its value is; options that came later are told where they are used, as otherwise text that
# was prepared before there were any would be of another recipe.
ALWAYS_TOLD = (
    "normalize",
    "min_characters",
    "max_characters",
    "drop_duplicates",
    "near_duplicates",
    "drop_overlap",
    "filter",
)
# Length of the overlaps that GPT-3 removed: https://arxiv.org/abs/2005.14165, appendix C
OVERLAP_WORDS = 13
# At most 64 MB in each worker.
MAX_PREFIX_BITS = 26
SHINGLE_WORDS = 5
# 512 bytes a document; the standard error of an estimated similarity is at most 0.045.
NUM_PERMUTATIONS = 128
# Where datasketch finds at least two bands, and enough rows that not every document is a candidate.
NEAR_RANGE = (0.1, 0.98)
# Longer runs are cut, so that the cached words stay small whatever the text (a genome is one run).
WORD = re.compile(r"\w{1,64}")
CACHED_WORDS = 1 << 17
# Shingles that are permuted together: 0.5 MB, which stays in a core's cache.
SHINGLES_AT_ONCE = 1024
# Odd, and 3 modulo 4, so that differences of its powers lose few bits; the last constant of MurmurHash3.
MULTIPLIER = 0xC4CEB9FE1A85EC53
POWERS = np.array([pow(MULTIPLIER, power, 1 << 64) for power in range(OVERLAP_WORDS)], dtype=np.uint64)


@dataclass(kw_only=True, frozen=True)
class Cleaning:
    """What is done to documents before they are packed; every step is off by default."""

    normalize: str = ""
    """Unicode normal form of all text: NFC, NFD, NFKC or NFKD; empty: the text stays as it is."""
    personal_data: str = ""
    """What is done about what data_tools.personal finds: count or mask it, or drop the document; empty: nothing."""
    min_characters: int = 0
    """Shorter documents are dropped."""
    max_characters: int = 0
    """Longer documents are dropped; 0: no bound."""
    drop_duplicates: bool = False
    """Of documents with equal text, the first is kept."""
    near_duplicates: float = 0.0
    """Documents whose 5-word shingles have at least this Jaccard similarity with those of an earlier document that was
    kept are dropped; 0: off."""
    drop_overlap: bool = False
    """Training documents that share 13 consecutive words with the held-out split are dropped."""
    language_report: bool = False
    """The report counts documents and tokens of each language."""
    keep_language: str = ""
    """Codes of ISO 639 with commas between them; documents of other languages are dropped; empty: all stay."""
    quality_report: bool = False
    """The report has distributions of what data_tools.quality measures."""
    filter: str = ""
    """package.module:function of the user; it keeps (True), drops (False) or replaces (a str) a document's text."""

    def check(self) -> None:
        """Raise ConfigError, naming the option, for a value that is not allowed or a filter that cannot be imported."""
        if self.normalize not in ("", *NORMAL_FORMS):
            raise ConfigError(f"--normalize: {self.normalize!r} given; allowed: {' '.join(NORMAL_FORMS)}")
        if self.personal_data not in ("", *PERSONAL_DATA):
            raise ConfigError(f"--personal-data: {self.personal_data!r} given; allowed: {', '.join(PERSONAL_DATA)}")
        if self.personal_data and not personal.is_installed():
            needs = f"it needs packages that are not installed: type {personal.EXTRA}"
            raise ConfigError(f"--personal-data: {self.personal_data!r} given; {needs}")
        self._check_languages()
        if self.min_characters < 0:
            raise ConfigError(f"--min-characters: {self.min_characters} given; allowed: 0 or more")
        if self.max_characters < 0 or 0 < self.max_characters < self.min_characters:
            raise ConfigError(
                f"--max-characters: {self.max_characters} given; allowed: 0 (no bound), or --min-characters "
                f"({self.min_characters}) or more"
            )
        lowest, highest = NEAR_RANGE
        if self.near_duplicates != 0 and not lowest <= self.near_duplicates <= highest:
            raise ConfigError(
                f"--near-duplicates: {self.near_duplicates} given; allowed: 0 (off), or {lowest} to {highest}"
            )
        if self.filter:
            load_filter(self.filter)

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that are kept; none: all."""
        return tuple(code.strip() for code in self.keep_language.split(",")) if self.keep_language else ()

    @property
    def asks_languages(self) -> bool:
        """Whether a document's language is looked for."""
        return self.language_report or bool(self.keep_language)

    def _check_languages(self) -> None:
        if not self.asks_languages:
            return
        if not languages.is_installed():
            option = f"--keep-language: {self.keep_language!r}" if self.keep_language else "--language-report:"
            needs = f"it needs a package that is not installed: type {languages.EXTRA}"
            raise ConfigError(f"{option} given; {needs}")
        if unknown := [code for code in self.languages if code not in languages.known()]:
            allowed = f"codes of ISO 639 with commas between them, of {' '.join(languages.known())}"
            raise ConfigError(f"--keep-language: {unknown[0]!r} given; allowed: {allowed}")


def told(cleaning: Mapping[str, Any]) -> dict[str, Any]:
    """Of a cleaning's options, by name, those that decide whether a recipe is the same."""
    unused = asdict(Cleaning())
    return {name: value for name, value in cleaning.items() if name in ALWAYS_TOLD or value != unused.get(name)}


class Cleaner:
    """Cleans documents; made once in each worker process."""

    def __init__(self, cleaning: Cleaning, held_out_grams: Path | None) -> None:
        """`held_out_grams` is what `write_grams` wrote, mapped into memory that all workers share; None: nothing is
        held out. Raises ConfigError when the filter cannot be imported."""
        self._cleaning = cleaning
        self.personal: Counter[tuple[str, str]] = Counter()
        """Kind of personal data, and `found` or `documents`, to the number since it was last cleared."""
        self._filter = load_filter(cleaning.filter) if cleaning.filter else None
        self._held_out = np.load(held_out_grams, mmap_mode="r") if held_out_grams else np.empty(0, dtype=np.uint64)
        prefix_bits = min(len(self._held_out).bit_length() + 2, MAX_PREFIX_BITS)
        self._shift = np.uint64(64 - prefix_bits)
        self._held_out_prefixes = np.zeros(1 << prefix_bits, dtype=np.bool_)
        self._held_out_prefixes[self._held_out >> self._shift] = True
        if cleaning.near_duplicates:
            from datasketch import MinHash

            # The words are hashed once, here; datasketch mixes and permutes the shingles' hashes.
            self._no_shingles = MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=int)

    def clean(self, text: str, where: str) -> tuple[str, str | None]:
        """Normalise, filter and measure a text: its new form, and why it is dropped (of DROP_REASONS) or None.

        `where` ("corpus.jsonl, line 3") is named when the user's filter fails. Raises ConfigError.
        """
        if self._cleaning.normalize:
            text = unicodedata.normalize(cast(NormalForm, self._cleaning.normalize), text)
        if _is_blank(text):
            return text, "blank"
        if self._filter is not None:
            verdict = self._ask_filter(text, where)
            if verdict is False:
                return text, "filter"
            text = text if verdict is True else verdict
            if _is_blank(text):
                return text, "blank"
        if self._cleaning.personal_data:
            hidden = self._look_for_personal_data(text)
            if hidden != text and self._cleaning.personal_data == "drop":
                return text, "personal data"
            text = hidden if self._cleaning.personal_data == "mask" else text
        return text, self._unwanted(text)

    def _unwanted(self, text: str) -> str | None:
        """Why a text is dropped for its length or its language."""
        if len(text) < self._cleaning.min_characters:
            return "short"
        if 0 < self._cleaning.max_characters < len(text):
            return "long"
        is_other = self._cleaning.languages and language_of(text) not in self._cleaning.languages
        return "language" if is_other else None

    def _look_for_personal_data(self, text: str) -> str:
        """Count it; returns the text without it."""
        hidden, found = personal.masked(text)
        self.personal.update({(kind, "found"): number for kind, number in found.items()})
        self.personal.update((kind, "documents") for kind in found)
        return hidden

    def _ask_filter(self, text: str, where: str) -> bool | str:
        assert self._filter is not None
        problem = f"--filter: {self._cleaning.filter!r} given; at {where} it"
        try:
            verdict = self._filter(text)
        except Exception as error:  # a user's function can raise anything
            raise ConfigError(f"{problem} raised {_one_line(error)}: mend it") from None
        if not isinstance(verdict, bool | str):
            raise ConfigError(f"{problem} returned a {type(verdict).__name__}; allowed: True, False or a str")
        if isinstance(verdict, str) and not verdict.isascii():
            try:
                verdict.encode()
            except UnicodeEncodeError:
                raise ConfigError(f"{problem} returned half of a surrogate pair; allowed: text as UTF-8") from None
        return verdict

    def overlaps(self, text: str) -> bool:
        """Whether the text shares a 13-gram with the held-out split."""
        grams = text_grams(text)
        # A search of a large array misses the cache at every step: one look at the first bits rules most out, and in
        # order the searches of neighbours touch the same memory.
        grams = np.sort(grams[self._held_out_prefixes[grams >> self._shift]])
        places = np.searchsorted(self._held_out, grams)
        return bool(np.any(self._held_out.take(places, mode="clip") == grams))

    def signature(self, text: str) -> bytes:
        """MinHash of the text's 5-word shingles: 128 little-endian uint32. A text of fewer words is one shingle.

        The share of equal values of two signatures estimates their texts'
        Jaccard similarity (Broder, "On the resemblance and containment of documents", 1997).
        """
        assert self._cleaning.near_duplicates, "signatures are for near duplicates"
        words = _word_hashes(text)
        if len(words) == 0:
            words = np.frombuffer(document_hash(text), dtype=np.uint64)
        # The lower bits of a sum of products are the weaker ones.
        shingles = (_windows(words, min(SHINGLE_WORDS, len(words))) >> np.uint64(32)).tolist()
        minhash = self._no_shingles.copy()
        for first in range(0, len(shingles), SHINGLES_AT_ONCE):
            minhash.update_batch(shingles[first : first + SHINGLES_AT_ONCE])
        return minhash.hashvalues.astype("<u4").tobytes()


# A document is dropped by it, and then counted.
language_of = functools.lru_cache(maxsize=1)(languages.language_of)


def load_filter(name: str) -> Callable[[str], object]:
    """Import a user's `package.module:function` from the Python path or the current directory. Raises ConfigError."""
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise ConfigError(f"--filter: {name!r} given; allowed: package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module can raise anything
        raise ConfigError(
            f"--filter: {name!r} given; importing {module_name} raised {_one_line(error)}; allowed: a module on the "
            "Python path or in the current directory"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"--filter: {name!r} given; allowed: a function in {module.__file__ or module_name}")
    return function


def document_hash(text: str) -> bytes:
    """16 bytes of the text's sha256: what makes it a duplicate, and what decides whether it is held out."""
    return hashlib.sha256(text.encode()).digest()[:16]


def is_held_out(document_hash: bytes, fraction: float) -> bool:
    """Whether the hash, as a number in [0, 1), is below `fraction`: other documents have no say in it."""
    return int.from_bytes(document_hash, "big") < fraction * 2.0**128


def text_grams(text: str) -> Hashes:
    """Hashes of the text's 13-grams, the same on every machine. # (max(0, num_words - 12),)

    Words are runs of letters, digits and underscores in lower case, at most 64 characters each; where words are
    written without spaces, such a run is a clause. A text of fewer than 13 words has no 13-gram: it drops nothing and
    is not dropped, or a held-out "Table of contents" would take every such document out of the training text.
    """
    return _windows(_word_hashes(text), OVERLAP_WORDS)


def write_grams(file: Path, grams: Iterable[Hashes]) -> int:
    """Write all hashes once, sorted, in numpy's .npy format, for `Cleaner` to map; returns their number.

    Memory: some 24 bytes for each word of the held-out text. The file may be seen half written.
    """
    unique = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *grams]))
    with file.open("wb") as opened:
        np.save(opened, unique)
    return len(unique)


# Overlaps and signature of a document need the same hashes, one after the other.
@functools.lru_cache(maxsize=1)
def _word_hashes(text: str) -> Hashes:
    return np.fromiter(map(_word_hash, WORD.findall(text.lower())), dtype=np.uint64)


@functools.lru_cache(maxsize=CACHED_WORDS)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _windows(words: Hashes, num_words: int) -> Hashes:
    """A hash of every `num_words` consecutive words: a polynomial in MULTIPLIER modulo 2^64. # (num_windows,)"""
    return np.convolve(words, POWERS[:num_words], mode="valid") if len(words) >= num_words else words[:0]


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)
