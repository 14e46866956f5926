"""What can be checked before any process starts: a mistake is found in a second and touches nothing. No torch,
but for the model."""

import errno
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.exchange.options import destination, is_directory, store_options
from pretrain.exchange.signed import CONTRACT
from pretrain.exchange.store import StoreExchange
from pretrain.host.tensorboard import check_tensorboard
from pretrain.host.tracker import server_host
from pretrain.silo.account import plan
from pretrain.silo.reference import check_loss
from pretrain.silo.shards import (
    Manifest,
    check_a_sequence,
    check_alike,
    check_enough,
    check_rows,
    own_tokens,
    read_manifest,
    template_sha256,
    text_sha256,
    tokenizer_sha256,
)
from pretrain.silo.weights import checkpoint_files
from pretrain.trust.contract import build_contract, check_same_contract, other_software
from pretrain.trust.member import check_budget
from pretrain.trust.members import Members, act_as
from pretrain.trust.policy import Policy, read_policy

PROBE = "probe-"


def check_run(config: RunConfig, silos: Sequence[str] | None = None, *, touch: bool = True) -> None:
    """Tokenizer, shards, model, and the store or the collective's port; prints how software differs.

    Of all silos of the configuration, or some. Without `touch` nothing is written on trial. Raises ConfigError.
    """
    for name in config.silos if silos is None else silos:
        check_silo(config, name)
        check_collective(config, name)
    if silos is None and config.gate.places:  # who has none may be no operator; the aggregator looks again
        check_public(config)
    check_model(config)
    announce_store(config)
    for difference in check_store(config, touch=touch):
        print(f"warning: {difference}", flush=True)


def announce_store(config: RunConfig) -> None:
    """Say where a run begins if a URL was given and no run is there: it may be meant to be elsewhere."""
    url = config.exchange.url
    if config.exchange.kind != "store" or not url or not is_directory(url):
        return
    directory = Path(fsspec.core.strip_protocol(url))
    if not (directory / CONTRACT).exists():
        print(f"exchange.url: a new run begins in {directory}, a directory of this machine", flush=True)


def check_policy(config: RunConfig, remote_url: str = "") -> Policy:
    """The site's own policy, which nothing that it is asked for contradicts; `remote_url` is where a relay copies to.

    Raises ConfigError, one line that names both sides.
    """
    policy, kind = read_policy(config), config.exchange.kind
    policy.check_config(config)
    if policy.hosts is not None:
        if remote_url:
            policy.check_place(destination(remote_url, config.exchange.options), "--remote")
        elif kind == "collective":
            policy.check_place(urlsplit(config.exchange.url).hostname or "", "the host of exchange.url")
        elif kind == "store":
            policy.check_place(destination(config.store_url, config.exchange.options), "where exchange.url leads")
        if config.wandb.mode == "online":
            policy.check_place(server_host(), "the server of wandb.mode=online")
    return policy


def check_silo(config: RunConfig, name: str) -> None:
    """Its key, its policy, and its shards: there, whole, packed with the run's tokenizer, and enough for one batch."""
    if config.trust.keys:  # else a local launch makes them
        act_as(Members(), config, name)
    policy = check_policy(config)
    check_budget(config)
    check_tensorboard(config)
    silo, tokenizer = config.silos[name], tokenizer_sha256(config.tokenizer_file)
    template = template_sha256(config.template_file)
    key, prompt_tokens = f"silos.{name}.data", config.model.adapter.prompt_tokens
    if not silo.data:
        raise ConfigError(f"{key}: [] given; allowed: at least one directory of packed shards")

    def read(place: Path, key: str) -> Manifest:
        manifest = read_manifest(place, key=key, tokenizer_sha256=tokenizer, template_sha256=template)
        apart = config.document_masking
        check_rows(manifest, place, config.sequence_tokens, key=key, prompt_tokens=prompt_tokens, keeps_apart=apart)
        check_loss(config, name, place, manifest, key=key)
        return manifest

    manifests = [read(Path(directory), key) for directory in silo.data]
    in_rows = all(manifest.chat for manifest in manifests)
    if silo.data_weights:  # each directory is a corpus of its own
        for directory, manifest in zip(silo.data, manifests, strict=True):
            each, has_rows = f"{key} ({directory})", bool(manifest.chat)
            own = own_tokens(config.sequence_tokens, prompt_tokens, in_rows=has_rows)
            check_a_sequence(manifest.num_tokens, own, key=each, in_rows=has_rows)
    else:
        check_alike(manifests, key=key)
    num_tokens = sum(manifest.num_tokens for manifest in manifests)
    own = own_tokens(config.sequence_tokens, prompt_tokens, in_rows=in_rows)
    check_enough(num_tokens, own, silo.global_batch_sequences, key=key, in_rows=in_rows)
    if silo.is_private:
        plan(config, name, manifests)
        _check_withheld(config, name, policy)
    _check_gate(config, name, policy)
    for corpus, directory in silo.valid.items():
        key, place = f"silos.{name}.valid.{corpus}", Path(directory)
        if not place.exists() and str(place.parent / "train") in silo.data:
            raise ConfigError(
                f"{key}: {directory!r} given; atoll data prepare has held out no document of that text; allowed: a "
                f"packed split, or no silos.{name}.valid: split the text into more documents, or leave the key out"
            )
        read(place, key)


def _check_gate(config: RunConfig, name: str, policy: Policy) -> None:
    """What the contract's gate asks of a silo: that its splits are here, and that it may tell what it finds."""
    valid, corpora = config.silos[name].valid, config.gate.silos.get(name, [])
    if corpora and not policy.allows_metric("held_out"):
        raise ConfigError(
            f"trust.policy: {policy.file} given; it keeps held_out with its silo, and the contract's gate.data asks "
            f"silo {name} for it; change either, or take no part"
        )
    for corpus in corpora:
        key, wanted = f"silos.{name}.valid.{corpus}", config.gate.data[f"{name}/{corpus}"]
        if corpus not in valid:
            raise ConfigError(
                f"{key}: none given, and the contract's gate.data has {name}/{corpus}; allowed: the directory of the "
                f"packed split whose text is {wanted[:12]}"
            )
        check_gate_split(config, Path(valid[corpus]), wanted, key)


def gate_splits(config: RunConfig) -> tuple[dict[str, str], dict[str, str]]:
    """What `gate.data` and `gate.public` would have of a configuration's splits: name to the sha256 of its text.

    Raises ConfigError.
    """
    data = {
        f"{name}/{corpus}": text_sha256(read_manifest(Path(place), key=f"silos.{name}.valid.{corpus}"))
        for name, silo in sorted(config.silos.items())
        for corpus, place in sorted(silo.valid.items())
    }
    places = sorted(config.gate.places.items())
    public = {name: text_sha256(read_manifest(Path(place), key=f"gate.places.{name}")) for name, place in places}
    if not data and not public:
        raise ConfigError("--config: given without silos.NAME.valid and gate.places; allowed: one with held-out splits")
    return data, public


def check_gate_split(config: RunConfig, place: Path, wanted: str, key: str) -> None:
    """A split by which the contract's gate judges is on this disk, and has the text that was agreed.

    Raises ConfigError.
    """
    if not place.is_dir():
        raise ConfigError(
            f"{key}: {str(place)!r} given; it is not on this disk, and the contract's gate judges by it; allowed: the "
            f"directory of the packed split whose text is {wanted[:12]}"
        )
    tokenizer, template = tokenizer_sha256(config.tokenizer_file), template_sha256(config.template_file)
    found = text_sha256(read_manifest(place, key=key, tokenizer_sha256=tokenizer, template_sha256=template))
    if found != wanted:
        raise ConfigError(
            f"{key}: {str(place)!r} given, whose text is {found[:12]}; allowed: the one of the contract's gate, "
            f"{wanted[:12]}"
        )


def check_public(config: RunConfig) -> None:
    """Every public split is on this machine, with the text that the contract names. Raises ConfigError."""
    for name, wanted in config.gate.public.items():
        key = f"gate.places.{name}"
        if name not in config.gate.places:
            raise ConfigError(f"{key}: none given; allowed: the directory of this split of the contract's gate.public")
        check_gate_split(config, Path(config.gate.places[name]), wanted, key)


def _check_withheld(config: RunConfig, name: str, policy: Policy) -> None:
    """Raise ConfigError where a loss of a private silo would leave it: it has no noise."""
    told = [("loss", "step/loss", "training loss", "its manifests")]
    if config.silos[name].valid:
        told.append(("held_out", f"eval/{next(iter(config.silos[name].valid))}", "held-out loss", "its evaluations"))
    for metric, shown, what, told_by in told:
        is_shown = config.wandb.mode != "disabled" and (policy.shows is None or policy.shows(shown))
        where = f"Weights & Biases (wandb.mode={config.wandb.mode})" if is_shown else told_by
        if is_shown or (config.exchange.kind != "none" and policy.allows_metric(metric)):
            raise ConfigError(
                f"silos.{name}.private: epsilon given, and {where} would tell its {what}, which has no noise; allowed: "
                f"with trust.metrics.{metric}=member in the contract, or a trust.policy whose `metrics` do not have it"
            )


def check_model(config: RunConfig) -> None:
    """The model exists, can read sequences as long as the run's, and its checkpoint's files are whole.

    Takes no memory, but torch. Raises ConfigError.
    """
    from pretrain.silo.model import check_shapes
    from pretrain.silo.personal import personal_shapes
    from pretrain.silo.vocabulary import vocabulary_size

    if config.model.checkpoint:
        checkpoint_files(Path(config.model.checkpoint))
    vocab_size = vocabulary_size(config.tokenizer_file)
    check_shapes(config.model, vocab_size, config.sequence_tokens)
    for name, silo in config.silos.items():
        if silo.personal_adapter.is_on:
            personal_shapes(config.model, vocab_size, silo.personal_adapter, f"silos.{name}.personal_adapter")


def check_store(config: RunConfig, *, touch: bool = True) -> list[str]:
    """The store takes a write and a delete, if we may `touch` it, and if there is a run in it, it is this one.

    Returns how the software here differs from that of the run. Raises ConfigError.
    """
    if config.exchange.kind != "store":
        return []
    store = StoreExchange(config.store_url, options=store_options(config.exchange, config.store_url))
    if touch:
        probe = f"{PROBE}{uuid.uuid4().hex}"
        store.objects.write(probe, b"")
        store.objects.delete(probe)
    if (stored := store.read_contract()) is None:
        return []
    check_same_contract(build_contract(config), stored, config.store_url)
    return other_software(stored, config.store_url)


def check_collective(config: RunConfig, name: str) -> None:
    """The port at which silo `name` would serve a collective, if it is the one that does, and on this machine."""
    if config.exchange.kind == "collective" and name == config.full_roster[0]:
        parts = urlsplit(config.exchange.url)
        assert parts.hostname
        assert parts.port
        check_port(parts.hostname, parts.port, key="exchange.url", given=config.exchange.url)


def check_port(host: str, port: int, *, key: str, given: object) -> None:
    """A port to serve at is free, if `host` is this machine; of another one, nothing can be said from here."""
    if is_own_address(host) and port_is_taken(port):
        raise ConfigError(f"{key}: {given!r} given; port {port} is taken on this machine; allowed: a free one")


def is_own_address(host: str) -> bool:
    """Whether a name or address is one of this machine's; not, if it cannot be resolved here."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def port_is_taken(port: int) -> bool:
    """Whether somebody serves at a port, of whichever of this machine's addresses.

    Connections of an earlier server that still linger (TIME_WAIT) do not count: Python sets SO_REUSEADDR, as PyTorch's
    store does.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False
