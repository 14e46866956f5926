"""What the kernel says of a process's memory."""

from pathlib import Path


def status_bytes(process: int | str = "self") -> dict[str, int]:
    """Its sizes by name, as RssAnon, RssFile and VmHWM (https://man7.org/linux/man-pages/man5/proc_pid_status.5.html).

    Empty once it is gone.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}
