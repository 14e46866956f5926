"""Weights & Biases beside a run, which never depends on it: what cannot be sent is kept on disk. No torch."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pretrain.config.keys import RunConfig

TIMEOUT_SECONDS = 15.0  # for a server, at the start and at the end
SERVER = "https://api.wandb.ai"
# What the library tells of the machine, its software and its code by itself.
SILENT = {
    **{"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False},
    **{"disable_git": True, "disable_code": True, "save_code": False},
}

Allows = Callable[[str], bool]
"""Whether a number of this name may leave."""


class Says(Protocol):
    """Is told what leaves."""

    def __call__(self, host: str, what: str, values: dict[str, Any], /) -> None:
        """Before it does."""

    def close(self) -> None:
        """That was all."""


def server_host() -> str:
    """Where an online run is sent."""
    return urlsplit(os.environ.get("WANDB_BASE_URL") or SERVER).hostname or ""


class Tracker:
    """One process's run there; none if `wandb.mode` is disabled, or the library fails."""

    def __init__(
        self, config: RunConfig, part: str, *, silo: str | None, allows: Allows | None = None, says: Says | None = None
    ) -> None:
        """Online, a server that cannot be used is said in one line, and the run is recorded offline.

        With `allows`, other numbers are left out, and the library tells nothing by itself.
        """
        self._run: Any = None
        self._allows, self._says, self._mode = allows, says, ""
        self._directory = Path(config.directory) / part
        if config.wandb.mode != "disabled":
            self._begin(config, config.wandb.mode, silo or part, {"silo": silo})

    def _begin(self, config: RunConfig, mode: str, who: str, about: dict[str, Any]) -> None:
        import wandb

        silent: dict[str, Any] = SILENT if self._allows else {}
        try:
            # Asked on a terminal, a key would be waited for.
            if mode == "online" and not wandb.login(prompt=False):
                raise RuntimeError("no login was found (wandb login, or WANDB_API_KEY)")
            self._mode = mode
            self._say("init", {"project": config.wandb.project, "group": config.name, "name": who, "config": about})
            self._run = wandb.init(
                project=config.wandb.project,
                group=config.name,
                name=f"{config.name}-{who}",
                mode=mode,  # type: ignore[arg-type]
                dir=str(self._directory),
                config=about,
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=TIMEOUT_SECONDS,
                    finish_timeout=TIMEOUT_SECONDS,
                    **silent,
                ),
            )
        except Exception as error:  # of a library and a service that training must not depend on
            why = str(error).strip().splitlines()[:1] or [type(error).__name__]
            if mode == "online":
                then = f"recorded offline in {self._directory / 'wandb'}, which wandb sync sends"
                print(f"wandb.mode: 'online' given; {why[0]}; {then}", flush=True)
                self._begin(config, "offline", who, about)
            else:
                print(f"wandb: {why[0]}; nothing is recorded there", flush=True)

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """The numbers of one record."""
        if self._run:
            numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            numbers |= {f"{kind}/{corpus}": loss for corpus, loss in values.get("val_loss", {}).items()}
            if self._allows:
                numbers = {name: number for name, number in numbers.items() if self._allows(name)}
            if numbers:
                self._say(kind, numbers)
                self._try(lambda: self._run.log(numbers))

    def _say(self, what: str, values: dict[str, Any]) -> None:
        if self._says and self._mode == "online":
            self._says(server_host(), what, values)

    def close(self) -> None:
        """Send what is left, for a limited time."""
        if self._run:
            self._try(self._run.finish)
        if self._says:
            self._says.close()

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # as above
            print(f"wandb: {' '.join(str(error).split())}; nothing more is recorded there", flush=True)
            self._run = None
