"""A federation from its store alone: what is read, the page in a real Chromium, the server, the terminal."""

import http.client
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from rich.console import Console

from launch.report import report
from launch.show import serve as serving
from launch.show import watch as watching
from launch.show.page import Federation
from launch.show.report import MADE_BY, write_report
from launch.show.serve import PageServer
from launch.show.status import remarks
from launch.show.watch import watch
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Evaluation
from pretrain.trust.ledger import sha256_bytes
from tests.support import TinyText, one_line_error
from tests.unit.launch.show.chromium import Chromium, chromium
from tests.unit.launch.show.federation import (
    HOSTILE,
    NEWEST,
    REASON,
    SILOS,
    TOKENS,
    held_out,
    loss,
    make_federation,
    present,
)
from tests.unit.launch.show.test_report import make_run
from tests.unit.test_aggregate import one_version
from tests.unit.test_signed import begin, deliver
from tests.waiting import wait_for

PHONE, DESK = 390, 1200
CHARTS = ("loss", "loss_in_time", "held_out", "commits", "tokens", "waiting", "bytes", "norms", "cosine")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """The store of the five silos; never write into it."""
    return Path(make_federation(tmp_path_factory.mktemp("five"), tiny_text).store_url)


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of it, with the times of its files."""
    return Path(shutil.copytree(made, tmp_path / "store"))


@pytest.fixture(scope="module")
def page(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report, as the command writes it."""
    file = tmp_path_factory.mktemp("page") / "federation.html"
    file.write_text(MADE_BY)  # a report gives way to a newer one
    report(str(made), output=file)
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with chromium() as found:
        yield found


def change(file: Path, how: Callable[[dict[str, Any]], object]) -> None:
    said = json.loads(file.read_text())
    how(said)
    file.write_text(json.dumps(said))


# ---- what is read


def test_who_was_in_which_commit_with_what(made: Path) -> None:
    federation = Federation(str(made))
    history = federation.history
    assert [one.number for one in history.versions] == list(range(NEWEST + 1))
    for one in history.versions[1:]:
        silos = present(one.number, again=one.number > 5)
        assert list(one.parts) == silos
        assert [part.loss for part in one.parts.values()] == [loss(silo, one.number) for silo in silos]
        assert one.loss == pytest.approx(sum(loss(silo, one.number) for silo in silos) / len(silos))
        assert [part.tokens for part in one.parts.values()] == [TOKENS[silo] for silo in silos]
        assert [part.epochs for part in one.parts.values()] == [one.number / 4] * len(silos)
        # What was found of versions that were taken back is not there.
        of_silos = history.held_out.of_silos.items()
        told = {silo: words[one.number].losses[silo] for silo, words in of_silos if one.number in words}
        assert told == {silo: held_out(silo, one.number) for silo in silos}
        # Each was there one minute more before the commit than the one before it.
        assert [part.waited_seconds for part in one.parts.values()] == [
            60.0 * (1 + SILOS.index(silo)) for silo in silos
        ]
        assert not any(part.is_late or not part.counts for part in one.parts.values())
    assert history.taken_back == [(7, 5)]
    told = [(event.version, event.who, event.what) for event in history.events]
    assert told == [
        (0, "aggregator", "took the lease"),
        *((0, silo, "joined") for silo in ("alpha", "beta", "delta", "gamma")),
        (3, "epsilon", "joined"),
        (5, "aggregator", "rolled back"),
        (5, "aggregator", "took the lease"),
        (8, "gamma", "left"),
    ]
    assert [name for name, silo in federation.status.silos.items() if silo.is_awaited] == ["beta", "delta", "epsilon"]


def test_a_manifest_that_no_commit_names_tells_nothing_nor_does_what_cannot_be(store: Path) -> None:
    change(store / "silos/alpha/000003/manifest.json", lambda said: said["metrics"].update(loss=99.0))
    (store / "silos/beta/000002/manifest.json").write_text('{"loss": 98}')
    absurd = store / "silos/delta/000003/manifest.json"
    change(absurd, lambda said: said["metrics"].update(loss=1.7e308, pseudo_gradient_norm=-1.7e308))
    named = {"manifest_sha256": sha256_bytes(absurd.read_bytes())}
    change(store / "global/000003/commit.json", lambda said: said["contributors"][2].update(named))
    federation = Federation(str(store))
    versions = federation.history.versions
    assert (versions[3].parts["alpha"].loss, versions[3].parts["alpha"].tokens) == (None, TOKENS["alpha"])
    assert versions[2].parts["beta"].loss is None
    assert (versions[3].parts["delta"].loss, versions[3].parts["delta"].norm) == (None, None)
    assert remarks(federation.status) == [
        "passed over, as they are not what their names say: silos/beta/000002/manifest.json"
    ]


@pytest.mark.parametrize("for_members", [False, True])
def test_what_members_keep_is_not_there(store: Path, for_members: bool) -> None:
    tiers = dict.fromkeys(("loss", "held_out", "tokens", "epochs"), "consortium") | {"seconds_per_step": "member"}
    change(store / "contract.json", lambda said: said["trust"].update(metrics=tiers))
    hostile = {"name": "</title><script>1</script>", "model": {"config": {"model_type": "<b>\x1b[2J"}}}
    change(store / "contract.json", lambda said: said.update(hostile))
    many = {f"c{number:02d}": 1.0 for number in range(64)}  # which alone count, as with what was said before it is more
    exchange = StoreExchange(str(store))
    digest = json.loads(exchange.commit_bytes(NEWEST))["parameters_digest"]
    word = Evaluation(version=NEWEST, parameters_digest=digest, losses=many, sequences=dict.fromkeys(many, 8))
    exchange.tell_evaluation("alpha", word)
    html = Federation(str(store), for_members=for_members).page()
    assert len(re.findall(r'<th class="n">c\d\d</th>', html)) == (22 if for_members else 0), "and alpha and beta"
    assert ("Only the mean has 44 corpora more." in html) == for_members
    assert ('id="loss"' in html, 'id="tokens"' in html, 'id="loss_in_time"' in html) == (for_members,) * 3
    assert ("4.3750" in html, "46.0%" in html, "2.50</td>" in html) == (for_members,) * 3
    assert ('id="held_out"' in html, 'id="beside"' in html) == (for_members,) * 2
    assert ('id="waiting"' in html, 'id="norms"' in html) == (False, True)  # deliveries tell speed
    kept = "Not for publication: by the contract (trust.metrics) epochs, held_out, loss, tokens of silos"
    assert (kept in html) == for_members
    kept = "seconds_per_step" if for_members else "loss, held_out, seconds_per_step, tokens, epochs"
    assert f"keeps it among the members: {kept} of silos" in html
    assert not any(words in html for words in ("<script", "<b>\\", "\x1b"))


def test_what_never_changes_is_read_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(made), "/five", recursive=True)
    read: list[str] = []
    cat_file = MemoryFileSystem.cat_file

    def counted(self: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> bytes:
        read.append(path)
        return cat_file(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    try:
        federation = Federation("memory://five")
        first, history = set(read), federation.history
        read.clear()
        federation.look()
        assert federation.history == history
        assert {path for path in first if path.endswith("commit.json")} == {
            f"/five/global/{version:06d}/commit.json" for version in range(NEWEST + 1)
        }
        # Of manifests the newest of each silo alone, which tells where it is.
        assert sum(path.endswith("manifest.json") for path in read) == len(SILOS)
        assert not any(path.endswith("commit.json") for path in read)
        # A commit that is another now, as after a rollback, is read.
        memory.pipe("/five/global/000010/commit.json", b"{}  ")
        federation.look()
        assert federation.status.unreadable == ["global/000010/commit.json"]
    finally:
        memory.rm("/five", recursive=True)


def test_what_nobody_has_signed_is_not_there(signed_config: RunConfig) -> None:
    aggregator, state = begin(signed_config)
    for silo in signed_config.full_roster:
        deliver(signed_config, state, silo)
    one_version(aggregator, state)
    store = Path(signed_config.store_url)
    told = {"left": True, "version": 1}, {"format": 2, "from_version": 1, "to_version": 0, "reason": "mine"}
    names = ("silos/alpha/membership/000000.json", "rollbacks/000001.json")
    for name, said in zip(names, told, strict=True):
        more = {"previous": None, "commit_sha256": "", "discarded": [], "signature": None} if "reason" in said else {}
        (store / name).parent.mkdir(parents=True)
        (store / name).write_text(json.dumps(said | more))
    federation = Federation(str(store))
    assert (federation.history.events, federation.history.taken_back) == ([], [])
    assert sorted(federation.status.unsigned) == sorted(names)
    assert [one.loss for one in federation.history.versions] == [None, 1.0]


# ---- the report


def test_the_report_of_a_store(made: Path, page: Path, tmp_path: Path) -> None:
    html = page.read_text()
    for text in ("4.375", "21.7 M", "10.0 M", "46.0%", "of 20 versions", "1:40:00 h", "silent 38:00 min", "five-silos"):
        assert text in html
    assert "<script" not in html
    assert "process" not in html, "the page tells nothing of the operator's machine"
    file = tmp_path / "mine.html"
    file.write_text("my own page")
    words = one_line_error(report, str(made), output=file)
    assert words == f"--output: {str(file)!r} given; it is there, and no report; allowed: another file"
    assert file.read_text() == "my own page"
    nowhere = tmp_path / "nowhere/report.html"
    assert one_line_error(report, str(made), output=nowhere).endswith("allowed: a file in a directory that is there")


def test_other_runs_beside_it(made: Path, tmp_path: Path) -> None:
    for name in ("central", "alone"):
        save_config(make_run(tmp_path / name, silos=("law",), kind="none"), tmp_path / name / "config.yaml")
    file = tmp_path / "page.html"
    report(str(made), output=file, beside=[f"central={tmp_path / 'central'}", f"alone={tmp_path / 'alone'}"])
    html = file.read_text()
    assert html[html.index('id="beside"') :].count("4.5000") == 2
    for given in ("central", "=x", "a=", "a=x"):
        assert one_line_error(report, str(made), output=file, beside=[given])
    words = one_line_error(report, str(tmp_path / "central"), members=True)
    assert words.startswith("--members given with a run directory; allowed: with a store")


# ---- in Chromium


def points(browser: Chromium, chart: str, line: str) -> list[tuple[float, float]]:
    """Where a line of a chart goes, on its drawing; y grows downwards."""
    path = browser.evaluate(f"document.querySelector(`#{chart} [id='{line}'] path`).getAttribute('d')")
    numbers = [float(word) for word in path.replace("M", " ").replace("L", " ").replace("z", " ").split()]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def bars(browser: Chromium, gid: str) -> int:
    return int(browser.evaluate(f"document.querySelectorAll(`#commits [id='{gid}'] path`).length"))


def test_every_chart_has_its_data(browser: Chromium, page: Path) -> None:
    browser.open(page.as_uri(), width=DESK)
    assert browser.evaluate("[...document.querySelectorAll('.charts > div')].map(one => one.id)") == list(CHARTS)
    sizes = "[...document.querySelectorAll('.charts svg')].map(one => one.getBoundingClientRect()).map(b => b.width)"
    assert all(width > 400 for width in browser.evaluate(sizes))
    there = {silo: sum(silo in present(v, again=v > 5) for v in range(1, NEWEST + 1)) for silo in SILOS}
    for silo, count in there.items():
        for chart, line in (("loss", "loss"), ("loss_in_time", "time"), ("waiting", "waiting"), ("norms", "norm")):
            assert len(points(browser, chart, f"{line}-{silo}")) == count, (chart, silo)
        losses = points(browser, "loss", f"loss-{silo}")
        assert all(after[1] > before[1] for before, after in pairwise(losses)), "losses fall"
        assert len(points(browser, "tokens", f"tokens-{silo}")) == count
        assert len(points(browser, "held_out", f"held-out-{silo}")) == count
    for chart, line in (
        *(("loss", "loss-mean"), ("loss_in_time", "time-mean"), ("norms", "norm-update"), ("cosine", "cosine")),
        *(("bytes", "bytes-sent"), ("bytes", "bytes-received"), ("held_out", "held-out-mean")),
    ):
        assert len(points(browser, chart, line)) == NEWEST, line
    (left, central), (right, also_central) = points(browser, "held_out", "held-out-beside-central")
    assert (right > left, central) == (True, also_central)
    assert central == points(browser, "held_out", "held-out-mean")[-1][1], "both are 6.5"
    # Of beta there are versions 1 to 4 and 6 to 10; the rollback and what happened are marked.
    assert [bars(browser, f"commits-{silo}-in") for silo in SILOS] == [1, 2, 1, 1, 1]
    assert bars(browser, "taken-back") == 1
    assert [bars(browser, f"event-{what}") > 0 for what in ("joined", "left", "took-the-lease", "came-back")] == [
        True,
        True,
        True,
        False,
    ]
    marked = "[...document.querySelectorAll('.charts > div')].filter(one => one.querySelector('[id=rollback]')).length"
    assert browser.evaluate(marked) == len(CHARTS)


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_no_request_leaves_and_the_words_of_others_are_words(browser: Chromium, page: Path, width: int) -> None:
    browser.open(page.as_uri(), width=width)
    assert browser.requests == [page.as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.title").startswith("five-silos")
    shown = " ".join(REASON.replace("\x1b", "\\x1b").split())
    assert shown in " ".join(browser.evaluate("document.querySelector('#events').textContent").split())
    cells = "[...document.querySelectorAll('#beside tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    assert browser.evaluate(cells) == [
        ["model", "tokens", "mean", HOSTILE, "alpha", "beta", "delta", "epsilon"],
        ["version 10", "21.7 M", "6.5000", "3.5000", "6.5000", "7.0000", "7.5000", "8.0000"],
        ["central, by alpha, beta", "9.00 M", "6.5000", "", "6.0000", "7.0000", "", ""],
    ]
    assert browser.evaluate("document.querySelectorAll('script, img, iframe, object, embed').length") == 0


def test_it_fits_a_phone(browser: Chromium, page: Path) -> None:
    browser.open(page.as_uri(), width=PHONE)
    assert browser.evaluate("document.documentElement.scrollWidth") == PHONE
    beyond = f"""[...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll, .wide'))
        .filter(one => one.getBoundingClientRect().right > {PHONE} + 1).length"""
    assert browser.evaluate(beyond) == 0
    # A word of a chart's has as many pixels as can be read: nine points, and hardly smaller than drawn.
    height = (
        "Math.min(...[...document.querySelectorAll('.charts text')].map(one => one.getBoundingClientRect().height))"
    )
    assert browser.evaluate(height) >= 8


def test_the_run_s_own_report_asks_for_nothing_and_fits_a_phone(browser: Chromium, tmp_path: Path) -> None:
    file = write_report(make_run(tmp_path / "run"))
    browser.open(file.as_uri(), width=PHONE)
    assert (browser.requests, browser.complaints) == ([file.as_uri()], [])
    assert browser.evaluate("document.documentElement.scrollWidth") == PHONE
    assert browser.evaluate("document.querySelectorAll('.plot svg').length") == 5


# ---- served


@contextmanager
def served(store: Path, **options: Any) -> Iterator[PageServer]:
    server = PageServer(Federation(str(store)), 0, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask(server: PageServer, method: str, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def test_what_the_server_answers(made: Path) -> None:
    with served(made, names=["Reports.example:443"]) as server:
        own = f"127.0.0.1:{server.server_port}"
        assert server.server_address[0] == "127.0.0.1"
        code, headers, body = ask(server, "GET", "/", Host=own)
        assert (code, headers["Content-Type"], headers["Refresh"]) == (200, "text/html; charset=utf-8", "15")
        assert b"4.375" in body
        for host, expected in (
            *((f"localhost:{server.server_port}", 200), ("reports.example:443", 200)),
            *(("reports.example", 421), ("rebound.example", 421), ("127.0.0.1", 421), (f"{own}.example", 421)),
        ):
            assert ask(server, "GET", "/", Host=host)[0] == expected, host
        assert ask(server, "GET", "/")[0] == 421
        for path in ("/../etc/passwd", "/contract.json", "/?x", "http://127.0.0.1/", "/%2e%2e/", "*"):
            assert ask(server, "GET", path, Host=own)[0] == 404, path
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "<b>"):
            code, headers, body = ask(server, method, "/", Host=own)
            assert (code, b"<b>" in body) == (501, False), method
            assert headers["X-Content-Type-Options"] == "nosniff"
            policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
            assert "script-src" not in policy
            assert "Refresh" not in headers
        taken = one_line_error(PageServer, Federation(str(made)), server.server_port)
        assert taken.startswith(f"--port: {server.server_port} given; ")


def test_the_served_page_renews_itself(browser: Chromium, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "REFRESH_SECONDS", 1)
    with served(store) as server:
        browser.open(server.url, width=PHONE)
        part = "[...document.querySelectorAll('#silos tr')].find(one => one.textContent.includes('delta')).textContent"
        assert "left" not in browser.evaluate(part)
        StoreExchange(str(store)).announce("delta", left=True, version=NEWEST)
        while "left" not in browser.evaluate(part):
            browser.wait_for("Page.loadEventFired")
        (store / "contract.json").rename(store / "elsewhere.json")
        while not browser.evaluate("document.querySelector('#trouble')?.textContent"):
            browser.wait_for("Page.loadEventFired")
        assert "there is no run in it" in browser.evaluate("document.querySelector('#trouble').textContent")
        assert "left" in browser.evaluate(part), "what was read before stays"
        assert {urlsplit(url).netloc for url in browser.requests} == {urlsplit(server.url).netloc}
        assert {urlsplit(url).path for url in browser.requests} == {"/"}
        assert browser.complaints == []


# ---- in a terminal


def test_one_picture_at_80_columns(made: Path) -> None:
    console = Console(record=True, width=80, file=open("/dev/null", "w"), legacy_windows=False)  # noqa: SIM115
    watch(Federation(str(made), for_members=True), console, follow=False)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= 80
    start = next(index for index, line in enumerate(lines) if line.startswith("silo       versions"))
    plain = str.maketrans("▆·", "#.")
    assert [line.translate(plain) for line in lines[start : start + 6]] == [
        "silo       versions 1 to 10                 loss held-out epochs",
        "alpha      ############################## 4.0000   5.0000   2.50",
        "beta       ############...############### 4.2500   7.0000   2.50",
        "delta      ############################## 4.5000   7.5000   2.50",
        "epsilon    .........##################### 4.7500   8.0000   2.50",
        "gamma      ########################...... 5.8000   9.0000   2.00",
    ]
    assert lines[start + 6].startswith("mean loss  █")
    assert lines[start + 6].endswith("▁ 4.3750   6.5000")
    assert lines[start + 7] == "made again                ^"
    assert lines[-1].endswith(" 50%   about 1:40:00 h left")


def test_followed_without_a_terminal(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(store / "contract.json", lambda said: said["inner"].update(num_steps=40))
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(watching, "MOST_BUSY", 0)
    last = store / "global" / f"{NEWEST:06d}"
    last.rename(store / "aside")
    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    federation = Federation(str(store), for_members=True)
    thread = threading.Thread(target=watch, args=(federation, console), kwargs={"follow": True})
    thread.start()

    def said(words: str) -> bool:
        return words in console.export_text(clear=False)

    wait_for(lambda: said("about 10:00 min left"))
    (store / "contract.json").rename(store / "elsewhere.json")
    wait_for(lambda: said("there is no run in it"))
    (store / "elsewhere.json").rename(store / "contract.json")
    wait_for(lambda: said("the store can be read again"))
    (store / "aside").rename(last)
    thread.join()
    text = console.export_text()
    assert re.search(r"commit 10/10  4 of 5 silos  update norm \S+  cosine between silos \S+  loss 4\.3750\n", text)
    assert text.rstrip().endswith("finished")
    assert time.strftime("%H:") in text
