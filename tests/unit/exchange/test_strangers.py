"""Who is no member gets nowhere at the ports of a collective, and a member no further than its own name."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest
import torch

from pretrain.exchange import listener as listener_module
from pretrain.exchange.board import MOST_WORDS, WORDS_BYTES, FarBoard, Words
from pretrain.exchange.channel import BrokenError, Channel, Credentials
from pretrain.exchange.lane import Lane, PeerLostError
from pretrain.exchange.listener import MOST_HALF_OPEN, MOST_OF_ONE, Listener
from tests.support import free_port
from tests.unit.exchange.members import ROSTER, credentials
from tests.waiting import wait_for

GARBAGE = {
    "nothing": b"",
    "zeros": bytes(1024),
    "ones": b"\xff" * 4096,
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "the start of TLS": bytes.fromhex("1603010200010001fc0303") + bytes(500),
    "at random": os.urandom(65536),
}


class Served:
    """Alpha's board, and beta there."""

    def __init__(self, *, keys: bool = True) -> None:
        self.words, self.is_signed = Words(ROSTER), keys
        self.listener = Listener(
            credentials("alpha", keys=keys),
            "127.0.0.1",
            0,
            lambda who: self.words.serve(who, seconds=5),
            what="board",
        )
        self.port = self.listener.port
        self.beta = self.board(credentials("beta", keys=keys))

    def dial(self, shown: Credentials, *, silo: str = "alpha", lane: int = 0) -> Channel:
        return shown.dial("127.0.0.1", self.port, silo, lane=lane, purpose="words")

    def board(self, shown: Credentials) -> FarBoard:
        return FarBoard(self.dial(shown), seconds=5)

    def refusal(self, shown: Credentials, **of: object) -> str:
        with pytest.raises(BrokenError) as caught:
            self.dial(shown, **of)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 5)


@pytest.fixture(params=["keys", "no keys"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    made = Served(keys=request.param == "keys")
    yield made
    made.listener.close()


@pytest.fixture
def signed() -> Iterator[Served]:
    made = Served()
    yield made
    made.listener.close()


def test_garbage_and_a_port_scan_disturb_nobody(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    for data in GARBAGE.values():
        with served.raw() as connection, suppress(OSError):
            connection.sendall(data)
            served.beta.set("said/1/beta", "hello")
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    for _ in range(200):
        served.raw().close()
    assert served.beta.get("said/1/beta") == "hello"
    wait_for(lambda: not served.listener._half_open)
    (line,) = capsys.readouterr().out.splitlines()  # of one address
    assert line.startswith("board: a connection from 127.0.0.1 was dropped: ")


def test_connections_that_are_held_open_keep_nobody_out(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as held:
        ours = [held.enter_context(served.raw()) for _ in range(3 * MOST_HALF_OPEN)]
        wait_for(lambda: 0 < len(served.listener._half_open) <= MOST_HALF_OPEN)
        began = time.monotonic()
        gamma = served.board(credentials("gamma", keys=served.is_signed))
        gamma.set("said/1/gamma", "here")
        assert served.beta.get("said/1/gamma") == "here"
        assert time.monotonic() - began < 5
        monkeypatch.setattr(listener_module, "HANDSHAKE_SECONDS", 0.1)
        wait_for(lambda: not served.listener._half_open)
        for connection in ours:
            with suppress(ConnectionError):
                while connection.recv(65536):  # a server that speaks first, then the end
                    pass
    assert gamma.have(["said/1/gamma"]) == [True]
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_who_has_no_key_of_the_roster_is_refused(signed: Served) -> None:
    for shown in (credentials("beta", of="stranger"), credentials("gamma", of="beta")):
        name = shown.passport.silo
        assert signed.refusal(shown).startswith(
            "alpha says: refused: signature of the passport: not of these bytes by "
        )
        assert signed.words.find(f"said/1/{name}") is None
    stranger = credentials("alpha")
    stranger.passport = stranger._members.sign(replace(stranger.passport, silo="delta"))
    assert signed.refusal(stranger) == "alpha says: refused: delta is no member: the contract has no key of it"
    signed.refusal(credentials("beta", keys=False))


def test_a_passport_is_worth_nothing_without_its_key_or_elsewhere(signed: Served) -> None:
    thief, seen = credentials("gamma"), credentials("beta").passport
    thief.passport = seen
    assert signed.refusal(thief) == "alpha says: refused: the passport of beta was shown without its key"
    thief.passport = replace(seen, key=credentials("gamma").passport.key)
    assert "signature of the passport: not of these bytes" in signed.refusal(thief)
    assert signed.refusal(credentials("beta", run="other")) == (
        "a passport of run tiny was shown, and this is other"  # who comes finds out first
    )
    assert signed.refusal(credentials("beta"), silo="gamma") == "alpha, lane 0, is there, and not gamma, lane 0"
    assert signed.refusal(credentials("beta"), lane=1) == "alpha, lane 0, is there, and not alpha, lane 1"


def test_who_serves_with_a_passport_that_was_seen_is_found_out(signed: Served) -> None:
    imposter = credentials("gamma")
    imposter.passport = credentials("alpha").passport
    false = Listener(imposter, "127.0.0.1", 0, lambda channel: None, what="false")
    with pytest.raises(BrokenError, match=r"^the passport of alpha came with another certificate than its own$"):
        credentials("beta").dial("127.0.0.1", false.port, "alpha", purpose="words")
    false.close()


class Between:
    """Somebody in the network between a silo and a port, who sees all and may change one byte."""

    def __init__(self, port: int, *, changes: int = -1) -> None:
        self.seen, self._changes = b"", changes
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._beyond = socket.create_connection(("127.0.0.1", port))
        threading.Thread(target=self._pass_all, daemon=True).start()

    def _pass_all(self) -> None:
        near, _ = self._server.accept()
        threading.Thread(target=self._pass, args=(self._beyond, near, -1), daemon=True).start()
        self._pass(near, self._beyond, self._changes)

    def _pass(self, source: socket.socket, target: socket.socket, changes: int) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(65536):
                if passed <= changes < passed + len(data):
                    at = changes - passed
                    data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                passed, self.seen = passed + len(data), self.seen + data
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def test_who_is_in_between_reads_nothing_and_changes_nothing(served: Served) -> None:
    between = Between(served.port)
    gamma = FarBoard(
        credentials("gamma", keys=served.is_signed).dial("127.0.0.1", between.port, "alpha", purpose="words"), seconds=5
    )
    gamma.set("said/1/gamma", "of no concern to others")
    assert served.beta.get("said/1/gamma") == "of no concern to others"
    assert (b"of no concern" in between.seen) == (not served.is_signed)  # else it is found where it must not be
    assert (b"gamma" in between.seen) == (not served.is_signed)
    if not served.is_signed:
        return
    for changes in range(0, 800, 100):  # of what the client says until it is in
        with pytest.raises(BrokenError):
            credentials("gamma").dial("127.0.0.1", Between(served.port, changes=changes).port, "alpha", purpose="words")


def test_a_member_writes_in_its_own_name_alone(served: Served) -> None:
    served.words.of("gamma").set("said/1/gamma", "true")
    assert served.beta.claim("member/beta", "ours") == "ours"
    assert served.beta.claim("member/beta", "another") == "ours"
    mischief: list[Callable[[FarBoard], object]] = [
        lambda beta: beta.set("left/gamma", "gone"),
        lambda beta: beta.delete("said/1/gamma"),
        lambda beta: beta.claim("member/gamma", "mine"),
        lambda beta: beta.set("other/beta", ""),
        lambda beta: beta.set("beta", ""),
        lambda beta: beta.set("said/" + "x" * 200 + "/beta", ""),
        lambda beta: beta.set("said/1/beta", "x" * (WORDS_BYTES + 1)),
        lambda beta: [beta.set(f"said/{i}/beta", "") for i in range(MOST_WORDS + 1)],
        lambda beta: beta.set("said/1/beta", "\ud800"),
        lambda beta: beta._ask("close"),
        lambda beta: beta._ask("have", [1]),
        lambda beta: beta._channel.send((1 << 31).to_bytes(4), 5) or beta.get("said/1/beta"),
    ]
    for act in mischief:
        beta = served.board(credentials("beta", keys=served.is_signed))
        with pytest.raises((BrokenError, UnicodeEncodeError)):
            act(beta)
        beta.close()
    assert served.words.find("said/1/gamma") == "true"
    assert served.words.find("left/gamma") is None
    assert served.words.find("member/gamma") is None


def test_a_member_has_few_connections(signed: Served) -> None:
    gamma = credentials("gamma")
    held = [signed.dial(gamma) for _ in range(MOST_OF_ONE)]
    more = signed.board(gamma)
    with pytest.raises(BrokenError):
        more.get("said/1/gamma")
    held.pop().close()

    def comes_in() -> bool:
        with suppress(BrokenError):
            return signed.board(gamma).get("said/1/gamma") is None
        return False

    wait_for(comes_in)


def test_bytes_that_are_not_as_agreed_are_named() -> None:
    words, url = Words(ROSTER[:2]), f"tcp://127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(2) as pool:
        make = lambda silo: Lane(words.of(silo), credentials(silo), url, ROSTER[:2], dead_seconds=5)  # noqa: E731
        alpha, beta = pool.map(make, ROSTER[:2])
        nothing, two = torch.empty(0, dtype=torch.uint8), torch.ones(2, dtype=torch.uint8)
        lost = pool.submit(alpha.swap, [[], [two]], [nothing, nothing])
        with suppress(PeerLostError):  # alpha may have let go before beta has read all
            beta.swap([[two[:1]], []], [torch.empty(2, dtype=torch.uint8), nothing])
        with pytest.raises(PeerLostError, match=r"^silo beta is lost: it sends 1 bytes where 0 were agreed on$"):
            lost.result()
        alpha.close()
        beta.close()


def test_a_lane_that_nobody_else_comes_to_names_who_is_missing() -> None:
    words, url = Words(ROSTER[:2]), f"tcp://127.0.0.1:{free_port()}"
    for place in (None, "127.0.0.1 1", "here", "127.0.0.1 99999999999999999999", "\x1b[2J 1"):
        if place:
            words.of("beta").set("lane/0/beta", place)
        with pytest.raises(PeerLostError, match=r"^silo beta is lost: lane 0 of alpha cannot be connected: ") as caught:
            Lane(words.of("alpha"), credentials("alpha"), url, ROSTER[:2], dead_seconds=0.3)
        assert str(caught.value).isprintable()
