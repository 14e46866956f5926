"""What a worker process does with a block of conversations: parse, render, tokenize, and say what is learned.

A token is learned if its first character is one that the assistant says. Text within a conversation that spells a
special token stays text: such text is cut in the middle of the name and encoded in parts.
"""

import dataclasses
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer, processors
from tokenizers.normalizers import NFC

from data_tools.chat_template import Renderer, Span, Template
from data_tools.clean import is_held_out
from data_tools.conversations import Conversation, NoConversationError, parse_conversation, parse_pair
from data_tools.encode import BATCH_BYTES, Encoded
from data_tools.quality import MEASURES, RULES
from data_tools.sources import Bad, Block, parse_block
from data_tools.split import split_at_turns
from data_tools.tokenizer import BYTE_ALPHABET, end_of_text_id, load_tokenizer
from pretrain.config.errors import ConfigError
from pretrain.silo.shards import TOKEN_TYPES, token_type_for
from pretrain.silo.vocabulary import vocab_size_of

TOO_LONG = ("stop", "skip", "split")
# Private use; of these one is taken that is not in the text.
CUTS = [chr(code) for code in range(0xE000, 0xE100)]


@dataclass(kw_only=True, frozen=True)
class ChatJob:
    """What every worker is told at its start."""

    tokenizer: Path
    """The tokenizer.json."""
    template: Template
    """What makes text of a conversation."""
    sequence_tokens: int
    """The most that a conversation may have."""
    too_long: str
    """What is done about a longer one: stop, skip, or split it between turns."""
    held_out: float
    """Share of conversations that are held out, 0 to below 1."""
    prompt_tokens: int = 0
    """Room before each conversation, of end-of-text tokens, whose places a prompt takes in training."""
    pairs: bool = False
    """Whether the records are preference pairs, each of which is two documents, the chosen one first."""


@dataclass(kw_only=True)
class Text:
    """A conversation as text."""

    where: str
    conversation: Conversation
    kind: str
    pieces: list[str]
    learned: list[list[Span]]  # of each piece
    digest: bytes
    is_held_out: bool
    num_bytes: int
    parts: tuple[int, ...] = ()
    """Of a pair, which is one text: the tokens of each of its documents."""


class ChatEncoder:
    """Turns blocks of conversations into tokens; one a worker process."""

    def __init__(self, job: ChatJob) -> None:
        """Raises ConfigError for a tokenizer or a template that cannot be used."""
        self._job = job
        self._tokenizer = load_tokenizer(job.tokenizer)
        self._tokenizer.encode_special_tokens = False
        # Where a token begins is where its first character is, white space included.
        self._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        self.end_id = end_of_text_id(self._tokenizer)
        self.vocab_size = vocab_size_of(self._tokenizer)
        self._bytes_of = _token_bytes(self._tokenizer)
        self._normalizes = self._tokenizer.normalizer is not None
        self._dtype = TOKEN_TYPES[token_type_for(self.vocab_size)]
        added = self._tokenizer.get_added_tokens_decoder().values()
        names = {token.content for token in added if token.special and token.content}
        names.add(str(self._tokenizer.id_to_token(self.end_id)))  # which some have as a piece of text
        self._names = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        in_json = (re.escape(json.dumps(name)[1:-1]) for name in sorted(names))
        self._names_in_json = re.compile("|".join(in_json))
        self._renderer = Renderer(job.template, {token.content for token in added})
        self.split: Counter[str] = Counter()
        """What became of those that were split, of all since it was emptied; see `Encoded`."""

    def encode(self, block: Block) -> Encoded:
        """Parse, render and tokenize a block. Raises ConfigError for what ends the work."""
        bad: list[Bad] = []
        dropped: list[tuple[str, int]] = []
        self.split.clear()
        kept = list(self.each(block, bad, dropped))
        return Encoded(
            tokens=np.concatenate([tokens for _, tokens, _ in kept]) if kept else np.empty(0, self._dtype),
            trained=np.concatenate([learned for *_, learned in kept]) if kept else np.empty(0, np.bool_),
            document_tokens=np.array([len(tokens) for _, tokens, _ in kept], dtype=np.int64),
            document_bytes=np.array([text.num_bytes for text, *_ in kept], dtype=np.int64),
            held_out=np.array([text.is_held_out for text, *_ in kept], dtype=np.bool_),
            chosen_tokens=np.array([text.parts[0] for text, *_ in kept], np.int64) if self._job.pairs else None,
            hashes=[text.digest for text, *_ in kept],
            signatures=[],
            languages=[],
            quality=np.empty((0, len(MEASURES)), np.float64),
            would_drop=np.empty((0, len(RULES)), np.bool_),
            dropped=dropped,
            bad=bad,
            split=self.split.copy(),
        )

    def _with_room(
        self, tokens: npt.NDArray[Any], learned: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """The same with room for a prompt before it."""
        if not (room := self._job.prompt_tokens):
            return tokens, learned
        before = np.full(room, self.end_id, tokens.dtype)
        return np.concatenate([before, tokens]), np.concatenate([np.zeros(room, np.bool_), learned])

    def each(
        self, block: Block, bad: list[Bad], dropped: list[tuple[str, int]]
    ) -> Iterator[tuple[Text, npt.NDArray[Any], npt.NDArray[np.bool_]]]:  # (num_tokens,) both
        """Of every conversation that is kept its text, its tokens, and which of them are learned.

        What cannot be used goes to `bad`; of what is left out the reason and bytes go to `dropped`. Raises ConfigError
        as `encode` does.
        """
        found = self._tokens(self._texts(block, bad))
        for text, *own in _paired(found) if self._job.pairs else found:
            tokens, learned = self._with_room(*own)
            if len(tokens) > self._job.sequence_tokens:
                pieces = self._too_long(text, tokens, learned)
                yield from pieces
                if not pieces:
                    dropped.append(("too long", text.num_bytes))
            elif not all(part.any() for part in np.split(learned, np.cumsum(text.parts)[:-1])):
                bad.append(
                    Bad("no trained token", f"{text.where}: its template leaves nothing of it to learn: drop it")
                )
            else:
                yield text, tokens, learned

    def _too_long(
        self, text: Text, tokens: npt.NDArray[Any], learned: npt.NDArray[np.bool_]
    ) -> list[tuple[Text, npt.NDArray[Any], npt.NDArray[np.bool_]]]:
        """What is kept of it: nothing, or its pieces. Raises ConfigError where the work shall stop."""
        if self._job.too_long == "skip":
            return []
        if self._job.too_long == "stop":
            prompt = self._job.prompt_tokens
            of_prompt = f", {prompt:,} of them of the prompt before it," if prompt else ""
            what, others = ("a pair", "skip") if text.parts else ("a conversation", "split or skip")
            raise ConfigError(
                f"{text.where}: {what} of {len(tokens):,} tokens{of_prompt} given; allowed: --sequence-tokens "
                f"{self._job.sequence_tokens:,}: raise it, shorten the conversation, or give --too-long {others}"
            )
        found = split_at_turns(
            text.conversation, lambda one: len(self._piece(text, one)[1]) <= self._job.sequence_tokens
        )
        pieces = [self._piece(text, one) for one in found.pieces]
        self.split.update(
            conversations=1,
            pieces=len(pieces),
            turns_cut=found.num_cut,
            tokens=len(tokens),
            piece_tokens=sum(len(one) for _, one, _ in pieces),
            trained_tokens=int(learned.sum()),
            piece_trained_tokens=sum(int(one.sum()) for *_, one in pieces),
        )
        return pieces

    def _piece(
        self, text: Text, piece: Conversation
    ) -> tuple[Text, npt.NDArray[Any], npt.NDArray[np.bool_]]:  # (num_tokens,) both
        """A part of a conversation, held out if all of it is."""
        try:
            part = dataclasses.replace(self._text(text.where, piece), is_held_out=text.is_held_out)
        except NoConversationError as no:
            raise ConfigError(f"{text.where}: {no.what}") from None
        except ConfigError as error:
            raise ConfigError(f"{text.where}: {error}") from None
        [(_, *own)] = self._encoded([part])
        tokens, learned = self._with_room(*own)
        return part, tokens, learned

    def _texts(self, block: Block, bad: list[Bad]) -> Iterator[Text]:
        """Every conversation of the block as text; what is none goes to `bad`."""
        for number, record in parse_block(block):
            if isinstance(record, Bad):
                bad.append(record)
                continue
            where = f"{block.part.path}, {block.part.unit} {number}"
            try:
                yield from self._of_record(block, where, record)
            except NoConversationError as no:
                bad.append(Bad(no.reason, f"{where}: {no.what}: mend or drop it"))
            except UnicodeEncodeError:
                bad.append(Bad("half a surrogate pair", f"{where}: half of a surrogate pair in text: mend or drop it"))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None

    def _of_record(self, block: Block, where: str, record: str) -> list[Text]:
        """The conversation of a record, or both of a pair, known by the pair."""
        if self._job.pairs:
            pair = parse_pair(record)
            digest = Conversation.digest(f"[{','.join(one.canonical() for one in pair)}]")
            found = [dataclasses.replace(self._text(where, one), digest=digest) for one in pair]
        else:
            found = [self._text(where, parse_conversation(record))]
        split = block.part.split
        for text in found:
            text.is_held_out = split == "valid" if split else is_held_out(text.digest, self._job.held_out)
        return found

    def _text(self, where: str, given: Conversation) -> Text:
        """A conversation as text; whether it is held out is for the caller to say."""
        canonical = given.canonical()
        conversation, cut = self._shielded(given, canonical)
        rendered = self._renderer.render(conversation)
        pieces = _parted(rendered.text, cut)
        begins = [0, *itertools.accumulate(len(piece) + len(cut) for piece in pieces)]
        return Text(
            where=where,
            conversation=given,
            kind=given.kind,
            pieces=pieces,
            learned=[
                [(max(0, span[0] - begin), span[1] - begin) for span in rendered.learned if span[1] > begin]
                for begin in begins[:-1]
            ],
            digest=Conversation.digest(canonical),
            num_bytes=sum(len(piece.encode()) for piece in pieces),
            is_held_out=False,
        )

    def _shielded(self, given: Conversation, canonical: str) -> tuple[Conversation, str]:
        """The same with a mark within all that spells a special token, and the mark; none if nothing does."""
        if not self._names_in_json.search(canonical):
            return given, ""
        cut = next(one for one in CUTS if json.dumps(one)[1:-1] not in canonical)
        return given.with_texts(lambda text: self._names.sub(lambda name: _halved(name[0], cut), text)), cut

    def prompt(self, begun: Conversation) -> list[int]:
        """Tokens of a conversation up to where the assistant is to speak, as they are in training.

        Raises NoConversationError where the template refuses it, and ConfigError where it leaves something out.
        """
        conversation, cut = self._shielded(begun, begun.canonical())
        pieces = _parted(self._renderer.prompt(conversation), cut)
        encodings = self._tokenizer.encode_batch(pieces, add_special_tokens=False)
        return [one for encoding in encodings for one in encoding.ids]

    def spelled(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones, too."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end what the assistant says: a turn's, and a text's."""
        return frozenset({self.end_id, self._tokenizer.token_to_id(self._renderer.end_of_turn) or 0})

    def written(self, conversation: Conversation) -> str:
        """What a template writes of a conversation's last turn, all that is learned of it. Raises as `prompt` does."""
        rendered = self._renderer.render(conversation)
        begin, end = rendered.learned[-1]
        return rendered.text[begin:end].rstrip().removesuffix(self._renderer.end_of_turn)

    def _tokens(
        self, texts: Iterator[Text]
    ) -> Iterator[tuple[Text, npt.NDArray[Any], npt.NDArray[np.bool_]]]:  # (num_tokens,) both
        """Tokens of each conversation, and which of them are learned."""
        batch: list[Text] = []
        num_characters = 0
        for text in texts:
            batch.append(text)
            num_characters += sum(map(len, text.pieces))
            if num_characters >= BATCH_BYTES:
                yield from self._encoded(batch)
                batch, num_characters = [], 0
        yield from self._encoded(batch)

    def _encoded(self, batch: list[Text]) -> Iterator[tuple[Text, npt.NDArray[Any], npt.NDArray[np.bool_]]]:
        pieces = [piece for text in batch for piece in text.pieces]
        encode = self._tokenizer.encode_batch if self._bytes_of is None else self._tokenizer.encode_batch_fast
        encodings = iter(encode(pieces, add_special_tokens=False))
        for text in batch:
            ids: list[int] = []
            spans: list[Span] = []
            for piece, learned in zip(text.pieces, text.learned, strict=True):
                encoding = next(encodings)
                first = self._first_tokens(piece, encoding, [edge for span in learned for edge in span])
                spans += [
                    (len(ids) + begin, len(ids) + end) for begin, end in zip(first[::2], first[1::2], strict=True)
                ]
                ids += encoding.ids
            mask = np.zeros(len(ids), np.bool_)
            for begin, end in spans:
                mask[begin:end] = True
            mask[:1] = False  # nothing is there to predict it from
            yield text, np.array(ids, dtype=self._dtype), mask

    def _first_tokens(self, piece: str, encoding: Encoding, characters: list[int]) -> list[int]:
        """For each of some characters the first token that begins there or after it."""
        if self._bytes_of is not None:
            ends = np.cumsum(self._bytes_of[encoding.ids])
            is_ascii = piece.isascii()
            num_bytes = len(piece) if is_ascii else len(piece.encode())
            is_as_given = is_ascii or not self._normalizes or unicodedata.is_normalized("NFC", piece)
            if is_as_given and len(ends) and ends[-1] == num_bytes:
                places = characters if is_ascii else [len(piece[:one].encode()) for one in characters]
                # A token begins where the one before it ends.
                found: list[int] = np.searchsorted(np.concatenate([[0], ends[:-1]]), places).tolist()
                return found
            encoding = self._tokenizer.encode(piece, add_special_tokens=False)
        return [_first_token(encoding, one, len(piece)) for one in characters]


def _paired(
    found: Iterator[tuple[Text, npt.NDArray[Any], npt.NDArray[np.bool_]]],
) -> Iterator[tuple[Text, npt.NDArray[Any], npt.NDArray[np.bool_]]]:  # (num_tokens,) both
    """Two by two as one text, the chosen one first."""
    for (text, *chosen), (other, *rejected) in zip(found, found, strict=True):
        tokens, learned = (np.concatenate(both) for both in zip(chosen, rejected, strict=True))
        parts = (len(chosen[0]), len(rejected[0]))
        yield dataclasses.replace(text, num_bytes=text.num_bytes + other.num_bytes, parts=parts), tokens, learned


def _token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:  # (vocab_size,)
    """How many bytes each token stands for, where a vocabulary is of bytes, one character each; or else None.

    The library takes longer where it has to say which characters a token is of.
    """
    added = {token.content: len(token.content.encode()) for token in tokenizer.get_added_tokens_decoder().values()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    alphabet = set(BYTE_ALPHABET)
    if not all(alphabet.issuperset(token) for token in vocabulary.keys() - added.keys()):
        return None
    if not isinstance(tokenizer.normalizer, NFC | None):
        return None
    found = np.zeros(vocab_size_of(tokenizer), np.int64)
    for token, number in vocabulary.items():
        found[number] = added.get(token, len(token))
    return found


def _first_token(encoding: Encoding, character: int, num_characters: int) -> int:
    """The first token that begins at a character or after it."""
    while character < num_characters:
        token = encoding.char_to_token(character)
        if token is not None:
            while token < len(encoding) and (encoding.token_to_chars(token) or (character, 0))[0] < character:
                token += 1
            return int(token)
        character += 1
    return len(encoding)


def _parted(text: str, cut: str) -> list[str]:
    """What is rendered, parted at the marks. Raises NoConversationError where the template has spelled them out."""
    if cut and json.dumps(cut)[1:-1] in text:
        raise NoConversationError("special token", "it spells a special token where its template writes JSON in ASCII")
    return text.split(cut) if cut else [text]


def _halved(name: str, cut: str) -> str:
    middle = len(name) // 2
    return name[:middle] + cut + name[middle:]


_encoder: ChatEncoder


def start(job: ChatJob) -> None:
    """Make this process's encoder."""
    global _encoder
    _encoder = ChatEncoder(job)


def encode(item: tuple[int, Block]) -> Encoded:
    """`ChatEncoder.encode` of a numbered block."""
    return _encoder.encode(item[1])
