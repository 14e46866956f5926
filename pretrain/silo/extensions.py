"""DeepSpeed's C++ extensions, built at their first use: no process that dies while it builds may stop later ones.

torch guards a build with a file that its maker removes; after a SIGKILL the file stays, and every later start waits for
ever. Here a lock that the kernel drops with its holder goes around the build, in a folder that only Atoll builds in.
"""

import fcntl
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ninja
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root

from pretrain.config.errors import ConfigError


def load_extension(builder_name: str, waits_for: Callable[[str], None] = lambda what: None) -> None:
    """Build and load an extension before DeepSpeed asks for it, by the name of its builder; nothing if it has none
    for this accelerator.

    The first process of a machine to need one takes minutes for it, and prints so; whoever waits for it says for what.
    """
    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not builder.is_compatible():
        return
    directory = _directory()
    library = directory / builder.name / f"{builder.name}.so"
    if not library.exists():
        waits_for(f"DeepSpeed's extension {builder.name} to be compiled, once on this machine")
    with building():
        if not library.exists():
            print(
                f"DeepSpeed's extension {builder.name} is compiled into {directory}: it takes a minute or more, and is "
                "kept for all later starts",
                flush=True,
            )
        builder.load()


def _directory() -> Path:
    environment = f"torch{torch.__version__}-{zlib.crc32(f'{sys.prefix} {ninja.__version__}'.encode()):08x}"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / f"atoll-{environment}"


@contextmanager
def building() -> Iterator[Path]:
    """The only process that builds, in the folder that it yields; what a dead one left behind no longer counts.

    The folder lies in TORCH_EXTENSIONS_DIR, if that is set, or else where torch builds by default. Each environment has
    its own: ninja builds again whatever another one, whose headers lie elsewhere, has built. It also builds all again
    that another version of ninja has built, so it is always the environment's own, whatever comes first on PATH.
    """
    directory = _directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"TORCH_EXTENSIONS_DIR: {str(directory.parent)!r} given; {error.strerror}; allowed: a folder that can be "
            "written"
        ) from None
    with (directory / "building").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_behind in directory.glob("*/lock"):
            left_behind.unlink()
        before = {name: os.environ.get(name) for name in ("TORCH_EXTENSIONS_DIR", "PATH")}
        os.environ["TORCH_EXTENSIONS_DIR"] = str(directory)
        os.environ["PATH"] = os.pathsep.join(filter(None, (ninja.BIN_DIR, before["PATH"])))
        try:
            yield directory
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
