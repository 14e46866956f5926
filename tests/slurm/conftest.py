"""One cluster for all tests of this folder; none leaves a job to the next."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, cluster
from tests.unit.conftest import s3_url  # noqa: F401 - a fixture
from tests.waiting import wait_for


@pytest.fixture(scope="session")
def whole_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture
def slurm(whole_cluster: Cluster) -> Iterator[Cluster]:
    yield whole_cluster
    whole_cluster.try_run("scancel", "--user=root")
    wait_for(lambda: not whole_cluster.run("squeue", "--noheader"), seconds=60)
