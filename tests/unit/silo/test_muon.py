"""Muon's Newton-Schulz on many matrices at once, and who takes which."""

import pytest
import torch

from pretrain.silo import muon
from pretrain.silo.muon import MuonAdamW, balanced, orthogonalized


def matrices(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def one_by_one(matrix: torch.Tensor) -> torch.Tensor:
    """What torch.optim.Muon takes from a matrix at learning rate 1, but for its factor for tall ones."""
    parameter = torch.nn.Parameter(torch.zeros_like(matrix))
    parameter.grad = matrix
    settings = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    torch.optim.Muon([parameter], lr=1.0, **settings).step()
    return -parameter.detach() / max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5


def test_factors_are_torch_s_and_orthogonal() -> None:
    given = matrices((8, 8), (16, 48), (48, 16), (16, 48), (1, 5), (300, 200))
    found = orthogonalized(given)
    for matrix, factor in zip(given, found, strict=True):
        assert (factor.shape, factor.dtype) == (matrix.shape, torch.bfloat16)
        expected = one_by_one(matrix)
        # In bf16, where one number is 1/256 from the next; torch multiplies tall ones in another order.
        assert (factor - expected).norm() < 1e-2 * expected.norm()
        singular = torch.linalg.svdvals(factor.float())
        assert (singular > 0.5).all()
        assert (singular < 1.3).all()


@pytest.mark.parametrize("shape", [(7, 5), (16, 48), (48, 16), (64, 64), (130, 70), (300, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_how_many_there_are_at_once(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    given = matrices(*[shape] * 5, dtype=dtype)
    together, alone = orthogonalized(given), [orthogonalized([one])[0] for one in given]
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 2 * shape[0] * shape[1])
    for others in (alone, orthogonalized(given)):
        assert all(torch.equal(one, other) for one, other in zip(together, others, strict=True))


def test_no_direction_is_no_change() -> None:
    assert not orthogonalized([torch.zeros(3, 4)])[0].any()


def test_the_costliest_goes_first_to_who_has_least() -> None:
    # rows * columns * the less of both: 8, 64, 16, 8, 27, 16
    shapes = [(2, 2), (4, 4), (4, 2), (2, 2), (3, 3), (2, 4)]
    assert balanced([torch.Size(shape) for shape in shapes], 2) == [1, 0, 1, 0, 1, 1]  # 64 + 8, 27 + 16 + 16 + 8
    assert balanced([torch.Size(shape) for shape in shapes], 8) == [4, 0, 2, 5, 1, 3]


def test_in_rounds_it_takes_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped() -> tuple[list[torch.Tensor], int]:
        parameters = [torch.nn.Parameter(matrix) for matrix in matrices((4, 4), (4, 6), (6, 4), (2, 2))]
        adamw = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "muon": False}])
        group = {"params": parameters, "muon": True, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
        optimizer = MuonAdamW(group, adamw)
        for parameter, gradient in zip(parameters, matrices((4, 4), (4, 6), (6, 4), (2, 2)), strict=True):
            parameter.grad = gradient + 1
        optimizer.step()
        listed = [matrix for parameter in parameters for matrix in optimizer._matrices_of(parameter)]
        return [parameter.detach() for parameter in parameters], len(list(optimizer._rounds(listed)))

    whole, rounds = stepped()
    monkeypatch.setattr(muon, "ROUND_ELEMENTS", 30)
    in_parts, more_rounds = stepped()
    assert (rounds, more_rounds) == (1, 3)  # 16, 24, and 24 + 4 elements
    assert all(torch.equal(one, other) for one, other in zip(whole, in_parts, strict=True))
