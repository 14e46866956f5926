"""What a silo's private training has spent: the noise that a budget takes, and a file with every release. No torch.

An epoch is one Gaussian mechanism (docs/privacy.md): each sequence is in one of its batches, whose sum of clipped
gradients is released with noise of `noise_multiplier` times `clip_norm`. So E epochs are one Gaussian mechanism with
the noise divided by sqrt(E), of which `dp_accounting` has the exact (epsilon, delta) (arXiv 1805.06530).

The file has a line for each release, on the disk before there is noise. A batch that is released twice in an epoch
with other gradients, as after a rollback, makes the whole epoch count twice; the same one again tells nothing new.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.silo.shards import Manifest, count_sequences, own_tokens

RELEASE = re.compile(r"([0-9]{1,15}) ([0-9a-f]{32})")
ROUNDING = 1e-9  # of the noise that follows from a budget, so that it is never a rounding too small


class BudgetSpentError(ConfigError):
    """A silo may make no further step; it has kept to its budget. The same on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a private silo has planned, and what it may do."""

    noise_multiplier: float
    delta: float
    batch_sequences: int
    epoch_sequences: int
    """Sequences of an epoch: whole batches. The rest of the text, less than a batch, is not trained on."""
    most_epochs: int
    """Epochs within the budget."""

    @property
    def most_steps(self) -> int:
        """Inner steps within the budget, if none is made twice."""
        return self.most_epochs * (self.epoch_sequences // self.batch_sequences)

    def epsilon(self, num_epochs: int) -> float:
        """What so many epochs spend."""
        return gaussian("epsilon", self.noise_multiplier / math.sqrt(num_epochs), self.delta) if num_epochs else 0.0


def plan(config: RunConfig, name: str, manifests: list[Manifest]) -> Plan:
    """The noise of a private silo that trains on some splits, and how far its budget goes.

    Raises ConfigError for a budget that the run's steps exceed, unless the others may go on without the silo.
    """
    silo, key = config.silos[name], f"silos.{name}.private"
    private, batch, num_steps = silo.private, silo.global_batch_sequences, config.inner.num_steps
    assert private.epsilon is not None
    num_tokens, in_rows = sum(manifest.num_tokens for manifest in manifests), manifests[0].chat is not None
    own = own_tokens(config.sequence_tokens, config.model.adapter.prompt_tokens, in_rows=in_rows)
    num_sequences = count_sequences(num_tokens, own, in_rows=in_rows)
    if private.delta * num_sequences >= 1:
        raise ConfigError(
            f"{key}.delta: {private.delta:g} given; allowed: below {1 / num_sequences:.3g}, 1 / the {num_sequences:,} "
            "sequences of its text: delta is the share of them that may be told in full"
        )
    epoch = num_sequences // batch * batch
    num_epochs = math.ceil(num_steps * batch / epoch)
    of_one = gaussian("sigma", private.epsilon, private.delta)
    needed = of_one * math.sqrt(num_epochs) * (1 + ROUNDING)
    noise = private.noise_multiplier or needed
    found = Plan(
        noise_multiplier=noise,
        delta=private.delta,
        batch_sequences=batch,
        epoch_sequences=epoch,
        most_epochs=math.floor((noise / of_one) ** 2),
    )
    if found.most_steps < num_steps and not config.membership.is_elastic:
        raise ConfigError(
            f"{key}.noise_multiplier: {noise:g} given; with it a budget of epsilon {private.epsilon:g}, delta "
            f"{private.delta:g} allows {found.most_steps:,} of {num_steps:,} steps (an epoch has {epoch // batch:,}); "
            f"allowed: {math.ceil(needed * 1e4) / 1e4:g} or more, null, another budget, or as many inner.num_steps"
        )
    return found


def gaussian(wanted: str, given: float, delta: float) -> float:
    """The Gaussian mechanism's epsilon for a sigma, or the least sigma for an epsilon; sensitivity 1."""
    try:
        from dp_accounting import get_epsilon_gaussian, get_sigma_gaussian
    except ImportError:
        raise ConfigError(
            "a budget of epsilon given; dp-accounting is not installed: pip install 'atoll[privacy]'"
        ) from None
    return float((get_epsilon_gaussian if wanted == "epsilon" else get_sigma_gaussian)(given, delta))


class Account:
    """Every release of a silo, in a file in its own directory; only the leader has it."""

    def __init__(self, file: Path, plan: Plan, data: dict[str, Any]) -> None:
        """`data` says which text this is, and in which order (`Mixture.terms`).

        Raises ConfigError for an account that was begun with another text or noise.
        """
        self._file, self._plan = file, plan
        self._batches = Counter[int]()  # how often each was released, by its position
        self._epochs = Counter[int]()  # the most of any of its batches
        self._spent: dict[tuple[int, str], int] = {}
        """Epochs that were spent when a release was first made."""
        told = {key: value for key, value in asdict(plan).items() if key not in ("delta", "most_epochs")}
        self._terms = told | {"text": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()}
        self.is_new = not file.is_file()
        if not self.is_new:
            self._read()

    def _read(self) -> None:
        begun, *lines = self._file.read_text().split("\n")
        try:
            terms = json.loads(begun)
        except ValueError:
            terms = {}
        for key, ours in self._terms.items():
            if (theirs := terms.get(key)) != ours:
                raise ConfigError(
                    f"{self._file}: this account was begun with {key} {theirs}, and this is {ours}; allowed: what it "
                    "was begun with; what another run directory spends of the same text adds to it"
                )
        for line in lines[:-1]:  # a kill may have left half a line: its noise was never drawn
            if not (match := RELEASE.fullmatch(line)):
                raise ConfigError(f"{self._file}: {line!r} is no release; restore the file from a backup")
            self._count(int(match[1]), match[2])
        with self._file.open("r+") as file:
            file.truncate(len(self._file.read_bytes()) - len(lines[-1]))

    @property
    def num_epochs(self) -> int:
        """What all releases together have spent, in epochs."""
        return self._epochs.total()

    def release(self, position: int, digest: str) -> int | None:
        """Write down that the batch at a position is about to be released; `digest` tells its gradients from others.

        Returns the epochs that were spent once it was first. None, and nothing is written, if it would be one too many.
        """
        assert position % self._plan.batch_sequences == 0
        if (spent := self._spent.get((position, digest))) is not None:
            return spent
        is_more = self._batches[position] + 1 > self._epochs[position // self._plan.epoch_sequences]
        if is_more and self.num_epochs + 1 > self._plan.most_epochs:
            return None
        if self.is_new:
            self._file.with_suffix(".tmp").write_text(f"{json.dumps(self._terms)}\n")
            self._file.with_suffix(".tmp").replace(self._file)
            self.is_new = False
        with self._file.open("a") as file:
            file.write(f"{position} {digest}\n")
            file.flush()
            os.fsync(file.fileno())
        self._count(position, digest)
        return self.num_epochs

    def _count(self, position: int, digest: str) -> None:
        epoch = position // self._plan.epoch_sequences
        self._batches[position] += 1
        self._epochs[epoch] = max(self._epochs[epoch], self._batches[position])
        self._spent[position, digest] = self.num_epochs
