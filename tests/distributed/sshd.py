"""An sshd of a test's own: keys, configuration and port below a folder, and nothing left when the block ends."""

import getpass
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.waiting import wait_for

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
MISSING = "" if SSHD and shutil.which("ssh") else "no sshd here (Debian: apt-get install openssh-server)"
if not shutil.which("setpriv"):
    MISSING = "setpriv not installed (Debian: apt-get install util-linux)"
CONFIGURATION = """
Port {port}
ListenAddress {address}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
PidFile none
StrictModes no
UsePAM no
AllowUsers {user}
PermitRootLogin yes
PasswordAuthentication no
"""


def make_keys(directory: Path) -> Path:
    """A pair for the hosts and one for the user; returns the folder."""
    directory.mkdir()
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True)
    return directory


def ssh_to(keys: Path, port: int) -> str:
    """What `--ssh` takes: as `keys` say, and not as the user's own configuration does."""
    options = ["IdentitiesOnly=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    words = [word for option in options for word in ("-o", option)]
    return shlex.join(["ssh", "-F", "none", "-p", str(port), "-i", str(keys / "key"), *words])


@contextmanager
def sshd(
    keys: Path, address: str, port: int, *, prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Serve at an address; `prefix` starts it elsewhere, `environment` is what its sessions find there."""
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it to be there, whatever its configuration
    text = CONFIGURATION.format(port=port, address=address, directory=keys, user=getpass.getuser())
    if environment:
        text += "SetEnv " + " ".join(f"{name}={value}" for name, value in environment.items()) + "\n"
    file, log = keys / f"{address}.conf", keys / f"{address}.log"
    file.write_text(text)
    with log.open("wb") as errors:
        daemon = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *prefix, str(SSHD), "-D", "-e", "-f", str(file)],
            stderr=errors,
            start_new_session=True,
        )
    try:
        wait_for(
            lambda: b"Server listening" in log.read_bytes(),
            seconds=10,
            meanwhile=lambda: daemon.poll() is None,
            tells=log.read_text,
        )
        yield
    finally:
        family = [psutil.Process(daemon.pid)]
        family += family[0].children(recursive=True)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.wait()
