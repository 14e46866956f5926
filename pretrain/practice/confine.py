"""What a process may no longer do, as far as the kernel allows: namespaces, Landlock, limits. No package but ctypes.

Each function says whether the kernel has agreed; nothing here raises for a kernel that has not.
"""

import ctypes
import os
import resource
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MOUNT_PRIVATE, NO_SUID, NO_DEVICES = 1 << 18 | 1 << 14, 2, 4
PARENT_DIES, NO_NEW_PRIVILEGES, DROP_BOUND, SUBREAPER = 1, 38, 24, 36
# Landlock's system calls have the same numbers on every architecture; its rights are bits of <linux/landlock.h>.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
# All that changes a file system, by the version that has brought it: the first, REFER, TRUNCATE.
CHANGES = (WRITE_FILE | sum(1 << bit for bit in range(4, 13)), 1 << 13, TRUNCATE)
TCP, OUTSIDERS = 0b11, 0b11  # bind and connect; abstract sockets of others, and signals to them
FREE_FILES = ("/dev/null", "/dev/zero", "/dev/full")
MOST_PROCESSES, MOST_FILES = 128, 256

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> bool:
    """Leave the namespaces that are shared with others."""
    return bool(_libc.unshare(flags) == 0)


def own_users() -> bool:
    """A user namespace, in which this process may make the other kinds, and outside of which it may do less."""
    user, group = os.geteuid(), os.getegid()
    if not unshare(NEW_USER):
        return False
    with suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def own_scratch(directory: str, num_bytes: int) -> bool:
    """A file system in memory at a directory, which nobody else sees and which has room for so many bytes."""
    if not unshare(NEW_MOUNTS) or _libc.mount(b"none", b"/", None, MOUNT_PRIVATE, None) != 0:
        return False
    options = f"size={num_bytes},nr_inodes=4096,mode=700".encode()
    return bool(_libc.mount(b"tmpfs", directory.encode(), b"tmpfs", NO_SUID | NO_DEVICES, options) == 0)


def collect_orphans() -> None:
    """What a child has started and left behind becomes a child of this process."""
    _libc.prctl(SUBREAPER, 1, 0, 0, 0)


def dies_with_parent(number: int) -> None:
    """The signal that this process gets when its parent ends."""
    _libc.prctl(PARENT_DIES, number, 0, 0, 0)


def drop_privileges() -> None:
    """No capability, also not of a user namespace, and none to be had by running a program."""
    for capability in range(64):
        _libc.prctl(DROP_BOUND, capability, 0, 0, 0)
    header = struct.pack("=Ii", 0x20080522, 0)
    _libc.capset(header, bytes(24))
    _libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def landlock_version() -> int:
    """Of this kernel; 0: it has none."""
    return max(0, int(_libc.syscall(CREATE_RULESET, None, 0, 1)))


def only_writes_to(directory: str, *, network: bool) -> int:
    """Landlock, after `drop_privileges`: writes only below a directory, TCP only if allowed, no signal to outsiders.

    Returns Landlock's version: from 4 on it holds TCP, from 6 on signals; 0: nothing is held.
    """
    version = landlock_version()
    if not version:
        return 0
    rights = sum(CHANGES[:version])
    fields = [rights, 0 if network or version < 4 else TCP, OUTSIDERS if version >= 6 else 0]
    size = 8 * (1 if version < 4 else 2 if version < 6 else 3)
    attributes = struct.pack("=QQQ", *fields)[:size]
    ruleset = int(_libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0))
    if ruleset < 0:
        return 0
    files = [(name, rights & (WRITE_FILE | TRUNCATE)) for name in FREE_FILES if os.path.exists(name)]
    held = all(_allow(ruleset, path, allowed) for path, allowed in [(directory, rights), *files])
    held = held and _libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return version if held else 0


def _allow(ruleset: int, path: str, rights: int) -> bool:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return bool(_libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, opened), 0) == 0)
    finally:
        os.close(opened)


def limit(*, seconds: int, memory_bytes: int, file_bytes: int, has_own_users: bool) -> None:
    """Processor time, memory and size of each file; where users are our own, processes, which else are all of a user's.

    Nothing dumps its memory to disk.
    """
    kinds: Iterable[tuple[int, int]] = (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, MOST_FILES),
        *(((resource.RLIMIT_NPROC, MOST_PROCESSES),) if has_own_users else ()),
    )
    for kind, most in kinds:
        _, hard = resource.getrlimit(kind)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (allowed, allowed))
