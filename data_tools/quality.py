"""What published filters for the quality of web text measure, and which documents they would drop. Nothing is dropped.

Words are what white space separates, lines are those that are not blank, and shares of characters are of all characters
of the text. Sources of the thresholds:

    Gopher   Rae et al. 2021, https://arxiv.org/abs/2112.11446, section A.1.1 (quality filtering) and table A1
    C4       Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.2
    FineWeb  Penedo et al. 2024, https://arxiv.org/abs/2406.17557, section 3.6

Gopher's stop words are English, and a script without spaces has no words in this sense: for other text these rules say
little. Not measured are Gopher's repeated 5- to 10-grams and C4's rules for single lines and sentences.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

# Gopher: a document needs two of these.
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
LINE_ENDS = tuple(".!?:;\"'\u201d\u2019\u00bb\u2026\u3002\uff01\uff1f\u061f\u0964")
BULLETS = tuple("-*\u2022\u2023\u25e6\u25aa\u25cf\u00b7")
ELLIPSES = ("...", "\u2026")
SHORT_LINE_CHARACTERS = 30

WORDS, WORD_LENGTH = "words", "mean word length"
PUNCTUATED, SHORT = "lines that end in punctuation", "lines below 30 characters"
BULLETED, TRAILING = "lines that begin with a bullet", "lines that end in an ellipsis"
REPEATED, REPEATED_CHARACTERS = "repeated lines", "characters in repeated lines"
REPEATED_PARAGRAPHS, REPEATED_PARAGRAPH_CHARACTERS = "repeated paragraphs", "characters in repeated paragraphs"
SYMBOLS, ALPHABETIC = "symbols (# and ...) a word", "words with a letter"
TOP_2, TOP_3, TOP_4 = (f"characters in the top {n}-gram" for n in (2, 3, 4))
_STOPPING, _BRACKETS, _LOREM = "stop words", "curly brackets", "lorem ipsum"

MEASURES = (
    *(WORDS, WORD_LENGTH, PUNCTUATED, SHORT, BULLETED, TRAILING, REPEATED, REPEATED_CHARACTERS, REPEATED_PARAGRAPHS),
    *(REPEATED_PARAGRAPH_CHARACTERS, SYMBOLS, ALPHABETIC, TOP_2, TOP_3, TOP_4),
)
"""What `measured` gives a distribution of, in this order."""

# The name of a rule says which documents it drops.
RULES: dict[str, Callable[[Mapping[str, float]], bool]] = {
    "Gopher: words below 50": lambda of: of[WORDS] < 50,
    "Gopher: words above 100,000": lambda of: of[WORDS] > 100_000,
    "Gopher: mean word length below 3": lambda of: of[WORD_LENGTH] < 3,
    "Gopher: mean word length above 10": lambda of: of[WORD_LENGTH] > 10,
    "Gopher: symbols a word above 0.1": lambda of: of[SYMBOLS] > 0.1,
    "Gopher: bullet lines above 0.9": lambda of: of[BULLETED] > 0.9,
    "Gopher: ellipsis lines above 0.3": lambda of: of[TRAILING] > 0.3,
    "Gopher: words with a letter below 0.8": lambda of: of[ALPHABETIC] < 0.8,
    "Gopher: stop words (English) below 2": lambda of: of[_STOPPING] < 2,
    "Gopher: repeated lines above 0.3": lambda of: of[REPEATED] > 0.3,
    "Gopher: repeated paragraphs above 0.3": lambda of: of[REPEATED_PARAGRAPHS] > 0.3,
    "Gopher: repeated lines' characters above 0.2": lambda of: of[REPEATED_CHARACTERS] > 0.2,
    "Gopher: repeated paragraphs' characters above 0.2": lambda of: of[REPEATED_PARAGRAPH_CHARACTERS] > 0.2,
    "Gopher: top 2-gram above 0.2": lambda of: of[TOP_2] > 0.2,
    "Gopher: top 3-gram above 0.18": lambda of: of[TOP_3] > 0.18,
    "Gopher: top 4-gram above 0.16": lambda of: of[TOP_4] > 0.16,
    "C4: a curly bracket": lambda of: of[_BRACKETS] > 0,
    "C4: lorem ipsum": lambda of: of[_LOREM] > 0,
    "FineWeb: punctuated lines at most 0.12": lambda of: of[PUNCTUATED] <= 0.12,
    "FineWeb: repeated lines' characters from 0.1": lambda of: of[REPEATED_CHARACTERS] >= 0.1,
    "FineWeb: short lines from 0.67": lambda of: of[SHORT] >= 0.67,
}


def measured(text: str) -> dict[str, float]:
    """Of a text that is not blank, each of MEASURES and what the other rules ask for."""
    words = text.split()
    lines = [line for raw in text.split("\n") if (line := raw.strip())]
    paragraphs = [paragraph for raw in text.split("\n\n") if (paragraph := raw.strip())]
    repeated, repeated_characters = _repeated(lines, len(text))
    repeated_paragraphs, repeated_paragraph_characters = _repeated(paragraphs, len(text))
    num_symbols = max(text.count("#"), sum(map(text.count, ELLIPSES)))
    return {
        WORDS: len(words),
        WORD_LENGTH: sum(map(len, words)) / len(words),
        PUNCTUATED: sum(line.endswith(LINE_ENDS) for line in lines) / len(lines),
        SHORT: sum(len(line) < SHORT_LINE_CHARACTERS for line in lines) / len(lines),
        BULLETED: sum(line.startswith(BULLETS) for line in lines) / len(lines),
        TRAILING: sum(line.endswith(ELLIPSES) for line in lines) / len(lines),
        REPEATED: repeated,
        REPEATED_CHARACTERS: repeated_characters,
        REPEATED_PARAGRAPHS: repeated_paragraphs,
        REPEATED_PARAGRAPH_CHARACTERS: repeated_paragraph_characters,
        SYMBOLS: num_symbols / len(words),
        ALPHABETIC: sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) / len(words),
        **{name: _top_share(words, n, len(text)) for name, n in ((TOP_2, 2), (TOP_3, 3), (TOP_4, 4))},
        _STOPPING: len(STOP_WORDS.intersection(word.lower() for word in words)),
        _BRACKETS: text.count("{"),
        _LOREM: text.lower().count("lorem ipsum"),
    }


def _repeated(pieces: Sequence[str], num_characters: int) -> tuple[float, float]:
    """Share of the pieces that an earlier one equals, and of the text's characters that are in them."""
    counts = Counter(pieces)
    again = {piece: number - 1 for piece, number in counts.items() if number > 1}
    return sum(again.values()) / len(pieces), sum(len(one) * number for one, number in again.items()) / num_characters


def _top_share(words: Sequence[str], n: int, num_characters: int) -> float:
    """Share of characters in the most frequent run of `n` words, with a space between; 0 where none comes twice."""
    counts = Counter(zip(*(itertools.islice(words, first, None) for first in range(n)), strict=False))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    longest = max(sum(map(len, gram)) for gram, number in counts.items() if number == most)
    return min(1.0, (longest + n - 1) * most / num_characters)


# --- distributions ----------------------------------------------------------------------------------------------------


def rounded(value: float) -> float:
    """To hundredths below 1, to two digits above, so that a distribution has few values however many documents."""
    return float(f"{value:.2f}" if value < 1 else f"{value:.2g}")


def quantile(counts: Mapping[str, int], share: float) -> float:
    """The smallest of the values, each with its number, that `share` of them do not exceed."""
    rank, seen = share * sum(counts.values()), 0
    for value in sorted(counts, key=float):
        seen += counts[value]
        if seen >= rank:
            break
    return float(value)
