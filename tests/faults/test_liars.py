"""One of three silos lies, in another way in each round, with the recommended settings: it is refused by its name."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.faults.scripted import Faults, federate_with
from tests.support import ROOT, TinyText, tiny_silo

# A lie must come before the others are merged without it, on a busy machine, too: whoever was refused three times is
# not taken for away, as nobody waits for him then.
RULES = {"quorum": 2, "deadline_floor_seconds": 8.0, "deadline_ceiling_seconds": 8.0, "away_after_versions": 100}
LIES: Faults = {
    "gamma": [
        ("sending", 1, 0, "lie", "second moments"),
        ("sending", 2, 0, "lie", "mean gradients"),
        ("delivering", 3, 0, "lie", "tokens"),
        ("sending", 4, 0, "lie", "range"),
    ]
}
REFUSED = {
    1: r"second moments of gradients of norm [\d.e+]+ given; allowed: 4 x inner.clip_norm=1",
    2: r"mean gradients of norm [\d.e+]+ given; allowed: 4 x inner.clip_norm=1",
    3: "it counts 1000000 tokens, not 1 to 256: 4 steps of outer.max_batch_sequences=4",
    4: r"its pseudo-gradient has norm [\d.e+]+; allowed: up to 1.153e\+18",
}


def recommended(**outer: Any) -> dict[str, Any]:
    """The sections of configs/outer/recommended.yaml, for four rounds."""
    given = yaml.safe_load((ROOT / "configs" / "outer" / "recommended.yaml").read_text())
    return {"inner": given["inner"] | {"num_steps": 16}, "outer": given["outer"] | outer}


def log_of(run: Outcome, name: str) -> str:
    return (Path(run.config.directory) / "logs" / "latest" / f"{name}.log").read_text()


@pytest.mark.soak
def test_the_honest_ones_learn_as_without_the_liar(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    settings = recommended(max_batch_sequences=4) | {"membership": RULES}
    honest = federate(tiny_config(tmp_path / "honest", **settings))
    three = tiny_config(tmp_path / "three", **settings, silos={"gamma": tiny_silo(tiny_text, "gamma")})
    run = federate_with(LIES, three, tmp_path / "fired")
    log = log_of(run, "aggregator")
    for version, line in REFUSED.items():
        assert re.search(rf"version {version}: refused the delivery of silo gamma: {line}\n", log)
        assert "gamma" not in {contributor.silo for contributor in run.commit(version).contributors}
    for silo in ("alpha", "beta"):
        assert run.held_out(silo)[4][silo] == pytest.approx(honest.held_out(silo)[4][silo], rel=0.01)


@pytest.mark.soak
def test_who_says_that_it_is_absurdly_fast_slows_nobody(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    rules = RULES | {"steps": "speed"}
    config = tiny_config(tmp_path, **recommended(), membership=rules, silos={"gamma": tiny_silo(tiny_text, "gamma")})
    lies: Faults = {"gamma": [("delivering", version, 0, "lie", "speed") for version in (1, 2, 3, 4)]}
    run = federate_with(lies, config, tmp_path / "fired")
    log = log_of(run, "aggregator")
    for version in range(1, 5):
        assert f"version {version}: refused the delivery of silo gamma: its seconds_per_step is 1e-300, where" in log
        assert all(contributor.steps > 1 for contributor in run.commit(version).contributors)
