"""The floor of quality: whose delivery does not count in a version, by the losses that the manifests tell. No torch.

A delivery is judged by those that the other silos made for the commit's version: its loss may be `outer.quality_floor`
times their median, of an even number the upper of the two in the middle. So whatever up to (n - 1) / 2 of n silos say,
each of the rest is compared with what one of these says, or more. A delivery that came too late judges nobody. At least
half of those in time count; of fewer than three silos all do.
"""

from collections.abc import Mapping, Sequence

from pretrain.config.allowed import SPENT
from pretrain.config.check import FEWEST_JUDGED
from pretrain.config.keys import RunConfig
from pretrain.host.foreign import shown
from pretrain.trust.ledger import Commit, Contributor, Manifest, RefusedError
from pretrain.trust.members import Members

Told = tuple[str, int, float]
"""A delivery's silo, version and loss."""


def floor_at(config: RunConfig, members: Members, version: int) -> float | None:
    """What a version's floor is, by a configuration that says what the contract does, and by the amendments."""
    terms = members.terms_at(version)
    return (terms.settings if terms else {}).get("outer.quality_floor", config.outer.quality_floor)


def below(floor: float | None, told: Sequence[Told]) -> dict[int, float]:
    """Which of a commit's deliveries do not count, by their place, and the median that each was compared with."""
    newest = max((version for _, version, _ in told), default=0)
    in_time = {silo: loss for silo, version, loss in told if version == newest}
    if floor is None or len(in_time) < FEWEST_JUDGED:
        return {}
    ranked = sorted(in_time.items(), key=lambda one: one[1])
    place_of = {silo: place for place, (silo, _) in enumerate(ranked)}
    found = {}
    for place, (silo, _, loss) in enumerate(told):
        if silo in place_of:
            middle = (len(ranked) - 1) // 2
            middle += place_of[silo] <= middle  # its own is left out
        else:
            middle = len(ranked) // 2
        if loss > floor * ranked[middle][1]:
            found[place] = ranked[middle][1]
    return found


def told_by(manifests: Sequence[Manifest]) -> list[Told]:
    """Of deliveries whose manifests were checked to have a loss."""
    return [(one.silo, one.version, one.metrics["loss"]) for one in manifests]


def losses(manifests: Sequence[Manifest], version: int) -> dict[str, float]:
    """What a commit says of the losses of its deliveries, so that everybody can judge them, too."""
    return {_key(one, version): one.metrics["loss"] for one in manifests}


def _key(one: Manifest | Contributor, version: int) -> str:
    return f"loss/{one.silo}" if one.version == version else f"loss/{one.silo}/{one.version}"


def check_metrics(manifest: Manifest, tiers: Mapping[str, str]) -> None:
    """Raise RefusedError for a number that the contract's `trust.metrics` does not let leave a silo."""
    for name in manifest.metrics:
        if name not in SPENT and tiers.get(name, "member") == "member":
            raise RefusedError(
                f"its metrics have {shown(name)}, which trust.metrics in the contract keeps with its silo"
            )


def check_floor(commit: Commit, floor: float | None) -> None:
    """Raise RefusedError unless just those of a commit's deliveries count that are not below the floor.

    Everybody can tell from the commit alone. That its losses are those of the manifests is for `check_told`.
    """
    if floor is None:
        return
    version = commit.version
    missing = [one.silo for one in commit.contributors if _key(one, version) not in commit.metrics]
    if missing:
        raise RefusedError(f"commit {version} does not say the loss of silo {shown(missing[0])}")
    told = [(one.silo, one.version, commit.metrics[_key(one, version)]) for one in commit.contributors]
    found = below(floor, told)
    for place, one in enumerate(commit.contributors):
        if (place in found) == bool(one.weight):
            judged = f"more than outer.quality_floor={floor:g} times" if place in found else "and it is not below"
            than = f"{found[place]:.4g}, the median of the others" if place in found else "the floor"
            raise RefusedError(
                f"commit {version} gives silo {shown(one.silo)} weight {one.weight}, where its loss is "
                f"{told[place][2]:.4g}, {judged} {than}"
            )


def check_told(commit: Commit, manifest: Manifest) -> None:
    """Raise RefusedError unless a commit tells the loss that a manifest in it does."""
    said, loss = commit.metrics.get(_key(manifest, commit.version)), manifest.metrics.get("loss")
    if loss is None or said != loss:
        raise RefusedError(
            f"commit {commit.version} says that the loss of silo {shown(manifest.silo)} is {said}; its manifest, {loss}"
        )


def not_counted(commit: Commit) -> dict[str, str]:
    """The silos that a commit has with weight 0 for their loss, and why, by what it tells."""
    told = [(one, commit.metrics.get(_key(one, commit.version))) for one in commit.contributors]
    counted = [loss for one, loss in told if loss is not None and one.weight]
    others = f"{min(counted):.4g} to {max(counted):.4g}" if counted else "none"
    return {
        one.silo: f"its loss is {loss:.4g}, too far above the others; counted are {others}"
        for one, loss in told
        if loss is not None and not one.weight
    }


def say_not_counted(commit: Commit) -> None:
    """Print them."""
    for silo, why in not_counted(commit).items():
        print(f"version {commit.version}: the delivery of silo {shown(silo)} does not count: {why}", flush=True)
