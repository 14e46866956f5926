"""What each silo of a collective signs of a version fits into what a record may have."""

import sys

from pretrain.config.check import MOST_TOGETHER
from pretrain.merge.outcome import Outcome, read_outcome
from pretrain.trust.ledger import RECORD_BYTES
from pretrain.trust.members import Members


def test_the_longest_of_the_most_silos() -> None:
    """Each number as long as one can be: a sign, 17 digits, a point, and an exponent of three digits with its sign."""
    longest = -sys.float_info.min
    assert len(repr(longest)) == 24
    sha256 = "a" * 64
    outcome = Outcome(
        contract_sha256=sha256,
        silo="s" * 63,
        version=999_999_999,
        terms_sha256=sha256,
        moments_digest=sha256,
        kept_digest=sha256,
        update_squared=longest,
        gram=[[longest] * MOST_TOGETHER] * MOST_TOGETHER,
        signature="s" * 86,
    )
    data = outcome.to_bytes()
    assert len(data) <= RECORD_BYTES < len(data) * (MOST_TOGETHER + 1) ** 2 / MOST_TOGETHER**2
    of = {"silo": outcome.silo, "version": outcome.version, "contract_sha256": sha256}
    assert read_outcome(data, num_silos=MOST_TOGETHER, members=Members(), **of) == outcome  # type: ignore[arg-type]
