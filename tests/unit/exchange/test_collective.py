"""Meeting, talking and passing bytes in a collective, each silo a thread with connections of its own."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch

from pretrain.config.errors import ConfigError
from pretrain.exchange.board import Words
from pretrain.exchange.channel import PIECE_BYTES
from pretrain.exchange.collective import WORDS, Collective, reach_board
from pretrain.exchange.lane import Lane, PeerLostError, messages
from pretrain.exchange.lanes import _share
from pretrain.exchange.listener import Listener
from tests.support import free_port
from tests.unit.exchange.members import ROSTER, credentials
from tests.waiting import wait_for


@pytest.fixture
def url() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


def in_all(silos: list[Collective], call: Callable[[Collective], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(silos)) as pool:
        return list(pool.map(call, silos))


def at(url: str, silo: str, *, seconds: float = 2.0, keys: bool = True, **settings: Any) -> Collective:
    """A silo of the roster, which has not joined."""
    usual = {"dead_seconds": seconds, "hung_seconds": 60.0}
    return Collective(url, ROSTER, silo, lambda: credentials(silo, keys=keys), **usual | settings)


@pytest.fixture(params=["keys", "no keys"])
def silos(url: str, request: pytest.FixtureRequest) -> Iterator[list[Collective]]:
    """Three silos that have met."""
    made = [at(url, silo, keys=request.param == "keys") for silo in ROSTER]
    in_all(made, lambda silo: silo.join(f"directory-of-{silo.silo}/1"))
    yield made
    in_all(made, lambda silo: silo.close("was stopped by the test"))


def test_words_and_bytes_reach_everybody(silos: list[Collective]) -> None:
    told = in_all(silos, lambda silo: silo.share("greeting", f"I am {silo.silo}"))
    assert told == [{name: f"I am {name}".encode() for name in ROSTER}] * 3
    sizes = [0, 5, 2 * PIECE_BYTES + 7]  # what each sends to whoever comes after it

    def swap(silo: Collective) -> list[torch.Tensor]:
        me = ROSTER.index(silo.silo)
        whole = [torch.full((sizes[me],), 10 * me + peer, dtype=torch.uint8) for peer in range(3)]
        out = [[data[:3], data[3:3], data[3:]] for data in whole]  # in several places
        into = [torch.empty(sizes[peer], dtype=torch.uint8) for peer in range(3)]
        silo.first_lane().swap(out, into)
        return into

    for me, into in enumerate(in_all(silos, swap)):
        for peer in set(range(3)) - {me}:
            assert (into[peer] == 10 * peer + me).all()


def test_bytes_in_several_places_are_cut_like_one() -> None:
    whole = torch.arange(3 * PIECE_BYTES + 5, dtype=torch.int64).to(torch.uint8)
    cuts = [0, 1, PIECE_BYTES - 1, PIECE_BYTES + 2, PIECE_BYTES + 2, 3 * PIECE_BYTES, len(whole)]
    parts = [whole[start:stop] for start, stop in pairwise(cuts)]
    for places in (parts, [whole], [*parts, whole[:0]]):
        found = list(messages(places))
        assert [len(message) for message in found] == [PIECE_BYTES] * 3 + [5]
        assert torch.equal(torch.cat(found), whole)
    assert next(messages([whole])).data_ptr() == whole.data_ptr()  # uncopied
    for num_lanes in (1, 2, 5):
        shares = [_share(parts, lane, num_lanes) for lane in range(num_lanes)]
        assert torch.equal(torch.cat([part for share in shares for part in share]), whole)
        assert [sum(map(len, share)) for share in shares] == [
            len(_share([whole], lane, num_lanes)[0]) for lane in range(num_lanes)
        ]


def test_all_are_told_who_stopped_and_why(silos: list[Collective]) -> None:
    alpha, beta, gamma = silos
    gamma.close("silo gamma was stopped")
    for silo in (alpha, beta):
        with pytest.raises(PeerLostError, match=r"^silo gamma was stopped$"):
            silo.share("version 3", "")
        assert silo.lost == "silo gamma was stopped"


def test_silence_is_noticed_in_the_stated_time(silos: list[Collective]) -> None:
    alpha, beta, gamma = silos
    gamma._closing.set()  # its thread falls silent, as that of a process which is gone
    began = time.monotonic()
    with pytest.raises(PeerLostError, match=r"^silo gamma is lost: nothing was heard of it for 2 s$"):
        alpha.share("version 3", "")
    assert time.monotonic() - began < 2 + 3
    with pytest.raises(PeerLostError, match="gamma"):
        beta.share("version 3", "")


def test_the_end_of_the_silo_that_keeps_the_words_is_noticed(silos: list[Collective], url: str) -> None:
    alpha, beta, gamma = silos
    assert alpha._listener
    alpha._listener.close()  # as the end of its process does
    with pytest.raises(PeerLostError, match=rf"^silo alpha is lost: nobody serves {url} any more: the connection was "):
        beta.share("version 3", "")
    wait_for(lambda: gamma.lost.startswith("silo alpha is lost: nobody serves "))


def test_a_loop_that_stands_still_is_hung(url: str) -> None:
    made = [
        Collective(url, ROSTER[:2], silo, lambda silo=silo: credentials(silo), dead_seconds=60.0, hung_seconds=2.0)
        for silo in ROSTER[:2]
    ]
    in_all(made, lambda silo: silo.join(f"directory-of-{silo.silo}/1"))

    def lost() -> str:
        made[0].moved()
        return made[0].lost

    assert wait_for(lost, seconds=10, poll_seconds=0.1) == "silo beta is lost: its training did not go on for 2 s"
    in_all(made, lambda silo: silo.close("silo was stopped"))


def test_another_run_directory_cannot_take_a_name(silos: list[Collective], url: str) -> None:
    other = at(url, "gamma", keys=encrypted(silos))
    with pytest.raises(ConfigError, match=r"^silos: .gamma. given; another run directory takes part under "):
        other.join("another-directory/1")
    assert not silos[0].lost


def test_a_silo_that_starts_again_ends_the_meeting_it_left(silos: list[Collective], url: str) -> None:
    again = at(url, "gamma")
    assert not again._take_place(
        credentials("gamma", keys=encrypted(silos)), "directory-of-gamma/2"
    )  # the meeting of its first start is not over yet
    with pytest.raises(PeerLostError, match=r"^silo gamma was started again$"):
        silos[0].share("version 3", "")


def test_an_address_in_use_is_one_line(url: str) -> None:
    with socket.create_server(("", int(url.rsplit(":", 1)[1]))):
        made = at(url, "alpha")
        with pytest.raises(ConfigError, match=r"^exchange.url: 'tcp:.*' given; this silo cannot ") as caught:
            made.join("directory/1")
        assert "\n" not in str(caught.value)


def encrypted(silos: list[Collective]) -> bool:
    """Whether these have keys."""
    assert silos[0]._credentials
    return bool(silos[0]._credentials.passport.certificate)


def pass_some_and_die(url: str, num_bytes: int) -> None:
    """As beta: a swap of one byte, and one in whose middle the process is killed."""
    shown = credentials("beta")
    lane = Lane(reach_board(shown, url, "alpha", WORDS, seconds=5), shown, url, ROSTER[:2], dead_seconds=5)
    nothing = torch.empty(0, dtype=torch.uint8)
    lane.swap([[torch.ones(1, dtype=torch.uint8)], []], [torch.empty(1, dtype=torch.uint8), nothing])
    channel = lane._out[0]
    if num_bytes > 1:
        channel.send(num_bytes.to_bytes(8) + bytes(num_bytes // 2), 5)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_bytes", [1, PIECE_BYTES + 2])
def test_a_silo_that_is_killed_in_the_middle_of_a_swap_is_named(url: str, num_bytes: int) -> None:
    """Before it, too: when its bytes were not yet given to the connection."""
    ours, words = credentials("alpha"), Words(ROSTER)
    port = int(url.rsplit(":", 1)[1])
    board = Listener(ours, "127.0.0.1", port, lambda channel: words.serve(channel, seconds=5), what="board")
    arguments = (url, num_bytes)
    beta = multiprocessing.get_context("spawn").Process(target=pass_some_and_die, args=arguments)
    beta.start()
    lane = Lane(words.of("alpha"), ours, url, ROSTER[:2], dead_seconds=20)
    nothing = torch.empty(0, dtype=torch.uint8)

    def swap(size: int) -> None:
        lane.swap([[], [torch.ones(1, dtype=torch.uint8)]], [nothing, torch.empty(size, dtype=torch.uint8)])

    swap(1)
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(PeerLostError, match=r"^silo beta is lost: the connection was closed at the other end$"):
            swap(num_bytes)
    assert time.monotonic() - began < 10
    beta.join()
    assert beta.exitcode == -signal.SIGKILL
    lane.close()
    board.close()


def test_signs_of_life_that_are_none_leave_the_watch_awake(silos: list[Collective], url: str) -> None:
    alpha, beta, _ = silos
    gamma = reach_board(credentials("gamma", keys=encrypted(silos)), url, "alpha", WORDS, seconds=2)
    for garbage in ("x", "", "1 2 3", "\x1b[2J"):
        gamma.set("beat/gamma", garbage)
        time.sleep(0.5)
    assert alpha._watching.is_alive()
    gamma.set("left/gamma", "gone\x1b[2J\n" + "x" * 10_000)
    wait_for(lambda: alpha.lost and beta.lost)
    assert alpha.lost.startswith("gone\\x1b[2J\\nxxx")
    assert len(alpha.lost) < 300
