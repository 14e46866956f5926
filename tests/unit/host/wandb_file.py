"""Reading what Weights & Biases has recorded offline: its .wandb file, a log of LevelDB with protobuf in it."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK_BYTES = 32_768
HEADER_BYTES, RECORD_HEADER_BYTES = 7, 7  # of the file; checksum, length and kind of each piece


def records(file: Path) -> Iterator[Any]:
    """Every record of a .wandb file, in order."""
    data, at, whole = file.read_bytes(), HEADER_BYTES, b""
    while at + RECORD_HEADER_BYTES <= len(data):
        if BLOCK_BYTES - at % BLOCK_BYTES < RECORD_HEADER_BYTES:
            at += BLOCK_BYTES - at % BLOCK_BYTES
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += RECORD_HEADER_BYTES
        whole += data[at : at + length]
        at += length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""


def items(of: Any) -> dict[str, Any]:
    """Names and values of a configuration's or history's update."""
    found = {"/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in of}
    return {name: value for name, value in found.items() if not name.startswith("_")}
