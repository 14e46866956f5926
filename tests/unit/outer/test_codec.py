"""Changes on their way: exact where that is claimed, near where it is not, and nothing is lost for good."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from pretrain.config import allowed
from pretrain.exchange.payload import Tensors, save_tensors
from pretrain.exchange.store import file_payload
from pretrain.outer.codec import CODECS, FEEDBACK_DECAY, SUM32, apply_change, check, decoded, encode
from pretrain.outer.digest import digest_tensors, tensor_hash
from pretrain.outer.moments import MeanGradient, SecondMoment
from pretrain.outer.optimizer import OuterOptimizer
from pretrain.outer.quantize import BLOCK, Parts

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
LOSSY = [codec for codec in CODECS if codec != "fp32"]
SHAPE = torch.Size([3, 1500])  # more than a chunk of top-k, and no whole number of blocks


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and tensor_hash(a) == tensor_hash(b)


def normal(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def travelled(parts: Parts) -> Parts:
    """What arrives elsewhere."""
    return load(save(parts))


def test_the_configuration_knows_the_same_codecs() -> None:
    assert (allowed.CODECS, allowed.SUM32) == (CODECS, SUM32)  # written once more there, because it imports no torch
    assert {codec for codec, decay in FEEDBACK_DECAY.items() if decay} == {"topk"}
    assert FEEDBACK_DECAY.keys() == set(CODECS)


# ---- fp32: the values themselves

NEAR = st.floats(-(2**28), 2**28).map(lambda factor: math.copysign(max(abs(factor), 2**-28), factor))


@given(FLOATS, NEAR)
@example(2.0**-149, 1.0)  # the smallest number there is
@example(1.0, 2.0**-28)
@example(3.4e38, -1.0)
def test_fp32_leads_back_to_the_local_value(base_value: float, factor: float) -> None:
    base = torch.tensor([base_value], dtype=torch.float32)
    local = (base.double() * factor).float()
    assume(torch.isfinite(local).item() and (base_value == 0 or abs(local.item()) >= 2**-29 * abs(base_value)))
    parts = encode("fp32", base, local)
    assert parts.keys() == {"values"}
    assert same_bits(parts["values"], local)
    difference = decoded("fp32", base, parts)
    assert difference.dtype == torch.float64
    assert (base.double() - difference).float().item() == local.item()
    alone, _ = OuterOptimizer(name="sgd").step(base, difference, {}, lr=1.0, count=1)
    assert alone.item() == local.item()  # one silo, outer SGD of lr 1: as if it were alone


def there_and_back(base: Tensor, local: Tensor) -> Tensor:
    return (base.double() - decoded("fp32", base, encode("fp32", base, local))).float()


def test_fp32_is_exact_for_zeros_and_denormals() -> None:
    values = [0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 1.0, -1.0, 2.0**127]
    for base_value in values:
        for local_value in values:
            ratio = abs(local_value / base_value) if base_value else 1.0
            if local_value and ratio < 2**-29:
                continue  # beyond the limit that a test below shows
            back = there_and_back(torch.tensor([base_value]), torch.tensor([local_value]))
            assert back.item() == local_value  # as numbers: a negative zero comes back as a positive one


def test_negative_zero_comes_back_as_zero() -> None:
    """The one pair of equal numbers with different bits: the digest after the merge is of +0.0 for everybody."""
    back = there_and_back(torch.tensor([1.0]), torch.tensor([-0.0]))
    assert same_bits(back, torch.tensor([0.0]))
    assert not same_bits(back, torch.tensor([-0.0]))


def test_the_limit_of_fp32_is_a_factor_of_2_to_the_minus_29() -> None:
    """24 bits of the local value and 29 of distance fill the 53 bits of a float64; below a power of two it has 54."""
    odd = 1 + 2**-23  # needs all 24 bits
    for exponent, exact in ((-29, True), (-30, True), (-31, False)):
        local = torch.tensor([odd * 2.0**exponent])
        back = there_and_back(torch.tensor([1.0]), local)
        assert (back.item() == local.item()) == exact
        assert back.item() == pytest.approx(local.item(), abs=2**-53)


def test_fp32_publishes_exactly_the_value() -> None:
    base, value = normal(1), normal(2)
    value[0, :2] = torch.tensor([-0.0, 2.0**-149])
    apply_change("fp32", base, travelled(encode("fp32", base, value)))
    assert same_bits(base, value)


# ---- all others: the difference


@given(FLOATS, FLOATS)
def test_bf16_error_is_half_a_bit_in_eight(base_value: float, local_value: float) -> None:
    base, local = torch.tensor([base_value]), torch.tensor([local_value])
    difference = (base - local).item()
    assume(abs(difference) < 3.3e38)  # bf16's largest number is 3.39e38
    parts = encode("bf16", base, local)
    assert parts["values"].dtype == torch.bfloat16
    found = decoded("bf16", base, parts)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(difference, rel=2**-8, abs=2**-133)


def error_bound(codec: str, difference: Tensor) -> Tensor:
    """Of every element: the table of quantize.py, for values far above the smallest scale."""
    size = difference.abs().flatten()
    padded = torch.nn.functional.pad(size, (0, -len(size) % BLOCK)).view(-1, BLOCK)
    largest = padded.amax(1, keepdim=True).expand_as(padded).flatten()[: len(size)]
    if codec == "fp32":
        bound = torch.zeros_like(size)
    elif codec in ("int8", "int4"):
        bound = largest / {"int8": 253, "int4": 13.9}[codec]
    elif codec == "e3m0":
        bound = torch.maximum(size / 3, largest / 85)
    else:
        bound = size * {"bf16": 2**-8, "topk": 1.0}[codec]
    return bound.view(SHAPE)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 10.0))
def test_the_difference_comes_back_within_the_bound(codec: str, seed: int, scale: float) -> None:
    base = normal(seed)
    value = base + normal(seed + 1, scale)
    before = base.clone(), value.clone()
    difference = base - value if codec != "fp32" else base.double() - value.double()
    parts = travelled(encode(codec, base, value))
    check(codec, parts, SHAPE)
    found = decoded(codec, base, parts)
    assert (found.dtype, found.shape) == (torch.float64, SHAPE)
    error = (found - difference).abs()
    if codec == "topk":  # what is sent is one of two means of a chunk: nearer in the sum than one by one
        sent = found != 0
        assert sent.sum() == math.ceil(SHAPE.numel() / 64)
        assert error.square().sum() <= difference.double().square().sum()
        assert (error[~sent] == difference.abs()[~sent]).all()
    else:
        assert (error <= error_bound(codec, difference) * (1 + 1e-6)).all()
    assert same_bits(base, before[0])
    assert same_bits(value, before[1])


@pytest.mark.parametrize("codec", CODECS)
def test_any_memory_layout(codec: str) -> None:
    local = torch.arange(6.0).reshape(2, 3).T
    parts = encode(codec, torch.zeros(3, 2), local)
    assert all(part.is_contiguous() for part in parts.values())
    again = encode(codec, torch.zeros(3, 2), local.contiguous())
    assert all(same_bits(parts[part], value) for part, value in again.items())
    assert decoded(codec, torch.zeros(3, 2), parts).shape == local.shape


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_not_finite_never_leaves(codec: str) -> None:
    for bad in (math.inf, -math.inf, math.nan):
        value = normal(1)
        value[2, 1499] = bad
        residual = normal(3)
        with pytest.raises(ValueError, match=r"^[^\n]*infinite or NaN[^\n]*; allowed: finite values$"):
            encode(codec, normal(0), value, residual=residual, decay=0.5)
        assert same_bits(residual, normal(3))  # nothing was sent


@pytest.mark.parametrize("codec", LOSSY)
def test_a_difference_beyond_fp32_never_leaves(codec: str) -> None:
    with pytest.raises(ValueError, match=r"^a value to send is infinite or NaN; allowed: finite values$"):
        encode(codec, torch.full((2,), 3e38), torch.full((2,), -3e38))


# ---- error feedback


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 1.0])
def test_the_residual_is_what_was_left_out(codec: str, decay: float) -> None:
    base, value, residual = normal(1), normal(2), normal(3, 0.1)
    kept = residual
    parts = encode(codec, base, value, residual=residual, decay=decay)
    wanted = (base - value).double() + decay * normal(3, 0.1).double()
    # The wanted difference and what is kept of it are each rounded to fp32, and these values are below 8.
    torch.testing.assert_close(decoded(codec, base, parts) + kept.double(), wanted, rtol=0, atol=2**-20)
    without = encode(codec, base, value)
    unchanged = all(torch.equal(part, without[name]) for name, part in parts.items())
    assert unchanged == (decay == 0)


@pytest.mark.parametrize("codec", LOSSY)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_what_was_sent_and_what_is_kept_add_up_to_all_differences(codec: str, seed: int) -> None:
    residual = torch.zeros(SHAPE)
    sent, differences = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
    for round in range(20):
        base = normal(seed)
        value = base + normal(seed + 1 + round, 0.01)
        sent += decoded(codec, base, encode(codec, base, value, residual=residual, decay=1.0))
        differences += (base - value).double()
    torch.testing.assert_close(sent + residual, differences, rtol=0, atol=20 * 2**-23)
    left_out = torch.linalg.vector_norm(sent - differences) / torch.linalg.vector_norm(differences)
    assert left_out < {"bf16": 1e-3, "int8": 2e-3, "int4": 0.04, "e3m0": 0.06, "topk": 0.8}[codec]


@pytest.mark.parametrize("codec", LOSSY)
def test_a_decayed_residual_fades(codec: str) -> None:
    """After one difference and many rounds without, what was sent is less than the difference by what faded."""
    base, value, residual = normal(1), normal(2), torch.zeros(SHAPE)
    sent, faded = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
    for round in range(100):
        faded += 0.05 * residual.double()
        parts = encode(codec, base, base if round else value, residual=residual, decay=0.95)
        sent += decoded(codec, base, parts)
    assert residual.abs().max() < 0.01
    torch.testing.assert_close(sent + residual + faded, (base - value).double(), rtol=0, atol=1e-5)


def test_fp32_keeps_nothing() -> None:
    residual = torch.zeros(SHAPE)
    encode("fp32", normal(1), normal(2), residual=residual, decay=1.0)
    assert not residual.any()


# ---- the way down: everybody holds what was published


@pytest.mark.parametrize("codec", LOSSY)
def test_applying_subtracts_what_was_decoded(codec: str) -> None:
    published = normal(1)
    parts = travelled(encode(codec, published, normal(2)))
    expected = published - decoded(codec, published, parts).float()
    apply_change(codec, published, parts)
    assert same_bits(published, expected)


# Distance to the target over the length of one of its steps, a little above what was measured: a format that leaves
# out the share d of normal data comes to d / sqrt(1 - d^2), which for top-k is 3 (d = 0.94).
DISTANCE = {"fp32": 0.0, "bf16": 0.002, "int8": 0.008, "int4": 0.14, "e3m0": 0.23, "topk": 3.6}


@pytest.mark.parametrize("codec", CODECS)
def test_the_published_parameters_follow_the_target(codec: str) -> None:
    target = normal(0)
    published, silo = target.clone(), target.clone()
    for step in range(1, 151):
        change = normal(step, 0.01)
        target += change
        parts = encode(codec, published, target)
        apply_change(codec, published, parts)
        apply_change(codec, silo, travelled(parts))
        assert digest_tensors([("a", silo)]) == digest_tensors([("a", published)])
        distance = torch.linalg.vector_norm(target - published) / torch.linalg.vector_norm(change)
        assert distance <= DISTANCE[codec], f"after {step} steps"
    for _ in range(150):  # the target rests: what was left out arrives
        apply_change(codec, published, encode(codec, published, target))
    assert (published - target).abs().max() < 1e-6


# ---- refusals


def refusal(codec: str, parts: Parts, shape: torch.Size = SHAPE) -> str:
    with pytest.raises(ValueError, match="allowed: ") as caught:
        check(codec, parts, shape)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("codec", CODECS)
def test_parts_of_another_codec_or_shape_are_refused(codec: str) -> None:
    base, value = normal(1), normal(2)
    parts = encode(codec, base, value)
    check(codec, parts, SHAPE)
    for other in set(CODECS) - {codec}:
        if {codec, other} != {"int4", "e3m0"}:  # of the same layout; manifest and commit name the codec
            assert refusal(codec, encode(other, base, value))
    assert refusal(codec, parts, torch.Size([3, 1600]))
    assert refusal(codec, encode(codec, base[:, 100:], value[:, 100:]))
    assert refusal(codec, {})
    for part in parts:
        assert refusal(codec, {name: value for name, value in parts.items() if name != part})
        assert refusal(codec, parts | {part: parts[part].to(torch.int64)})
    assert refusal(codec, parts | {"more": torch.zeros(1)})


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_parts_that_are_not_finite_are_refused(codec: str, bad: float) -> None:
    parts = encode(codec, normal(1), normal(2))
    part = "values" if codec in ("fp32", "bf16") else "scales"
    parts[part].view(-1)[-1] = bad
    assert refusal(codec, parts)


def test_refusals_say_what_is_allowed() -> None:
    parts = encode("fp32", normal(1), normal(2))
    assert refusal("fp32", {"values": parts["values"].double()}) == (
        "{'values': 'torch.float64 [3, 1500]'} given; allowed: {'values': 'torch.float32 [3, 1500]'}"
    )
    parts["values"][0, 0] = math.nan
    assert refusal("fp32", parts) == "infinite or NaN given; allowed: finite values"
    assert refusal("bf16", {"values": torch.zeros(4500)}) == (
        "not bf16 of shape [3, 1500]: part values of torch.float32 [4500] given; allowed: torch.bfloat16 [4500]"
    )


# ---- payloads


@pytest.mark.parametrize("codec", CODECS)
def test_a_payload_holds_the_parts_of_named_tensors(codec: str, tmp_path: Path) -> None:
    coded = {name: encode(codec, normal(1), normal(seed)) for seed, name in enumerate(("b.weight", "a/odd", "a"))}
    file = tmp_path / "new" / "000001.safetensors"
    save_tensors(coded, file)
    found = Tensors(file)
    assert found.names == sorted(coded)
    for name, parts in coded.items():
        assert found.parts(name).keys() == parts.keys()
        assert all(same_bits(found.parts(name)[part], value) for part, value in parts.items())
    with pytest.raises(ValueError, match=r"^key 'parameter/[a-z]+/[a-z./]+' given; allowed: velocity/PART/NAME$"):
        Tensors(file, "velocity")


@pytest.mark.parametrize(
    "key", ["", "a", "parameter", "parameter/a", "parameter//a", "parameter/values/", "target/values/a"]
)
def test_a_foreign_key_is_refused(key: str, tmp_path: Path) -> None:
    save_file({"parameter/values/a": torch.zeros(1), key: torch.zeros(1)}, tmp_path / "payload")
    with pytest.raises(ValueError, match="given") as caught:
        Tensors(tmp_path / "payload")
    assert str(caught.value) == f"key {key!r} given; allowed: parameter/PART/NAME"


@pytest.mark.parametrize("data", [b"", b"no tensors", b"\xff" * 8 + b"{}"])
def test_what_is_no_payload(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "payload").write_bytes(data)
    with pytest.raises(SafetensorError):
        Tensors(tmp_path / "payload")


def test_what_cannot_be_read_where_it_lies_is_refused(tmp_path: Path) -> None:
    """The library takes both: a type that nobody sends, and numbers of four bytes behind one of a byte."""
    file = tmp_path / "payload"
    for rows, message in (
        ({"a": ("U32", 0, 4)}, "key 'parameter/values/a': dtype U32 given; allowed: F32, I32, I64, BF16, U8"),
        ({"b": ("U8", 0, 1), "a": ("F32", 1, 5)}, "key 'parameter/values/a' lies at byte N; allowed: multiples of 4"),
    ):
        words = {
            f"parameter/values/{name}": {"dtype": dtype, "shape": [1], "data_offsets": [start, end]}
            for name, (dtype, start, end) in rows.items()
        }
        text = json.dumps(words).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8)[: max(row[2] for row in rows.values())])
        with pytest.raises(ValueError, match="allowed") as caught:
            Tensors(file)
        assert str(caught.value) == message.replace("byte N", f"byte {9 + len(text)}")


def test_a_payload_has_the_bytes_of_safetensors_own(tmp_path: Path) -> None:
    """Whose sorting goes by the type first; names may be any text. And it is named by what was written."""
    codecs = {"b": "fp32", 'é"\n\x7f': "int4", "a": "topk"}
    coded = {name: encode(codec, normal(1), normal(2)) for name, codec in codecs.items()}
    moments = {"b": SecondMoment(SHAPE).encode(normal(3).square()), "m": MeanGradient(SHAPE).encode(normal(4))}
    kinds = {"target": coded, "moment": moments}
    expected = save({f"{k}/{p}/{n}": t for k, of in kinds.items() for n, parts in of.items() for p, t in parts.items()})
    file = tmp_path / "new" / "payload"
    payload = save_tensors(coded, file, "target", fragment=3, moments=moments)
    assert file.read_bytes() == expected
    assert payload == file_payload(file, 3)
    opened = Tensors(file, "target")
    save_tensors({}, file)  # a file of its own: the other one is still being read
    assert same_bits(opened.parts("b")["values"], coded["b"]["values"])
