"""Every mistake in a configuration is one line that names the key, before anything starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.start.site import load_site
from pretrain.config.check import accumulation_steps
from pretrain.config.deepspeed_keys import OWNED
from pretrain.config.keys import RunConfig
from pretrain.config.load import load_config, load_run, load_unchecked, save_config
from pretrain.federation.preflight import check_silo
from pretrain.silo.shards import read_manifest
from tests.conftest import TinyConfig
from tests.support import ROOT, one_line_error

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))

MINIMAL = """
model: {config: {model_type: llama}}
inner: {num_steps: 12}
outer: {sync_interval_steps: 4}
silos: {alpha: {}, beta: {}}
"""

# Overrides on top of MINIMAL, and what the message must hold: the key, the value given, what is allowed.
MISTAKES: list[tuple[list[str], list[str]]] = [
    # unknown keys
    (["inner.lrr=1"], ["inner.lrr: unknown key given; allowed: num_steps, ", "did you mean inner.lr?"]),
    (["data=[a]"], ["data: unknown key given", "; type gate.data=... or silo.data=... or silos.NAME.data=..."]),
    (["silos.alpha.data=a"], ["silos.alpha.data: 'a' given; allowed: a list: type silos.alpha.data=[a]"]),
    (["trust.keys={alpha: a, beta: b}"], ["trust.keys: none given of aggregator; allowed: one of every silo of the"]),
    (["trust.added={gamma: d}"], ["trust.added: ['gamma'] given; allowed: none without trust.keys and a store"]),
    (
        ["trust.keys={alpha: a, beta: b, aggregator: c}", "trust.added={beta: d}", "roster=[alpha, beta]"],
        ["trust.added: beta given; allowed: silos that the contract does not have"],
    ),
    (
        ["trust.keys={alpha: a, beta: b, aggregator: c, gamma: d}"],
        ["trust.keys: one of gamma given; allowed: aggregator, alpha, beta"],
    ),
    (
        ["trust.keys={alpha: a}", "exchange={kind: collective, url: 'tcp://a:1'}"],
        ["trust.keys: none given of beta; allowed: one of every silo of the roster, or none at all"],
    ),
    (
        ["trust.keys={alpha: a, beta: b, aggregator: c}", "exchange={kind: collective, url: 'tcp://a:1'}"],
        ["trust.keys: one of aggregator given; allowed: alpha, beta"],
    ),
    (
        ["trust.keys={alpha: a, beta: b}", "exchange.kind=none"],
        ["trust.keys: ['alpha', 'beta'] given; allowed: none with exchange.kind=none, where nobody else is"],
    ),
    (["colour=1"], ["colour: unknown key given; allowed: name, run_id, directory, "]),
    (["run_id=A b"], ["run_id: 'A b' given; allowed: [a-z0-9_-]{0,64}, or empty"]),
    (["silo.nope=1"], ["silo.nope: unknown key given; allowed: data, "]),
    (["silos.alpha.precison=bf16"], ["silos.alpha.precison: unknown key", "did you mean silos.alpha.precision?"]),
    (["=3"], ["unknown key given"]),
    (["colour"], ["command line: 'colour' given; allowed: key=value"]),
    (["name=["], ["command line: 'name=[' given; "]),
    # wrong types
    (["inner.lr=abc"], ["inner.lr: ", "'abc'", "Float"]),
    (["inner.num_steps=1.5"], ["inner.num_steps: ", "'1.5'", "Integer"]),
    (["inner.num_steps=true"], ["inner.num_steps: ", "'True'", "Integer"]),
    (["inner.num_steps=null"], ["inner.num_steps: nothing given"]),
    (["name=null"], ["name: nothing given; allowed: text: type name=..."]),
    # given empty
    (["tokenizer="], ["tokenizer: nothing given; allowed: text: type tokenizer=..."]),
    (["directory=''"], ["directory: '' given; allowed: a path"]),
    (["inner.num_steps="], ["inner.num_steps: nothing given; allowed: 1 or more"]),
    (["inner.optimizer="], ["inner.optimizer: nothing given; allowed: adamw, sgd, muon"]),
    (["silo.precision="], ["silo.precision: nothing given; allowed: "]),
    (["document_masking="], ["document_masking: nothing given; allowed: true, false"]),
    (["inner.betas="], ["inner.betas: nothing given; allowed: a list: type inner.betas=[...]"]),
    (["silo="], ["silo: nothing given; allowed: a section of keys and values"]),
    (["outer="], ["outer: nothing given; allowed: a section of keys and values"]),
    (["silos.alpha.data=['']"], ["silos.alpha.data: [''] given; allowed: directories of packed shards"]),
    (["silos.alpha.valid.x="], ["silos.alpha.valid.x: nothing given; allowed: text: type silos.alpha.valid.x=..."]),
    (["silos.alpha.valid.x=''"], ["silos.alpha.valid.x: '' given; allowed: a directory of packed shards"]),
    (["inner.betas=0.9"], ["inner.betas: ", "list"]),
    (["inner.betas=[a,b]"], ["inner.betas[0]: ", "'a'"]),
    (["inner.lr={a: 1}"], ["inner.lr: "]),
    (["silos.alpha.data=x"], ["silos.alpha.data: ", "list"]),
    (["silos.alpha.valid=[x]"], ["silos.alpha.valid"]),
    (["model=3"], ["model: 3 given; allowed: a section"]),
    (["silo=3"], ["silo: 3 given; allowed: a section"]),
    (["silos=3"], ["silos: 3 given; allowed: a section"]),
    (["silos.alpha=3"], ["silos.alpha: 3 given; allowed: a section"]),
    (["silo.deepspeed={zero_optimization: 3}"], ["silos.alpha.deepspeed.zero_optimization: 3 given; allowed: "]),
    (["name=${nowhere}"], ["name: ", "nowhere"]),
    # enumerations
    (["inner.optimizer=lion"], ["inner.optimizer: 'lion' given; allowed: adamw, sgd"]),
    (["inner.schedule=linear"], ["inner.schedule: 'linear' given; allowed: cosine, wsd, constant"]),
    (["outer.optimizer=lamb"], ["outer.optimizer: 'lamb' given; allowed: nesterov, sgd, adam"]),
    (["outer.codec=fp8"], ["outer.codec: 'fp8' given; allowed: fp32, bf16, int8, int4, e3m0, topk"]),
    (["outer.downlink_codec=fp8"], ["outer.downlink_codec: 'fp8' given; allowed: fp32, bf16, int8"]),
    (["outer.overlap_steps=4"], ["outer.overlap_steps: 4 given; allowed: below outer.sync_interval_steps=4"]),
    (["outer.overlap_steps=-1"], ["outer.overlap_steps: -1 given; allowed: 0 or more"]),
    (["outer.num_fragments=5"], ["outer.num_fragments: 5 given; allowed: 1 to outer.sync_interval_steps=4"]),
    (["outer.mixing=1.5"], ["outer.mixing: 1.5 given; allowed: 0 to 1"]),
    (["outer.codec=topk", "outer.error_feedback=2"], ["outer.error_feedback: 2.0 given; allowed: null, or 0 to 1"]),
    (["outer.error_feedback=0.9"], ["outer.error_feedback: 0.9 given; allowed: null or 0: codec fp32 leaves nothing"]),
    (["exchange.kind=s3"], ["exchange.kind: 's3' given; allowed: store, collective, none"]),
    (["exchange.kind=collective"], ["exchange.url: '' given; allowed: tcp://HOST:PORT with exchange.kind=collective"]),
    (["exchange={kind: collective, url: 'tcp://a/b:1'}"], ["exchange.url: 'tcp://a/b:1' given; allowed: tcp://HOST:"]),
    (["outer.state=tape"], ["outer.state: 'tape' given; allowed: memory, disk"]),
    (
        ["exchange={kind: collective, url: 'tcp://a:1'}", "outer.state=disk"],
        ["outer.state: 'disk' given; allowed: memory with exchange.kind=collective, which has no aggregator"],
    ),
    (
        ["exchange={kind: collective, url: 'tcp://a:1', num_lanes: 2}"],
        ["exchange.num_lanes: 2 given; allowed: 1 to the 1 ranks of silo alpha"],
    ),
    (
        [
            "exchange={kind: collective, url: 'tcp://a:1'}",
            f"roster=[alpha, beta, {str([*range(10, 389)])[1:]}",
        ],
        ["silos: 381 given; allowed: up to 380 with exchange.kind=collective"],
    ),
    (["outer.schedule=linear"], ["outer.schedule: 'linear' given; allowed: cosine, wsd, constant"]),
    (["outer.betas=[0.9]"], ["outer.betas: [0.9] given; allowed: two numbers from 0 to below 1"]),
    (["outer.warmup_rounds=4"], ["outer.warmup_rounds: 4 given; allowed: warm-up and decay within the 3 rounds"]),
    (["wandb.mode=maybe"], ["wandb.mode: 'maybe' given; allowed: offline, online, disabled"]),
    (["silos.beta.precision=fp16"], ["silos.beta.precision: 'fp16' given; allowed: fp32, bf16"]),
    (
        ["silo.deepspeed={zero_optimization: {stage: 7}}"],
        ["silos.alpha.deepspeed.zero_optimization.stage: 7 given; allowed: 0, 1, 2, 3"],
    ),
    *(
        (
            [f"silo.deepspeed={{zero_optimization: {{stage: {stage}, round_robin_gradients: true}}}}"],
            [
                "silos.alpha.deepspeed.zero_optimization.round_robin_gradients: True given; "
                "allowed: false, at ZeRO stages 1 and 2"
            ],
        )
        for stage in (1, 2)
    ),
    # places
    *(
        ([f"exchange.url={url}"], [f"exchange.url: {url!r} given; allowed: {allowed}"])
        for url, allowed in (
            ("s3:/bucket/run", "s3://..., or a directory, as ./s3:/bucket/run"),
            ("gs:bucket/run", "gs://..., or a directory, as ./gs:bucket/run"),
            ("s3://", "s3://..., or a directory"),
            ("S3:/bucket", "S3://..., or a directory"),
            ("simplecache://x::s3://bucket", "a store that other processes see, too, which simplecache:// is not"),
            ("memory://run", "a store that other processes see, too, which memory:// is not"),
            ("s4://bucket/run", "a directory, s3://, gs://, az:// or another of fsspec's"),
        )
    ),
    *(
        ([f"{key}=~no-such-user/x"], [f"{key}: '~no-such-user/x' given; allowed: a ~ that is a home"])
        for key in ("directory", "tokenizer", "exchange.url", "exchange.ca_file", "silos.alpha.valid.v")
    ),
    (["silo.data=[~no-such-user/x]"], ["silo.data: '~no-such-user/x' given; allowed: a ~ that is a home"]),
    # ranges
    (["outer.sync_interval_steps=0"], ["outer.sync_interval_steps: 0 given; allowed: 1 or more"]),
    (["inner.num_steps=0"], ["inner.num_steps: 0 given; allowed: 1 or more"]),
    (["inner.num_steps=13"], ["inner.num_steps: 13 given; allowed: a multiple of outer.sync_interval_steps=4"]),
    (["sequence_tokens=1"], ["sequence_tokens: 1 given; allowed: 2 or more"]),
    (["outer.num_fragments=0"], ["outer.num_fragments: 0 given; allowed: 1 or more"]),
    (["exchange.keep_versions=0"], ["exchange.keep_versions: 0 given; allowed: 1 or more"]),
    (["exchange.snapshot_versions=0"], ["exchange.snapshot_versions: 0 given; allowed: null, or 1 or more"]),
    (["exchange.poll_seconds=0"], ["exchange.poll_seconds: 0.0 given; allowed: above 0"]),
    (["inner.lr=0"], ["inner.lr: 0.0 given; allowed: above 0"]),
    (["inner.lr=nan"], ["inner.lr: nan given; allowed: above 0"]),
    (["inner.lr=inf"], ["inner.lr: inf given; allowed: "]),
    (["outer.lr=inf"], ["outer.lr: inf given; allowed: "]),
    (["outer.lr=-1"], ["outer.lr: -1.0 given; allowed: above 0"]),
    (["outer.momentum=1"], ["outer.momentum: 1.0 given; allowed: 0 to below 1"]),
    (["inner.min_lr_ratio=2"], ["inner.min_lr_ratio: 2.0 given; allowed: 0 to 1"]),
    (["inner.betas=[0.9]"], ["inner.betas: [0.9] given; allowed: two numbers from 0 to below 1"]),
    (["inner.warmup_steps=13"], ["inner.warmup_steps: 13 given; allowed: ", "inner.num_steps=12"]),
    (
        ["inner.schedule=wsd", "inner.warmup_steps=7", "inner.decay_steps=6"],
        ["inner.warmup_steps: 13 given; allowed: "],
    ),
    (["silo.eval_sequences=-1"], ["silos.alpha.eval_sequences: -1 given; allowed: 0 or more"]),
    (["silo.prefetch_batches=-1"], ["silos.alpha.prefetch_batches: -1 given; allowed: 0 or more"]),
    (
        ["silos.beta.data=[x,y]", "silos.beta.data_weights=[1]"],
        [
            "silos.beta.data_weights: [1.0] given; allowed: none, or one weight for each of the 2 entries of "
            "silos.beta.data"
        ],
    ),
    (
        ["silos.beta.data=[x,y]", "silos.beta.data_weights=[1,0]"],
        ["silos.beta.data_weights: [1.0, 0.0] given; allowed: numbers above 0"],
    ),
    (
        ["silos.beta.data=[x]", "silos.beta.data_weights=[nan]"],
        ["silos.beta.data_weights: [nan] given; allowed: numbers above 0"],
    ),
    (["silos.beta.data_weights=[a]"], ["silos.beta.data_weights[0]: ", "'a'"]),
    (["document_masking=maybe"], ["document_masking: ", "'maybe'", "bool"]),
    (["silo.keep_checkpoints=0"], ["silos.alpha.keep_checkpoints: 0 given; allowed: 1 or more"]),
    # what must fit together
    (
        ["silos.beta={global_batch_sequences: 100, micro_batch_sequences: 5, accumulation_steps: 7, num_nodes: 3}"],
        ["silos.beta.global_batch_sequences: 100 given; allowed: ", "sequences 5 x ", "steps 7 x ranks 3 = 105"],
    ),
    (["silo.attention=documents"], ["silos.alpha.attention: 'documents' given; allowed: with document_masking=true"]),
    (
        ["silo.compile=true", "silo.deepspeed.zero_optimization.stage=3"],
        ["silos.alpha.compile: True given; allowed: false at ZeRO stage 3; true at 0, 1 and 2"],
    ),
    (["silo.min_nodes=2"], ["silos.alpha.min_nodes: 2 given; allowed: up to num_nodes 1"]),
    (
        ["silo.num_nodes=4", "silo.min_nodes=3", "silo.micro_batch_sequences=1"],
        ["global_batch_sequences: 8 given with 3 ranks and ", "; allowed: a multiple of 3, ", ": 1, 2, 4, 8"],
    ),
    (
        ["silo.num_nodes=6", "silo.min_nodes=2", "silo.micro_batch_sequences=1"],
        ["global_batch_sequences: 8 given with 6 ranks and ", "; allowed: a multiple of 6, ", ": 1, 2, 4, 8"],
    ),
    (
        ["silo.num_nodes=2", "silo.min_nodes=1", "silo.micro_batch_sequences=2", "silo.accumulation_steps=2"],
        ["= 4; with accumulation_steps 0 it follows from the others"],
    ),
    (
        [
            *("exchange.kind=collective", "exchange.url=tcp://127.0.0.1:20017", "exchange.num_lanes=2"),
            *("silo.num_nodes=2", "silo.min_nodes=1", "silo.micro_batch_sequences=1"),
        ],
        ["exchange.num_lanes: 2 given; allowed: 1 to the 1 ranks of silo alpha"],
    ),
    (["model.checkpoint=/x"], ["model: ", "either model.config or model.checkpoint"]),
    (["roster=[alpha]"], ["silos: 'beta' given; allowed: names of the roster: alpha"]),
    (["roster=[alpha,alpha,beta]"], ["roster: ", "each name once"]),
    (["roster=[alpha,beta,../global]"], ["roster: '../global' given; allowed: names of a-z, 0-9, _ and -"]),
    (["silos={Alpha: {}}"], ["silos: 'Alpha' given; allowed: names of a-z, 0-9, _ and -"]),
]

# Whole files instead of MINIMAL.
BAD_FILES = {
    "": "model: ",
    "- 1\n": "configuration: ",
    "3\n": "--config",
    "a: [\n": "--config",
    "inner: {lr: 1, lr: 2}\n": "duplicate key lr",
    "inner:\n\tlr: 1\n": "--config",
    "1: 2\n": "1: unknown key given",
    "silos: [alpha]\n": "silos: ['alpha'] given; allowed: a section",
    "model: {config: {hidden_size: 3}}\n": "model.config: {'hidden_size': 3} given; allowed: a mapping with model_type",
    "model: {config: {model_type: llama}}\n": "silos: {} given; allowed: at least one silo",
    "a: !!python/object/apply:os.system [true]\n": "--config",
}


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_then_files_in_order_then_overrides(minimal: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("inner: {lr: 0.5, eps: 0.25, weight_decay: 0.75}\nsilo: {precision: bf16}\n")
    third = tmp_path / "third.yaml"
    third.write_text("inner: {eps: 0.125}\nsilos: {beta: {precision: fp32}}\n")
    config = load_config([minimal, second, third], ["inner.weight_decay=0.0625", "silos.alpha.num_threads=3"])
    assert config.inner.clip_norm == 1.0  # a default
    assert (config.inner.lr, config.inner.eps, config.inner.weight_decay) == (0.5, 0.125, 0.0625)
    assert (config.silos["alpha"].precision, config.silos["beta"].precision) == ("bf16", "fp32")
    assert (config.silos["alpha"].num_threads, config.silos["beta"].num_threads) == (3, 1)
    swapped = load_config([minimal, third, second])
    assert swapped.inner.eps == 0.25


def test_a_key_of_anything_is_quoted_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"\n\x1b[2J": None}))
    assert one_line_error(load_config, [file]).startswith(r"\n\x1b[2J: unknown key given; allowed: name, ")


@pytest.mark.parametrize("text", ['"0"', "'{}'", "'[1]'", '"a: 1"'])
def test_a_file_that_holds_one_text_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert one_line_error(load_config, [file])


def test_derived_values(minimal: Path, tmp_path: Path) -> None:
    config = load_config([minimal], [f"directory={tmp_path}/run", f"tokenizer={tmp_path}"])
    assert config.num_rounds == 3
    assert config.full_roster == ["alpha", "beta"]
    assert config.store_url == f"{tmp_path}/run/store"
    assert config.silo_directory("beta") == tmp_path / "run" / "silos" / "beta"
    assert config.tokenizer_file == tmp_path / "tokenizer.json"
    assert load_config([minimal], ["roster=[gamma,beta,alpha]"]).full_roster == ["alpha", "beta", "gamma"]
    assert load_config([minimal], ["exchange.url=s3://bucket/run"]).store_url == "s3://bucket/run"


def test_a_silo_that_trains_alone_need_not_end_with_a_round(minimal: Path) -> None:
    assert load_config([minimal], ["inner.num_steps=13", "exchange.kind=none"]).inner.num_steps == 13


@pytest.mark.parametrize(("overrides", "fragments"), MISTAKES, ids=[" ".join(given) for given, _ in MISTAKES])
def test_a_mistake_is_one_line(minimal: Path, overrides: list[str], fragments: list[str]) -> None:
    message = one_line_error(load_config, [minimal], overrides)
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("owned", OWNED)
def test_deepspeed_keys_that_are_ours_are_refused(minimal: Path, owned: str) -> None:
    message = one_line_error(load_config, [minimal], [f"silo.deepspeed={{{owned}: 1}}"])
    assert message == f"silos.alpha.deepspeed.{owned}: 1 given; set {OWNED[owned]} instead"


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert BAD_FILES[text] in one_line_error(load_config, [path])


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert one_line_error(load_config, [missing]) == f"--config: {missing!r} given; there is no such file"
    assert str(tmp_path) in one_line_error(load_config, [tmp_path])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00x")
    assert "binary.yaml" in one_line_error(load_config, [tmp_path / "binary.yaml"])


def test_batch_is_checked_against_the_ranks_that_are_there(minimal: Path) -> None:
    silo = load_config([minimal], ["silo.global_batch_sequences=24", "silo.micro_batch_sequences=4"]).silos["alpha"]
    assert [accumulation_steps("alpha", silo, num_ranks) for num_ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]
    assert one_line_error(accumulation_steps, "alpha", silo, 4) == (
        "silos.alpha.global_batch_sequences: 24 given with 4 ranks and micro_batch_sequences 4; allowed: "
        "a multiple of 16, or one of these numbers of ranks: 1, 2, 3, 6"
    )
    silo.accumulation_steps = 2
    assert accumulation_steps("alpha", silo, 3) == 2
    assert one_line_error(accumulation_steps, "alpha", silo, 2) == (
        "silos.alpha.global_batch_sequences: 24 given; allowed: micro_batch_sequences 4 x accumulation_steps 2 x "
        "ranks 2 = 16; with accumulation_steps 0 it follows from the others"
    )
    silo.micro_batch_sequences, silo.accumulation_steps = 7, 0
    assert one_line_error(accumulation_steps, "alpha", silo, 1) == (
        "silos.alpha.global_batch_sequences: 24 given with 1 ranks and micro_batch_sequences 7; "
        "allowed: a multiple of 7"
    )


def test_each_weighted_corpus_must_have_a_sequence(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path, sequence_tokens=10**6, silo={"data_weights": [2]})
    (directory,) = config.silos["alpha"].data
    num_tokens = read_manifest(Path(directory)).num_tokens
    assert one_line_error(check_silo, config, "alpha") == (
        f"silos.alpha.data ({directory}): {num_tokens} tokens given; allowed: more than sequence_tokens=1000000: "
        "add text or lower sequence_tokens"
    )


def test_saved_configuration_loads_to_the_same(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(
        tmp_path,
        inner={"eps": 1e-9, "betas": [0.1, 0.2]},
        silo={"deepspeed": {"zero_optimization": {"stage": 2}}, "data_seed": 7},
        silos={"beta": {"precision": "bf16"}},
        roster=["gamma", "alpha", "beta"],
    )
    path = tmp_path / "run" / "config.yaml"
    save_config(config, path)
    again = load_config([path])
    assert again == config
    first = path.read_bytes()
    save_config(again, path)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


def test_home_is_expanded_in_every_place(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = ["directory=~/run", "tokenizer=~/tokenizer", "exchange.url=~/s", "exchange.ca_file=~/ca.pem"]
    keys += ["silo.data=[~/a, b/~c]", "silo.valid.v=~/v", "model={config: {}, checkpoint: ~/model}"]
    config = load_unchecked([minimal], keys)
    assert (config.directory, config.tokenizer) == ("/home/me/run", "/home/me/tokenizer")
    assert (config.exchange.url, config.exchange.ca_file) == ("/home/me/s", "/home/me/ca.pem")
    assert (config.silos["alpha"].data, config.silo.data) == (["/home/me/a", "b/~c"], ["/home/me/a", "b/~c"])
    assert (config.silos["alpha"].valid["v"], config.model.checkpoint) == ("/home/me/v", "/home/me/model")


def test_a_run_directory_works_from_anywhere_and_can_be_moved(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["directory=runs/x", "tokenizer=tokenizer", "silo.data=[runs/x/packed, runs/xy]"]
    monkeypatch.chdir(tmp_path)
    for url, moved_url in (
        ("", "../y: z/store"),
        ("runs/x/inside", "../y: z/inside"),
        ("beside", "beside"),
        ("s3://bucket/run", ""),
    ):
        config = load_config([minimal], [*given, *([f"exchange.url={url}"] if url else [])])
        save_config(config, Path(config.directory) / "config.yaml")
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        there = load_run(Path("../runs/x"))
        anywhere = load_config([tmp_path / "runs/x/config.yaml"])
        assert os.path.normpath(anywhere.store_url) == os.path.normpath(there.store_url)
        (tmp_path / "runs/x").rename(tmp_path / "y: z")
        moved = load_run(Path("../y: z"))
        expected = url if "://" in url else str(tmp_path / moved_url.removeprefix("../"))
        assert os.path.normpath(moved.store_url) == os.path.normpath(expected)
        assert moved.tokenizer == str(tmp_path / "tokenizer")
        packed = [os.path.normpath(place) for place in moved.silos["alpha"].data]
        assert packed == [str(tmp_path / "y: z/packed"), str(tmp_path / "runs/xy")]
        monkeypatch.chdir(tmp_path)
        (tmp_path / "y: z").rename(tmp_path / "runs/x")


def test_data_of_several_silos_is_not_given_by_files_for_all(minimal: Path, tmp_path: Path) -> None:
    files = [tmp_path / "law/silo.yaml", tmp_path / "medicine/silo.yaml"]
    for file in files:
        file.parent.mkdir()
        file.write_text(yaml.safe_dump({"silo": {"data": [str(file.parent / "train")], "valid": {}}}))
    assert load_config([minimal, files[0]]).silos["beta"].data == [str(tmp_path / "law/train")]
    assert one_line_error(load_config, [minimal, *files]) == (
        f"--config: {files[0]} and {files[1]} given, and each says what every silo trains on; allowed: one of them; "
        "with several silos, put what each file says below silos.NAME instead of silo"
    )


def test_there_are_shipped_configurations() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_configuration_loads_or_merges(path: Path, minimal: Path) -> None:
    if path.parent.name == "site":
        config = load_config([minimal])
        assert list(load_site([path], config).silos) == list(config.silos)
        return
    given = yaml.safe_load(path.read_text()) or {}
    if (given.get("model") or {}).get("checkpoint"):  # which goes with no model.config of another file
        assert isinstance(load_config([path], ["silos.any={}"]), RunConfig)
        return
    # A number of steps that every shipped sync interval divides.
    assert isinstance(load_config([minimal, path], ["inner.num_steps=3000"]), RunConfig)
    if given.get("silos") and given.get("model"):  # a complete run
        assert isinstance(load_config([path]), RunConfig)


def test_configuration_imports_no_torch() -> None:
    code = (
        "import sys, pretrain.config.load; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_the_outer_learning_rate_follows_rounds(minimal: Path) -> None:
    settings = "outer={schedule: wsd, lr: 0.5, warmup_rounds: 1, decay_rounds: 2, min_lr_ratio: 0, num_fragments: 2}"
    config = load_config([minimal], ["inner.num_steps=16", settings])
    # Four rounds; fragment 1 leaves half a round earlier than fragment 0, and once more at the end.
    lrs = [config.outer_lr(version) for version in range(1, config.schedule.num_versions + 1)]
    assert lrs == [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert load_config([minimal]).outer_lr(1) == load_config([minimal]).outer.lr


def test_text_of_which_nothing_was_held_out_is_named(tmp_path: Path, tiny_config: TinyConfig) -> None:
    train = tmp_path / "packed" / "train"
    config = tiny_config(tmp_path)
    shutil.copytree(config.silos["alpha"].data[0], train)
    config.silos["alpha"].data, config.silos["alpha"].valid = [str(train)], {"law": str(train.with_name("valid"))}
    assert one_line_error(check_silo, config, "alpha") == (
        f"silos.alpha.valid.law: {str(train.with_name('valid'))!r} given; atoll data prepare has held out no document "
        "of that text; allowed: a packed split, or no silos.alpha.valid: split the text into more documents, or leave "
        "the key out"
    )


def test_a_folder_of_splits_is_no_split_and_the_line_says_which_to_name(
    tmp_path: Path, tiny_config: TinyConfig
) -> None:
    config = tiny_config(tmp_path)
    folder = Path(config.silos["alpha"].data[0]).parent
    config.silos["alpha"].data = [str(folder)]
    assert one_line_error(check_silo, config, "alpha") == (
        f"silos.alpha.data: {str(folder)!r} given; it has no manifest.json: name {folder / 'train'}"
    )
