"""`atoll egress`: what has left this site, by its own record, and whether that record is whole."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="egress", no_args_is_help=True, rich_markup_mode="rich", help="What has left this site: its own record."
)
Where = Annotated[Path, typer.Argument(metavar="RUN|FILE", help="A run directory, or one of its egress/NAME.jsonl.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the same as JSON.")]


@app.command()
def show(where: Where, as_json: AsJson = False) -> None:
    """Say how much has left, by kind, place and day (UTC).

    [bold]Example:[/bold] atoll egress show runs/run
    """
    from pretrain.federation.egress import ledgers

    found = {file.stem: totals(file) for file in ledgers(where)[0]}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name, total in found.items():
        print(f"{name}: {total['objects']:,} objects, {total['bytes']:,} bytes; rules: {', '.join(total['rules'])}")
        for heading in ("kind", "where", "day"):
            for what, (num_objects, num_bytes) in total[heading].items():
                print(f"  {heading:<6} {what:<40} {num_objects:>10,} objects {num_bytes:>18,} bytes")
        asked = ", ".join(f"{count:,} {what}" for what, count in total["requests"].items())
        print(f"  requests without an object: {asked or 'none counted'}")


def totals(file: Path) -> dict[str, Any]:
    """Objects and bytes of a ledger by kind, place and day; requests by what was asked; policies that allowed them."""
    from pretrain.host.clock import utc
    from pretrain.host.foreign import shown
    from pretrain.trust.egress import REQUESTS, read_lines

    counts: dict[str, dict[str, list[int]]] = {"kind": {}, "where": {}, "day": {}}
    requests, rules, sums = Counter[str](), set[str](), [0, 0]
    for line, _ in read_lines(file):
        if line is None:
            continue
        if line.kind == REQUESTS:
            requests.update({shown(what): int(number) for what, number in line.of.items()})
            continue
        day = utc(line.time).partition(" ")[0]
        for heading, what in (("kind", line.kind), ("where", line.where), ("day", day)):
            row = counts[heading].setdefault(shown(what), [0, 0])
            row[0], row[1] = row[0] + 1, row[1] + line.num_bytes
        rules.add(shown(line.rule.partition(":")[0]))
        sums = [sums[0] + 1, sums[1] + line.num_bytes]
    return {"objects": sums[0], "bytes": sums[1], **counts, "requests": dict(requests), "rules": sorted(rules)}


@app.command()
def verify(where: Where, as_json: AsJson = False) -> None:
    """Check that no line was changed or taken out, the signatures, and what lies in the store in our name.

    Exit code 0 if all is as it should be, 1 if not. Nothing is written.

    [bold]Example:[/bold] atoll egress verify runs/run
    """
    from pretrain.federation.egress import check_ledgers, ledgers

    files, config = ledgers(where)
    found = check_ledgers(files, config)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        print(f"ledgers     {', '.join(file.name for file in files)}: {found.num_lines:,} lines")
        print(f"signatures  {found.num_signed:,}; after the last {found.num_unsigned_at_end} lines")
        print(f"store       {found.num_objects:,} objects are as they left")
        for note in found.notes:
            print(f"note        {note}")
        for finding in found.findings:
            print(f"WRONG       {finding.file}: {finding.what}")
        print(f"{len(found.findings)} findings" if found.findings else "all is as it should be")
    raise typer.Exit(1 if found.findings else 0)
