"""Which versions of atoll and of what it computes with are installed. No torch."""

from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import islice

from pretrain.host.foreign import shown

VERSION = "0.1.0"
PACKAGES = ("torch", "transformers", "deepspeed", "tokenizers", "numpy", "numba")
NAMED = 16  # of another party's packages; more than anybody records


def installed() -> dict[str, str]:
    """Package to version, atoll's own first; a package that is missing here is not in it."""
    found = {"atoll": VERSION}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def minor(version: str) -> str:
    """2.9 of 2.9.1+cu128: what must be equal of atoll, and is pointed out of all else."""
    return ".".join(version.split(".")[:2])


def differences(theirs: Mapping[str, str]) -> list[str]:
    """What of `installed` differs by more than a patch from another party's, a line each."""
    ours = installed()
    return [
        f"{shown(package, limit=40)} {ours.get(package, 'none')} here, {shown(there, limit=40)} there: the models may "
        "differ in their last bits"
        for package, there in islice(theirs.items(), NAMED)
        if minor(ours.get(package, "none")) != minor(there)
    ]
