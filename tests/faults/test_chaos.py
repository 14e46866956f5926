"""SIGKILL at seeded random instants, over silos and aggregator: the bits of the undisturbed run."""

from pathlib import Path

import pytest

from benchmarks.chaos import chaos
from tests.support import TinyText


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("size", "streaming"),
    [
        ({"num_silos": 2, "num_rounds": 8, "num_kills": 4}, True),
        ({"num_silos": 3, "num_rounds": 30, "num_kills": 60}, False),
        ({"num_silos": 3, "num_rounds": 30, "num_kills": 60}, True),
    ],
    ids=["small", "plain", "streaming"],
)
def test_killed_at_random_instants(tmp_path: Path, tiny_text: TinyText, size: dict[str, int], streaming: bool) -> None:
    packed = list(tiny_text.packed.values())
    problems = chaos(tmp_path, tiny_text.tokenizer, packed, **size, seed=0, streaming=streaming)
    assert not problems
