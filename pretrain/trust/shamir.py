"""A secret in shares, of which so many lead back to it and fewer tell nothing (A. Shamir, How to share a secret, 1979).

The secret is the value at 0 of a polynomial over the integers modulo PRIME, and a share its value at the holder's
point. `threshold` values determine a polynomial of degree `threshold` - 1. To fewer, every secret fits exactly one: so
where the other coefficients are drawn evenly, fewer shares are as likely whatever the secret is. No torch.
"""

from collections.abc import Mapping, Sequence

PRIME = 2**521 - 1  # a Mersenne prime, so that 521 bits are as good as evenly drawn below it
SECRET_BYTES, SHARE_BYTES = 32, 66


def split(secret: bytes, coefficients: Sequence[bytes], points: Sequence[int]) -> list[bytes]:
    """A share for each of the points, 66 bytes; one more of them than there are coefficients leads back to the secret.

    `secret` has 32 bytes, a coefficient 66 secret ones, evenly drawn. Points are different numbers from 1 on.
    """
    assert len(secret) == SECRET_BYTES
    assert min(points) > 0
    assert len({*points}) == len(points) > len(coefficients)
    bits = [int.from_bytes(one, "little") & PRIME for one in coefficients]
    found = []
    for point in points:
        value = 0
        for coefficient in reversed(bits):
            value = (value + coefficient) * point % PRIME
        found.append(((int.from_bytes(secret, "little") + value) % PRIME).to_bytes(SHARE_BYTES, "little"))
    return found


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret, by as many shares as it takes, each by its point. Raises ValueError if they are of no secret."""
    values = {point: int.from_bytes(share, "little") for point, share in shares.items()}
    total = 0
    for point, value in values.items():
        above, below = 1, 1  # Lagrange's polynomial of this point, at 0
        for other in values:
            if other != point:
                above, below = above * other % PRIME, below * (other - point) % PRIME
        total += value * above * pow(below, -1, PRIME)
    if (secret := total % PRIME) >> 8 * SECRET_BYTES:
        raise ValueError("these shares are of no secret")
    return secret.to_bytes(SECRET_BYTES, "little")
