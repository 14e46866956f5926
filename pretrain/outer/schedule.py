"""When which fragment is synced: a pure function of H, the number of fragments, the overlap and the length of the run.

Version v of the global parameters is what the outer step number v made of one fragment, fragment v mod P of P: the
fragments take turns. Fragment p leaves the silos at the inner steps t with t mod H = offset p, where fragment 0 has
offset 0, and at the last step all fragments that have trained since leave once more. What came back is adopted
`overlap_steps` later (Streaming DiLoCo, https://arxiv.org/abs/2501.18512), at the latest at the last step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pretrain.outer.fragments import sync_offsets


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The syncs of a run of `num_steps` inner steps. Version 0 is the initial state; versions count from 1."""

    num_steps: int
    sync_interval_steps: int
    num_fragments: int = 1
    overlap_steps: int = 0
    in_turns: bool = False
    """One fragment trains at a time: the one that leaves next, while all others rest. Without overlap."""

    @property
    def num_versions(self) -> int:
        """The last version."""
        last = 0 if self.in_turns else self.num_fragments - 1  # what has rested does not leave once more
        return self.num_steps // self.sync_interval_steps * self.num_fragments + last

    def fragment(self, version: int) -> int:
        """The fragment that version changes."""
        return version % self.num_fragments

    def base(self, version: int) -> int:
        """The version that changed the same fragment before."""
        return max(0, version - self.num_fragments)

    def count(self, version: int) -> int:
        """Outer steps of version's fragment so far, this one included."""
        return -(-version // self.num_fragments)

    def sent(self, version: int) -> int:
        """The inner step after which the silos send what version is made of."""
        cycle, fragment = divmod(version, self.num_fragments)
        return min(cycle * self.sync_interval_steps + self._offsets[fragment], self.num_steps)

    @cached_property  # the loop asks after every inner step
    def _offsets(self) -> list[int]:
        return sync_offsets(self.num_fragments, self.sync_interval_steps)

    def adopted(self, version: int) -> int:
        """The inner step after which the silos adopt version."""
        return min(self.sent(version) + self.overlap_steps, self.num_steps)

    def steps(self, version: int) -> int:
        """Inner steps that the fragment has made since it was sent before, or since its turn began."""
        before = version - (1 if self.in_turns else self.num_fragments)
        return self.sent(version) - (self.sent(before) if before > 0 else 0)

    def turn(self, step: int) -> int | None:
        """The fragment that trains in the step after this inner step; None: all do."""
        return self.fragment(self.newest_sent(step) + 1) if self.in_turns else None

    def due(self, step: int, *, sent: int, adopted: int) -> Iterator[tuple[Literal["deliver", "adopt"], int]]:
        """What a silo does after this inner step, in order, and for which version.

        `sent` and `adopted` are the newest versions that it has done so far. What was in flight is adopted before its
        fragment is sent again.
        """
        near = self._near(step)
        yield from (("adopt", v) for v in near if adopted < v and self.adopted(v) == step > self.sent(v))
        yield from (("deliver", v) for v in near if sent < v and self.sent(v) == step)
        yield from (("adopt", v) for v in near if adopted < v and self.adopted(v) == step == self.sent(v))

    def is_due(self, step: int) -> bool:
        """Whether anything is delivered or adopted after this inner step."""
        return any(step in (self.sent(version), self.adopted(version)) for version in self._near(step))

    def newest_sent(self, step: int) -> int:
        """The newest version that was sent up to this inner step, this one included."""
        return max((version for version in self._near(step) if self.sent(version) <= step), default=0)

    def _near(self, step: int) -> range:
        """All versions that can be sent or adopted at a step: those of its own round and of the one before."""
        cycle = step // self.sync_interval_steps
        first = max(1, (cycle - 1) * self.num_fragments)
        return range(first, min((cycle + 1) * self.num_fragments, self.num_versions + 1))
