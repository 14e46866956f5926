"""A silo that starts without a checkpoint of its own in a run that has gone on: it reads nothing twice."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from launch.show.report import write_report
from launch.show.status_reader import store_status
from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.rollback import roll_back_store
from pretrain.exchange.store import StoreExchange
from pretrain.silo.optim import learning_rate
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, assert_evaluated_last, federate
from tests.support import free_port

ROUND_TOKENS = 4 * 4 * 16  # steps, sequences, tokens of one


def tokens_read(run: Outcome, silo: str) -> list[int]:
    """Where in its own text each part that a silo has in the commits begins, and where the last ends, in tokens."""
    commits = [run.commit(version) for version in range(1, run.exchange.newest_version() + 1)]
    parts = [
        (one.tokens_total - one.tokens, one.tokens_total) for c in commits for one in c.contributors if one.silo == silo
    ]
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(parts)), "a gap, or read twice"
    return [*(begin for begin, _ in parts), parts[-1][1]]


@pytest.mark.soak
def test_after_a_rollback_without_checkpoints_as_old(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(
        tmp_path,
        silo={"keep_checkpoints": 1},
        exchange={"keep_versions": 4},
        membership={"rejoin_warmup_steps": 4},
    )
    first = federate(config)
    before = {round: first.held_out("alpha")[round] for round in (0, 1)}
    (Path(config.directory) / "report.html").unlink()
    roll_back_store(StoreExchange(config.store_url), to=1, reason="bad text", key=config.key_file(OPERATOR))
    run = federate(config)

    for silo in config.silos:
        assert tokens_read(run, silo) == [0, ROUND_TOKENS, 2 * ROUND_TOKENS, 3 * ROUND_TOKENS]
    status = store_status(config.store_url).silos
    assert {name: (one.tokens_contributed, one.tokens_total) for name, one in status.items()} == dict.fromkeys(
        config.silos, (3 * ROUND_TOKENS, 3 * ROUND_TOKENS)
    )
    assert "starts from version 1, step 4, with a fresh inner optimizer; 256 tokens of this silo are in it" in "".join(
        file.read_text() for file in Path(config.directory, "logs").rglob("*.log")
    )
    again = [r for r in run.records if r["kind"] == "step" and r["silo"] == "alpha"][12:]
    assert [r["step"] for r in again] == list(range(5, 13))
    assert [r["tokens"] for r in again] == [4 * 16 * step for step in range(5, 13)]
    warmed = [learning_rate(step, config.inner) * min(1, (step - 3) / 4) for step in range(4, 12)]
    assert [r["lr"] for r in again] == pytest.approx(warmed)

    (seconds, *_) = [r["seconds_training"] for r in run.records if r["kind"] == "sync" and r["silo"] == "alpha"]
    *_, start = [r for r in run.records if r["kind"] == "start" and r["silo"] == "alpha"]
    assert start["seconds_training"] == seconds > 0, "time goes on from what version 1 had taken"

    summary = json.loads((Path(config.directory) / "summary.json").read_text())
    assert summary["tokens"] == 2 * 3 * ROUND_TOKENS
    assert summary["rollbacks"] == [{"from_version": 3, "to_version": 1, "reason": "bad text"}]
    rounds = {one["round"]: one["val_loss"] for one in summary["val_loss_by_round"]}
    assert list(rounds) == [0, 1, 2, 3]
    assert rounds[0]["alpha"] == before[0]["alpha"], "before training is before training"
    assert rounds[1]["alpha"] == before[1]["alpha"], "what was gone back to"
    html = write_report(config).read_text()
    assert "Rolled back from version 3 to 1" in html
    assert html.count('id="rollback"') == 2 + 1 + 2 + 2 + 2  # losses with their mean, training, sync, gradients
    assert_evaluated_last(run)


def drop_checkpoints(config: RunConfig, silo: str, *, above_step: int) -> None:
    """Delete a silo's checkpoints of later steps."""
    for directory in (config.silo_directory(silo) / "checkpoints").glob("step-*"):
        if int(directory.name.removeprefix("step-")) > above_step:
            shutil.rmtree(directory)


def test_one_whose_checkpoint_is_older_than_its_part_and_one_that_has_none(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    """With a quorum both take over version 2; alpha's checkpoint is of version 1, and beta has none."""
    config = tiny_config(
        tmp_path,
        silo={"keep_checkpoints": 3},
        exchange={"keep_versions": 4},
        membership={"quorum": 2},  # silos may miss versions, though no commit here does without one
    )
    federate(config)
    roll_back_store(StoreExchange(config.store_url), to=2, key=config.key_file(OPERATOR))
    drop_checkpoints(config, "alpha", above_step=4)
    drop_checkpoints(config, "beta", above_step=0)
    run = federate(config)
    for silo in config.silos:
        assert tokens_read(run, silo) == [0, ROUND_TOKENS, 2 * ROUND_TOKENS, 3 * ROUND_TOKENS]
    (jump,) = [record for record in run.records if record["kind"] == "catch_up"]
    assert (jump["silo"], jump["from_version"], jump["version"]) == ("alpha", 1, 2)
    seconds = [r["seconds_training"] for r in run.records if r["kind"] == "sync" and r["silo"] == "alpha"]
    assert [r for r in run.records if r["kind"] == "start" and r["silo"] == "alpha"][-1]["seconds_training"] == seconds[
        1
    ]
    starts = [(r["silo"], r["version"], r["step"], r["tokens"]) for r in run.records if r["kind"] == "start"]
    assert sorted(starts[2:]) == [("alpha", 2, 8, 2 * ROUND_TOKENS), ("beta", 2, 8, 2 * ROUND_TOKENS)]
    summary = json.loads((Path(config.directory) / "summary.json").read_text())
    assert summary["tokens"] == 2 * 3 * ROUND_TOKENS
    assert_evaluated_last(run)


@pytest.mark.soak
def test_one_of_a_collective_goes_on_from_its_own_ledger(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, exchange={"kind": "collective", "url": f"tcp://127.0.0.1:{free_port()}"})
    first = federate(config)
    assert not list(Path(first.ledger, "global/000000").glob("*.safetensors")), "version 0 is pruned"
    losses = first.held_out("alpha")[3]
    drop_checkpoints(config, "alpha", above_step=0)
    run = federate(config)
    start = [record for record in run.records if record["kind"] == "start" and record["silo"] == "alpha"][-1]
    assert (start["version"], start["step"], start["tokens"]) == (3, 12, 3 * ROUND_TOKENS)
    evaluated = [record for record in run.records if record["kind"] == "eval" and record["silo"] == "alpha"]
    assert (evaluated[-1]["round"], evaluated[-1]["val_loss"]) == (3, losses)
    assert len(evaluated) == 5
    summary = json.loads((Path(config.directory) / "summary.json").read_text())
    assert summary["tokens"] == 2 * 3 * ROUND_TOKENS
