"""Streaming fragments, overlap, mixing and coded exchange, with real processes."""

from pathlib import Path

import pytest

from pretrain.config.allowed import CODECS
from pretrain.outer.fragments import cut_fragments
from pretrain.silo.model import build_initial
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_evaluated_last, federate
from tests.support import TWO_RANKS, VOCAB_SIZE, zero

KEEP_ALL = {"keep_versions": 100}


def sent(run: Outcome, silo: str) -> list[dict[str, int]]:
    """The silo's sync records."""
    return [record for record in run.records if record["kind"] == "sync" and record["silo"] == silo]


@pytest.mark.soak
def test_mixing_1_is_never_syncing(tmp_path: Path, tiny_config: TinyConfig) -> None:
    alone = federate(tiny_config(tmp_path / "alone", silos={"beta": None}, exchange={"kind": "none"}))
    outer = {"num_fragments": 2, "overlap_steps": 1, "mixing": 1.0}
    run = federate(tiny_config(tmp_path / "mixed", outer=outer))
    assert run.by_step("alpha", "loss") == alone.by_step("alpha", "loss")
    assert run.held_out("alpha")[3] != alone.held_out("alpha")[3]  # the global model is the mean of both silos


def test_fragments_split_the_bytes_and_not_more(tmp_path: Path, tiny_config: TinyConfig) -> None:
    runs = {
        num_fragments: federate(tiny_config(tmp_path / str(num_fragments), outer={"num_fragments": num_fragments}))
        for num_fragments in (1, 3)
    }
    whole, parts = (sent(run, "alpha") for run in runs.values())
    model = build_initial(runs[1].config.model, VOCAB_SIZE)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    largest = max(sum(sizes[name] for name in names) for names in cut_fragments(sizes, 3))
    header = 12_000  # of a safetensors file, at most
    for direction in ("bytes_sent", "bytes_received"):
        a_round = [record[direction] for record in parts if record["round"] == 2]
        assert len(a_round) == 3
        assert abs(sum(a_round) - whole[1][direction]) < 2 * header
        assert max(a_round) <= 4 * largest + header
    assert [(r["version"], r["fragment"], r["step"]) for r in parts] == [
        *((1, 1, 1), (2, 2, 2), (3, 0, 4), (4, 1, 5), (5, 2, 6), (6, 0, 8), (7, 1, 9), (8, 2, 10), (9, 0, 12)),
        *((10, 1, 12), (11, 2, 12)),  # at the end all that has trained since is synced once more
    ]


# The one that has least in common with the others, which all take the same way; int4 is in test_collective.py, too.
FIRST = "topk"


@pytest.mark.parametrize("codec", [pytest.param(c, marks=[] if c == FIRST else pytest.mark.soak) for c in CODECS])
def test_every_silo_holds_what_the_digest_names(codec: str, tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Every adoption compares the digest; here the global model that a silo evaluates is that of the commit, too."""
    silos = {"alpha": TWO_RANKS | zero(2), "beta": {"precision": "bf16"} | zero(3)}
    outer = {"codec": codec, "downlink_codec": codec, "num_fragments": 2, "overlap_steps": 1, "mixing": 0.5}
    run = federate(tiny_config(tmp_path, silos=silos, outer=outer, exchange=KEEP_ALL))
    assert_evaluated_last(run)
