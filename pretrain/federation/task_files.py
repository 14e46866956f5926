"""Tasks of lm-evaluation-harness as files of this machine: found, checked and hashed before any of them is run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config.errors import ConfigError, named
from pretrain.silo.shards import file_sha256

LOCAL = ("json", "csv", "parquet", "text", "arrow")  # builders of `datasets` that read files


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """One task."""

    name: str
    """As its file says."""
    file: Path
    """Its YAML file."""
    spec: dict[str, Any]
    """As the library takes it, with its data named from the root on."""
    sha256: str | None
    """Of all that decides about it: the file with what it includes, the Python that it names, its data. None: its data
    are no files, so nobody can say whether they are the same."""


def find_tasks(given: Sequence[str], include_path: Path | None, *, network: bool = False) -> list[TaskFile]:
    """Tasks by their YAML files, or by the names of tasks, groups and tags below `include_path`; a group is its tasks.

    Nothing of a file is run until all have been looked at. Without `network` their data have to be on this machine.
    Raises ConfigError.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if include_path and not include_path.is_dir():
        raise ConfigError(f"--include-path: {str(include_path)!r} given; allowed: a folder of tasks (YAML files)")
    files = [file for one in given for file in _files_of(one, include_path)]
    plain = [_read(file) for file in files]
    names = [spec["task"] for spec in plain]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--tasks: two files given for the task {twice[0]!r}; allowed: one")
    placed = [_with_data(spec, file, network=network) for spec, file in zip(plain, files, strict=True)]
    found = []
    for name, file, spec in zip(names, files, placed, strict=True):
        try:
            runnable = load_yaml(file, resolve_func=True)
        except Exception as error:  # of Python that the file names
            raise ConfigError(f"--tasks: {str(file)!r} given; {error}") from None
        runnable |= {"dataset_kwargs": spec["dataset_kwargs"]} if "dataset_kwargs" in spec else {}
        found.append(TaskFile(name=name, file=file, spec=runnable, sha256=_sha256(spec)))
    return found


def _files_of(given: str, include_path: Path | None) -> list[Path]:
    """The YAML files of what was given. Raises ConfigError for a name that is not there."""
    if include_path is None or Path(given).is_file():
        return [Path(given)]
    from lm_eval.tasks._index import TaskIndex

    index: dict[str, Any] = TaskIndex.build([include_path])
    if given not in index:
        known = named(sorted(index)) if index else "none, as no task is there"
        raise ConfigError(f"--tasks: {given!r} given; allowed of --include-path {str(include_path)!r}: {known}")
    files: list[Path] = []
    left, seen = [given], set[str]()
    while left:
        name = left.pop(0)
        entry = index.get(name) if isinstance(name, str) else None
        members = [] if entry is None else [*(entry.tags or (entry.cfg or {}).get("task") or ())]
        is_task = entry is not None and entry.kind.name == "TASK"
        if entry is None or not (is_task or members) or isinstance((entry.cfg or {}).get("task"), dict):
            raise ConfigError(
                f"--tasks: {given!r} given; {str(name)!r} of it is no task of --include-path {str(include_path)!r}; "
                "allowed: a task, or a group or tag of tasks that are named there"
            )
        if is_task:
            files.append(entry.yaml_path)
        elif name not in seen:
            left += sorted(members) if entry.tags else members
        seen.add(name)
    return list(dict.fromkeys(files))


def _read(path: Path) -> dict[str, Any]:
    """A task's file with what it includes, its functions by their names. Raises ConfigError."""
    from lm_eval.tasks._yaml_loader import load_yaml

    key = f"--tasks: {str(path)!r} given"
    if not path.is_file():
        allowed = "a YAML file of lm-evaluation-harness, or with --include-path the name of a task"
        raise ConfigError(f"{key}; there is no such file; allowed: {allowed}")
    try:
        spec = load_yaml(path, resolve_func=False)
    except Exception as error:  # of a YAML parser, and of what it includes
        raise ConfigError(f"{key}; {error}") from None
    if not isinstance(spec.get("task"), str):
        raise ConfigError(f"{key}; it has no `task: NAME`")
    return spec


def _with_data(spec: dict[str, Any], path: Path, *, network: bool) -> dict[str, Any]:
    """The same with its data named from the root on. Raises ConfigError unless they are on this machine."""
    key, options = f"--tasks: {str(path)!r} given", spec.get("dataset_kwargs") or {}
    if spec.get("dataset_path") in LOCAL and options.get("data_files"):
        return spec | {"dataset_kwargs": options | {"data_files": _placed(options["data_files"], path, key)}}
    if network:
        return spec
    raise ConfigError(
        f"{key}; its dataset_path is {spec.get('dataset_path')!r}; allowed: {', '.join(LOCAL)}, with "
        "dataset_kwargs.data_files of this machine, or --network"
    )


def _placed(files: Any, path: Path, key: str) -> Any:
    if isinstance(files, dict):
        return {split: _placed(file, path, key) for split, file in files.items()}
    if isinstance(files, list):
        return [_placed(file, path, key) for file in files]
    place = path.absolute().parent / str(files)
    if not place.is_file():
        raise ConfigError(f"{key}; its data file {str(place)!r} is not there; allowed: files of this machine")
    return str(place)


def _sha256(spec: dict[str, Any]) -> str | None:
    """Of a task with its data placed; wherever its files lie."""
    if spec.get("dataset_path") not in LOCAL or not (spec.get("dataset_kwargs") or {}).get("data_files"):
        return None
    text = json.dumps(_hashed(spec), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _hashed(value: Any) -> Any:
    """With the hash of each file in place of its name."""
    if isinstance(value, dict):
        return {str(key): _hashed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_hashed(inner) for inner in value]
    if not isinstance(value, str) or not value.startswith("/"):
        return value
    module, _, function = value.rpartition(".")
    if Path(f"{module}.py").is_file():  # a !function
        return [file_sha256(Path(f"{module}.py")), function]
    return [file_sha256(Path(value))] if Path(value).is_file() else value
