"""`atoll keys`: make a member's keys, and show what others may know of them."""

from pathlib import Path
from typing import Annotated

import typer

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
