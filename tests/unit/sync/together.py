"""Silos of a collective in one process, without training: what each delivers is drawn, all else is as it is."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pretrain.config.keys import RunConfig
from pretrain.exchange.base import Outgoing
from pretrain.exchange.payload import Held
from pretrain.outer.blocks import Change, code
from pretrain.outer.digest import digest_tensors
from pretrain.outer.fragments import cut_fragments
from pretrain.sync.among_silos import AmongSilos
from pretrain.sync.own_ledger import OwnLedger
from pretrain.trust.contract import build_contract
from pretrain.trust.ledger import Manifest
from pretrain.trust.members import with_keys
from tests.conftest import TinyConfig
from tests.support import free_port


def among_silos(tiny_config: TinyConfig, directory: Path, *, keys: bool = True, **changes: Any) -> RunConfig:
    """A configuration of silos among themselves, with keys of their own."""
    exchange = {"kind": "collective", "url": f"tcp://127.0.0.1:{free_port()}", "dead_seconds": 5.0}
    exchange |= changes.pop("exchange", {})
    config = tiny_config(directory, exchange=exchange, trust={"directory": ""}, **changes)
    return with_keys(config, make=True) if keys else config


def start(
    configs: dict[str, RunConfig],
    num_versions: int = 0,
    *,
    before: Callable[[AmongSilos], object] = lambda among: None,
) -> dict[str, Future[None]]:
    """All join, merge versions up to `num_versions`, and leave whatever came of it; `before` is called in between.

    Their ledgers begin before: one process draws one model at a time.
    """
    for silo, config in configs.items():
        OwnLedger(config, silo).open(build_contract(config))

    def take_part(silo: str, config: RunConfig) -> None:
        among = AmongSilos(config, silo, None)
        try:
            among.join()
            before(among)
            merge(among, config, silo, num_versions)
        except BaseException:
            among.close("stopped")
            raise
        among.close("")

    with ThreadPoolExecutor(len(configs)) as pool:
        return {silo: pool.submit(take_part, silo, config) for silo, config in configs.items()}


def run(config: RunConfig, num_versions: int) -> None:
    """All silos of a configuration; whatever goes wrong is raised."""
    for future in start(dict.fromkeys(config.full_roster, config), num_versions).values():
        future.result()


def merge(among: AmongSilos, config: RunConfig, silo: str, num_versions: int) -> None:
    """Take part in all versions from the beginning; those that are merged already are read."""
    first = among.initial()
    parameters, schedule = dict(first.values), config.schedule
    for version in range(first.commit.version + 1, num_versions + 1):
        sizes = {name: value.numel() for name, value in parameters.items()}
        names = cut_fragments(sizes, schedule.num_fragments)[schedule.fragment(version)]
        base = {name: parameters[name] for name in names}
        received = among.receive(version, _outgoing(among, config, silo, version, base), base)
        parameters |= received.values
        among.recorded(received.commit)
        among.checkpointed(version)


def _outgoing(among: AmongSilos, config: RunConfig, silo: str, version: int, base: dict[str, torch.Tensor]) -> Outgoing:
    drawn = torch.Generator().manual_seed(1000 * version + config.full_roster.index(silo))
    local = {n: value + 0.01 * torch.randn(value.shape, generator=drawn) for n, value in base.items()}
    pieces = among.pieces(list(base), base)
    changes = [Change(base=piece.of(base[piece.name]), value=piece.of(local[piece.name])) for piece in pieces]
    sent = code(config.outer.codec, changes)
    held = Held({piece.key: parts for piece, (parts, _) in zip(pieces, sent, strict=True)}, {})
    file = config.silo_directory(silo) / "outbox" / f"{version:06d}.safetensors"
    tokens = 256 * (1 + config.full_roster.index(silo))
    manifest = Manifest(
        contract_sha256=among.terms_sha256(version),
        silo=silo,
        version=version,
        base_version=config.schedule.base(version),
        base_digest=digest_tensors(base.items()),
        cosigned="",
        codec=config.outer.codec,
        payloads=[held.describe(file, config.schedule.fragment(version))],
        tokens=tokens,
        steps=config.schedule.steps(version),
        tokens_total=version * tokens,
        metrics={"loss": 1.0},
    )
    return Outgoing(manifest, file, held)
