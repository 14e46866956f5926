"""What `atoll status` prints: who is alive, who takes part, what each contributed, and what is being waited for."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.show.display import format_seconds
from launch.show.report import format_count
from launch.show.status_reader import SiloStatus, StoreStatus, store_status
from pretrain.config.keys import ExchangeConfig
from pretrain.host.clock import DAY_SECONDS, by_this_machine, utc
from pretrain.host.foreign import shown

WIDE = 100
NAMED = 3  # of the objects that cannot be read


def print_status(url: str, options: Mapping[str, Any] | None = None, *, console: Console | None = None) -> None:
    """Print where the run in a store stands; `options` go to fsspec. Raises ConfigError as `store_status` does."""
    show_status(store_status(url, options), console or Console())


def show_status(status: StoreStatus, console: Console) -> None:
    """Print a status that was read before."""
    version = "no version yet" if status.version is None else f"version {status.version} of {status.num_versions}"
    console.print(Text(f"{status.url}: {version}"), soft_wrap=True)
    for words in status.rollbacks:
        console.print(Text(words), soft_wrap=True)
    console.print(Text(f"aggregator: {status.aggregator.words}"), soft_wrap=True)
    console.print(_table(status, is_wide=console.width >= WIDE))
    for name, silo in status.silos.items():
        if silo.refusals and not silo.has_delivered and not status.is_finished:
            words = f"silo {name} was refused for version {(status.version or 0) + 1}: {silo.refusals[-1]}"
            console.print(Text(words, style="red"))
        if silo.not_counted:
            more = f"; {len(silo.not_counted)} versions in all" if len(silo.not_counted) > 1 else ""
            console.print(Text(f"silo {name} did not count in {silo.not_counted[-1]}{more}", style="red"))
        if silo.spent:
            words = f"silo {name} trains with differential privacy for one sequence; spent: {_numbers(silo.spent)}"
            console.print(Text(words))
    if status.spent:
        console.print(Text(f"differential privacy for all that a silo delivers; spent: {_numbers(status.spent)}"))
    for words in status.gate.words if status.gate else ():
        console.print(Text(words), soft_wrap=True)
    for words in remarks(status):
        console.print(Text(words, style="red"))
    silos = status.silos.values()
    num_alive, num_participating = sum(s.life.is_alive for s in silos), sum(s.part == "yes" for s in silos)
    num_tokens = sum(silo.tokens_contributed for silo in silos)
    summary = f"alive {num_alive}, participating {num_participating}, tokens contributed {format_count(num_tokens)}"
    console.print(Text(summary), soft_wrap=True)
    console.print(Text(waiting_words(status), style="bold green" if status.is_finished else ""), soft_wrap=True)
    console.print(_how_old(status), soft_wrap=True)


def _numbers(spent: Mapping[str, float]) -> str:
    return ", ".join(f"{what} {value:.4g}" for what, value in spent.items())


def remarks(status: StoreStatus) -> list[str]:
    """What lies in the store and is not counted, a line each."""
    found = (
        ("passed over, as they are not what their names say", status.unreadable),
        ("not said, as who should have said it has not signed it", status.unsigned),
        (f"of a time to come, {by_this_machine()}, and so not counted from", status.ahead),
    )
    return [f"{why}: {_named(paths)}" for why, paths in found if paths]


def waiting_words(status: StoreStatus) -> str:
    """What is waited for, since when and until when, in one line."""
    if status.waiting_for is None:
        return "finished"
    return f"waiting for {status.waiting_for}{_how_long(status)}{_until_when(status)}"


def _table(status: StoreStatus, *, is_wide: bool) -> Table:
    """A row a silo; in a narrow terminal without the newest commit, so that names and words stay whole."""
    table = Table(box=None, pad_edge=False, padding=(0, 2 if is_wide else 1, 0, 0), header_style="bold dim")
    table.add_column("silo", overflow="fold")
    for heading in ("life", "takes part"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens\ntrained", "commits", *(["newest"] if is_wide else []), "tokens\ncontributed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("" if status.is_finished else f"version {(status.version or 0) + 1}", no_wrap=True)
    for name, silo in status.silos.items():
        table.add_row(
            Text(name),
            Text(silo.life.words, style="green" if silo.life.is_alive else ""),
            silo.part,
            "-" if silo.tokens_total is None else format_count(silo.tokens_total),
            str(silo.num_commits),
            *(["-" if silo.newest_commit is None else str(silo.newest_commit)] if is_wide else []),
            format_count(silo.tokens_contributed),
            Text() if status.is_finished else _progress(silo),
        )
    return table


def _named(paths: list[str]) -> str:
    names = ", ".join(shown(path, limit=60) for path in paths[:NAMED])
    more = f" and {len(paths) - NAMED:,} more" if len(paths) > NAMED else ""
    return f"{names}{more}"


def _progress(silo: SiloStatus) -> Text:
    if silo.has_delivered:
        return Text("delivered", style="green")
    if silo.refusals:
        return Text("refused", style="red")
    return Text("awaited", style="yellow") if silo.is_awaited else Text()


def _how_long(status: StoreStatus) -> str:
    if status.waited_seconds is None:
        return ""
    since = "the contract was written" if status.version is None else f"commit {status.version}"
    return f": {format_seconds(status.waited_seconds)} since {since}"


def _until_when(status: StoreStatus) -> str:
    if not status.waits_for_silos:
        return ""
    if status.quorum is None:
        return "; without a quorum there is no deadline"
    if status.deadline_unix_seconds is None or status.now_unix_seconds is None:
        when = "after the deadline"
    elif (seconds := status.deadline_unix_seconds - status.now_unix_seconds) > 0:
        when = f"in {format_seconds(seconds)} (at {_clock(status.deadline_unix_seconds)} by the store's clock)"
    else:
        when = "by now"
    return f"; {status.quorum} deliveries are enough {when}, so far: {status.num_delivered}"


def _how_old(status: StoreStatus) -> Text:
    """The one place where the store's clock meets this machine's: if all have died, the store's stands still."""
    if status.now_unix_seconds is None:
        return Text("this store does not tell when it changed")
    # The store's clock may be ahead of ours.
    passed = max(0.0, time.time() - status.now_unix_seconds)
    if status.now_unix_seconds - time.time() > DAY_SECONDS:
        words = f"the store last changed at {utc(status.now_unix_seconds)}, and {by_this_machine()}"
        return Text(f"{words}: one of the two is wrong", style="red")
    words = f"{format_seconds(passed)} since the store last changed ({_clock(status.now_unix_seconds)})"
    if status.is_finished or status.not_signed or passed <= ExchangeConfig().lease_seconds:
        return Text(words, style="dim")
    return Text(f"{words}: if this machine's clock is right, nobody is alive any more", style="red")


def _clock(unix_seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))
    except (OverflowError, ValueError, OSError):  # whoever writes into a shared directory can give it any time
        return "a time beyond all calendars"
