"""A silo's practice within a run: its tasks tried with the global model between two rounds, and what was right read.

What is tried is tried by a process of its own (`pretrain.practice.silo`), which leaves a directory in `practice` of the
silo's folder, whole or not at all. Its name says after how many rounds and with which version; checkpoints name it with
its hash. So a silo that was killed at any point reads the same sequences again.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.host.journal import Journal
from pretrain.host.stopping import StopRequested
from pretrain.silo.checkpoint import Progress, save_parameters
from pretrain.silo.data import Mixture, Prefetch
from pretrain.silo.engine import Engine
from pretrain.silo.practised import Practised
from pretrain.silo.ranks import Ranks
from pretrain.silo.shards import text_sha256, verify_shards
from pretrain.silo.texts import packed_opener
from pretrain.sync.silo_sync import SiloSync

PARAMETERS, CONFIG, ERROR = "parameters.safetensors", "config.yaml", "error.txt"
RESULT, SPLIT = "rollout.json", Path("packed/train")  # of what the process leaves
POLL_SECONDS = 0.2

AskedToStop = Callable[[], bool]


class Practice:
    """Of one silo; without tasks, nothing."""

    def __init__(
        self,
        config: RunConfig,
        name: str,
        ranks: Ranks,
        journal: Journal | None,
        *,
        mixture: Mixture,
        progress: Progress,
    ) -> None:
        """Read what was practised before a checkpoint. Raises ConfigError if it is not what it was."""
        self._config, self._name, self._ranks, self._journal = config, name, ranks, journal
        self._own, self._key = config.silos[name].practice, f"silos.{name}.practice"
        self._mixture = mixture if isinstance(mixture, Practised) else None
        self._directory = config.silo_directory(name) / "practice"
        if progress.practice and not self._mixture:
            raise ConfigError(
                f"{self._key}.tasks: {self._own.tasks!r} given; the newest checkpoint has practised, and its sequences "
                "are other ones without; allowed: the tasks, or another run directory"
            )
        for number in range(len(progress.practice)):
            self._begin(progress.practice[: number + 1])

    def practise(
        self, engine: Engine, progress: Progress, batches: Prefetch, sync: SiloSync | None, asked_to_stop: AskedToStop
    ) -> bool:
        """If it is time, try the tasks with the global model, all ranks together, and read what was right from here on.

        Returns whether it was. Raises StopRequested, and ConfigError, as where nothing was right, on all ranks alike.
        """
        point = self._config.practice.point(progress.round) if self._mixture else None
        if point is None or any(one["rounds"] == point for one in progress.practice):
            return False
        began = time.monotonic()
        if self._journal:
            self._journal.status("practising", step=progress.step, round=progress.round)
        place = self._directory / f"round-{point:06d}-{progress.commit_sha256[:8] or 'own'}"
        found = self._ranks.from_leader(self._found(place) if self._ranks.is_leader else None)
        if not found:
            self._write_parameters(engine, sync)
            found = self._ranks.from_leader(self._tried(place, point, asked_to_stop) if self._ranks.is_leader else None)
        if "stopped" in found:
            raise StopRequested
        if "error" in found:
            raise ConfigError(found["error"])
        one = {"rounds": point, "position": progress.position, "directory": place.name, "sha256": found["text_sha256"]}
        progress.practice = [*progress.practice, one | {"share": self._own.share, "iterations": self._own.iterations}]
        batches.restore(progress.position)  # what was read ahead is of before
        self._begin(progress.practice)
        progress.seconds_evaluating += time.monotonic() - began
        self._tell(progress, found)
        return True

    def _tell(self, progress: Progress, found: dict[str, Any]) -> None:
        if self._journal:
            told = {name: found[name] for name in ("kinds", "num_tasks", "solved", "kept", "rows", "recipe_sha256")}
            # Which no tracker is told.
            self._journal.record("practice", practice=told | {"step": progress.step, "round": progress.round})
            right, tries = found["kinds"].get("right", 0), sum(found["kinds"].values())
            print(
                f"round {progress.round:5d}  practice: {right:,} of {tries:,} tries right ({right / max(1, tries):.1%})"
                f", {found['kept']:,} kept in {found['rows']:,} rows",
                flush=True,
            )

    @staticmethod
    def _found(place: Path) -> dict[str, Any]:
        """What is there whole; nothing, if it is not."""
        file = place / RESULT
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    def _write_parameters(self, engine: Engine, sync: SiloSync | None) -> None:
        """The global model's trained parameters, for the process that tries; of a silo that trains alone, its own."""
        if self._ranks.is_leader:
            self._directory.mkdir(parents=True, exist_ok=True)
            save_config(self._config, self._directory / CONFIG)
        file = self._directory / PARAMETERS
        if sync is None:
            save_parameters(file, engine, self._ranks)
            return
        with sync.global_model(engine):  # nothing in here waits or raises, as the engine is not itself
            save_parameters(file, engine, self._ranks)

    def _tried(self, place: Path, point: int, asked_to_stop: AskedToStop) -> dict[str, Any]:
        """What the process that tries has found, or what went wrong."""
        error = self._directory / ERROR
        error.unlink(missing_ok=True)
        options = {"--config": CONFIG, "--parameters": PARAMETERS, "--error": ERROR}
        arguments = [part for option, name in options.items() for part in (option, str(self._directory / name))]
        arguments += ["--silo", self._name, "--output", str(place), "--rounds", str(point)]
        arguments += ["--parent", str(os.getpid())]
        process = subprocess.Popen([sys.executable, "-m", "pretrain.practice.silo", *arguments])
        while process.poll() is None:
            if asked_to_stop():
                process.terminate()
                process.wait()
                return {"stopped": True}
            time.sleep(POLL_SECONDS)
        (self._directory / PARAMETERS).unlink(missing_ok=True)
        if process.returncode == 0:
            return self._found(place)
        if error.is_file():
            return {"error": error.read_text().strip()}
        return {"error": f"{self._key}: its process ended with exit code {process.returncode}; its log says why"}

    def _begin(self, practice: list[dict[str, Any]]) -> None:
        """Read the newest of these, with those before it that count. Raises ConfigError on all ranks alike."""
        assert self._mixture
        one = practice[-1]
        splits = [self._directory / before["directory"] / SPLIT for before in practice[-one["iterations"] :]]
        wrong = self._wrong(splits[-1], one["sha256"]) if self._ranks.is_leader else ""
        if wrong := self._ranks.from_leader(wrong):
            raise ConfigError(wrong)
        tokens = packed_opener(self._config)(splits, key=self._key)
        self._mixture.begin(one["position"], tokens, one["share"])

    def _wrong(self, split: Path, sha256: str) -> str:
        try:
            found = text_sha256(verify_shards(split, key=self._key))
        except ConfigError as error:
            return str(error)
        if found == sha256:
            return ""
        given = f"{self._key}: {split} has {found[:12]}, and the silo was trained with {sha256[:12]}"
        return f"{given}; allowed: the directory as it was"
