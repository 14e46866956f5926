"""An institution joins with a URL and a short configuration, by the real command, and trains to the end."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.distributed.guests import Guest, final_digest, started
from tests.support import TinyText, tiny_settings, tiny_silo
from tests.waiting import wait_for


@contextmanager
def all_but_beta(config: RunConfig) -> Iterator[None]:
    """Aggregator and alpha, which begin, wait for the block to have beta train, and then end well."""
    with started(Guest(config, "aggregator"), Guest(config, "alpha"), seconds=120):
        wait_for((Path(config.store_url) / "global" / "000000" / "commit.json").exists, seconds=120)
        yield


def join(
    directory: Path, text: TinyText, url: str, *options: str | Path, environment: Mapping[str, str] | None = None
) -> tuple[RunConfig, str]:
    """Join as beta by the real command; returns the configuration that it has made, and what it said."""
    settings = tiny_settings(directory, text)
    own = {key: settings[key] for key in ("directory", "tokenizer", "exchange", "silo", "wandb")}
    silo = directory / "silo.yaml"
    directory.mkdir()
    silo.write_text(yaml.safe_dump(own | {"silos": {"beta": tiny_silo(text, "beta")}}))
    command = [sys.executable, "-m", "launch.cli", "launch", "join", url, "--config", str(silo), *map(str, options)]
    done = subprocess.run(
        command, env=os.environ | (environment or {}), capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return load_config([Path(settings["directory"]) / "config.yaml"]), done.stdout


def check_joined(config: RunConfig, here: RunConfig, usual: Outcome) -> None:
    """Every version has the bits of a federation whose silos were all configured by hand, and which has keys."""
    run, last = Outcome(config=config), config.schedule.num_versions
    for version in range(last + 1):
        ours, theirs = run.commit(version), usual.commit(version)
        assert (ours.payloads, ours.parameters_digest) == (theirs.payloads, theirs.parameters_digest)
        assert (ours.outer_digest, ours.divisor, ours.metrics) == (theirs.outer_digest, theirs.divisor, theirs.metrics)
        assert [one.silo for one in ours.contributors] == [one.silo for one in theirs.contributors]
    assert final_digest(here, "beta") == final_digest(config, "alpha") == run.commit(last).parameters_digest


@pytest.mark.soak
def test_a_silo_that_joins_comes_to_the_bits_of_one_that_was_configured(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText
) -> None:
    usual = federate(tiny_config(tmp_path / "usual"))
    config = tiny_config(tmp_path / "there", exchange={"url": str(tmp_path / "store")})
    with all_but_beta(config):
        here, said = join(tmp_path / "here", tiny_text, config.store_url)
    assert "\nenters     beta begins with version 0\n" in said
    check_joined(config, here, usual)
