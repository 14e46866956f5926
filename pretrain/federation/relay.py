"""A relay between a directory that compute nodes share and the federation's store, which they cannot reach. No torch.

    here to there   of this site's silos: identity, words of membership, evaluations, resumable, beats,
                    deliveries
    there to here   the contract, the group's keys, rollbacks, refusals, and of each version the commit and the tensors
                    that silos read

It compares what lies in both, and knows nothing else, so it may be killed at any instant and started again. What counts
once its last object is there (a delivery: its manifest, a version: its commit) is copied in that order. Whoever removes
an object there leaves a record, a refusal or a rollback, with which it goes here, too; without one it is new. Tensors
are pruned here by the aggregator's rule, for this site's silos.
"""

import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.agreement import SIGNATURES
from pretrain.exchange.amended import FOLDER as AMENDMENTS
from pretrain.exchange.amended import acceptance_path, amendment_path
from pretrain.exchange.beats import BEATS_PER_LEASE
from pretrain.exchange.gated import judged_path
from pretrain.exchange.history import History
from pretrain.exchange.objects import Objects
from pretrain.exchange.options import is_directory, store_options
from pretrain.exchange.rollback import FOLDER as ROLLBACKS
from pretrain.exchange.rollback import explain, foreign, read_rollbacks, take_back, versions_above
from pretrain.exchange.sealed import given_group_key, group_key_path
from pretrain.exchange.store import StoreExchange, delivery_path, identity_path, version_path
from pretrain.exchange.sums import check_no_sum
from pretrain.exchange.words import WORD_BYTES, Beat, Evaluation, Identity, Membership, Refusal, Resumable, Word, number
from pretrain.federation.preflight import check_policy
from pretrain.host.lock import lock_directory
from pretrain.host.stopping import STOPPED, StopRequested, raise_at_signals
from pretrain.trust.contract import build_contract, check_same_contract
from pretrain.trust.egress import RELAY, Egress
from pretrain.trust.keys import Signer
from pretrain.trust.ledger import Commit, Manifest, Payload, RefusedError, sha256_bytes
from pretrain.trust.members import own_signer

MANIFEST = "manifest.json"


def relay(config: RunConfig, remote_url: str, *, dry_run: bool = False) -> int:
    """Copy until the run is done and this site's silos have ended; returns the exit code, 75 if it was stopped.

    With `dry_run` only the contract there is looked at. Raises ConfigError.
    """
    raise_at_signals()
    try:
        copier = Relay(config, remote_url)
        if dry_run:
            found = "its contract is ours" if copier.contract_there() else "there is no contract in it yet"
            print(f"{remote_url} is reached; {found}\ndry run: nothing was started")
            return 0
        lock_directory(Path(config.directory) / "relay", "a relay")
        copier.start()
        threading.Thread(target=copier.keep_copying_beats, name="beats", daemon=True).start()
        while not copier.is_done():
            copier.copy()
            time.sleep(config.exchange.poll_seconds)
        copier.copy()
        copier.copy_beats()
        copier.close()
    except StopRequested:
        print("stopped; start it again to go on", flush=True)
        return STOPPED
    except RefusedError as error:
        raise ConfigError(f"--remote: {remote_url} given; it cannot be relayed: {error}") from None
    print(f"done: version {config.schedule.num_versions} is here, and this site's silos have ended", flush=True)
    return 0


class Relay:
    """Copies what is new, each time it is asked to."""

    def __init__(self, config: RunConfig, remote_url: str) -> None:
        """Raises ConfigError for stores that cannot be relayed."""
        url, exchange = config.store_url, config.exchange
        if exchange.kind != "store" or not is_directory(url):
            allowed = "a directory that the compute nodes share, and exchange.kind=store"
            raise ConfigError(f"exchange.url: {url!r} given with exchange.kind={exchange.kind}; allowed: {allowed}")
        self._root = Path(fsspec.core.strip_protocol(url)).resolve()
        check_no_sum(config, f"--remote: {remote_url!r} given", "a relay does not carry what silos lay open of a sum")
        if is_directory(remote_url) and Path(fsspec.core.strip_protocol(remote_url)).resolve() == self._root:
            raise ConfigError(f"--remote: {remote_url!r} given; allowed: another store than exchange.url")
        self._config, self._rules, self._silos = config, config.membership, sorted(config.silos)
        self._here = StoreExchange.of_run(config)
        options = store_options(exchange, remote_url)
        self._there = StoreExchange(
            remote_url, options=options, retry_seconds=exchange.retry_seconds, stall_seconds=exchange.stall_seconds
        )
        policy = check_policy(config, remote_url)
        self._there.objects.told_to(Egress.of_run(config, RELAY, _signer(config), policy))
        self._history = History(self._here, config.outer.num_fragments)
        self._scratch = Path(config.directory) / "relay" / "inbox"
        self._newest = -1
        self._is_checked, self._was_rolled_back = False, False
        self._named: set[str] = set()
        self._handed_on: set[tuple[str, str]] = set()  # words, by store and name
        self._looked_before: set[str] = set()

    def contract_there(self) -> bytes | None:
        """The federation's contract, which is ours; None if there is none yet. Raises ConfigError."""
        if (contract := self._there.read_contract()) is not None:
            check_same_contract(build_contract(self._config), contract, self._there.objects.url)
        return contract

    def start(self) -> None:
        """Wait for the contract. Raises ConfigError."""
        if (contract := self.contract_there()) is None:
            print("waiting for the aggregator's contract", flush=True)
        while contract is None:
            time.sleep(self._config.exchange.poll_seconds)
            contract = self.contract_there()
        where = self._there.objects.url
        if (ours := self._here.read_contract()) is None:
            self._here.write_contract(contract)
        elif ours != contract:
            raise ConfigError(
                f"exchange.url: {self._root} given; its contract is not that of {where}; name another one"
            )
        shutil.rmtree(self._scratch, ignore_errors=True)  # left by one that was killed

    def close(self) -> None:
        """The last counts of what left."""
        self._there.objects.close_egress()

    def is_done(self) -> bool:
        """Whether the last version is here and all silos of this site have ended."""
        return self._newest >= self._config.schedule.num_versions and not any(map(self._is_alive, self._silos))

    def _is_alive(self, silo: str) -> bool:
        folder = f"silos/{silo}/beats"
        names = (f"{folder}/{name}" for name in self._here.objects.names(folder))
        return any(self._here.given(Beat, name, silo) for name in names)

    def copy(self) -> None:
        """Copy what is new. Raises ConfigError and RefusedError."""
        if not self._copy_rollbacks():
            return  # the newest version there does not count until it is complete
        self._check_history()
        self._copy_signatures()
        self._copy_group_keys()
        known = self._newest
        while self._copy_version(self._newest + 1):
            self._newest += 1
        self._copy_snapshots()
        if self._newest > known:
            self._prune()
        for silo in filter(self._is_named, self._silos):
            if self._rules.is_elastic or self._rules.sample is not None:
                self._copy_words(silo)
            self._copy_new(Evaluation, silo, "evaluations", self._here, self._there)
            self._mirror(Resumable, silo, "resumable")
            self._copy_judged(silo)
            self._copy_deliveries(silo)

    # ---- down

    def _copy_rollbacks(self) -> bool:
        """Take back here what was taken back there; returns whether none is under way there.

        The record appears here at once, so that silos wait, and counts as done when nothing is left here of what it is
        about.
        """
        there, here = read_rollbacks(self._there), read_rollbacks(self._here)
        self._was_rolled_back, self._here.num_rollbacks = bool(there), len(there)
        for n in range(len(here) + 1, len(there) + 1):
            self._take(f"{ROLLBACKS}/{n:06d}.json")
        known = [n for n, (_, is_done) in enumerate(here, 1) if is_done]
        done = [n for n, (_, is_done) in enumerate(there, 1) if is_done and n not in known]
        for n in done:
            record, _ = there[n - 1]
            print(f"rolled back from version {record.from_version} to {record.to_version}", flush=True)
            for version in versions_above(self._here, record.to_version):
                take_back(self._here, version, f"rolled-back/{n:06d}")
        if done:
            self._newest, self._is_checked = self._here.newest_version(), False
            self._handed_on.clear()  # what is said of a version that was made anew is said anew
            self._history = History(self._here, self._config.outer.num_fragments)  # which forgets what it was
            self._copy_made_of()
        for n in done:
            self._take(f"{ROLLBACKS}/{n:06d}.done")
        return all(is_done for _, is_done in there)

    def _take(self, name: str) -> None:
        """A small object from there, as it counts there."""
        with suppress(FileNotFoundError, FileExistsError):
            self._here.write_over(name, self._there.objects.read(name), lambda: False)

    def _copy_made_of(self) -> None:
        """What the newest version's parameters are made of, for silos whose checkpoints are all taken back."""
        for fragment in range(self._config.outer.num_fragments) if self._newest >= 0 else ():
            for version, payload, _ in self._history.parameters(self._newest, fragment):
                name = f"{version_path(version)}/{payload.file}"
                if not self._here.objects.exists(name):
                    for _, file in self._fetched(version, [payload]):
                        self._here.objects.upload(file, name)

    def _check_history(self) -> None:
        """Raise ConfigError, at the first look, if what is here is not of the run that is there."""
        if self._is_checked:
            return
        self._newest = self._here.newest_version()
        if self._newest >= 0:
            commit_sha256 = sha256_bytes(self._here.commit_bytes(self._newest))
            if explain(self._there, self._newest, commit_sha256) == "foreign":
                raise ConfigError(foreign(str(self._root), self._newest, commit_sha256, self._there))
        self._is_checked = True

    def _copy_group_keys(self) -> None:
        """What this site's silos open versions with, if these are sealed."""
        epoch = self._there.members.epochs()[-1]
        for silo in self._silos if self._there.is_sealed else ():
            found = None if given_group_key(self._here, epoch, silo) else given_group_key(self._there, epoch, silo)
            if found:
                self._here.objects.delete(group_key_path(epoch, silo))
                self._here.objects.write(group_key_path(epoch, silo), found.to_bytes())

    def _copy_version(self, version: int) -> bool:
        """Whether it was there."""
        try:
            data = self._there.commit_bytes(version) if self._there.has_commit(version) else None
        except FileNotFoundError:
            data = None
        if data is None:
            return False
        began, commit = time.monotonic(), Commit.from_bytes(data)
        before = self._here.commit_bytes(version - 1) if version else None
        self._here.check_link(commit, version, before)
        self._here.publish(commit, self._fetched(version, commit.payloads))
        _say(f"version {version}: came", commit.payloads, began)
        return True

    def _copy_snapshots(self) -> None:
        """Those of versions that are here. With a quorum, or after a rollback, silos read their parameters, too."""
        history, known = History(self._there, self._config.outer.num_fragments), self._history.snapshots()
        for version in history.snapshots():
            if version in known or version > self._newest or not self._is_kept(version):
                continue
            snapshot = history.read_snapshot(version)
            wanted = snapshot.payloads if self._rules.is_elastic or self._was_rolled_back else []
            files = [payload for payload in wanted if payload.file.startswith("parameter-")]
            self._history.write_snapshot(snapshot, self._fetched(version, files))

    def _is_kept(self, version: int) -> bool:
        """Whether tensors of a version are here, and not pruned."""
        return bool(self._here.tensors(version_path(version)))

    def _fetched(self, version: int, payloads: Iterable[Payload]) -> Iterator[tuple[Payload, Path]]:
        """Files of a version, checked, one after another; not what was pruned there. Raises RefusedError."""
        folder = version_path(version)
        for payload in payloads:
            file = self._scratch / payload.file
            try:
                self._there.fetch(folder, payload, file)
            except RefusedError:
                if self._there.objects.exists(f"{folder}/{payload.file}"):
                    raise
                continue
            yield payload, file
            file.unlink()

    def _prune(self) -> None:
        silos = self._silos
        if self._rules.is_elastic:
            silos = [silo for silo in silos if (word := self._here.membership(silo)) and not word.left]
        self._history.prune(silos, self._newest, self._config.exchange.keep_versions)

    # ---- up

    def _is_named(self, silo: str) -> bool:
        """Whether a silo has begun, here or there. Raises ConfigError if another run directory has its name."""
        if silo in self._named:
            return True
        name = identity_path(silo)
        if not self._here.given(Identity, name, silo):
            self._hand_on(Identity, name, silo, self._there, self._here)  # who begins under this name is told here
        if word := self._here.given(Identity, name, silo):
            self._there.claim(silo, word)
            self._named.add(silo)
        return silo in self._named

    def _copy_signatures(self) -> None:
        """Both ways; what was accepted there comes here last, before the commits that show it. Raises RefusedError."""
        if not self._here.members.keys:
            return
        self._copy_folder(SIGNATURES)
        here, there = self._here.objects, self._there.objects
        stores = (self._there, self._here)
        known = min(store.members.later[-1].number if store.members.later else 0 for store in stores)
        for n in sorted({n for store in stores for n in store.numbers(AMENDMENTS, after=".json") if n > known}):
            for source, target in ((there, here), (here, there)):
                _copy(source, target, amendment_path(n))
            self._copy_folder(f"{AMENDMENTS}/{n:06d}")
        for n in (n for n in self._there.numbers(AMENDMENTS, after=".accepted") if n > known):
            _copy(there, here, acceptance_path(n))
        for store in stores:
            store.follow_amendments()

    def _copy_folder(self, folder: str) -> None:
        """Both ways."""
        here, there = self._here.objects, self._there.objects
        for source, target in ((there, here), (here, there)):
            said = target.names(folder)
            for name in (name for name in source.names(folder) if name not in said):
                _copy(source, target, f"{folder}/{name}")

    def _copy_words(self, silo: str) -> None:
        """Both ways, as somebody there may have said that the silo has left."""
        for source, target in ((self._there, self._here), (self._here, self._there)):
            self._copy_new(Membership, silo, "membership", source, target)

    def _copy_new(
        self, kind: type[Word], silo: str, inner: str, source: StoreExchange, target: StoreExchange
    ) -> tuple[set[str], set[str]]:
        """A silo's words of a kind that are not there yet, or of which somebody else has taken the name there.

        Returns the names that were found here, and there.
        """
        here, there = (
            {f"silos/{silo}/{inner}/{name}" for name in store.objects.names(f"silos/{silo}/{inner}")}
            for store in (source, target)
        )
        for name in sorted(here):
            is_known = not target.members.keys or (target.objects.url, name) in self._handed_on
            if name not in there or not is_known:
                self._hand_on(kind, name, silo, source, target)
        return here, there

    def _hand_on(self, kind: type[Word], name: str, author: str, source: StoreExchange, target: StoreExchange) -> None:
        """A word as its author has said it, if it is still here, to where it is not yet."""
        word = source.given(kind, name, author)
        with suppress(FileNotFoundError, FileExistsError):
            if word is not None:
                self._handed_on.add((target.objects.url, name))
                target.put(kind, name, word, author)

    def _mirror(self, kind: type[Word], silo: str, inner: str) -> None:
        """First what is new, then what is gone; at once or not at all, where these are signs of life."""
        here, there = (store.at_once() if kind is Beat else store for store in (self._here, self._there))
        wanted, found = self._copy_new(kind, silo, inner, here, there)
        for name in sorted(found - wanted):
            there.objects.delete(name)
            self._handed_on.discard((there.objects.url, name))

    def _copy_judged(self, silo: str) -> None:
        """What it has found candidates of the contract's gate to be; once a version is decided, nobody asks."""
        gate = self._config.gate
        for version in range(0, self._newest + 1, gate.every_versions) if gate.is_on else ():
            name = judged_path(silo, version)
            if (self._there.objects.url, name) not in self._handed_on:
                self._hand_on(Evaluation, name, silo, self._here, self._there)

    def _copy_deliveries(self, silo: str) -> None:
        """Those for versions to come; where late ones count, for each fragment's newest, too."""
        first = self._newest + 1 - (self._config.outer.num_fragments if self._rules.stale_weight else 0)
        for name in self._here.objects.names(f"silos/{silo}"):
            if (version := number(name)) is not None and version >= first:
                self._copy_delivery(silo, version)

    def _copy_delivery(self, silo: str, version: int) -> None:
        folder, began = delivery_path(silo, version), time.monotonic()
        here, there = (store.objects.names(folder) for store in (self._here, self._there))
        refused = [name for name in there if name.startswith("refused-") and name not in here]
        refused = [name for name in refused if self._there.given(Refusal, f"{folder}/{name}", OPERATOR)]
        if refused:  # in this order, as the aggregator: the silo of a relay killed in between delivers once more
            self._here.objects.delete(f"{folder}/{MANIFEST}")
            for name in refused:
                _copy(self._there.objects, self._here.objects, f"{folder}/{name}")
            print(f"version {version}: the delivery of silo {silo} was refused", flush=True)
        elif MANIFEST in here and MANIFEST not in there:
            # A payload there is a leftover, or was refused: the reason is written just after the manifest is removed.
            if folder not in self._looked_before and any(name.endswith(".safetensors") for name in there):
                self._looked_before.add(folder)
                return
            self._looked_before.discard(folder)
            manifest = Manifest.from_bytes(self._here.objects.read(f"{folder}/{MANIFEST}"))
            files = [(payload, self._root / folder / payload.file) for payload in manifest.payloads]
            self._there.deliver(manifest, files)
            _say(f"version {version}: the delivery of silo {silo} went", manifest.payloads, began)

    # ---- signs of life

    def copy_beats(self) -> None:
        """At once or not at all: nobody waits for them."""
        with suppress(ConfigError):
            for silo in self._silos:
                self._mirror(Beat, silo, "beats")

    def keep_copying_beats(self) -> None:
        """Beside all else, which may take its time."""
        while True:
            self.copy_beats()
            time.sleep(self._config.exchange.lease_seconds / BEATS_PER_LEASE)


def _signer(config: RunConfig) -> Signer | None:
    """Who signs the relay's ledger: the first of this site's silos whose key this machine has. Raises ConfigError."""
    if not config.trust.keys:
        return None
    for silo in sorted(config.silos):
        if config.key_file(silo).exists():
            return own_signer(config, silo)
    print(f"egress/{RELAY}.jsonl is not signed: no key of {named(sorted(config.silos))} is on this machine", flush=True)
    return None


def _copy(source: Objects, target: Objects, name: str) -> None:
    """A small object, if it is still here, to where it is not yet; what is larger than any of ours is none."""
    with suppress(FileNotFoundError, FileExistsError, RefusedError):
        target.write(name, source.read(name, limit_bytes=WORD_BYTES))


def _say(what: str, payloads: Iterable[Payload], began: float) -> None:
    num_bytes = sum(payload.num_bytes for payload in payloads)
    print(f"{what}, {num_bytes / 1e6:.2f} MB in {time.monotonic() - began:.1f} s", flush=True)
