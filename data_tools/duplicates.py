"""Which documents were seen before: exact and near duplicates, in a database on disk."""

import hashlib
import sqlite3

import numpy as np

from data_tools.clean import NUM_PERMUTATIONS

VALUE = np.dtype("<u4")


class Seen:
    """A register of documents in an sqlite database.

    It never commits: the caller owns the connection and commits this register together with how far it has written, so
    that a kill at any point loses neither or both. What it answers depends on the documents so far and their order,
    nothing else. Memory is the connection's cache (`PRAGMA cache_size`).
    """

    def __init__(self, connection: sqlite3.Connection, *, near_threshold: float = 0.0) -> None:
        """Makes the tables that are missing. `near_threshold` (`Cleaning.near_duplicates`) must stay the same for a
        database; 0: only `first` can be asked."""
        self._connection = connection
        self._num_equal_values = near_threshold * NUM_PERMUTATIONS
        connection.execute("CREATE TABLE IF NOT EXISTS documents (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        if not near_threshold:
            return
        from datasketch import MinHashLSH

        # Rows and bands by the least expected error: Mining of Massive Datasets, chapter 3.
        lsh = MinHashLSH(threshold=near_threshold, num_perm=NUM_PERMUTATIONS)
        self._num_bands, self._band_bytes = lsh.b, lsh.r * VALUE.itemsize
        connection.execute("CREATE TABLE IF NOT EXISTS signatures (id INTEGER PRIMARY KEY, signature BLOB)")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS bands (band INTEGER, id INTEGER, PRIMARY KEY (band, id)) WITHOUT ROWID"
        )
        self._candidates = (
            "SELECT signature FROM signatures WHERE id IN "
            f"(SELECT id FROM bands WHERE band IN ({','.join('?' * self._num_bands)}))"
        )

    def first(self, document_hash: bytes) -> bool:
        """Whether this document is new; registers it."""
        return self._connection.execute("INSERT OR IGNORE INTO documents VALUES (?)", (document_hash,)).rowcount == 1

    def first_near(self, signature: bytes) -> bool:
        """Whether no registered document is at least as similar as the threshold; registers this one if so.

        Only documents that agree on a whole band of the signature are compared, so one that is just above the
        threshold may be missed; one that is estimated below it is never dropped.
        """
        bands = self._bands(signature)
        values = np.frombuffer(signature, dtype=VALUE)
        for (earlier,) in self._connection.execute(self._candidates, bands):
            if np.count_nonzero(values == np.frombuffer(earlier, dtype=VALUE)) >= self._num_equal_values:
                return False
        number = self._connection.execute("INSERT INTO signatures (signature) VALUES (?)", (signature,)).lastrowid
        self._connection.executemany("INSERT INTO bands VALUES (?, ?)", [(band, number) for band in bands])
        return True

    def _bands(self, signature: bytes) -> list[int]:
        """A signed 64-bit hash of each band and its place."""
        keys = []
        for band in range(self._num_bands):
            values = signature[band * self._band_bytes : (band + 1) * self._band_bytes]
            digest = hashlib.blake2b(bytes([band]) + values, digest_size=8).digest()
            keys.append(int.from_bytes(digest, "little", signed=True))
        return keys
