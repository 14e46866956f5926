"""Keys: what signs, what does not count as a signature, and which files and lines are no keys."""

import json
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import assume, given
from hypothesis import strategies as st

from pretrain.config.errors import ConfigError
from pretrain.trust.keys import (
    KIND,
    CommandSigner,
    P,
    PrivateKey,
    PublicKey,
    _encoded,
    load_signer,
    new_key,
    read_key,
    verify,
)
from pretrain.trust.ledger import RefusedError
from tests.waiting import wait_for

# RFC 8032, section 7.1, test 2: the signature is of the one byte 72 (hexadecimal), an r.
SECRET = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
SIGNATURE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)
# RFC 7748, section 6.1: Alice's.
AGREEMENT = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
AGREEMENT_PUBLIC = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
LINE = "atoll-key-1:PUAXw-hDiVqStwqnTRt-vJyYLM8uxJaMwM1V8Sr0ZgyFIPAJiTCnVHSLfdy0PvdaDb86DSY4GvTrpKmOqptOag"
# printf 'atoll/1 manifest\0{}' > message; openssl pkeyutl -sign -rawin -inkey KEY.pem -in message | basenc --base64url
SIGNED = "E_rmIwECks9VcVthq500xEFpWSknkpRrAMbSjYX3iL1I9WUHG_LUT94nhKzFNXlW0jMh4dAKn7hpsjbxvyA-Bg"

KEY = PrivateKey(
    name="law",
    signing=Ed25519PrivateKey.from_private_bytes(bytes.fromhex(SECRET)),
    agreement=X25519PrivateKey.from_private_bytes(bytes.fromhex(AGREEMENT)),
)
OTHER = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"  # of test 1
FIELDS = {
    "format": 1,
    "name": "law",
    "public": LINE,
    "signing": _encoded(bytes.fromhex(SECRET)),
    "agreement": _encoded(bytes.fromhex(AGREEMENT)),
}


def key_file(directory: Path, data: str | bytes = json.dumps(FIELDS), mode: int = 0o600) -> Path:
    path = directory / "law.key"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    path.chmod(mode)
    return path


def flipped(data: bytes, bit: int) -> bytes:
    """The same but for one bit."""
    place, bit = divmod(bit % (8 * len(data)), 8)
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def refusal(path: Path, command: tuple[str, ...] = ()) -> str:
    """The one line with which a file is refused; nothing private is in it."""
    with pytest.raises(ConfigError) as refused:
        load_signer(path, command)
    said = str(refused.value)
    assert "\n" not in said
    assert not any(str(FIELDS[half]) in said for half in ("signing", "agreement"))
    return said


# ---- signatures


def test_the_vectors_of_the_rfcs(tmp_path: Path) -> None:
    signer = load_signer(key_file(tmp_path))
    assert isinstance(signer, PrivateKey)
    assert signer.signing.sign(b"r").hex() == SIGNATURE
    assert (signer.public.signing.hex(), signer.public.agreement.hex()) == (PUBLIC, AGREEMENT_PUBLIC)
    assert signer.public.text == LINE
    assert signer.public.fingerprint == "pa7q-tbnt-y4ks-ygdi-n36n-5jde"
    assert PublicKey.parse(LINE) == signer.public


def test_what_is_signed_names_its_kind() -> None:
    assert KEY.sign("manifest", b"{}") == SIGNED
    verify(KEY.public, "manifest", b"{}", SIGNED)
    with pytest.raises(RefusedError) as refused:
        verify(KEY.public, "commit", b"{}", SIGNED)
    assert str(refused.value) == f"signature of the commit: not of these bytes by the key {KEY.public.fingerprint}"
    with pytest.raises(RefusedError, match="not of these bytes"):
        verify(KEY.public, "manifest", b"r", _encoded(bytes.fromhex(SIGNATURE)))  # a plain one, of another program


def test_a_kind_cannot_hold_what_divides_it_from_the_data() -> None:
    for kind in ("manifest\0", "", "a b", "x" * 65):
        with pytest.raises(AssertionError):
            KEY.sign(kind, b"{}")


@given(kind=st.from_regex(KIND, fullmatch=True), data=st.binary(max_size=64))
def test_what_was_signed_passes(kind: str, data: bytes) -> None:
    verify(KEY.public, kind, data, KEY.sign(kind, data))


@given(data=st.binary(min_size=1, max_size=64), bit=st.integers(0, 1 << 16))
def test_a_bit_flipped_in_the_data_is_refused(data: bytes, bit: int) -> None:
    with pytest.raises(RefusedError):
        verify(KEY.public, "manifest", flipped(data, bit), KEY.sign("manifest", data))


@given(bit=st.integers(0, 511))
def test_a_bit_flipped_in_the_signature_is_refused(bit: int) -> None:
    raw = flipped(bytes.fromhex(SIGNATURE), bit)
    with pytest.raises(RefusedError):
        verify(KEY.public, "manifest", b"{}", _encoded(raw))


@given(bit=st.integers(0, 8 * len(SIGNED) - 1))
def test_a_bit_flipped_in_the_text_of_the_signature_is_refused(bit: int) -> None:
    with pytest.raises(RefusedError) as refused:
        verify(KEY.public, "manifest", b"{}", flipped(SIGNED.encode(), bit).decode("latin-1"))
    assert str(refused.value).isprintable()


@given(bit=st.integers(0, 8 * len("manifest") - 1))
def test_a_bit_flipped_in_the_kind_is_refused(bit: int) -> None:
    kind = flipped(b"manifest", bit).decode("latin-1")
    assume(KIND.fullmatch(kind))
    with pytest.raises(RefusedError):
        verify(KEY.public, kind, b"{}", SIGNED)


@given(bit=st.integers(0, 8 * len(LINE) - 1))
def test_a_bit_flipped_in_the_public_line_is_another_key_or_none(bit: int) -> None:
    line = flipped(LINE.encode(), bit).decode("latin-1")
    try:
        public = PublicKey.parse(line)
    except ConfigError:
        return
    assert public.text == line
    assert public.fingerprint != KEY.public.fingerprint
    if public.signing != KEY.public.signing:
        with pytest.raises(RefusedError):
            verify(public, "manifest", b"{}", SIGNED)


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        (None, "the manifest is not signed; it needs a signature by the key pa7q-"),
        ("", "signature of the manifest: '' given; allowed: 86 characters of base64url"),
        (SIGNED + "==", "allowed: 86 characters"),
        (SIGNED[:-1], "allowed: 86 characters"),
        (SIGNED[:-1] + "h", "allowed: 86 characters"),  # the same bytes: its last four bits stand for nothing
        (SIGNED.replace("_", "/").replace("-", "+"), "allowed: 86 characters"),
        ("\x1b[2J" + "é" * 82, "'\\x1b[2J"),
        ("A" * 86, "not of these bytes"),
    ],
)
def test_what_is_no_signature_is_refused(signature: str | None, expected: str) -> None:
    with pytest.raises(RefusedError) as refused:
        verify(KEY.public, "manifest", b"{}", signature)
    assert expected in str(refused.value)
    assert str(refused.value).isprintable()


# ---- public lines


def line_of(signing: int | str = PUBLIC, agreement: int | str = AGREEMENT_PUBLIC) -> str:
    halves = [n.to_bytes(32, "little") if isinstance(n, int) else bytes.fromhex(n) for n in (signing, agreement)]
    return "atoll-key-1:" + _encoded(b"".join(halves))


# y of all points of order 1, 2, 4 and 8, with either sign; u of those of X25519, and of its twist
ORDER_8 = "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"
ORDER_8_TOO = "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"
U_ORDER_8 = "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"
U_ORDER_8_TOO = "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"
SMALL = [*(y + sign for y in (0, 1, P - 1) for sign in (0, 1 << 255)), ORDER_8, ORDER_8_TOO]


@pytest.mark.parametrize("signing", [*SMALL, 2, P, P + 1, P + 3, 2**256 - 1], ids=str)
def test_a_signing_key_that_is_no_point_or_one_of_small_order_is_refused(signing: int | str) -> None:
    with pytest.raises(ConfigError, match=r"^roster.law: atoll-key-1:.* given; .*this is no safe point"):
        PublicKey.parse(line_of(signing=signing), "roster.law")


@pytest.mark.parametrize(
    "agreement", [0, 1, P - 1, P, P + 1, P + 2, P + 9, 2**255 + 9, U_ORDER_8, U_ORDER_8_TOO], ids=str
)
def test_a_key_to_agree_on_secrets_that_gives_none_is_refused(agreement: int | str) -> None:
    with pytest.raises(ConfigError, match="no safe point"):
        PublicKey.parse(line_of(agreement=agreement))


def test_the_library_alone_would_let_everybody_sign_with_a_key_of_small_order() -> None:
    """Why keys are looked at: this one's signature, made without any secret, passes for any message."""
    anybody = Ed25519PublicKey.from_public_bytes((1).to_bytes(32, "little"))
    for message in (b"", b"atoll/1 commit\0{}"):
        anybody.verify((1).to_bytes(64, "little"), message)


@pytest.mark.parametrize(
    "text",
    [
        *("", "law", LINE + "=", LINE + "\n", " " + LINE, LINE[:-1], LINE + "A", LINE.upper(), LINE[:-1] + "h"),
        *(
            LINE.replace("-1:", "-2:"),
            LINE[:20] + LINE[20:].replace("-", "+"),
            LINE[:50] + "é" + LINE[51:],
            None,
            17,
            ["x"],
        ),
    ],
)
def test_what_is_not_exactly_a_public_line_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"^key: .* given; allowed: atoll-key-1: and 86 characters of base64url, as"):
        PublicKey.parse(text, "key")


@given(st.text() | st.binary(min_size=64, max_size=64).map(lambda data: "atoll-key-1:" + _encoded(data)))
def test_only_the_line_of_a_key_is_one(text: str) -> None:
    with suppress(ConfigError):
        assert PublicKey.parse(text).text == text


# ---- private files


@pytest.mark.parametrize("umask", [0, 0o777])
def test_a_new_key_is_a_file_of_its_owner_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        public = new_key(tmp_path / "law.key", "law")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "law.key").stat().st_mode) == 0o600
    signer = load_signer(tmp_path / "law.key")
    assert isinstance(signer, PrivateKey)
    assert (signer.name, signer.public) == ("law", public)
    assert public == PublicKey.parse(public.text)
    assert public != new_key(tmp_path / "again.key", "law")
    secrets = json.loads((tmp_path / "law.key").read_text())
    assert not any(secrets[half] in repr(signer) for half in ("signing", "agreement"))


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    (tmp_path / "link.key").symlink_to(tmp_path / "nowhere")
    for taken in (path, tmp_path / "link.key"):
        with pytest.raises(ConfigError, match="is there already; a key is never overwritten"):
            new_key(taken, "law")
    assert json.loads(path.read_text()) == FIELDS
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ConfigError, match="cannot be made: No such file or directory"):
        new_key(tmp_path / "nowhere" / "law.key", "law")
    with pytest.raises(ConfigError, match="name: 'Law' given; allowed: "):
        new_key(tmp_path / "Law.key", "Law")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["law.key", "link.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o777])
def test_a_file_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, mode=mode)
    assert refusal(path) == f"{path}: mode {mode:o} given; allowed: 600: chmod 600 {path}"
    path.chmod(0o400)
    assert load_signer(path).public == KEY.public


def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = Path("/proc/version")  # root's
    if os.geteuid() == 0:
        path = key_file(tmp_path)
        os.chown(path, 12345, -1)
    assert refusal(path).startswith(f"{path}: owner is user {path.stat().st_uid}; allowed: {os.geteuid()}")


def test_what_is_no_regular_file_is_refused_and_nobody_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "link").symlink_to(key_file(tmp_path))
    assert refusal(tmp_path / "link").endswith("link: cannot be read: a link given; allowed: the file itself")
    assert "cannot be read: No such file" in refusal(tmp_path / "nowhere")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        assert refusal(path) == f"{path}: no file given; allowed: a key file of atoll keys new"


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path, json.dumps(FIELDS) + " " * 4096)
    assert refusal(path).endswith(f"{path.stat().st_size} bytes given; allowed: a key file, up to 4096")


@pytest.mark.parametrize(
    "data",
    [
        *("", "\xff", "law", "[]", "{}", json.dumps(FIELDS)[:-1], "[" * 4000, LINE.replace("atoll", "ssh")),
        *(json.dumps(FIELDS | {"extra": 1}), json.dumps(FIELDS | {"name": 1})),
        *(
            json.dumps(FIELDS | {"format": 2}),
            json.dumps(FIELDS | {"name": "../law"}),
            json.dumps(FIELDS | {"name": 1}),
        ),
        *(json.dumps(FIELDS | {"signing": FIELDS["agreement"]}), json.dumps(FIELDS | {"public": None})),
        *(json.dumps(FIELDS | {"agreement": "AA"}), json.dumps(FIELDS | {"signing": None})),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: str) -> None:
    path = key_file(tmp_path, data.encode("latin-1"))
    assert refusal(path).startswith(f"{path}: no key of atoll keys new, or damaged; take your copy of it")


def test_a_bit_flipped_in_a_file_gives_no_other_key(tmp_path: Path) -> None:
    """One in each byte; what can still be read has the same public keys."""
    whole = json.dumps(FIELDS, indent=1).encode()
    passed = 0
    for place in range(len(whole)):
        path = key_file(tmp_path, flipped(whole, 8 * place + place % 8))
        with suppress(ConfigError):
            assert load_signer(path).public == KEY.public
            passed += 1
    assert passed < 8  # a letter of the name; what X25519 leaves out of a private key


# ---- commands

SIGNING = """
import base64, sys
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
signature = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(sys.argv[1])).sign(sys.stdin.buffer.read())
if sys.argv[2] == "raw":
    sys.stdout.buffer.write(signature)
if sys.argv[2] == "lines":
    sys.stdout.buffer.write(base64.encodebytes(signature))
if sys.argv[2] == "url":
    print(base64.urlsafe_b64encode(signature).decode().rstrip("="))
if sys.argv[2] == "hex":
    print(signature.hex())
"""


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, str]:
    """A command that signs, but for its arguments: secret key, and how it says the signature."""
    (tmp_path / "signing.py").write_text(SIGNING)
    return sys.executable, str(tmp_path / "signing.py")


@pytest.fixture
def public_file(tmp_path: Path) -> Path:
    path = tmp_path / "law.pub"
    path.write_text(LINE + "\n")
    return path


@pytest.mark.parametrize("form", ["raw", "lines", "url"])
def test_a_command_signs_as_the_file_does(public_file: Path, program: tuple[str, str], form: str) -> None:
    signer = load_signer(public_file, [*program, SECRET, form])
    assert signer.public == KEY.public
    assert signer.sign("manifest", b"{}") == SIGNED


def test_a_long_message_reaches_a_command_whole(public_file: Path, program: tuple[str, str]) -> None:
    data = bytes(range(256)) * 20_000  # more than pipes hold
    signature = load_signer(public_file, [*program, SECRET, "raw"]).sign("commit", data)
    assert signature == KEY.sign("commit", data)


def test_a_command_that_signs_with_another_key_is_refused(public_file: Path, program: tuple[str, str]) -> None:
    said = refusal(public_file, (*program, OTHER, "raw"))
    assert f"gave a signature that is not by the key {KEY.public.fingerprint}; allowed: Ed25519 of all of stdin" in said


def test_a_command_that_says_something_else_is_refused(public_file: Path, program: tuple[str, str]) -> None:
    assert "129 bytes on stdout; allowed: 64 bytes, raw or as base64" in refusal(public_file, (*program, SECRET, "hex"))
    for command in ("true", "yes | head -c 65", "printf '\\377%.0s' $(seq 86)", "head -c 4000 /dev/zero"):
        assert "on stdout; allowed: 64 bytes, raw or as base64" in refusal(public_file, ("sh", "-c", command))


def test_a_command_that_fails_is_one_line(public_file: Path, tmp_path: Path) -> None:
    said = refusal(public_file, ("sh", "-c", "echo first >&2; printf 'no \\033[2Jtoken\\n' >&2; exit 3"))
    assert said == "key_command: 'sh' gave exit code 3; allowed: 0; it says: no \\x1b[2Jtoken"
    assert "exit code -9; allowed: 0; it says: nothing" in refusal(public_file, ("sh", "-c", "kill -9 $$"))
    missing = refusal(public_file, ("no-such-command",))
    assert missing == "key_command: 'no-such-command' cannot be started: No such file or directory"
    assert "cannot be started: Permission denied" in refusal(public_file, (str(tmp_path),))
    assert "cannot be started: embedded null byte" in refusal(public_file, ("a\0b",))


def test_a_command_that_hangs_ends_with_what_it_started(tmp_path: Path) -> None:
    hanging = ("sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/started; sleep 1000")
    signer = CommandSigner(public=KEY.public, command=hanging, limit_seconds=3)
    with pytest.raises(ConfigError, match=r"^key_command: 'sh' gave nothing for 3 seconds; allowed: an answer by"):
        signer.sign("manifest", b"{}")
    started = Path("/proc") / (tmp_path / "started").read_text().strip() / "stat"

    def ended() -> bool:
        try:
            return started.read_text().split()[2] == "Z"  # where nobody asks how it ended
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_for(ended)


def test_a_public_file_signs_only_with_a_command(public_file: Path) -> None:
    assert refusal(public_file).endswith(
        "a public key given; allowed: the private one of atoll keys new, or a key_command"
    )
    assert read_key(public_file) == KEY.public
    public_file.write_text(LINE + "\n\n")
    assert "law.pub: 'atoll-key-1:" in refusal(public_file)
