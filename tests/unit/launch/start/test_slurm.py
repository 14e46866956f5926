"""What of `atoll launch slurm` needs no cluster."""

import pytest

from launch.start.slurm import time_limit_seconds
from tests.support import one_line_error


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-0", 86_400),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("2-00:00:01", 172_801),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(limit: str, seconds: int) -> None:
    assert time_limit_seconds(limit) == seconds


def test_a_time_limit_that_is_none_is_one_line() -> None:
    assert one_line_error(time_limit_seconds, "a day").startswith("time_limit: 'a day' given; allowed: ")
