"""A payload: one safetensors file with the coded tensors of a fragment.

A tensor's parts lie under KIND/PART/NAME; its kind is part of the key, so that optimizer moments can travel the same
way. Only the header and the tensors that are asked for are read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from pretrain.outer.quantize import Parts

PARAMETER = "parameter"  # a kind, and the beginning of a file name


def save_tensors(coded: Mapping[str, Parts], file: Path, kind: str = PARAMETER) -> None:
    """Write the parts of named tensors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{kind}/{part}/{name}": value for name, parts in coded.items() for part, value in parts.items()}, file)


class Tensors:
    """An open payload. Raises safetensors' SafetensorError when the file is none, ValueError for a foreign key."""

    def __init__(self, file: Path, kind: str = PARAMETER) -> None:
        self._opened: Any = safe_open(file, framework="pt")
        self._parts: dict[str, dict[str, str]] = {}
        for key in self._opened.keys():  # noqa: SIM118 (safe_open is no mapping)
            found, part, name = [*key.split("/", 2), "", ""][:3]
            if found != kind or not part or not name:
                raise ValueError(f"key {key!r} given; allowed: {kind}/PART/NAME")
            self._parts.setdefault(name, {})[part] = key

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self._parts)

    def parts(self, name: str) -> Parts:
        """The parts of one tensor."""
        return {part: self._opened.get_tensor(key) for part, key in self._parts[name].items()}
