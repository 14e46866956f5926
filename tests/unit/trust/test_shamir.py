"""Shamir's shares: enough lead back to the secret, fewer fit every secret."""

import os
from itertools import combinations

import pytest

from pretrain.trust.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, join, split


def number(value: int, num_bytes: int) -> bytes:
    return value.to_bytes(num_bytes, "little")


def test_shares_of_a_line_and_a_parabola_by_hand() -> None:
    secret, three, two = number(5, SECRET_BYTES), number(3, SHARE_BYTES), number(2, SHARE_BYTES)
    line = split(secret, [three], [1, 2, 4])  # 5 + 3 x
    assert [int.from_bytes(share, "little") for share in line] == [8, 11, 17]
    parabola = split(secret, [three, two], [1, 2, 3])  # 5 + 3 x + 2 x^2
    assert [int.from_bytes(share, "little") for share in parabola] == [10, 19, 32]
    [wraps] = split(number(0, SECRET_BYTES), [], [7])
    assert wraps == number(0, SHARE_BYTES)
    assert int.from_bytes(split(secret, [number(PRIME - 1, SHARE_BYTES)], [2, 7])[0], "little") == 3  # 5 - 2


@pytest.mark.parametrize(("threshold", "num_holders"), [(2, 2), (2, 3), (3, 4), (5, 7)])
def test_any_so_many_lead_back_to_the_secret_and_no_fewer(threshold: int, num_holders: int) -> None:
    secret = os.urandom(SECRET_BYTES)
    points = range(1, num_holders + 1)
    drawn = [os.urandom(SHARE_BYTES) for _ in range(threshold - 1)]
    shares = dict(zip(points, split(secret, drawn, points), strict=True))
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    for chosen in combinations(points, threshold):
        assert join({point: shares[point] for point in chosen}) == secret
    for chosen in combinations(points, threshold - 1):
        with pytest.raises(ValueError, match="of no secret"):  # but for one time in 2^265
            join({point: shares[point] for point in chosen})


def test_fewer_shares_fit_every_secret_and_each_one_once() -> None:
    """What one holder of a line's shares has would be the same with any secret, with just one slope."""
    [share, _] = split(os.urandom(SECRET_BYTES), [os.urandom(SHARE_BYTES)], [3, 4])
    slopes = set()
    for _ in range(100):
        guess = os.urandom(SECRET_BYTES)
        slope = (int.from_bytes(share, "little") - int.from_bytes(guess, "little")) * pow(3, -1, PRIME) % PRIME
        slopes.add(slope)
        assert split(guess, [number(slope, SHARE_BYTES)], [3, 4])[0] == share
    assert len(slopes) == 100


def test_a_share_that_was_changed_leads_to_no_secret() -> None:
    shares = split(os.urandom(SECRET_BYTES), [os.urandom(SHARE_BYTES)], [1, 2])
    with pytest.raises(ValueError, match="of no secret"):
        join({1: shares[0], 2: number(int.from_bytes(shares[1], "little") ^ (1 << 400), SHARE_BYTES)})
