"""`atoll presets`: what can be chosen by name instead of written down."""

from typing import Annotated

import typer


def presets(
    choice: Annotated[
        str, typer.Argument(metavar="[SECTION=NAME]", help="Show this one, of a site by site=NAME; default: list all.")
    ] = "",
) -> None:
    """List the presets, each as it is typed behind any command that takes key=value, or show one.

    In a configuration: presets: [model=llama-20m, outer=recommended]; what the file says itself lies above them.

    [bold]Example:[/bold] atoll presets outer=recommended
    """
    from pretrain.config.errors import ConfigError
    from pretrain.config.presets import SECTIONS, SITE, find_preset, presets_of

    if choice:
        section, _, name = choice.partition("=")
        if section not in (*SECTIONS, SITE):
            raise ConfigError(f"presets: {choice!r} given; allowed: SECTION=NAME, as atoll presets lists them")
        print(find_preset(section, name).path.read_text(), end="")
        return
    found = [preset for section in (*SECTIONS, SITE) for preset in presets_of(section)]
    width = max(len(preset.typed) for preset in found)
    for preset in found:
        print(f"{preset.typed:<{width}}  {preset.line}")
