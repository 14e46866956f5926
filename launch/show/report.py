"""What came of a run: `summary.json` for programs, `report.html` for people; both from `metrics.jsonl` alone."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from launch.show.display import describe_setup, format_bytes, format_seconds
from launch.show.metrics import Record
from launch.show.run import Evaluation, Run, evaluations
from pretrain.config.allowed import SPENT
from pretrain.config.keys import RunConfig
from pretrain.host.clock import utc

BYTES_BF16 = 2
MADE_BY = '<meta name="generator" content="atoll">'


def data_parallel_bytes(*, num_silos: int, num_parameters: int, steps_by_silo: Mapping[str, int]) -> int:
    """Bytes that ring all-reducing bf16 gradients at every step would have sent, all silos together.

    Each of K members sends 2 (K - 1) / K times the size of the gradient; one alone sends nothing.
    """
    share = 2 * (num_silos - 1) / num_silos
    return round(sum(share * BYTES_BF16 * num_parameters * steps for steps in steps_by_silo.values()))


def summarize(run: RunConfig | str | Path) -> dict[str, Any]:
    """Sum up a run in plain numbers and write them to `summary.json` in its directory.

    Takes a configuration or a run directory. Bytes, tokens and seconds are totals over silos. `val_loss` is that of the
    newest evaluated global model (`val_loss_round`); when silos train alone, the mean over the silos' own models.
    Raises ConfigError if nothing was recorded.
    """
    read = Run.read(run)
    summary = summary_of(read)
    temporary = read.directory / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.replace(read.directory / "summary.json")
    return summary


def summary_of(run: Run) -> dict[str, Any]:
    """The content of `summary.json`."""
    ends = {record["silo"]: record for record in run.records["summary"]}
    last_steps = {silo: steps[-1] for silo in run.silos if (steps := run.of_silo("step", silo))}
    steps_by_silo = {silo: int(record["step"]) for silo, record in last_steps.items()}
    parameters = max((int(end.get("parameters") or 0) for end in ends.values()), default=0) or None
    synced_seconds: dict[str, float] = defaultdict(float)
    for sync in run.records["sync"]:
        synced_seconds[sync["silo"]] += sync.get("wait_seconds") or 0.0
    evaluated = evaluations(run)
    return {
        "name": run.config.name,
        "silos": len(run.silos),
        "rounds": _rounds_done(run, steps_by_silo),
        "num_rounds": run.config.num_rounds,
        "sync_interval": run.config.outer.sync_interval_steps,
        "steps": max(steps_by_silo.values(), default=0),
        "parameters": parameters,
        "tokens": sum(int(record["tokens"]) for record in last_steps.values()),
        "bytes_sent": sum(int(sync.get("bytes_sent") or 0) for sync in run.records["sync"]),
        "bytes_received": sum(int(sync.get("bytes_received") or 0) for sync in run.records["sync"]),
        "bytes_data_parallel": parameters
        and data_parallel_bytes(num_silos=len(run.silos), num_parameters=parameters, steps_by_silo=steps_by_silo),
        "seconds_training": sum(end.get("seconds_training") or 0.0 for end in ends.values()),
        # A silo that was stopped has not written its summary; its waits are in its syncs all the same.
        "seconds_waiting": sum(
            ends[silo].get("seconds_waiting") or 0.0 if silo in ends else synced_seconds[silo] for silo in run.silos
        ),
        "seconds_evaluating": sum(end.get("seconds_evaluating") or 0.0 for end in ends.values()),
        "val_loss": evaluated[-1].val_loss if evaluated else {},
        "val_loss_round": evaluated[-1].round if evaluated else None,
        "val_sequences": evaluated[-1].sequences if evaluated else {},
        "val_loss_by_round": [{"round": one.round, "val_loss": one.val_loss} for one in evaluated],
        "rollbacks": [
            {key: record[key] for key in ("from_version", "to_version", "reason")} for record in run.records["rollback"]
        ],
        **({"gate": candidates} if (candidates := _candidate_rows(run)) else {}),
        **({"tasks": tasks} if (tasks := [_of_task(record) for record in run.records["tasks"]]) else {}),
        "peak_memory_bytes": {silo: end.get("peak_memory_bytes") for silo, end in ends.items()},
        **({"epsilon": spent} if (spent := _values(last_steps, "epsilon")) else {}),
        **({"member_epsilon": whole["epsilon"]} if (whole := _spent_by_all(run)) else {}),
    }


def _of_task(record: Record) -> Record:
    """What `atoll eval --tasks` has found, with what it takes to find it again."""
    names = ("task", "version", "scores", "stderr", "examples", "lm_eval", "model_sha256", "task_sha256")
    return {name: record.get(name) for name in names}


def _values(last_steps: Mapping[str, Record], name: str) -> dict[str, float]:
    """By silo, of those that have one."""
    return {silo: record[name] for silo, record in last_steps.items() if name in record}


def _rounds_done(run: Run, steps_by_silo: Mapping[str, int]) -> int:
    if run.config.exchange.kind == "none":
        return max(steps_by_silo.values(), default=0) // run.config.outer.sync_interval_steps
    # The commits are on the aggregator's machine; what a silo has adopted is on its own.
    rounds = [int(sync["round"]) for sync in run.records["sync"]]
    rounds += [run.config.round_of(int(commit["version"])) for commit in run.records["commit"]]
    return max(rounds, default=0)


def write_report(
    run: RunConfig | str | Path, comparisons: Mapping[str, str | Path] | None = None, label: str = "federated"
) -> Path:
    """Write `report.html`, one file with everything in it, and bring `summary.json` up to date; returns its path.

    `comparisons` maps a name ("central", "alone: law") to another run's directory: its held-out loss is drawn and
    tabulated beside this run's, which goes by `label`. Raises ConfigError if nothing was recorded in one of them.
    """
    # matplotlib takes a second to import; those who only want the summary should not wait for it.
    from launch.show import figures

    summary = summarize(run)
    main = Run.read(run)
    others = {name: Run.read(directory) for name, directory in (comparisons or {}).items()}
    evaluated = {name: evaluations(one) for name, one in {label: main, **others}.items()}
    silos = _silo_rows(main)
    html = template("report.html.j2").render(
        name=main.config.name,
        is_alone=main.config.exchange.kind == "none",
        written=time.strftime("%Y-%m-%d %H:%M"),
        summary=summary,
        cards=_cards(summary, evaluated[label], _spent_by_all(main)),
        comparison=comparison_rows(evaluated),
        corpora=sorted({corpus for found in evaluated.values() for one in found for corpus in one.val_loss}),
        silos=silos,
        profiles=[found[-1] for silo in main.silos if (found := main.of_silo("profile", silo))],
        has_mfu=any(silo["mfu"] for silo in silos),
        has_device=any(silo["peak_device_memory_bytes"] for silo in silos),
        commits=_commit_rows(main),
        candidates=_candidate_rows(main),
        which="every candidate",
        settings=describe_settings(main.config),
        kept=[name for name, tier in main.config.trust.metrics.items() if tier != "public"],
        figures=figures.draw_all(main, evaluated),
    )
    path = main.directory / "report.html"
    write_page(path, html)
    return path


def template(name: str) -> jinja2.Template:
    """A page of this folder; all that is put into it is text, unless it says otherwise."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (files("launch.show") / name).read_text()),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(bytes=format_bytes, seconds=format_seconds, count=format_count, utc=utc)
    return environment.get_template(name)


def write_page(path: Path, html: str) -> None:
    """Write a page, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(html)
    temporary.replace(path)


def _cards(summary: dict[str, Any], evaluated: list[Evaluation], whole: Mapping[str, float]) -> list[dict[str, str]]:
    """The headline: a few numbers, each with one line that says what it means; `whole` as `_spent_by_all` has it."""
    cards = []
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        note = f"from {first.mean:.3f} before training" if first.round == 0 else f"after round {last.round}"
        cards.append({"value": f"{last.mean:.3f}", "label": "held-out loss, nats per token", "note": note})
    pace = f"{summary['rounds']} of {summary['num_rounds']} rounds of {summary['sync_interval']} steps"
    cards.append({"value": str(summary["silos"]), "label": "silos", "note": pace})
    parameters = format_count(summary["parameters"]) if summary["parameters"] else "?"
    cards.append({"value": format_count(summary["tokens"]), "label": "tokens", "note": f"{parameters} parameters"})
    if summary["bytes_sent"]:
        note = f"{format_bytes(summary['bytes_sent'])} sent"
        if summary["bytes_data_parallel"]:
            ratio = summary["bytes_data_parallel"] / summary["bytes_sent"]
            note += f"; {format_bytes(summary['bytes_data_parallel'])} if every step were all-reduced in bf16"
            cards.append({"value": f"{ratio:.3g}\u00d7", "label": "fewer bytes than data-parallel", "note": note})
    busy = summary["seconds_training"] + summary["seconds_waiting"] + summary["seconds_evaluating"]
    if busy and summary["bytes_sent"]:
        note = f"{format_seconds(summary['seconds_waiting'])} of {format_seconds(busy)}, all silos together"
        cards.append({"value": f"{summary['seconds_waiting'] / busy:.1%}", "label": "time spent waiting", "note": note})
    if whole:
        note = f"delta {whole['delta']:g}, for all that a silo delivers"
        cards.append({"value": f"{whole['epsilon']:.3g}", "label": "epsilon spent", "note": note})
    return cards


def comparison_rows(evaluated: Mapping[str, list[Evaluation]]) -> list[dict[str, Any]]:
    """One row per run, the reported one first: tokens, held-out losses, and the mean against the first run's."""
    rows: list[dict[str, Any]] = []
    for name, found in evaluated.items():
        if not found:
            continue
        last = found[-1]
        base = rows[0]["mean"] if rows else None
        relative = None if base is None else last.mean / base - 1
        rows.append(
            {
                "name": name,
                "tokens": "" if math.isnan(last.tokens) else format_count(round(last.tokens)),
                "mean": last.mean,
                "relative": relative,
                "val_loss": last.val_loss,
            }
        )
    return rows


def _silo_rows(run: Run) -> list[dict[str, Any]]:
    rows = []
    for silo in run.silos:
        steps, ends = run.of_silo("step", silo), run.of_silo("summary", silo)
        end = ends[-1] if ends else {}
        speeds = [step["tokens_per_second"] for step in steps if step.get("tokens_per_second")]
        shares = [step["mfu"] for step in steps if step.get("mfu")]
        rows.append(
            {
                "name": silo,
                "setup": (describe_setup(run.config.silos[silo]) if silo in run.config.silos else "") + _spent(steps),
                "steps": steps[-1]["step"] if steps else 0,
                "tokens": format_count(steps[-1]["tokens"]) if steps else "0",
                "loss": steps[-1]["loss"] if steps else None,
                "tokens_per_second": sorted(speeds)[len(speeds) // 2] if speeds else None,
                "mfu": sorted(shares)[len(shares) // 2] if shares else None,
                "bytes_sent": sum(sync.get("bytes_sent") or 0 for sync in run.of_silo("sync", silo)),
                "peak_memory_bytes": end.get("peak_memory_bytes"),
                "peak_device_memory_bytes": end.get("peak_device_memory_bytes"),
            }
        )
    return rows


def _spent_by_all(run: Run) -> dict[str, float]:
    """What all versions have spent of the budget of all silos; empty where there is none, or no commit here."""
    commits = [record for record in run.records["commit"] if "epsilon" in record]
    newest = max(commits, key=lambda record: int(record["version"]), default={})
    return {name: newest[name] for name in SPENT if name in newest}


def _spent(steps: list[Record]) -> str:
    """What a private silo had spent at its newest step, in words."""
    if not (spent := {name: steps[-1][name] for name in SPENT if name in steps[-1]} if steps else {}):
        return ""
    return ", private: " + ", ".join(f"{name} {value:.4g}" for name, value in spent.items())


def _commit_rows(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "version": commit["version"],
            "weights": _weights(commit),
            "divisor": commit.get("divisor"),
            "update_norm": commit.get("update_norm"),
            "cosine_mean": commit.get("cosine_mean"),
            "digest": str(commit.get("digest") or "")[:12],
        }
        # All fragments of a version are one outer step.
        for commit in {commit["version"]: commit for commit in run.records["commit"]}.values()
    ]


def _candidate_rows(run: Run) -> list[dict[str, Any]]:
    """What the contract's gate has decided about its candidates, where the aggregator ran here."""
    return [
        {
            "version": record["version"],
            "losses": {judge: f"{loss:.4f}" for judge, loss in record["losses"].items()},
            "decision": "current from then on"
            if record["is_current"]
            else f"version {record['current']} stays: {'; '.join(record['reasons'])}",
        }
        for record in run.records["gate"]
    ]


def _weights(commit: Record) -> dict[str, float]:
    """Weight by silo, whether the record has a mapping or a list in the order of its silos."""
    weights = commit.get("weights") or {}
    return dict(weights) if isinstance(weights, dict) else dict(zip(commit.get("silos") or [], weights, strict=False))


def describe_settings(config: RunConfig) -> list[tuple[str, str]]:
    """What a reader wants to know before believing the numbers."""
    inner, outer = config.inner, config.outer
    model = config.model.checkpoint or config.model.config.get("model_type", "")
    shape = ", ".join(
        f"{key.replace('num_', '').replace('_', ' ')} {config.model.config[key]}"
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        if key in config.model.config
    )
    settings = [
        ("model", f"{model} ({shape})" if shape else str(model)),
        ("sequence", f"{config.sequence_tokens} tokens"),
        ("inner", f"{inner.optimizer}, lr {inner.lr:g}, {inner.schedule}, {inner.num_steps:,} steps"),
    ]
    if config.exchange.kind != "none":
        momentum = f", momentum {outer.momentum:g}" if outer.optimizer == "nesterov" else ""
        settings.append(
            ("outer", f"{outer.optimizer}, lr {outer.lr:g}{momentum}, every {outer.sync_interval_steps} steps")
        )
        settings.append(("codec", f"{outer.sent_codec} up, {outer.downlink_codec} down"))
        if outer.num_fragments > 1 or outer.overlap_steps:
            streaming = f"{outer.num_fragments} fragments in turn, overlap {outer.overlap_steps} steps"
            settings.append(("streaming", f"{streaming}, mixing {outer.mixing:g}"))
    return settings


def format_count(count: float) -> str:
    """1,234 or 12.3 M: a count in few digits."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.{max(0, 2 - int(math.log10(count / size)))}f} {unit}"
    return f"{count:,.0f}"
