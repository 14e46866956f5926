"""What Flower's side of the comparison is given: the same conversations, and every setting that its app asks for."""

import re
import tomllib

import numpy as np
import pytest

from benchmarks.flower import FLOWER, IGNORED, ITS, OURS, PEER, cut, settings_of, write_app
from pretrain.config.errors import ConfigError
from pretrain.config.load import load_config
from pretrain.silo.batch import chat_row

SETTINGS = [
    "tokenizer=tokenizer.json",
    "model={checkpoint: base, seed: 3, adapter: {kind: lora, rank: 4, alpha: 8, merge: alternate}}",
    "inner={num_steps: 40, lr: 0.002, min_lr_ratio: 0.25, betas: [0.8, 0.9]}",
    "outer={sync_interval_steps: 10, num_fragments: 2}",
    "silos={clinic: {global_batch_sequences: 6, micro_batch_sequences: 6}, court: {}}",
]


def test_a_row_is_cut_into_its_conversations_without_what_fills_it() -> None:
    # Two conversations of three and two tokens in a row of six; the last token of each is trained.
    trained = np.array([False, False, True, False, True, False])
    row = chat_row(np.array([5, 8, 9, 4, 7, 0]), trained, np.array([3, 5, 6]))
    assert cut(row) == [([5, 8, 9], [IGNORED, IGNORED, 9]), ([4, 7], [IGNORED, 7])]


@pytest.mark.parametrize("way", FLOWER)
def test_the_app_has_each_setting_that_it_asks_for(tmp_path, way: str) -> None:
    write_app(tmp_path / "app", settings_of(way, load_config([], SETTINGS)))
    app = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    asked = set(re.findall(r'settings\["([^"]+)"\]', PEER.read_text()))
    assert asked == set(app["config"])
    assert (tmp_path / "app" / "flower_peer.py").read_bytes() == PEER.read_bytes()


def test_ours_are_those_of_the_run() -> None:
    config = load_config([], SETTINGS)
    its, ours = settings_of(ITS, config), settings_of(OURS, config)
    assert (ours["rank"], ours["alpha"], ours["targets"], ours["in-rows"]) == (4, 8.0, "all-linear", True)
    assert (ours["steps"], ours["batch"], ours["rounds"], ours["seed"]) == (10, 6, 4, 3)
    assert (ours["lr-max"], ours["lr-min"], ours["beta1"], ours["beta2"]) == (0.002, 0.0005, 0.8, 0.9)
    assert (its["rank"], its["lr-max"], its["batch"], its["rounds"], its["clients"]) == (32, 5e-5, 16, 4, 2)


def test_the_recipe_takes_as_many_steps_as_the_run() -> None:
    config = load_config([], [*SETTINGS, "outer.sync_interval_steps=20"])
    with pytest.raises(ConfigError, match=r"inner\.num_steps: 40 given; allowed: .*outer\.sync_interval_steps 10"):
        settings_of(ITS, config)
