"""An archive: what pruning takes out of a store is kept there first, the same names and the same bytes. No torch.

    contract.json                        whose archive it is
    silos/NAME/000017/                   deliveries with their manifests and refusals
    global/000017/, snapshots/000017.json    changes, snapshots and version 0, with their commits

Commits and manifests stay in the store, too, and count as they lie there; the archive's are for whoever has nothing
else.
"""

import copy
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from pretrain.config.errors import ConfigError
from pretrain.config.keys import ExchangeConfig, RunConfig
from pretrain.config.load import CONFIG_FILE, load_run
from pretrain.config.paths import expand_home
from pretrain.exchange.history import History
from pretrain.exchange.objects import Objects
from pretrain.exchange.options import reached, store_options
from pretrain.exchange.signed import CONTRACT
from pretrain.exchange.store import REFUSED, StoreExchange, delivery_path, snapshot_path, version_path
from pretrain.host.beside import Beside
from pretrain.trust.ledger import RECORD_BYTES, Commit, Manifest, Payload, RefusedError, Snapshot

KIND = "archive"  # of its lines in the egress ledger
PRUNED = re.compile(r"(?:global/\d{6,9}|silos/[^/]+/\d{6,9})/[^/]+\.safetensors|snapshots/\d{6,9}\.json")
FOLDERS = re.compile(r"global/\d{6,9}|silos/[^/]+/\d{6,9}|snapshots")


class ArchiveError(Exception):
    """The archive is in trouble; the message says how."""


class Prune(Protocol):
    """Deletes what nobody needs, of each version what `keep` returns of it."""

    def __call__(self, *, keep: Callable[[int, Sequence[str]], Collection[str]]) -> object: ...


def archive_objects(url: str, exchange: ExchangeConfig) -> Objects:
    """An archive at a URL. Raises ConfigError for one that fsspec cannot serve."""
    options, stall = store_options(exchange, url), exchange.stall_seconds
    return Objects(url, options=options, anchor=CONTRACT, stall_seconds=stall, key="trust.archive")


class Archive:
    """Of one store, whose aggregator prunes beside training, by a thread of its own."""

    def __init__(
        self,
        exchange: StoreExchange,
        objects: Objects,
        scratch: Path,
        config: RunConfig,
        check_lease: Callable[[], None],
    ) -> None:
        """`scratch` is a folder for what is copied; after trouble nothing is tried for `exchange.retry_seconds`."""
        self._over = threading.Event()
        self._exchange, self._own = exchange, exchange.objects.until(self._over)
        self.objects, self._scratch, self._check_lease = objects.until(self._over), scratch, check_lease
        self._retry_seconds, self._num_fragments = config.exchange.retry_seconds, config.outer.num_fragments
        self._is_ours, self._in_trouble, self._next_try = False, False, 0.0
        self._history: History | None = None
        self._beside = Beside("archive")

    @property
    def _store(self) -> StoreExchange:
        """The store itself, as its contract is known by now, without what is read from the archive."""
        store = copy.copy(self._exchange)
        store.objects = self._own
        return store

    @classmethod
    def of_run(
        cls,
        config: RunConfig,
        exchange: StoreExchange,
        scratch: Path,
        *,
        check_lease: Callable[[], None] = lambda: None,
    ) -> "Archive | None":
        """The one that a configuration names, if it does. What goes there has lines in the store's egress ledger.

        From then on what the store has not is read there. `check_lease` is called before anything is deleted, and
        raises if this process may not. Raises ConfigError.
        """
        if not config.trust.archive:
            return None
        objects = archive_objects(config.trust.archive, config.exchange)
        if exchange.egress:
            objects.told_to(exchange.egress, kind=KIND)
        found = cls(exchange, objects, scratch, config, check_lease)
        exchange.objects = Archived(exchange.objects, objects, lists=False)
        return found

    def check(self) -> None:
        """Raise ConfigError if it is another run's, as far as it can be reached."""
        with suppress(ArchiveError), self._there():
            check_same_run(self._store, self.objects)

    def begin(self, roster: Sequence[str], newest: int, keep_versions: int, *, late: bool) -> None:
        """Begin to prune, as `History.prune` does, while silos train. `finish` comes before the next version is made.

        A process that is killed or stopped in between has deleted nothing that is not in the archive.
        """
        self.finish()
        self._history = self._history or History(self._exchange.until(self._over), self._num_fragments)
        prune = partial(self._history.prune, roster, newest, keep_versions, late=late)
        self._beside.begin(self.prune, prune)

    def finish(self) -> None:
        """Wait for what was begun; raises what went wrong with it."""
        self._beside.finish()

    def stop(self) -> None:
        """Copy and delete no more."""
        self._over.set()
        self._beside.stop()

    def prune(self, prune: Prune) -> None:
        """Have what was copied deleted. An archive in trouble is one line, and what is not in it stays in the store."""
        if time.monotonic() < self._next_try:
            return
        try:
            prune(keep=self.keep)
        except ArchiveError as error:
            self._next_try = time.monotonic() + self._retry_seconds
            if not self._in_trouble:
                print(f"{error}; nothing is pruned until it can be archived", flush=True)
            self._in_trouble = True
            return
        if self._in_trouble:
            print(f"trust.archive: {self.objects.url} is reached again; what is there is pruned", flush=True)
        self._in_trouble = False

    def keep(self, version: int, names: Sequence[str]) -> list[str]:
        """Copy what is about to be deleted of a version, and what says what it is; returns what may be deleted then.

        What is no part of any record is let go; what has not the bytes that its record names stays, and is said.
        Raises ArchiveError.
        """
        if not self._is_ours:
            with self._there():
                if not check_same_run(self._store, self.objects):
                    self.objects.write(CONTRACT, self._store.objects.read(CONTRACT))
            self._is_ours = True
        stays = [name for name, payload in self._payloads(version, names) if not self._copy_payload(name, payload)]
        for name in self._records(version, names):
            self._copy_record(name)
        self._check_lease()
        return [name for name in names if name not in stays]

    def _payloads(self, version: int, names: Sequence[str]) -> Iterator[tuple[str, Payload]]:
        """Those of the names that a record has, with it."""
        folder = version_path(version)
        with suppress(RefusedError, FileNotFoundError):
            yield from self._of(folder, Commit.from_bytes(self._store.commit_bytes(version)).payloads, names)
        with suppress(RefusedError, FileNotFoundError):
            snapshot = Snapshot.from_bytes(self._store.objects.read(snapshot_path(version)))
            yield from self._of(folder, snapshot.payloads, names)
        for silo in self._silos(names):
            with suppress(RefusedError):
                if data := self._store.delivery(silo, version):  # whoever has signed it
                    yield from self._of(delivery_path(silo, version), Manifest.from_bytes(data).payloads, names)

    @staticmethod
    def _of(folder: str, payloads: Sequence[Payload], names: Sequence[str]) -> Iterator[tuple[str, Payload]]:
        return ((name, one) for one in payloads if (name := f"{folder}/{one.file}") in names)

    @staticmethod
    def _silos(names: Sequence[str]) -> list[str]:
        return [name.split("/")[1] for name in names if name.startswith("silos/")]

    def _records(self, version: int, names: Sequence[str]) -> Iterator[str]:
        """What says what the payloads are, of each the last that tells that it is there."""
        for silo in self._silos(names):
            folder = delivery_path(silo, version)
            there = self._store.objects.names(folder)
            yield from (f"{folder}/{name}" for name in there if REFUSED.fullmatch(name))
            yield f"{folder}/manifest.json"
        yield snapshot_path(version)
        yield f"{version_path(version)}/commit.json"

    def _copy_payload(self, name: str, payload: Payload) -> bool:
        """Whether it is in the archive then, or is nowhere."""
        if self._has(name, payload) or not self._store.objects.exists(name):
            return True
        file = self._scratch / "archived" / payload.file
        try:
            self._store.fetch(name.rpartition("/")[0], payload, file)
        except RefusedError as error:
            self._store.pass_over(name, f"it is not archived, and stays: {error}")
            return False
        with self._there():
            self.objects.delete(name)  # of other bytes than these
            self.objects.upload(file, name, digest=payload.blake3)
        file.unlink()
        if not self._has(name, payload):
            raise ArchiveError(f"trust.archive: {self.objects.url} given; {name} there is not what was written")
        return True

    def _has(self, name: str, payload: Payload) -> bool:
        """Whether the archive has just these bytes, by reading them."""
        with self._there():
            try:
                found = self.objects.download(name, Path(os.devnull), limit_bytes=payload.num_bytes)
            except FileNotFoundError:
                return False
        return found == (payload.blake3, payload.num_bytes)

    def _copy_record(self, name: str) -> None:
        try:
            data = self._store.objects.read_if_there(name)
        except RefusedError:  # nothing of ours is so large
            return
        if data is not None:
            with self._there():
                self.objects.replace(name, data)

    @contextmanager
    def _there(self) -> Iterator[None]:
        """While the archive itself is used."""
        try:
            yield
        except AnotherRunError:
            raise
        except (ConfigError, RefusedError, FileExistsError) as error:
            raise ArchiveError(str(error)) from None


class AnotherRunError(ConfigError):
    """An archive is another run's."""


def check_same_run(exchange: StoreExchange, archive: Objects) -> bool:
    """Whether an archive has been begun. Raises ConfigError if it is another run's."""
    try:
        theirs = archive.read_if_there(CONTRACT)
    except RefusedError as error:
        raise ConfigError(f"trust.archive: {archive.url} given; {error}") from None
    if theirs not in (None, exchange.objects.read_if_there(CONTRACT)):
        raise AnotherRunError(
            f"trust.archive: {archive.url} given; it is the archive of another run; allowed: one of this run's own"
        )
    return theirs is not None


# ---- reading


class Archived(Objects):
    """The objects of a store; what was pruned of it is read from its archive."""

    def __init__(self, store: Objects, archive: Objects, *, lists: bool = True) -> None:
        """A view: with `lists`, what is in the archive is listed, too, for whoever only reads."""
        self.__dict__ |= store.__dict__
        self._archive, self._lists = archive, lists

    def exists(self, name: str) -> bool:
        """The same, in either."""
        return super().exists(name) or (bool(PRUNED.fullmatch(name)) and self._archive.exists(name))

    def read(self, name: str, *, limit_bytes: int = RECORD_BYTES) -> bytes:
        """The same, from either."""
        try:
            return super().read(name, limit_bytes=limit_bytes)
        except FileNotFoundError:
            if not PRUNED.fullmatch(name):
                raise
            return self._archive.read(name, limit_bytes=limit_bytes)

    def download(self, name: str, file: Path, *, limit_bytes: int) -> tuple[str, int]:
        """The same, from either."""
        try:
            return super().download(name, file, limit_bytes=limit_bytes)
        except FileNotFoundError:
            if not PRUNED.fullmatch(name):
                raise
            return self._archive.download(name, file, limit_bytes=limit_bytes)

    def names(self, prefix: str) -> list[str]:
        """The same, of both."""
        found = super().names(prefix)
        if not self._lists or not FOLDERS.fullmatch(prefix):
            return found
        pruned = {name for name in self._archive.names(prefix) if PRUNED.fullmatch(f"{prefix}/{name}")}
        return sorted({*found} | pruned)

    def bring_back(self, name: str, file: Path, *, digest: str) -> None:
        """Put a payload, as it was read, back into the store if it was pruned."""
        if not super().exists(name):
            self.upload(file, name, digest=digest)

    def bring_back_record(self, name: str) -> None:
        """The same of a record."""
        if not super().exists(name):
            self.write(name, self.read(name))

    def forget(self, folders: Sequence[str], names: Sequence[str]) -> None:
        """Delete from the archive all there is in some folders, and some names."""
        listed = [f"{folder}/{name}" for folder in folders for name in self._archive.names(folder)]
        for name in [*names, *listed]:
            self._archive.delete(name)


def open_store(where: str, archive: str) -> StoreExchange:
    """The store of a user's URL or run directory; what was pruned of it is read from `archive`, or the run's own.

    Raises ConfigError.
    """
    url, settings = reached(where)
    store = StoreExchange(url, options=store_options(settings, url), retry_seconds=settings.retry_seconds)
    folder = Path(expand_home("store", where))
    own = load_run(folder) if (folder / CONFIG_FILE).is_file() else None
    kept_at = expand_home("--archive", archive) or (own.trust.archive if own else "")
    read_archive(store, kept_at, own.exchange if own else settings, is_asked=bool(archive))
    return store


def read_archive(exchange: StoreExchange, url: str, settings: ExchangeConfig, *, is_asked: bool = False) -> None:
    """Read from now on what a store has not from its archive at `url`, if there is one.

    Raises ConfigError for one that is not this run's, and, where a user asked for it, for one with nothing in it.
    """
    if not url:
        return
    objects = archive_objects(url, settings)
    if check_same_run(exchange, objects):
        exchange.objects = Archived(exchange.objects, objects)
    elif is_asked:
        raise ConfigError(f"--archive: {url!r} given; there is no archive in it (no {CONTRACT})")
