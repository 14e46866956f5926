"""`atoll launch`: start a run, here, on SLURM, by torchrun, or as one who joins."""

from pathlib import Path
from typing import Annotated

import typer

from launch.given import Config, DryRun, Overrides, loaded, store_of

app = typer.Typer(name="launch", no_args_is_help=True, rich_markup_mode="rich", help="Start a run.")


@app.command("local")
def launch_local_command(
    config: Config,
    overrides: Overrides = None,
    max_restarts: Annotated[int, typer.Option(help="How often a child that crashed is started again.")] = 0,
    dry_run: DryRun = False,
) -> None:
    """Start the aggregator and every silo on this machine, and watch them.

    Ctrl-C saves and stops; the same command goes on.

    [bold]Example:[/bold] atoll launch local --config run.yaml inner.lr=0.003
    """
    from launch.show.text import what_would_start
    from launch.start.local import check_one_machine, launch_local
    from pretrain.federation.preflight import check_run

    checked = loaded(config, overrides)
    check_one_machine(checked)
    check_run(checked, touch=not dry_run)
    if dry_run:
        print(what_would_start(checked, list(checked.silos), aggregator=True))
        return
    raise typer.Exit(launch_local(checked, max_restarts=max_restarts))


@app.command("slurm")
def launch_slurm_command(
    config: Config,
    site: Annotated[
        list[Path], typer.Option(help="YAML file of the cluster, or a preset, as cpu; several are merged.")
    ],
    overrides: Overrides = None,
    aggregator: Annotated[bool, typer.Option(help="Also submit the aggregator, unless it runs elsewhere.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and check the jobs; submit nothing.")] = False,
) -> None:
    """Submit a job for each silo and one for the aggregator to SLURM.

    They save before their time limit and go back into the queue until the run is done.

    [bold]Example:[/bold] atoll launch slurm --config run.yaml --site cpu --dry-run
    """
    from launch.start.site import load_site
    from launch.start.slurm import launch_slurm
    from pretrain.federation.preflight import check_run

    checked = loaded(config, overrides, needs_silo=not aggregator)
    check_run(checked)
    jobs, notes = launch_slurm(checked, load_site(site, checked), aggregator=aggregator, dry_run=dry_run)
    print("\n".join([*(f"{name}: {what}" for name, what in jobs.items()), *notes]))


@app.command("torchrun")
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
    dry_run: DryRun = False,
) -> None:
    """Print the command that starts a silo on each of its nodes, where there is no scheduler; or run them by ssh.

    By ssh, the nodes are checked first; Ctrl-C saves and stops; the same command goes on.

    [bold]Example:[/bold] atoll launch torchrun --config run.yaml --silo law --host 10.0.0.1 --host 10.0.0.2 --ssh ssh
    """
    from launch.show.text import what_would_start
    from launch.start.ssh import launch_by_ssh
    from launch.start.torchrun import check_options, node_commands
    from pretrain.federation.preflight import check_port, check_run, check_silo

    checked = loaded(config, overrides)
    if ssh is not None:
        code = launch_by_ssh(
            *(checked, silo, host),
            ssh=ssh,
            port=port,
            interface=interface,
            max_restarts=max_restarts,
            save_seconds=save_seconds,
            dry_run=dry_run,
        )
        raise typer.Exit(code)
    check_options(checked, silo, host, port)
    check_silo(checked, silo)
    check_port(host[0], port, key="--port", given=port)
    if dry_run:
        check_run(checked, [silo], touch=False)
        print(what_would_start(checked, [silo], aggregator=False))
        return
    commands = node_commands(checked, silo, host, port=port, interface=interface, max_restarts=max_restarts)
    for command in commands:
        print(f"# {command.host}\n{command}")


@app.command("join")
def launch_join_command(
    url: Annotated[str, typer.Argument(help="The federation's store.")],
    config: Config,
    overrides: Overrides = None,
    site: Annotated[list[Path] | None, typer.Option(help="As for launch slurm; without, it starts here.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Join a federation as one of its silos: show its contract, check this site, say what would happen, start.

    The configuration holds what the contract does not: the silo, tokenizer, directory.

    [bold]Example:[/bold] atoll launch join s3://bucket/run --config silo.yaml --dry-run
    """
    from launch.start.join import join

    raise typer.Exit(join(store_of(url), config, overrides or [], sites=site or [], dry_run=dry_run))
