"""SIGKILL at seeded random instants, over silos and aggregator: the bits of the undisturbed run."""

from pathlib import Path

import pytest

from benchmarks.chaos import chaos
from tests.support import TinyText


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_killed_at_random_instants(tmp_path: Path, tiny_text: TinyText) -> None:
    problems = chaos(
        tmp_path,
        tiny_text.tokenizer,
        list(tiny_text.packed.values()),
        num_silos=2,
        num_rounds=8,
        num_kills=4,
        seed=0,
        streaming=True,
    )
    assert not problems


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("streaming", [False, True], ids=["plain", "streaming"])
def test_soak(tmp_path: Path, tiny_text: TinyText, streaming: bool) -> None:
    problems = chaos(
        tmp_path,
        tiny_text.tokenizer,
        list(tiny_text.packed.values()),
        num_silos=3,
        num_rounds=30,
        num_kills=60,
        seed=0,
        streaming=streaming,
    )
    assert not problems
