"""`atoll exit`: leave a federation with proof, in one directory that needs no other party."""

from pathlib import Path
from typing import Annotated

import typer

from pretrain.config.errors import ConfigError
from pretrain.config.paths import expand_home


def leave_with_proof(
    directory: Annotated[Path | None, typer.Argument(metavar="[RUN_DIRECTORY]", help="Run directory ...")] = None,
    *,
    config: Annotated[
        list[Path] | None, typer.Option("--config", "-c", help="... or the silo's YAML file; several are merged.")
    ] = None,
    silo: Annotated[str, typer.Option(help="Whose bundle it is.")],
    to: Annotated[Path, typer.Option(help="Directory to make; must not exist.")],
    leave: Annotated[bool, typer.Option("--leave", help="Also say in the store that the silo takes part no more.")] = (
        False
    ),
) -> None:
    """Write all that a member needs without anybody else. [bold]Stop the silo first.[/bold]

    Model, its own manifests and deliveries, the whole signed chain, keys, software, and a signed list of it all; it is
    checked before it appears. `atoll verify DIRECTORY` checks it again, without a network.

    [bold]Example:[/bold] atoll exit runs/run --silo law --to law-bundle
    """
    from pretrain.config.load import load_config, load_run
    from pretrain.federation.exit import write_bundle
    from pretrain.trust.members import with_keys

    if bool(directory) == bool(config):
        given = "both given" if directory else "none given"
        raise ConfigError(f"RUN_DIRECTORY, --config: {given}; allowed: a run directory, or the silo's configuration")
    own = with_keys(load_run(directory) if directory else load_config(config or []), make=False)
    to = Path(expand_home("--to", str(to))).absolute()
    record = write_bundle(own, silo, to, leave=leave, tell=lambda line: typer.echo(line, err=True))
    num_bytes = sum(one.num_bytes for one in record.files)
    print(f"{to}: {record.member} at version {record.version}, {len(record.files)} files, {num_bytes / 1e6:.2f} MB")
    for what in record.missing:
        print(f"missing     {what}")
    signed = "signed by " + record.member if record.signature else "not signed, as the contract names no keys"
    print(f"exit.json   {signed}{'; complete' if not record.missing else ''}")
    print(f"next: atoll verify {to}")
