"""Personal data that can be told by its form: e-mail addresses, and numbers of accounts, cards and telephones.

Accounts (IBAN, ISO 13616) and cards (ISO/IEC 7812) have check digits, telephone numbers a plan of each country's; the
packages of the extra `personal` know them. Names, addresses of homes, dates of birth and all else that has no form of
its own is not found.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable

MODULES = ("stdnum", "phonenumbers")
EXTRA = "pip install 'atoll[personal]'"
# A valid e-mail address of the HTML standard, with a dot in its domain; letters of all scripts.
_EMAIL = re.compile(r"(?<![\w.+-])[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[^\W_](?:[\w-]{0,62}\.){1,8}[^\W\d_]{2,63}\b")
_ACCOUNT = re.compile(r"\b[A-Z]{2}[0-9]{2}(?:[ \u00a0]?[A-Z0-9]){11,30}\b")
_CARD = re.compile(r"(?<![\w.,-])[3-6][0-9](?:[ \u00a0-]?[0-9]){11,17}(?![\w-]|[.,][0-9])")
# Without a country's code nothing says whose plan to look in.
_TELEPHONE = re.compile(r"(?<![\w+])\+[0-9(][0-9 ()./\u00a0-]{5,24}[0-9]")
_NOT_COMPACT = re.compile(r"[ \u00a0-]")
# Digits of the shortest card number.
LEAST_CARD = 13


def is_installed() -> bool:
    """Whether the extra `personal` is."""
    return all(importlib.util.find_spec(module) for module in MODULES)


def masked(text: str) -> tuple[str, Counter[str]]:
    """The text with [e-mail], [account], [card] and [telephone] for what was found, and how often each was."""
    found: Counter[str] = Counter()
    for kind, pattern, is_one in (
        ("e-mail", _EMAIL, bool),
        ("account", _ACCOUNT, _is_account),
        ("telephone", _TELEPHONE, _is_telephone),  # before cards: what follows a + is none
        ("card", _CARD, _is_card),
    ):
        text, found[kind] = _masked(text, f"[{kind}]", pattern, is_one)
    return text, +found


def _masked(text: str, mask: str, pattern: re.Pattern[str], is_one: Callable[[str], bool]) -> tuple[str, int]:
    """Of each candidate the longest beginning that is one is masked: other words, or another one, may follow it."""
    parts, done, position = [], 0, 0
    while match := pattern.search(text, position):
        position = match.end()
        for end in range(match.end(), match.start(), -1):
            ends_word = end == match.end() or not text[end].isalnum()
            if ends_word and is_one(text[match.start() : end]):
                parts += [text[done : match.start()], mask]
                done = position = end
                break
    return "".join([*parts, text[done:]]), len(parts) // 2


def _is_account(candidate: str) -> bool:
    from stdnum import iban

    return bool(iban.is_valid(_NOT_COMPACT.sub("", candidate)))


def _is_card(candidate: str) -> bool:
    from stdnum import luhn

    compact = _NOT_COMPACT.sub("", candidate)
    return len(compact) >= LEAST_CARD and bool(luhn.is_valid(compact))


def _is_telephone(candidate: str) -> bool:
    import phonenumbers

    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(candidate, None))
    except phonenumbers.NumberParseException:
        return False
