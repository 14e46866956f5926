"""Whether a run directory's disk has room for what a process is going to keep there, said before anything is written.

Of a store nothing is asked: it is another machine's, or becomes free again, and what does not fit is tried again.
"""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig

if TYPE_CHECKING:
    from pretrain.plan.bytes import Shapes


def check_room(config: RunConfig, num_bytes: int, what: str, other_way: str = "") -> int:
    """Free bytes where the run directory is, or will be. Raises ConfigError if they are too few for `what`; the other
    way is what could be changed instead.
    """
    directory = Path(config.directory).absolute()
    there = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise ConfigError(
            f"directory: {config.directory!r} given; {what} needs {num_bytes / 1e9:,.3f} GB there, and "
            f"{free / 1e9:,.3f} GB are free; "
            + (f"make room, name another directory, or {other_way}" if other_way else "make room, or name another one")
        )
    return free


def check_silo_room(config: RunConfig, silo: str, num_bytes: int) -> int:
    """`check_room` for what a silo keeps."""
    return check_room(config, num_bytes, f"silo {silo}", "lower silo.keep_checkpoints")


def check_silo_disk(config: RunConfig, silo: str) -> None:
    """Room for what a silo is going to keep. Raises ConfigError."""
    from pretrain.plan.bytes import model_shapes, vocabulary

    check_silo_room(config, silo, silo_disk_bytes(config, silo, model_shapes(config, vocabulary(config))))


def silo_disk_bytes(config: RunConfig, silo: str, shapes: "Shapes") -> int:
    """What a silo's directory will still take, at most; the manifests and logs beside it are small."""
    from pretrain.outer.codec import FEEDBACK_DECAY
    from pretrain.plan.memory import moments_bytes

    settings, outer = config.silos[silo], config.outer
    whole = 4 * sum(shape.numel() for shape in shapes.values())
    decay = FEEDBACK_DECAY[outer.codec] if outer.error_feedback is None else outer.error_feedback
    host = whole * (2 if decay else 1)
    checkpoint = whole + moments_bytes(config, shapes) + host
    in_flight = 3 * whole  # on their way out and in, and the local parameters during an evaluation
    in_flight += whole if config.trust.seal else 0  # what goes out, once more
    present = sum(file.stat().st_size for file in config.silo_directory(silo).rglob("*") if file.is_file())
    written = math.ceil(config.inner.num_steps / settings.checkpoint_interval_steps)
    most = min(settings.keep_checkpoints + 1, written)  # one more while it is written
    return max(0, checkpoint * most + in_flight - present)


def check_aggregator_room(config: RunConfig, *, is_new: bool) -> None:
    """Room for the outer state, if it is to be on disk, and for what comes and goes. Raises ConfigError.

    `is_new`: there is no version 0 yet. It is larger than any later version, and where the store is in the run
    directory, it comes to lie there, too.
    """
    from pretrain.plan.bytes import model_shapes, vocabulary
    from pretrain.plan.memory import parameters_bytes, scratch_bytes, state_disk_bytes

    shapes = model_shapes(config, vocabulary(config))
    num_bytes = state_disk_bytes(config, shapes) + scratch_bytes(config, shapes, is_new=is_new)
    if is_new and not config.exchange.url:
        num_bytes += parameters_bytes(shapes)
    if config.trust.seal:  # what is written lies there sealed and open for a moment
        num_bytes += parameters_bytes(shapes)
    on_disk = config.outer.state == "disk"
    what = "the aggregator, with its outer state on disk," if on_disk else "the aggregator"
    check_room(config, num_bytes, what, "take outer.state=memory" if on_disk else "")
