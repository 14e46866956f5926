"""docs/clusters.md, typed as it stands: two SLURMs that share nothing but an S3 store."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.config.load import load_config
from tests.slurm.cluster import Cluster, cluster, missing
from tests.support import write_corpus

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.soak, pytest.mark.timeout(600)]
PAGE = Path("docs/clusters.md").read_text().split("## Reference")[0]


def blocks(kind: str) -> list[str]:
    """The page's blocks of a kind, in their order."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A cluster, and the directory in which its user types."""

    cluster: Cluster
    directory: Path

    def type(self, lines: str) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | self.cluster.environment | {"PATH": path, "COLUMNS": "200"}
        command = ["bash", "-euc", lines]
        done = subprocess.run(command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{lines}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self, said: str) -> list[str]:
        return re.findall(r"^(?:job +)?[a-z]+: (\d+)$", said, re.MULTILINE)


def test_from_nothing_to_a_federation_of_two_clusters(tmp_path: Path, s3_url: str) -> None:
    import s3fs

    s3fs.S3FileSystem().mkdir("consortium")
    with ExitStack() as ending:
        sites = []
        for name in ("court", "hospital"):
            (tmp_path / name).mkdir()
            found = ending.enter_context(cluster(tmp_path / name))
            sites.append(Site(cluster=found, directory=tmp_path / name))
            write_corpus(tmp_path / name / "text" / name, "alpha" if name == "court" else "beta", num_characters=60_000)
            for block in blocks("yaml"):
                (tmp_path / name / block.split()[1]).write_text(block)
        first, second = sites
        _, count, count_other, tokenizer, prepare, prepare_other, launch, join, watch = blocks("sh")
        first.type(count)
        second.type(count_other)
        shutil.copy(second.directory / "hospital.counts.tsv", first.directory)
        first.type(tokenizer)
        shutil.copytree(first.directory / "tokenizer", second.directory / "tokenizer")
        first.type(prepare)
        second.type(prepare_other)
        (second.directory / "federation.yaml").unlink()
        said = first.type(launch)
        assert "utilisation" in said
        assert re.search(r"court: sbatch: Job \d+ to start at ", said)
        ours = first.jobs(said)
        assert len(ours) == 2
        first.type("while [ ! -e runs/two-clusters/aggregator/newest.json ]; do sleep 1; done")
        theirs = second.jobs(second.type(join))
        assert len(theirs) == 1
        first.cluster.wait(ours, seconds=240)
        second.cluster.wait(theirs, seconds=60)
        said = first.type(watch)
        assert "version 6 of 6" in said
        assert "nothing runs" in said
        assert "court      | " in said
    config = load_config([first.directory / "runs" / "two-clusters" / "config.yaml"])
    assert config.full_roster == ["court", "hospital"]
    assert (first.directory / "model" / "model.safetensors").is_file()
