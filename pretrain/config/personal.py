"""The keys of a silo's own adapter, which never leaves it. Imports no torch."""

from dataclasses import dataclass, field

from pretrain.config.adapter import ALL_LINEAR
from pretrain.config.errors import named


@dataclass(kw_only=True)
class PersonalConfig:
    """A second adapter beside the shared one (`model.adapter`), of this silo alone: it is trained with the other, and
    never leaves the silo (docs/adapters.md)."""

    rank: int = 0
    """Rows of its A and columns of its B; 0: there is none."""
    alpha: float = 16.0
    """Its product B A counts alpha / rank times."""
    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """Layers, as those of `model.adapter.targets`, which may be others."""
    dropout: float = 0.0
    """Share of what goes into its A that is left out in a training step."""

    @property
    def is_on(self) -> bool:
        """Whether there is one."""
        return self.rank > 0

    @property
    def words(self) -> str:
        """What cannot change once it has begun."""
        return f"of rank {self.rank}, alpha {self.alpha:g}, beside {named(self.targets)}" if self.is_on else "none"
