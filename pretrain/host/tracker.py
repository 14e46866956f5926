"""Weights & Biases beside a run, which never depends on it: what cannot be sent is kept on disk. No torch."""

import dataclasses
import os
import uuid
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

# By which of its own numbers each kind of record is drawn.
AXES = {"step": "step/step", "sync": "sync/step", "eval": "eval/step", "commit": "commit/version"}
# What of the configuration may hold a secret, or how one is come by.
KEPT = {"exchange": ("options", "client_certificate", "client_key"), "trust": ("key_command", "directory")}
AGREED = ("name", "run_id", "sequence_tokens", "document_masking", "model", "inner", "outer", "membership", "roster")
RUN_FILE = "wandb.id"  # what makes all starts of a process in one run directory one run there

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


def numbers(kind: str, values: dict[str, Any]) -> dict[str, int | float]:
    """What of a record can be drawn, by its name in every tracker: step/loss, eval/CORPUS, tasks/TASK/METRIC."""
    found = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
    inner = values.get("val_loss", {}) | values.get("scores", {})
    return found | {f"{kind}/{name}": value for name, value in inner.items()}


def told_of(config: RunConfig, silo: str | None, *, only_agreed: bool) -> dict[str, Any]:
    """The resolved configuration as a process has it, without what may be secret and other silos' sections.

    With `only_agreed`, what all silos agreed to alone: where a site lets out some numbers, its places are no affair.
    """
    found = dataclasses.asdict(config)
    if only_agreed:
        found = {name: found[name] for name in AGREED}
        del found["model"]["checkpoint"]
    else:
        for section, names in KEPT.items():
            found[section] = {name: value for name, value in found[section].items() if name not in names}
        found |= {"silo": found["silos"].get(silo, {}), "silos": sorted(config.silos)}
    return found | {"member": silo or "aggregator"}


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
            self._begin(config, config.wandb.mode, silo)

    def _begin(self, config: RunConfig, mode: str, silo: str | None) -> None:
        import wandb

        axes = {kind: axis for kind, axis in AXES.items() if not self._allows or self._allows(axis)}
        silent: dict[str, Any] = SILENT if self._allows else {}
        try:
            # Asked on a terminal, a key would be waited for.
            if mode == "online" and not wandb.login(prompt=False):
                raise RuntimeError("no login was found (wandb login, or WANDB_API_KEY)")
            self._mode = mode
            told: dict[str, Any] = {
                "project": config.wandb.project,
                "entity": config.wandb.entity or None,
                "group": "-".join(filter(None, (config.name, config.run_id))),
                "job_type": "silo" if silo else "aggregator",
                "name": f"{config.name}-{silo or 'aggregator'}",
                "id": self._run_id(),
                "config": told_of(config, silo, only_agreed=bool(self._allows)),
            }
            self._say("init", told | {"axes": axes})
            self._run = wandb.init(
                **told,
                resume="allow",
                mode=mode,  # type: ignore[arg-type]
                dir=str(self._directory),
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=TIMEOUT_SECONDS,
                    finish_timeout=TIMEOUT_SECONDS,
                    **silent,
                ),
            )
            for kind, axis in axes.items():
                self._run.define_metric(f"{kind}/*", step_metric=axis)
        except Exception as error:  # of a library and a service that training must not depend on
            why = str(error).strip().splitlines()[:1] or [type(error).__name__]
            if mode == "online":
                then = f"recorded offline in {self._directory / 'wandb'}, which wandb sync sends"
                print(f"wandb.mode: 'online' given; {why[0]}; {then}", flush=True)
                self._begin(config, "offline", silo)
            else:
                print(f"wandb: {why[0]}; nothing is recorded there", flush=True)

    def _run_id(self) -> str:
        """Drawn at the first start in this run directory: a later one goes on with the same run."""
        file = self._directory / RUN_FILE
        if not file.is_file():
            file.write_text(uuid.uuid4().hex[:16] + "\n")
        return file.read_text().strip()

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """The numbers of one record."""
        if self._run:
            found = numbers(kind, values)
            if self._allows:
                found = {name: number for name, number in found.items() if self._allows(name)}
            if found:
                self._say(kind, found)
                self._try(lambda: self._run.log(found))

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
