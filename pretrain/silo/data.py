"""Packed shards to batches. The position, one integer, is all the state there is.

Position p counts the sequences that the silo has consumed since its run began. `Mixture` says which corpus has its turn
at p and `Order` which of its sequences; ranks, micro batches and accumulation only decide who reads it. So a run that
resumes at p, with as many ranks as it likes, repeats and skips nothing.
What a sequence is, batch.py says.
"""

import bisect
import functools
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pretrain.config.errors import ConfigError
from pretrain.silo.batch import Batch, Row, chat_row, stacked, text_row
from pretrain.silo.reference import open_reference
from pretrain.silo.shards import (
    Manifest,
    Shard,
    check_a_sequence,
    check_alike,
    check_enough,
    check_rows,
    count_sequences,
    open_documents,
    open_mask,
    open_shard,
    own_tokens,
    read_manifest,
    text_sha256,
    token_outside_vocabulary,
    trained,
)

# Each mapped shard holds a file descriptor; many systems allow a process 1,024 of them.
MAX_MAPPED_SHARDS = 128
# Four rounds make a Feistel network of random functions pseudo-random for wide halves (Luby and Rackoff 1988); ours
# may be a few bits wide, which takes more.
FEISTEL_ROUNDS = 8


class BadTokenError(ConfigError):
    """A token that the vocabulary lacks, or its like: only the rank that met it can tell the user."""


class PackedTokens:
    """Several packed splits as one long sequence of tokens, or of rows, mapped and never loaded whole."""

    def __init__(
        self,
        directories: Sequence[str | Path],
        *,
        sequence_tokens: int,
        tokenizer_sha256: str | None = None,
        template_sha256: str | None = None,
        prompt_tokens: int = 0,
        keeps_apart: bool = False,
        of_pairs: bool = False,
        key: str = "silo.data",
    ) -> None:
        """Check the manifests and sizes of the splits, in the order given.

        `key` is the configuration key that errors name; tokenizer and template are as of `read_manifest`, a prompt as
        of `check_rows`; `of_pairs`: they are preference pairs, and what their base says of them is read, too. Raises
        ConfigError for a missing, truncated or unknown split, or one that another tokenizer or template packed.
        """
        if not directories:
            raise ConfigError(f"{key}: nothing given; allowed: one or more directories of packed shards")
        self.key = key
        self.sequence_tokens = sequence_tokens
        self.manifests: list[Manifest] = []
        self._shards: list[tuple[Path, Manifest, Shard]] = []
        for directory in map(Path, directories):
            manifest = read_manifest(
                directory, key=key, tokenizer_sha256=tokenizer_sha256, template_sha256=template_sha256
            )
            check_rows(
                manifest,
                directory,
                sequence_tokens,
                key=key,
                prompt_tokens=prompt_tokens,
                keeps_apart=keeps_apart,
            )
            tokenizer_sha256 = manifest.tokenizer_sha256  # so that all splits agree, also where none was given
            if manifest.chat:
                template_sha256 = manifest.chat.template_sha256
            self.manifests.append(manifest)
            self._shards += [(directory, manifest, shard) for shard in manifest.shards]
        check_alike(self.manifests, key=key)
        self.prompt_tokens = prompt_tokens
        self.own_tokens = own_tokens(sequence_tokens, prompt_tokens, in_rows=self.is_chat)
        self._ends = list(itertools.accumulate(shard.num_tokens for _, _, shard in self._shards))
        # How many tokens of its split lie before each shard, where the index of documents counts from.
        starts = [itertools.accumulate((s.num_tokens for s in m.shards[:-1]), initial=0) for m in self.manifests]
        self._in_split = [start for of_split in starts for start in of_split]
        keep = functools.lru_cache(maxsize=MAX_MAPPED_SHARDS)
        self._mapped = keep(lambda index: open_shard(*self._shards[index]))
        self._masks = keep(lambda index: open_mask(self._shards[index][0], self._shards[index][2]))
        self._documents = keep(lambda index: open_documents(*self._shards[index][:2]))
        self.of_pairs, self._references = of_pairs, keep(lambda index: open_reference(*self._shards[index][:2]))

    @property
    def num_tokens(self) -> int:
        """Tokens of all splits together."""
        return self._ends[-1]

    @property
    def is_chat(self) -> bool:
        """Whether these are conversations, whose sequences are rows."""
        return self.manifests[0].chat is not None

    @property
    def num_sequences(self) -> int:
        """Whole sequences; a rest of fewer than `own_tokens` predicted tokens at the very end is not used."""
        return count_sequences(self.num_tokens, self.own_tokens, in_rows=self.is_chat)

    def row(self, index: int) -> Row:
        """Sequence `index`. Raises BadTokenError as `sequence` does, and for documents that end elsewhere than rows."""
        tokens = self.sequence(index)
        if not self.is_chat:
            return text_row(tokens, self.prompt_tokens)
        shard, begin = self._place(index)
        directory, end = self._shards[shard][0], begin + self.sequence_tokens
        documents = self.documents_of(index)
        listed = self._documents(shard)[documents].astype(np.int64) - (self._in_split[shard] + begin)
        try:
            row = chat_row(
                tokens,
                trained(self._masks(shard), begin, end),
                listed,
                prompt_tokens=self.prompt_tokens,
                room_id=self._shards[shard][1].end_of_text_id,
            )
        except ValueError as error:
            raise BadTokenError(f"{self.key}: {directory}: {error}: copy or prepare the split again") from None
        if not self.of_pairs:
            return row
        reference = np.zeros(len(tokens))
        reference[np.concatenate([[0], listed[:-1]])] = self._references(shard)[documents]
        return row._replace(reference=reference)

    def documents_of(self, index: int) -> slice:
        """Which documents of their split row `index` holds."""
        shard, begin = self._place(index)
        in_split, ends = self._in_split[shard] + begin, self._documents(shard)
        bounds = np.searchsorted(ends, np.array([in_split, in_split + self.sequence_tokens], ends.dtype), side="right")
        return slice(*bounds.tolist())

    def num_pairs(self, index: int) -> int:
        """Preference pairs of row `index`."""
        documents = self.documents_of(index)
        return (documents.stop - documents.start) // 2

    def num_trained(self, index: int) -> int:
        """Targets of sequence `index` that have a loss."""
        if not self.is_chat:
            return self.own_tokens
        shard, begin = self._place(index)
        return int(trained(self._masks(shard), begin + 1, begin + self.sequence_tokens).sum())

    def _place(self, index: int) -> tuple[int, int]:
        """In which shard row `index` lies, and the tokens before it there."""
        begin = index * self.sequence_tokens
        shard = bisect.bisect_right(self._ends, begin)
        return shard, begin - (self._ends[shard] - self._shards[shard][2].num_tokens)

    def sequence(self, index: int) -> npt.NDArray[np.int64]:
        """The tokens of sequence `index`. # (own_tokens + 1,), of conversations (own_tokens,)

        Raises BadTokenError, naming the shard, when a token is not below the manifest's vocab_size.
        """
        assert 0 <= index < self.num_sequences, (index, self.num_sequences)
        begin = index * self.own_tokens
        end = begin + self.own_tokens + (not self.is_chat)
        tokens = np.empty(end - begin, dtype=np.int64)
        position = begin
        for shard_index in range(bisect.bisect_right(self._ends, begin), len(self._shards)):
            directory, manifest, shard = self._shards[shard_index]
            shard_begin = self._ends[shard_index] - shard.num_tokens
            piece = self._mapped(shard_index)[position - shard_begin : end - shard_begin]
            if piece.max() >= manifest.vocab_size:
                raise BadTokenError(token_outside_vocabulary(self.key, directory / shard.file, piece.max(), manifest))
            tokens[position - begin : position - begin + len(piece)] = piece
            position += len(piece)
            if position == end:
                break
        return tokens

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some sequences."""
        return stacked([self.row(index) for index in indices], with_positions=self.is_chat)


class Order:
    """A fresh shuffle of all sequences in each epoch, computed for one position at a time, in constant memory.

    Depends on (seed, silo, corpus, num_sequences, position) only. The shuffle is a keyed Feistel permutation of the
    next power of two; a result outside the corpus is permuted again until it is inside (cycle walking): a permutation,
    too.
    """

    def __init__(self, *, seed: int, silo: str, num_sequences: int, corpus: int = 0) -> None:
        """`corpus` is its number among those that are mixed, each of which has an order of its own."""
        assert num_sequences > 0
        self.num_sequences = num_sequences
        self._terms = [seed, silo, corpus] if corpus else [seed, silo]
        num_bits = max(1, (num_sequences - 1).bit_length())
        self._half_bits = (num_bits // 2, num_bits - num_bits // 2)
        self._key = functools.lru_cache(maxsize=4)(self._epoch_key)

    def index(self, position: int) -> int:
        """The sequence at `position`; positions n*num_sequences to (n+1)*num_sequences - 1 are epoch n."""
        epoch, index = divmod(position, self.num_sequences)
        index = self._permute(index, self._key(epoch))
        while index >= self.num_sequences:
            index = self._permute(index, self._key(epoch))
        return index

    def _epoch_key(self, epoch: int) -> bytes:
        return hashlib.sha256(json.dumps([*self._terms, epoch]).encode()).digest()

    def _permute(self, index: int, key: bytes) -> int:
        left_bits, right_bits = self._half_bits
        left, right = index >> right_bits, index & ((1 << right_bits) - 1)
        for feistel_round in range(FEISTEL_ROUNDS):
            message = bytes([feistel_round]) + right.to_bytes(8, "little")
            digest = hashlib.blake2b(message, digest_size=8, key=key).digest()
            mask = (1 << left_bits) - 1
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
            left_bits, right_bits = right_bits, left_bits
        return left << right_bits | right


class Mixture:
    """Corpora that take turns by weight: the sequences of a silo in the order in which it reads them.

    After any number of positions each of two corpora has had its share of them, rounded down or up; of N corpora none
    is N sequences or more away from it. A corpus hands out its own sequences in its own `Order`, epoch after epoch.
    """

    def __init__(
        self,
        corpora: Sequence[PackedTokens],
        *,
        seed: int,
        silo: str,
        weights: Sequence[float] | None = None,
        whole_batches_of: int = 1,
    ) -> None:
        """`weights` are shares of the sequences, one for each corpus, in any scale (None: equal ones).

        With `whole_batches_of` so many sequences an epoch ends with one; the rest of a corpus, its end, is not used.

        Raises ConfigError when a corpus is shorter than one sequence.
        """
        weights = [1.0] * len(corpora) if weights is None else weights
        assert len(corpora) == len(weights) > 0
        for tokens in corpora:
            check_a_sequence(tokens.num_tokens, tokens.own_tokens, key=tokens.key, in_rows=tokens.is_chat)
        self.corpora = list(corpora)
        self._seed = [seed, silo]
        self._orders = [
            Order(
                seed=seed,
                silo=silo,
                corpus=corpus,
                num_sequences=tokens.num_sequences // whole_batches_of * whole_batches_of,
            )
            for corpus, tokens in enumerate(corpora)
        ]
        # Each corpus's part of what those before it leave over. By way of str, 0.1 is a tenth and not a bit more.
        exact = [Fraction(str(weight)) for weight in weights]
        self._parts = [weight / sum(exact[corpus:]) for corpus, weight in enumerate(exact)]

    @property
    def terms(self) -> dict[str, Any]:
        """All that says which sequence a position is, as JSON holds it; with other terms it is another one."""
        return {
            "data": [[text_sha256(manifest) for manifest in tokens.manifests] for tokens in self.corpora],
            "data_weights": [str(part) for part in self._parts],
            "data_seed": self._seed,
            "sequence_tokens": self.corpora[0].sequence_tokens,
            **({"prompt_tokens": self.corpora[0].prompt_tokens} if self.corpora[0].prompt_tokens else {}),
        }

    @property
    def num_tokens(self) -> int:
        """Tokens of all corpora together."""
        return sum(tokens.num_tokens for tokens in self.corpora)

    @property
    def epoch_tokens(self) -> int:
        """Tokens of the sequences that read all corpora once, a prompt before text counted in."""
        return sum(one.num_tokens * one.sequence_tokens // one.own_tokens for one in self.corpora)

    @property
    def has_chat(self) -> bool:
        """Whether some of the corpora are conversations."""
        return any(tokens.is_chat for tokens in self.corpora)

    @property
    def has_ignored(self) -> bool:
        """Whether not every target has a loss."""
        return self.has_chat or any(tokens.prompt_tokens for tokens in self.corpora)

    @property
    def has_pairs(self) -> bool:
        """Whether the corpora are preference pairs, with what their base says of them."""
        return self.corpora[0].of_pairs

    def draws(self, position: int) -> list[int]:
        """How many of the first `position` sequences come from each corpus."""
        result, left = [], position
        for part in self._parts:
            result.append(left * part.numerator // part.denominator)
            left -= result[-1]
        return result

    def read(self, position: int) -> list[int]:
        """The same, of all that the silo reads (see practised.py)."""
        return self.draws(position)

    def locate(self, position: int) -> tuple[int, int]:
        """Corpus at `position`, and which of its sequences."""
        before, after = self.draws(position), self.draws(position + 1)
        corpus = next(corpus for corpus in range(len(before)) if before[corpus] < after[corpus])
        return corpus, self._orders[corpus].index(before[corpus])

    def batch(self, positions: Iterable[int]) -> Batch:
        """The sequences at some positions."""
        places = (self.locate(position) for position in positions)
        rows = [self.corpora[corpus].row(index) for corpus, index in places]
        return stacked(rows, with_positions=self.has_chat)

    def num_trained(self, positions: Iterable[int]) -> int:
        """Targets of the sequences at some positions that have a loss."""
        places = (self.locate(position) for position in positions)
        return sum(self.corpora[corpus].num_trained(index) for corpus, index in places)

    def num_pairs(self, positions: Iterable[int]) -> int:
        """Preference pairs of the sequences at some positions."""
        places = (self.locate(position) for position in positions)
        return sum(self.corpora[corpus].num_pairs(index) for corpus, index in places)


class Batches(Iterator[Batch]):
    """One rank's micro batches, without end; `accumulation_steps` of them are its part of an inner step.

    The global batch at position p is the sequences at p to p + global_batch_sequences - 1, in that order: first by
    micro batch of the step, then by rank.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        micro_batch_sequences: int,
        accumulation_steps: int,
        rank: int,
        num_ranks: int,
        position: int = 0,
    ) -> None:
        """Start at `position`. Raises ConfigError when the corpora have fewer sequences than one global batch."""
        assert 0 <= rank < num_ranks
        self.global_batch_sequences = micro_batch_sequences * accumulation_steps * num_ranks
        first = mixture.corpora[0]
        check_enough(
            mixture.num_tokens,
            first.own_tokens,
            self.global_batch_sequences,
            key=first.key,
            in_rows=first.is_chat,
        )
        self._mixture = mixture
        self._micro_batch_sequences = micro_batch_sequences
        self._accumulation_steps = accumulation_steps
        self._rank = rank
        self._num_ranks = num_ranks
        self.restore(position)

    def state(self) -> int:
        """The position: sequences that whole inner steps have consumed since the run began, the same on all ranks.

        In the middle of a step it is the position at which the step began.
        """
        return self._position

    def restore(self, position: int) -> None:
        """Go on from a position that `state` gave, at any number of ranks."""
        assert position >= 0
        self._position = position
        self._micro_step = 0
        self._num_trained: int | None = None  # of the step that is being read, ...
        self._num_pairs: int | None = None  # ... both

    def __next__(self) -> Batch:
        """This rank's next micro batch."""
        if self._micro_step == 0 and self._mixture.has_ignored:
            step = range(self._position, self._position + self.global_batch_sequences)
            self._num_trained = self._mixture.num_trained(step)
            self._num_pairs = self._mixture.num_pairs(step) if self._mixture.has_pairs else None
        num_trained, num_pairs = self._num_trained, self._num_pairs
        offset = (self._micro_step * self._num_ranks + self._rank) * self._micro_batch_sequences
        begin = self._position + offset
        self._micro_step += 1
        if self._micro_step == self._accumulation_steps:
            self.restore(self._position + self.global_batch_sequences)
        found = self._mixture.batch(range(begin, begin + self._micro_batch_sequences))
        return found._replace(num_trained=num_trained, num_pairs=num_pairs)


class Prefetch(Iterator[Batch]):
    """The same batches in the same order, on the device that computes; a thread reads the next ones ahead."""

    def __init__(self, batches: Batches, *, num_batches: int, device: torch.device) -> None:
        """`num_batches` are kept ready; 0 reads each when it is asked for."""
        self._batches, self._num_batches, self._device = batches, num_batches, device
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._ready: deque[Future[tuple[Batch, int]]] = deque()
        self._position = batches.state()

    def state(self) -> int:
        """`Batches.state` after the last batch that was handed out, whatever has been read ahead."""
        return self._position

    def restore(self, position: int) -> None:
        """Drop what was read ahead and go on from `position`."""
        for future in self._ready:
            future.cancel()
        wait(self._ready)  # for the one that was being read
        self._ready.clear()
        self._batches.restore(position)
        self._position = position

    def __next__(self) -> Batch:
        """A micro batch as `Batches` gives it; what it raises is raised here."""
        while len(self._ready) <= self._num_batches:
            self._ready.append(self._reader.submit(self._read))
        batch, self._position = self._ready.popleft().result()
        return batch.placed(lambda tensor: tensor.to(self._device, non_blocking=True))

    def _read(self) -> tuple[Batch, int]:
        batch = next(self._batches)
        if self._device.type == "cuda":  # only from pinned memory does a copy run beside the computation
            torch.cuda.set_device(self._device)  # each thread has its own, and GPU 0 unless told
            batch = batch.placed(torch.Tensor.pin_memory)
        return batch, self._batches.state()

    def close(self) -> None:
        """End the thread."""
        self._reader.shutdown(cancel_futures=True)


def num_held_out(tokens: PackedTokens, num_sequences: int) -> int:
    """How many sequences of a split are evaluated when `num_sequences` are asked for (0: all that there are)."""
    return min(num_sequences or tokens.num_sequences, tokens.num_sequences)


def held_out_batches(
    tokens: PackedTokens, *, num_sequences: int, micro_batch_sequences: int, rank: int, num_ranks: int
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """One rank's part of `num_sequences` sequences (0, or more than there are: all), evenly spread over the split.

    The first of a split would be the text of a few documents. Yields batches and weights # float32
    (micro_batch_sequences,). Every rank gets equally many micro batches, because
    ZeRO-3 gathers parameters in every forward pass; what pads the last ones is a repeated sequence of weight 0, and all
    others weigh 1. Raises ConfigError when the text is shorter than one sequence.
    """
    check_a_sequence(tokens.num_tokens, tokens.own_tokens, key=tokens.key, in_rows=tokens.is_chat)
    total = num_held_out(tokens, num_sequences)
    for first in range(0, total, micro_batch_sequences * num_ranks):
        begin = first + rank * micro_batch_sequences
        numbers = range(begin, begin + micro_batch_sequences)
        batch = tokens.batch([min(number, total - 1) * tokens.num_sequences // total for number in numbers])
        yield batch, torch.tensor([float(number < total) for number in numbers])
