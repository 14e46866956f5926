"""`atoll launch torchrun --ssh`: a silo's nodes looked at, started and watched from one place, over ssh.

One ssh a node asks whether it is ready, all at the same time; one a node runs its torchrun. Nothing outlives its
connection: see `launch/start/remote.py`.
"""

import dataclasses
import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.start.local import Attempt, hold_directory, new_attempt, process_directory
from launch.start.processes import ChildCommand
from launch.start.torchrun import NodeCommand, check_options, config_path, node_command
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config

# Nobody is there to be asked for a password; what the user's own options and configuration say comes first. A shared
# connection that is left open in the background would keep our pipe open with it.
OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=4", "ControlMaster=no")
CHECK_SECONDS = 120.0
FAILED = 255  # ssh's own exit code, when it was not the far end that failed
MARGIN_SECONDS = 5


def launch_by_ssh(
    config: RunConfig,
    silo: str,
    hosts: list[str],
    *,
    ssh: str,
    port: int,
    interface: str | None,
    max_restarts: int,
    save_seconds: int,
    dry_run: bool = False,
    console: Console | None = None,
) -> int:
    """Run a silo's torchrun on each of its nodes until all have finished, one has failed, or a signal came.

    `ssh` is the program and its options; a stop waits `save_seconds` for the checkpoint. With `dry_run` the hosts are
    asked whether they are ready, and that is all. The rest is as for `node_commands`. Returns the exit status, as
    `launch_local` does. Raises ConfigError before anything is started. Call it from the main thread.
    """
    check_options(config, silo, hosts, port)
    directory, program = Path(config.directory).absolute(), ssh_program(ssh)
    with hold_directory(directory) as lock_file:
        save_config(config, config_path(config))
        check_hosts(config, silo, hosts, program, port=port, interface=interface)
        if dry_run:
            print(f"{len(hosts)} hosts are ready for {silo}\ndry run: nothing was started")
            return 0
        logs, commands = new_attempt(directory), []
        for number in range(len(hosts)):
            node = node_command(
                *(config, silo, hosts, number),
                port=port,
                interface=interface,
                max_restarts=max_restarts,
                identity=logs.name,
            )
            commands.append(_run_command(config, silo, node, program, logs=logs, save_seconds=save_seconds))
        attempt = Attempt(
            config=dataclasses.replace(config, silos={silo: config.silos[silo]}, roster=config.agreed_roster),
            log_directory=logs,
            max_restarts=0,  # torchrun has its own
            console=console or Console(),
            grace_seconds=save_seconds + 2 * MARGIN_SECONDS,
            on_second_signal="leaves them to it",
        )
        attempt.run(commands, inherited_files=(lock_file,))
    return attempt.report(write=False)  # the aggregator and the other silos are elsewhere


def ssh_program(ssh: str) -> list[str]:
    """From a command line. Raises ConfigError."""
    try:
        argv = shlex.split(ssh)
    except ValueError as error:
        raise ConfigError(f"--ssh: {ssh!r} given; {error}; allowed: a command line") from None
    if not argv:
        raise ConfigError(f"--ssh: {ssh!r} given; allowed: a command line")
    return [*argv, "-T", *(word for option in OPTIONS for word in ("-o", option))]


def far_command(program: list[str], host: str, arguments: list[str], environment: dict[str, str]) -> list[str]:
    """The ssh that has a host run `launch.start.remote` in our working directory, with our interpreter."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    far = shlex.join(["env", *variables, sys.executable, "-m", "launch.start.remote", *arguments])
    return [*program, host, f"cd {shlex.quote(os.getcwd())} && exec {far}"]


def _run_command(
    config: RunConfig, silo: str, node: NodeCommand, program: list[str], *, logs: Path, save_seconds: int
) -> ChildCommand:
    # torchrun waits for its workers, the far end a little longer for torchrun, and we for the far end.
    name, grace = f"{silo}-{node.host}", str(save_seconds + MARGIN_SECONDS)
    far = ["run", "--name", name, "--log", str(logs / f"{name}.log"), "--grace-seconds", grace, "--", *node.argv]
    environment = node.environment | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(save_seconds)}
    return ChildCommand(
        name=name,
        argv=far_command(program, node.host, far, environment),
        error_path=process_directory(config, silo) / "error.txt",
        process=silo,
        stops_at_end_of_input=True,
    )


def check_hosts(
    config: RunConfig, silo: str, hosts: list[str], program: list[str], *, port: int, interface: str | None
) -> None:
    """Ask all hosts at the same time whether the silo can run there. Raises ConfigError for the first that says no."""
    asked: dict[str, subprocess.Popen[str]] = {}
    with new_file(Path(config.directory).absolute()) as probe:
        try:
            for host in hosts:
                far = ["check", "--config", str(config_path(config)), "--silo", silo, "--address", host]
                far += ["--probe", str(probe), *(["--port", str(port)] if host == hosts[0] else [])]
                far += ["--interface", interface] if interface else []
                asked[host] = _start(far_command(program, host, far, {}))
            found = {host: _answer(host, process) for host, process in asked.items()}
        finally:
            for process in asked.values():
                process.kill()
                process.wait()
    for host, facts in found.items():
        if facts["wrong"]:
            raise ConfigError(f"host {host}: {facts['wrong']}")
    _check_alike(config, silo, found)


@contextmanager
def new_file(directory: Path) -> Iterator[Path]:
    """A file with a name that was never there before; removed at the end."""
    file = directory / f"probe-{secrets.token_hex(8)}"
    file.touch()
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def _start(argv: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise ConfigError(f"--ssh: {argv[0]!r} given; {error.strerror}; allowed: a command line") from None


def _answer(host: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a host says of itself. Raises ConfigError if it does not."""
    try:
        output, errors = process.communicate(timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"host {host}: no answer in {CHECK_SECONDS:g} s") from None
    if process.returncode == 0:
        return json.loads(output.splitlines()[-1])  # a login shell may have printed its own before
    said = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1].strip()
    if process.returncode == FAILED:
        raise ConfigError(f"host {host}: {said}; allowed: hosts that ssh reaches without being asked for anything")
    raise ConfigError(
        f"host {host}: {said}; allowed: hosts with the same {sys.executable} and working directory {os.getcwd()}"
    )


def _check_alike(config: RunConfig, silo: str, found: dict[str, dict[str, Any]]) -> None:
    first, *others = found
    ours = found[first]["versions"]
    for host in others:
        theirs = found[host]["versions"]
        for what in ours | theirs:
            if (here := ours.get(what, "none")) != (there := theirs.get(what, "none")):
                raise ConfigError(
                    f"{what} differs: {here} on host {first}, {there} on host {host}; allowed: the same on all"
                )
    wanted = config.silos[silo].processes_per_node
    has_gpus = any(facts["num_gpus"] for facts in found.values())
    for host, facts in found.items():
        if has_gpus and facts["num_gpus"] < wanted:
            raise ConfigError(
                f"silos.{silo}.processes_per_node: {wanted} given; allowed: up to {facts['num_gpus']}, the GPUs of "
                f"host {host}"
            )
