"""`atoll init`: every combination writes a configuration that passes the preflight, and nothing is overwritten."""

import itertools
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import cli
from launch.start.begin import MACHINES, ROLES, Beginning, Text
from launch.start.site import load_site
from launch.start.slurm import render_jobs
from launch.start.torchrun import check_options, node_commands
from pretrain.config.load import load_config
from pretrain.config.presets import presets_of
from pretrain.exchange.store import StoreExchange
from pretrain.federation.contract import propose
from pretrain.federation.join import find_federation, joined_config
from pretrain.federation.preflight import check_run, check_silo
from pretrain.trust.contract import build_contract, first_contract
from pretrain.trust.keys import new_key
from tests import typed
from tests.support import ROOT, TinyText, one_line_error
from tests.unit.launch.test_cli import one_line, run

COMBINATIONS = [
    (machine, role) for machine, role in itertools.product(MACHINES, ROLES) if role != "site" or machine == "slurm"
]
SIZES = {"laptop": [], "node": ["--gpus", "2"], "slurm": ["--gpus", "4", "--nodes", "2"], "torchrun": ["--gpus", "0"]}


@pytest.fixture
def place(tmp_path: Path, tiny_text: TinyText, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders of text, and what the commands that are printed first would make of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed").mkdir()
    for name in ("alpha", "beta"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / "packed" / name).symlink_to(tiny_text.packed[name])
    (tmp_path / "tokenizer").symlink_to(tiny_text.tokenizer.parent)
    return tmp_path


def begin(monkeypatch: Any, capsys: Any, *arguments: str) -> list[str]:
    """`atoll init`; the commands that it prints."""
    monkeypatch.setattr(sys, "argv", ["atoll", "init", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, "")
    first, *next_commands = said.out.splitlines()
    assert first.endswith(".yaml is written; read it, and then type")
    return [line.strip() for line in next_commands]


@pytest.mark.parametrize(("machine", "role"), COMBINATIONS, ids=str)
def test_what_is_written_passes_the_preflight(
    machine: str, role: str, place: Path, monkeypatch: Any, capsys: Any
) -> None:
    texts = {"federation": ["raw/alpha", "beta=raw/beta"], "silo": ["raw/beta"]}.get(role, [])
    given = ["--machine", machine, "--role", role, *SIZES[machine]]
    given += [word for text in texts for word in ("--text", text)]
    given += ["--model", "llama-5m"] if role in ("federation", "contract") else []
    given += ["--roster", "alpha", "--roster", "beta", "--roster", "gamma"] if role == "contract" else []
    given += ["--store", "shared"] if role in ("silo", "contract") else []
    next_commands = begin(monkeypatch, capsys, *given)
    for line in next_commands:
        typed.check_whole(line)
    if role == "site":
        (place / "run.yaml").write_text("model: {config: {model_type: llama}}\nsilos: {alpha: {}}\n")
        site = load_site([Path("site.yaml")], load_config(["run.yaml"]))
        assert (site.silos["alpha"].gpus_per_node, site.aggregator.gpus_per_node) == (4, 0)
        return
    if role == "contract":
        names = ("alpha", "beta", "gamma", "aggregator")
        keys = {name: new_key(place / f"{name}.key", name).text for name in names}
        assert one_line_error(propose, load_config(["federation.yaml"])).startswith(
            "trust.keys.aggregator: 'atoll-key-1:...' given; allowed: atoll-key-1: and 86 characters"
        )
        for name, key in keys.items():
            text = Path("federation.yaml").read_text()
            Path("federation.yaml").write_text(text.replace(f"{name}: atoll-key-1:...", f"{name}: {key}"))
        config = load_config(["federation.yaml"])
        propose(config)
        assert (config.trust.keys, config.membership.quorum, config.silos) == (keys, 2, {})
        return
    file = Path("run.yaml" if role == "federation" else "beta.yaml")
    if role == "silo":
        begin(monkeypatch, capsys, "--machine=laptop", "--role=federation", "--model=llama-5m", "--text=raw/beta")
        theirs = load_config(["run.yaml"], ["exchange.url=shared", "outer.max_batch_sequences=64"])
        StoreExchange(theirs.store_url).write_contract(first_contract(build_contract(theirs)))
        config = joined_config(find_federation("shared", [file], []), [file], [])
        check_silo(config, "beta")
        assert config.outer.codec == "int4"
    else:
        config = load_config([file])
        check_run(config, touch=False)
        assert set(config.silos) == {"alpha", "beta"}
    silo = config.silos["beta"]
    assert (silo.precision == "bf16") == ("--gpus" in given and given[given.index("--gpus") + 1] != "0")
    if machine == "slurm":
        begin(monkeypatch, capsys, "--machine=slurm", "--role=site", "--gpus=4")
        jobs = render_jobs(config, load_site([Path("site.yaml")], config), place)
        assert [job.name for job in jobs] == ["aggregator", *sorted(config.silos)]
    if machine == "torchrun":
        check_options(config, "beta", ["10.0.0.1"], 29_400)
        node_commands(config, "beta", ["10.0.0.1"], port=29_400, interface=None, max_restarts=0)


@pytest.mark.parametrize("preset", presets_of("model"), ids=lambda preset: preset.path.stem)
@pytest.mark.parametrize("gpus", [0, 8])
def test_every_model_fits(gpus: int, preset: Any, place: Path) -> None:
    begun = Beginning(
        machine="slurm", role="federation", texts=[Text("a", "raw")], model=preset.path.stem, gpus=gpus, nodes=2
    )
    file = place / "run.yaml"
    file.write_text(begun.configuration("run.yaml"))
    config = load_config([file])
    zero = config.silos["a"].deepspeed.get("zero_optimization", {}).get("stage", 0)
    assert zero == (3 if gpus and preset.path.stem in ("llama-350m", "llama-1b") else 0)
    comments = [line.index("# ") for line in file.read_text().splitlines() if "  # " in line and line[0] != "#"]
    assert len({column for column in comments if column <= 31}) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--machine: nothing given, and there is no terminal to ask at; atoll init --help lists all"),
        (["--machine=toaster"], "--machine: 'toaster' given; allowed: laptop, node, slurm, torchrun"),
        (["--machine=laptop", "--role=site"], "--role: 'site' given; allowed: federation, contract, silo"),
        (["--machine=laptop", "--role=federation"], "--model: nothing given, and there is no terminal"),
        (["--machine=laptop", "--role=silo"], "--text: nothing given, and there is no terminal"),
        (["--machine=slurm", "--role=silo", "--text=raw/alpha"], "--gpus: nothing given, and there is no terminal"),
        (["--machine=laptop", "--role=silo", "--text=nowhere"], "--text: 'nowhere' given; there is no 'nowhere'"),
        (
            ["--machine=laptop", "--role=silo", "--text=A=raw/alpha"],
            "--text: 'A=raw/alpha' given; allowed: NAME=FOLDER",
        ),
        (
            ["--machine=laptop", "--role=silo", "--text=raw/alpha", "--text=raw/beta"],
            "--text: 2 given with --role silo",
        ),
        (
            ["--machine=laptop", "--role=silo", "--text=raw/alpha", "--nodes=2"],
            "--nodes: 2 given with --machine laptop",
        ),
        (
            ["--machine=laptop", "--role=silo", "--text=raw/alpha", "--store=s3:/x"],
            "--store: 's3:/x' given; allowed: s3",
        ),
        (
            ["--machine=laptop", "--role=federation", "--model=llama-5m", "--text=raw/alpha", "--store=s3://a/b"],
            "--store: given with --role federation; allowed: with --role silo or contract",
        ),
        (
            ["--machine=laptop", "--role=contract", "--model=llama-5m", "--roster=a", "--roster=a"],
            "--roster: a, a given; allowed: two names or more, each once, of a-z, 0-9, _ and -",
        ),
        (["--machine=laptop", "--role=silo", "--text=raw/alpha", "--output=no/x"], "--output: 'no/x' given; it cannot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str, place: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    code, error = run(["init", *arguments], monkeypatch, capsys)
    assert code == 2
    assert one_line(error).startswith(f"atoll: {expected}")
    assert sorted(path.name for path in place.iterdir()) == ["packed", "raw", "tokenizer"]


def test_it_asks_at_a_terminal(place: Path) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, b"laptop\nfederation\nllama-20m\nraw/alpha raw/beta\n")
    command = [sys.executable, "-m", "launch.cli", "init"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, check=False, env=environment)
    os.close(ours), os.close(theirs)
    assert done.returncode == 0, done.stderr
    for asked in ("torchrun    machines without a scheduler", "llama-20m   20.4 million", "folder of text"):
        assert asked in done.stdout
    assert yaml.safe_load((place / "run.yaml").read_text())["presets"] == ["model=llama-20m", "outer=recommended"]


def test_nothing_is_overwritten(place: Path, monkeypatch: Any, capsys: Any) -> None:
    given = ["--machine=laptop", "--role=silo", "--text=raw/alpha"]
    begin(monkeypatch, capsys, *given)
    before = (place / "alpha.yaml").read_bytes()
    code, error = run(["init", *given], monkeypatch, capsys)
    assert (code, one_line(error)) == (
        2,
        "atoll: --output: 'alpha.yaml' given; it is there already, and stays; allowed: a new file\n",
    )
    assert (place / "alpha.yaml").read_bytes() == before
    assert set(yaml.safe_load(before)) == {"directory", "tokenizer", "trust", "silos"}
    assert one_line_error(Beginning, machine="laptop", role="silo", texts=[Text("a", ""), Text("a", "")]) == (
        "--text: a, a given; allowed: each name once, as NAME=FOLDER"
    )
