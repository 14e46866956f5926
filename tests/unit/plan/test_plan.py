"""What `atoll plan` says: bytes against real files, seconds by hand."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.show.plan import measured_run, print_plan, tokens_per_second
from launch.start.measuring import measure_silos
from pretrain.config.allowed import CODECS
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config, save_config
from pretrain.exchange.payload import save_tensors
from pretrain.outer.codec import encode
from pretrain.outer.moments import MeanGradient, Moment, SecondMoment
from pretrain.plan.bytes import model_shapes, payload_bytes, traffic, vocabulary
from pretrain.plan.plan import make_plan
from pretrain.plan.requests import Requests, aggregator_requests, reads_of, silo_requests, writes_of
from pretrain.plan.seconds import Given, Pace, _waiting_seconds, card_speeds, parse_bandwidth, run_pace, work_factor
from pretrain.silo.model import initial_parameters
from pretrain.silo.shards import read_manifest
from pretrain.sync.own_ledger import all_pieces
from pretrain.sync.packing import pack
from tests.conftest import TinyConfig
from tests.support import one_line_error
from tests.unit.launch.test_cli import one_line, run
from tests.unit.test_aggregate import GOOD, one_version, plus_noise, start

LLAMA = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
LLAMA |= {"vocab_size": 4096, "num_hidden_layers": 6}


def told(config: RunConfig, *, speed: float = 1000.0, mbit: float = 20.0, work: float = 1.0) -> Given:
    return Given(
        link_bits_per_second=mbit * 1e6,
        latency_seconds=0.0,
        tokens_per_second=dict.fromkeys(config.silos, speed),
        work_factor=work,
    )


def written(model: dict[str, Any], *overrides: str) -> RunConfig:
    """A configuration of a model, before there is a tokenizer."""
    text = ", ".join(f"{key}: {value}" for key, value in model.items())
    settings = ["exchange.kind=store", "silos.one={}", "inner.num_steps=1000", f"model.config={{{text}}}"]
    return load_config([], [*settings, *overrides])


def snapshot_of(store: Path, commit: dict[str, Any]) -> list[dict[str, Any]]:
    """The payloads of a version's snapshot, if it has one."""
    file = store / "snapshots" / f"{commit['version']:06d}.json"
    return json.loads(file.read_bytes())["payloads"] if file.exists() else []


# ---- bytes


@settings(max_examples=40, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    shapes=st.dictionaries(
        st.text('abé."0', min_size=1, max_size=12), st.lists(st.integers(1, 70), max_size=3), min_size=1, max_size=6
    ),
)
def test_a_payload_is_as_long_as_its_file(codec: str, shapes: dict[str, list[int]], tmp_path_factory: Any) -> None:
    file = tmp_path_factory.mktemp("payload") / "payload.safetensors"
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    coded = {name: encode(codec, value, -value) for name, value in tensors.items()}
    sizes = {name: value.shape for name, value in tensors.items()}
    save_tensors(coded, file)
    assert payload_bytes(codec, sizes) == file.stat().st_size
    for kind in (SecondMoment, MeanGradient):
        moments: dict[str, Moment] = {name: kind(shape) for name, shape in sizes.items()}
        save_tensors(coded, file, moments={name: moments[name].encode(value) for name, value in tensors.items()})
        assert payload_bytes(codec, sizes, moments) == file.stat().st_size


def test_requests_of_a_run_are_those_that_one_counts_by_hand(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Two silos, a hundred versions of ten seconds, polls every half second, signs of life every six seconds."""
    times = {"poll_seconds": 0.5, "lease_seconds": 30.0}
    outer = {"optimizer": "sgd", "lr": 1.0, "sync_interval_steps": 4}
    config = tiny_config(tmp_path, inner={"num_steps": 400}, outer=outer, exchange=times)
    assert config.schedule.num_versions == 100
    config.silos["alpha"].checkpoint_interval_steps = config.silos["beta"].checkpoint_interval_steps = 100
    pace = Pace(sync_seconds=2.0, link_seconds=1.0, seconds=1000.0, utilisation=0.8)
    shapes, beats, checkpoints = {"w": torch.Size([100])}, 1000 / 6, 5
    silo = silo_requests(config, shapes, pace, "alpha")
    assert silo.writes == pytest.approx(100 * 2 + beats + checkpoints)
    assert silo.lists == pytest.approx(100 * 3 + checkpoints)
    assert silo.reads == pytest.approx(100 * (1 + 2 * 4 + 2 + 2 + 1))  # four polls in two seconds
    merging = aggregator_requests(config, shapes, pace)
    looks = 20  # polls in ten seconds
    assert merging.writes == pytest.approx(100 * (2 + 1) + beats)  # a snapshot's record, as the optimizer keeps nothing
    assert merging.lists == pytest.approx(100 * (5 + 3 + 2) + 2 * checkpoints + beats)
    assert merging.reads == pytest.approx(100 * (2 * 2 + 2 * looks + 1 + 2 + 3) + beats)
    assert Requests(writes=1000, lists=1000, reads=1000).dollars == pytest.approx(0.0104)


@pytest.mark.parametrize(
    ("num_bytes", "reads", "writes"), [(1, 1, 1), (1 << 20, 2, 1), (5 << 20, 3, 1), (80 << 20, 12, 12)]
)
def test_requests_of_an_object(num_bytes: int, reads: int, writes: int) -> None:
    assert (reads_of(num_bytes), writes_of(num_bytes)) == (reads, writes)


@pytest.mark.parametrize("num_fragments", [1, 3])
@pytest.mark.parametrize("codec", CODECS)
def test_a_run_through_the_store_moves_the_planned_bytes(
    codec: str, num_fragments: int, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    outer = {"codec": codec, "downlink_codec": codec, "num_fragments": num_fragments}
    config = tiny_config(tmp_path, inner={"num_steps": 8}, outer=outer, exchange={"snapshot_versions": 2})
    aggregator, state = start(config)
    while state.version < config.schedule.num_versions:
        for seed, silo in enumerate(config.silos):
            GOOD.deliver(config, silo, state, plus_noise(state, seed))
        one_version(aggregator, state)

    plan, store = make_plan(config, told(config)), Path(config.store_url)
    assert plan.num_parameters == sum(value.numel() for value in state.parameters.values())
    commits = [json.loads(file.read_bytes()) for file in sorted(store.glob("global/*/commit.json"))]
    assert plan.first_bytes == sum(payload["num_bytes"] for payload in commits[0]["payloads"])
    for silo in config.silos:
        manifests = [json.loads(file.read_bytes()) for file in sorted(store.glob(f"silos/{silo}/*/manifest.json"))]
        sent = [manifest["payloads"][0]["num_bytes"] for manifest in manifests]
        received = [commit["payloads"][0]["num_bytes"] for commit in commits[1:]]
        moved = [plan.traffic[silo][commit["version"] % num_fragments] for commit in commits[1:]]
        assert [one.sent_bytes for one in moved] == sent
        assert [one.received_bytes for one in moved] == received
        assert (plan.sent_bytes[silo], plan.received_bytes[silo]) == (sum(sent), sum(received))
    written = [payload for commit in commits[1:] for payload in commit["payloads"] + snapshot_of(store, commit)]
    assert plan.aggregator_sent_bytes == sum(payload["num_bytes"] for payload in written)
    assert plan.aggregator_received_bytes == sum(plan.sent_bytes.values())
    grown = [file for file in store.rglob("*.safetensors") if "000000" not in str(file)]
    assert sum(file.stat().st_size for file in grown) == plan.aggregator_sent_bytes + plan.aggregator_received_bytes


@pytest.mark.parametrize("codec", CODECS)
def test_a_collective_moves_the_planned_bytes(codec: str, tmp_path: Path, tiny_config: TinyConfig) -> None:
    exchange = {"kind": "collective", "url": "tcp://127.0.0.1:29500"}
    outer = {"codec": codec, "downlink_codec": "int8"}
    config = tiny_config(tmp_path, exchange=exchange, outer=outer, silos={"gamma": {}})
    values = initial_parameters(config)
    roster, parts = config.full_roster, all_pieces(values, len(config.full_roster))
    assert len(roster) == 3

    def packed(of: str) -> list[int]:
        coded = [[encode(of, p.of(values[p.name]), -p.of(values[p.name])) for p in part] for part in parts]
        return [sum(map(len, pack(part))) for part in coded]

    ups, downs = packed(codec), packed("int8")
    for mine, silo in enumerate(roster):
        (moved,) = traffic(config, model_shapes(config, vocabulary(config)), silo)
        assert moved.before == (sum(ups) - ups[mine], ups[mine] * 2)
        assert moved.after == (downs[mine] * 2, sum(downs) - downs[mine])
        assert moved.sent_bytes == sum(ups) - ups[mine] + downs[mine] * 2
        assert moved.received_bytes == ups[mine] * 2 + sum(downs) - downs[mine]


@pytest.mark.parametrize("model", [{}, {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}], ids=str)
def test_names_and_shapes_are_those_of_version_0(
    model: dict[str, Any], tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = tiny_config(tmp_path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, config=model or config.model.config))
    shapes = model_shapes(config, vocabulary(config))
    assert shapes == {name: value.shape for name, value in initial_parameters(config).items()}


# ---- seconds


def by_hand(seconds: list[float], *outer: str) -> float:
    """Waiting in ten rounds of ten steps of a second; stages as given, 1 to deliver and 2 to adopt."""
    overrides = (f"outer.{setting}" for setting in ("sync_interval_steps=10", *outer))
    schedule = written(LLAMA, "inner.num_steps=100", *overrides).schedule
    number = schedule.num_fragments
    return _waiting_seconds(schedule, [seconds] * number, [(1.0, 2.0)] * number, 1.0)


def test_training_stands_still_for_what_overlap_does_not_hide() -> None:
    assert by_hand([1, 2, 3]) == 10 * (1 + 6 + 2)
    # Nine versions are hidden; the last is adopted at the step at which it is sent.
    assert by_hand([1, 2, 3], "overlap_steps=6") == 10 * (1 + 2) + 6
    assert by_hand([1, 2, 3], "overlap_steps=5") == 10 * (1 + 2) + 9 + 6
    # Every 5 s a fragment of 7 s on the same link: the link is never free, and training waits for it.
    link_bound = by_hand([7], "num_fragments=2", "overlap_steps=9")
    assert 21 * 7 <= 100 + link_bound <= 21 * 7 + 21 * 3


def test_a_sync_takes_the_link_both_ways() -> None:
    config = written(LLAMA, "silos.two={}", "exchange.poll_seconds=0.5")
    pace = run_pace(config, model_shapes(config, 4096), told(config, mbit=8, work=0.0))
    (moved,) = traffic(config, model_shapes(config, 4096), "one")
    assert pace.link_seconds == pytest.approx(2 * moved.sent_bytes / 1e6 * 1514 / 1448)  # 8 Mbit/s are 1 MB/s
    assert pace.sync_seconds == pytest.approx(pace.link_seconds + 0.5)
    rounds, step_seconds = config.num_rounds, 8 * 512 / 1000
    assert pace.seconds == pytest.approx(1000 * step_seconds + rounds * pace.sync_seconds)
    assert pace.utilisation == pytest.approx(1000 * step_seconds / pace.seconds)


def test_the_slowest_silo_sets_the_pace(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path)
    shapes, fast = model_shapes(config, vocabulary(config)), told(config, mbit=1e9)
    slow = dataclasses.replace(fast, tokens_per_second={"alpha": 1000.0, "beta": 250.0})
    one, other = run_pace(config, shapes, fast), run_pace(config, shapes, slow)
    assert other.seconds - one.seconds == pytest.approx(3 * config.inner.num_steps * 64 / 1000)
    training = config.inner.num_steps * (64 / 1000 + 64 / 250) / 2
    assert other.utilisation == pytest.approx(training / other.seconds)
    by_speed = dataclasses.replace(config, membership=dataclasses.replace(config.membership, steps="speed"))
    assert run_pace(by_speed, shapes, slow).utilisation > 0.9 > other.utilisation


def test_days_follow_the_budget(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path)
    plan = make_plan(config, told(config), budget_tokens=10**9)
    assert plan.tokens == 2 * config.inner.num_steps * 64
    assert plan.budget_days == pytest.approx(plan.pace.seconds / plan.tokens * 1e9 / 86_400)
    elsewhere = dataclasses.replace(config, roster=["alpha", "beta", "delta", "gamma"])
    assert make_plan(elsewhere, told(config)).tokens == 2 * plan.tokens


def test_neighbours_are_better_allowed_and_few() -> None:
    config = written(LLAMA, "outer.sync_interval_steps=20", "silos.two={}")
    plan = make_plan(config, told(config, speed=20_000))
    assert 0 < len(plan.neighbours) <= 6
    for neighbour in plan.neighbours:
        assert neighbour.pace.utilisation > plan.pace.utilisation
        changes = (f"{key}={value}" for key, value in neighbour.changes.items())
        changed = written(LLAMA, "silos.two={}", "outer.sync_interval_steps=20", *changes)
        again = make_plan(changed, told(changed, speed=20_000))
        assert (again.sent_bytes["one"], again.pace) == (neighbour.sent_bytes, neighbour.pace)
    streaming = next(n for n in plan.neighbours if n.changes.get("outer.num_fragments") == 3)
    assert "outer.overlap_steps" in streaming.changes
    assert any("int4 +0.04 %" in neighbour.loss for neighbour in plan.neighbours)
    assert make_plan(config, told(config, mbit=1e6, speed=1.0)).neighbours == []


# ---- what a user meets


def test_every_message_is_one_line(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path)
    said = one_line_error(parse_bandwidth, "fast")
    assert said == "--bandwidth: 'fast' given; allowed: a number and its unit, bit, kbit, mbit, gbit, tbit: 100mbit"
    assert one_line_error(parse_bandwidth, "0mbit").startswith("--bandwidth: '0mbit' given")
    assert [parse_bandwidth(text) for text in ("100mbit", " 2.5Gbit", "64kbit")] == [1e8, 2.5e9, 64e3]
    alone = dataclasses.replace(config, exchange=dataclasses.replace(config.exchange, kind="none"))
    assert one_line_error(make_plan, alone, told(config)) == (
        "exchange.kind: 'none' given; nothing is exchanged; allowed: store, collective"
    )
    missing = dataclasses.replace(config, tokenizer="nowhere.json")
    assert one_line_error(vocabulary, missing).startswith("tokenizer: 'nowhere.json' given; allowed: a tokenizer.json")
    many = dataclasses.replace(config, outer=dataclasses.replace(config.outer, num_fragments=999))
    assert one_line_error(make_plan, many, told(config)).startswith("outer.num_fragments: 999 given; allowed: 1 to ")
    message = "--tokens-per-second: 0 given; allowed: above 0"
    assert one_line_error(tokens_per_second, ["a"], 0.0, {}) == message
    assert tokens_per_second(["a", "b"], 5.0, {}) == {"a": 5.0, "b": 5.0}
    assert tokens_per_second(["a", "b"], None, {"b": 2.0, "c": 4.0}) == {"a": 3.0, "b": 2.0}


def test_a_card_tells_the_speed(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(
        tmp_path, silos={"beta": {"num_nodes": 2, "processes_per_node": 2, "micro_batch_sequences": 1}}
    )
    # Two layers of 4 x 32 x 32 and 3 x 32 x 64, five norms of 32, 300 words; two heads of 16 over 16 tokens.
    operations = 6 * (2 * (4 * 32 * 32 + 3 * 32 * 64) + 5 * 32 + 300 * 32) + 12 * 2 * 2 * 16 * 16
    alone = 0.5 * 312e12 / operations
    assert card_speeds(config, "NVIDIA A100-SXM4-40GB", 0.5) == {
        "alpha": pytest.approx(alone),
        "beta": pytest.approx(4 * alone),
    }
    assert one_line_error(card_speeds, config, "H100 80GB", 0.4).startswith(
        "--card: 'H100 80GB' given; allowed: a name that torch has for one, such as NVIDIA H100 80GB HBM3, "
    )
    assert one_line_error(card_speeds, config, "NVIDIA A10", 40.0) == "--mfu: 40 given; allowed: above 0, to 1"


def record_run(config: RunConfig, num_steps: int, wait_seconds: float = 1.0) -> Path:
    """Metrics as silos write them: the first step and the first sync are slow, and the last silo is waited for."""
    directory = Path(config.directory)
    save_config(config, directory / "config.yaml")
    lines: list[dict[str, Any]] = []
    for index, silo in enumerate(config.silos):
        speed = [10.0, *[1000.0, 500.0] * num_steps][:num_steps]
        lines += [
            {"kind": "step", "silo": silo, "step": step, "round": 1, "tokens": 64 * step, "tokens_per_second": of}
            for step, of in enumerate(speed, start=1)
        ]
        lines += [
            {"kind": "sync", "silo": silo, "version": version, "round": 1, "fragment": 0, "wait_seconds": seconds}
            for version, seconds in ((1, 99.0), (2, wait_seconds + index), (3, wait_seconds + index))
        ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_an_earlier_run_tells_speed_and_work(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path)
    shapes = model_shapes(config, vocabulary(config))
    expected = run_pace(config, shapes, told(config, mbit=math.inf, work=2.5)).sync_seconds
    speeds, factor = measured_run(record_run(config, 5, expected))
    assert speeds == {silo: pytest.approx(2 / (1 / 1000 + 1 / 500)) for silo in config.silos}
    assert factor == pytest.approx(2.5)
    assert work_factor(config, [0.0]) == 0
    assert work_factor(config, []) == 1
    assert work_factor(dataclasses.replace(config, outer=dataclasses.replace(config.outer, overlap_steps=1)), [9]) == 1
    directory = record_run(config, 1)
    assert one_line_error(measured_run, directory) == (
        f"--measured: {str(directory)!r} given; allowed: a run of which each silo logged two steps"
    )


def arguments(tmp_path: Path, *more: str) -> list[str]:
    return ["plan", "--config", str(tmp_path / "tiny.yaml"), "--bandwidth", "1mbit", *more]


def test_the_command_prints_the_plan(
    tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = record_run(tiny_config(tmp_path), 5)
    monkeypatch.setattr("sys.argv", ["atoll", *arguments(tmp_path, "--measured", str(measured), "--tokens", "1e9")])
    from launch import cli

    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for words in ("tiny: ", "utilisation", "as configured", "1.00 G tokens", "aggregator", "ZeRO-3", "alpha", "beta"):
        assert words in printed
    # Of 39,840 parameters: three payloads a version, and of three versions one has the velocity. Names are more.
    grows = re.search(
        r"the store grows by ([0-9.]+) kB a sync, with a snapshot every 2 outer steps", " ".join(printed.split())
    )
    assert grows
    assert 39_840 * 4 * (3 + 1 / 3) / 1000 < float(grows[1]) < 39_840 * 4 * (3 + 1 / 3) / 1000 * 1.05


def test_without_a_speed_it_trains_some_steps_and_keeps_nothing(
    tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, roster=["alpha", "beta", "gamma"])
    monkeypatch.setattr("sys.argv", ["atoll", *arguments(tmp_path, "--tokens", "1e6")])
    from launch import cli

    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "utilisation" in printed
    tokens = read_manifest(Path(config.silos["alpha"].data[0])).num_tokens
    times, budget = 12 * 4 * 16 / tokens, 1e6 / 3 / tokens
    shown = rf"alpha +[0-9,.]+ +{times:.2f} times +{budget:.2f} times"
    assert re.search(shown, printed), printed
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.soak
def test_a_silo_that_does_not_train_here_says_why(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, silo={"attention": "none_such"})
    message = one_line_error(measure_silos, config)
    assert message.startswith(
        "--tokens-per-second: neither it nor --measured given, and silo alpha did not train here: "
    )
    assert "none_such" in message
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_mistake_is_one_line(
    tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config(tmp_path)
    for more, expected in {
        ("--tokens-per-second", "5", "--bandwidth", "9"): "--bandwidth: '9' given; allowed: a number and its unit",
        ("--tokens-per-second", "5", "--latency", "-1"): "--latency: -1 given; allowed: 0 or more",
        ("--tokens-per-second", "5", "--tokens", "0"): "--tokens: 0 given; allowed: 1 or more",
        ("--tokens-per-second", "5", "exchange.kind=none"): "exchange.kind: 'none' given; nothing is exchanged",
        (
            "--tokens-per-second",
            "5",
            "--measured",
            "x",
        ): "it and --measured given; allowed: one of --tokens-per-second, ",
        ("--measured", "x", "--card", "NVIDIA A10"): "--measured: it and --card given; allowed: one of ",
        ("tokenizer=nowhere",): "nor --card given, and silo alpha cannot be measured here: tokenizer: 'nowhere'",
        (
            *("silo.num_nodes=2", "silo.micro_batch_sequences=1"),
        ): "neither it nor --measured nor --card given, and silo alpha has 2 nodes; allowed: one of them",
        ("--measured", str(tmp_path)): "it has no metrics.jsonl",
    }.items():
        code, error = run(arguments(tmp_path, *more), monkeypatch, capsys)
        assert code == 2
        assert expected in one_line(error)


def test_all_of_it_is_shown_where_nothing_is_better(capsys: pytest.CaptureFixture[str]) -> None:
    config = written(LLAMA, "exchange.kind=collective", "exchange.url=tcp://10.0.0.1:29500", "silos.two={}")
    print_plan(make_plan(config, told(config, mbit=1e6, speed=1.0)))
    printed = capsys.readouterr().out
    assert "No way to sync near this one keeps the silos busier." in printed
    assert "aggregator" not in printed


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_an_aggregators_disk_is_what_it_takes(codec: str, tmp_path: Path, tiny_config: TinyConfig) -> None:
    outer = {"codec": codec, "downlink_codec": codec, "state": "disk", "num_fragments": 2}
    config = tiny_config(tmp_path, outer=outer, exchange={"snapshot_versions": 1})
    in_memory = dataclasses.replace(config, outer=dataclasses.replace(config.outer, state="memory"))
    plan, other = make_plan(config, told(config)), make_plan(in_memory, told(config))
    aggregator, state = start(config)
    held = sum(4 * value.numel() for of in (state.parameters, *state.kept.values()) for value in of.values())
    assert (plan.aggregator_disk_bytes[0], other.aggregator_disk_bytes[0]) == (held, 0)
    assert plan.aggregator_disk_bytes[1] == other.aggregator_disk_bytes[1]
    assert other.aggregator_memory_bytes - plan.aggregator_memory_bytes > held
    outbox, passed = Path(config.directory) / "aggregator" / "outbox", []
    for _ in range(3):
        aggregator.snapshots.finish()
        passed.append(sum(file.stat().st_size for file in outbox.iterdir()))
        for seed, silo in enumerate(config.silos):
            GOOD.deliver(config, silo, state, plus_noise(state, seed))
        deliveries = aggregator.collect(state)
        passed[-1] += sum(delivery.manifest.payloads[0].num_bytes for delivery in deliveries)
        aggregator.commit(state, deliveries, aggregator.merge(state, deliveries))
    assert max(passed) == pytest.approx(plan.aggregator_disk_bytes[1], rel=0.1)  # names are more
    print_plan(plan)


def test_seventy_billion_parameters_fit_a_small_aggregator() -> None:
    llama = LLAMA | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80}
    llama |= {"num_attention_heads": 64, "num_key_value_heads": 8}
    coded = ["outer.codec=int4", "outer.downlink_codec=int4", "outer.num_fragments=81"]
    config = written(llama, "silos.two={}", "outer.sync_interval_steps=100", *coded, "outer.state=disk")
    plan = make_plan(config, told(config))
    assert plan.aggregator_disk_bytes[0] == 12 * plan.num_parameters > 800e9
    assert plan.aggregator_memory_bytes < 2e9
