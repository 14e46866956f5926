"""Fixtures for every test: tiny packed text, made once a session, and runs configured on it.

    def test_something(tmp_path: Path, tiny_config: TinyConfig) -> None:
        config = tiny_config(tmp_path, outer={"codec": "bf16"}, silos={"beta": None})

makes a one-silo run in tmp_path/run; the YAML that was loaded is tmp_path/tiny.yaml. See support.py for the values.
"""

import gc
import signal
from pathlib import Path
from typing import Any, Protocol

import pytest

from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config
from tests.support import TinyText, make_tiny_text, write_settings

# A shell that starts the tests in the background, or nohup, has them and their children ignore what some tests send.
for _number, _action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _action)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`: what starts processes runs in one worker, one after another; any other file in whichever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ProcessesTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if nodeid.startswith(("tests/unit/", "tests/fuzz/")) else "processes"

    return ProcessesTogether(config, log)


def pytest_collection_finish() -> None:
    """What is there to stay, a million objects, is not looked through again and again for what can go."""
    gc.collect()
    gc.freeze()


class TinyConfig(Protocol):
    """Makes a RunConfig through YAML and the real loader; `changes` are sections, merged into the tiny settings."""

    def __call__(self, directory: Path, **changes: Any) -> RunConfig: ...


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> TinyText:
    """Three corpora, their tokenizer and packed shards."""
    return make_tiny_text(tmp_path_factory.mktemp("tiny_text"))


@pytest.fixture(scope="session")
def tiny_config(tiny_text: TinyText) -> TinyConfig:
    """A function from directory and changes to a checked configuration."""

    def make(directory: Path, **changes: Any) -> RunConfig:
        return load_config([write_settings(directory, tiny_text, **changes)])

    return make
