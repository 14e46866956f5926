"""A silo over two nodes with addresses of their own, by the commands of `atoll launch torchrun` or started by ssh."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.links import inside, namespaces
from launch.show import logs
from launch.show.metrics import MetricsReader, read_status
from launch.start.local import process_directory
from launch.start.processes import MARK, ChildCommand, Children
from launch.start.remote import check_node, versions
from launch.start.ssh import check_hosts, far_command, ssh_program
from launch.start.torchrun import node_commands
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config, save_config
from pretrain.federation.preflight import check_collective, check_port, check_run
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.distributed.guests import Guest, started
from tests.distributed.sshd import MISSING, make_keys, ssh_to, sshd
from tests.faults.test_kills import check_same
from tests.slurm.test_slurm import make_config
from tests.support import free_port, one_line_error
from tests.unit.launch.start.test_launch import PATIENT, is_alive, pids_of
from tests.waiting import PATIENCE_SECONDS, wait_for

NEEDED = [tool for tool in ("ip", "tc", "sysctl", "unshare") if not shutil.which(tool)]
AS_ROOT = pytest.mark.skipif(bool(NEEDED) or os.geteuid() != 0, reason=f"namespaces need root, and {NEEDED}")
WITH_SSH = pytest.mark.skipif(bool(MISSING), reason=MISSING)
NODES = ["127.0.0.1", "127.0.0.2"]


def command(config: RunConfig, *options: str) -> list[str]:
    """`atoll launch torchrun` for silo alpha."""
    path = Path(config.directory).parent / "tiny.yaml"
    words = [sys.executable, "-m", "launch.cli", "launch", "torchrun", "--config", str(path), "--silo", "alpha"]
    return [*words, *options]


def others(config: RunConfig) -> AbstractContextManager[None]:
    """Aggregator and silo beta; they must have finished when the block ends."""
    return started(Guest(config, "aggregator"), Guest(config, "beta"), seconds=60)


@pytest.mark.soak
@AS_ROOT
def test_a_silo_over_two_nodes(tmp_path: Path, tiny_config: TinyConfig) -> None:
    local = federate(make_config(tiny_config, tmp_path / "local", num_nodes=1))
    config = make_config(tiny_config, tmp_path / "nodes", num_nodes=2)
    hosts = {"node0": "10.77.0.2", "node1": "10.77.1.2"}
    options = [f"--host={address}" for address in hosts.values()]
    said = subprocess.check_output(command(config, "--interface", "silo", *options), text=True)
    lines = said.splitlines()
    assert lines[::2] == [f"# {address}" for address in hosts.values()]
    with namespaces(list(hosts), "1gbit") as (_, spaces), others(config), ExitStack() as ending:
        nodes = []
        for line, (name, space) in zip(lines[1::2], spaces.items(), strict=True):
            with (tmp_path / f"{name}.log").open("wb") as log:
                nodes.append(subprocess.Popen(inside(space, ["sh", "-c", f"exec env {line}"]), stdout=log, stderr=log))
            ending.callback(nodes[-1].kill)
        for node in nodes:
            assert node.wait(PATIENCE_SECONDS) == 0, "".join(log.read_text() for log in tmp_path.glob("node*.log"))
    check_same(Outcome(config=config), local)


@pytest.mark.soak
@pytest.mark.timeout(600)
@AS_ROOT
@WITH_SSH
def test_a_silo_over_two_nodes_started_by_ssh(tmp_path: Path, tiny_config: TinyConfig) -> None:
    local = federate(make_config(tiny_config, tmp_path / "local", num_nodes=1))
    config = make_config(tiny_config, tmp_path / "nodes", num_nodes=2)
    hosts, keys, port = {"node0": "10.77.0.2", "node1": "10.77.1.2"}, make_keys(tmp_path / "keys"), free_port()
    options = [f"--host={address}" for address in hosts.values()]
    with namespaces(list(hosts), "1gbit") as (hub, spaces), ExitStack() as ending:
        for name, address in hosts.items():
            ending.enter_context(sshd(keys, address, port, prefix=inside(spaces[name], [])))
        with others(config):
            argv = command(config, "--interface", "silo", "--ssh", ssh_to(keys, port), *options)
            done = subprocess.run(inside(hub, argv), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished: 12 steps in silo alpha" in done.stdout
    latest = Path(config.directory) / "logs" / "latest"
    assert sorted(path.name for path in latest.iterdir()) == [f"alpha-{address}.log" for address in hosts.values()]
    check_same(Outcome(config=config), local)


LONG: dict[str, Any] = {
    "inner": {"num_steps": 300},
    "outer": {"optimizer": "nesterov", "sync_interval_steps": 20},
    "silo": {"checkpoint_interval_steps": 7},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Outcome:
    """A run of `LONG` that nothing happens to."""
    return federate(make_config(tiny_config, tmp_path_factory.mktemp("undisturbed"), num_nodes=1, **LONG))


@contextmanager
def two_nodes(tmp_path: Path) -> Iterator[list[str]]:
    """Two addresses of this machine that ssh reaches; yields the options."""
    keys, port = make_keys(tmp_path / "keys"), free_port()
    with ExitStack() as ending:
        for address in NODES:
            ending.enter_context(sshd(keys, address, port))
        yield [f"--port={free_port()}", f"--ssh={ssh_to(keys, port)}", *(f"--host={address}" for address in NODES)]


@contextmanager
def launched(config: RunConfig, options: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The launcher, as it trains, some steps after where it began."""
    argv = command(config, *options)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        try:
            wait_for_steps(config, launcher)
            yield launcher
        finally:
            launcher.kill()


def wait_for_steps(config: RunConfig, launcher: subprocess.Popen[str]) -> None:
    """Until the silo has made twenty steps more."""
    metrics = MetricsReader(Path(config.directory) / "metrics.jsonl")
    metrics.read_new()
    steps = 0

    def is_training() -> bool:
        nonlocal steps
        assert launcher.poll() is None, launcher.communicate()[0]
        steps += sum(record["kind"] == "step" and record["silo"] == "alpha" for record in metrics.read_new())
        return steps > 20

    wait_for(is_training, seconds=120)


def of_alpha(config: RunConfig) -> list[psutil.Process]:
    """All that runs of the silo: by the run directory in the command line, or by what a torchrun's children inherit."""
    found = []
    for process in psutil.process_iter():
        try:
            words, mark = process.cmdline(), process.environ().get(MARK, "")
        except psutil.Error:
            continue
        is_ours = any(config.directory in word for word in words) and "alpha" in " ".join(words)
        if (is_ours or mark.startswith("alpha-127.0.0.")) and process.pid != os.getpid():
            found.append(process)
    return found


def worker(config: RunConfig, rank: int) -> psutil.Process:
    """The process that trains as a rank."""
    [found] = [process for process in of_alpha(config) if process.environ().get("RANK") == str(rank)]
    return found


@pytest.mark.soak
@pytest.mark.timeout(600)
@WITH_SSH
def test_stopped_killed_or_without_a_node_it_leaves_nothing_and_goes_on_to_the_same_bits(
    undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = make_config(tiny_config, tmp_path, num_nodes=2, **LONG)
    status = process_directory(config, "alpha") / "status.json"
    checkpoints = process_directory(config, "alpha") / "checkpoints"
    log = Path(config.directory) / "logs" / "latest" / "alpha-127.0.0.1.log"
    with two_nodes(tmp_path) as options, others(config):
        for number in (signal.SIGTERM, signal.SIGKILL):
            with launched(config, options) as launcher:
                assert len(of_alpha(config)) >= 2 * 3  # of each node the far end, torchrun, and a worker
                launcher.send_signal(number)
                said, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
                if number == signal.SIGTERM:
                    assert launcher.returncode == 128 + number
                    assert "the same command goes on" in said
                    assert not of_alpha(config)
                else:
                    wait_for(lambda: not of_alpha(config), seconds=60)
            assert read_status(status).phase == "stopped"
            newest = max(int(path.name[5:]) for path in checkpoints.glob("step-*"))
            assert f"stopped after step {newest}: on request" in log.read_text()
        with launched(config, options) as launcher:
            lost = [p for p in of_alpha(config) if p.environ().get(MARK, "").startswith("alpha-127.0.0.2-")]
            for process in lost:
                if process.name() != "ssh":
                    process.kill()  # torchrun and its worker
            said, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
            assert launcher.returncode == 1
            assert "error: alpha-127.0.0.2 failed with exit status 137" in said
            assert not of_alpha(config)
        done = subprocess.run(command(config, *options), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert not of_alpha(config)
    check_same(Outcome(config=config), undisturbed)


@pytest.mark.soak
@pytest.mark.timeout(600)
@WITH_SSH
def test_a_killed_worker_is_started_again(undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = make_config(tiny_config, tmp_path, num_nodes=2, **LONG)
    with two_nodes(tmp_path) as options, others(config), launched(config, options) as launcher:
        for rank in (1, 0):
            worker(config, rank).kill()
            wait_for_steps(config, launcher)
        said, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
        assert launcher.returncode == 0, said
    for address in NODES:
        log = Path(config.directory) / "logs" / "latest" / f"alpha-{address}.log"
        assert log.read_text().count("failed (exitcode: -9) local_rank: 0") == 1
    check_same(Outcome(config=config), undisturbed)


def test_mistakes_are_one_line(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = make_config(tiny_config, tmp_path, num_nodes=2)

    def said(silo: str, hosts: list[str], port: int = 29_400) -> str:
        return one_line_error(node_commands, config, silo, hosts, port=port, interface=None, max_restarts=0)

    assert said("gamma", ["a", "b"]) == "--silo: 'gamma' given; allowed: alpha, beta"
    two = "allowed: 2 different ones, as silos.alpha.num_nodes says"
    assert said("alpha", ["a"]) == f"--host: a given; {two}"
    assert said("alpha", ["a", "a"]) == f"--host: a, a given; {two}"
    for host in ("-oProxyCommand=id", "b\nid", "b;id", ""):
        assert said("alpha", ["a", host]) == f"--host: {host!r} given; allowed: names or addresses"
    assert said("alpha", ["a", "b"], port=80) == "--port: 80 given; allowed: 1024 to 65535"
    config.silos["alpha"].min_nodes = 1
    assert said("alpha", ["a"]).startswith("silos.alpha.min_nodes: 1 given; allowed: 0 with --host")
    assert not Path(config.directory).exists()


def test_mistakes_of_a_node_are_one_line(tmp_path: Path, tiny_config: TinyConfig) -> None:
    path, there = write_settings_of(make_config(tiny_config, tmp_path, num_nodes=2)), tmp_path / "probe"
    there.touch()

    def said(address: str = "127.0.0.2", **changed: Any) -> str:
        options = {"probe": there, "port": None, "interface": "lo"} | changed
        return one_line_error(check_node, options.pop("path", path), "alpha", address=address, **options)

    check_node(path, "alpha", address="127.0.0.2", probe=there, port=free_port(), interface="lo")
    shared = "it is not the same there; allowed: on a file system that all nodes share"
    assert said(probe=tmp_path / "none") == f"directory: '{tmp_path}' given; {shared}"
    for address in ("192.0.2.7", "nowhere.invalid"):
        assert said(address) == f"--host: '{address}' given; allowed: one of that machine's own addresses"
    assert said(interface="lo,eth7").startswith("--interface: 'eth7' given; allowed: lo")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert said(port=port) == f"--port: {port} given; it is taken; allowed: a free one"
    lost = load_config([path], ["silos.alpha.data=[/nowhere]"])
    assert "/nowhere" in said(path=write_settings_of(lost))


def write_settings_of(config: RunConfig) -> Path:
    path = Path(config.directory).with_suffix(".yaml")
    save_config(config, path)
    return path


@WITH_SSH
def test_hosts_that_cannot_be_reached_are_one_line(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config, keys, port = make_config(tiny_config, tmp_path, num_nodes=2), make_keys(tmp_path / "keys"), free_port()
    options = [f"--port={free_port()}", *(f"--host={address}" for address in NODES)]

    def said(ssh: str) -> str:
        argv = command(config, f"--ssh={ssh}", *options)
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        left = {path.name for path in Path(config.directory).iterdir()} if Path(config.directory).exists() else set()
        assert left <= {"config.yaml", "lock"}, "nothing started, and no probe is left"
        return done.stderr.removeprefix("atoll: ").strip()

    allowed = "allowed: hosts that ssh reaches without being asked for anything"
    with sshd(keys, NODES[0], port):
        refused = f"ssh: connect to host 127.0.0.2 port {port}: Connection refused"
        assert said(ssh_to(keys, port)) == f"host 127.0.0.2: {refused}; {allowed}"
        strange = make_keys(tmp_path / "strange")
        denied = said(ssh_to(strange, port))
        assert "127.0.0.1: Permission denied (publickey" in denied
        assert denied.endswith(allowed)
    assert said("no-such-ssh -v") == "--ssh: 'no-such-ssh' given; No such file or directory; allowed: a command line"
    assert said("ssh '") == '--ssh: "ssh \'" given; No closing quotation; allowed: a command line'
    assert said("") == "--ssh: '' given; allowed: a command line"


def mounted_over(source: str, target: Path | str) -> list[str]:
    """A prefix for a daemon that finds something else at a place; all others find there what they did."""
    script = f'mount {source} "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(target)]


@AS_ROOT
@WITH_SSH
@pytest.mark.parametrize("case", ["interpreter", "directory", "code"])
def test_a_host_with_other_files_is_one_line(tmp_path: Path, tiny_config: TinyConfig, case: str) -> None:
    config, keys, port = make_config(tiny_config, tmp_path, num_nodes=2), make_keys(tmp_path / "keys"), free_port()
    directory = Path(config.directory)
    save_config(config, directory / "config.yaml")
    changed = tmp_path / "logs.py"
    changed.write_text(Path(logs.__file__).read_text() + "# newer\n")
    there, expected = {
        "interpreter": (
            mounted_over("--bind /dev/null", sys.executable),
            f"Permission denied; allowed: hosts with the same {sys.executable} and working directory {os.getcwd()}",
        ),
        "directory": (
            mounted_over("-t tmpfs tmpfs", directory),
            f"directory: '{directory}' given; it is not the same there; allowed: on a file system that all nodes share",
        ),
        "code": (
            mounted_over(f"--bind {changed}", logs.__file__),
            "allowed: the same on all",
        ),
    }[case]
    with sshd(keys, NODES[0], port), sshd(keys, NODES[1], port, prefix=there):
        said = asked(config, ssh_to(keys, port))
    if case == "code":
        ours = versions()["atoll's code"]
        assert said.startswith(f"atoll's code differs: {ours} on host 127.0.0.1, ")
    else:
        assert said.startswith("host 127.0.0.2: ")
    assert said.endswith(expected)


def asked(config: RunConfig, ssh: str) -> str:
    """What is said to the user of the hosts."""
    program = ssh_program(ssh)
    return one_line_error(check_hosts, config, "alpha", NODES, program, port=free_port(), interface=None)


@WITH_SSH
def test_hosts_that_differ_are_one_line(tmp_path: Path, tiny_config: TinyConfig) -> None:
    two = {"num_nodes": 2, "processes_per_node": 2, "micro_batch_sequences": 1}
    config, keys, port = tiny_config(tmp_path, silos={"alpha": two}), make_keys(tmp_path / "keys"), free_port()
    save_config(config, Path(config.directory) / "config.yaml")
    metadata = tmp_path / "torch-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")

    def gpus(number: int) -> dict[str, str]:
        folder = tmp_path / f"gpus-{number}"
        folder.mkdir(exist_ok=True)
        lines = "".join(f"echo 'GPU {index}: NVIDIA H100 80GB HBM3 (UUID: GPU-{index})'\n" for index in range(number))
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
        (folder / "nvidia-smi").chmod(0o755)
        return {"PATH": f"{folder}:{os.environ['PATH']}"}

    with sshd(keys, NODES[0], port, environment=gpus(2)):
        with sshd(keys, NODES[1], port, environment={"PYTHONPATH": str(tmp_path)}):
            ours = versions()["torch"]
            differ = f"torch differs: {ours} on host 127.0.0.1, 9.9 on host 127.0.0.2; allowed: the same on all"
            assert asked(config, ssh_to(keys, port)) == differ
        with sshd(keys, NODES[1], port, environment=gpus(1)):
            fewer = "silos.alpha.processes_per_node: 2 given; allowed: up to 1, the GPUs of host 127.0.0.2"
            assert asked(config, ssh_to(keys, port)) == fewer
        with sshd(keys, NODES[1], port, environment=gpus(2)):
            check_hosts(config, "alpha", NODES, ssh_program(ssh_to(keys, port)), port=free_port(), interface="lo")


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, tiny_config: TinyConfig) -> None:
    taken = "is taken on this machine; allowed: a free one"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = make_config(tiny_config, tmp_path, num_nodes=1, exchange=collective_at(port))
        url = config.exchange.url
        assert one_line_error(check_run, config) == f"exchange.url: {url!r} given; port {port} {taken}"
        check_collective(config, "beta")  # alpha serves it
        options = [f"--host={address}" for address in NODES]
        argv = command(make_config(tiny_config, tmp_path, num_nodes=2), f"--port={port}", *options)
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"atoll: --port: {port} given; port {port} {taken}\n"
        check_port("192.0.2.7", port, key="--port", given=port)  # of a machine that is not this one
        client = socket.create_connection(("127.0.0.1", port))
        served, _ = server.accept()
        served.close()  # the first to close is the one that lingers
        client.close()
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))
    check_run(config)


def collective_at(port: int) -> dict[str, Any]:
    return {"kind": "collective", "url": f"tcp://127.0.0.1:{port}"}


@WITH_SSH
@pytest.mark.parametrize("way", ["stopped", "ssh killed"])
def test_what_runs_by_ssh_saves_when_its_connection_ends(tmp_path: Path, way: str) -> None:
    keys, port = make_keys(tmp_path / "keys"), free_port()
    program = [sys.executable, "-c", PATIENT, "law", str(tmp_path)]
    far = ["run", "--name", "law", "--log", str(tmp_path / "law.log"), "--grace-seconds", "5", "--", *program]
    with sshd(keys, NODES[0], port), Children(grace_seconds=10) as children:
        argv = far_command(ssh_program(ssh_to(keys, port)), NODES[0], far, {})
        child = children.start(ChildCommand(name="law", argv=argv, stops_at_end_of_input=True), tmp_path / "ssh.log")
        pids = pids_of(tmp_path, "law")
        if way == "stopped":
            children.stop()
            assert child.returncode == 1, "as the program's"
        else:
            child.process.kill()
            wait_for(lambda: not any(is_alive(pid) for pid in pids), seconds=15)
    assert (tmp_path / "law.saved").exists()
    assert not any(is_alive(pid) for pid in pids)


def test_the_far_end_ends_as_its_program_does(tmp_path: Path) -> None:
    def ended(script: str) -> int:
        far = ["run", "--name", "law", "--log", str(tmp_path / "law.log"), "--grace-seconds", "5", "--"]
        argv = [sys.executable, "-m", "launch.start.remote", *far, sys.executable, "-c", script]
        with subprocess.Popen(argv, stdin=subprocess.PIPE) as process:
            return process.wait(PATIENCE_SECONDS)

    assert ended("print('here'); raise SystemExit(7)") == 7
    assert ended("import os; os.kill(os.getpid(), 9)") == 128 + 9
    assert (tmp_path / "law.log").read_text() == "here\n"
