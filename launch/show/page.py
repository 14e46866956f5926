"""The page of a federation: all that its store tells to whoever may read it, as one HTML file that asks for nothing."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from launch.show.display import format_bytes, format_seconds
from launch.show.history import History, kept_back, read_history
from launch.show.opened import Opened
from launch.show.report import comparison_rows, describe_settings, format_count, template
from launch.show.run import Evaluation, Run, evaluations
from launch.show.status import remarks, waiting_words
from launch.show.status_reader import Reader, SiloStatus, StoreStatus
from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig
from pretrain.host.clock import utc
from pretrain.host.foreign import shown

NEWEST_COMMITS = 50  # that the page has a row for; the charts have all
OF_MODEL = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads")


class Federation:
    """A store that is looked at again and again; what never changes in it is read once."""

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any] | None = None,
        *,
        for_members: bool = False,
        beside: Mapping[str, str | Path] | None = None,
    ) -> None:
        """`options` go to fsspec; `for_members` also has what the contract keeps in the consortium (`trust.metrics`);
        `beside` maps names to directories of runs whose held-out losses are shown, too.

        Raises ConfigError for a directory in which nothing was evaluated, or for no store.
        """
        self._url, self._options, self._for_members = url, options, for_members
        self._beside = {name: evaluations(Run.read(directory)) for name, directory in (beside or {}).items()}
        for name, found in self._beside.items():
            if not found:
                raise ConfigError(f"--beside: {name}={beside[name]} given; nothing was evaluated there")  # type: ignore[index]
        self._charts: tuple[History, dict[str, Any]] | None = None
        self._opened: Opened | None = None
        self.look()

    def look(self) -> None:
        """Read what is new. Raises ConfigError as `Opened` does; what was read before stays."""
        began = time.monotonic()
        opened = Opened(self._url, self._options, before=self._opened)
        reader = Reader(opened)
        history = read_history(opened, reader.roster, for_members=self._for_members)
        self._opened, self.history = opened, history
        """How the run came to where it is."""
        self.status = reader.status()
        """Where it stands."""
        self.look_seconds = time.monotonic() - began
        """How long that took."""

    def page(self, trouble: str = "") -> str:
        """The page of what was read last, as HTML; `trouble` says why that is not new."""
        # matplotlib takes a second to import; those who only watch should not wait for it.
        from launch.show import charts

        assert self._opened
        if not self._charts or self._charts[0] != self.history:
            drawn = {"charts": charts.draw_charts(self.history), **_held_out(self.history, self._beside)}
            self._charts = self.history, drawn
        consortium = set(kept_back(self._opened.contract, for_members=False)) - set(self.history.kept)
        return template("federation.html.j2").render(
            name=self.history.name,
            trouble=trouble,
            written=utc(time.time()),
            kept=self.history.kept,
            confidential=sorted(consortium),
            **self._charts[1],
            settings=_settings(self._opened),
            cards=_cards(self.status, self.history),
            silos=[_silo_row(name, self.status, self.history) for name in self.history.silos],
            next=0 if self.status.is_finished else (self.status.version or 0) + 1,
            awaited=waiting_words(self.status),
            is_finished=self.status.is_finished,
            **_gate(self.status, self.history),
            remarks=[*_refusals(self.status, self.history), *remarks(self.status)],
            events=self.history.events,
            commits=self.history.versions[::-1][:NEWEST_COMMITS],
        )


def _held_out(history: History, runs: Mapping[str, list[Evaluation]]) -> dict[str, Any]:
    """A table of the run's model, of models beside it, and of runs on this machine; and their curves by tokens."""
    from launch.show import figures

    found, versions = history.held_out, history.held_out.evaluations(history.tokens)
    beside = {name: [one] for name, one in found.evaluations_beside(with_tokens="tokens" not in history.kept).items()}
    # The newest of those that are of the most corpora.
    best = [max(versions, key=lambda one: (len(one.val_loss), one.round))] if versions else []
    rows = {**({f"version {best[0].round}": best} if best else {}), **beside, **runs}
    curves = {**({"federated": versions} if best else {}), **beside, **runs}
    known = {name: told for name, all in curves.items() if (told := [one for one in all if one.tokens >= 0])}
    corpora = sorted({corpus for found in rows.values() for corpus in found[-1].val_loss})
    counts, named = best[0].sequences if best else {}, corpora[: figures.MOST_PANELS]
    return {
        "comparison": comparison_rows(rows),
        "corpora": named,
        "left_out": len(corpora) - len(named),
        "sequences": [(corpus, counts[corpus]) for corpus in named if corpus in counts],
        "beside": figures.draw_held_out(known) if known.keys() - {"federated"} else "",
    }


def _gate(status: StoreStatus, history: History) -> dict[str, Any]:
    """The gate's newest candidates, without their losses where those are kept."""
    gate = status.gate
    return {
        "candidates": [one.row(with_losses="held_out" not in history.kept) for one in gate.candidates] if gate else [],
        "which": f"{gate.current_words}; the newest candidates" if gate else "",
    }


def _cards(status: StoreStatus, history: History) -> list[dict[str, str]]:
    """The headline: a few numbers, each with one line that says what it means."""
    version, silos = status.version or 0, status.silos.values()
    pace = "" if status.version_seconds is None else f"{format_seconds(status.version_seconds)} each, the median"
    cards = [{"value": f"{version:,}", "label": f"of {status.num_versions:,} versions", "note": pace}]
    if status.version_seconds is not None and not status.is_finished:
        left = format_seconds(status.version_seconds * (status.num_versions - version))
        cards.append({"value": left, "label": "left", "note": "at the pace of the versions so far"})
    if history.losses:
        (first, before), (_, last) = history.losses[0], history.losses[-1]
        note = f"mean of the newest commit's silos; {before:.3f} in version {first}"
        cards.append({"value": f"{last:.3f}", "label": "training loss, nats per token", "note": note})
    if means := history.held_out.means:
        (first, before), (newest, last) = means[0], means[-1]
        note = f"version {newest}, mean over corpora; {before:.3f} in version {first}"
        cards.append({"value": f"{last:.3f}", "label": "held-out loss, nats per token", "note": note})
    alive = sum(silo.life.is_alive for silo in silos)
    note = f"{sum(silo.part == 'yes' for silo in silos)} take part, {alive} alive; aggregator {_life(status)}"
    cards.append({"value": str(len(silos)), "label": "silos", "note": note})
    if "tokens" not in history.kept:
        tokens = sum(part.tokens or 0 for one in history.versions for part in one.parts.values())
        cards.append({"value": format_count(tokens), "label": "tokens", "note": "behind all commits, of all silos"})
    sent = sum(part.num_bytes or 0 for one in history.versions for part in one.parts.values())
    note = f"by all silos; {format_bytes(sum(one.num_bytes for one in history.versions))} received by each"
    cards.append({"value": format_bytes(sent), "label": "sent", "note": note})
    return cards


def _life(status: StoreStatus) -> str:
    """Without the name of the machine, which `atoll status` says."""
    return status.aggregator.words.partition(" (")[0]


def _silo_row(name: str, status: StoreStatus, history: History) -> dict[str, Any]:
    silo: SiloStatus = status.silos[name]
    tokens = sum(count for _, count in history.of_silo(name, "tokens"))
    total = sum(part.tokens or 0 for one in history.versions for part in one.parts.values())
    held_out, epochs = history.held_out.curve(name), history.of_silo(name, "epochs")
    losses, waits = history.of_silo(name, "loss"), [seconds for _, seconds in history.of_silo(name, "waited_seconds")]
    now, mood = "", ""
    if silo.has_delivered:
        now, mood = "delivered", "good"
    elif silo.refusals:
        now, mood = "refused", "bad"
    elif silo.is_awaited:
        now, mood = "awaited", "open"
    return {
        "name": name,
        "life": silo.life,
        "part": silo.part,
        "now": now,
        "mood": mood,
        "commits": silo.num_commits,
        "newest": "" if silo.newest_commit is None else silo.newest_commit,
        "tokens": "" if "tokens" in history.kept else format_count(tokens),
        "share": f"{tokens / total:.1%}" if total else "",
        "epochs": f"{epochs[-1][1]:.2f}" if epochs else "",
        "loss": f"{losses[-1][1]:.4f}" if losses else "",
        "held_out": f"{held_out[-1][1]:.4f}" if held_out else "",
        "sent": format_bytes(sum(number for _, number in history.of_silo(name, "num_bytes"))),
        "waits": format_seconds(median(waits)) if waits else "",
    }


def _refusals(status: StoreStatus, history: History) -> list[str]:
    """Who was refused or did not count, and why, unless a reason could tell a number that is kept."""
    said = []
    for name, silo in status.silos.items():
        if silo.refusals and not silo.has_delivered and not status.is_finished:
            why = "" if history.kept else f": {silo.refusals[-1]}"
            said.append(f"silo {name} was refused for version {(status.version or 0) + 1}{why}")
        if silo.not_counted:
            times = f"{len(silo.not_counted)} version{'s' if len(silo.not_counted) > 1 else ''}"
            said.append(f"silo {name} did not count in {times if history.kept else silo.not_counted[-1]}")
    return said


def _settings(opened: Opened) -> list[tuple[str, str]]:
    """What was agreed, in words; of the model what the contract says of it."""
    model = opened.contract.get("model")
    said = model.get("config") if isinstance(model, dict) else None
    config = {key: shown(said[key], limit=40) for key in OF_MODEL if key in said} if isinstance(said, dict) else {}
    sequence = opened.contract.get("sequence_tokens")
    terms = replace(
        opened.terms,
        model=ModelConfig(config=config),
        sequence_tokens=sequence if isinstance(sequence, int) else 0,
    )
    rules = terms.membership
    quorum = "all silos" if rules.quorum is None else f"{rules.quorum} silos are enough after a deadline"
    return [*describe_settings(terms), ("commit", quorum), ("contract", opened.contract_sha256[:12])]
