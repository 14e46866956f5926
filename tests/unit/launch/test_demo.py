"""`atoll demo` and `atoll demo --chat`: what is wrong is said at the start, and each silo alone can train."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli
from launch.compare.compare import plan_runs
from launch.demo import run_demo
from launch.demo_chat import adapters_config, comparison, run_demo_chat
from pretrain.config.errors import ConfigError
from tests.support import CORPORA, TinyText, one_line_error


def test_another_place_is_refused_before_anything_is_prepared(tmp_path: Path) -> None:
    said = "directory: 'elsewhere' given; allowed: --directory elsewhere"
    place = tmp_path / "demo"
    assert one_line_error(run_demo, place, corpora=None, compare=False, overrides=["directory=elsewhere"]) == said
    assert one_line_error(run_demo_chat, place, overrides=["directory=elsewhere"]) == said
    assert not place.exists()


def test_options_of_the_other_demo_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for option in (["--compare"], ["--corpora", "texts"]):
        found = CliRunner().invoke(cli.app, ["demo", "--chat", *option])
        assert isinstance(found.exception, ConfigError)
        assert str(found.exception).startswith(f"{option[0]}: given with --chat; allowed: without")
    shown = CliRunner().invoke(cli.app, ["demo", "--chat", "--dry-run"])
    assert shown.exit_code == 0
    assert "runs/demo-chat" in shown.output
    assert not any(tmp_path.iterdir())


def test_what_is_compared_trains_both_factors_at_once(tmp_path: Path, tiny_text: TinyText) -> None:
    turns = ["model.adapter.merge=alternate", "outer.num_fragments=2", "outer.second_moments=local"]
    config = adapters_config(tmp_path, tiny_text.packed, tiny_text.tokenizer, tmp_path / "base", turns)
    assert config.model.adapter.takes_turns
    runs = plan_runs(comparison(config))
    assert [(one.model, one.silo) for one in runs] == [("central", ""), *(("alone", name) for name in CORPORA)]
    for one in runs:
        assert not one.config.model.adapter.takes_turns
        assert one.config.model.checkpoint == str(tmp_path / "base")
        assert one.config.inner.num_steps == config.inner.num_steps
