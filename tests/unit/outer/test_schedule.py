"""When a silo delivers and adopts: runs that can be listed by hand, and laws of every schedule."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pretrain.outer.schedule import Schedule

Event = tuple[int, str, int]  # inner step, what, version


def events(schedule: Schedule, *, start: int = 0, sent: int = 0, adopted: int = 0) -> list[Event]:
    """All that a silo does from the end of step `start` on, with its state kept as the silo's loop keeps it."""
    done: list[Event] = []
    for step in range(start, schedule.num_steps + 1):
        for what, version in schedule.due(step, sent=sent, adopted=adopted):
            done.append((step, what, version))
            sent, adopted = (version, adopted) if what == "deliver" else (sent, version)
        assert schedule.newest_sent(step) == sent
    return done


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    interval = draw(st.integers(1, 12))
    return Schedule(
        num_steps=interval * draw(st.integers(1, 5)),
        sync_interval_steps=interval,
        num_fragments=draw(st.integers(1, interval)),
        overlap_steps=draw(st.integers(0, interval - 1)),
    )


# ---- by hand


def test_with_one_fragment_versions_are_rounds() -> None:
    schedule = Schedule(num_steps=12, sync_interval_steps=4)
    assert schedule.num_versions == 3
    assert [schedule.fragment(version) for version in range(4)] == [0, 0, 0, 0]
    assert [schedule.base(version) for version in range(1, 4)] == [0, 1, 2]
    assert [schedule.sent(version) for version in range(4)] == [0, 4, 8, 12]
    assert [schedule.adopted(version) for version in range(4)] == [0, 4, 8, 12]
    assert [schedule.steps(version) for version in range(1, 4)] == [4, 4, 4]
    assert events(schedule) == [
        *((4, "deliver", 1), (4, "adopt", 1)),
        *((8, "deliver", 2), (8, "adopt", 2)),
        *((12, "deliver", 3), (12, "adopt", 3)),
    ]


def test_one_fragment_with_overlap() -> None:
    assert events(Schedule(num_steps=12, sync_interval_steps=4, overlap_steps=3)) == [
        *((4, "deliver", 1), (7, "adopt", 1), (8, "deliver", 2), (11, "adopt", 2)),
        *((12, "deliver", 3), (12, "adopt", 3)),  # there is no step left to overlap with
    ]


def test_three_fragments_with_overlap() -> None:
    schedule = Schedule(num_steps=12, sync_interval_steps=6, num_fragments=3, overlap_steps=2)
    assert schedule.num_versions == 8
    versions = range(1, 9)
    assert [schedule.fragment(version) for version in versions] == [1, 2, 0, 1, 2, 0, 1, 2]
    assert [schedule.base(version) for version in versions] == [0, 0, 0, 1, 2, 3, 4, 5]
    assert [schedule.sent(version) for version in versions] == [2, 4, 6, 8, 10, 12, 12, 12]
    assert [schedule.adopted(version) for version in versions] == [4, 6, 8, 10, 12, 12, 12, 12]
    assert [schedule.steps(version) for version in versions] == [2, 4, 6, 6, 6, 6, 4, 2]
    assert events(schedule) == [
        (2, "deliver", 1),
        *((4, "adopt", 1), (4, "deliver", 2)),
        *((6, "adopt", 2), (6, "deliver", 3)),
        *((8, "adopt", 3), (8, "deliver", 4)),
        *((10, "adopt", 4), (10, "deliver", 5)),
        # The last step: what is in flight comes in, then all fragments leave once more and come back.
        *((12, "adopt", 5), (12, "deliver", 6), (12, "deliver", 7), (12, "deliver", 8)),
        *((12, "adopt", 6), (12, "adopt", 7), (12, "adopt", 8)),
    ]
    assert [step for step in range(13) if schedule.is_due(step)] == [2, 4, 6, 8, 10, 12]


def test_two_fragments_in_flight_at_once() -> None:
    assert events(Schedule(num_steps=4, sync_interval_steps=4, num_fragments=4, overlap_steps=2)) == [
        *((1, "deliver", 1), (2, "deliver", 2), (3, "adopt", 1), (3, "deliver", 3)),
        *((4, "adopt", 2), (4, "adopt", 3), (4, "deliver", 4), (4, "deliver", 5), (4, "deliver", 6), (4, "deliver", 7)),
        *((4, "adopt", 4), (4, "adopt", 5), (4, "adopt", 6), (4, "adopt", 7)),
    ]


# ---- laws


@given(schedules())
def test_every_version_is_delivered_and_adopted_once_in_order(schedule: Schedule) -> None:
    done = events(schedule)
    versions = list(range(1, schedule.num_versions + 1))
    for what, when in (("deliver", schedule.sent), ("adopt", schedule.adopted)):
        assert [version for _, found, version in done if found == what] == versions
        assert [step for step, found, _ in done if found == what] == [when(version) for version in versions]
    assert max(when for when, _, _ in done) == schedule.num_steps  # where everything has been adopted


@given(schedules())
def test_a_fragment_leaves_again_only_after_it_came_back(schedule: Schedule) -> None:
    holds = [0] * schedule.num_fragments  # each fragment's newest version
    for _, what, version in events(schedule):
        assert holds[schedule.fragment(version)] == schedule.base(version)
        if what == "adopt":
            holds[schedule.fragment(version)] = version
    assert sorted(holds) == list(range(schedule.num_versions - schedule.num_fragments + 1, schedule.num_versions + 1))


@given(schedules())
def test_every_fragment_trains_every_step_once(schedule: Schedule) -> None:
    for fragment in range(schedule.num_fragments):
        own = [v for v in range(1, schedule.num_versions + 1) if schedule.fragment(v) == fragment]
        steps = [schedule.steps(version) for version in own]
        assert sum(steps) == schedule.num_steps
        assert min(steps) >= 1
        assert max(steps) <= schedule.sync_interval_steps
        assert all(schedule.base(after) == before for before, after in pairwise(own))


@given(schedules())
def test_what_is_away_is_at_most_what_the_overlap_spans(schedule: Schedule) -> None:
    """Host memory holds one fragment for each version in flight; until the last step that is P * overlap / H."""
    away = 0
    for step, what, _ in events(schedule):
        away += 1 if what == "deliver" else -1
        if step < schedule.num_steps:
            spanned = schedule.overlap_steps * schedule.num_fragments / schedule.sync_interval_steps
            assert away <= spanned + 1
        assert 0 <= away <= schedule.num_fragments
    assert away == 0


@given(schedules())
def test_is_due_is_when_anything_is_done(schedule: Schedule) -> None:
    steps = {step for step, _, _ in events(schedule)}
    assert [schedule.is_due(step) for step in range(schedule.num_steps + 1)] == [
        step in steps for step in range(schedule.num_steps + 1)
    ]


@given(schedules(), st.data())
def test_killed_after_any_event_the_rest_is_the_same(schedule: Schedule, data: st.DataObject) -> None:
    whole = events(schedule)
    done = data.draw(st.integers(0, len(whole)))
    sent = max((version for _, what, version in whole[:done] if what == "deliver"), default=0)
    adopted = max((version for _, what, version in whole[:done] if what == "adopt"), default=0)
    last = whole[done - 1][0] if done else 0
    following = whole[done][0] if done < len(whole) else schedule.num_steps
    for start in range(last, following + 1):  # also a checkpoint of a step at which nothing is due
        assert events(schedule, start=start, sent=sent, adopted=adopted) == whole[done:]
