"""The keys of an adapter: what is trained in place of the model's own parameters. Imports no torch."""

from dataclasses import dataclass, field

ALL_LINEAR = "all-linear"


@dataclass(kw_only=True)
class AdapterConfig:
    """An adapter beside a model that stays as `model.checkpoint` has it; it alone is trained and travels
    (docs/adapters.md)."""

    kind: str = "none"
    """none: all of the model is trained; lora: two thin factors A and B beside each target (arXiv 2106.09685)."""
    rank: int = 8
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """The product B A counts alpha / rank times."""
    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """Layers by their names or the ends of them, as q_proj; all-linear: all that multiply by a matrix, but the last."""
    dropout: float = 0.0
    """Share of what goes into A that is left out in a training step."""
    merge: str = "factors"
    """factors: both factors are averaged, and the error of it is in every commit; alternate: they are trained in turns,
    so that the mean of the silos' products is exact, and half the bytes travel (arXiv 2502.01755)."""

    @property
    def is_on(self) -> bool:
        """Whether there is one."""
        return self.kind != "none"

    @property
    def takes_turns(self) -> bool:
        """Whether one factor trains at a time."""
        return self.is_on and self.merge == "alternate"
