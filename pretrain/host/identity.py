"""How a store tells a silo that was restarted from another one of the same name: by its run directory. No torch."""

import json
import uuid
from pathlib import Path

from pretrain.config.errors import ConfigError
from pretrain.host.disk import to_disk
from pretrain.host.foreign import loads

FILE = "identity.json"


def own_identity(directory: Path) -> str:
    """A name for a silo's run directory, made once."""
    if not (known := known_identity(directory)):
        known, temporary = uuid.uuid4().hex, directory / f"{FILE}.tmp"
        directory.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"identity": known}))
        to_disk(temporary)  # what is on record elsewhere must not be lost here
        temporary.replace(directory / FILE)
        to_disk(directory)
    return known


def known_identity(directory: Path) -> str:
    """The same; empty if none was made yet. Raises ConfigError if its file is damaged."""
    file = directory / FILE
    try:
        return str(loads(file.read_bytes())["identity"])
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f'run directory: {str(file)!r} is damaged; it should say {{"identity": ...}} as silos/NAME/{FILE} in the '
            "store does: copy it from there"
        ) from None
