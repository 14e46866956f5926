"""A silo says that it takes part no more."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from pretrain.exchange.store import StoreExchange
from tests.conftest import TinyConfig
from tests.unit.exchange.test_rollback import command
from tests.unit.test_aggregate import start


def test_leaving(tmp_path: Path, tiny_config: TinyConfig, monkeypatch: Any, capsys: Any) -> None:
    config = tiny_config(tmp_path, membership={"quorum": 1}, trust={"directory": ""})
    settings = ["--config", str(tmp_path / "tiny.yaml")]

    def leave(silo: str, *overrides: str) -> str:
        return command(["leave", *settings, "--silo", silo, *overrides], monkeypatch, capsys)

    url = config.store_url
    assert leave("alpha") == f"atoll: exchange.url: {url} given; there is no run in it (no contract.json)\n"
    start(config)
    assert leave("gamma") == "atoll: --silo: 'gamma' given; allowed: alpha, beta\n"
    assert leave("alpha") == f"atoll: --silo: 'alpha' given; this silo has never joined in {url}\n"
    assert "inner.lr is 0.5 here and 0.003 there" in leave("alpha", "inner.lr=0.5")
    assert leave("alpha", "membership.quorum=null") == (
        "atoll: membership.quorum: null given; without a quorum every version waits for all of the roster\n"
    )
    exchange = StoreExchange(url)
    exchange.announce("alpha", left=False, version=0)
    assert leave("alpha") == "silo alpha left at version 0\n"
    word = exchange.membership("alpha")
    assert word
    assert (word.left, word.version) == (True, 0)
    assert leave("alpha") == f"atoll: --silo: 'alpha' given; this silo has left already in {url}\n"
    exchange.announce("alpha", left=False, version=0)
    code = (
        "import sys; from pathlib import Path; from pretrain.host.lock import lock_directory; "
        "lock_directory(Path(sys.argv[1]), 'a'); print('runs', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(config.silo_directory("alpha"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as silo:
        assert silo.stdout
        assert silo.stdout.readline() == "runs\n"
        message = leave("alpha")
        silo.communicate("\n")
    assert f"silo alpha runs there already (process {silo.pid}); stop it" in message
    assert leave("alpha") == "silo alpha left at version 0\n"
    collective = tiny_config(tmp_path / "c", exchange={"kind": "collective", "url": "tcp://localhost:1"})
    settings[1] = str(tmp_path / "c/tiny.yaml")
    assert collective.exchange.kind == "collective"
    assert leave("alpha") == (
        "atoll: exchange.kind: 'collective' given; a silo can leave only a run through a 'store'\n"
    )
