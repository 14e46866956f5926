"""Everything that is said of one card, in one call that ends in time: tests, tokens a second and MFU, a sync.

    python -m benchmarks.gpu [--minutes 8] [--output runs/gpu.json] [--parts 124M tests ...]
    python -m benchmarks.gpu --toy

Parts, in this order: GPT-2 with 124 M parameters, the tests that are marked `gpu`, 1.3 B, a sync of a billion
parameters, 350 M. A part has its share of the time that is left, in a process that is ended when it is over; what was
found is in the output after each part, and what there was no time for says so. Of a size: a silo's loop as it is
recommended (bf16, compiled) and bare DeepSpeed on the same engine, in turns; a plain loop as nanoGPT has it;
`transformers.Trainer`; the silo's engine with one measure taken away or added, each. MFU is of the card's dense 16-bit
peak (pretrain/silo/cards.py). `--toy` does the same with a tiny model, on a CPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.show.display import format_bytes

# Which share of the time that is left a part may take: its weight, of those that are still to come.
WEIGHTS = {"124M": 100, "tests": 70, "1.3B": 110, "sync": 110, "350M": 70}
ENDING_SECONDS = 5.0  # between the end of a part's time and the end of its process
RESULTS_SECONDS = 2.0  # for what comes after the last part


def run_part(name: str, seconds: float, log: Path, *, is_toy: bool) -> dict[str, Any]:
    """One part in its own process, which is ended after `seconds`; what it had written by then counts."""
    rows = log.with_suffix(".rows.json")
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, "--output", str(rows)]
    command += ["--seconds", f"{max(1.0, seconds - ENDING_SECONDS):.0f}", *(["--toy"] if is_toy else [])]
    began = time.monotonic()
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            state = "done" if code == 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            state = "ended for want of time"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it had started
            process.wait()
    found = json.loads(rows.read_text()) if rows.exists() else []
    rows.unlink(missing_ok=True)
    return {"state": state, "seconds": round(time.monotonic() - began, 1), "rows": found, "log": str(log)}


def speed_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """Tokens a second, MFU, and how many times the plain loop's."""
    head = next((row for row in rows if not row["way"]), {})
    peak, operations = head.get("peak_tflops"), head.get("flops_per_token")
    plain = next((row.get("tokens_per_second") for row in rows if row["way"] == "plain loop"), None)
    title = f"\n{name}: {head.get('card')}, {head.get('batch')}, {head.get('precision')}, torch {head.get('torch')}"
    table = new_table(title, "tokens/s", "range", f"MFU of {peak:,.0f} TFLOP/s" if peak else "MFU", "of the plain loop")
    table.add_column("of bare DeepSpeed", justify="right")
    table.add_column("device memory", justify="right")
    for row in rows:
        if not row["way"]:
            continue
        if "error" in row:
            table.add_row(row["way"], Text(row["error"], style="dim"))
            continue
        speed = row["tokens_per_second"]
        table.add_row(
            row["way"],
            f"{speed:,.0f}",
            f"{row['range'][0]:,.0f} to {row['range'][1]:,.0f}",
            f"{speed * operations / peak / 1e12:.1%}" if peak and operations else "-",
            f"{speed / plain:.3f}" if plain else "-",
            f"{row['of_bare']:.3f}" if "of_bare" in row else "",
            format_bytes(row["peak_bytes"]) if row.get("peak_bytes") else "-",
        )
    return table


def other_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """What the tests and a sync have found, number by number."""
    table = new_table(f"\n{name}", "")
    for row in rows:
        for key, value in row.items():
            if key != "way":
                shown = format_bytes(value) if key.endswith("_bytes") else f"{value:,.4g}" if _is_real(value) else value
                table.add_row(f"{row['way']}: {key.replace('_', ' ')}", str(shown))
    return table


def _is_real(value: object) -> bool:
    return isinstance(value, float)


def new_table(title: str, *headings: str) -> Table:
    """A plain one."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left")
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def print_results(found: dict[str, Any], console: Console) -> None:
    """All parts that there are."""
    for name, part in found["parts"].items():
        is_speed = name not in ("tests", "sync")
        console.print(speed_table(name, part["rows"]) if is_speed else other_table(name, part["rows"]))
        if part["state"] != "done":
            words = f"{name} {part['state']} after {part['seconds']} s: see {part['log']}"
            console.print(Text(words, style="red"), soft_wrap=True)


def main() -> None:
    """Run the parts, and print what they have found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="when it is over, whatever was measured by then")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.json"), help="where the rows go, part by part")
    parser.add_argument("--parts", nargs="+", choices=WEIGHTS, help="default: all; with --toy one size")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try this script on a CPU")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes - RESULTS_SECONDS
    chosen = arguments.parts or (["124M", "tests", "sync"] if arguments.toy else list(WEIGHTS))
    parts = [name for name in WEIGHTS if name in chosen]
    found: dict[str, Any] = {"toy": arguments.toy, "minutes": arguments.minutes, "parts": {}}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(parts):
        share = WEIGHTS[name] / sum(WEIGHTS[other] for other in parts[number:])
        seconds = share * (until - time.monotonic())
        print(f"{name}: up to {seconds:.0f} s", flush=True)
        log = arguments.output.with_name(f"{arguments.output.stem}-{name}.log")
        found["parts"][name] = run_part(name, seconds, log, is_toy=arguments.toy)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print_results(found, Console(width=None if sys.stdout.isatty() else 140))


if __name__ == "__main__":
    main()
