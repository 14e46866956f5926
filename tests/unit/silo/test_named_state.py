"""What ranks have written of named tensors, read by others: any elements, and one line for what is not whole."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.silo.named_state import PARAMETER, SavedState, save_pieces
from tests.support import one_line_error

WEIGHT = torch.arange(10.0)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Three ranks have 4, 0 and 6 elements of a tensor, and the last a moment of it."""
    for rank, (start, stop) in enumerate([(0, 4), (4, 4), (4, 10)]):
        pieces = {"layer.weight": (start, WEIGHT[start:stop])}
        moments = {"layer.weight": (0, -WEIGHT)} if rank == 2 else {}
        save_pieces(tmp_path, rank, [(PARAMETER, pieces), ("exp_avg", moments)], {"layer.weight": 7})
    return tmp_path


@pytest.mark.parametrize(("start", "num_elements"), [(0, 10), (0, 4), (3, 2), (4, 6), (9, 1), (5, 0)])
def test_any_elements_are_read_from_whoever_has_them(written: Path, start: int, num_elements: int) -> None:
    saved = SavedState(written)
    assert saved.read(PARAMETER, "layer.weight", start, num_elements).tolist() == [
        float(number) for number in range(start, start + num_elements)
    ]
    assert (saved.kinds("layer.weight"), saved.kinds("other"), saved.steps) == (["exp_avg"], [], {"layer.weight": 7})


def test_what_is_not_whole_is_one_line(written: Path) -> None:
    def line() -> str:
        return one_line_error(lambda: SavedState(written).read(PARAMETER, "layer.weight", 2, 5))

    begin, end = f"{written}: this checkpoint is not whole: ", "; delete it, and an older one counts"
    assert one_line_error(SavedState(written).read, PARAMETER, "other", 0, 3) == (
        f"{begin}0 of 3 elements of parameter other are there{end}"
    )
    (written / f"00002-{PARAMETER}.safetensors").write_bytes(b"not one")
    assert line().startswith(begin)
    (written / f"00002-{PARAMETER}.safetensors").unlink()
    assert line().endswith(end)
    (written / "00002.json").unlink()
    assert line() == f"{begin}2 of 5 elements of parameter layer.weight are there{end}"
    for damage in ("[]", "{", json.dumps({"places": {PARAMETER: 3}, "steps": {}}), json.dumps({"steps": {}})):
        (written / "00002.json").write_text(damage)
        assert line().startswith(begin)
