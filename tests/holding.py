"""A file that another process goes on with, for as long as a test looks."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CODE = """
import json, sys
from pathlib import Path
from pretrain.host.done import going_on
with going_on(Path(sys.argv[1]), json.loads(sys.argv[2]), key="--file") as done:
    print(len(done.lines), flush=True)
    sys.stdin.readline()
    done.add({"by": "another"})
"""


@contextmanager
def held_elsewhere(file: Path, of: Mapping[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """The process, which has the file in its hands by then, and adds a line at the end if it still lives."""
    command = [sys.executable, "-c", CODE, str(file), json.dumps(of)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().strip().isdigit()
        yield process
        if process.poll() is None:
            process.communicate("\n")
