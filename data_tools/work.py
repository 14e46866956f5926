"""A packing under way, on the disk: what is written and how far the text is read, so that a kill loses seconds at most.

One database transaction holds the reading position, the state of every split's writer, what was counted, and the
register of documents seen; the files that it speaks of are on the disk before it is committed. Whatever a killed
process had written after that is cut off by the next one, which writes the same bytes again.
"""

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.duplicates import Seen
from data_tools.encode import Encoded
from data_tools.formats import count_bad, nothing_bad
from data_tools.quality import MEASURES, RULES
from data_tools.rows import Kept, Rows
from pretrain.silo.shards import TOKEN_TYPES, Chat, Manifest, token_type_for
from pretrain.silo.writer import SplitWriter

STATE_FILE = "state.sqlite"
# Kibibytes; as SQLite counts, negative.
DATABASE_CACHE = -65_536
# Log2 of a document's bytes, for a histogram of 32 bins.
NUM_LENGTH_BINS = 32


class Work:
    """Everything that one packing has done so far. `place` is where reading goes on."""

    def __init__(
        self,
        directory: Path,
        terms: dict[str, Any],
        *,
        vocab_size: int,
        end_of_text_id: int,
        near_duplicates: float,
        chat: Chat | None = None,
    ) -> None:
        """Open what is in `directory`, or begin. `terms` are kept with it; `terms_differ` compares them.

        With `chat` documents are conversations, and written in rows.
        """
        self.output = directory / "output"
        self._shards: dict[str, Any] = {
            "vocab_size": vocab_size,
            "end_of_text_id": end_of_text_id,
            "shard_tokens": terms["shard_tokens"],
            "chat": chat,
        }
        self._database = sqlite3.connect(directory / STATE_FILE)
        self._database.execute(f"PRAGMA cache_size = {DATABASE_CACHE}")
        self._database.execute("CREATE TABLE IF NOT EXISTS state (json TEXT)")
        self._seen = Seen(self._database, near_threshold=near_duplicates)
        row = self._database.execute("SELECT json FROM state").fetchone()
        state: dict[str, Any] = json.loads(row[0]) if row else {}
        self.terms: dict[str, Any] = state.get("terms", terms)
        self.place: tuple[int, int, int] = tuple(state.get("place", (0, 0, 0)))
        """Part, and the offset and number in it (see sources.Place)."""
        self.counts: dict[str, dict[str, Any]] = state.get("counts", {})
        """Source name to what was read, kept, dropped and bad."""
        self._seconds_before: float = state.get("seconds", 0.0)
        self._began = time.monotonic()
        is_ours = all(self.terms.get(key) == terms.get(key) for key in ("chat", "tokenizer_sha256"))
        self._writers = {  # of another recipe's, which the caller refuses, nothing is opened
            split: SplitWriter(self.output / split, **self._shards, state=writer)
            for split, writer in (state.get("writers", {}) if is_ours else {}).items()
        }
        self._rows = {split: self._new_rows(split) for split in self._writers} if chat else {}
        self._saved: dict[str, int] = {}  # of each split's pending conversations, how many the database has
        if chat and is_ours:
            self._load_pending()

    @property
    def seconds(self) -> float:
        """Time spent, over all attempts, each up to its last commit."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def num_tokens(self) -> int:
        """Tokens written so far, or waiting to be, over all splits."""
        written = sum(writer.num_tokens for writer in self._writers.values())
        return written + sum(rows.num_tokens for rows in self._rows.values())

    def take(self, encoded: Encoded, source: str, folder: str, place: tuple[int, int, int]) -> None:
        """Write a block's documents, those that are no duplicates, to `folder` of the output, and count them."""
        counts = self.counts.setdefault(source, _nothing_counted())
        drop_duplicates = self.terms["cleaning"]["drop_duplicates"]
        keep = np.array([not drop_duplicates or self._seen.first(one) for one in encoded.hashes], np.bool_)
        dropped = [("duplicate", int(n)) for n in encoded.document_bytes[~keep]]
        for index, signature in enumerate(encoded.signatures):
            if keep[index] and not self._seen.first_near(signature):
                keep[index] = False
                dropped.append(("near duplicate", int(encoded.document_bytes[index])))
        for split, chosen in (("train", keep & ~encoded.held_out), ("valid", keep & encoded.held_out)):
            if chosen.any():
                self._write(encoded, chosen, counts["kept"].setdefault(split, _no_tokens()), folder + split)
        for reason, num_bytes in [*encoded.dropped, *dropped]:
            _add(counts["dropped"].setdefault(reason, {"documents": 0, "bytes": 0}), 1, num_bytes)
            counts["lengths_dropped"][min(max(num_bytes, 1).bit_length(), NUM_LENGTH_BINS) - 1] += 1
            _add(counts, 1, num_bytes)
        _add(counts, int(keep.sum()), int(encoded.document_bytes[keep].sum()))
        bins = np.minimum(np.frexp(np.maximum(encoded.document_bytes[keep], 1))[1], NUM_LENGTH_BINS) - 1
        histogram = np.bincount(bins, minlength=NUM_LENGTH_BINS) + counts["lengths_kept"]
        counts["lengths_kept"] = histogram.tolist()
        self._describe(encoded, keep, counts)
        count_bad(counts, encoded.bad)
        for (kind, what), number in encoded.personal.items():
            counts["personal"].setdefault(kind, {"found": 0, "documents": 0})[what] += number
        for what, number in encoded.split.items():
            split = counts.setdefault("split", {})
            split[what] = split.get(what, 0) + number
        self.place = place

    @staticmethod
    def _describe(encoded: Encoded, keep: npt.NDArray[np.bool_], counts: dict[str, Any]) -> None:
        """Count the languages and the quality of the documents that are kept, where they were asked for."""
        for index in np.flatnonzero(keep) if encoded.languages else ():
            of_language = counts["languages"].setdefault(encoded.languages[index], _no_tokens())
            _add(of_language, 1, int(encoded.document_bytes[index]))
            of_language["tokens"] += int(encoded.document_tokens[index])
        if len(encoded.quality) and keep.any():
            quality = counts["quality"]
            for name, values in zip(MEASURES, encoded.quality[keep].T, strict=True):
                distribution = quality.setdefault("measures", {}).setdefault(name, {})
                for value, number in zip(*np.unique(values, return_counts=True), strict=True):
                    shown = f"{value:.10g}"
                    distribution[shown] = distribution.get(shown, 0) + int(number)
            would_drop = quality.setdefault("would_drop", {})
            for rule, number in zip(RULES, encoded.would_drop[keep].sum(axis=0), strict=True):
                would_drop[rule] = would_drop.get(rule, 0) + int(number)

    def _write(self, encoded: Encoded, chosen: npt.NDArray[np.bool_], counts: dict[str, int], split: str) -> None:
        if split not in self._writers:
            self._writers[split] = SplitWriter(self.output / split, **self._shards)
        document_tokens = encoded.document_tokens[chosen]
        num_bytes = int(encoded.document_bytes[chosen].sum())
        of_chosen = np.repeat(chosen, encoded.document_tokens)
        tokens = encoded.tokens[of_chosen]
        if encoded.trained is None:
            self._writers[split].write(tokens, document_tokens, num_bytes)
        else:
            trained, ends = encoded.trained[of_chosen], np.cumsum(document_tokens)[:-1]
            counts["trained"] = counts.get("trained", 0) + int(trained.sum())
            rows = self._rows.setdefault(split, self._new_rows(split))
            pieces = zip(np.split(tokens, ends), np.split(trained, ends), encoded.document_bytes[chosen], strict=True)
            firsts = None if encoded.chosen_tokens is None else encoded.chosen_tokens[chosen].tolist()
            for number, (piece, bits, size) in enumerate(pieces):
                parts = (firsts[number], len(piece) - firsts[number]) if firsts else ()
                if rows.add(Kept(piece, bits, int(size), parts)):
                    self._saved.pop(split, None)
        _add(counts, len(document_tokens), num_bytes)
        counts["tokens"] += len(tokens)

    # --- conversations that wait for a row ---

    def _new_rows(self, split: str) -> Rows:
        chat, writer = self._shards["chat"], self._writers[split]
        return Rows(chat.sequence_tokens, self._shards["end_of_text_id"], writer.write)

    def _load_pending(self) -> None:
        columns = "split TEXT, tokens BLOB, trained BLOB, bytes INTEGER"
        if self._shards["chat"].num_pairs is not None:
            columns += ", chosen INTEGER"
        self._database.execute(f"CREATE TABLE IF NOT EXISTS pending ({columns})")
        dtype = TOKEN_TYPES[token_type_for(self._shards["vocab_size"])]
        for split, tokens, trained, size, *chosen in self._database.execute("SELECT * FROM pending ORDER BY rowid"):
            piece, bits = np.frombuffer(tokens, dtype), np.frombuffer(trained, np.bool_)
            self._rows[split].add(Kept(piece, bits, size, (*chosen, len(piece) - chosen[0]) if chosen else ()))
        self._saved = {split: len(rows.pending) for split, rows in self._rows.items()}

    def _save_pending(self) -> None:
        for split, rows in self._rows.items():
            if split not in self._saved:  # what was pending then has been written
                self._database.execute("DELETE FROM pending WHERE split = ?", (split,))
            new = rows.pending[self._saved.get(split, 0) :]
            for one in new:
                values = (split, one.tokens.tobytes(), one.trained.tobytes(), one.num_bytes, *one.parts[:1])
                self._database.execute(f"INSERT INTO pending VALUES ({', '.join('?' * len(values))})", values)
            self._saved[split] = len(rows.pending)

    def commit(self) -> None:
        """Bring everything to the disk: from here the next process goes on."""
        state = {
            "terms": self.terms,
            "place": self.place,
            "counts": self.counts,
            "seconds": self.seconds,
            "writers": {split: writer.sync() for split, writer in self._writers.items()},
        }
        self._save_pending()
        self._database.execute("DELETE FROM state")
        self._database.execute("INSERT INTO state VALUES (?)", (json.dumps(state),))
        self._database.commit()

    def finish(self, *, tokenizer_sha256: str, recipe_sha256: str) -> dict[str, Manifest]:
        """Write the manifests; returns them by split, `train` or `NAME/train`."""
        for rows in self._rows.values():
            rows.flush()
        self._saved.clear()
        self.commit()
        return {
            split: writer.finish(tokenizer_sha256=tokenizer_sha256, recipe_sha256=recipe_sha256)
            for split, writer in self._writers.items()
        }

    def close(self) -> None:
        """Close the files; what was not committed is lost, as after a kill."""
        for writer in self._writers.values():
            writer.close()
        self._database.close()


def _nothing_counted() -> dict[str, Any]:
    return {
        "documents": 0,
        "bytes": 0,
        "kept": {},
        "dropped": {},
        "personal": {},
        "languages": {},
        "quality": {},
        **nothing_bad(),
        "lengths_kept": [0] * NUM_LENGTH_BINS,
        "lengths_dropped": [0] * NUM_LENGTH_BINS,
    }


def _no_tokens() -> dict[str, int]:
    return {"documents": 0, "bytes": 0, "tokens": 0}


def _add(counts: dict[str, Any], num_documents: int, num_bytes: int) -> None:
    counts["documents"] += num_documents
    counts["bytes"] += num_bytes
