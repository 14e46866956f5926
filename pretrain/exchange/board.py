"""Words that silos leave for one another, on a board that the first silo of the roster keeps. No torch.

Each may read all and writes under its own name alone, so many words and so long at most.
"""

import json
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from pretrain.exchange.channel import BrokenError, Channel, GoneError
from pretrain.host.foreign import loads, shown

KINDS = ("said", "beat", "left", "done", "member", "lane")
WORDS_BYTES = 4 << 20  # as much as a record may have
FRAME_BYTES = 2 * WORDS_BYTES + (1 << 20)  # with what JSON adds
MOST_WORDS, MOST_BYTES = 100, 16 << 20  # of one silo
KEY_CHARACTERS = 200


class Board(Protocol):
    """Who reads and writes as one silo. All raise BrokenError when the board is gone, or refuses it."""

    def set(self, key: str, words: str) -> None:
        """Write under our own name: `KIND/NAME`, or with more between the two."""

    def claim(self, key: str, words: str) -> str:
        """Write, unless something is there; returns what is there then."""

    def delete(self, key: str) -> None:
        """Take our own words away."""

    def get(self, key: str) -> str | None:
        """What is there, if anything is."""

    def have(self, keys: Sequence[str]) -> list[bool]:
        """Under which keys something is."""


class Words:
    """The words themselves, in memory."""

    def __init__(self, roster: Sequence[str]) -> None:
        self._roster, self._lock = frozenset(roster), threading.Lock()
        self._words: dict[str, dict[str, str]] = {silo: {} for silo in roster}

    def of(self, silo: str) -> "OwnBoard":
        """The board, as a silo may use it."""
        return OwnBoard(self, silo)

    def put(self, silo: str, key: str, words: str | None, *, replace: bool = True) -> str:
        """Write as a silo, or take away (None); returns what is there then. Raises BrokenError for what it may not."""
        kind, _, name = key.partition("/")[0], *key.rpartition("/")[1:]
        if kind not in KINDS or name != silo or len(key) > KEY_CHARACTERS:
            raise BrokenError(f"{silo} wrote to {shown(key)}; allowed: its own name, after {', '.join(KINDS)}")
        with self._lock:
            own = self._words[silo]
            if words is None:
                own.pop(key, None)
                return ""
            if not replace and key in own:
                return own[key]
            others = sum(len(text) for name, text in own.items() if name != key)
            if len({*own, key}) > MOST_WORDS or len(words) > WORDS_BYTES or others + len(words) > MOST_BYTES:
                raise BrokenError(f"{silo} has too much to say: {len(own)} words, {others + len(words)} characters")
            own[key] = words
            return words

    def find(self, key: str) -> str | None:
        """What is there."""
        with self._lock:
            return self._words.get(key.rpartition("/")[2], {}).get(key)

    def serve(self, channel: Channel, *, seconds: float) -> None:
        """Answer a silo until it goes. Raises BrokenError for what is no request, or one that it may not make."""
        if channel.silo not in self._roster:
            raise BrokenError(f"{shown(channel.silo)} is not in the roster")
        board = self.of(channel.silo)
        while True:
            try:
                asked = channel.receive_frame(FRAME_BYTES, seconds, begin_seconds=None)
            except GoneError:
                channel.close()
                return
            channel.send_frame(json.dumps(answer(board, asked), ensure_ascii=False).encode(), seconds)


def answer(board: "OwnBoard", asked: bytes) -> Any:
    """What a silo gets that asks so; see `Board`. Raises BrokenError."""
    try:
        match loads(asked):
            case ["set", str(key), str(words)]:
                return board.set(key, _speakable(words))
            case ["claim", str(key), str(words)]:
                return board.claim(key, _speakable(words))
            case ["delete", str(key)]:
                return board.delete(key)
            case ["get", str(key)]:
                return board.get(key)
            case ["have", [*keys]] if all(type(key) is str for key in keys):
                return board.have(keys)
    except ValueError as error:
        raise BrokenError(f"what it asked is not JSON: {shown(error)}") from None
    raise BrokenError(f"it asked {shown(asked.decode(errors='replace'), limit=60)}; that is no request")


def _speakable(words: str) -> str:
    words.encode()  # halves of a pair of surrogates are no text: ValueError
    return words


class OwnBoard:
    """The board where it is kept."""

    def __init__(self, words: Words, silo: str) -> None:
        self._words, self._silo = words, silo

    def set(self, key: str, words: str) -> None:
        """See `Board`."""
        self._words.put(self._silo, key, words)

    def claim(self, key: str, words: str) -> str:
        """See `Board`."""
        return self._words.put(self._silo, key, words, replace=False)

    def delete(self, key: str) -> None:
        """See `Board`."""
        self._words.put(self._silo, key, None)

    def get(self, key: str) -> str | None:
        """See `Board`."""
        return self._words.find(key)

    def have(self, keys: Sequence[str]) -> list[bool]:
        """See `Board`."""
        return [self._words.find(key) is not None for key in keys]


class FarBoard:
    """The board seen from another process; threads take turns."""

    def __init__(self, channel: Channel, *, seconds: float) -> None:
        """An answer that takes longer than `seconds` does not come."""
        self._channel, self._seconds, self._lock = channel, seconds, threading.Lock()

    def close(self) -> None:
        """Go."""
        with self._lock:
            self._channel.close()

    def set(self, key: str, words: str) -> None:
        """See `Board`."""
        self._ask("set", key, words)

    def claim(self, key: str, words: str) -> str:
        """See `Board`."""
        if not isinstance(found := self._ask("claim", key, words), str):
            raise BrokenError(f"it answered {shown(found)}")
        return found

    def delete(self, key: str) -> None:
        """See `Board`."""
        self._ask("delete", key)

    def get(self, key: str) -> str | None:
        """See `Board`."""
        if not isinstance(found := self._ask("get", key), str | None):
            raise BrokenError(f"it answered {shown(found)}")
        return found

    def have(self, keys: Sequence[str]) -> list[bool]:
        """See `Board`."""
        found = self._ask("have", list(keys))
        if not isinstance(found, list) or [type(one) for one in found] != [bool] * len(keys):
            raise BrokenError(f"it answered {shown(found)}")
        return found

    def _ask(self, *asked: Any) -> Any:
        data = json.dumps(asked, ensure_ascii=False).encode()
        with self._lock:
            try:
                self._channel.send_frame(data, self._seconds)
                answer = self._channel.receive_frame(FRAME_BYTES, self._seconds)
            except BrokenError:
                self._channel.cut()  # a late answer must not be taken for that of another question
                raise
        try:
            return loads(answer)
        except ValueError as error:
            raise BrokenError(f"it answered what is not JSON: {shown(error)}") from None
