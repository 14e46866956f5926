"""The keys of the gate: by which rule a version becomes the run's current model. Imports no torch."""

from dataclasses import dataclass, field, fields
from typing import Any

LOCAL = ("places",)  # what of it is the operator's own affair, and no part of the contract
OF_SILOS = ("max_mean", "max_worst", "max_mean_rise", "max_silo_rise")
OF_PUBLIC = ("max_public", "max_public_rise")
RISES = {"max_mean_rise": "max_mean", "max_silo_rise": "max_worst", "max_public_rise": "max_public"}
"""Limits of how far above the current one's a candidate's loss may be, and those of the loss itself."""


@dataclass(kw_only=True)
class GateConfig:
    """By which rule a version becomes the run's current model, which `atoll export --current` gives away; all limits
    are in nats per token (docs/gate.md)."""

    every_versions: int = 0
    """One of so many versions is a candidate, which becomes the current one if it keeps every limit that is given; 0:
    there is no gate."""
    data: dict[str, str] = field(default_factory=dict)
    """SILO/CORPUS of each held-out split of `valid` by which its silo judges a candidate: the sha256 of its text, as
    `atoll contract gate` says it."""
    public: dict[str, str] = field(default_factory=dict)
    """The same of splits by which the operator does: any name."""
    places: dict[str, str] = field(default_factory=dict)
    """Where the operator's machine has those of `public`: name to a directory of packed shards. Its own affair, and no
    part of the contract."""
    eval_sequences: int = 64
    """Sequences of each split in one judgement, spread evenly over it; 0 takes all."""
    max_mean: float | None = None
    """Highest mean of the silos' losses, each the mean over its splits."""
    max_worst: float | None = None
    """Highest loss of any silo."""
    max_mean_rise: float | None = None
    """How far the mean may be above that of the current one, over the silos that have judged both; below 0: it has to
    be so much lower."""
    max_silo_rise: float | None = None
    """The same of each silo by itself."""
    max_public: float | None = None
    """Highest mean of the losses on the public splits."""
    max_public_rise: float | None = None
    """How far it may be above that of the current one."""
    quorum: int | None = None
    """Silos whose results are enough once the deadline has passed; null: all that `data` names."""
    deadline_seconds: float | None = None
    """How long results are waited for, after the candidate was committed; null: until all are there."""
    otherwise: str = "go_on"
    """What becomes of the run when a candidate does not become the current one: go_on; or go_back, to the current one,
    which ends all processes: started again, they go on from there."""

    @property
    def is_on(self) -> bool:
        """Whether there is one."""
        return self.every_versions > 0

    @property
    def terms(self) -> dict[str, Any]:
        """What the contract says of it."""
        return {name: value for name, value in vars(self).items() if name not in LOCAL}

    @property
    def limits(self) -> dict[str, float]:
        """Those that are given."""
        found = {name: getattr(self, name) for name in (*OF_SILOS, *OF_PUBLIC)}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def compares(self) -> bool:
        """Whether a candidate is compared with the current one."""
        return any(name in self.limits for name in RISES)

    @property
    def silos(self) -> dict[str, list[str]]:
        """Who judges, sorted, and by which of its corpora."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.data):
            silo, _, corpus = name.partition("/")
            found.setdefault(silo, []).append(corpus)
        return found

    @property
    def needed(self) -> int:
        """Silos whose results are enough at the deadline."""
        return len(self.silos) if self.quorum is None else self.quorum

    def is_candidate(self, version: int) -> bool:
        """Whether a version is one; version 0 is judged, too, as it is the current one at first."""
        return self.is_on and version % self.every_versions == 0

    @property
    def changed(self) -> list[str]:
        """Its keys that are not as by default."""
        default = GateConfig()
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)]
