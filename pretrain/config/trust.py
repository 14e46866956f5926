"""Keys of signatures, and of what may leave. Imports no torch."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class TrustConfig:
    """Who signs what is written into a store, whom the silos of a collective talk to, and what may leave."""

    keys: dict[str, str] = field(default_factory=dict)
    """Public key of every silo of the roster and, unless in a collective, of `aggregator`, as `atoll keys new` says it;
    part of the contract. Empty: nothing is signed, but by a launch of all silos, which makes the keys itself."""
    added: dict[str, str] = field(default_factory=dict)
    """Silos that an amendment of the contract has added, and the public key of each: `atoll launch join` writes its own
    here. No part of the contract."""
    keep_deliveries: int = 0
    """Of so many of the newest versions the operator keeps all deliveries, for `atoll verify` to merge them again; part
    of the contract. `exchange.keep_versions` may be more."""
    archive: str = ""
    """URL or directory, reached as the store is, where the aggregator copies what it is about to prune, and where this
    machine's commands look for what the store no longer has; empty: what is pruned is gone."""
    amend: str = "all"
    """Silos that have to sign an amendment of the contract: all, or a number of them; part of the contract."""
    directory: str = ""
    """Where this machine has the private keys, NAME.key; empty: `keys` inside the run directory."""
    key_command: list[str] = field(default_factory=list)
    """What signs instead of a private key: a program and its arguments, told which key in ATOLL_KEY; NAME.key then has
    the public line alone."""
    seal: bool = False
    """Seal every delivery for the aggregator's operator, and every version for the members: whoever keeps the store
    sees sizes and records only. Needs `keys`; part of the contract."""
    metrics: dict[str, str] = field(
        default_factory=lambda: {
            "loss": "public",
            "held_out": "public",
            "pseudo_gradient_norm": "public",
            "seconds_per_step": "public",
            "tokens": "public",
            "epochs": "public",
        }
    )
    """Who may see what a silo tells of its training: member (nobody else: it is not in the store), consortium (in the
    store, and not in Weights & Biases) or public (wherever it is shown); part of the contract."""
    software: str = "recorded"
    """recorded: who has other versions than the contract names is told so; exact: it does not take part. Part of the
    contract."""
    policy: str = ""
    """A file of this site's own, which says what may leave its silos and wins over the contract; empty: what the
    contract asks for."""
