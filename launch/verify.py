"""`atoll verify`: what a store says happened, checked by somebody who trusts nobody."""

import dataclasses
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer


def verify(
    where: Annotated[str, typer.Argument(help="URL of the store, or a run directory with one in it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    key: Annotated[Path | None, typer.Option(help="The operator's private key; that of the run directory.")] = None,
) -> None:
    """Check every signature, hash and digest of a store, and merge again every version whose deliveries are there.

    Exit code 0 if all is as it should be, 1 if not. Nothing is written into the store, and no key is needed, but to
    merge again where deliveries are sealed: without it all else is checked.

    [bold]Example:[/bold] atoll verify s3://bucket/run
    """
    from pretrain.exchange.options import reached, store_options
    from pretrain.exchange.store import StoreExchange
    from pretrain.federation.verify import StoreVerifier

    url, exchange = reached(where)
    store = StoreExchange(url, options=store_options(exchange, url), retry_seconds=exchange.retry_seconds)
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
        if not key and (kept := Path(where) / "keys" / "aggregator.key").is_file():
            key = kept
        tell = partial(typer.echo, err=True)
        found = StoreVerifier(store, Path(scratch), tell=tell, key=key).verify()
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        pruned = f", {found.num_pruned} are pruned" if found.num_pruned else ""
        print(f"contract    {'signed by every member' if found.is_signed else 'names no keys: nothing is signed'}")
        if found.num_amendments:
            print(f"amendments  {found.num_amendments} in force, with all signatures that they need")
        again = f"{len(found.merged)} merged again from their deliveries"
        if found.is_sealed:
            again = "none merged again: deliveries are sealed, and only --key aggregator.key opens them"
        print(f"versions    {found.num_versions} in one chain, {again}")
        print(f"deliveries  {found.num_manifests} manifests; {found.num_payloads} files have their hash{pruned}")
        for finding in found.findings:
            version = "" if finding.version is None else f"version {finding.version}: "
            print(f"WRONG       {version}{finding.name}: {finding.what}")
        print(f"{len(found.findings)} findings" if found.findings else "all is as it should be")
    raise typer.Exit(1 if found.findings else 0)
