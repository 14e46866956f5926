"""`atoll keys`: make a member's keys, and show what others may know of them."""

from pathlib import Path
from typing import Annotated

import typer

from launch.contract import Config, Member, Store, say_proposed
from pretrain.config.paths import expand_home

app = typer.Typer(name="keys", no_args_is_help=True, rich_markup_mode="rich", help="Keys that sign for a member.")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="The member: a silo's name, or aggregator.")],
    directory: Annotated[Path, typer.Option(help="Where NAME.key is made; a directory that only you can read.")] = Path(
        "."
    ),
) -> None:
    """Make a member's keys: a private file, never overwritten, and a public line for the others.

    [bold]Example:[/bold] atoll keys new law --directory ~/keys
    """
    from pretrain.trust.keys import new_key

    path = Path(expand_home("--directory", str(directory))) / f"{name}.key"
    public = new_key(path, name)
    print(f"{public.text}\nfingerprint  {public.fingerprint}\nprivate key  {path.absolute()}")
    print("Send the first line to the others and compare the fingerprint by phone; keep a copy of the private key.")


@app.command()
def show(
    key: Annotated[str, typer.Argument(metavar="FILE", help="A key file, private or public, or a public line itself.")],
) -> None:
    """Show the public line of a key and its fingerprint, to compare by phone; never what is private.

    [bold]Example:[/bold] atoll keys show ~/keys/law.key
    """
    from pretrain.trust.keys import PREFIX, PrivateKey, PublicKey, read_key

    found = PublicKey.parse(key) if key.startswith(PREFIX) else read_key(Path(expand_home("key", key)))
    public = found.public if isinstance(found, PrivateKey) else found
    print(f"{public.text}\nfingerprint  {public.fingerprint}")
    if isinstance(found, PrivateKey):
        print(f"name         {found.name}")


@app.command()
def rotate(
    name: Annotated[str, typer.Argument(help="The member: a silo's name, or aggregator.")],
    store: Store,
    from_version: Annotated[int, typer.Option("--from", metavar="VERSION", help="From which version on it signs.")],
    directory: Annotated[Path, typer.Option(help="Where NAME.key is; its successor is put beside it.")] = Path("."),
    config: Annotated[
        list[Path] | None, typer.Option("--config", "-c", help="Where trust.key_command says what signs, if anything.")
    ] = None,
) -> None:
    """Make the successor of one's own key, and propose that it signs from a version on. It needs nobody's consent.

    The old file stays, as it signs for the versions before; whoever runs finds the new one, also when started again.
    Where a key_command signs, NAME.key.1 with the public line of its new key is there before.

    [bold]Example:[/bold] atoll keys rotate law s3://bucket/run --from 40 --directory ~/keys
    """
    from pretrain.config.load import load_unchecked
    from pretrain.federation.contract import Agreed
    from pretrain.federation.contract import rotate as rotate_it

    agreed, command = Agreed.at(store, config or []), load_unchecked(config).trust.key_command if config else []
    proposal, file = rotate_it(agreed, name, Path(expand_home("--directory", str(directory))), from_version, command)
    print(f"private key  {file.absolute()}")
    say_proposed(agreed, proposal)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The member whose key counts no more.")],
    store: Store,
    config: Config,
    silo: Member,
    from_version: Annotated[int, typer.Option("--from", metavar="VERSION", help="From which version on.")],
) -> None:
    """Propose that a member's key counts no more from a version on. The others have to sign, as trust.amend says.

    The run goes on with its quorum. A member who lost its key is given another one by atoll contract amend.

    [bold]Example:[/bold] atoll keys revoke law s3://bucket/run --config med.yaml --silo med --from 40
    """
    from pretrain.federation.contract import Agreed, amend

    agreed = Agreed.at(store, config)
    agreed.as_member(config, [], silo)
    say_proposed(agreed, amend(agreed, silo, from_version, [f"trust.keys.{name}="]))
