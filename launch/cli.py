"""`atoll`: the one command. A user's mistake is one line on stderr and exit code 2."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from data_tools.cli import app as data_app
from launch.contract import app as contract_app
from launch.egress import app as egress_app
from launch.exit import leave_with_proof
from launch.keys import app as keys_app
from launch.metrics import metrics
from launch.model import chat, evaluate, export, generate
from launch.revoke import revoke
from launch.verify import verify
from pretrain.config.check import ConfigError, check_url, named
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config
from pretrain.config.paths import expand_home

app = typer.Typer(
    name="atoll",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Federated pre-training of language models: institutions that may not pool text train one model together.",
)
launch_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Start a run.")
app.add_typer(launch_app, name="launch")
app.add_typer(data_app, name="data")
app.add_typer(keys_app, name="keys")
app.add_typer(contract_app, name="contract")
app.add_typer(egress_app, name="egress")
app.command()(verify)
app.command("exit")(leave_with_proof)
app.command()(revoke)
app.command()(metrics)
app.command()(export)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(chat)

Config = Annotated[list[Path], typer.Option("--config", "-c", help="YAML file; several are merged in order.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, merged last.")]
RunDirectory = Annotated[Path, typer.Argument(help="Run directory.")]


@app.command()
def demo(
    overrides: Overrides = None,
    directory: Annotated[Path, typer.Option(help="Run directory; an unfinished run in it goes on.")] = Path(
        "runs/demo"
    ),
    corpora: Annotated[
        Path | None, typer.Option(help="Folders of train.jsonl.gz and valid.jsonl.gz instead of the installed Python.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Also train one central model and each silo alone.")] = False,
) -> None:
    """Train three silos together on this machine, on text that is already on it.

    [bold]Example:[/bold] atoll demo --compare
    """
    from launch.demo import run_demo

    raise typer.Exit(run_demo(directory, corpora=corpora, compare=compare, overrides=overrides or []))


@launch_app.command("local")
def launch_local_command(
    config: Config,
    overrides: Overrides = None,
    max_restarts: Annotated[int, typer.Option(help="How often a child that crashed is started again.")] = 0,
) -> None:
    """Start the aggregator and every silo on this machine, and watch them.

    Ctrl-C saves and stops; the same command goes on.

    [bold]Example:[/bold] atoll launch local --config run.yaml inner.lr=0.003
    """
    from launch.start.local import launch_local
    from pretrain.federation.preflight import check_run

    checked = _loaded(config, overrides)
    check_run(checked)
    raise typer.Exit(launch_local(checked, max_restarts=max_restarts))


@launch_app.command("slurm")
def launch_slurm_command(
    config: Config,
    site: Annotated[list[Path], typer.Option(help="YAML file that describes the cluster; several are merged.")],
    overrides: Overrides = None,
    aggregator: Annotated[bool, typer.Option(help="Also submit the aggregator, unless it runs elsewhere.")] = True,
    dry_run: Annotated[bool, typer.Option(help="Write and check the jobs, and submit nothing.")] = False,
) -> None:
    """Submit a job for each silo and one for the aggregator to SLURM.

    They save before their time limit and go back into the queue until the run is done.

    [bold]Example:[/bold] atoll launch slurm --config run.yaml --site configs/site/cpu.yaml --dry-run
    """
    from launch.start.site import load_site
    from launch.start.slurm import launch_slurm
    from pretrain.federation.preflight import check_run

    checked = _loaded(config, overrides)
    check_run(checked)
    jobs, notes = launch_slurm(checked, load_site(site, checked), aggregator=aggregator, dry_run=dry_run)
    print("\n".join([*(f"{name}: {what}" for name, what in jobs.items()), *notes]))


@launch_app.command("torchrun")
def launch_torchrun_command(
    config: Config,
    overrides: Overrides = None,
    *,
    silo: Annotated[str, typer.Option(help="Which silo.")],
    host: Annotated[list[str], typer.Option(help="Address of a node; once for each.")],
    port: Annotated[int, typer.Option(help="At which the first node serves the rendezvous.")] = 29_400,
    interface: Annotated[str | None, typer.Option(help="Network interface for NCCL and gloo.")] = None,
    max_restarts: Annotated[int, typer.Option(help="How often crashed workers are started again.")] = 3,
    ssh: Annotated[
        str | None, typer.Option(help="Start and watch the nodes through it: ssh, with its options.")
    ] = None,
    save_seconds: Annotated[int, typer.Option(min=1, help="With --ssh: how long a stop waits for a checkpoint.")] = 120,
) -> None:
    """Print the command that starts a silo on each of its nodes, where there is no scheduler; or run them by ssh.

    By ssh, the nodes are checked first; Ctrl-C saves and stops; the same command goes on.

    [bold]Example:[/bold] atoll launch torchrun --config run.yaml --silo law --host 10.0.0.1 --host 10.0.0.2 --ssh ssh
    """
    from launch.start.ssh import launch_by_ssh
    from launch.start.torchrun import check_options, node_commands
    from pretrain.federation.preflight import check_port, check_silo

    checked = _loaded(config, overrides)
    if ssh is not None:
        code = launch_by_ssh(
            *(checked, silo, host),
            ssh=ssh,
            port=port,
            interface=interface,
            max_restarts=max_restarts,
            save_seconds=save_seconds,
        )
        raise typer.Exit(code)
    check_options(checked, silo, host, port)
    check_silo(checked, silo)
    check_port(host[0], port, key="--port", given=port)
    commands = node_commands(checked, silo, host, port=port, interface=interface, max_restarts=max_restarts)
    for command in commands:
        print(f"# {command.host}\n{command}")


@launch_app.command("join")
def launch_join_command(
    url: Annotated[str, typer.Argument(help="The federation's store.")],
    config: Config,
    overrides: Overrides = None,
    site: Annotated[list[Path] | None, typer.Option(help="As for launch slurm; without, it starts here.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Check all and say what would happen; start nothing.")] = False,
) -> None:
    """Join a federation as one of its silos: show its contract, check this site, say what would happen, start.

    The configuration holds what the contract does not: the silo, tokenizer, directory.

    [bold]Example:[/bold] atoll launch join s3://bucket/run --config silo.yaml --dry-run
    """
    from launch.start.join import join

    raise typer.Exit(join(_store(url), config, overrides or [], sites=site or [], dry_run=dry_run))


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    *,
    bandwidth: Annotated[str, typer.Option(help="Of a silo's link, in each direction: 100mbit, 2.5gbit.")],
    latency: Annotated[float, typer.Option(help="Seconds to the store (or another silo) and back.")] = 0.05,
    tokens_per_second: Annotated[float | None, typer.Option(help="That each silo trains on.")] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Directory of an earlier run on these machines, instead of a number.")
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Budget of all silos; default: what the run trains on.")] = None,
) -> None:
    """Say what a run will take before it starts: bytes, seconds, memory; and which ways to sync would be better.

    [bold]Example:[/bold] atoll plan --config run.yaml --bandwidth 100mbit --tokens-per-second 40000
    """
    from launch.show import plan as planning
    from pretrain.plan.plan import make_plan
    from pretrain.plan.seconds import Given, parse_bandwidth

    checked, bits_per_second = load_config(config, overrides or []), parse_bandwidth(bandwidth)
    for option, number, minimum in (("--latency", latency, 0.0), ("--tokens", tokens, 1.0)):
        if number is not None and not minimum <= number < float("inf"):
            raise ConfigError(f"{option}: {number:g} given; allowed: {minimum:g} or more")
    known, factor = planning.measured_run(measured) if measured else (None, 1.0)
    given = Given(
        link_bits_per_second=bits_per_second,
        latency_seconds=latency,
        tokens_per_second=planning.tokens_per_second(list(checked.silos), tokens_per_second, known),
        work_factor=factor,
    )
    planning.print_plan(make_plan(checked, given, budget_tokens=round(tokens) if tokens else None))


@app.command()
def train(
    config: Config,
    silo: Annotated[str, typer.Option(help="Which of the configuration's silos this is.")],
    overrides: Overrides = None,
) -> None:
    """Train one silo on this machine, and watch it; the aggregator and the other silos run elsewhere.

    Ctrl-C saves and stops; the same command goes on. For several nodes: atoll launch torchrun.

    [bold]Example:[/bold] atoll train --config run.yaml --silo law
    """
    from launch.start.local import launch_silo
    from pretrain.federation.preflight import announce_store, check_collective, check_silo

    checked = _loaded(config, overrides)
    if silo not in checked.silos:
        raise ConfigError(f"--silo: {silo!r} given; allowed: {named(sorted(checked.silos))}")
    if checked.silos[silo].num_nodes != 1:
        raise ConfigError(f"silos.{silo}.num_nodes: {checked.silos[silo].num_nodes} given; allowed: 1 with atoll train")
    check_silo(checked, silo)
    check_collective(checked, silo)
    announce_store(checked)
    raise typer.Exit(launch_silo(checked, silo))


@app.command()
def aggregate(config: Config, overrides: Overrides = None) -> None:
    """Merge the silos' pseudo-gradients, one commit after another. Needs a CPU and the store, nothing else.

    [bold]Example:[/bold] atoll aggregate --config run.yaml
    """
    from launch.start.local import write_resolved
    from launch.start.processes import run_here
    from pretrain.federation.preflight import announce_store

    checked = _loaded(config, overrides)
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
    to: Annotated[int, typer.Option(help="Version to go back to; it must still be kept.")],
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    key: Annotated[
        Path | None, typer.Option(help="The operator's private key; where the run directory's trust.directory says.")
    ] = None,
) -> None:
    """Take a run back to an earlier version, for ever. [bold]Stop all its silos and its aggregator first.[/bold]

    Says what that means, and asks. What came later is discarded; its commits and manifests are kept under
    rolled-back/. Started again, the run goes on from there.

    [bold]Example:[/bold] atoll rollback s3://bucket/run --to 12 --reason "corrupted text since version 13"
    """
    from pretrain.exchange.options import operators_key
    from pretrain.exchange.rollback import consequences, roll_back_store

    said = consequences(_store(where), to=to)
    if said and not yes and not sys.stdin.isatty():
        raise ConfigError(
            f"--yes: not given, and there is no terminal to ask at; nothing is changed: {'; '.join(said)}"
        )
    for line in said:
        print(line)
    if said and not yes and not typer.confirm(f"Roll back to version {to}?"):
        print("nothing is changed")
        raise typer.Exit(1)
    done = roll_back_store(_store(where), to=to, reason=reason, key=key or operators_key(where))
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

    print(f"silo {silo} left at version {say_left(_loaded(config, overrides), silo)}")


@app.command()
def relay(
    config: Config,
    remote: Annotated[str, typer.Option(help="URL of the federation's store.")],
    overrides: Overrides = None,
) -> None:
    """Copy between the directory that compute nodes share and a store that only this login node can reach.

    exchange.url of the configuration is the directory. It ends with the run; after a stop the same command goes on.

    [bold]Example:[/bold] atoll relay --config run.yaml --remote s3://bucket/run
    """
    from pretrain.federation.relay import relay as run_relay

    remote = expand_home("--remote", remote)
    check_url(remote, "--remote")
    raise typer.Exit(run_relay(_loaded(config, overrides), remote))


@app.command()
def report(directory: RunDirectory) -> None:
    """Write summary.json and report.html of a run.

    [bold]Example:[/bold] atoll report runs/demo
    """
    from launch.show.report import write_report

    compared = sorted(path for path in (directory / "compare").glob("*") if (path / "metrics.jsonl").is_file())
    print(write_report(directory, comparisons={path.name: path for path in compared}))


@app.command()
def compare(
    config: Config,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    dry_run: Annotated[bool, typer.Option(help="Show the runs, and start none.")] = False,
    table: Annotated[bool, typer.Option(help="Only write tables and plots of what is finished.")] = False,
) -> None:
    """Train central, isolated, federated and personalised models at equal tokens, and say how they compare.

    What is interrupted goes on with the same command. See docs/learning.md for the configuration.

    [bold]Example:[/bold] atoll compare --config compare.yaml --jobs 2
    """
    from rich.console import Console

    from launch.compare.compare import compare as run_comparison
    from launch.compare.compare import describe_runs, load_comparison, plan_runs
    from launch.compare.table import write_results

    spec = load_comparison(config, overrides or [])
    if dry_run:
        print(describe_runs(plan_runs(spec)))
        return
    code = 0 if table else run_comparison(spec, jobs=jobs)
    for each in write_results(spec):
        each.show(Console())
    raise typer.Exit(code)


def _loaded(paths: list[Path], overrides: list[str] | None) -> RunConfig:
    """A configuration, with the keys of its run directory where a launch has made them."""
    from pretrain.trust.members import with_keys

    return with_keys(load_config(paths, overrides or []), make=False)


def _store(where: str) -> str:
    """A store's URL: what is given, or the store of a run directory."""
    from pretrain.exchange.options import reached

    return reached(where)[0]


def main() -> None:
    """Console entry point."""
    try:
        app()
    except ConfigError as error:
        print(f"atoll: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
