"""`atoll verify`: what a store or a bundle says happened, checked by somebody who trusts nobody."""

import dataclasses
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.config.paths import expand_home
from pretrain.host.foreign import shown

if TYPE_CHECKING:
    from pretrain.federation.bundle import VerifiedBundle
    from pretrain.federation.verify import Verified


def verify(
    where: Annotated[str, typer.Argument(help="URL of a store, a run directory with one in it, or a bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    archive: Annotated[str, typer.Option(help="Where what was pruned is; default: that of the run directory.")] = "",
    key: Annotated[Path | None, typer.Option(help="The operator's private key; that of the run directory.")] = None,
) -> None:
    """Check every signature, hash and digest of a store, and merge again every version whose deliveries are there.

    Of a bundle of `atoll exit` also its list, every file, and the model. A silo's ledger of a collective, in
    RUN/silos/NAME/ledger, has no deliveries: what all silos have signed is checked. Exit code 0 if all is as it should
    be, 1 if not. Nothing is written there, and no key is needed, but to merge again where deliveries are sealed:
    without it all else is checked.

    [bold]Example:[/bold] atoll verify s3://bucket/run
    """
    from pretrain.exchange.archive import open_store
    from pretrain.federation.bundle import BundleVerifier, VerifiedBundle, is_bundle
    from pretrain.federation.verify import StoreVerifier, Verified

    found: Verified | VerifiedBundle
    directory = Path(expand_home("store", where))
    # What is passed over is said as it is met: not into the JSON, and found again below.
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch, redirect_stdout(sys.stderr):
        if is_bundle(directory):
            found = BundleVerifier(directory, Path(scratch), tell=_tell, key=key).verify()
        else:
            store = open_store(where, archive)
            if not key and (kept := directory / "keys" / "aggregator.key").is_file():
                key = kept
            found = StoreVerifier(store, Path(scratch), tell=_tell, key=key).verify()
    print(json.dumps(dataclasses.asdict(found), indent=1) if as_json else "\n".join(_lines(found)))
    raise typer.Exit(1 if found.findings else 0)


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _lines(found: "Verified | VerifiedBundle") -> list[str]:
    """For people."""
    from pretrain.federation.verify import Verified

    lines, store = [], found if isinstance(found, Verified) else found.store
    if not isinstance(found, Verified):
        contract = found.contract_sha256[:12] or "none"
        whose = f"of {shown(found.member) or 'nobody'} under contract {contract}"
        lines.append(f"bundle      {whose}: {found.num_files} files that exit.json lists")
        lines += [f"missing     {shown(what, limit=1000)}" for what in found.missing]
    if store:
        pruned = f", {store.num_pruned} are pruned" if store.num_pruned else ""
        again = f"{len(store.merged)} merged again from their deliveries"
        if store.is_sealed:
            again = "none merged again: deliveries are sealed, and only --key aggregator.key opens them"
        lines.append(
            f"contract    {'signed by every member' if store.is_signed else 'names no keys: nothing is signed'}"
        )
        if store.num_amendments:
            lines.append(f"amendments  {store.num_amendments} in force, with all signatures that they need")
        if store.is_collective:
            signed = "each signed by every silo" if store.is_signed else "each as every silo has said, unsigned"
            again = f"{signed}; parameters of {len(store.compared)} have their digest; none is merged again: "
            again += "a collective keeps no deliveries"
        lines.append(f"versions    {store.num_versions} in one chain, {again}")
        lines.append(f"deliveries  {store.num_manifests} manifests; {store.num_payloads} files have their hash{pruned}")
        if store.num_decisions:
            lines.append(f"gate        {store.num_decisions} decisions recomputed; version {store.current} is current")
        if store.num_words:
            past = f", {store.num_past_words} by keys that count no more" if store.num_past_words else ""
            lines.append(f"words       {store.num_words}{', each by its author' if store.is_signed else ''}{past}")
    for finding in found.findings:
        version = "" if finding.version is None else f"version {finding.version}: "
        lines.append(f"WRONG       {version}{shown(finding.name)}: {finding.what}")
    return [*lines, f"{len(found.findings)} findings" if found.findings else "all is as it should be"]
