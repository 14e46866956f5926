"""Parameters and optimizer state in files that any number of ranks can read, at any ZeRO stage and precision.

    00003-exp_avg.safetensors   rank 3's pieces of one kind of state, fp32: name to elements, flat
    00003.json                  where each of these pieces lies in its flattened tensor, and steps by name

A rank reads only the elements that it is going to keep itself. Nothing here knows of ranks or stages: pieces of one
tensor must not overlap, and together are the whole.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain.config.errors import ConfigError

PARAMETER = "parameter"  # the kind that is there of all tensors
STATE = "engine"  # the folder of a checkpoint


def complete_checkpoints(directory: Path) -> list[Path]:
    """Those of a silo's folder of checkpoints, oldest first; one that is not complete does not count."""
    return sorted(path for path in directory.glob("step-*") if (path / "state.json").is_file())


def save_pieces(
    directory: Path,
    rank: int,
    kinds: Iterable[tuple[str, Mapping[str, tuple[int, Tensor]]]],
    steps: Mapping[str, int],
) -> None:
    """Write a rank's pieces, one kind after another: name to first element and fp32 elements.

    `steps` says how often the optimizer has stepped each tensor that this rank has a piece of.
    """
    directory.mkdir(parents=True, exist_ok=True)
    places: dict[str, dict[str, tuple[int, int]]] = {}
    for kind, pieces in kinds:
        there = {name: (start, piece) for name, (start, piece) in pieces.items() if piece.numel()}
        places[kind] = {name: (start, start + piece.numel()) for name, (start, piece) in there.items()}
        save_file({name: piece.detach().cpu() for name, (_, piece) in there.items()}, _file(directory, rank, kind))
    (directory / f"{rank:05d}.json").write_text(json.dumps({"places": places, "steps": steps}))


def _file(directory: Path, rank: int, kind: str) -> Path:
    return directory / f"{rank:05d}-{kind}.safetensors"


class SavedState:
    """What all ranks have written. Raises ConfigError, naming the directory, for what is not there or damaged."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # By tensor and kind: first element, the one behind the last, where they are.
        self._pieces: dict[str, dict[str, list[tuple[int, int, Path]]]] = {}
        self.steps: dict[str, int] = {}
        """How often the optimizer has stepped each tensor."""
        try:
            for file in sorted(directory.glob("*.json")):
                found = json.loads(file.read_text())
                self.steps |= found["steps"]
                for kind, places in found["places"].items():
                    path = _file(directory, int(file.stem), kind)
                    for name, (start, stop) in places.items():
                        self._pieces.setdefault(name, {}).setdefault(kind, []).append((start, stop, path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(str(error)) from None

    def holds(self, name: str) -> bool:
        """Whether anything is there of a tensor."""
        return name in self._pieces

    def kinds(self, name: str) -> list[str]:
        """Kinds of state that are there of a tensor, without its values."""
        return sorted(self._pieces.get(name, {}).keys() - {PARAMETER})

    def read(self, kind: str, name: str, start: int, num_elements: int) -> Tensor:
        """Some elements of a flattened tensor, fp32."""
        found, stop, filled = torch.empty(num_elements), start + num_elements, 0
        try:
            for first, last, file in self._pieces.get(name, {}).get(kind, ()):
                if (begin := max(start, first)) < (end := min(stop, last)):
                    with safe_open(file, framework="pt") as opened:
                        found[begin - start : end - start] = opened.get_slice(name)[begin - first : end - first]
                    filled += end - begin
        except (OSError, SafetensorError, RuntimeError) as error:
            raise self._damaged(str(error)) from None
        if filled != num_elements:
            raise self._damaged(f"{filled} of {num_elements} elements of {kind} {name} are there")
        return found

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self._directory}: this checkpoint is not whole: {why}; delete it, and an older one counts"
        )
