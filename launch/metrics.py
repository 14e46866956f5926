"""`atoll metrics`: what a run has recorded, as CSV."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def metrics(
    directory: Annotated[Path, typer.Argument(help="Run directory.")],
    kind: Annotated[str, typer.Option(help="step, sync, eval, commit, start, rollback, tasks or summary.")] = "step",
) -> None:
    """Print one kind of record of a run as CSV, a record a line; one that was done again after a restart counts once.

    [bold]Example:[/bold] atoll metrics runs/run --kind eval > eval.csv
    """
    from launch import api

    api.open_run(directory).metrics(kind).to_csv(sys.stdout, index=False)
