"""Who takes part, how long a commit waits, how many steps a slow silo makes."""

from hypothesis import given
from hypothesis import strategies as st

from pretrain.outer.rounds import deadline_seconds, next_step, participants, steps_of_round

ROSTER = ["a", "b", "c", "d", "e"]


def test_all_take_part_unless_a_sample_is_drawn() -> None:
    assert participants(["b", "a"], 3, sample=None, seed=0) == ["a", "b"]


@given(st.integers(1, 10**6), st.integers(1, 5), st.integers(0, 99), st.permutations(ROSTER))
def test_every_party_draws_the_same_sample(round: int, sample: int, seed: int, roster: list[str]) -> None:
    drawn = participants(roster, round, sample=sample, seed=seed)
    assert drawn == participants(ROSTER, round, sample=sample, seed=seed) == sorted(set(drawn))
    assert len(drawn) == sample


def test_over_many_rounds_everybody_is_drawn_alike() -> None:
    counts = dict.fromkeys(ROSTER, 0)
    for round in range(1, 2001):
        for silo in participants(ROSTER, round, sample=2, seed=7):
            counts[silo] += 1
    assert all(abs(count - 800) < 4 * (2000 * 0.4 * 0.6) ** 0.5 for count in counts.values())  # four deviations


def test_the_deadline_by_hand() -> None:
    # Median 12, deviations 2, 1, 0, 1, 88: their median is 1.
    assert deadline_seconds([10, 11, 12, 13, 100], mads=8, floor=5, ceiling=60) == 20
    assert deadline_seconds([10, 11, 12, 13, 100], mads=8, floor=30, ceiling=60) == 30
    assert deadline_seconds([10, 11, 12, 13, 100], mads=8, floor=5, ceiling=15) == 15
    assert deadline_seconds([], mads=8, floor=5, ceiling=60) == 60


def test_steps_by_speed_by_hand() -> None:
    seconds = {"fast": 0.1, "slow": 0.4, "odd": 0.13}
    assert [steps_of_round(seconds, silo, 40) for silo in ("fast", "slow", "odd", "new")] == [40, 10, 31, 40]
    assert steps_of_round({"fast": 0.001, "snail": 1.0}, "snail", 40) == 1
    # One of three cannot slow the two others to nothing: it counts as four times as fast as the median.
    assert steps_of_round({"liar": 1e-300, "one": 1.0, "two": 1.25}, "one", 40) == 10
    assert steps_of_round({"liar": 1e-300, "one": 1.0, "two": 1.25}, "two", 40) == 8


@given(st.integers(1, 40), st.integers(0, 5), st.data())
def test_a_round_has_as_many_inner_steps_as_were_chosen(interval: int, rounds: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(1, interval))
    step, done = rounds * interval, 0
    while step < (rounds + 1) * interval:
        before, step, done = step, next_step(step, interval, chosen), done + 1
        assert step > before
    assert (step, done) == ((rounds + 1) * interval, chosen)
