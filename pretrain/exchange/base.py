"""What a silo asks of an exchange, whichever it is: a few verbs, called on the silo's leader, beside training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pretrain.exchange.payload import Held, Tensors
from pretrain.exchange.words import Evaluation
from pretrain.outer.digest import Row
from pretrain.outer.pieces import Piece
from pretrain.outer.quantize import Parts
from pretrain.trust.ledger import Commit, Manifest, Payload


@dataclass(frozen=True, kw_only=True)
class Received:
    """A version: its commit, and the new values of the tensors that it changes, fp32, with their digest rows."""

    commit: Commit
    values: dict[str, Tensor]
    rows: dict[str, Row]
    bytes_sent: int
    bytes_received: int
    moments: dict[str, Parts] = field(default_factory=dict)
    """What was merged of the moments that silos share."""
    told: Mapping[str, Parts] = field(default_factory=dict)
    """What of it was ours, as it counted."""
    refused: bool = False
    """Whether our delivery for it was refused for good."""


class Outgoing(NamedTuple):
    """Our part of a version."""

    manifest: Manifest
    file: Path
    """Its place in the outbox."""
    held: Held | None = None
    """What is coded, where that is in memory; else it lies in the file."""

    @property
    def coded(self) -> Held | Tensors:
        """What is coded, wherever it is."""
        return self.held or Tensors(self.file)

    def write(self) -> None:
        """Put it in the outbox, where a restart finds it."""
        if self.held:
            self.held.write(self.file, self.manifest.payloads[0].fragment)
        self.file.with_suffix(".json").write_bytes(self.manifest.to_bytes())


class Exchange(Protocol):
    """How one silo's pseudo-gradients reach the others, and what was merged comes back."""

    def terms_sha256(self, version: int) -> str:
        """sha256 of what holds at a version whose base we have: of the contract (version 0), or of an amendment."""

    @property
    def concurrent(self) -> bool:
        """Whether `receive` may run for several versions at once; if not, it is called in their order."""

    @property
    def sends_files(self) -> bool:
        """Whether what is sent has to lie in a file; if not, it does when a checkpoint is written."""

    @property
    def lost(self) -> str:
        """Why the silo has to stop, once it has to: another one is gone that this exchange cannot do without."""

    @property
    def waiting_for(self) -> str:
        """Who has to do something before what we wait for can come, as far as we know."""

    def join(self) -> None:
        """Wait until the contract is there, compare it with our configuration, take our name. Once, at the start."""

    def assist(self, rank: int) -> None:
        """On every rank but the leader, once that has joined."""

    def is_ours(self, version: int, commit_sha256: str) -> bool:
        """Whether the newest commit that a checkpoint holds is the run's still; False if it was rolled back.

        Raises ConfigError if it never was: an old copy of the store or of the run directory, or another run.
        """

    def initial(self) -> Received:
        """All tensors of version 0, for a silo without checkpoint; of the newest with a quorum, after a rollback, and
        where version 0 was pruned.
        """

    def tokens_total(self, version: int, *, above: int = 0) -> int:
        """Tokens that we had trained on at our newest delivery in the commits after `above`, up to `version`; else 0.

        So many sequences of our text have been read for what these commits hold.
        """

    def rollbacks(self) -> list[dict[str, Any]]:
        """What was taken back since the run began, oldest first, as metrics.jsonl has it."""

    def pieces(self, names: Sequence[str], base: Mapping[str, Tensor]) -> list[Piece]:
        """In which pieces a fragment's tensors are coded and sent."""

    def masked(
        self,
        version: int,
        base: Mapping[str, Tensor],
        local: Mapping[str, Tensor],
        moments: Mapping[str, Parts],
        tokens: int,
    ) -> tuple[dict[str, Parts], dict[str, Parts]] | None:
        """What leaves of a fragment and of its moments, whose values nobody may see; None where they leave coded.

        Raises ConfigError.
        """

    def told(self, sent: Outgoing, base: Mapping[str, Tensor]) -> Mapping[str, Parts]:
        """The moments of a delivery of ours as they count in the merge; `base` as for `receive`."""

    def sealed(self, payload: Payload, file: Path, version: int) -> Payload:
        """What a manifest says of a payload that was written to a file: of it sealed, if it leaves so."""

    def deliver(self, sent: Outgoing) -> None:
        """Give away a coded fragment, as often as need be: what was delivered first stands."""

    def receive(self, version: int, sent: Outgoing | None, base: Mapping[str, Tensor]) -> Received:
        """Wait until a version is merged; `sent` is our part in it, if we have one, and `base` the tensors that it
        changes, as they are before.
        """

    def recorded(self, commit: Commit) -> Commit:
        """The commit of what was received, as it is on record: a restart finds all of it then. It may have to wait."""

    def checkpointed(self, version: int) -> None:
        """A checkpoint holds `version`: what is older is not needed any more."""

    def evaluated(self, evaluation: Evaluation, wrong: Callable[[], str]) -> None:
        """What we have found the held-out loss of a version to be, for others to read where they may.

        It leaves once `wrong` has returned nothing.
        """

    def moved(self) -> None:
        """The main loop goes on."""

    def close(self, reason: str) -> None:
        """On every rank, when it ends: `reason` says why, in the past tense, or is empty when all is done."""
