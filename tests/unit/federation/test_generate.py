"""`atoll generate` and `chat`: an export, a run and a store say the same, and nothing that a terminal obeys."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from launch import cli
from pretrain.config.keys import RunConfig
from pretrain.config.load import save_config
from pretrain.federation.export import export_global_model
from pretrain.federation.generate import Sampling, Speaker, open_speaker
from pretrain.host.foreign import shown_lines
from pretrain.silo.shards import TEMPLATE_FILE
from tests.conftest import TinyConfig
from tests.support import TinyText, one_line_error
from tests.unit.test_aggregate import start

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def run(tmp_path: Path, tiny_config: TinyConfig) -> RunConfig:
    config = tiny_config(tmp_path)
    start(config)
    save_config(config, Path(config.directory) / "config.yaml")
    return config


def said(speaker: Speaker, text: str, **sampling: float) -> tuple[str, int]:
    pieces: list[str] = []
    spoken = speaker.go_on(text, Sampling(num_tokens=9, **sampling), pieces.append)  # type: ignore[arg-type]
    assert not spoken.is_cut
    return "".join(pieces), spoken.num_tokens


def test_an_export_a_run_and_a_store_say_the_same(run: RunConfig, tmp_path: Path) -> None:
    export_global_model(run, tmp_path / "model")
    speakers = [
        open_speaker(str(tmp_path / "model")),
        open_speaker(run.directory),
        open_speaker(run.store_url, tokenizer=run.tokenizer_file, version=0),
    ]
    texts = {said(speaker, "ba", seed=3) for speaker in speakers[:2]}
    assert len(texts | {said(speakers[2], "ba", seed=3)}) == 1
    assert said(speakers[0], "ba", seed=4) not in texts
    # The likeliest tokens, one by one, of a plain model, after an end of text.
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    row = [tokenizer.eos_token_id, *tokenizer("ba")["input_ids"]]
    while len(row) < 12 and (len(row) == 3 or row[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    expected = tokenizer.decode(row[3:], skip_special_tokens=True)
    assert said(speakers[0], "ba", temperature=0) == (expected, len(row) - 3)


def test_what_cannot_be_said_is_one_line(run: RunConfig, tmp_path: Path) -> None:
    export_global_model(run, tmp_path / "model")
    speaker = open_speaker(str(tmp_path / "model"))
    assert one_line_error(said, speaker, "ba" * 40).endswith("allowed: up to 15 with this model")
    for name, value, allowed in (
        ("top-p", 0.0, "above 0, to 1"),
        ("top-k", -1, "0 (all) or more"),
        ("temperature", -0.5, "0 or more"),
        ("num-tokens", 0, "1 or more"),
    ):
        given = {name.replace("-", "_"): value}
        assert one_line_error(Sampling, **given) == f"--{name}: {value} given; allowed: {allowed}"
    for version in (0, 1):
        wrong = one_line_error(open_speaker, str(tmp_path / "model"), version=version)
        assert wrong.startswith("--version: given with ")
    assert one_line_error(open_speaker, str(tmp_path / "none")).endswith("there is no run in it (no contract.json)")


def test_stdout_has_the_text_alone_and_chat_says_its_form(
    run: RunConfig, tmp_path: Path, tiny_text: TinyText, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", run.directory, "--prompt", "-", "--num-tokens", "5"]
    made = CliRunner().invoke(cli.app, arguments, input="ba")
    assert made.exit_code == 0, made.output
    assert made.stdout == shown_lines(said_by(run, 5)) + "\n"
    assert re.fullmatch(r"version 0 of tiny: 5 new tokens in [0-9.]+ s\n", made.stderr)

    plain = CliRunner().invoke(cli.app, ["chat", run.directory, "--num-tokens", "5"], input="ba\nba\n")
    assert "no chat template: each line is continued by itself" in plain.stderr
    assert plain.stdout == f"{made.stdout}{made.stdout}\n"  # by itself: the second is as the first

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(tiny_text.tokenizer, folder / "tokenizer.json")
    (folder / TEMPLATE_FILE).write_text(TEMPLATE)
    run.tokenizer = str(folder)
    export_global_model(run, tmp_path / "talks")
    speaker = open_speaker(str(tmp_path / "talks"))
    assert speaker.has_template
    messages = [{"role": role, "content": "ba"} for role in ("system", "user", "assistant", "user")]
    speaker.answer(messages, Sampling(num_tokens=10), lambda piece: None)
    assert [one["role"] for one in messages] == ["system", "user"]  # the oldest two were too much for 16 tokens
    one = CliRunner().invoke(cli.app, ["generate", str(tmp_path / "talks"), "--prompt", "ba", "--num-tokens", "20"])
    num_given = int(re.search(r"of this model after (\d+) given\n$", one.stderr)[1])  # type: ignore[index]
    assert f": {16 - num_given} new tokens in " in one.stderr  # of 16 positions
    arguments = ["chat", str(tmp_path / "talks"), "--num-tokens", "4"]
    talked = CliRunner().invoke(cli.app, arguments, input="ba" * 40 + "\nba\n")
    assert "its chat template" in talked.stderr
    assert talked.stderr.count("allowed: up to 15 with this model") == 1
    assert talked.stdout.splitlines()[1:] == CliRunner().invoke(cli.app, arguments, input="ba\n").stdout.splitlines()


def said_by(run: RunConfig, num_tokens: int) -> str:
    pieces: list[str] = []
    open_speaker(run.directory).go_on("ba", Sampling(num_tokens=num_tokens), pieces.append)
    return "".join(pieces)


def test_nothing_that_a_terminal_obeys() -> None:
    assert shown_lines("a\tb\n\x1b[2J\x07\r\x9b31m\u202e.") == "a\tb\n\\x1b[2J\\x07\\r\\x9b31m\\u202e."
