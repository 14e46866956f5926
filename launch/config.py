"""`atoll config`: what a configuration can say."""

from typing import Annotated

import typer

app = typer.Typer(name="config", no_args_is_help=True, rich_markup_mode="rich", help="What a configuration can say.")


@app.callback()
def _group() -> None:
    """A group, although it has one command."""


@app.command("keys")
def show_keys(
    pattern: Annotated[str, typer.Argument(help="Part of a key's name, or all of it with * and ?.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="All keys, as docs/configuration.md.")] = False,
) -> None:
    """Every key of a run: type, default, unit, what is allowed, whether it is part of the contract, what it is.

    [bold]Example:[/bold] atoll config keys muon
    """
    import shutil

    from launch.show.config_keys import as_markdown, find_keys, in_terminal

    width = min(shutil.get_terminal_size().columns, 120)
    print(as_markdown() if markdown else in_terminal(find_keys(pattern), width=width), end="" if markdown else "\n")
