"""`atoll init`: from nothing to a first configuration."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from pretrain.config.errors import ConfigError

T = TypeVar("T")


def init(
    *,
    machine: Annotated[str | None, typer.Option(help="laptop, node (with GPUs), slurm or torchrun.")] = None,
    role: Annotated[
        str | None, typer.Option(help="federation, contract, silo (that joins), or site (of SLURM).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A preset by name: atoll presets; of federation and contract.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]FOLDER", help="A silo's text, as for data prepare; one a silo.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Of a node; default: what this machine has.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Of a silo, with slurm or torchrun.")] = 1,
    store: Annotated[str, typer.Option(help="URL of the federation that a silo joins, or a contract is for.")] = "",
    roster: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A silo of the contract; once for each.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; default: by the role, in this directory.")] = None,
) -> None:
    """Write a first configuration with comments, and say what to type next. Asks for what is not given.

    Nothing is overwritten.

    [bold]Example:[/bold] atoll init --machine laptop --role federation --model llama-5m --text raw/law --text raw/press

    [bold]Example:[/bold] atoll init --machine laptop --role contract --model llama-5m --roster law --roster press
    """
    from launch.start.begin import MACHINES, ROLES, Beginning, Text, write_new
    from launch.start.gpus import num_gpus
    from pretrain.config.presets import presets_of

    machine = _one_of("machine", machine, MACHINES)
    role = _one_of("role", role, ROLES if machine == "slurm" else {key: ROLES[key] for key in ROLES if key != "site"})
    models = {preset.path.stem: preset.line for preset in presets_of("model")}
    model = _one_of("model", model, models) if role in ("federation", "contract") else model or ""
    texts = text or []
    if role in ("federation", "silo") and not texts:
        texts = _asked("text", "folder of text, several with spaces between", str.split)
    if role == "contract" and not roster:
        roster = _asked("roster", "names of the silos, with spaces between", str.split)
    if gpus is None and machine != "laptop" and role != "contract":
        gpus = num_gpus() or _asked("gpus", "GPUs of a node", int)
    begun = Beginning(
        machine=machine,
        role=role,
        texts=[Text.parse(one) for one in texts],
        model=model,
        gpus=gpus or 0,
        nodes=nodes,
        store=store,
        roster=roster or [],
    )
    file = output or Path(begun.default_file)
    write_new(file, begun.configuration(str(file)))
    print(f"{file} is written; read it, and then type", *begun.next_commands(str(file)), sep="\n  ")


def _one_of(option: str, given: str | None, choices: Mapping[str, str]) -> str:
    if given is None:
        lines = "".join(f"\n  {name:<11} {what}" for name, what in choices.items())
        given = _asked(option, f"{option}:{lines}\n{option}", str)
    if given not in choices:
        raise ConfigError(f"--{option}: {given!r} given; allowed: {', '.join(choices)}")
    return given


def _asked(option: str, question: str, parse: Callable[[str], T]) -> T:
    """What somebody at the terminal answers. Raises ConfigError where nobody is."""
    if not sys.stdin.isatty():
        raise ConfigError(f"--{option}: nothing given, and there is no terminal to ask at; atoll init --help lists all")
    answer: str = typer.prompt(question)
    try:
        return parse(answer)
    except ValueError:
        raise ConfigError(f"--{option}: {answer!r} given; allowed: a number") from None
