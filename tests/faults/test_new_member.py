"""An institution that is added while the run goes on, by its three commands; processes are killed around it."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launch import cli
from pretrain.config.keys import OPERATOR
from pretrain.exchange.store import StoreExchange
from pretrain.federation.verify import StoreVerifier
from tests.conftest import TinyConfig
from tests.distributed.guests import final_digest
from tests.faults.scripted import Faults, federate_with
from tests.support import TinyText, merged, tiny_settings, tiny_silo
from tests.waiting import PATIENCE_SECONDS, wait_for

RULES = {"quorum": 2, "deadline_floor_seconds": 0.5, "deadline_ceiling_seconds": 20.0, "away_after_versions": 2}
OUTER = {"num_fragments": 2, "overlap_steps": 1, "codec": "int4", "downlink_codec": "int4", "error_feedback": 1.0}
FROM, ALL = 70, 150  # gamma may take part, and has to
# Whose commit comes after the acceptance dies before and after it; a silo dies where the new terms begin.
DEATHS: Faults = {
    "aggregator": [("before_commit", FROM - 2), ("after_commit", FROM)],
    "alpha": [("after_manifest", FROM)],
}


def atoll(*arguments: object) -> str:
    said = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert said.exit_code == 0, (said.output, said.exception)
    return said.stdout


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seal", [False, True])
def test_it_joins_and_has_its_part(seal: bool, tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    config = tiny_config(
        tmp_path / "there",
        inner={"num_steps": 400},
        outer=OUTER,
        membership=RULES,
        silo={"eval_interval_rounds": 0},
        trust={"directory": str(tmp_path / "keys"), "seal": seal},
    )
    store, here, others = config.store_url, tmp_path / "here", Path(config.directory) / "config.yaml"
    (here / "keys").mkdir(mode=0o700, parents=True)
    settings = tiny_settings(here, tiny_text)
    own = {key: settings[key] for key in ("directory", "tokenizer", "silo", "wandb", "exchange")}
    own = merged(own, {"silos": {"gamma": tiny_silo(tiny_text, "gamma")}, "trust": {"directory": str(here / "keys")}})
    (here / "silo.yaml").write_text(yaml.safe_dump(own))

    def join_it() -> str:
        command = [sys.executable, "-m", "launch.cli", "launch", "join", store, "-c", str(here / "silo.yaml")]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
        return said.stdout

    def join() -> str:
        wait_for((Path(store) / "global" / "000001" / "commit.json").exists, seconds=120)
        line = atoll("keys", "new", "gamma", "--directory", here / "keys").splitlines()[0]
        change = f"trust.keys.gamma={line}"
        atoll("contract", "amend", store, "-c", others, "--silo", "alpha", "--from", FROM, change)
        said = atoll("contract", "sign", store, "-c", here / "silo.yaml", "--silo", "gamma", "--amendment", 1)
        assert said.endswith("signed      amendment 1, as gamma; the signature of beta is missing\n")
        with ThreadPoolExecutor(1) as pool:
            joining = pool.submit(join_it)
            atoll("contract", "sign", store, "-c", others, "--silo", "beta", "--amendment", 1)
            wait_for((Path(store) / "amendments" / "000001.accepted").exists, seconds=120)
            atoll("contract", "amend", store, "-c", others, "--silo", "alpha", "--from", ALL, "membership.quorum=3")
            for silo, path in (("beta", others), ("gamma", here / "silo.yaml")):
                atoll("contract", "sign", store, "-c", path, "--silo", silo, "--amendment", 2)
            return joining.result()

    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(join)
        run = federate_with(DEATHS, config, tmp_path / "fired", max_restarts=20)
        said = joining.result(PATIENCE_SECONDS)
    (enters,) = re.findall(r"gamma takes over version (\d+), or the newest by then", said)
    assert int(enters) >= FROM - 1
    last = config.schedule.num_versions
    parts = [v for v in range(1, last + 1) if "gamma" in {c.silo for c in run.commit(v).contributors}]
    assert parts[0] >= FROM
    assert {*range(ALL, last + 1)} <= {*parts}
    members = run.exchange.members
    assert (members.enters_at("gamma"), members.later[0].number) == (FROM, 1)
    assert final_digest(config, "alpha") == run.commit(last).parameters_digest
    key = config.key_file(OPERATOR) if seal else None
    found = StoreVerifier(StoreExchange(store), tmp_path / "scratch", tell=lambda line: None, key=key).verify()
    assert (found.findings, found.num_amendments) == ([], 2)
