"""Which files of a `transformers` directory are loaded, and that each is whole. Reads headers only; no torch."""

import json
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from pretrain.config.errors import ConfigError
from pretrain.host.foreign import loads, shown

ADAPTER = "adapter_config.json"  # by which a directory of peft is known
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Keys of config.json that make transformers load something else than the weights as they are.
NOT_LOADED = {
    "quantization_config": "a model whose weights are not quantised",
    "transformers_weights": f"weights named {SINGLE}, or by {INDEX}",
}
LFS_POINTER = b"version https://git-lfs"


def checkpoint_files(directory: Path, *, key: str = "model.checkpoint") -> list[Path]:
    """What a model of `directory` is made of: config.json, the index if there is one, and the weights.

    The same that transformers loads, and no more. Raises ConfigError, naming `key`, unless all are there and whole.
    """
    given = directory / CONFIG
    if not given.is_file():
        _refuse(key, directory, f"there is no {CONFIG} in it; allowed: a directory with {CONFIG} and *.safetensors")
    settings = _read_object(given, key)
    for name, allowed in NOT_LOADED.items():
        if settings.get(name) is not None:
            _refuse(key, directory, f"its {CONFIG} has {name}; allowed: {allowed}")
    if (directory / ADAPTER).exists():
        _refuse(key, directory, "it holds an adapter; allowed: a whole model, with the adapter merged into it")
    if (directory / SINGLE).is_file():
        files = [given, directory / SINGLE]
    elif (directory / INDEX).is_file():
        files = [given, directory / INDEX, *_shards(directory, key)]
    else:
        _refuse(
            key,
            directory,
            f"there is no {SINGLE} or {INDEX} in it; allowed: a directory with {CONFIG} and *.safetensors",
        )
    for file in files:
        if file.suffix == ".safetensors":
            tensors_of(file, key=key)
    return files


def _shards(directory: Path, key: str) -> list[Path]:
    names = _read_object(directory / INDEX, key).get("weight_map")
    if not isinstance(names, dict) or not names:
        _refuse(key, directory, f"its {INDEX} has no weight_map; fetch it again")
    shards = sorted({str(name) for name in names.values()})
    outside = [name for name in shards if Path(name).name != name or not name.endswith(".safetensors")]
    if outside:
        _refuse(key, directory, f"its {INDEX} names {shown(outside[0])!r}; allowed: *.safetensors beside it")
    missing = [name for name in shards if not (directory / name).is_file()]
    if missing:
        _refuse(key, directory, f"{len(missing)} of its {len(shards)} shards are missing: {_few(missing)}; fetch them")
    held = {name for shard in shards for name in tensors_of(directory / shard, key=key)}
    if lacking := sorted(set(names) - held):
        _refuse(key, directory, f"its shards lack {len(lacking)} tensors of {INDEX}: {_few(lacking)}; fetch them again")
    return [directory / name for name in shards]


def tensors_of(file: Path, *, key: str = "model.checkpoint") -> list[str]:
    """Names of the tensors of a file of weights. Raises ConfigError unless its length is what its header says."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        with file.open("rb") as content:
            if content.read(len(LFS_POINTER)) == LFS_POINTER:
                _refuse(key, file.parent, f"{file.name} is a pointer of Git LFS; fetch what it points to: git lfs pull")
        _refuse(key, file.parent, f"{file.name} is damaged or cut ({shown(error)}); fetch it again")


def _read_object(file: Path, key: str) -> dict[str, Any]:
    try:
        found = loads(file.read_bytes())
    except (ValueError, OSError) as error:
        _refuse(key, file.parent, f"{file.name} is no JSON ({shown(error)}); fetch it again")
    if not isinstance(found, dict):
        _refuse(key, file.parent, f"{file.name} is no JSON object: {shown(json.dumps(found))}; fetch it again")
    return found


def _few(names: list[str]) -> str:
    return ", ".join(shown(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _refuse(key: str, directory: Path, why: str) -> NoReturn:
    raise ConfigError(f"{key}: {str(directory)!r} given; {why}")
