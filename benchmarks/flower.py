"""Fine-tuning on three institutions' conversations: Atoll, and Flower with its FedAvg recipe for LoRA (FlowerTune LLM).

    python -m venv flwr
    flwr/bin/pip install torch==2.13.0 flwr==1.42.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
    python -m benchmarks.flower runs/flower --flower-python flwr/bin/python [--directly] [--turns 3]

Conversations, base, template and held-out conversations are those of `atoll demo --chat`, made in the directory unless
they are there. All ways train as many steps of one base, each in real processes on this machine: an aggregator and
three silos, or a SuperLink and three SuperNodes (flower_peer.py says what the recipe does), or with --directly three
clients of flower_direct.py, for a machine on which others run: what is trained is the same. Flower comes with the
recipe's own settings, with those but for the learning rate, and with Atoll's: its rank, layers, learning rate, AdamW,
and the same rows of conversations in the same order. Ways take turns, each turn from another seed; what was measured is
kept in the directory, and not measured again. Every result is evaluated by the code of `atoll eval`, Flower's as the
peft directory that it has written.

Printed of each way: held-out loss in nats per token, of each institution and of all (median and range of the turns); MB
that one silo sends and receives, of the arrays in its messages, as both count them themselves; seconds from the start
of the first process to the result, those of a silo in its training steps, and processor seconds of all processes.
"""

import argparse
import ctypes
import itertools
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.runs import launched
from launch.demo import ON_CPUS
from launch.demo_chat import TEXTS, adapters_config, prepare_conversations, train_base
from launch.start.workers import KEEP_FREED_MEMORY
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig
from pretrain.silo.shards import TEMPLATE_FILE

PEER = Path(__file__).parent / "flower_peer.py"
DIRECT = Path(__file__).parent / "flower_direct.py"
BY_TOKENS = ["outer.weight_power=1.0", "outer.second_moments=local"]
ATOLL = {
    "Atoll": [],
    "Atoll, alternate": [*BY_TOKENS, "model.adapter.merge=alternate", "outer.num_fragments=2"],
    "Atoll, factors": BY_TOKENS,
    "Atoll, int4": ["outer.codec=int4", "outer.downlink_codec=int4"],
}
# Of the recipe's pyproject.toml and models.py; what it leaves open is the default of Trainer and peft.
RECIPE: dict[str, Any] = {
    **{"rank": 32, "alpha": 64.0, "dropout": 0.075, "targets": "", "lr-max": 5e-5, "lr-min": 1e-6},
    **{"steps": 10, "batch": 16, "in-rows": False},
    **{"beta1": 0.9, "beta2": 0.999, "weight-decay": 0.0, "clip-norm": 1.0},
}
ITS, OURS = "Flower, its settings", "Flower, our settings"
FLOWER = (ITS, "Flower, its settings, our lr", OURS)
WAYS = (*ATOLL, *FLOWER)
IGNORED = -100  # a label that has no loss
LOSSES, MEASURED = "losses.json", "measured.json"
PATIENCE_SECONDS = 7200
ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER (https://man7.org/linux/man-pages/man2/prctl.2.html)
Found = dict[str, float]


def main() -> None:
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--flower-python", type=Path, required=True, help="a Python that has Flower")
    parser.add_argument("--directly", action="store_true", help="Flower's app without SuperLink and SuperNodes")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("overrides", nargs="*", help="key=value of Atoll's runs, as inner.num_steps=20")
    arguments = parser.parse_intermixed_args()
    os.environ |= ON_CPUS
    directory = arguments.directory.resolve()
    packed, tokenizer = prepare_conversations(directory)
    base, institutions = directory / "base", {n: p for n, p in packed.items() if n not in (*TEXTS, "reference")}
    if train_base(directory, packed, tokenizer, base):
        raise SystemExit(f"no base: see {directory}")

    def configured(way: str, turn: int) -> RunConfig:
        place = directory / f"turn-{turn}" / way.replace(", ", "-").replace(" ", "-")
        seeds = [f"model.seed={turn}", f"silo.data_seed={turn}", "wandb.mode=disabled"]
        given = [*seeds, *ATOLL.get(way, []), *arguments.overrides]
        return adapters_config(place, institutions, tokenizer, base, given)

    runs = [(way, configured(way, turn)) for turn in range(arguments.turns) for way in arguments.only]
    for way, config in runs:
        if not (Path(config.directory) / MEASURED).is_file():
            measure(way, config, arguments.flower_python, directly=arguments.directly)
    held_out = {name: place / "valid" for name, place in institutions.items()}
    of_base = losses(directory / LOSSES, str(base), held_out)
    print(f"RESULT {'base, before':<29} {told_losses([of_base])}", flush=True)
    for way in arguments.only:
        places = [Path(config.directory) for one, config in runs if one == way]
        found = [losses(place / LOSSES, str(subject(way, place)), held_out, base=base) for place in places]
        measured = [json.loads((place / MEASURED).read_text()) for place in places]
        print(f"RESULT {way:<29} {told_losses(found)}  {told_costs(measured)}", flush=True)


def subject(way: str, place: Path) -> Path:
    """What a way has trained, as `atoll eval` takes it."""
    return place if way in ATOLL else place / "adapter"


def told_losses(found: Sequence[Found]) -> str:
    """Median and range of the turns."""

    def told(name: str) -> str:
        values = [one[name] for one in found]
        several = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        return f"{name} {statistics.median(values):.3f}{several}"

    return "  ".join(told(name) for name in found[0])


def told_costs(measured: Sequence[Found]) -> str:
    """Medians of the turns."""
    sent, received, wall, training, processors = (
        statistics.median(one[key] for one in measured)
        for key in ("bytes_sent", "bytes_received", "seconds", "seconds_training", "seconds_processors")
    )
    return (
        f"a silo sent {sent / 1e6:.2f} MB, received {received / 1e6:.2f} MB; "
        f"{wall:.0f} s, of which {training:.1f} s steps of a silo; {processors:.0f} s of processors"
    )


def losses(kept: Path, where: str, held_out: dict[str, Path], base: Path | None = None) -> Found:
    """Held-out loss of each institution's conversations, and of all, of a run, a model or an adapter beside `base`."""
    from pretrain.federation.evaluation import open_subject
    from pretrain.federation.held_out import together

    if not kept.is_file():
        is_adapter = (Path(where) / "adapter_config.json").is_file()
        found = open_subject(where, base=base if is_adapter else None).losses(held_out, num_sequences=0)
        told = {name: one.loss for name, one in found.items()} | {"all": together([*found.values()]).loss}
        kept.write_text(json.dumps(told))
    return dict(json.loads(kept.read_text()))


# ---- one run


def measure(way: str, config: RunConfig, python: Path, *, directly: bool) -> None:
    """Train in one of the ways, from nothing, and keep what it took. Raises SystemExit if it fails."""
    place = Path(config.directory)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    data = examples(config, in_rows=way == OURS) if way in FLOWER else {}
    with counted_processors() as seconds_processors:
        began = time.perf_counter()
        is_flower = way in FLOWER
        found = of_flower(way, config, python, data, directly=directly) if is_flower else of_atoll(config)
    found = found | {"seconds_processors": seconds_processors()}
    found.setdefault("seconds", time.perf_counter() - began)
    print(f"{place}: {found['seconds']:.1f} s, {found['seconds_processors']:.1f} s of processors", flush=True)
    (place / MEASURED).write_text(json.dumps(found))


@contextmanager
def counted_processors() -> Iterator[Callable[[], float]]:
    """Of all processes that are started within, and theirs: they are waited for, whoever started them has ended."""
    ctypes.CDLL(None, use_errno=True).prctl(ADOPT_ORPHANS, 1, 0, 0, 0)

    def used() -> float:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(one.ru_utime + one.ru_stime for one in both)

    before = used()
    yield lambda: used() - before
    left = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(left, timeout=30)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def of_atoll(config: RunConfig) -> Found:
    """A federation to its end."""
    place = Path(config.directory)
    launched(config, place / "launch.log")
    summary = json.loads((place / "summary.json").read_text())
    keys = ("bytes_sent", "bytes_received", "seconds_training")
    return {key: summary[key] / len(config.silos) for key in keys}


def examples(config: RunConfig, *, in_rows: bool) -> dict[str, dict[str, Any]]:
    """Of each silo all conversations that it trains on; or the rows that it reads in its steps, in their order."""
    from pretrain.train import open_data

    found = {}
    for name, silo in config.silos.items():
        mixture, _ = open_data(config, name)
        (tokens,) = mixture.corpora
        every = [one for index in range(tokens.num_sequences) for one in cut(tokens.row(index))]
        positions = range(config.inner.num_steps * silo.global_batch_sequences)
        rows = (tokens.row(mixture.locate(position)[1]) for position in positions)
        chosen = [(row.inputs.tolist(), labels(row), at.tolist()) for row in rows if (at := row.positions) is not None]
        found[name] = {"examples": chosen if in_rows else every, "num-examples": len(every)}
    return found


def labels(row: Any) -> list[int]:
    """A label is of its own token, where a target is of the one after it."""
    return [IGNORED, *row.targets[:-1].tolist()]


def cut(row: Any) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each conversation of a row, without what fills it."""
    begins = [place for place, position in enumerate(row.positions) if position == 0]
    pieces = [slice(*ends) for ends in itertools.pairwise([*begins, len(row.inputs)])]
    found = [(row.inputs[piece].tolist(), labels(row)[piece]) for piece in pieces]
    return [one for one in found if any(label != IGNORED for label in one[1])]


# ---- Flower


def settings_of(way: str, config: RunConfig) -> dict[str, Any]:
    """The keys of the app's configuration."""
    adapter, inner, silo = config.model.adapter, config.inner, next(iter(config.silos.values()))
    settings = {
        **{"base": config.model.checkpoint, "output": config.directory, "seed": config.model.seed},
        **{"clients": len(config.silos), "rounds": config.num_rounds, **RECIPE},
    }
    if way != ITS:
        settings |= {"lr-max": inner.lr, "lr-min": inner.lr * inner.min_lr_ratio}
    if way == OURS:
        settings |= {"rank": adapter.rank, "alpha": adapter.alpha, "dropout": adapter.dropout}
        settings |= {"targets": adapter.targets[0], "in-rows": True}
        settings |= {"steps": config.outer.sync_interval_steps, "batch": silo.global_batch_sequences}
        settings |= {"beta1": inner.betas[0], "beta2": inner.betas[1], "weight-decay": inner.weight_decay}
        settings |= {"clip-norm": inner.clip_norm}
    if settings["steps"] * settings["rounds"] != inner.num_steps:
        raise ConfigError(
            f"inner.num_steps: {inner.num_steps} given; allowed: as many as {settings['rounds']} rounds of "
            f"the recipe's have, with outer.sync_interval_steps {settings['steps']}"
        )
    return settings


def of_flower(way: str, config: RunConfig, python: Path, data: dict[str, Any], *, directly: bool) -> Found:
    """Run the app with a client for each silo. Raises SystemExit if it fails."""
    place = Path(config.directory)
    write_app(place / "app", settings_of(way, config))
    for name, found in data.items():
        (place / f"{name}.json").write_text(json.dumps(found))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | KEEP_FREED_MEMORY
    environment |= {"FLWR_HOME": str(place / "home"), "PATH": f"{python.absolute().parent}:{environment['PATH']}"}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    if directly:
        with (place / "direct.log").open("wb") as log:
            argv = [str(python), str(DIRECT), str(place)]
            if subprocess.run(argv, stdout=log, stderr=log, env=environment, check=False).returncode:
                raise SystemExit(f"Flower failed: see {log.name}")
    else:
        deployed(place, python.absolute().parent, [*data], environment)
    seconds = time.perf_counter() - began
    for file in ("tokenizer.json", "tokenizer_config.json", TEMPLATE_FILE):
        shutil.copy(Path(str(config.model.checkpoint)) / file, place / "adapter" / file)
    told = json.loads((place / "result").read_text())
    of_all = {key: told[key] for key in ("bytes_sent", "bytes_received")}
    of_all["seconds_training"] = sum(one["training-seconds"] for clients in told["rounds"] for one in clients)
    return {key: value / len(data) for key, value in of_all.items()} | {"seconds": seconds}


def deployed(place: Path, programs: Path, names: list[str], environment: dict[str, str]) -> None:
    """A SuperLink, SuperNodes, and the app until it has its result. Raises SystemExit if it fails."""
    link, *ports = free_ports(1 + len(names))
    (place / "home").mkdir()
    (place / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    with ExitStack() as running:

        def started(name: str, program: str, *argv: str) -> "subprocess.Popen[bytes]":
            with (place / f"{name}.log").open("wb") as log:
                argv = (str(programs / program), *argv)
                # In a session of its own, as silos are: the kernel shares a busy machine between sessions.
                process = subprocess.Popen(
                    argv, stdout=log, stderr=log, env=environment, cwd=place, start_new_session=True
                )
            running.callback(ended, process)
            return process

        processes = [started("superlink", "flower-superlink", "--insecure", f"--port={link}", NO_INSTALLING)]
        wait_for_port(link, processes)
        for name, port in zip(names, ports, strict=True):
            node = ["--insecure", f"--superlink=127.0.0.1:{link}", f"--port={port}"]
            node += ["--node-config", f'data="{place / name}.json"']
            processes.append(started(name, "flower-supernode", *node))
        if started("run", "flwr", "run", str(place / "app"), "here").wait(timeout=120):
            raise SystemExit(f"Flower failed: see {place}")
        wait_for(place / "result", processes)


NO_INSTALLING = "--disable-runtime-dependency-installation"


def write_app(directory: Path, settings: dict[str, Any]) -> None:
    """An app as `flwr run` takes it."""
    directory.mkdir()
    shutil.copy(PEER, directory / PEER.name)
    keys = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    (directory / "pyproject.toml").write_text(
        '[project]\nname = "flower-peer"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\n'
        'dependencies = ["flwr>=1.42.0"]\n\n[tool.flwr.app]\npublisher = "atoll"\n\n[tool.flwr.app.components]\n'
        f'serverapp = "{PEER.stem}:server"\nclientapp = "{PEER.stem}:client"\n\n[tool.flwr.app.config]\n{keys}\n'
    )


def ended(process: "subprocess.Popen[bytes]") -> None:
    """Ask it to end, and see to it."""
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_ports(number: int) -> list[int]:
    """Some that nobody listens on."""
    with ExitStack() as open_ones:
        probes = [open_ones.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_for_port(port: int, processes: "list[subprocess.Popen[bytes]]") -> None:
    """Until somebody listens."""
    wait_until(lambda: bool(not socket.socket().connect_ex(("127.0.0.1", port))), processes)


def wait_for(file: Path, processes: "list[subprocess.Popen[bytes]]") -> None:
    """Until it is there."""
    wait_until(file.is_file, processes)


def wait_until(is_so: Callable[[], bool], processes: "list[subprocess.Popen[bytes]]") -> None:
    """Raises SystemExit where a process has ended before, or after PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            raise SystemExit(f"Flower failed: {processes}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
