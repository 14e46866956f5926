"""`atoll launch join`: what an institution is told before it joins a federation, and how its silo then starts."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from launch.show.display import format_bytes
from launch.show.plan import format_seconds
from launch.show.report import format_count
from launch.show.status_reader import StoreStatus, store_status
from launch.show.text import epochs, num_sequences
from launch.start.gpus import check_gpus
from launch.start.local import launch_silo, write_resolved
from launch.start.site import SiteConfig, load_site
from launch.start.slurm import launch_slurm
from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import RunConfig
from pretrain.exchange.agreement import adding, not_added_yet, not_signed
from pretrain.federation import join as joining
from pretrain.federation.contract import told_of_silos
from pretrain.federation.join import Federation, Link, Size
from pretrain.federation.preflight import check_silo
from pretrain.federation.room import check_silo_room
from pretrain.host.foreign import shown
from pretrain.host.software import differences, installed
from pretrain.trust.ledger import sha256_bytes


def join(
    url: str,
    paths: Sequence[Path],
    overrides: Sequence[str],
    *,
    sites: Sequence[Path] = (),
    dry_run: bool = False,
    console: Console | None = None,
) -> int:
    """Check all that can be checked, say what would happen, and start, here or with `sites` on SLURM.

    Returns the exit status: 0 finished or submitted, else the silo's. Raises ConfigError at the first thing that is
    wrong; until then nothing was written, in the store or here.
    """
    says = Says(console or Console())
    federation = joining.find_federation(url, paths, overrides)
    status = store_status(federation.url, federation.options)
    says.federation(federation, status)
    config = joining.joined_config(federation, paths, overrides)
    (silo,) = config.silos
    site = load_site(list(sites), config) if sites else None
    if not site and not dry_run and config.silos[silo].num_nodes != 1:
        raise ConfigError(
            f"silos.{silo}.num_nodes: {config.silos[silo].num_nodes} given; allowed: 1 without --site; or join with "
            "--dry-run, and then use atoll launch torchrun with the configuration that it writes"
        )
    is_back = joining.takes_part_already(federation, config, silo)
    _check_can_enter(status, federation, silo, is_back=is_back)
    says.silo(config, silo, is_back=is_back)
    if waits_for := _check_is_added(federation, config, silo):
        says.warning(f"until {silo} is a member its start waits for {waits_for}")
    says.machine(config, silo, site)
    size = joining.measure_size(federation, config, silo, status.version)
    says.size(config, size, check_silo_room(config, silo, size.disk_bytes), is_begun=status.version is not None)
    says.link(joining.measure_link(federation), size, status)
    says.what_happens(federation, config, silo, size, status, is_back=is_back)
    return _start(config, silo, site, dry_run=dry_run, says=says)


def _check_can_enter(status: StoreStatus, federation: Federation, silo: str, *, is_back: bool) -> None:
    # Until all have signed there is nothing that could have gone wrong: the start signs, and waits.
    if status.version is None and not not_signed(federation.exchange):
        raise ConfigError(
            f"store: {federation.url!r} given; there is no version 0 in it yet: its aggregator is making it, or was "
            "stopped before; try again when atoll status shows it"
        )
    if status.is_finished and not is_back:
        raise ConfigError(
            f"store: {federation.url!r} given; its run is finished, with version {status.version}; there is nothing to "
            "join"
        )


def _check_is_added(federation: Federation, config: RunConfig, silo: str) -> str:
    """What a silo that the contract does not have still waits for; empty if it is a member.

    Raises ConfigError unless it has signed the amendment that adds it.
    """
    exchange = federation.exchange
    if silo not in config.trust.added or not (words := not_added_yet(exchange, federation.agreed, silo)):
        return ""
    proposal = adding(exchange, silo)
    assert proposal
    if silo in proposal.missing:
        raise ConfigError(
            f"store: {federation.url!r} given; it waits for {words}; allowed: once {silo} itself has signed: atoll "
            f"contract sign {federation.url} --config ... --silo {silo} --amendment {proposal.amendment.number}"
        )
    return words


def _start(config: RunConfig, silo: str, site: SiteConfig | None, *, dry_run: bool, says: "Says") -> int:
    if site:
        jobs, notes = launch_slurm(config, site, aggregator=False, dry_run=dry_run)
        says.lines([*(f"{name}: {what}" for name, what in jobs.items()), *notes])  # as launch slurm does
        return 0
    if dry_run:
        path = write_resolved(config)
        says.line("dry run", f"nothing was started; atoll train --config {path} --silo {silo} would")
        return 0
    return launch_silo(config, silo, console=says.console)


class Says:
    """One line for each thing that was found."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, what: str, text: str, style: str = "") -> None:
        """Print a thing and what it is."""
        self.console.print(Text.assemble((f"{what:<11}", "bold"), (text, style)), soft_wrap=True)

    def lines(self, texts: list[str]) -> None:
        """Print lines as they are."""
        self.console.print(Text("\n".join(texts)), soft_wrap=True)

    def federation(self, federation: Federation, status: StoreStatus) -> None:
        """The contract, who is there, and how its software differs."""
        agreed = federation.agreed
        inner, outer, quorum = agreed.inner, agreed.outer, agreed.membership.quorum
        self.line("contract", f"{agreed.name}, sha256 {sha256_bytes(federation.contract)[:12]}, in {federation.url}")
        model = agreed.model.config.get("model_type", "from a checkpoint")
        self.line("model", f"{model}, sequences of {agreed.sequence_tokens:,} tokens")
        self.line(
            "training",
            f"{inner.num_steps:,} steps of {inner.optimizer}, lr {inner.lr:g}: {agreed.num_rounds:,} rounds of "
            f"H = {outer.sync_interval_steps:,}",
        )
        fragments = "1 fragment" if outer.num_fragments == 1 else f"{outer.num_fragments} fragments"
        self.line(
            "syncs",
            f"{outer.sent_codec} up, {outer.downlink_codec} down, {fragments}, overlap {outer.overlap_steps}; outer "
            f"{outer.optimizer}, lr {outer.lr:g}; merged by {outer.merge}",
        )
        enough = "every version waits for all" if quorum is None else f"{quorum} are enough for a version"
        self.line("roster", f"{named(agreed.full_roster)}; {enough}")
        for what, text in told_of_silos(agreed):
            self.line(what, text)
        for terms in federation.exchange.members.later:
            self.line("amended", f"from version {terms.from_version} on: {shown(', '.join(terms.changes), limit=1000)}")
        alive = [name for name, silo in status.silos.items() if silo.life.is_alive]
        version = "no version yet" if status.version is None else f"version {status.version} of {status.num_versions}"
        self.line("now", f"{version}; silos alive: {named(alive) or 'none'}; aggregator {status.aggregator.words}")
        if not status.aggregator.is_alive and not status.is_finished:
            self.warning("without an aggregator there is no commit: until it runs, silos wait")
        self.line("software", ", ".join(f"{name} {version}" for name, version in installed().items()))
        for difference in differences(federation.software):
            self.warning(difference)

    def warning(self, text: str) -> None:
        """Print what is no reason to stop."""
        self.line("warning", text, "yellow")

    def silo(self, config: RunConfig, silo: str, *, is_back: bool) -> None:
        """Check the silo's text; print name, tokenizer and text."""
        self.line(
            "name", f"{silo}, " + (f"which {config.directory} has taken" if is_back else "on the roster and free")
        )
        check_silo(config, silo)
        num_tokens, times = epochs(config, silo)
        self.line("tokenizer", "the contract's")
        self.line(
            "shards",
            f"{format_count(num_tokens)} tokens, {num_sequences(config, silo):,} sequences; a "
            f"whole run reads {format_count(round(times * num_tokens))}, {times:.2f} times the text",
        )

    def machine(self, config: RunConfig, silo: str, site: SiteConfig | None) -> None:
        """Check that each process has a GPU, where there are any."""
        num_processes = config.silos[silo].processes_per_node
        num = site.silos[silo].gpus_per_node if site else joining.num_gpus()
        where = "that the site's jobs have on a node" if site else "of this machine"
        check_gpus(silo, num_processes, num, where)
        text = f"{num} {where}, processes: {num_processes}" if num else f"none {where}: it computes on the CPU"
        self.line("GPUs", text)

    def size(self, config: RunConfig, size: Size, free_bytes: int, *, is_begun: bool) -> None:
        """What was found out of model and disk."""
        fits = (
            "version 0 fits" if is_begun else "version 0 is made when all have signed the contract, as this start does"
        )
        self.line("parameters", f"{format_count(size.num_parameters)}; {fits}")
        self.line(
            "disk", f"{format_bytes(size.disk_bytes)} needed in {config.directory}, {format_bytes(free_bytes)} free"
        )

    def link(self, link: Link, size: Size, status: StoreStatus) -> None:
        """What was measured, and what a sync takes of the time between two commits."""
        seconds, between = link.seconds(size.sync_bytes), status.version_seconds
        share = f", {seconds / between:.1%} of the time between commits" if between else ""
        self.line(
            "link",
            f"{link.up / 1e6:,.0f} Mbit/s up, {link.down / 1e6:,.0f} Mbit/s down; a sync takes "
            f"{format_seconds(seconds)}{share}",
        )

    def what_happens(
        self, federation: Federation, config: RunConfig, silo: str, size: Size, status: StoreStatus, *, is_back: bool
    ) -> None:
        """Where the silo enters, and what leaves it."""
        newest = status.version or 0
        has_checkpoint = any((config.silo_directory(silo) / "checkpoints").glob("step-*/state.json"))
        if is_back and has_checkpoint:
            enters = "goes on from its newest checkpoint"
        elif config.membership.is_elastic:
            first = federation.exchange.members.enters_at(silo)
            if first is None and (proposal := adding(federation.exchange, silo)):
                first = proposal.amendment.from_version
            newest = max(newest, (first or 0) - 1)
            enters = f"takes over version {newest}, or the newest by then, and trains for the next"
        else:
            enters = "begins with version 0"
        self.line("enters", f"{silo} {enters}")
        if config.exchange.url != federation.url:
            relay = f"atoll relay --config {Path(config.directory) / 'config.yaml'} --remote {federation.url}"
            self.line("relay", f"the silo's store is {config.exchange.url}; {relay} must run where both are reached")
        self.line(
            "sends",
            f"{format_bytes(size.sync_bytes[0])} a sync, {format_bytes(size.sent_bytes)} until the end: changes of "
            "parameters, checksums, losses, counts of tokens; no text leaves",
        )
