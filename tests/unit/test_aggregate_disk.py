"""The outer state in files of the run directory: the same bits, the same restarts, and room that is asked for first."""

import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.outer.digest import digest_tensors
from pretrain.outer.placing import OnDisk
from pretrain.silo.exported import export
from pretrain.silo.model import build_initial, initial_parameters
from pretrain.trust.contract import build_contract
from tests.conftest import TinyConfig
from tests.support import VOCAB_SIZE, TinyText, mounted
from tests.unit.silo.test_model import GPT2, LLAMA, MOE, settings_of
from tests.unit.test_aggregate import OUTER, ROUNDS, one_version, start
from tests.unit.test_aggregate_restart import CODED, assert_same_state, deliver_all
from tests.waiting import wait_for

DISK = {"state": "disk"}
STREAMS: dict[str, dict[str, Any]] = {
    "nesterov": OUTER,
    "nesterov, coded": OUTER | CODED,
    "adam, coded": CODED | {"optimizer": "adam", "lr": 0.1},
    "sgd": {"optimizer": "sgd", "num_fragments": 2},
}


def ledger(config: RunConfig) -> list[tuple[str, str, bytes]]:
    files = sorted(Path(config.store_url, "global").rglob("*"))
    return [(file.parent.name, file.name, file.read_bytes()) for file in files if file.is_file()]


def assert_in_files(tensors: Iterable[Tensor], config: RunConfig) -> None:
    """Each is a mapping of a file of its own, which has lost its name."""
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    files = {line[0].split("-")[0]: line[-1] for line in maps if line[-1].endswith(" (deleted)")}
    folder = Path(config.directory).resolve() / "aggregator" / "state"
    assert {Path(files[f"{value.data_ptr():x}"]).parent for value in tensors} == {folder}


def files_of(config: RunConfig) -> list[Path]:
    return list(Path(config.directory, "aggregator", "state").iterdir())


@pytest.mark.parametrize("stream", STREAMS)
def test_on_disk_and_killed_again_and_again_it_makes_the_same_ledger(
    stream: str, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    in_memory = tiny_config(tmp_path / "memory", inner=ROUNDS, outer=STREAMS[stream])
    on_disk = tiny_config(tmp_path / "disk", inner=ROUNDS, outer=STREAMS[stream] | DISK)
    (one, expected), (other, state) = start(in_memory), start(on_disk)
    while state.version < on_disk.schedule.num_versions:
        assert_in_files([*state.parameters.values(), *(v for of in state.kept.values() for v in of.values())], on_disk)
        for config in (in_memory, on_disk):
            deliver_all(config, expected)
        one_version(one, expected)
        other.merge(state, other.collect(state))  # and killed before the commit
        other, state = start(on_disk)
        one_version(other, state)
        assert_same_state(state, expected)
        other, state = start(on_disk)
        assert_same_state(state, expected)
    assert ledger(on_disk) == ledger(in_memory)
    assert not files_of(on_disk)


def test_where_the_state_lies_is_no_term(tmp_path: Path, tiny_config: TinyConfig) -> None:
    in_memory, on_disk = (tiny_config(tmp_path, inner=ROUNDS, outer=OUTER | more) for more in ({}, DISK))
    assert build_contract(in_memory) == build_contract(on_disk)
    aggregator, state = start(in_memory)
    deliver_all(in_memory, state)
    one_version(aggregator, state)
    assert_same_state(start(on_disk)[1], state)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "experts", "checkpoint"])
def test_a_model_is_built_in_its_files(kind: str, tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText) -> None:
    models: dict[str, Any] = {"llama": LLAMA, "tied": LLAMA | {"tie_word_embeddings": True}, "gpt2": GPT2}
    if kind == "checkpoint":
        model = build_initial(settings_of(models["tied"]), VOCAB_SIZE)
        export(model.bfloat16(), tiny_text.tokenizer, tmp_path / "model")
        config = tiny_config(tmp_path, model={"config": None, "checkpoint": str(tmp_path / "model")})
    else:
        config = tiny_config(tmp_path, model={"seed": 5})
        config.model.config = models.get(kind, MOE)
    expected = initial_parameters(config)
    placed = initial_parameters(config, OnDisk(Path(config.directory) / "aggregator" / "state").copy)
    assert list(placed) == list(expected)
    assert digest_tensors(placed.items()) == digest_tensors(expected.items())
    assert_in_files(placed.values(), config)


def test_a_killed_process_leaves_no_file_behind(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, inner=ROUNDS, outer=OUTER | CODED | DISK)
    Path(config.directory).mkdir(parents=True)
    process = aggregator(config)
    wait_for(lambda: Path(config.store_url, "global", "000000", "commit.json").exists(), seconds=60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not files_of(config)
    running, state = start(config)
    assert state.version == 0
    deliver_all(config, state)
    one_version(running, state)


def aggregator(config: RunConfig) -> subprocess.Popen[str]:
    path = Path(config.directory) / "config.yaml"
    save_config(config, path)
    command = [sys.executable, "-m", "pretrain.aggregate", "--config", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path: Path, tiny_config: TinyConfig) -> None:
    exchange = {"url": str(tmp_path / "store")}
    with mounted(tmp_path / "run", num_bytes=800 << 10) as disk:
        config = tiny_config(tmp_path, exchange=exchange, outer=DISK)
        sizes = [value.numel() for value in initial_parameters(config).values()]
        process = aggregator(config)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 2
        needed = (8 + 16) * sum(sizes)  # parameters and velocity; two deliveries, a change and a snapshot
        assert error.startswith(
            f"atoll: directory: '{disk}' given; the aggregator, with its outer state on disk, needs "
            f"{needed / 1e9:.3f} GB there, and 0.0"
        )
        assert error.endswith(" GB are free; make room, name another directory, or take outer.state=memory\n")
        assert error.count("\n") == 1
        assert not (tmp_path / "store" / "contract.json").exists()
        start(tiny_config(tmp_path, exchange=exchange))  # in memory there is room


def test_a_silo_without_room_for_its_checkpoints_says_so(tmp_path: Path, tiny_config: TinyConfig) -> None:
    with mounted(tmp_path / "run", num_bytes=1 << 20) as disk:
        config = tiny_config(tmp_path, exchange={"kind": "none"})
        path = tmp_path / "config.yaml"
        save_config(config, path)
        command = [sys.executable, "-m", "pretrain.train", "--config", str(path), "--silo", "alpha"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert found.returncode == 2
        said = f"atoll: directory: '{disk}' given; silo alpha needs 0.00"
        assert [line[: len(said)] for line in found.stderr.splitlines() if line.startswith("atoll: ")] == [said]
        assert not (config.silo_directory("alpha") / "checkpoints").exists()
