"""Masks: their streams by known answers, sums to the last bit whoever is missing, and uploads that tell nothing."""

import hashlib
import hmac
import math
from collections.abc import Collection, Mapping

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from pretrain.trust.ledger import RefusedError, sha256_bytes
from pretrain.trust.masks import Masker, Stream, add, is_added
from pretrain.trust.shamir import join
from tests.support import ROOT

PLACE = b"c0 17 3\n"
# Of RFC 7748, section 6.1: Alice's and Bob's private keys, and what they agree on.
ALICE = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
BOB = "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"
AGREED = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


def private(silo: str) -> X25519PrivateKey:
    text = {"alice": ALICE, "bob": BOB}.get(silo) or hashlib.sha256(silo.encode()).hexdigest()
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(text))


def maskers(silos: Collection[str], threshold: int, place: bytes = PLACE) -> dict[str, Masker]:
    keys = {silo: private(silo).public_key().public_bytes_raw() for silo in silos}
    return {silo: Masker(silo, private(silo), keys, place, threshold) for silo in silos}


def hkdf(secret: bytes, info: bytes, salt: bytes = bytes(32)) -> bytes:
    """RFC 5869, of 32 bytes, by its words."""
    extracted = hmac.digest(salt, secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


# ---- streams and seeds


def test_a_stream_is_aes_256_in_counter_mode() -> None:
    """Key 0: blocks 0 and 1 are H and the tag of test case 13 of the GCM specification."""
    total = [np.zeros(8, np.uint32)]
    add(total, [], [Stream(bytes(32), True)])
    assert total[0].tobytes().hex() == "dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738b"
    add(total, [], [Stream(bytes(32), False)])
    assert not total[0].any()


def test_a_tensor_begins_at_a_whole_block_and_ranges_and_threads_change_nothing() -> None:
    seed, sizes = b"s" * 32, [5, 1, (1 << 20) + 70_001, 4]
    places = [0, 8, 12, 12 + (1 << 20) + 70_004]
    whole = [np.zeros(places[-1] + 4, np.uint32)]
    add(whole, [], [Stream(seed, True)])
    for num_threads in (1, 3):
        total = [np.zeros(size, np.uint32) for size in sizes]
        add(total, [], [Stream(seed, True)], num_threads)
        for tensor, place in zip(total, places, strict=True):
            assert np.array_equal(tensor, whole[0][place : place + len(tensor)])


def test_wide_elements_take_as_many_bytes_of_a_stream_and_add_up_modulo_2_64() -> None:
    seed, size = b"w" * 32, (1 << 19) + 35_003
    narrow = [np.zeros(3, np.uint32), np.zeros(2 * size, np.uint32), np.zeros(1, np.uint32)]
    wide = [np.zeros(3, np.uint32), np.zeros(size, np.uint64), np.zeros(1, np.uint32)]
    for total in (narrow, wide):
        add(total, [], [Stream(seed, True)], 2)
    assert wide[1].tobytes() == narrow[1].tobytes()
    assert narrow[2] == wide[2]
    before = wide[1].copy()
    add(wide, [[np.zeros(3, np.uint32), before, np.zeros(1, np.uint32)]], [Stream(seed, False)])
    assert np.array_equal(wide[1], before)  # twice the stream less once, whatever was carried


def test_who_lets_values_go_is_told_what_is_added() -> None:
    values = [np.arange(size, dtype=np.uint32) for size in (5, (1 << 20) + 70_001)]
    total, told = [np.zeros_like(one) for one in values], [np.zeros(len(one), int) for one in values]

    def added(number: int, elements: slice) -> None:
        told[number][elements] += 1
        assert np.array_equal(total[number][elements], 2 * values[number][elements])

    add(total, [values, values], [], 3, added=added)
    assert all((one == 1).all() for one in told)


def test_seeds_follow_from_the_keys_as_the_formats_say() -> None:
    both = maskers(["alice", "bob"], 2)
    public = {silo: private(silo).public_key().public_bytes_raw() for silo in both}
    pair = hkdf(bytes.fromhex(AGREED), b"atoll/1 pair mask\0" + public["alice"] + public["bob"] + PLACE)
    salt_key = hkdf(bytes.fromhex(ALICE), b"atoll/1 sum salt\0" + PLACE)
    salt = both["alice"].salt(b"content")
    assert salt == hmac.digest(salt_key, b"content", "sha256").hex()
    own = hkdf(bytes.fromhex(ALICE), b"atoll/1 self mask\0" + PLACE, bytes.fromhex(salt))
    assert both["alice"].seeds(salt) == {"alice": own, "bob": pair}
    assert both["bob"].seeds(salt)["alice"] == pair
    assert [both["alice"].streams(salt), is_added("bob", "alice")] == [[Stream(own, True), Stream(pair, True)], False]


def test_the_example_of_the_formats() -> None:
    alice = maskers(["alice", "bob"], 2, f"{'c0' * 32} 17 2\n".encode())["alice"]
    pair = alice.seeds(alice.salt(b""))["bob"]
    total = [np.zeros(4, np.uint32)]
    add(total, [], [Stream(pair, True)])
    assert pair.hex() == "8b03076c3723c5ca7e805f180abb755bab3ff32d71373be3d488a926eb124c4c"
    assert total[0].tolist() == [2542780122, 3179434566, 1539001515, 631663718]
    said = (ROOT / "docs" / "formats.md").read_text()
    assert pair.hex() in said
    assert "2542780122 3179434566 1539001515 631663718" in said


def test_other_values_versions_and_runs_have_other_seeds() -> None:
    masker, later = maskers(["a", "b", "c"], 3)["a"], maskers(["a", "b", "c"], 3, b"c0 18 3\n")["a"]
    first, second = masker.salt(b"values"), masker.salt(b"other values")
    assert masker.seeds(first)["a"] != masker.seeds(second)["a"]
    assert masker.seeds(first)["b"] == masker.seeds(second)["b"]  # the other knows nothing of our values
    assert not {*masker.seeds(first).values()} & {*later.seeds(later.salt(b"values")).values()}
    assert masker.deal(first) == masker.deal(first)
    assert not {*masker.deal(first)[0]} & {*masker.deal(second)[0]}


# ---- sums


def values_of(silo: str, sizes: Collection[int]) -> list[NDArray[np.int32]]:
    generator = np.random.default_rng(sum(silo.encode()))
    return [generator.integers(-(2**28), 2**28, size, np.int32) for size in sizes]


class Round:
    """One version of some silos, in which all deal; who delivers and who answers is up to the test."""

    def __init__(self, num_silos: int, threshold: int) -> None:
        self.silos = [f"silo-{n}" for n in range(num_silos)]
        self.maskers, self.threshold = maskers(self.silos, threshold), threshold
        self.sizes = (7, 70_000, 1)
        self.values = {silo: values_of(silo, self.sizes) for silo in self.silos}
        self.salts = {silo: self.maskers[silo].salt(silo.encode()) for silo in self.silos}
        self.dealt = {silo: self.maskers[silo].deal(self.salts[silo]) for silo in self.silos}

    def upload(self, silo: str) -> list[NDArray[np.uint32]]:
        masked = [value.view(np.uint32).copy() for value in self.values[silo]]
        add(masked, [], self.maskers[silo].streams(self.salts[silo]))
        return masked

    def unmasked(self, in_it: Collection[str], answers: Collection[str]) -> list[NDArray[np.int32]]:
        """The sum, from uploads and from what the silos that answer lay open."""
        missing, streams = [silo for silo in self.silos if silo not in in_it], []
        for dealer in in_it:
            shares = {
                self.silos.index(one) + 1: self.maskers[one].open(dealer, self.salts[dealer], self.dealt[dealer][0])
                for one in answers
            }
            for about in (dealer, *missing):
                seed = join({point: of[about] for point, of in shares.items()})
                assert sha256_bytes(seed) == self.dealt[dealer][1][self.silos.index(about)]
                streams.append(Stream(seed, not is_added(dealer, about)))
        total = [np.zeros(size, np.uint32) for size in self.sizes]
        add(total, [self.upload(silo) for silo in in_it], streams, 2)
        return [one.view(np.int32) for one in total]

    def plain(self, in_it: Collection[str]) -> list[NDArray[np.int64]]:
        return [sum(self.values[silo][n].astype(np.int64) for silo in in_it) for n in range(len(self.sizes))]


@pytest.mark.parametrize("not_delivered", [[], [0], [4], [1, 3]])
@pytest.mark.parametrize("not_answering", [[], [2], [0, 2]])
def test_the_sum_is_the_plain_sum_to_the_last_bit(not_delivered: list[int], not_answering: list[int]) -> None:
    five = Round(5, 3)
    in_it = [silo for n, silo in enumerate(five.silos) if n not in not_delivered]
    answers = [silo for n, silo in enumerate(five.silos) if n not in not_answering][:3]
    for found, wanted in zip(five.unmasked(in_it, answers), five.plain(in_it), strict=True):
        assert np.array_equal(found, wanted)


def test_below_the_threshold_nothing_comes_out() -> None:
    five = Round(5, 3)
    with pytest.raises(ValueError, match="of no secret"):
        five.unmasked(five.silos, five.silos[:2])


def test_uploads_without_what_is_laid_open_are_no_sum() -> None:
    """The shared masks are gone from the sum of all; those that each has alone are not."""
    three = Round(3, 3)
    total = [np.zeros(size, np.uint32) for size in three.sizes]
    add(total, [three.upload(silo) for silo in three.silos], [])
    assert not np.isclose(total[1].view(np.int32), three.plain(three.silos)[1]).any()
    own = [Stream(three.maskers[s].seeds(three.salts[s])[s], False) for s in three.silos]
    add(total, [], own)
    assert np.array_equal(total[1].view(np.int32), three.plain(three.silos)[1])


def test_shares_open_for_the_one_they_are_sealed_to() -> None:
    five = Round(5, 3)
    dealer, one = five.silos[0], five.maskers["silo-3"]
    sealed, salt = five.dealt[dealer][0], five.salts[dealer]
    assert len(one.open(dealer, salt, sealed)) == 5
    others = {
        "another's": [*sealed[:3], sealed[2], sealed[4]],
        "cut off": [*sealed[:3], sealed[3][:-2], sealed[4]],
        "no hexadecimal": [*sealed[:3], "zz", sealed[4]],
        "too few": sealed[:2],
    }
    for given in others.values():
        with pytest.raises(RefusedError, match="silo silo-0 has sealed to silo-3 cannot be opened"):
            one.open(dealer, salt, given)
    for other_salt in (five.salts["silo-1"], "no salt"):
        with pytest.raises(RefusedError, match="cannot be opened"):
            one.open(dealer, other_salt, sealed)


# ---- what an upload tells


def bits_of(values: NDArray[np.uint32]) -> NDArray[np.uint8]:
    return np.unpackbits(values.view(np.uint8))


def randomness(values: NDArray[np.uint32]) -> Mapping[str, float]:
    """How many standard deviations each statistic of NIST SP 800-22 and FIPS 140-2 is away from what is expected."""
    bits = bits_of(values).astype(np.int64)
    n = len(bits)
    runs = 1 + np.count_nonzero(np.diff(bits))
    bytes_seen = np.bincount(values.view(np.uint8), minlength=256)
    expected = n / 8 / 256
    chi_squared = ((bytes_seen - expected) ** 2 / expected).sum()
    pairs = np.bincount(values.view(np.uint16) >> 4, minlength=4096)
    of_pairs = len(values) * 2 / 4096
    chi_pairs = ((pairs - of_pairs) ** 2 / of_pairs).sum()
    return {
        "monobit": (2 * bits.sum() - n) / math.sqrt(n),
        "runs": (2 * runs - n) / math.sqrt(n),
        "bytes": (chi_squared - 255) / math.sqrt(2 * 255),
        "12 bits": (chi_pairs - 4095) / math.sqrt(2 * 4095),
        "next value": np.corrcoef(values[:-1], values[1:])[0, 1] * math.sqrt(len(values)),
    }


def test_an_upload_looks_random_and_shares_nothing_with_another_of_the_same_values() -> None:
    values = np.zeros(1 << 16, np.int32)  # worse values cannot be
    uploads = []
    for version in (17, 18):
        masker = maskers(["a", "b", "c"], 3, f"c0 {version} 3\n".encode())["b"]
        masked = [values.view(np.uint32).copy()]
        add(masked, [], masker.streams(masker.salt(b"zeros")))
        uploads.append(masked[0])
    for upload in uploads:
        found = randomness(upload)
        assert {name: z for name, z in found.items() if abs(z) > 5} == {}
    first, second = uploads
    assert np.count_nonzero(first == second) <= 3
    assert abs(np.corrcoef(first, second)[0, 1]) * math.sqrt(len(first)) < 5
    same_bits = np.count_nonzero(bits_of(first) == bits_of(second))
    assert abs(2 * same_bits - 32 * len(first)) / math.sqrt(32 * len(first)) < 5
    assert abs(randomness(np.arange(1 << 16, dtype=np.uint32))["monobit"]) > 5  # what is not random is told
