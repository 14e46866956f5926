"""What a silo has answered in secure sums, noted beside its private key, for whoever has that key. No torch."""

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.config.errors import ConfigError
from pretrain.host.foreign import shown
from pretrain.sync.delivered import Delivered, append

RUN = re.compile(r"run (\S{1,64}) (.*)")


class Answered:
    """A silo's note of one contract, `NAME.sums/CONTRACT_SHA256.txt` beside NAME.key:

        run 5f0c...e1 /where/it/began/silos/NAME
        000017 2ab9...04

    The first line has the identity of the one run directory that delivers under this contract; each other a version and
    the hash of the one set of deliveries that was answered. Masks follow from key and contract: in two run directories,
    of which neither knows what the other has answered, one delivery could be told. So the run directory may be an
    older copy, or two of one: what has the key finds what was answered.
    """

    def __init__(self, key_file: Path, contract_sha256: str, silo: str) -> None:
        self.file = key_file.with_suffix(".sums") / f"{contract_sha256}.txt"
        self._keys, self._silo = key_file.parent, silo

    def check(self, identity: str, directory: Path, *, has_answered: bool) -> None:
        """Raise ConfigError if another run directory than this one, with its identity, delivers under the contract; or
        if the note is missing of one that `has_answered`.
        """
        if has_answered and not self.file.exists():
            raise ConfigError(
                f"trust.directory: {str(self._keys)!r} given; {self.file}, which says what silo {self._silo} has "
                f"answered in secure sums, is missing, and {directory} has answered; allowed: with it, beside the key; "
                f"if it is lost, and this run directory is no older copy, begin it anew: mkdir -p {self.file.parent} "
                f"&& touch {self.file}"
            )
        if (found := self._run()) and found[1] != identity:
            raise ConfigError(
                f"directory: {str(directory)!r} given; under this contract silo {self._silo} delivers from "
                f"{shown(found[2], limit=4096)}, as {self.file} says; from two run directories one delivery could be "
                "told from the other; allowed: that one, a copy of it, or a new contract; if it is lost for good, take "
                "the line that begins with run out of that file, and none that says what was answered"
            )

    def begin(self, identity: str, directory: Path) -> None:
        """Note, before anything is delivered, that this run directory delivers under the contract; ConfigError as of
        `check`.
        """
        with self._alone():
            self.check(identity, directory, has_answered=False)
            if not self._run():
                append(self.file, f"run {identity} {shown(directory.absolute(), limit=4096)}")

    def add_only(self, version: int, sha256: str) -> bool:
        """Note what is about to be answered for a version; whether that is all that ever was. Raises ConfigError."""
        with self._alone():
            return Delivered(self.file).add_only(version, sha256)

    def _run(self) -> "re.Match[str] | None":
        try:
            lines = self.file.read_text(errors="replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._trouble("read", error) from None
        return next(filter(None, map(RUN.fullmatch, lines)), None)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the note against all other processes that have it before them. Raises ConfigError if that cannot be."""
        try:
            self.file.parent.mkdir(mode=0o700, exist_ok=True)
            with self.file.open("a") as held:
                fcntl.flock(held, fcntl.LOCK_EX)  # for the time of a line
                yield
        except OSError as error:
            raise self._trouble("written", error) from None

    def _trouble(self, done: str, error: OSError) -> ConfigError:
        return ConfigError(
            f"trust.directory: {str(self._keys)!r} given; {self.file}, where silo {self._silo} notes what it answers "
            f"in secure sums, cannot be {done}: {error.strerror}; allowed: a directory for its key where that can be "
            "done"
        )
