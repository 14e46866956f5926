"""`atoll`: the one command. A user's mistake is one line on stderr and exit code 2."""

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools.cli import app as data_app
from launch.config import app as config_app
from launch.contract import app as contract_app
from launch.egress import app as egress_app
from launch.evaluate import evaluate
from launch.exit import leave_with_proof
from launch.given import Config, DryRun, Overrides, loaded
from launch.init import init
from launch.keys import app as keys_app
from launch.launch import app as launch_app
from launch.metrics import metrics
from launch.model import chat, export, generate
from launch.plan import plan
from launch.presets import presets
from launch.report import report, serve, watch
from launch.revoke import revoke
from launch.rollout import rollout
from launch.verify import verify
from launch.version import with_version
from pretrain.config.check import check_url
from pretrain.config.errors import ConfigError, named
from pretrain.config.paths import expand_home

app = typer.Typer(
    name="atoll",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Federated pre-training of language models: institutions that may not pool text train one model together.",
)
app.add_typer(launch_app, name="launch")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(contract_app, name="contract")
app.add_typer(egress_app, name="egress")
app.command()(init)
app.command()(plan)
app.command()(presets)
app.command()(verify)
app.command("exit")(leave_with_proof)
app.command()(revoke)
app.command()(report)
app.command()(watch)
app.command()(serve)
app.command()(metrics)
app.command()(export)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(chat)
app.command()(rollout)

RunDirectory = Annotated[Path, typer.Argument(help="Run directory.")]


@app.command()
def demo(
    overrides: Overrides = None,
    *,
    directory: Annotated[
        Path | None, typer.Option(help="Run directory; an unfinished run in it goes on; default: runs/demo[-chat].")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Conversations in place of text, and adapters (LoRA) beside a small base.")
    ] = False,
    corpora: Annotated[
        Path | None, typer.Option(help="Folders of train.jsonl.gz and valid.jsonl.gz instead of the installed Python.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Also train one central model and each silo alone.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train three silos together on this machine, on text that is already on it; with --chat on conversations.

    [bold]Example:[/bold] atoll demo --compare
    """
    from launch.demo import run_demo

    if chat and (corpora or compare):
        name, allowed = ("--corpora", "its own conversations") if corpora else ("--compare", "it always compares")
        raise ConfigError(f"{name}: given with --chat; allowed: without, {allowed}")
    if chat:
        from launch.demo_chat import run_demo_chat

        directory = directory or Path("runs/demo-chat")
        raise typer.Exit(run_demo_chat(directory, overrides=overrides or [], dry_run=dry_run))
    directory = directory or Path("runs/demo")
    code = run_demo(directory, corpora=corpora, compare=compare, overrides=overrides or [], dry_run=dry_run)
    raise typer.Exit(code)


@app.command()
def train(
    config: Config,
    silo: Annotated[str, typer.Option(help="Which of the configuration's silos this is.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train one silo on this machine, and watch it; the aggregator and the other silos run elsewhere.

    Ctrl-C saves and stops; the same command goes on. For several nodes: atoll launch torchrun.

    [bold]Example:[/bold] atoll train --config run.yaml --silo law
    """
    from launch.show.text import what_would_start
    from launch.start.local import launch_silo
    from pretrain.federation.preflight import announce_store, check_collective, check_run, check_silo

    checked = loaded(config, overrides)
    if silo not in checked.silos:
        raise ConfigError(f"--silo: {silo!r} given; allowed: {named(sorted(checked.silos))}")
    if checked.silos[silo].num_nodes != 1:
        raise ConfigError(f"silos.{silo}.num_nodes: {checked.silos[silo].num_nodes} given; allowed: 1 with atoll train")
    if dry_run:
        check_run(checked, [silo], touch=False)
        print(what_would_start(checked, [silo], aggregator=False))
        return
    check_silo(checked, silo)
    check_collective(checked, silo)
    announce_store(checked)
    raise typer.Exit(launch_silo(checked, silo))


@app.command()
def aggregate(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Merge the silos' pseudo-gradients, one commit after another. Needs a CPU and the store, nothing else.

    [bold]Example:[/bold] atoll aggregate --config run.yaml
    """
    from launch.show.text import what_would_start
    from launch.start.local import write_resolved
    from launch.start.processes import run_here
    from pretrain.federation.preflight import announce_store, check_run

    checked = loaded(config, overrides, needs_silo=False)
    if dry_run:
        check_run(checked, [], touch=False)
        print(what_would_start(checked, [], aggregator=True))
        return
    announce_store(checked)
    path = write_resolved(checked)
    command = [sys.executable, "-m", "pretrain.aggregate", "--config", str(path)]
    raise typer.Exit(run_here(command, {}))


@app.command()
def status(
    where: Annotated[str, typer.Argument(help="URL of the store, or a run directory with one in it.")],
) -> None:
    """What is committed, who delivered, what is being waited for: from the store alone.

    [bold]Example:[/bold] atoll status s3://bucket/run
    """
    from launch.show.status import print_status
    from pretrain.exchange.options import reached, store_options

    url, exchange = reached(where)
    print_status(url, store_options(exchange, url))


@app.command()
def logs(
    directory: RunDirectory,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Silos, or aggregator.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    num_lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines of each to begin with.")] = 20,
) -> None:
    """Show what the processes of the newest start print, of all silos or some.

    [bold]Example:[/bold] atoll logs runs/run law --follow
    """
    from launch.show.logs import read_logs

    try:
        for line in read_logs(directory, names or [], num_lines=num_lines, follow=follow):
            print(line, flush=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def stop(directory: RunDirectory) -> None:
    """Save and stop all that this machine, or its SLURM, runs of a run; the command that started it goes on later.

    [bold]Example:[/bold] atoll stop runs/run
    """
    from launch.start.stop import stop_run

    stopped = stop_run(directory)
    print(f"stopped: {', '.join(stopped)}" if stopped else "nothing runs")


@app.command()
def rollback(
    where: Annotated[str, typer.Argument(help="URL of the store, or a run directory with one in it.")],
    *,
    to: Annotated[int, typer.Option(help="Version to go back to; it must be kept, in the store or its archive.")],
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    archive: Annotated[str, typer.Option(help="Where what was pruned is; default: that of the run directory.")] = "",
    key: Annotated[
        Path | None, typer.Option(help="The operator's private key; where the run directory's trust.directory says.")
    ] = None,
) -> None:
    """Take a run back to an earlier version, for ever. [bold]Stop all its silos and its aggregator first.[/bold]

    Says what that means, and asks. What came later is discarded; its commits and manifests are kept under
    rolled-back/. Started again, the run goes on from there.

    [bold]Example:[/bold] atoll rollback s3://bucket/run --to 12 --reason "corrupted text since version 13"
    """
    from pretrain.exchange.archive import open_store
    from pretrain.exchange.options import operators_key
    from pretrain.exchange.rollback import consequences, roll_back_store

    store = open_store(where, archive)
    said = consequences(store, to=to)
    if said and not yes and not sys.stdin.isatty():
        raise ConfigError(
            f"--yes: not given, and there is no terminal to ask at; nothing is changed: {'; '.join(said)}"
        )
    for line in said:
        print(line)
    if said and not yes and not typer.confirm(f"Roll back to version {to}?"):
        print("nothing is changed")
        raise typer.Exit(1)
    done = roll_back_store(store, to=to, reason=reason, key=key or operators_key(where))
    print(f"rolled back from version {done.from_version} to {done.to_version}")


@app.command()
def leave(
    config: Config,
    silo: Annotated[str, typer.Option(help="Which silo of the roster leaves.")],
    overrides: Overrides = None,
) -> None:
    """Say that a silo takes part no more, so that nobody waits for it. [bold]Stop the silo first.[/bold]

    Starting it again joins again.

    [bold]Example:[/bold] atoll leave --config run.yaml --silo law
    """
    from pretrain.federation.leave import say_left

    print(f"silo {silo} left at version {say_left(loaded(config, overrides), silo)}")


@app.command()
def relay(
    config: Config,
    remote: Annotated[str, typer.Option(help="URL of the federation's store.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Copy between the directory that compute nodes share and a store that only this login node can reach.

    exchange.url of the configuration is the directory. It ends with the run; after a stop the same command goes on.

    [bold]Example:[/bold] atoll relay --config run.yaml --remote s3://bucket/run
    """
    from pretrain.federation.relay import relay as run_relay

    remote = expand_home("--remote", remote)
    check_url(remote, "--remote")
    raise typer.Exit(run_relay(loaded(config, overrides), remote, dry_run=dry_run))


@app.command()
def compare(
    config: Config,
    overrides: Overrides = None,
    *,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: 1, with --site as many as are ready.")
    ] = None,
    site: Annotated[
        list[Path] | None, typer.Option(help="As for launch slurm: each run is a job, in place of a launch here.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs, and start none.")] = False,
    table: Annotated[bool, typer.Option(help="Only write tables and plots of what is finished.")] = False,
) -> None:
    """Train central, isolated, federated and personalised models at equal tokens, and say how they compare.

    What is interrupted goes on with the same command. See docs/learning.md for the configuration.

    [bold]Example:[/bold] atoll compare --config compare.yaml --jobs 2
    """
    from rich.console import Console

    from launch.compare.compare import describe_runs, load_comparison, plan_runs
    from launch.compare.run import compare as run_comparison
    from launch.compare.site import cluster_of, describe_jobs
    from launch.compare.table import write_results

    if site and table:
        raise ConfigError("--site: given with --table; allowed: without, as nothing is started")
    spec = load_comparison(config, overrides or [])
    cluster = cluster_of(spec, site) if site else None
    if dry_run:
        print(describe_runs(runs := plan_runs(spec)))
        if cluster:
            print(describe_jobs(runs, cluster))
        return
    code = 0 if table else run_comparison(spec, jobs=jobs or (sys.maxsize if site else 1), place=cluster)
    for each in write_results(spec):
        each.show(Console())
    raise typer.Exit(code)


def flowing(command: Any) -> Any:
    """The same command: a paragraph of its help, and of those in it, breaks where the terminal ends, not our source."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    for inner in getattr(command, "commands", {}).values():
        flowing(inner)
    return command


def main() -> None:
    """Console entry point."""
    try:
        flowing(with_version(typer.main.get_command(app)))()
    except ConfigError as error:
        print(f"atoll: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
