"""Presets: the files of `configs/`, by name, as `model=llama-150m` and `outer=recommended`. Imports no torch."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pretrain.config.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "configs"
SECTIONS = ("model", "inner", "outer", "membership", "exchange", "silo")
"""Of a run's configuration: `SECTION=NAME` chooses a preset, which may say something about other sections, too."""
SITE = "site"
"""Not of a run: `--site NAME`."""
KEY = "presets"
"""In a file: the presets that lie below it, each as SECTION=NAME."""
SIZE = re.compile(r"-(\d+)([mb])$")
"""At the end of a model's name: so many million or billion parameters."""
CHOICE = re.compile(rf"({'|'.join(SECTIONS)})=([A-Za-z][\w.-]*)")


@dataclass(frozen=True)
class Preset:
    """One file."""

    section: str
    path: Path

    @property
    def typed(self) -> str:
        """As it is chosen."""
        return f"--site {self.path.stem}" if self.section == SITE else f"{self.section}={self.path.stem}"

    @property
    def line(self) -> str:
        """What it is: the first line of its comment."""
        return self.path.read_text().partition("\n")[0].removeprefix("# ")

    def put_over(self, below: DictConfig) -> Any:
        """Merge it over what lies below it; a model takes the place of the one there, as two do not mix."""
        own = OmegaConf.load(self.path)
        if "model" in own and isinstance(below.get("model"), DictConfig):
            for name in ("config", "checkpoint"):
                below.model.pop(name, None)
        return OmegaConf.merge(below, own)


def presets_of(section: str) -> list[Preset]:
    """All of a section, by name; models by their size."""
    return [Preset(section, path) for path in sorted((FOLDER / section).glob("*.yaml"), key=_size_and_name)]


def _size_and_name(path: Path) -> tuple[int, str]:
    size = SIZE.search(path.stem)
    return int(size[1]) * {"m": 1, "b": 1000}[size[2]] if size else 0, path.stem


def find_preset(section: str, name: str, *, key: str = "") -> Preset:
    """One by its name. Raises ConfigError, with near names."""
    found = {preset.path.stem: preset for preset in presets_of(section)}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=3) or found
        raise ConfigError(f"{key or section}: {name!r} given; no preset is called so; allowed: {', '.join(near)}")
    return found[name]


def chosen(override: str) -> Preset | None:
    """The preset that `SECTION=NAME` chooses; None for any other override. Raises ConfigError."""
    choice = CHOICE.fullmatch(override)
    return find_preset(choice[1], choice[2]) if choice else None


def spread(layer: Any) -> list[Any]:
    """The presets that a file names, in that order, and the file itself above them. Raises ConfigError."""
    if not isinstance(layer, DictConfig) or KEY not in layer:
        return [layer]
    layer = layer.copy()
    names = layer.pop(KEY)
    found = [chosen(str(name)) for name in names] if OmegaConf.is_list(names) else [None]
    if None in found:
        allowed = "a list of SECTION=NAME, such as [outer=recommended]; atoll presets lists them"
        raise ConfigError(f"{KEY}: {names} given; allowed: {allowed}")
    return [*found, layer]
