"""Loading a configuration: defaults < YAML files in order < `key=value` and presets, every key and type checked."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config.allowed import ALLOWED, Numbers
from pretrain.config.check import check_config
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.config.paths import expand_homes, portable
from pretrain.config.presets import Preset, chosen
from pretrain.config.presets import spread as spread_presets

CONFIG_FILE = "config.yaml"

T = TypeVar("T")
Section = dict[Any, Any]
Prepare = Callable[[Section], None]
_SCHEMAS: dict[type, DictConfig] = {}


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """Merge defaults, YAML files and `key=value` overrides; check every key, type and value.

    Raises ConfigError for anything that a user can have got wrong.
    """
    config = load_unchecked(paths, overrides)
    check_config(config)
    return config


def load_unchecked(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), *, below: Section | None = None
) -> RunConfig:
    """`load_config` without checking the values; `below` is merged before the files. Raises ConfigError."""
    return expand_homes(load_typed(RunConfig, paths, overrides, below=below, prepare=_spread_silo_defaults))


def load_run(directory: Path) -> RunConfig:
    """The configuration of a run from its directory, wherever that is by now. Raises ConfigError."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"run directory: {str(directory)!r} given; there is no {CONFIG_FILE} in it")
    here = {"directory": str(directory.absolute())}
    config = load_typed(RunConfig, [path], above=here, prepare=_spread_silo_defaults)
    check_config(config)
    return config


def load_typed(
    kind: type[T],
    paths: Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    below: Section | None = None,
    above: Section | None = None,
    prepare: Prepare = lambda given: None,
) -> T:
    """Merge defaults, `below`, YAML files, overrides and `above` into a dataclass; check keys and types.

    Raises ConfigError.

    `prepare` changes what was given, in place, before it is typed. A run's configuration may name presets (presets.py).
    """
    files = [_read_yaml(Path(path)) for path in paths]
    _check_data_files(paths, files)
    has_presets = kind is RunConfig
    layers = [layer for file in files for layer in (spread_presets(file) if has_presets else [file])]
    layers += [(has_presets and chosen(override)) or _parsed(override) for override in overrides]
    try:
        merged: Any = OmegaConf.create(below or {})
        for layer in [*layers, above or {}]:
            merged = layer.put_over(merged) if isinstance(layer, Preset) else OmegaConf.merge(merged, layer)
        given = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'configuration'}: {_first_line(error)}") from None
    if not isinstance(given, dict):
        raise ConfigError("configuration: a list given; allowed: a mapping of keys to values")
    _check_keys(given, kind, "")
    prepare(given)
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(_schema(kind), given))
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'configuration'}: {_first_line(error)}") from None
    assert isinstance(typed, kind)
    return typed


def _schema(kind: type) -> DictConfig:
    """A dataclass with its defaults, made once, as that is nearly half of loading; to merge into it copies it."""
    if kind not in _SCHEMAS:
        _SCHEMAS[kind] = OmegaConf.structured(kind)
    return _SCHEMAS[kind]


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to the same values, on any way there.

    Places are named from the root on, and those in the run directory from there (`load_run`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(portable(config))))
    temporary.replace(path)


def _parsed(override: str) -> Any:
    if "=" not in override:
        raise ConfigError(f"command line: {override!r} given; allowed: key=value")
    try:
        return OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"command line: {override!r} given; {_first_line(error)}") from None


def _read_yaml(path: Path) -> Any:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"--config: {str(path)!r} given; there is no such file") from None
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from None
    except AssertionError:  # the library takes a text for YAML once more, and asserts that this is a mapping
        raise ConfigError(f"--config {path}: one value given; allowed: a mapping of keys to values") from None
    return loaded


def _check_data_files(paths: Sequence[str | Path], files: Sequence[Any]) -> None:
    """Refuse several of the files that `atoll data prepare` leaves: each says what every silo trains on."""
    told = [
        path
        for path, given in zip(paths, files, strict=True)
        if isinstance(given, DictConfig) and set(given) == {"silo"} and isinstance(given.silo, DictConfig)
        if "data" in given.silo and set(given.silo) <= {"data", "data_weights", "valid"}
    ]
    if len(told) > 1:
        raise ConfigError(
            f"--config: {told[0]} and {told[1]} given, and each says what every silo trains on; allowed: one of them; "
            "with several silos, put what each file says below silos.NAME instead of silo"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _check_keys(given: dict[Any, Any], schema: type, prefix: str) -> None:
    """Refuse keys that the dataclass `schema` lacks, at any depth, with the nearest allowed one."""
    fields = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in given.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            if places := [] if prefix else _places(str(key)):
                hint = f"; type {' or '.join(f'{place}=...' for place in places)}"
            raise ConfigError(f"{prefix}{key}: unknown key given; allowed: {', '.join(fields)}{hint}")
        kind = fields[key]
        if value is None and type(None) not in get_args(kind):
            raise ConfigError(f"{prefix}{key}: nothing given; allowed: {_allowed(f'{prefix}{key}', kind)}")
        section = kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None
        if section and not isinstance(value, dict | None):
            raise ConfigError(f"{prefix}{key}: {value!r} given; allowed: a section of keys and values")
        if section and value is not None:
            _check_keys(value, section, f"{prefix}{key}.")
        if str(kind).startswith("list") and not isinstance(value, list | None):
            raise ConfigError(f"{prefix}{key}: {value!r} given; allowed: a list: type {prefix}{key}=[{value}]")
        if str(kind).startswith("dict") and not isinstance(value, dict | None):
            raise ConfigError(f"{prefix}{key}: {value!r} given; allowed: a section of keys and values")
        if kind == dict[str, str]:
            for name in [name for name, entry in (value or {}).items() if entry is None]:
                entry = f"{prefix}{key}.{name}"
                raise ConfigError(f"{entry}: nothing given; allowed: {_allowed(entry, str)}")
        named = [of for of in get_args(kind) if isinstance(of, type) and dataclasses.is_dataclass(of)]
        for name, entry in (value or {}).items() if named else ():
            if entry is not None and not isinstance(entry, dict):
                raise ConfigError(f"{key}.{name}: {entry!r} given; allowed: a section of keys and values")
            _check_keys(entry or {}, named[0], f"{key}.{name}.")


def _allowed(key: str, kind: Any) -> str:
    """What a key takes, in words."""
    section, _, name = key.rpartition(".")
    of_key = ALLOWED.get(f"silo.{name}" if section.startswith("silos.") else key)
    if of_key is not None:
        return of_key.words if isinstance(of_key, Numbers) else ", ".join(of_key)
    if str(kind).startswith("list"):
        return f"a list: type {key}=[...]"
    words = {str: f"text: type {key}=...", bool: "true, false", int: "a whole number", float: "a number"}
    return words.get(kind, "a section of keys and values")


def _places(key: str) -> list[str]:
    """The sections of a run's configuration that have a key, with it."""
    found = []
    for field in dataclasses.fields(RunConfig):
        for kind in (field.type, *get_args(field.type)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                of_one = "" if kind is field.type else ".NAME"
                found += [f"{field.name}{of_one}.{key}" for one in dataclasses.fields(kind) if one.name == key]
    return found


def spread(defaults: Section | None, sections: Section | None) -> Section:
    """Named sections, each with the defaults where it does not say otherwise."""
    return {
        str(name): OmegaConf.to_container(OmegaConf.merge(defaults or {}, section or {}))
        for name, section in (sections or {}).items()
    }


def _spread_silo_defaults(given: dict[Any, Any]) -> None:
    """Put the values of `silo` under every silo of the roster that does not say otherwise."""
    given["silos"] = spread(given.get("silo"), given.get("silos"))
