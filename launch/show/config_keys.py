"""Every key of a run's configuration, read from the dataclasses: for a terminal, and as docs/configuration.md."""

import ast
import dataclasses
import difflib
import fnmatch
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from pretrain.config.adapter import AdapterConfig
from pretrain.config.allowed import ALLOWED, Numbers
from pretrain.config.errors import ConfigError
from pretrain.config.gate import GateConfig
from pretrain.config.keys import RunConfig
from pretrain.config.practice import PracticeConfig
from pretrain.trust.contract import RUN, agreed_settings

UNITS = ("tokens", "steps", "seconds", "sequences", "rounds", "versions", "nodes", "fragments", "threads", "mads")
"""Ends of keys that say in what a number counts."""
TYPES = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything"}
# Terms that are not under their own names in the contract.
ALSO_AGREED = {"model.config", "model.checkpoint", "model.seed", "tokenizer", "chat_template", RUN}
ALSO_AGREED |= {f"model.adapter.{field.name}" for field in dataclasses.fields(AdapterConfig)}
ALSO_AGREED |= {f"gate.{name}" for name in GateConfig().terms}
ALSO_AGREED |= {f"practice.{field.name}" for field in dataclasses.fields(PracticeConfig)}
INTRODUCTION = """# Configuration

All keys of a run, made from [`pretrain/config/keys.py`](../pretrain/config/keys.py) by `make config-docs`; in a
terminal `atoll config keys PATTERN` shows them. A configuration is these defaults, then YAML files in the order given,
then what the command line says: `key=value`, or `SECTION=NAME` for a preset (`atoll presets`). What a key may be by
itself is in the column *allowed*; what has to fit together is said in one line before anything starts.

A key that is *agreed* is part of the contract: all silos have the same, and only an amendment changes it while a run
goes on ([security.md](security.md)). All others are each machine's own affair.
"""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key, as people read of it."""

    name: str
    """From the root on: `inner.lr`; `silo.precision` stands for that of every silo, too."""
    kind: str
    default: str
    unit: str
    """Empty where it has none, or is no number."""
    allowed: str
    """Empty where anything of its type is, or where that depends on other keys."""
    is_agreed: bool
    """Whether it is part of the contract."""
    text: str


def all_keys() -> list[Key]:
    """In the order of the dataclasses, those without a section first."""
    found = list(_keys(RunConfig, ""))
    return sorted(found, key=lambda key: "." in key.name)


def find_keys(pattern: str) -> list[Key]:
    """Those with the pattern in their name; with `*` or `?` it is a whole name. Raises ConfigError if there is none."""
    every = all_keys()
    is_glob = any(mark in pattern for mark in "*?[")
    found = [key for key in every if (fnmatch.fnmatch(key.name, pattern) if is_glob else pattern in key.name)]
    if not found:
        names = [key.name for key in every]
        short = {name.rpartition(".")[2]: name for name in reversed(names)}
        near = [short.get(name, name) for name in difflib.get_close_matches(pattern, [*names, *short], n=3)]
        said = ", ".join(dict.fromkeys(near)) or "a part of a key's name, or nothing for all of them"
        raise ConfigError(f"config keys: {pattern!r} given; no key is called so; allowed: {said}")
    return found


def in_terminal(found: list[Key], *, width: int) -> str:
    """Keys for a terminal of so many columns: a line of facts, and below it what it is."""
    return "\n\n".join(_paragraph(key, width) for key in found)


def as_markdown() -> str:
    """docs/configuration.md."""
    parts = [INTRODUCTION]
    documents = {"": _document(RunConfig)} | {name: _document(kind) for name, kind in _sections(RunConfig)}
    for section, found in groupby(all_keys(), lambda key: key.name.rpartition(".")[0]):
        parts.append(f"\n## {section or 'The run'}\n\n{documents[section]}\n")
        if section == "silo":
            parts.append("\n`silo.KEY` is for all silos of the file, `silos.NAME.KEY` for one.\n")
        parts.append("\n| key | type | default | unit | allowed | agreed | |\n|---|---|---|---|---|---|---|\n")
        for key in found:
            agreed = "yes" if key.is_agreed else ""
            cells = (f"`{key.name}`", key.kind, f"`{key.default}`", key.unit, key.allowed, agreed, key.text)
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return "".join(parts)


def _paragraph(key: Key, width: int) -> str:
    facts = [f"{key.kind}, default {key.default}{f' {key.unit}' if key.unit else ''}"]
    facts += [f"allowed: {key.allowed}"] if key.allowed else []
    facts += ["agreed: part of the contract"] if key.is_agreed else []
    options: dict[str, Any] = {"width": width, "break_long_words": False, "break_on_hyphens": False}
    head = textwrap.fill(f"{key.name}  {'; '.join(facts)}", subsequent_indent="  ", **options)
    return f"{head}\n{textwrap.fill(key.text, initial_indent='  ', subsequent_indent='  ', **options)}"


def _keys(kind: type, prefix: str) -> Iterator[Key]:
    texts, defaults = _field_texts(kind), kind()
    agreed = ALSO_AGREED | set(_flat(agreed_settings(RunConfig()), ""))
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name}"
        assert not isinstance(field.type, str)
        if dataclasses.is_dataclass(field.type):
            yield from _keys(field.type, f"{name}.")  # type: ignore[arg-type]
        else:
            allowed = ALLOWED.get(name, "")
            unit = field.name.rpartition("_")[2]
            yield Key(
                name=name,
                kind=_type_words(field.type),
                default=json.dumps(getattr(defaults, field.name)),
                unit=unit if unit in UNITS else "",
                allowed=allowed.words if isinstance(allowed, Numbers) else ", ".join(allowed),
                is_agreed=name in agreed,
                text=" ".join(texts[field.name].split()),
            )


def _sections(kind: type) -> list[tuple[str, type]]:
    found = []
    for f in dataclasses.fields(kind):
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            found += [(f.name, f.type), *((f"{f.name}.{inner}", of) for inner, of in _sections(f.type))]
    return found


def _flat(settings: dict[str, Any], prefix: str) -> Iterator[str]:
    """Names of the contract's terms, as those of keys; `trust.metrics` is one key."""
    for name, value in settings.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")


def _document(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


def _field_texts(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass, which Python itself throws away."""
    tree = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
    found = {}
    for field, after in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = after.value if isinstance(after, ast.Expr) else None
            found[field.target.id] = text.value if isinstance(text, ast.Constant) else ""
    return {name: str(text) for name, text in found.items()}


def _type_words(kind: Any) -> str:
    if kind in TYPES:
        return TYPES[kind]
    if dataclasses.is_dataclass(kind):
        return "a section"
    of = get_args(kind)
    if isinstance(kind, UnionType):
        return " or ".join("null" if one is NoneType else _type_words(one) for one in of)
    if get_origin(kind) is list:
        return f"list of {_type_words(of[0])}"
    return f"names to {_type_words(of[1])}"
