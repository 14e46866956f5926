"""`atoll report`, `watch` and `serve`: a run, or a federation from its store alone, for people to look at."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.config.errors import ConfigError
from pretrain.config.paths import expand_home

if TYPE_CHECKING:
    from launch.show.page import Federation

Where = Annotated[str, typer.Argument(help="URL of the store, or a run directory with one in it.")]
ForMembers = Annotated[
    bool, typer.Option("--members", help="Also what the contract keeps in the consortium (trust.metrics).")
]
Beside = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=RUN", help="Held-out loss of a run on this machine, too: central=runs/central."),
]
REPORT = "report.html"


def report(
    where: Annotated[str, typer.Argument(help="Run directory, or URL of a store.")],
    output: Annotated[Path, typer.Option(help="File to write of a store's report.")] = Path(REPORT),
    members: ForMembers = False,
    beside: Beside = None,
) -> None:
    """Write report.html: of a run directory with its summary.json, or of a federation, from its store alone.

    Of a store it has what its members publish: --members adds what the contract keeps among them.

    [bold]Example:[/bold] atoll report s3://bucket/run --output federation.html
    """
    directory = Path(expand_home("store", where))
    runs = _runs(beside)
    if (directory / "metrics.jsonl").is_file():
        from launch.show.report import write_report

        if output != Path(REPORT) or members:
            given = "--members" if members else f"--output: {output}"
            raise ConfigError(f"{given} given with a run directory; allowed: with a store, such as {directory}/store")
        compared = sorted(path for path in (directory / "compare").glob("*") if (path / "metrics.jsonl").is_file())
        print(write_report(directory, comparisons={path.name: path for path in compared} | runs))
        return
    from launch.show.report import MADE_BY, write_page

    if output.exists() and MADE_BY not in output.read_text(errors="replace"):
        raise ConfigError(f"--output: {str(output)!r} given; it is there, and no report; allowed: another file")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: {str(output)!r} given; allowed: a file in a directory that is there")
    write_page(output, _federation(where, members=members, beside=runs).page())
    print(output)


def watch(
    where: Where,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is finished, or Ctrl-C.")] = False,
) -> None:
    """Show a federation in the terminal, from its store alone: silos, newest commits, losses, what is waited for.

    [bold]Example:[/bold] atoll watch s3://bucket/run --follow
    """
    from rich.console import Console

    from launch.show.watch import watch as show

    try:
        show(_federation(where, members=True), Console(), follow=follow)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def serve(
    where: Where,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any that is free.")] = 8470,
    members: ForMembers = False,
    beside: Beside = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Host under which a proxy in front asks; may be given several times.")
    ] = None,
) -> None:
    """Serve the report of a federation on this machine, renewed while somebody looks at it, until Ctrl-C.

    Whoever is on this machine can read it. A proxy in front of it decides who else.

    [bold]Example:[/bold] atoll serve s3://bucket/run --port 8470
    """
    from launch.show.serve import PageServer

    server = PageServer(_federation(where, members=members, beside=_runs(beside)), port, name or [])
    print(f"{server.url} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        server.server_close()


def _federation(where: str, *, members: bool, beside: dict[str, Path] | None = None) -> "Federation":
    from launch.show.page import Federation
    from pretrain.exchange.options import reached, store_options

    url, exchange = reached(where)
    return Federation(url, store_options(exchange, url), for_members=members, beside=beside)


def _runs(beside: list[str] | None) -> dict[str, Path]:
    """`NAME=RUN` as given. Raises ConfigError."""
    found: dict[str, Path] = {}
    for given in beside or []:
        name, equals, directory = given.partition("=")
        if not (name and equals and directory) or name in found:
            raise ConfigError(f"--beside: {given!r} given; allowed: NAME=RUN, each name once")
        found[name] = Path(expand_home("--beside", directory))
    return found
