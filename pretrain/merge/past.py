"""What earlier commits tell of each silo: which it missed, and how long its pseudo-gradients were.

Not the commits themselves: those of a thousand silos are a thousand rows each.
"""

from collections import deque

from pretrain.config.keys import RunConfig
from pretrain.outer.rounds import participants
from pretrain.trust.ledger import Commit, Manifest, check_cosigned, sha256_bytes
from pretrain.trust.members import Members

NORMS = 8  # how many of a silo's own pseudo-gradients of a fragment a new one is compared with


class Past:
    """The newest commits of one run, as far as they matter to the next."""

    def __init__(self, config: RunConfig, members: Members) -> None:
        self._config, self._rules, self._schedule, self._members = config, config.membership, config.schedule, members
        self._missed: dict[str, deque[int]] = {}  # silo: versions in a row that it was waited for in vain, the newest
        self._norms: dict[tuple[str, int], deque[float]] = {}  # by silo and fragment
        self._in_time: deque[tuple[int, set[str]]] = deque(maxlen=config.outer.num_fragments)  # silos of a version
        self._sha256: deque[tuple[int, str]] = deque(maxlen=2 * config.outer.num_fragments)  # of commits

    def committed(self, commit: Commit) -> None:
        """A version was committed, now or before this process started; in their order."""
        version, taken = commit.version, {c.silo for c in commit.contributors}
        self._sha256.append((version, sha256_bytes(commit.to_bytes())))
        self._in_time.append((version, {c.silo for c in commit.contributors if c.version == version}))
        if not version:
            return
        for silo in taken | {*self.drawn(version)} if self._rules.is_elastic else ():
            missed = self._missed.setdefault(silo, deque(maxlen=self._rules.away_after_versions))
            missed.clear() if silo in taken else missed.append(version)
        fragment = self._schedule.fragment(version)
        for silo in taken:
            if (norm := commit.metrics.get(f"norm/{silo}")) is not None:
                self._norms.setdefault((silo, fragment), deque(maxlen=NORMS)).append(norm)

    @property
    def num_needed(self) -> int:
        """Newest commits that are to be told of, whoever starts."""
        rules, num_fragments = self._rules, self._config.outer.num_fragments
        versions = max(
            NORMS * num_fragments if rules.max_norm_ratio else 0, rules.away_after_versions if rules.is_elastic else 0
        )
        if rules.sample:  # each is drawn so seldom, more or less
            versions *= 2 * -(-len(self._config.full_roster) // rules.sample)
        return max(versions, num_fragments * (2 if rules.stale_weight else 1))

    def drawn(self, version: int) -> list[str]:
        """Whose deliveries a version is made of, if all come."""
        rules, round = self._rules, self._config.round_of(version)
        roster = self._members.roster_at(version, self._config.agreed_roster)
        return participants(roster, round, sample=rules.sample, seed=rules.sample_seed)

    def is_away(self, silo: str, *, since: int) -> bool:
        """Whether a silo has missed too many commits in a row after version `since`, where it said that it is there."""
        return sum(version > since for version in self._missed.get(silo, ())) >= self._rules.away_after_versions

    def norms(self, silo: str, fragment: int) -> list[float]:
        """Of its newest pseudo-gradients of a fragment, the oldest first."""
        return list(self._norms.get((silo, fragment), ()))

    def check_cosigned(self, manifest: Manifest) -> None:
        """Raise RefusedError unless a silo goes by the commits that were made here."""
        adopted = range(self._schedule.base(manifest.version), manifest.version)
        check_cosigned(manifest, [sha256 for version, sha256 in self._sha256 if version in adopted])

    def in_time(self, version: int) -> set[str]:
        """Whose deliveries for a version were in its commit, one of the last of each fragment."""
        return next(silos for made, silos in self._in_time if made == version)
