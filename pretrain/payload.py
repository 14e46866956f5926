"""A payload: one safetensors file with the coded tensors of a fragment.

A tensor's parts lie under KIND/PART/NAME: its kind is part of the key, so that the factors of second moments travel
beside parameters. Only the header and the tensors that are asked for are read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from pretrain.outer.moments import SECOND_MOMENT
from pretrain.outer.quantize import Parts

PARAMETER = "parameter"  # a kind, and the beginning of a file name


def save_tensors(
    coded: Mapping[str, Parts], file: Path, kind: str = PARAMETER, *, factors: Mapping[str, Parts] | None = None
) -> None:
    """Write the parts of named tensors, and the factors of second moments beside them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kinds = {kind: coded, SECOND_MOMENT: factors or {}}
    save_file(
        {
            f"{kind}/{part}/{name}": value.contiguous()
            for kind, tensors in kinds.items()
            for name, parts in tensors.items()
            for part, value in parts.items()
        },
        file,
    )


class Tensors:
    """An open payload. Raises safetensors' SafetensorError when the file is none, ValueError for a foreign key."""

    def __init__(self, file: Path, kind: str = PARAMETER) -> None:
        self._opened: Any = safe_open(file, framework="pt")
        self._parts: dict[str, dict[str, str]] = {}
        self._factors: dict[str, dict[str, str]] = {}
        for key in self._opened.keys():  # noqa: SIM118 (safe_open is no mapping)
            found, part, name = [*key.split("/", 2), "", ""][:3]
            if found not in (kind, SECOND_MOMENT) or not part or not name:
                raise ValueError(f"key {key!r} given; allowed: {kind}/PART/NAME")
            (self._parts if found == kind else self._factors).setdefault(name, {})[part] = key

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self._parts)

    def parts(self, name: str) -> Parts:
        """The parts of one tensor."""
        return {part: self._opened.get_tensor(key) for part, key in self._parts[name].items()}

    @property
    def factors(self) -> dict[str, Parts]:
        """The factors of second moments, by name of their parameter; small, so all at once."""
        return {
            name: {part: self._opened.get_tensor(key) for part, key in keys.items()}
            for name, keys in self._factors.items()
        }
