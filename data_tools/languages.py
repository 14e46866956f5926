"""The language of a text, by py3langid: 139 languages, with a model of 5 MB that the package brings.

It is a naive Bayes classifier over n-grams of bytes (Lui and Baldwin, "langid.py", ACL 2012); the same text always gets
the same answer, without a network. Of a long text the beginning alone is looked at.
"""

import functools
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

PACKAGE = "py3langid"
EXTRA = "pip install 'atoll[languages]'"
LOOKED_AT_CHARACTERS = 1000
# Of fewer letters nobody can say a language; of an answer with less probability than this the classifier is not sure.
LEAST_LETTERS = 20
LEAST_PROBABILITY = 0.5
TOO_SHORT, UNCLEAR, NO_LANGUAGE = "too short to say", "unclear", "no language"
# ISO 639-2: no linguistic content.
_NO_LANGUAGE_CODE = "zxx"


def is_installed() -> bool:
    """Whether the extra `languages` is."""
    return bool(importlib.util.find_spec(PACKAGE))


def version() -> str:
    """Of the package: another may have another model."""
    return importlib.metadata.version(PACKAGE)


def known() -> list[str]:
    """The codes of ISO 639 that `language_of` can answer, sorted."""
    return sorted({*_identifier().labels} - {_NO_LANGUAGE_CODE})


def language_of(text: str) -> str:
    """A code of ISO 639, or TOO_SHORT, UNCLEAR (several languages, tables, code) or NO_LANGUAGE."""
    beginning = text[:LOOKED_AT_CHARACTERS]
    if sum(map(str.isalpha, beginning)) < LEAST_LETTERS:
        return TOO_SHORT
    code, probability = _identifier().classify(beginning)
    if probability < LEAST_PROBABILITY:
        return UNCLEAR
    return NO_LANGUAGE if code == _NO_LANGUAGE_CODE else str(code)


@functools.cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
