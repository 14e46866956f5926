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
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runs import finished, launched, mean_loss, plain
from launch.demo import federated_config, prepare_text
from pretrain.config.keys import RunConfig
from pretrain.exchange.store import StoreExchange
from pretrain.federation.leave import say_left
from pretrain.trust.ledger import Commit
from tests.distributed.guests import Guest, final_digest
from tests.faults.scripted import with_faults
from tests.waiting import wait_for

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
        config = plain(federated_config(folder, texts, tokenizer, [*overrides, *more]))
        chosen = {name: dataclasses.replace(config.silos[name], valid=valid) for name in silos}
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
            wait_for(lambda: store.newest_version() >= wanted, seconds=3600)

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
    launched(config, log_file, with_faults({dropping: [("delivering", 2, 0, "drop")]}, fired))
    visitors.join()
    for guest in (back, newcomer):
        guest.wait(600)
    store.read_contract()
    return [store.read_commit(version) for version in range(1, config.schedule.num_versions + 1)]


if __name__ == "__main__":
    main()
