"""SIGKILL at seeded random instants, over silos and aggregator: the bits of the undisturbed run."""

from pathlib import Path

import pytest

from benchmarks.chaos import chaos
from tests.support import TinyText


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("num_silos", "num_rounds", "num_kills", "streaming"),
    [(2, 8, 4, True), (3, 30, 60, False), (3, 30, 60, True)],
    ids=["small", "plain", "streaming"],
)
def test_killed_at_random_instants(
    tmp_path: Path, tiny_text: TinyText, num_silos: int, num_rounds: int, num_kills: int, streaming: bool
) -> None:
    problems = chaos(
        tmp_path,
        tiny_text.tokenizer,
        list(tiny_text.packed.values()),
        num_silos=num_silos,
        num_rounds=num_rounds,
        num_kills=num_kills,
        seed=0,
        streaming=streaming,
    )
    assert not problems
