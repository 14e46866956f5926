"""The exact state of a silo: a run that was killed and resumed goes on bit by bit like one that was not.

It may go on with other ranks, at another ZeRO stage or precision: parameters and optimizer state are the same to the
last bit, and so are the sequences that follow; only dropout draws other numbers then.

checkpoints/step-00000100/state.json         step, version, position, and what they belong to
                          engine/            fp32 parameters and inner optimizer state, each rank's pieces by name
                          rng-00000.safetensors   random number generators of each rank
                          global.safetensors the silo's fp32 copy of the global parameters
                          residual.safetensors error feedback: what the codec has left out so far

What is in flight at that step was delivered; its files lie in the silo's outbox until its commit is adopted.
"""

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.config.errors import ConfigError
from pretrain.silo.engine import Engine
from pretrain.silo.named_state import complete_checkpoints
from pretrain.silo.personal import KEY as PERSONAL
from pretrain.silo.ranks import Ranks

SECONDS = ("seconds_training", "seconds_waiting", "seconds_evaluating")
HostTensors = dict[str, dict[str, Tensor]]


@dataclass(kw_only=True)
class Progress:
    """Where a silo is."""

    step: int = 0
    """Inner steps done, as the contract's schedule counts them."""
    version: int = -1
    """Newest version of the global parameters that the silo has adopted; -1 before it has any."""
    commit_sha256: str = ""
    """Of that version's commit."""
    sent: int = 0
    """Newest version that the silo has delivered its part for."""
    round: int = 0
    """Rounds whose end the silo has passed."""
    position: int = 0
    """Sequences consumed."""
    trained_tokens: int | None = None
    """Tokens that had a loss, of a silo that trains on conversations since it has this count; None: all of its
    sequences'."""
    loss: float = 0.0
    """Training loss of the last inner step, in nats."""
    sent_positions: dict[str, int] = field(default_factory=dict)
    """`position` when each fragment was sent last, ..."""
    sent_trained_tokens: dict[str, int] = field(default_factory=dict)
    """... and `trained_tokens`."""
    unsettled: list[int] = field(default_factory=list)
    """Versions that we delivered for and do not know yet whether it counted."""
    joined_step: int = 0
    """The inner step at which the silo has joined, or caught up with the others."""
    round_steps: int = 0
    """Inner steps that this silo makes in the present round, where that depends on its speed; else 0."""
    seconds_per_step: float = 0.0
    """Running mean of what an inner step takes."""
    mean_loss: float = 0.0
    """Running mean of the training loss; 0 before there is one."""
    epsilon: float = 0.0
    """What a private silo has spent, ..."""
    delta: float = 0.0
    """... with this delta; 0 for one that is not private, or before its first step."""
    practice: list[dict[str, Any]] = field(default_factory=list)
    """What the silo has practised: after how many rounds, from which position on, which directory, what it holds."""
    seconds_training: float = 0.0
    seconds_waiting: float = 0.0
    seconds_evaluating: float = 0.0

    def was_sent(self, fragments: Iterable[int]) -> None:
        """Some fragments are sent as they are now, or need not be."""
        for fragment in map(str, fragments):
            self.sent_positions = self.sent_positions | {fragment: self.position}  # a copy of this keeps its own
            if self.trained_tokens is not None:
                self.sent_trained_tokens = self.sent_trained_tokens | {fragment: self.trained_tokens}

    def sequences_since(self, fragment: int) -> int:
        """Consumed since a fragment was sent last."""
        return self.position - self.sent_positions.get(str(fragment), 0)

    def tokens_since(self, fragment: int, sequence_tokens: int) -> int:
        """Trained since then, of sequences of so many tokens; at least one, as a delivery weighs something."""
        if self.trained_tokens is None:
            return self.sequences_since(fragment) * sequence_tokens
        return max(1, self.trained_tokens - self.sent_trained_tokens.get(str(fragment), 0))

    @property
    def spent(self) -> dict[str, float]:
        """Of a private silo's budget; empty for another."""
        return {"epsilon": self.epsilon, "delta": self.delta} if self.delta else {}

    @property
    def seconds(self) -> dict[str, float]:
        """Where the silo's time has gone, by the names of these fields."""
        return {name: value for name, value in vars(self).items() if name in SECONDS}


class Checkpoints:
    """The checkpoints of one silo in one folder; a folder that is not complete does not count."""

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        contract_sha256: str,
        kind: str = "store",
        data: dict[str, Any] | None = None,
        accept_other_data: bool = False,
    ) -> None:
        """`kind` is that of the exchange: what a silo can do without its checkpoints depends on it; `data` says what a
        position counts in (`Mixture.terms`), None: a position of any text is taken.
        """
        self._data, self._accept_other_data = data, accept_other_data
        self._directory, self._kind = directory, kind
        self._keep = keep
        self._contract_sha256 = contract_sha256

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete_checkpoints(self._directory)

    @property
    def newest(self) -> Path | None:
        """The checkpoint that a resume starts from."""
        return (self.all() or [None])[-1]  # type: ignore[list-item]

    def keep_only(self, is_kept: Callable[[int, str], bool]) -> None:
        """Remove the newest until one is kept, by its version and that commit's sha256; only the leader calls this."""
        for directory in reversed(self.all()):
            state = json.loads((directory / "state.json").read_text())
            if is_kept(state["version"], state["commit_sha256"]):
                return
            shutil.rmtree(directory)

    def save(self, progress: Progress, engine: Engine, ranks: Ranks, host: HostTensors) -> None:
        """Write a checkpoint, all ranks together; it appears under its name when everybody's part is on disk.

        `host` are the leader's own tensors, by the name of their file.
        """
        final = self._directory / f"step-{progress.step:08d}"
        temporary = self._directory / f".{final.name}.tmp"
        if ranks.is_leader:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        ranks.barrier()
        engine.save(temporary)
        save_file(_random_state(), temporary / f"rng-{ranks.rank:05d}.safetensors")
        if ranks.is_leader:
            for name, tensors in host.items():
                if tensors:
                    save_file(tensors, temporary / f"{name}.safetensors")
            state = dataclasses.asdict(progress) | {
                **engine.terms,
                **({PERSONAL: engine.personal.words} if engine.personal.names else {}),
                "layout": engine.layout,
                "contract_sha256": self._contract_sha256,
                "data": self._data,
            }
            (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        ranks.barrier()
        if ranks.is_leader:
            _sync_files(temporary)
            if final.exists():  # the same step again, after a resume: the new one replaces it
                final.rename(self._directory / f".{final.name}.old")
            temporary.rename(final)
            shutil.rmtree(self._directory / f".{final.name}.old", ignore_errors=True)
            for old in self.all()[: -self._keep]:
                shutil.rmtree(old)
        ranks.barrier()

    def load(self, engine: Engine, ranks: Ranks, host: HostTensors) -> Progress | None:
        """Resume from the newest checkpoint, all ranks together; None if there is none.

        Fills `host` on the leader. Raises ConfigError if the checkpoint is of another contract, optimizer or model, is
        not whole, or its position counts in other text.
        """
        newest = ranks.from_leader(str(self.newest) if self.newest else None)
        if newest is None:
            return None
        directory = Path(newest)
        state: dict[str, Any] = json.loads((directory / "state.json").read_text())
        if (layout := state.pop("layout", None)) is None:
            raise ConfigError(f"{directory}: it was written by an earlier version of Atoll; {self._ways()}")
        self._check_terms(directory, state, engine, ranks)
        changed = other_data(state.pop("data", None), self._data)
        if changed:
            meaning = (
                f"{directory}: {changed} of the silo changed since it was written, and the {state['position']} "
                "sequences that it counts as read are other ones now"
            )
            if not self._accept_other_data:
                raise ConfigError(
                    f"{meaning}; allowed: what it was written with, or accept_other_data=true in the silo's section, "
                    "to go on there: some text is then read again and some is left out, up to the end of the epoch"
                )
            if ranks.is_leader:
                print(f"warning: {meaning}; it goes on, as accept_other_data says", flush=True)
        engine.load(directory)
        if layout == engine.layout:
            _restore_random_state(load_file(directory / f"rng-{ranks.rank:05d}.safetensors"))
        else:
            torch.manual_seed(zlib.crc32(f"{directory.name}/{ranks.rank}/{torch.initial_seed()}".encode()))
            if ranks.is_leader:
                print(f"goes on from {directory.name}, of {_words(layout)}, with {_words(engine.layout)}", flush=True)
        for name, tensors in host.items() if ranks.is_leader else ():
            if (directory / f"{name}.safetensors").is_file():
                tensors.update(load_file(directory / f"{name}.safetensors"))
        return Progress(**state)

    def _check_terms(self, directory: Path, state: dict[str, Any], engine: Engine, ranks: Ranks) -> None:
        """Take what a checkpoint can only be loaded with out of its `state`. Raises ConfigError where it is other."""
        terms = engine.terms | {"contract_sha256": self._contract_sha256}
        if PERSONAL in state:
            terms[PERSONAL] = engine.personal.words
        elif engine.personal.names and ranks.is_leader:
            print(f"{PERSONAL}: it begins at {directory.name}", flush=True)
        for key, ours in terms.items():
            if (theirs := state.pop(key, ours)) != ours:
                raise ConfigError(
                    f"{directory}: it was written with {key} {theirs}, and this is {ours}; {self._ways()}"
                )

    def _ways(self) -> str:
        """What leads on where a checkpoint is of other settings."""
        same = "allowed: what it was written with"
        if self._kind == "store":
            return (
                f"{same}; or move {self._directory} away, and the silo goes on from the store's newest version with a "
                "fresh inner optimizer"
            )
        return f"{same}; or another run directory, to start anew" if self._kind == "none" else same


def _words(layout: Mapping[str, Any]) -> str:
    ranks = "1 rank" if layout["num_ranks"] == 1 else f"{layout['num_ranks']} ranks"
    return f"{ranks}, ZeRO {layout['stage']}, {layout['precision']}"


def other_data(recorded: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    """Which terms of the data differ from a checkpoint's, or nothing; a checkpoint without them says nothing."""
    return ", ".join(key for key in ours if recorded.get(key) != ours[key]) if recorded and ours else ""


def save_parameters(file: Path, engine: Engine, ranks: Ranks) -> None:
    """Write all fp32 parameters as one safetensors file, all ranks together: the model of a silo that trained alone."""
    gathered = {}
    for name in engine.shapes:
        value = engine.read(name)
        if ranks.is_leader:
            gathered[name] = value.cpu().contiguous()
    if ranks.is_leader:
        temporary = file.with_suffix(".tmp")
        save_file(gathered, temporary)
        temporary.replace(file)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        state["device"] = get_accelerator().get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "device" in state:
        get_accelerator().set_rng_state(state["device"])


def _sync_files(directory: Path) -> None:
    """Ask the disk to hold what was written; a rename must not reach it before the data."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
