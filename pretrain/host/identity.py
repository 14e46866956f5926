"""How a store tells a silo that was restarted from another one of the same name: by its run directory. No torch."""

import json
import uuid
from pathlib import Path

FILE = "identity.json"


def own_identity(directory: Path) -> str:
    """A name for a silo's run directory, made once."""
    if not (known := known_identity(directory)):
        known, temporary = uuid.uuid4().hex, directory / f"{FILE}.tmp"
        temporary.write_text(json.dumps({"identity": known}))
        temporary.replace(directory / FILE)
    return known


def known_identity(directory: Path) -> str:
    """The same; empty if none was made yet."""
    file = directory / FILE
    return str(json.loads(file.read_text())["identity"]) if file.is_file() else ""
