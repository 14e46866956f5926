"""What a tracker's library is handed: numbers that a policy names, each with a line in the egress ledger."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.config.keys import RunConfig, WandbConfig
from pretrain.host.journal import Journal
from pretrain.host.tracker import SILENT, server_host
from pretrain.trust.egress import blake3_of, egress_file, read_lines, tracked
from pretrain.trust.policy import Policy


class Library:
    """Stands in for wandb, which would need a server: says what it was told."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.told: dict[str, Any] = {}
        self.axes: dict[str, str] = {}

    def login(self, *, prompt: bool) -> bool:
        return not prompt

    def Settings(self, **settings: Any) -> dict[str, Any]:  # its name there
        self.settings = settings
        return settings

    def init(self, **told: Any) -> Any:
        self.told = told
        return SimpleNamespace(log=self.logged.append, finish=lambda: None, define_metric=self.define_metric)

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.axes[name] = step_metric


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setitem(sys.modules, "wandb", found)  # type: ignore[arg-type]
    return found


def journal(tmp_path: Path, policy: Policy, mode: str) -> Journal:
    config = RunConfig(directory=str(tmp_path), wandb=WandbConfig(mode=mode))
    return Journal(config, "silos/law", silo="law", allows=policy.shows, says=tracked(config, "law", policy))


def test_other_numbers_stay_here(library: Library, tmp_path: Path) -> None:
    policy = Policy(metrics=["step/loss", "eval/*"], file="p.yaml", sha256="5" * 64)
    kept = journal(tmp_path, policy, "online")
    kept.record("step", loss=1.5, tokens=7)
    kept.record("sync", bytes_sent=9)
    kept.record("eval", val_loss={"law": 2.0})
    kept.close()
    assert library.logged == [{"step/loss": 1.5}, {"eval/law": 2.0}]
    assert library.axes == {"eval/*": "eval/step"}  # the others' axes may not leave
    agreed = {"inner", "membership", "member", "model", "name", "outer", "roster", "run_id"}
    assert set(library.told["config"]) == agreed | {"sequence_tokens", "document_masking"}
    assert str(tmp_path) not in json.dumps(library.told["config"])
    assert library.settings.items() >= SILENT.items()
    lines = [line for line, _ in read_lines(egress_file(tmp_path, "law")) if line]
    assert [(line.kind, line.where, line.name) for line in lines] == [
        ("wandb", server_host(), name) for name in ("init", "step", "eval")
    ]
    data = json.dumps({"step/loss": 1.5}).encode()
    assert (lines[1].num_bytes, lines[1].blake3) == (len(data), blake3_of(data))
    assert {line.rule for line in lines} == {f"{policy.sha256}: metrics"}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3  # here all of it is kept


@pytest.mark.parametrize(("mode", "num_lines"), [("offline", 0), ("online", 3), ("disabled", 0)])
def test_what_is_recorded_offline_has_not_left(mode: str, num_lines: int, library: Library, tmp_path: Path) -> None:
    kept = journal(tmp_path, Policy(), mode)
    kept.record("step", loss=1.5, tokens=7)
    kept.record("sync", bytes_sent=9)
    kept.close()
    file = egress_file(tmp_path, "law")
    assert (len(list(read_lines(file))) if file.exists() else 0) == num_lines
    assert len(library.logged) == (2 if mode != "disabled" else 0)
    assert not library.settings.keys() & SILENT.keys()


def test_the_library_knows_what_silences_it() -> None:
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(**SILENT)
    assert {name: getattr(settings, name) for name in SILENT} == SILENT
