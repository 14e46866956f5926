"""Leaving with proof: one directory with all that a member needs, which it can check without any other party."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.agreement import SIGNATURES
from pretrain.exchange.amended import FOLDER as AMENDMENTS
from pretrain.exchange.archive import read_archive
from pretrain.exchange.gated import JUDGED, decision_path, judged_path
from pretrain.exchange.objects import Objects
from pretrain.exchange.revocation import FOLDER as REVOCATIONS
from pretrain.exchange.rollback import FOLDER as ROLLBACKS
from pretrain.exchange.rollback import is_rolling_back
from pretrain.exchange.sealed import FOLDER as GROUP_KEYS
from pretrain.exchange.store import (
    REFUSED,
    REQUESTS_AT_ONCE,
    SNAPSHOTS,
    StoreExchange,
    delivery_path,
    evaluations_path,
    snapshot_path,
    version_path,
)
from pretrain.exchange.sums import FOLDER as SUMS
from pretrain.exchange.sums import answer_path, shares_path
from pretrain.federation.bundle import DATA, EXIT, KEYS, MODEL, OWN, SOFTWARE, STORE, Exit, listed
from pretrain.federation.export import export_global_model, writing
from pretrain.federation.leave import check_can_leave, say_left
from pretrain.federation.verify import StoreVerifier, Verified
from pretrain.host.foreign import shown
from pretrain.host.lock import lock_directory
from pretrain.host.software import installed
from pretrain.merge.outcome import manifest_path, outcome_path
from pretrain.outer.threads import in_threads
from pretrain.silo.shards import MANIFEST_FILE
from pretrain.trust.contract import build_contract, check_same_contract
from pretrain.trust.ledger import Commit, Manifest, Payload, RefusedError, Snapshot, sha256_bytes
from pretrain.trust.members import Members, own_signer, public_keys

CHAIN = (SIGNATURES, AMENDMENTS, GROUP_KEYS, SNAPSHOTS, ROLLBACKS, "rolled-back", REVOCATIONS, SUMS)
"""Folders of a store that are copied as they are."""
DEEPEST = 8  # of the folders in them
ASKED = (
    "the newest parameters as a transformers directory with tokenizer",
    "the manifests of the member's packed text",
    "the member's deliveries",
    "contract, signatures, commits, manifests of all members, snapshot records, rollbacks, words",
    "all payloads that the store still has, from which its newest versions are merged again",
    "public keys of all members",
    "the software",
)
SOURCES = ("pretrain", "launch", "data_tools", "configs", "slurm")
SOURCE_SUFFIXES = (".py", ".j2", ".yaml")
# What checking a bundle imports; training needs more.
NEEDED = (
    *("torch", "numpy", "numba", "transformers", "tokenizers", "safetensors", "fsspec", "blake3", "cryptography"),
    *("omegaconf", "pyyaml", "typer", "rich"),
)
HOW_TO_RUN = (
    "Copy this folder away from the bundle, pip install -r requirements.txt, and in the copy: "
    "PYTHONPATH=. python -m launch.cli verify BUNDLE\n"
)


def write_bundle(
    config: RunConfig, silo: str, directory: Path, *, leave: bool = False, tell: Callable[[str], object] = print
) -> Exit:
    """Write a stopped silo's bundle (bundle.py), checked as anybody can check it; with `leave`, say that it has left.

    The directory appears when all is in it. Raises ConfigError, and nothing is written, for what cannot be, and for a
    chain that is broken, with its first version that is not as it should be.
    """
    exchange, members = _reached(config, silo, directory, leave=leave)
    copies = _BundleWriter(config, exchange, members, silo, tell)
    with writing(directory) as temporary:
        with _stopped(config, silo):
            copies.write(temporary)
        if leave:
            say_left(config, silo)
            copies.copy_membership(silo)
        record = copies.record(temporary)
        (temporary / EXIT).write_bytes(record.to_bytes())
    return record


def _reached(config: RunConfig, silo: str, directory: Path, *, leave: bool) -> tuple[StoreExchange, Members]:
    """The store, or the silo's own ledger of a collective, and the members, as the silo. Raises ConfigError."""
    if config.exchange.kind == "none":
        raise ConfigError("exchange.kind: 'none' given; a bundle is made of a run through a 'store', or a 'collective'")
    if silo not in config.silos or silo not in config.full_roster:
        raise ConfigError(f"--silo: {silo!r} given; allowed: {named(sorted(config.silos))}, which run here")
    if os.path.lexists(directory):
        raise ConfigError(f"--to: {str(directory)!r} given; it exists already, and nothing is overwritten")
    if leave:
        check_can_leave(config, silo)
    among = config.exchange.kind == "collective"
    exchange = StoreExchange(config.ledger_url(silo)) if among else StoreExchange.of_run(config)
    stored, given = exchange.read_contract(), _given(exchange, config)
    members = Members(keys=public_keys(config)) if among else exchange.members
    members.signer = own_signer(config, silo)
    if stored is None:
        raise ConfigError(f"{given}; there is no run in it (no contract.json)")
    check_same_contract(build_contract(config), stored, exchange.objects.url)
    if not among:
        read_archive(exchange, config.trust.archive, config.exchange)
    try:
        if is_rolling_back(exchange):
            raise RefusedError("it is being rolled back; allowed: when that is done")
    except RefusedError as error:
        raise ConfigError(f"{given}; {error}; nothing is written") from None
    return exchange, members


def _given(exchange: StoreExchange, config: RunConfig) -> str:
    """How an error begins that is about what was reached."""
    key = "run directory" if config.exchange.kind == "collective" else "exchange.url"
    return f"{key}: {exchange.objects.url} given"


@contextmanager
def _stopped(config: RunConfig, silo: str) -> Iterator[None]:
    """While nobody runs the silo here. Raises ConfigError if somebody does."""
    place = config.silo_directory(silo)
    held = lock_directory(place, f"silo {silo}") if place.is_dir() else None
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


class _BundleWriter:
    """Copies one silo's."""

    def __init__(
        self,
        config: RunConfig,
        exchange: StoreExchange,
        members: Members,
        silo: str,
        tell: Callable[[str], object],
    ) -> None:
        self._config, self._exchange, self._members, self._silo, self._tell = config, exchange, members, silo, tell
        self._given, self._is_collective = _given(exchange, config), config.exchange.kind == "collective"
        self._newest, self._missing = exchange.newest_version(), list[str]()
        self._commits: dict[int, Commit] = {}
        if self._newest < 0:
            raise ConfigError(f"{self._given}; there is no version in it yet")

    def write(self, bundle: Path) -> None:
        """All but the list. Raises ConfigError if the chain is broken."""
        store = bundle / STORE
        self._target = Objects(str(store), anchor="contract.json")
        self._copy_chain()
        self._copy_words()
        self._copy_own(bundle)
        trouble = self._copy_payloads(store)
        self._check(store, trouble)
        self._tell(f"version {self._newest}: writing its model")
        here = dataclasses.replace(self._config.exchange, kind="store", url=str(store), options={}, ca_file="")
        form = "adapter" if self._config.model.adapter.is_on else ""
        export_global_model(dataclasses.replace(self._config, exchange=here), bundle / MODEL, self._newest, form=form)
        self._copy_data_manifests(bundle / DATA)
        _write_software(bundle / SOFTWARE)
        keys = [f"{name} {key.text} {key.fingerprint}\n" for name, key in sorted(self._members.first_keys.items())]
        (bundle / KEYS).write_text("".join(keys))

    def record(self, bundle: Path) -> Exit:
        """The list of what was written, signed."""
        newest = self._commits[self._newest]
        return self._members.sign(
            Exit(
                contract_sha256=self._exchange.contract_sha256,
                member=self._silo,
                version=self._newest,
                commit_sha256=sha256_bytes(newest.to_bytes()),
                parameters_digest=newest.parameters_digest,
                software=[f"{package} {found}" for package, found in installed().items()],
                asked=list(ASKED),
                missing=self._missing,
                files=listed(bundle),
            )
        )

    # ---- the store

    def _copy_chain(self) -> None:
        self._tell(f"versions 0 to {self._newest}: copying commits and manifests")
        self._copy("contract.json")
        for folder in CHAIN:
            self._copy_tree(folder)
        in_threads(self._copy, [f"{version_path(v)}/commit.json" for v in range(self._newest + 1)], REQUESTS_AT_ONCE)
        for version in range(self._newest + 1):
            with suppress(RefusedError, FileNotFoundError):  # said when the copy is checked
                data = self._target.read(f"{version_path(version)}/commit.json")
                self._commits[version] = Commit.from_bytes(data)
        merged = {(c.silo, c.version) for commit in self._commits.values() for c in commit.contributors}
        beside = (manifest_path, outcome_path) if self._is_collective else (manifest_path,)
        names = [path(silo, version) for silo, version in sorted(merged) for path in beside]
        if self._config.outer.secure_sum:  # who answers need not have delivered
            silos, versions = self._config.full_roster, range(1, self._newest + 1)
            names += [path(silo, v) for silo in silos for v in versions for path in (shares_path, answer_path)]
        in_threads(self._copy, names, REQUESTS_AT_ONCE)

    def copy_membership(self, silo: str) -> None:
        """What a silo said of joining and leaving."""
        self._copy_tree(f"silos/{silo}/membership")

    def _copy_words(self) -> None:
        """Who said that it joins or leaves, what models were found to be worth, and whose deliveries were refused."""
        for silo in self._exchange.members.all_silos(self._config.full_roster):
            self.copy_membership(silo)
            self._copy_tree(evaluations_path(silo))
            folders = [delivery_path(silo, version) for version in self._exchange.numbers(f"silos/{silo}")]
            for folder, found in zip(folders, in_threads(self._names, folders, REQUESTS_AT_ONCE), strict=True):
                for name in found:
                    if REFUSED.fullmatch(name) or name == JUDGED:
                        self._copy(f"{folder}/{name}")
        for version in range(0, self._newest + 1, self._config.gate.every_versions) if self._config.gate.is_on else ():
            self._copy(judged_path(OPERATOR, version))
            self._copy(decision_path(version))

    def _copy_own(self, bundle: Path) -> None:
        """What the silo delivered, as far as it is still there: in the store, and in its run directory."""
        exchange, pruned = self._exchange, list[int]()
        for version in exchange.numbers(f"silos/{self._silo}"):
            folder = delivery_path(self._silo, version)
            names = self._names(folder)
            self._copy(f"{folder}/manifest.json")
            for name in (name for name in names if name.endswith(".safetensors")):
                self._target.upload(self._fetched(bundle, f"{folder}/{name}"), f"{folder}/{name}")
            if "manifest.json" in names and not any(name.endswith(".safetensors") for name in names):
                pruned.append(version)
        if pruned and not self._is_collective:  # where there never were any
            self._missing.append(f"payloads of its deliveries for versions {_ranges(pruned)}: pruned")
        place, own = self._config.silo_directory(self._silo), bundle / OWN
        for file in (place / "delivered.txt", *sorted((place / "outbox").glob("*.safetensors"))):
            if file.is_file():
                own.mkdir(exist_ok=True)
                shutil.copyfile(file, own / file.name)

    def _fetched(self, bundle: Path, name: str) -> Path:
        """A payload in a file of the temporary folder, whatever its size: it is our own."""
        file = bundle.with_name(f"{bundle.name}.payload")
        self._exchange.objects.download(name, file, limit_bytes=1 << 53)
        return file

    def _copy_payloads(self, store: Path) -> str:
        """All that is still there of what commits, snapshots and manifests name; returns what went wrong with that."""

        def copy(one: tuple[str, Payload]) -> str:
            folder, payload = one
            name, place = f"{folder}/{payload.file}", store / folder / payload.file
            try:
                if not place.exists() and self._exchange.objects.exists(name):
                    self._exchange.fetch(folder, payload, place)
            except RefusedError as error:
                return str(error)
            return ""

        return next(filter(None, in_threads(copy, [*self._payloads()], REQUESTS_AT_ONCE)), "")

    def _payloads(self) -> Iterator[tuple[str, Payload]]:
        """Folder and payload of all that the copied records name; what cannot be read is said when they are checked."""
        for commit in self._commits.values():
            folder = version_path(commit.version)
            yield from ((folder, payload) for payload in commit.payloads)
            with suppress(RefusedError, FileNotFoundError):
                snapshot = Snapshot.from_bytes(self._target.read(snapshot_path(commit.version)))
                yield from ((folder, payload) for payload in snapshot.payloads)
            for one in commit.contributors:
                folder = delivery_path(one.silo, one.version)
                with suppress(RefusedError, FileNotFoundError):
                    manifest = Manifest.from_bytes(self._target.read(f"{folder}/manifest.json"))
                    yield from ((folder, payload) for payload in manifest.payloads)

    def _check(self, store: Path, trouble: str) -> None:
        """Raise ConfigError unless the copy is as it should be, as far as it goes."""
        scratch = store.parent.with_name(f"{store.parent.name}.scratch")
        scratch.mkdir()
        found = StoreVerifier(StoreExchange(str(store)), scratch, tell=self._tell).verify()
        shutil.rmtree(scratch)
        for finding in (finding for finding in found.findings if finding.of_chain):
            version = "contract" if finding.version is None else f"version {finding.version}"
            raise ConfigError(
                f"{self._given}; its chain is broken: {version}: {shown(finding.name)}: "
                f"{shown(finding.what, limit=1000)}; nothing is written"
            )
        for finding in found.findings:  # beside the chain: what every party of the run passes over
            (store / finding.name).unlink(missing_ok=True)
            self._missing.append(f"{finding.name}, which counts for nothing: {finding.what}")
        if trouble:
            raise ConfigError(f"{self._given}; {trouble}; nothing is written; if the run went on meanwhile, try again")
        self._missing += _not_merged(found, self._newest)

    def _copy(self, name: str) -> None:
        """A small object, if it is there and not yet here."""
        with suppress(FileExistsError):
            if (data := self._exchange.objects.read_if_there(name)) is not None:
                self._target.write(name, data)

    def _copy_tree(self, folder: str, depth: int = 0) -> None:
        """All small objects below a folder."""
        for name in self._exchange.objects.names(folder):
            inner = f"{folder}/{name}"
            try:
                data = self._exchange.objects.read_if_there(inner)
            except RefusedError as error:  # nothing of ours is so large
                self._missing.append(shown(error))
                continue
            if data is None and depth < DEEPEST:
                self._copy_tree(inner, depth + 1)
            elif data is not None:
                with suppress(FileExistsError):
                    self._target.write(inner, data)

    def _names(self, folder: str) -> list[str]:
        return self._exchange.objects.names(folder)

    # ---- the member's own

    def _copy_data_manifests(self, data: Path) -> None:
        silo = self._config.silos[self._silo]
        places = [(data / "train" / f"{n:03d}", Path(place)) for n, place in enumerate(silo.data)]
        places += [(data / "valid" / corpus, Path(place)) for corpus, place in sorted(silo.valid.items())]
        for target, place in places:
            if (place / MANIFEST_FILE).is_file():
                target.mkdir(parents=True)
                shutil.copyfile(place / MANIFEST_FILE, target / MANIFEST_FILE)
            else:
                self._missing.append(f"the manifest of {place}: there is none on this machine")


def _not_merged(found: Verified, newest: int) -> list[str]:
    """What of a chain cannot be merged again, because its payloads are gone, sealed, or were never there."""
    if found.is_collective:
        return ["payloads of deliveries: a collective's pass from silo to silo, so that no version is merged again"]
    if found.is_sealed:
        return ["what opens sealed deliveries: only the operator has it, so that no version was merged again"]
    gone = sorted({*range(1, newest + 1)} - {*found.merged})
    return [f"payloads of versions {_ranges(gone)}: pruned, so that these are not merged again"] if gone else []


def _ranges(numbers: Sequence[int]) -> str:
    """1 to 3, 7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)


def _write_software(target: Path) -> None:
    """The source of this very program, and the versions that it ran with."""
    root = Path(__file__).parents[2]
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in SOURCE_SUFFIXES and file.is_file():
                place = target / file.relative_to(root)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
    (target / "requirements.txt").write_text("".join(f"{line}\n" for line in _requirements(NEEDED)))
    (target / "README").write_text(f"Python {sys.version.split()[0]}. {HOW_TO_RUN}")


def _requirements(packages: Iterable[str]) -> list[str]:
    """Each with the version that is installed here."""
    found = []
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{package}=={metadata.version(package).split('+')[0]}")  # a local build is on no index
    return found
