"""A real SLURM on this machine, without systemd: munged, slurmctld, and one slurmd a node.

Four nodes n1 to n4 of two cores run jobs; g1, which says that it has GPUs, is there to be asked for.
"""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support import free_port
from tests.waiting import PATIENCE_SECONDS, wait_for

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
NUM_NODES = 4
NODES = [*(f"n{number + 1}" for number in range(NUM_NODES)), "g1"]
FAILED = {"FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=10
KillWait=30
RebootProgram=/bin/false
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 State=UNKNOWN
NodeName=g1 NodeHostname={host} NodeAddr=127.0.0.1 Port={gpu_port} CPUs=64 RealMemory=512000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n[1-{nodes}] MaxTime=10 State=UP
PartitionName=cpu Nodes=g1 State=UP
PartitionName=gpu Nodes=g1 State=UP
"""


@dataclass(kw_only=True)
class Cluster:
    """A running cluster; `environment` has what its commands need."""

    directory: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """`munged`, `slurmctld`, and the nodes' names."""
    hurried: set[tuple[str, int]] = field(default_factory=set)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Run one of SLURM's commands; returns what it prints."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def try_run(self, *command: str) -> None:
        """Run one of SLURM's commands, which may come too late."""
        subprocess.run(command, env=os.environ | self.environment, capture_output=True, check=False)

    def num_restarts(self, job: str) -> int:
        """How often a job was put back into the queue."""
        return int(re.findall(r" Restarts=(\d+) ", self.run("scontrol", "show", "job", job, "--oneliner"))[0])

    def hurry(self, job: str) -> None:
        """SLURM holds back for two minutes what was requeued; five seconds are enough for it to clear up."""
        start = (job, self.num_restarts(job))
        if self.state(job) == "PENDING" and start not in self.hurried:
            self.hurried.add(start)
            self.try_run("scontrol", "update", f"JobId={job}", "StartTime=now+5")

    def start(self, name: str, *command: str) -> None:
        """Start a daemon, which ends at the latest when we do."""
        with (self.directory / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_node(self, name: str, *prefix: str) -> None:
        self.start(name, *prefix, "slurmd", "-D", "-f", str(self.directory / "slurm.conf"), "-N", name)

    def stop_node(self, name: str) -> None:
        self.daemons[name].terminate()
        self.daemons[name].wait(PATIENCE_SECONDS)

    def fail_node(self, name: str) -> None:
        """End a node and all that runs on it at once, as a loss of power does."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ()
                if variables.get("SLURMD_NODENAME") == name and self.environment.items() <= variables.items():
                    for ours in (process.parent(), process):  # the first task's parent is slurmstepd
                        if ours and ours.pid > 1:
                            ours.kill()

    def has_state(self, node: str, state: str) -> bool:
        """Whether a node is idle, down ..."""
        return self.run("sinfo", "--noheader", "--nodes", node, "--format=%T").split()[0].rstrip("*") == state

    def state(self, job: str) -> str:
        """A job's state, as PENDING or RUNNING; "" once the cluster has forgotten it."""
        command = ["squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T"]
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def wait(self, jobs: list[str], *, seconds: float) -> None:
        """Wait until all jobs are done."""

        def states() -> dict[str, str]:
            return {job: self.state(job) for job in jobs}

        def are_done() -> bool:
            found = states()
            if set(found.values()) == {"COMPLETED"}:
                return True
            assert not FAILED & set(found.values()), f"{found}"
            for job in jobs:
                if self.num_restarts(job):
                    self.hurry(job)
            return False

        wait_for(are_done, seconds=seconds, poll_seconds=0.5, tells=lambda: f"{states()}: {self.run('squeue')}")


def missing() -> str:
    """Why no cluster can be started here; "" if it can."""
    found = [program for program in PROGRAMS if not shutil.which(program)]
    if found:
        return f"{', '.join(found)} not installed (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "only root can start a SLURM here"


@contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """Start a cluster below `directory`; all its daemons and what they started end with the block."""
    found = Cluster(directory=directory)
    host, first = socket.gethostname().split(".")[0], free_port()
    values = {"host": host, "port": free_port(), "directory": directory, "nodes": NUM_NODES}
    text = CONFIGURATION.format(**values, first=first, last=first + NUM_NODES - 1, gpu_port=first + NUM_NODES)
    (directory / "slurm.conf").write_text(text)
    devices = ("null", "zero", "full", "random")  # any that are there
    (directory / "gres.conf").write_text("".join(f"NodeName=g1 Name=gpu File=/dev/{name}\n" for name in devices))
    (directory / "state").mkdir()
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log"}
    files |= {"seed-file": "munge.seed"}
    with ExitStack() as ending:
        ending.callback(_end, found)
        options = [f"--{name}={directory / file}" for name, file in files.items()]
        found.start("munged", "munged", "--foreground", "--force", *options)
        wait_for((directory / "munge.socket").exists)
        found.start("slurmctld", "slurmctld", "-D", "-f", str(directory / "slurm.conf"))
        for name in NODES:
            found.start_node(name)
        wait_for(lambda: _is_idle(found), poll_seconds=0.1)
        yield found


def _is_idle(cluster: Cluster) -> bool:
    with suppress(AssertionError):  # the controller does not answer yet
        return set(cluster.run("sinfo", "--noheader", "--format=%T").split()) == {"idle"}
    return False


def _end(cluster: Cluster) -> None:
    cluster.try_run("scancel", "--signal=KILL", "--full", "--user=root")
    for name in sorted(cluster.daemons, key=lambda name: name in ("munged", "slurmctld")):
        cluster.daemons[name].terminate()
        try:
            cluster.daemons[name].wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            cluster.daemons[name].kill()
            cluster.daemons[name].wait()
