"""`atoll revoke`: what the model would be without a member's contributions, and who has signed that."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.config.paths import expand_home
from pretrain.host.foreign import shown

if TYPE_CHECKING:
    from pretrain.exchange.revocation import Revocation
    from pretrain.exchange.store import StoreExchange
    from pretrain.federation.held_out import SplitLoss
    from pretrain.federation.revoke import Revoked
    from pretrain.trust.keys import Signer

    Compared = dict[str, tuple[SplitLoss, SplitLoss]]


def revoke(
    member: Annotated[str, typer.Argument(help="Whose contributions are taken out.")],
    where: Annotated[str, typer.Argument(help="URL of the store, or a run directory with one in it.")],
    *,
    first: Annotated[int | None, typer.Option("--from", help="First version without the member.")] = None,
    until: Annotated[int | None, typer.Option(help="Last version; default: that of a signature, or the newest.")] = (
        None
    ),
    to: Annotated[Path | None, typer.Option(help="Directory to write the model to; must not exist.")] = None,
    valid: Annotated[list[str] | None, typer.Option(metavar="CORPUS=DIR", help="Packed split to compare on.")] = None,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    config: Annotated[
        list[Path] | None, typer.Option("--config", "-c", help="Own YAML file, where WHERE is no run directory.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The run's, with a URL and no configuration.")] = None,
    sign: Annotated[bool, typer.Option("--sign", help="Sign what comes out, as --silo.")] = False,
    silo: Annotated[str, typer.Option(help="Who signs: a silo of this machine, or aggregator.")] = "",
    archive: Annotated[str, typer.Option(help="Where what was pruned is; default: that of the run directory.")] = "",
    key: Annotated[Path | None, typer.Option(help="Where deliveries are sealed: the operator's private key.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say who has signed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Say and write what the model would be without a member's contributions, from a version on.

    Every version since is merged again from the deliveries of the others that are kept. Nothing in the run changes.
    With --sign, who comes to the same parameters puts its signature into the store.

    [bold]Example:[/bold] atoll revoke law runs/run --from 12 --to without-law --reason "consent withdrawn"
    """
    from pretrain.exchange import revocation
    from pretrain.exchange.options import reached, store_options
    from pretrain.exchange.store import StoreExchange

    url, options = reached(where)
    exchange = StoreExchange(url, options=store_options(options, url), retry_seconds=options.retry_seconds)
    contract = exchange.read_contract()
    if contract is None:
        raise ConfigError(f"store: {where!r} given; there is no run in it (no contract.json)")
    if check:
        raise typer.Exit(_say_signed(exchange, member, as_json=as_json))
    from pretrain.federation.reading import configuration
    from pretrain.federation.revoke import write_revoked

    if first is None:
        raise ConfigError("--from: none given; allowed: the first version that is to be without the member")
    if to and os.path.lexists(to := Path(expand_home("--to", str(to)))):
        raise ConfigError(f"--to: {str(to)!r} given; it exists already, and nothing is overwritten")
    own, data = configuration(where, contract, paths=config or [], tokenizer=tokenizer), _splits(valid or [])
    _open(exchange, own, key or Path(expand_home("store", where)) / "keys" / "aggregator.key", archive)
    if sign:
        exchange.members.signer = _signer(exchange, own, silo)
        if before := revocation.signed_before(exchange, member, first, until):
            until, reason = before.to_version, reason or before.reason
    found, compared = _found(exchange, own, (member, first, until, reason), data)
    if sign:
        found.record = revocation.sign(exchange, found.record, silo)
    if to:
        write_revoked(own, found, to)
    print(json.dumps(_facts(found, compared), indent=1) if as_json else "\n".join(_lines(found, compared, to)))


def _found(
    exchange: "StoreExchange", own: RunConfig, asked: tuple[str, int, int | None, str], data: dict[str, Path]
) -> tuple["Revoked", "Compared"]:
    """What comes out, and the losses on packed splits. Raises ConfigError, also for a store that is damaged."""
    from pretrain.federation.revoke import Revoker, losses
    from pretrain.trust.ledger import RefusedError

    member, first, until, reason = asked
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
        try:
            revoker = Revoker(own, exchange, Path(scratch), tell=lambda line: typer.echo(line, err=True))
            found = revoker.revoke(member, first, until, reason=reason)
        except RefusedError as error:
            raise ConfigError(f"store: {exchange.objects.url!r} given; {error}") from None
        return found, losses(own, found, data) if data else {}


def _open(exchange: "StoreExchange", own: RunConfig, key: Path, archive: str) -> None:
    """Open sealed deliveries, and read what was pruned, from now on. Raises ConfigError without the key."""
    from pretrain.exchange.archive import read_archive
    from pretrain.trust.members import operator_sealer

    kept_at = expand_home("--archive", archive) or own.trust.archive
    read_archive(exchange, kept_at, own.exchange, is_asked=bool(archive))

    if exchange.is_sealed and not key.exists():
        raise ConfigError(
            "--key: none given; deliveries are sealed; allowed: the private key of the aggregator's operator"
        )
    if exchange.is_sealed:
        exchange.members.sealer = operator_sealer(exchange.members, key, own)


def _splits(given: list[str]) -> dict[str, Path]:
    """Corpus to packed split. Raises ConfigError for what is none, before anything is computed."""
    from pretrain.silo.shards import MANIFEST_FILE

    found: dict[str, Path] = {}
    for one in given:
        corpus, _, place = one.partition("=")
        if not corpus or not place:
            raise ConfigError(f"--valid: {one!r} given; allowed: CORPUS=DIR")
        found[corpus] = Path(expand_home("--valid", place))
        if not (found[corpus] / MANIFEST_FILE).is_file():
            raise ConfigError(f"--valid: {one!r} given; there is no {MANIFEST_FILE} in it; allowed: a packed split")
    return found


def _signer(exchange: "StoreExchange", own: RunConfig, silo: str) -> "Signer":
    """Who signs. Raises ConfigError, before anything is computed."""
    from pretrain.trust.members import own_signer

    keys = exchange.members.first_keys
    if not keys:
        raise ConfigError("--sign: given; the contract names no keys (trust.keys), so nothing can be signed")
    if silo not in keys:
        raise ConfigError(f"--silo: {silo!r} given; allowed with --sign: {named(sorted(keys))}")
    if silo not in own.trust.keys:
        own.trust.added[silo] = keys[silo].text
    signer = own_signer(own, silo)
    if signer is None:
        raise ConfigError(f"--config: none given; allowed with --sign: the configuration of {silo}, which says its key")
    return signer


# ---- what is said


def _facts(found: "Revoked", compared: "Compared") -> dict[str, Any]:
    """For programs."""
    return {
        "record": dataclasses.asdict(found.record),
        "versions": [dataclasses.asdict(one) for one in found.versions],
        "unchanged": found.unchanged,
        "distance": found.distance,
        "relative": found.relative,
        "losses": {corpus: {"original": a.loss, "without": b.loss} for corpus, (a, b) in compared.items()},
    }


def _lines(found: "Revoked", compared: "Compared", to: Path | None) -> list[str]:
    """For people."""
    record, tokens = found.record, sum(one.tokens for one in found.versions)
    lines = [f"{'version':>7}  {'tokens':>14}  {'weight':>14}  {'of':>14}  {'now':>14}"]
    for one in found.versions:
        words = f"{one.divisor_left:,}" if one.divisor_left else "nobody is left"
        lines.append(f"{one.version:7d}  {one.tokens:14,}  {one.weight:14,}  {one.divisor:14,}  {words:>14}")
    for version in found.unchanged:
        lines.append(f"version {version} changes nothing any more: nobody else had a part in it")
    lines += [
        f"without     {record.member}, versions {record.from_version} to {record.to_version}: {tokens:,} tokens of "
        f"{len(found.versions)} versions taken out",
        f"distance    {found.distance:.6g} between the two models, {100 * found.relative:.4g} % of the run's own norm",
    ]
    for corpus, (original, without) in compared.items():
        change = without.loss - original.loss
        lines.append(
            f"loss        {corpus}: {without.loss:.4f}, {change:+.4f} against the run's own {original.loss:.4f}"
        )
    signed = f"signed by {record.signer}" if record.signature else "not signed (--sign)"
    lines.append(f"parameters  {record.parameters_digest}, {signed}")
    return [*lines, *([f"next: a new run that goes on from it, with model.checkpoint: {to}"] if to else [])]


def _say_signed(exchange: "StoreExchange", member: str, *, as_json: bool) -> int:
    """Who has signed which revocation of a member; the exit code: 1 if anything there is not as it should be."""
    from pretrain.exchange.revocation import revocations

    found, is_right = revocations(exchange, member), True
    rows = []
    for place, signed in found.items():
        digests = {one.record.parameters_digest for one in signed if one.record}
        wrong = [f"{one.signer}: {one.wrong}" for one in signed if not one.record]
        if len(digests) > 1:
            wrong.append(f"members have come to different parameters: {named(sorted(digests))}")
        names = [one.signer for one in signed if one.record]
        missing = [name for name in sorted(exchange.members.first_keys) if name not in names]
        first = next((one.record for one in signed if one.record), None)
        rows.append({"revocation": place, "signed": names, "missing": missing, "wrong": wrong, **_told(first)})
        is_right = is_right and not wrong
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0 if is_right else 1
    for row in rows:
        print(f"{row['revocation']}: parameters {row['parameters_digest']}; reason: {shown(row['reason']) or 'none'}")
        print(f"  signed by {named(row['signed']) or 'nobody'}; not by {named(row['missing']) or 'nobody'}")
        for words in row["wrong"]:
            print(f"  WRONG {words}")
    if not rows:
        print(f"nobody has signed a revocation of {shown(member)}")
    return 0 if is_right else 1


def _told(record: "Revocation | None") -> dict[str, Any]:
    return {
        "parameters_digest": record.parameters_digest if record else "",
        "reason": record.reason if record else "",
    }
