"""`atoll config keys` and docs/configuration.md say what the dataclasses, the check and the contract do."""

import dataclasses
from pathlib import Path

import pytest

from launch.show.config_keys import all_keys, as_markdown, find_keys, in_terminal
from pretrain.config.adapter import AdapterConfig
from pretrain.config.allowed import ALLOWED
from pretrain.config.budgets import PrivateConfig
from pretrain.config.gate import GateConfig
from pretrain.config.keys import SiloConfig
from pretrain.config.personal import PersonalConfig
from pretrain.config.practice import TasksConfig
from pretrain.config.privacy import MEMBER
from pretrain.trust.contract import build_contract
from tests.conftest import TinyConfig
from tests.support import ROOT, one_line_error

KEYS = {key.name: key for key in all_keys()}


def test_the_page_is_made_from_the_dataclasses() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == as_markdown(), "make config-docs"


def test_every_key_has_a_sentence_and_what_is_allowed_is_of_a_key() -> None:
    assert [name for name, key in KEYS.items() if not key.text] == []
    assert ALLOWED.keys() <= KEYS.keys()
    sections = {
        "silo.private": PrivateConfig,
        "silo.personal_adapter": PersonalConfig,
        "silo.practice": TasksConfig,
    }
    own = {f"silo.{field.name}" for field in dataclasses.fields(SiloConfig)} - sections.keys()
    own |= {f"{name}.{field.name}" for name, kind in sections.items() for field in dataclasses.fields(kind)}
    assert own <= KEYS.keys()
    lr = KEYS["inner.warmup_steps"]
    assert (lr.kind, lr.default, lr.unit, lr.allowed, lr.is_agreed) == ("integer", "0", "steps", "0 or more", True)
    assert KEYS["membership.quorum"].kind == "integer or null"


def test_what_is_agreed_is_what_the_contract_has(tmp_path: Path, tiny_config: TinyConfig) -> None:
    contract = build_contract(tiny_config(tmp_path, practice={"every_rounds": 1}))
    sections = ("inner", "outer", "membership", "trust", "practice")
    agreed = {f"{section}.{name}" for section in sections for name in contract[section]}
    agreed = agreed - {MEMBER} | {f"{MEMBER}.{name}" for name in contract["outer"]["member_privacy"]}
    agreed |= {"name", "run_id", "sequence_tokens", "document_masking", "roster"} & contract.keys()
    agreed |= {f"model.{name}" for name in (*contract["model"], "checkpoint")} | {"tokenizer", "chat_template"}
    agreed |= {f"model.adapter.{field.name}" for field in dataclasses.fields(AdapterConfig)}
    agreed |= {f"gate.{name}" for name in GateConfig().terms}  # where there is one
    assert {name for name, key in KEYS.items() if key.is_agreed} == agreed


def test_a_pattern_is_a_part_or_a_whole_name() -> None:
    assert [key.name for key in find_keys("muon")] == ["inner.muon_lr", "inner.muon_momentum"]
    assert [key.name for key in find_keys("*.lr")] == ["inner.lr", "outer.lr"]
    assert find_keys("") == all_keys()


@pytest.mark.parametrize(("pattern", "near"), [("outer.codek", "outer.codec"), ("precison", "silo.precision")])
def test_a_pattern_of_no_key_is_one_line_with_near_names(pattern: str, near: str) -> None:
    message = one_line_error(find_keys, pattern)
    assert message.startswith(f"config keys: '{pattern}' given; no key is called so; allowed: {near}")


def test_a_terminal_of_80_columns_is_enough() -> None:
    shown = in_terminal(all_keys(), width=80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "inner.lr  number, default 0.0003; allowed: above 0; agreed: part of the contract" in shown
