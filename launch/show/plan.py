"""What `atoll plan` takes from an earlier run, and what it prints."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.show import display
from launch.show.display import format_bytes
from launch.show.report import format_count
from launch.show.run import Run
from launch.show.text import epochs
from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import OuterConfig
from pretrain.plan.plan import Plan
from pretrain.plan.seconds import work_factor


def measured_run(directory: Path) -> tuple[dict[str, float], float]:
    """Tokens per second of each silo of an earlier run, finished or not, and how long its work took: `work_factor`.

    The first step and the first sync, which start everything, do not count, and of every sync the wait of the silo
    that came last: the others waited for that silo, too. Raises ConfigError if there is too little to go by.
    """
    run = Run.read(directory)
    speeds: dict[str, list[float]] = defaultdict(list)
    for step in run.records["step"]:
        speeds[str(step["silo"])].append(float(step["tokens_per_second"]))
    if not speeds or not all(len(of) > 1 for of in speeds.values()):
        raise ConfigError(f"--measured: {str(directory)!r} given; allowed: a run of which each silo logged two steps")
    waits: dict[int, list[float]] = defaultdict(list)
    for sync in run.records["sync"]:
        waits[int(sync["version"])].append(float(sync["wait_seconds"]))
    factor = work_factor(run.config, [min(of) for version, of in waits.items() if version > 1])
    return {silo: statistics.harmonic_mean(of[1:]) for silo, of in speeds.items()}, factor


def tokens_per_second(silos: list[str], given: float | None, measured: Mapping[str, float]) -> dict[str, float]:
    """Of each silo; one that was not measured is as fast as those that were. Raises ConfigError."""
    if given is not None and not 0 < given < math.inf:
        raise ConfigError(f"--tokens-per-second: {given:g} given; allowed: above 0")
    if given is not None:
        return dict.fromkeys(silos, given)
    mean = statistics.mean(measured.values())
    return {silo: measured.get(silo, mean) for silo in silos}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan."""
    console, config = console or Console(), plan.config
    keys = ("sync_interval_steps", "codec", "num_fragments", "overlap_steps")
    way = _words({f"outer.{key}": getattr(config.outer, key) for key in keys}, config.outer)
    beside = f" beside {format_count(plan.num_frozen)} frozen ones" if plan.num_frozen else ""
    size = f"{format_count(plan.num_parameters)} parameters{beside}, {len(config.full_roster)} silos"
    console.print(Text(f"{config.name}: {size}, {config.exchange.kind}; {way}"), soft_wrap=True)
    requests = [_requests(plan)] if plan.requests else []
    for part in (_facts(plan), *_text(plan), _bytes(plan), *requests, _neighbours(plan), _memory(plan)):
        console.print(part)


def format_seconds(seconds: float) -> str:
    """0.16 s; from a minute on as everywhere."""
    return f"{seconds:.2f} s" if seconds < 60 else display.format_seconds(seconds)


def _words(changes: dict[str, Any], outer: OuterConfig) -> str:
    """Changes of how to sync, as one says them."""

    def now(key: str) -> Any:
        return changes.get(f"outer.{key}", getattr(outer, key))

    up, down, number = now("codec"), now("downlink_codec"), now("num_fragments")
    words = {
        "outer.sync_interval_steps": f"H = {now('sync_interval_steps')}",
        "outer.codec": f"{up} both ways" if up == down else f"{up} up, {down} down",
        "outer.num_fragments": f"{number} fragment{'s' if number > 1 else ''}",
        "outer.overlap_steps": f"overlap {now('overlap_steps')}",
    }
    said = {"outer.codec" if key == "outer.downlink_codec" else key for key in changes}
    return ", ".join(text for key, text in words.items() if key in said)


def _new_table(title: str, *headings: str) -> Table:
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold dim", title=title, title_justify="left"
    )
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _facts(plan: Plan) -> Table:
    pace, inner, steps = plan.pace, plan.config.inner, plan.step_seconds
    table = Table.grid(padding=(0, 2, 0, 0))
    per_step = named([f"{silo} {format_seconds(seconds)}" for silo, seconds in steps.items()])
    table.add_row("an inner step", per_step if len(set(steps.values())) > 1 else format_seconds(max(steps.values())))
    link = format_seconds(pace.link_seconds)
    table.add_row("a sync", f"{format_seconds(pace.sync_seconds)}, of which {link} on the link")
    table.add_row("utilisation", f"{pace.utilisation:.1%}")
    table.add_row(
        "the run",
        f"{format_seconds(pace.seconds)} for {inner.num_steps:,} inner steps, {plan.config.schedule.num_versions:,} "
        f"versions, {format_count(plan.tokens)} tokens; without evaluations and checkpoints",
    )
    table.add_row("the budget", f"{plan.budget_days:,.2f} days for {format_count(plan.budget_tokens)} tokens")
    return table


def _text(plan: Plan) -> list[Table]:
    """How often each silo's text is read, of those whose text is there already."""
    table = _new_table("\nText", "tokens", "the run\nreads it", "the budget\nreads it")
    for silo in plan.config.silos:
        with suppress(ConfigError):
            num_tokens, times = epochs(plan.config, silo)
            budget = times * plan.budget_tokens / plan.tokens
            table.add_row(Text(silo), format_count(num_tokens), f"{times:,.2f} times", f"{budget:,.2f} times")
    return [table] if table.rows else []


def _bytes(plan: Plan) -> Table:
    table = _new_table("\nPayloads", "a sync:\nsent", "\nreceived", "the run:\nsent", "\nreceived")
    for silo, moved in plan.traffic.items():
        largest = max(moved, key=lambda one: one.num_elements)
        numbers = (largest.sent_bytes, largest.received_bytes, plan.sent_bytes[silo], plan.received_bytes[silo])
        table.add_row(Text(silo), *(format_bytes(number) for number in numbers))
    if plan.first_bytes:
        sent, received = plan.aggregator_sent_bytes, plan.aggregator_received_bytes
        a_sync = [number / plan.config.schedule.num_versions for number in (sent, received)]
        table.add_row("aggregator", *(format_bytes(number) for number in (*a_sync, sent, received)))
        table.caption_justify = "left"
        table.caption = (
            f"and {format_bytes(plan.first_bytes)} received once, version 0; the store grows by "
            f"{format_bytes(sum(a_sync))} a sync, with a snapshot every {plan.snapshot_versions} outer steps"
        )
    return table


def _requests(plan: Plan) -> Table:
    headings = ("a version:\nwritten", "\nlisted", "\nread", "the run:\nrequests", "\nin S3")
    table, num_versions = _new_table("\nRequests to the store", *headings), plan.config.schedule.num_versions
    for who, of in [*plan.requests.items(), ("aggregator", plan.aggregator_requests)]:
        a_version = [f"{number / num_versions:,.1f}" for number in (of.writes, of.lists, of.reads)]
        total = of.writes + of.lists + of.reads
        table.add_row(Text(who), *a_version, format_count(round(total)), f"{of.dollars:,.2f} USD")
    table.caption_justify = "left"
    table.caption = (
        "S3 Standard, us-east-1, list price: 0.005 USD for 1,000 written or listed, 0.0004 USD for 1,000 read; signs "
        "of life and waiting are in it (exchange.lease_seconds, exchange.poll_seconds)"
    )
    return table


def _neighbours(plan: Plan) -> Table | Text:
    if not plan.neighbours:
        return Text("\nNo way to sync near this one keeps the silos busier.", style="dim")
    table = _new_table("\nWays to sync that keep the silos busier", "utilisation", "a sync", "sent", "received")
    table.add_column("loss, as measured")
    silo = next(iter(plan.sent_bytes))
    configured = ("as configured", plan.pace, plan.sent_bytes[silo], plan.received_bytes[silo], "")
    rows = [
        (_words(n.changes, plan.config.outer), n.pace, n.sent_bytes, n.received_bytes, n.loss) for n in plan.neighbours
    ]
    for words, pace, sent, received, loss in [configured, *rows]:
        seconds = format_seconds(pace.sync_seconds)
        said = loss or ("" if words == "as configured" else "not measured")
        table.add_row(words, f"{pace.utilisation:.1%}", seconds, format_bytes(sent), format_bytes(received), said)
    return table


def _memory(plan: Plan) -> Table:
    stages = [f"device,\nZeRO-{stage}" for stage in range(4)]
    table = _new_table("\nMemory, at its peak", *stages, "leader's\nprocess", "leader's\nnode", "all of it\non a CPU")
    for silo, memory in plan.memory.items():
        devices = [
            Text(format_bytes(peak), style="bold" if stage == memory.stage else "dim")
            for stage, peak in enumerate(memory.device_bytes)
        ]
        hosts = (memory.leader_bytes, memory.node_bytes, memory.cpu_bytes)
        table.add_row(Text(silo), *devices, *(format_bytes(number) for number in hosts))
    if plan.aggregator_memory_bytes:
        table.add_row("aggregator", "", "", "", "", format_bytes(plan.aggregator_memory_bytes), "", "")
        state, passing = plan.aggregator_disk_bytes
        kept = f"{format_bytes(state)} for its outer state and " if state else ""
        table.caption_justify = "left"
        table.caption = f"the aggregator's run directory needs {kept}{format_bytes(passing)} for what passes through"
    return table
