"""`--version`, of `atoll` and of each of its commands."""

from typing import Annotated, Any

import typer


def with_version(command: Any, option: Any = None) -> Any:
    """A command, or a group with all that is in it, that takes `--version`; it keeps one of its own, of a model."""
    option = option or _option()
    if not any("--version" in known.opts for known in command.params):
        command.params.append(option)
    for inner in getattr(command, "commands", {}).values():
        with_version(inner, option)
    return command


def _option() -> Any:
    """An option is made where typer makes its own: of a function."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def any_command(
        version: Annotated[
            bool,
            typer.Option("--version", is_eager=True, expose_value=False, callback=_say, help="Say what is installed."),
        ] = False,
    ) -> None: ...

    return typer.main.get_command(app).params[0]


def _say(asked: bool) -> None:
    if asked:
        from pretrain.host.software import installed

        print("\n".join(f"{name} {version}" for name, version in installed().items()))
        raise typer.Exit
