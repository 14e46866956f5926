"""A conversation that is too long for a row, as several that are not: cut between turns, never within one.

Every piece has the system's text and the tools again. A piece that goes on in the middle of a trajectory begins with
what the next turn answers: the user's last words, and the step before it (its calls and their results), which are read
there and not learned a second time. A turn that is too long even so is in no piece's learned part, and is counted; what
comes after it may still begin with it. Results that nothing follows in a piece are left out of it, as nothing of them
is learned.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from data_tools.conversations import Conversation, Message


@dataclass(kw_only=True)
class Split:
    """What became of one conversation."""

    pieces: list[Conversation] = field(default_factory=list)
    """In their order; every turn is learned in one of them, or in none."""
    num_cut: int = 0
    """Turns of the assistant that are learned in none, though they were to be."""


def split_at_turns(whole: Conversation, fits: Callable[[Conversation], bool]) -> Split:
    """As few pieces as it takes, each as long as `fits` allows. It may be asked some log2(turns) times a piece."""
    turns = [place for place, message in enumerate(whole.messages) if message["role"] == "assistant"]
    done = Split()
    while turns:
        piece, num_turns = _longest(whole, turns, fits)
        if piece is None:
            done.num_cut += turns[0] not in whole.untrained
        elif len(piece.untrained) < sum(message["role"] == "assistant" for message in piece.messages):
            done.pieces.append(piece)
        turns = turns[num_turns:]
    return done


def _longest(
    whole: Conversation, turns: Sequence[int], fits: Callable[[Conversation], bool]
) -> tuple[Conversation | None, int]:
    """The longest piece that begins with the first of `turns`, if any fits, and how many of them are done with."""
    found, low, high = None, 0, len(turns)
    while low < high:  # a piece with a turn more is longer
        middle = (low + high + 1) // 2
        piece = _piece(whole, turns[0], turns[middle - 1])
        if fits(piece):
            found, low = piece, middle
        else:
            high = middle - 1
    return found, max(1, low)


def _piece(whole: Conversation, first: int, last: int) -> Conversation:
    """What is learned are the turns from message `first` to message `last`."""
    places = [*_context(whole.messages, first), *range(first, last + 1)]
    untrained = {new for new, old in enumerate(places) if _is_read(whole, old, first)}
    messages = [whole.messages[place] for place in places]
    return Conversation(messages=messages, tools=whole.tools, untrained=frozenset(untrained))


def _is_read(whole: Conversation, place: int, first: int) -> bool:
    is_turn = whole.messages[place]["role"] == "assistant"
    return is_turn and (place < first or place in whole.untrained)


def _context(messages: Sequence[Message], first: int) -> Iterator[int]:
    """Places of what a turn at `first` needs before it."""
    if messages[0]["role"] == "system":
        yield 0
    asked = max(place for place in range(first) if messages[place]["role"] == "user")
    yield asked
    if messages[first - 1]["role"] == "tool":
        step = max(place for place in range(first) if messages[place]["role"] == "assistant")
        yield from range(step, first)
