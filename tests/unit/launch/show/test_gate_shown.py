"""What a store tells of its gate, on the page and in the terminal: the decisions of a real aggregator."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launch.show import watch as watching
from launch.show.page import Federation
from launch.show.serve import PageServer
from launch.show.watch import watch
from pretrain.config.keys import RunConfig
from tests.gates import gate_data
from tests.support import TinyText
from tests.unit.test_gate import RULE, run_of_four
from tests.waiting import PATIENCE_SECONDS, wait_for

WHY = "silo beta finds 4.7500, +0.2000 above version 2; allowed: +0.1 (gate.max_silo_rise)"


@pytest.fixture
def store(make: Callable[..., RunConfig], tiny_text: TinyText) -> Path:
    """Version 2 is the current one; what silos find stays among the members."""
    tiers = {"metrics": {"held_out": "consortium"}}
    config = make(gate=RULE | {"data": gate_data(tiny_text, "alpha", "beta")}, trust=tiers)
    run_of_four(config)
    return Path(config.store_url)


def served(store: Path, *, for_members: bool) -> str:
    server = PageServer(Federation(str(store), for_members=for_members), 0)
    server.server_close()
    html = server.page().decode()
    return html[html.index('<section id="gate">') : html.index('<section id="commits-table">')]


def lines(console: Console) -> list[str]:
    return console.export_text(clear=False).splitlines()


def test_candidates_and_decisions_are_shown(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    html = served(store, for_members=True)
    assert "Version 2 is the current one; the newest candidates for the current model" in html
    assert html.count("became the current one") == 3
    assert f"version 2 stays: {WHY}" in html
    assert "alpha 3.0000 · beta 4.7500" in html
    public = served(store, for_members=False)
    assert (public.count("version 2 stays</td>"), "4.75" in public, "beta" in public) == (2, False, False)

    # In a terminal, then line by line: the newest version is not there yet, nor what was decided of the one before.
    # The end is what is decided of the newest.
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(watching, "MOST_BUSY", 0)
    newest, decision = store / "global/000004", store / "global/000003/gate.json"
    newest.rename(store / "newest")
    decision.rename(store / "decision")
    console = Console(record=True, width=300, file=open("/dev/null", "w"))  # noqa: SIM115
    thread = threading.Thread(
        target=watch, args=(Federation(str(store), for_members=True), console), kwargs={"follow": True}, daemon=True
    )
    thread.start()
    wait_for(lambda: "gate: version 2 is the current one" in lines(console))
    told = "gate: version 3 waits for the aggregator; judged by alpha 3.0000, beta 4.7500"
    assert told in lines(console)
    (store / "decision").rename(decision)
    told = f"gate: version 3 did not, version 2 stays: {WHY}; judged by alpha 3.0000, beta 4.7500"
    wait_for(lambda: any(line.endswith(f"  {told}") for line in lines(console)))
    (store / "newest/gate.json").rename(store / "last")
    (store / "newest").rename(newest)
    wait_for(lambda: any("  commit 4/4  " in line for line in lines(console)))
    (store / "last").rename(newest / "gate.json")
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert any("  gate: version 4 did not, version 2 stays" in line for line in lines(console))
    assert sum(told in line for line in lines(console)) == 1
