"""`atoll launch join` on a real SLURM: the silo is a job, the rest of the federation is elsewhere."""

import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import TinyConfig
from tests.distributed.federation import federate
from tests.distributed.test_join import all_but_beta, check_joined, join
from tests.slurm.cluster import Cluster, missing
from tests.support import TinyText

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.mark.soak
def test_a_cluster_joins(slurm: Cluster, tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    usual = federate(tiny_config(tmp_path / "usual"))
    config = tiny_config(tmp_path / "there", exchange={"url": str(tmp_path / "store")})
    site = tmp_path / "site.yaml"
    job = {"environment": {"PYTHONPATH": str(Path.cwd()), **slurm.environment}, "time_limit": "10"}
    site.write_text(yaml.safe_dump({"job": job}))
    with all_but_beta(config):
        here, said = join(tmp_path / "here", tiny_text, config.store_url, "--site", site, environment=slurm.environment)
        (job_id,) = re.findall(r"^beta: (\d+)$", said, re.MULTILINE)
        slurm.wait([job_id], seconds=120)
    assert "GPUs       none that the site's jobs have on a node: it computes on the CPU" in said
    check_joined(config, here, usual)
