"""Silos that leave, come back, join and lose what they send: the loss against a run that nothing happens to.

    python -m benchmarks.elastic CORPORA [key=value ...] [--directory DIR]

Each corpus folder in CORPORA is a silo; two more hold the first and the second one's text. One of these leaves for good
at version 8 (SIGTERM, `atoll leave`), the other joins at version 14; the last corpus's silo is killed at version 10 and
started again ten versions later; every second delivery of the second silo gets lost. int4 both ways with error
feedback, a quorum of two. Then five silos train undisturbed on as many tokens as all silos trained on here. Checked are
the divisor and contributors of every commit, and that every silo ends with the digest of the last one; printed is the
mean held-out loss over the corpora of both runs.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.sync import PLAIN, finished, mean_loss
from launch.demo import federated_config, prepare_text
from launch.start.local import CommandBuilder, launch_local, local_commands
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.store import StoreExchange
from pretrain.federation.leave import say_left
from pretrain.outer.digest import digest_tensors
from pretrain.trust.ledger import Commit
from tests.faults.scripted import with_faults

LEAVER, NEWCOMER = "leaver", "newcomer"
LEAVES, DIES, JOINS, IS_AWAY = 8, 10, 14, 10
SETTINGS = [
    "inner.num_steps=800",
    "outer.sync_interval_steps=20",
    "outer.optimizer=sgd",
    "outer.lr=1.0",
    "outer.codec=int4",
    "outer.downlink_codec=int4",
    "outer.error_feedback=1.0",
    "silo.eval_interval_rounds=0",
    "silo.checkpoint_interval_steps=50",
    "exchange.poll_seconds=0.1",
    "wandb.mode=disabled",
]
RULES = ["membership.quorum=2", "membership.deadline_floor_seconds=2", "membership.deadline_ceiling_seconds=60"]


class Guest:
    """A silo with a run directory of its own, or an aggregator, which comes and goes without a launcher's watch."""

    def __init__(self, config: RunConfig, name: str, build_commands: CommandBuilder = local_commands) -> None:
        self.config, self.name = config, name
        path = Path(config.directory) / "config.yaml"
        save_config(config, path)
        self._command = next(command for command in build_commands(config, path) if command.name == name)
        self._log = Path(config.directory).with_suffix(f".{name}.log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        environment = os.environ | self._command.environment
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command.argv, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """SIGKILL all its processes, if it runs."""
        if not self._process or self._process.poll() is not None:
            return
        agent = psutil.Process(self._process.pid)
        for process in [agent, *agent.children(recursive=True)]:  # the workers have process groups of their own
            process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, as a scheduler would; returns when the checkpoint is written."""
        assert self._process
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def wait(self, seconds: float, *, code: int = 0) -> str:
        """Wait until it has ended, with an exit code; returns all that it printed."""
        assert self._process
        ended, text = self._process.wait(seconds), self._log.read_text()
        assert ended == code, text[-5000:]
        return text


def wait_until(what: Callable[[], Any], seconds: float) -> None:
    """Ask again and again. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)


def final_digest(config: RunConfig, silo: str) -> str:
    """Of the global parameters that a silo's last checkpoint holds."""
    newest = max((config.silo_directory(silo) / "checkpoints").glob("step-*"))
    return digest_tensors(load_file(newest / "global.safetensors").items())


def main() -> None:
    """Run both, check and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, help="folder of corpus folders")
    parser.add_argument("--directory", type=Path, default=Path("runs/elastic"))
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    directory = arguments.directory
    packed, tokenizer = prepare_text(directory, arguments.corpora)
    names = list(packed)
    valid = {name: str(packed[name] / "valid") for name in names}
    texts = packed | {LEAVER: packed[names[0]], NEWCOMER: packed[names[1]]}
    overrides = [*SETTINGS, *arguments.overrides]

    def configured(folder: Path, silos: list[str], *more: str) -> RunConfig:
        """Some of the silos, of a roster of all where there is a quorum."""
        config = federated_config(folder, texts, tokenizer, [*overrides, *more])
        chosen = {name: dataclasses.replace(config.silos[name], valid=valid, **PLAIN) for name in silos}
        if not config.membership.is_elastic:
            return dataclasses.replace(config, silos=chosen)
        exchange = dataclasses.replace(config.exchange, url=str(directory / "store"))
        return dataclasses.replace(config, silos=chosen, roster=list(texts), exchange=exchange)

    disturbed = configured(directory / "disturbed", names[:-1], *RULES)
    guests = [Guest(configured(directory / name, [name], *RULES), name) for name in (LEAVER, names[-1], NEWCOMER)]
    commits = run_disturbed(disturbed, guests, dropping=names[1], log_file=directory / "launch.log")
    check(commits, dropping=names[1], back=names[-1])
    ending = [(disturbed, name) for name in names[:-1]] + [(guest.config, guest.name) for guest in guests[1:]]
    for config, silo in ending:
        same = final_digest(config, silo) == commits[-1].parameters_digest
        assert same, f"{silo} has other parameters than the last commit"
    counts = [len(commit.contributors) for commit in commits]
    print(f"{len(commits)} commits of {min(counts)} to {max(counts)} silos, {statistics.mean(counts):.1f} on average")

    contributed = sum(contributor.tokens for commit in commits for contributor in commit.contributors)
    trained = sum(tokens_trained(disturbed.store_url, silo) for silo in texts)
    interval = disturbed.outer.sync_interval_steps
    round_tokens = (len(names) + 1) * 16 * disturbed.sequence_tokens * interval
    num_rounds = round(trained / round_tokens)
    undisturbed = configured(directory / "undisturbed", [*names, LEAVER], f"inner.num_steps={num_rounds * interval}")
    losses = [mean_loss(finished(config, directory / "launch.log")) for config in (disturbed, undisturbed)]
    print(f"disturbed    loss {losses[0]:.4f}  {trained:,} tokens trained on, {contributed:,} contributed")
    print(f"undisturbed  loss {losses[1]:.4f}  {num_rounds * round_tokens:,} tokens")
    print(f"difference   {losses[0] / losses[1] - 1:+.2%}")


def check(commits: Sequence[Commit], *, dropping: str, back: str) -> None:
    """Every commit divides by the tokens of those that are in it, and those are who delivered."""
    for commit in commits:
        assert commit.divisor == sum(contributor.tokens for contributor in commit.contributors)
    versions = {
        silo: [c.version for c in commits if silo in {contributor.silo for contributor in c.contributors}]
        for silo in (dropping, LEAVER, NEWCOMER, back)
    }
    print("\n".join(f"{silo:<14} in versions {', '.join(map(str, found))}" for silo, found in versions.items()))
    assert not [version for version in versions[dropping] if version % 2 == 0]
    assert max(versions[LEAVER]) <= LEAVES + 1
    assert min(versions[NEWCOMER]) > JOINS
    assert not [version for version in versions[back] if DIES + 1 < version <= DIES + IS_AWAY]
    assert max(versions[back]) > DIES + IS_AWAY


def tokens_trained(url: str, silo: str) -> int:
    """Tokens that a silo had trained on when it delivered last, counted in the order of its text."""
    objects = StoreExchange(url).objects
    numbers = [name for name in objects.names(f"silos/{silo}") if name.isdigit()]
    newest = max(n for n in numbers if objects.exists(f"silos/{silo}/{n}/manifest.json"))
    return int(json.loads(objects.read(f"silos/{silo}/{newest}/manifest.json"))["tokens_total"])


def run_disturbed(config: RunConfig, guests: Sequence[Guest], *, dropping: str, log_file: Path) -> list[Commit]:
    """Launch aggregator and steady silos, let the guests come and go; returns the commits, from version 1 on."""
    store, (leaver, back, newcomer) = StoreExchange(config.store_url), guests

    def come_and_go() -> None:
        def version(wanted: int) -> None:
            wait_until(lambda: store.newest_version() >= wanted, 3600)

        leaver.start()
        back.start()
        version(LEAVES)
        leaver.stop()
        say_left(leaver.config, LEAVER)
        version(DIES)
        back.kill()
        version(JOINS)
        newcomer.start()
        version(DIES + IS_AWAY)
        back.start()

    visitors = threading.Thread(target=come_and_go)
    visitors.start()
    fired = Path(config.directory).with_suffix(".fired")
    fired.mkdir(exist_ok=True)
    build = with_faults({dropping: [("delivering", 2, 0, "drop")]}, fired)
    with log_file.open("a") as log:
        if launch_local(config, build_commands=build, console=Console(file=log, width=120)):
            raise SystemExit(f"{config.directory} failed: see {log_file}")
    visitors.join()
    for guest in (back, newcomer):
        guest.wait(600)
    store.read_contract()
    return [store.read_commit(version) for version in range(1, config.schedule.num_versions + 1)]


if __name__ == "__main__":
    main()
