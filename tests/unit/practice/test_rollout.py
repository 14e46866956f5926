"""A model with weights at random tries tasks; what its verifier likes becomes shards."""

import codecs
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_tools.tokenizer import train_tokenizer
from launch.cli import app
from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig
from pretrain.federation.generate import Sampling
from pretrain.host.stopping import StopRequested
from pretrain.practice.rollout import KEPT, PACKED, RESULT, TRIES, Plan, Trier, open_trier, rollout, score
from pretrain.practice.tasks import read_tasks
from pretrain.practice.verifier import Limits
from pretrain.silo.data import PackedTokens
from pretrain.silo.exported import export
from pretrain.silo.model import build_initial
from pretrain.silo.shards import tokenizer_sha256, verify_shards
from tests.holding import held_elsewhere
from tests.support import VOCAB_SIZE, TinyText, one_line_error, packed_hashes, pseudo_text, tiny_settings

NAUGHTY = "tests.unit.practice.naughty"
ROW_TOKENS = 160


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """A `transformers` directory with a chat template, of weights at random."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(pseudo_text("a", 20_000), vocab_size=VOCAB_SIZE, output=place / "tokenizer", chat=True)
    settings = tiny_settings(place, tiny_text)["model"]["config"] | {"max_position_embeddings": 256}
    export(build_initial(ModelConfig(config=settings, seed=1), VOCAB_SIZE), tokenizer, place / "model")
    return place / "model"


@pytest.fixture(scope="module")
def trier(model: Path) -> Trier:
    return open_trier(str(model), sequence_tokens=ROW_TOKENS)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Four, of two lengths, one of them a conversation."""
    asked = ["Name it.", "Name it.", "Name it, please.", [{"role": "system", "content": "Be brief."}]]
    asked[3] = [*asked[3], {"role": "user", "content": "Name it."}]  # type: ignore[misc]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps({"prompt": one, "wanted": "a"}) + "\n" for one in asked))
    return file


def plan(tasks: Path, verifier: str = "says", seed: int = 0) -> Plan:
    sampling = Sampling(num_tokens=40, temperature=1.0, top_k=0, seed=seed)
    return Plan(
        tasks=tasks, verifier=f"{NAUGHTY}:{verifier}", samples=16, keep=2, sampling=sampling, batch_sequences=32
    )


def test_what_is_right_becomes_shards(trier: Trier, tasks: Path, tmp_path: Path) -> None:
    said: list[str] = []
    outcome = rollout(trier, plan(tasks), tmp_path / "out", say=said.append)
    assert outcome.tries == 64
    assert set(outcome.kinds) <= {"right", "wrong", "cut", "empty"}
    assert 0 < outcome.kinds["right"] < 64
    tries = [
        one for line in (tmp_path / "out" / TRIES).read_text().splitlines()[1:] for one in json.loads(line)["tries"]
    ]
    assert all(("a" in one["text"]) == (one["kind"] == "right") for one in tries if one["kind"] in ("right", "wrong"))
    assert {one["text"] for one in tries if one["kind"] == "right"}
    kept = [json.loads(line) for line in (tmp_path / "out" / KEPT).read_text().splitlines()]
    assert outcome.kept == len(kept) <= 2 * outcome.solved
    right = {(one["task"], one["text"]) for one in tries if one["kind"] == "right"}
    prompts = [json.dumps(task.messages) for task in read_tasks(tasks)]
    assert all(
        any(
            prompts[task] == json.dumps(one["prompt"]) and text == one["completion"][0]["content"]
            for task, text in right
        )
        for one in kept
    )
    # The shards are what a run reads, and what is trained of them is the answers alone.
    manifest = verify_shards(tmp_path / "out" / PACKED / "train", tokenizer_sha256=tokenizer_sha256(trier.tokenizer))
    assert manifest.recipe_sha256 == outcome.recipe_sha256
    assert PackedTokens([tmp_path / "out" / PACKED / "train"], sequence_tokens=ROW_TOKENS).num_sequences == outcome.rows
    count = trier.speaker.tokenizer
    trained = sum(len(count.encode(one["completion"][0]["content"], add_special_tokens=False)) for one in kept)
    assert manifest.num_trained_tokens == trained + 2 * len(kept)  # <|im_end|> and the end of the line
    assert said[0].startswith("verifier  network: ")


@pytest.mark.soak
def test_the_same_seed_tries_the_same_and_another_does_not(trier: Trier, tasks: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        rollout(trier, plan(tasks, seed=seed), tmp_path / name)
    first, same, other = ((tmp_path / name / TRIES).read_text().splitlines()[1:] for name in "abc")
    assert first == same
    assert first != other
    assert packed_hashes(tmp_path / "a").values() != packed_hashes(tmp_path / "c").values()


def test_what_was_stopped_or_killed_goes_on(trier: Trier, tasks: Path, tmp_path: Path) -> None:
    whole = rollout(trier, plan(tasks), tmp_path / "whole")
    asked = iter((False, True))
    with pytest.raises(StopRequested):
        rollout(trier, plan(tasks), tmp_path / "out", asked_to_stop=lambda: next(asked))
    tries = tmp_path / "out" / TRIES
    assert len(tries.read_text().splitlines()) == 2
    before = tries.read_bytes()
    with held_elsewhere(tries, json.loads(before.splitlines()[0])):
        refused = one_line_error(rollout, trier, plan(tasks), tmp_path / "out")
        assert refused.startswith(f"--output: {str(tmp_path / 'out')!r} given; another process writes to it; ")
        assert tries.read_bytes() == before
    tries.write_bytes(before)
    with tries.open("a") as file:
        file.write('{"batch": 1, "tri')  # a kill in the middle of a line
    said: list[str] = []
    again = rollout(trier, plan(tasks), tmp_path / "out", say=said.append)
    assert not any(line.startswith("batch     1 ") for line in said)
    assert tries.read_bytes() == (tmp_path / "whole" / TRIES).read_bytes()
    assert again.text_sha256 == whole.text_sha256
    hashes = packed_hashes(tmp_path / "out")
    assert rollout(trier, plan(tasks), tmp_path / "out") == again  # left as it is
    assert packed_hashes(tmp_path / "out") == hashes
    place = tmp_path / "out"
    said_of = one_line_error(rollout, trier, plan(tasks, seed=3), place)
    assert said_of == f"--output: {place} is of another rollout: delete it, or choose another --output"
    (place / RESULT).unlink()
    refused = one_line_error(rollout, trier, plan(tasks, seed=3), place)
    assert refused.startswith(f"--output: {str(place)!r} given; it was begun with other sampling; ")


def test_nothing_right_ends_with_the_rate(trier: Trier, tasks: Path, tmp_path: Path) -> None:
    tasks.write_text(json.dumps({"prompt": "Name it.", "does": "raise"}) + "\n")
    said = one_line_error(rollout, trier, plan(tasks, "behaves_as_told"), tmp_path / "out")
    assert "none kept of what was tried: " in said
    assert "0 of 16 tries right (0.0%), 0 of 1 tasks solved; " in said
    assert " raised; the first: raised: RuntimeError: two lines; allowed: tasks of which some are solved" in said
    assert not (tmp_path / "out" / RESULT).exists()


def test_a_verifier_that_hangs_costs_its_tries_alone(trier: Trier, tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    does = ("right", "hang", "print", "right")
    file.write_text("".join(json.dumps({"prompt": "Name it.", "does": one}) + "\n" for one in does))
    sampling = Sampling(num_tokens=140, temperature=1.0, top_k=0)
    asked = Plan(
        tasks=file,
        verifier=f"{NAUGHTY}:behaves_as_told",
        samples=2,
        sampling=sampling,
        limits=Limits(seconds=1),
    )
    outcome = score(trier, asked)
    assert outcome.kinds["right"] >= 1
    assert {"hung", "raised"} & set(outcome.kinds)


def test_a_task_that_fills_the_row_is_not_tried(trier: Trier, tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps({"prompt": "Name it. " * 60, "wanted": "a"}) + "\n")
    assert score(trier, plan(file)).kinds == {"too long": 1}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("[1]", "a list given, and no prompt"),
        ('{"question": "?"}', "question given, and no prompt"),
        ('{"prompt": 3}', "prompt: a number given; allowed: a list of messages"),
        ('{"prompt": [{"role": "king", "content": "x"}]}', "prompt[0].role: 'king' given"),
        ('{"prompt": "x", "tools": "none"}', "tools: 'none' given, which is not JSON"),
    ],
)
def test_a_malformed_task_is_named(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"prompt": "x"}\n' + line + "\n")
    said = one_line_error(read_tasks, file)
    assert said.startswith(f"--tasks: {file}, line 2: {why}")
    assert said.endswith('; allowed: {"prompt": text or messages, ...}')


def test_a_task_may_have_any_character_that_json_allows(tmp_path: Path) -> None:
    file, prompt = tmp_path / "tasks.jsonl", "one\u2028two\u0085three"
    file.write_bytes(codecs.BOM_UTF8 + json.dumps({"prompt": prompt}, ensure_ascii=False).encode() + b"\r\n\r\n")
    [task] = read_tasks(file)
    assert task.messages == [{"role": "user", "content": prompt}]


def test_no_tasks_are_none(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n")
    assert one_line_error(read_tasks, file).startswith(f"--tasks: {str(file)!r} given; it has no task")
    missing = one_line_error(read_tasks, tmp_path / "none")
    assert (
        missing
        == f"--tasks: {str(tmp_path / 'none')!r} given; No such file or directory; allowed: a file of JSON lines"
    )


def test_the_command(model: Path, tasks: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    given = ["rollout", str(model), "--tasks", str(tasks), "--verifier", f"{NAUGHTY}:says", "--samples", "16"]
    given += ["--num-tokens", "40", "--sequence-tokens", str(ROW_TOKENS)]
    out = tmp_path / "out"
    found = run(app, [*given, "--output", str(out)])
    assert found.exit_code == 0, found.output
    assert f": {out}/packed/train, recipe " in found.output
    found = run(app, given)
    assert "of 64 tries right" in found.output
    for wrong, why in {
        "--samples": ("0", "--samples: 0 given; allowed: 1 or more"),
        "--time-limit": ("0", "--time-limit: 0.0 given; allowed: above 0"),
        "--verifier": (f"{NAUGHTY}:without_messages", f"--verifier: '{NAUGHTY}:without_messages' given; its signature"),
        "--temperature": ("-1", "--temperature: -1.0 given; allowed: 0 or more"),
    }.items():
        error = run(app, [*given, wrong, why[0]]).exception
        assert isinstance(error, ConfigError)
        assert str(error).startswith(why[1])


def test_a_model_without_a_template_is_refused(tmp_path: Path, tiny_text: TinyText) -> None:
    settings = tiny_settings(tmp_path, tiny_text)["model"]["config"]
    export(build_initial(ModelConfig(config=settings), VOCAB_SIZE), tiny_text.tokenizer, tmp_path / "plain")
    said = one_line_error(open_trier, str(tmp_path / "plain"))
    assert said.endswith("which has no chat template; allowed: one that knows conversations")
