"""A payload: one safetensors file with the coded tensors of a fragment.

A tensor's parts lie under KIND/PART/NAME: its kind is part of the key, so that moments travel beside parameters. Only
the header and the tensors that are asked for are read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from pretrain.outer.moments import MOMENT
from pretrain.outer.quantize import Parts

PARAMETER = "parameter"  # a kind, and the beginning of a file name


def save_tensors(
    coded: Mapping[str, Parts], file: Path, kind: str = PARAMETER, *, moments: Mapping[str, Parts] | None = None
) -> None:
    """Write the parts of named tensors, and moments beside them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kinds = {kind: coded, MOMENT: moments or {}}
    save_file(
        {
            f"{kind}/{part}/{name}": value.contiguous()
            for kind, tensors in kinds.items()
            for name, parts in tensors.items()
            for part, value in parts.items()
        },
        file,
    )


def check_header(file: Path, *, limit_bytes: int) -> None:
    """Raise ValueError for another party's payload whose header is larger than its tensors' names make it.

    The library would read up to 100 MB of one, and take a GB to do so.
    """
    with file.open("rb") as opened:
        num_bytes = int.from_bytes(opened.read(8), "little")
    if num_bytes > limit_bytes:
        raise ValueError(
            f"its payload is no safetensors file: its header has {num_bytes} bytes; allowed: {limit_bytes}"
        )


class Tensors:
    """An open payload. Raises safetensors' SafetensorError when the file is none, ValueError for a foreign key."""

    def __init__(self, file: Path, kind: str = PARAMETER) -> None:
        self._opened: Any = safe_open(file, framework="pt")
        self._parts: dict[str, dict[str, str]] = {}
        self._moments: dict[str, dict[str, str]] = {}
        for key in self._opened.keys():  # noqa: SIM118 (safe_open is no mapping)
            found, part, name = [*key.split("/", 2), "", ""][:3]
            if found not in (kind, MOMENT) or not part or not name:
                raise ValueError(f"key {key!r} given; allowed: {kind}/PART/NAME")
            (self._parts if found == kind else self._moments).setdefault(name, {})[part] = key

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self._parts)

    def parts(self, name: str) -> Parts:
        """The parts of one tensor."""
        return {part: self._opened.get_tensor(key) for part, key in self._parts[name].items()}

    @property
    def moments(self) -> Mapping[str, Parts]:
        """Moments by name of their parameter; each is read when it is asked for."""
        return _Moments(self._opened, self._moments)


class _Moments(Mapping[str, Parts]):
    def __init__(self, opened: Any, keys: Mapping[str, Mapping[str, str]]) -> None:
        self._opened, self._keys = opened, keys

    def __getitem__(self, name: str) -> Parts:
        return {part: self._opened.get_tensor(key) for part, key in self._keys[name].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
