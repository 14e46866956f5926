"""DeepSpeed's C++ extensions, built at their first use: no process that dies while it builds may stop later ones.

torch guards a build with a file that its maker removes; after a SIGKILL the file stays, and every later start waits for
ever. Here a lock that the kernel drops with its holder goes around the build, in a folder that only Atoll builds in.
"""

import fcntl
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root


def load_extension(builder_name: str) -> None:
    """Build and load an extension before DeepSpeed asks for it, by the name of its builder; nothing if it has none
    for this accelerator.
    """
    builder = get_accelerator().create_op_builder(builder_name)
    if builder is not None and builder.is_compatible():
        with building():
            builder.load()


@contextmanager
def building() -> Iterator[Path]:
    """The only process that builds, in the folder that it yields; what a dead one left behind no longer counts.

    The folder lies in TORCH_EXTENSIONS_DIR, if that is set, or else where torch builds by default. Each environment has
    its own: ninja builds again whatever another one, whose headers lie elsewhere, has built.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    environment = f"torch{torch.__version__}-{zlib.crc32(sys.prefix.encode()):08x}"
    directory = Path(given or get_default_build_root()) / f"atoll-{environment}"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "building").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_behind in directory.glob("*/lock"):
            left_behind.unlink()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(directory)
        try:
            yield directory
        finally:
            if given is None:
                del os.environ["TORCH_EXTENSIONS_DIR"]
            else:
                os.environ["TORCH_EXTENSIONS_DIR"] = given
