"""Muon's Newton-Schulz on many matrices at once, and who takes which."""

import pytest
import torch

from pretrain.silo import muon
from pretrain.silo.muon import MuonAdamW, balanced, orthogonalized, rounds


def matrices(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


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


LARGEST = pytest.param((300, 300), marks=pytest.mark.soak)


@pytest.mark.parametrize("shape", [(7, 5), (16, 48), (48, 16), (64, 64), (130, 70), LARGEST])
def test_no_bit_depends_on_how_many_there_are_at_once(shape: tuple[int, int]) -> None:
    given = matrices(*[shape] * 5)
    together, alone = orthogonalized(given), [orthogonalized([one])[0] for one in given]
    for others in (alone, orthogonalized(given[:2]) + orthogonalized(given[2:])):
        assert all(torch.equal(one, other) for one, other in zip(together, others, strict=True))


def test_no_direction_is_no_change() -> None:
    assert not orthogonalized([torch.zeros(3, 4)])[0].any()


# rows * columns * the less of both: 8, 64, 16, 8, 27, 16
SHAPES = [torch.Size(shape) for shape in [(2, 2), (4, 4), (4, 2), (2, 2), (3, 3), (2, 4)]]


def test_the_costliest_goes_first_to_who_has_least() -> None:
    assert balanced(SHAPES, 2) == [[1, 3], [4, 2, 5, 0]]  # 64 + 8, 27 + 16 + 16 + 8
    assert balanced(SHAPES, 8) == [[1], [4], [2], [5], [0], [3], [], []]


def test_rounds_have_a_few_of_one_shape_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(rounds(SHAPES, 2)) == [[[3, 1], [0, 2, 5, 4]]]
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 16)
    # 4 and 16 elements are too many together, and so are 4 + 8 and 8.
    assert list(rounds(SHAPES, 2)) == [[[3], [0, 2]], [[1], [5]], [[], [4]]]
    assert list(rounds([], 2)) == []


def test_in_rounds_it_takes_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped() -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(matrix) for matrix in matrices((4, 4), (4, 6), (6, 4), (2, 2))]
        adamw = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "muon": False}])
        group = {"params": parameters, "muon": True, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
        optimizer = MuonAdamW(group, adamw)
        for parameter, gradient in zip(parameters, matrices((4, 4), (4, 6), (6, 4), (2, 2)), strict=True):
            parameter.grad = gradient + 1
        optimizer.step()
        return [parameter.detach() for parameter in parameters]

    whole = stepped()
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 1)
    assert all(torch.equal(one, other) for one, other in zip(whole, stepped(), strict=True))
