"""A payload: one safetensors file with the coded tensors of a fragment.

A tensor's parts lie under KIND/PART/NAME: its kind is part of the key, so that moments travel beside parameters. Only
the header and the tensors that are asked for are read.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.exchange.history import Made
from pretrain.exchange.sealed import fetch_version
from pretrain.exchange.store import StoreExchange, version_path
from pretrain.outer.blocks import Adopted, adopt, check_coded
from pretrain.outer.digest import digest_tensors
from pretrain.outer.moments import MOMENT
from pretrain.outer.quantize import Parts
from pretrain.trust.ledger import Payload, RefusedError

PARAMETER = "parameter"  # a kind, and the beginning of a file name
NAMES = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16", torch.uint8: "U8"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
LAYOUTS = 64  # that are remembered: each kind of payload has one, and whoever delivers may send any
Place = tuple[int, int, torch.dtype, list[int]]  # first byte of the file, the one behind the last; dtype, shape
BLOCK_BYTES = 1 << 18  # what is hashed and written at a time lies in the processor's cache


def save_tensors(
    coded: Mapping[str, Parts],
    file: Path,
    kind: str = PARAMETER,
    *,
    fragment: int = 0,
    moments: Mapping[str, Parts] | None = None,
) -> Payload:
    """Write the parts of named tensors, and moments beside them, to a new file; hashes what it writes.

    The bytes are those of safetensors' own `save_file`. Whoever has an older file of the name open keeps that.
    """
    kinds = {kind: coded, MOMENT: moments or {}}
    tensors = {
        f"{kind}/{part}/{name}": value
        for kind, tensors in kinds.items()
        for name, parts in tensors.items()
        for part, value in parts.items()
    }
    digest = blake3()
    num_bytes = _write_file(tensors, file, digest.update)
    return Payload(fragment=fragment, file=file.name, blake3=digest.hexdigest(), num_bytes=num_bytes)


def keep_tensors(values: Mapping[str, Tensor], file: Path, kind: str) -> None:
    """Write named tensors to a file of our own, whose hash nobody is told.

    What is there already is written over, which takes half the time of a new file: the system has its pages in hand.
    """
    tensors = {f"{kind}/values/{name}": value for name, value in values.items()}
    _write_file(tensors, file, lambda block: None, over=file.is_file())


def _write_file(
    tensors: Mapping[str, Tensor], file: Path, hear: Callable[[memoryview | bytes], object], *, over: bool = False
) -> int:
    """Write tensors by key; all that is written is heard, block by block. Returns the number of bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not over:
        file.unlink(missing_ok=True)
    words = header({key: (value.dtype, list(value.shape)) for key, value in tensors.items()})
    with file.open("r+b" if over else "xb", buffering=0) as opened:
        hear(words)
        _write(opened, memoryview(words))
        for key in in_order({key: value.dtype for key, value in tensors.items()}):
            flat = tensors[key].detach().contiguous().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(flat), BLOCK_BYTES):
                block = flat[start : start + BLOCK_BYTES]
                hear(block)
                _write(opened, block)
        opened.truncate()
        return opened.tell()


def _write(opened: FileIO, block: memoryview) -> None:
    """All of it: a disk that gets full writes a part, and says so at the next try."""
    while len(block):
        block = block[opened.write(block) :]


def in_order(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Keys as they lie in a file: wide types first, then by name."""
    return sorted(dtypes, key=lambda key: (-dtypes[key].itemsize, key))


def header(layout: Mapping[str, tuple[torch.dtype, list[int]]]) -> bytes:
    """What a file begins with, from dtype and shape of each key.

    Eight bytes, and JSON padded to eight: https://github.com/huggingface/safetensors#format
    """
    words, offset = {}, 0
    for key in in_order({key: dtype for key, (dtype, _) in layout.items()}):
        dtype, shape = layout[key]
        end = offset + dtype.itemsize * math.prod(shape)
        words[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(words, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where a payload's tensors lie: the same object for all files of one header."""

    num_bytes: int
    """Of the file."""
    parts: Mapping[str, Mapping[str, Place]]
    """By tensor and part."""
    moments: Mapping[str, Mapping[str, Place]]


_layouts: dict[tuple[bytes, int, str], _Layout] = {}  # by header, size of the file, and kind


def _layout(file: Path, kind: str) -> _Layout:
    """What the library finds in a file's header; of many silos' payloads, which have one header, it is asked once."""
    with file.open("rb") as opened:
        start = opened.read(8)
        words = opened.read(min(int.from_bytes(start, "little"), num_bytes := file.stat().st_size))
    known = words, num_bytes, kind
    if (found := _layouts.get(known)) is None:
        if len(_layouts) >= LAYOUTS:
            _layouts.clear()
        found = _layouts[known] = _read_layout(file, kind, len(start) + len(words), num_bytes)
    return found


def _read_layout(file: Path, kind: str, offset: int, num_bytes: int) -> _Layout:
    opened: Any = safe_open(file, framework="pt")  # refuses gaps and overlaps, and sizes that do not fit
    places: dict[str, Place] = {}
    for key in opened.offset_keys():
        words = opened.get_slice(key)
        dtype, shape = DTYPES.get(words.get_dtype()), words.get_shape()
        if dtype is None:
            raise ValueError(f"key {key!r}: dtype {words.get_dtype()} given; allowed: {', '.join(DTYPES)}")
        if offset % dtype.itemsize:
            raise ValueError(f"key {key!r} lies at byte {offset}; allowed: multiples of {dtype.itemsize}")
        end = offset + dtype.itemsize * math.prod(shape)
        places[key] = offset, end, dtype, shape
        offset = end
    parts: dict[str, dict[str, Place]] = {}
    moments: dict[str, dict[str, Place]] = {}
    for key, place in sorted(places.items()):
        found, part, name = [*key.split("/", 2), "", ""][:3]
        if found not in (kind, MOMENT) or not part or not name:
            raise ValueError(f"key {key!r} given; allowed: {kind}/PART/NAME")
        (parts if found == kind else moments).setdefault(name, {})[part] = place
    return _Layout(num_bytes=num_bytes, parts=parts, moments=moments)


class Tensors:
    """An open payload. Raises safetensors' SafetensorError when the file is none, ValueError for a foreign key."""

    def __init__(self, file: Path, kind: str = PARAMETER) -> None:
        self._layout = _layout(file, kind)
        # Mapped, without a file that stays open: there may be a thousand of them.
        self._bytes = torch.from_file(str(file), shared=False, size=self._layout.num_bytes, dtype=torch.uint8)

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self._layout.parts)

    def parts(self, name: str) -> Parts:
        """The parts of one tensor."""
        return _at(self._bytes, self._layout.parts[name])

    @property
    def moments(self) -> Mapping[str, Parts]:
        """Moments by name of their parameter; each is read when it is asked for."""
        return _Moments(self._bytes, self._layout.moments)


def _at(whole: Tensor, places: Mapping[str, Place]) -> Parts:
    return {part: whole[start:end].view(dtype).view(shape) for part, (start, end, dtype, shape) in places.items()}


class Held:
    """What a payload would have, in memory."""

    def __init__(self, coded: Mapping[str, Parts], moments: Mapping[str, Parts]) -> None:
        self._coded, self.moments = coded, moments
        self.is_written = False

    def parts(self, name: str) -> Parts:
        """The parts of one tensor."""
        return self._coded[name]

    def describe(self, file: Path, fragment: int) -> Payload:
        """What is told of it where no file travels: the digest of its tensors in place of a file's hash."""
        tensors = [(f"{name}/{part}", t) for name, parts in self._coded.items() for part, t in parts.items()]
        moments = [(f"{MOMENT}/{name}/{part}", t) for name, of in self.moments.items() for part, t in of.items()]
        num_bytes = sum(tensor.nbytes for _, tensor in tensors + moments)
        digest = digest_tensors(tensors + moments)
        return Payload(fragment=fragment, file=file.name, blake3=digest, num_bytes=num_bytes)

    def write(self, file: Path, fragment: int) -> None:
        """Write the payload, once."""
        if not self.is_written:
            save_tensors(self._coded, file, fragment=fragment, moments=self.moments)
            self.is_written = True


class _Moments(Mapping[str, Parts]):
    def __init__(self, whole: Tensor, places: Mapping[str, Mapping[str, Place]]) -> None:
        self._bytes, self._places = whole, places

    def __getitem__(self, name: str) -> Parts:
        return _at(self._bytes, self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def changed_tensors(payload: Tensors, codec: str, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a payload makes of the tensors in `base`, which are left as they are; of none, what it holds itself.

    Raises RefusedError if it changes others, or is of another codec or shape.
    """
    values: dict[str, Tensor] = {}
    for name in payload.names if not base else ():
        parts = payload.parts(name)
        if parts.keys() != {"values"}:
            raise RefusedError(f"{name}: it does not hold the tensor itself")
        values[name] = parts["values"].clone()
    if base and payload.names != sorted(base):
        raise RefusedError("it changes other tensors than those of its fragment")
    changes = {}
    for name, before in base.items():
        parts = payload.parts(name)
        try:
            check_coded(codec, parts, before.shape)
        except ValueError as error:
            raise RefusedError(f"{name}: {error}") from None
        changes[name] = Adopted(published=before, parts=parts, new=torch.empty_like(before))
    adopt(codec, list(changes.values()), torch.get_num_threads())
    return values | {name: change.new for name, change in changes.items()}


def read_parameters(
    exchange: StoreExchange, made: Sequence[Made], scratch: Path, base: Mapping[str, Tensor] = MappingProxyType({})
) -> dict[str, Tensor]:
    """A fragment's parameters from what they are made of (`History.parameters`), downloaded into the folder `scratch`.

    `base` has what they are made of where `made` begins with a change. Raises RefusedError for what is not as it
    should be, and whose it is.
    """
    values: dict[str, Tensor] = {}
    for version, payload, codec in made:
        file = scratch / f"{version:06d}-{payload.file}"
        fetch_version(exchange, version, payload, file)
        try:
            tensors = Tensors(file)
            before = (values or {name: base[name] for name in tensors.names if name in base}) if codec else {}
            if codec and not before:
                raise RefusedError("it changes other tensors than those of its fragment")
            values = changed_tensors(tensors, codec, before)
        except (RefusedError, SafetensorError, ValueError) as error:
            raise RefusedError(f"{version_path(version)}/{payload.file}: {error}") from None
        finally:
            file.unlink()
    return values
