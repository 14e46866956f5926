"""The keys of practice: what silos agreed to, and what each tries. Imports no torch."""

import re
from dataclasses import dataclass

from pretrain.config.errors import require

VERIFIER = re.compile(r"[\w.]+:[\w.]+")


@dataclass(kw_only=True)
class PracticeConfig:
    """When silos practise: each tries its own tasks with the global model, and trains on what its verifier says was
    right (docs/agents.md). Part of the contract."""

    every_rounds: int = 0
    """Rounds of training from one practice to the next; 0: nobody practises."""
    after_rounds: int = 0
    """Rounds of training before the first."""

    def point(self, num_rounds: int) -> int | None:
        """After so many rounds, the rounds before the newest practice; None: there is none yet."""
        beyond = num_rounds - self.after_rounds
        return None if not self.every_rounds or beyond < 0 else num_rounds - beyond % self.every_rounds


@dataclass(kw_only=True)
class TasksConfig:
    """What a silo practises on; none of it leaves the silo."""

    tasks: str = ""
    """JSON lines, each with a prompt (text or messages) and what the verifier wants to know; empty: it does not."""
    verifier: str = ""
    """package.module:function, a verify(task, messages) -> bool, which runs in a process of its own for each try."""
    samples: int = 4
    """Tries of each task."""
    keep: int = 1
    """Of each task at most so many different right answers."""
    num_tokens: int = 128
    """Of an answer, at most; one that does not end within them is not verified."""
    temperature: float = 1.0
    """Of the softmax that tries are drawn from."""
    share: float = 0.5
    """Of the sequences that are trained from the first practice on, those of practice; the others are of `data`."""
    iterations: int = 3
    """So many of the newest practices are trained on."""
    batch_sequences: int = 64
    """Tries of one forward pass."""
    time_limit_seconds: float = 10.0
    """What a verifier has for one try, until it is killed with all that it has started."""
    memory_mib: int = 2048
    """Of each process of a verifier."""
    network: bool = False
    """Whether a verifier may reach one."""

    @property
    def is_on(self) -> bool:
        """Whether there are tasks."""
        return bool(self.tasks)

    def check(self, key: str) -> None:
        """Raise ConfigError for tasks without a verifier, and for what cannot be one."""
        fits = bool(VERIFIER.fullmatch(self.verifier)) if self.tasks else not self.verifier
        allowed = f"package.module:function, with {key}.tasks" if self.tasks else f"empty without {key}.tasks"
        require(fits, f"{key}.verifier", self.verifier, allowed)
