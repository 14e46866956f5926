"""Three members of a federation, whose keys everybody knows."""

from functools import cache
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pretrain.exchange.channel import Credentials
from pretrain.trust.keys import PrivateKey
from pretrain.trust.members import Members

ROSTER = ["alpha", "beta", "gamma"]


@cache
def private_key(name: str) -> PrivateKey:
    """Always the same of a name, in other processes, too."""
    seed = sha256(name.encode()).digest()
    signing, agreement = Ed25519PrivateKey.from_private_bytes(seed), X25519PrivateKey.from_private_bytes(seed)
    return PrivateKey(name=name, signing=signing, agreement=agreement)


def members(signer: str, *, of: str = "") -> Members:
    """The roster; who signs does so with its own key, or with that `of` somebody else."""
    return Members(keys={name: private_key(name).public for name in ROSTER}, signer=private_key(of or signer))


def credentials(silo: str, *, keys: bool = True, of: str = "", run: str = "tiny", lane: int = 0) -> Credentials:
    """What a silo's process shows; without `keys` nothing is signed or encrypted."""
    return Credentials(members(silo, of=of) if keys else Members(), run=run, silo=silo, lane=lane)
