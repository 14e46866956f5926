"""The model card of an export: what a stranger may know of a model. No torch.

Names, numbers of the contract, and counts; no place, address or key. What the contract's `trust.metrics` does not make
public is left out.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from pretrain.config.adapter import PROMPT
from pretrain.config.errors import ConfigError, named
from pretrain.config.keys import OuterConfig, RunConfig
from pretrain.host.foreign import shown

CARD = "README.md"  # where model hubs look for it
LICENSE_CHARACTERS = 100
USE_ADAPTER = [
    "from peft import PeftModel",
    'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "PATH")',
]


def check_license(given: str) -> None:
    """Raises ConfigError for what is no name of a license."""
    if not given.isprintable() or len(given) > LICENSE_CHARACTERS:
        raise ConfigError(
            f"--license: {shown(given)!r} given; allowed: a name as hubs know it (apache-2.0, cc-by-4.0, other), up to "
            f"{LICENSE_CHARACTERS} characters"
        )


def model_card(
    config: RunConfig,
    provenance: Mapping[str, Any],
    *,
    num_parameters: int,
    license: str = "",
    held_out: Mapping[str, str] | None = None,
    is_adapter: bool = False,
) -> str:
    """Markdown, with the YAML that model hubs read above it; `held_out` is corpus to its loss, in words."""
    about: dict[str, Any] = {"license": license} if license else {}
    about |= {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["atoll", "federated"],
    }
    kind = config.model.config.get("model_type", "continued from a checkpoint")
    rows = {
        "model": f"{kind}, {num_parameters:,} parameters",
        **_adapter(config, provenance),
        "training sequences": f"{config.sequence_tokens:,} tokens"
        + (", documents kept apart" if config.document_masking else ""),
        **_training(config, provenance),
        **_record(provenance),
        "parameters_digest": f"`{provenance['parameters_digest']}`",
    }
    lines = ["---", yaml.safe_dump(about, sort_keys=False).rstrip(), "---", f"# {shown(config.name)}", ""]
    lines += [f"A language model that {_who(config)}.", "", "| | |", "|---|---|"]
    lines += [f"| {what} | {_cell(text)} |" for what, text in rows.items()]
    if held_out:
        lines += ["", "## Held-out loss", "", "| text | nats per token |", "|---|---|"]
        lines += [f"| {_cell(corpus)} | {_cell(loss)} |" for corpus, loss in sorted(held_out.items())]
    lines += _gate(provenance)
    lines += [
        *("", "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
        *(USE_ADAPTER if is_adapter else ['model = AutoModelForCausalLM.from_pretrained("PATH")']),
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        *("```", "", "It was not tuned to follow instructions, and nothing filters what it says."),
    ]
    return "\n".join(lines) + "\n"


def _adapter(config: RunConfig, provenance: Mapping[str, Any]) -> dict[str, str]:
    """Of which model it is, where not all of it was trained."""
    adapter = config.model.adapter
    if not adapter.is_on:
        return {}
    if adapter.kind == PROMPT:
        return {"adapter": f"a prompt of {adapter.tokens} tokens before each document; the base was not trained"}
    size = f"{adapter.kind} of rank {adapter.rank}, alpha {adapter.alpha:g}"
    rows = {"adapter": f"{size}, beside {named(adapter.targets)}; merge: {adapter.merge}; the base was not trained"}
    if own := provenance.get("personal"):
        rows["personal adapter"] = f"{own['adapter']}; trained by {own['silo']} alone, at step {own['step']:,}"
    return rows


def _who(config: RunConfig) -> str:
    if config.exchange.kind == "none":
        return "one institution trained alone, with Atoll"
    return "several institutions trained together with Atoll; the text of none left its site"


def _training(config: RunConfig, provenance: Mapping[str, Any]) -> dict[str, str]:
    """How far it was trained, on whose text, and how that came together."""
    inner, steps = config.inner, config.outer.sync_interval_steps
    rows = {"inner optimizer": f"{inner.optimizer}, peak learning rate {inner.lr:g}"}
    if "silo" in provenance:
        return rows | {"silo": str(provenance["silo"]), "steps": f"{inner.num_steps:,}"}
    version = provenance["version"]
    rows["rounds"] = f"{config.round_of(version)} of {config.num_rounds}, of {steps:,} steps each (version {version})"
    tokens: Mapping[str, int] = provenance.get("tokens", {})
    rows["silos"] = ", ".join(
        f"{name} ({tokens[name]:,} tokens)" if name in tokens else name for name in config.full_roster
    )
    if tokens:
        rows["tokens"] = f"{sum(tokens.values()):,}"
    rows["merged"] = _merged(config.outer)
    if without := provenance.get("without"):
        rows["without"] = f"what {without['member']} contributed from version {without['from_version']} on"
    return rows


def _record(provenance: Mapping[str, Any]) -> dict[str, str]:
    """By which anybody who has the run's store can tell that it is this one."""
    rows = {"contract": "contract_sha256", "commit": "commit_sha256"}
    return {what: f"sha256 `{provenance[key]}`" for what, key in rows.items() if provenance.get(key)}


def _gate(provenance: Mapping[str, Any]) -> list[str]:
    """How the contract's gate has judged it."""
    if not (found := provenance.get("gate")):
        return []
    version, current = provenance["version"], found["current"]
    which = "is the run's current one" if version == current else "is not the run's current one"
    other = "" if version == current else f", which is version {current}" if current is not None else "; none is yet"
    lines = ["", "## Gate", "", f"Version {version} {which}{other}, by the rule that was agreed before the run:", ""]
    lines += [f"- {name} {limit:g}" for name, limit in found["rule"].items()]
    lines += [f"- not kept: {_cell(why)}" for why in found.get("reasons", [])]
    if losses := found.get("losses"):
        lines += ["", "| judge | nats per token |", "|---|---|"]
        lines += [f"| {_cell(judge)} | {loss:.4f} |" for judge, loss in sorted(losses.items())]
    return lines


def _merged(outer: OuterConfig) -> str:
    how = f"{outer.optimizer}, learning rate {outer.lr:g}" + (
        f", momentum {outer.momentum:g}" if outer.optimizer == "nesterov" else ""
    )
    fragments = "" if outer.num_fragments == 1 else f", in {outer.num_fragments} fragments"
    return f"{outer.merge} of the silos' changes every {outer.sync_interval_steps:,} steps{fragments}; outer {how}"


def _cell(text: str) -> str:
    """Text of others in a table of Markdown."""
    return "".join(f"\\{c}" if c in "|<[*_" else c for c in shown(text, limit=1000))
