"""Operations of a token, by hand and as torch counts them, and what is said of cards."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config.keys import ModelConfig, RunConfig, SiloConfig, WandbConfig
from pretrain.host.journal import Journal
from pretrain.silo.cards import PEAK_TFLOPS, check_precision, has_bf16, peak_flops
from pretrain.silo.checkpoint import Progress
from pretrain.silo.flops import flops_per_token, peak_tokens_per_second
from pretrain.silo.model import build_initial, build_without_memory
from pretrain.silo.ranks import Ranks
from pretrain.silo.steplog import StepLog
from tests.support import one_line_error

GPT2 = {"model_type": "gpt2", "n_positions": 1024}
LLAMA = {"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 10}
GROUPED = LLAMA | {"num_key_value_heads": 2, "intermediate_size": 80}
# A layer: queries 48 x 40 and back, keys and values 48 x 20, a gated MLP of 80, two norms; the output layer, a norm.
GROUPED_PARAMETERS = 3 * (2 * 48 * 40 + 2 * 48 * 20 + 3 * 48 * 80 + 2 * 48) + 96 * 48 + 48


def counted(config: dict, *, vocab_size: int, sequence_tokens: int) -> int | None:
    return flops_per_token(build_without_memory(ModelConfig(config=config), vocab_size), sequence_tokens)


def test_gpt2_124m() -> None:
    # 124,439,808 parameters, of which 1,024 x 768 positions are looked up only; 12 layers of 12 heads of 64.
    assert counted(GPT2, vocab_size=50_257, sequence_tokens=1024) == 6 * 123_653_376 + 12 * 12 * 12 * 64 * 1024
    # At 475,000 tokens a second on an H100, 41 % of its peak.
    assert pytest.approx(0.4106, abs=1e-4) == 855_166_464 * 475_000 / 989.4e12


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_only_looked_up_does_not_count_and_heads_that_share_keys_do(tied: bool) -> None:
    # The output layer is multiplied with, tied or not.
    found = counted(GROUPED | {"tie_word_embeddings": tied}, vocab_size=96, sequence_tokens=32)
    assert found == 6 * GROUPED_PARAMETERS + 12 * 3 * 4 * 10 * 32


def test_as_torch_counts_them() -> None:
    model = build_initial(ModelConfig(config=GROUPED | {"attn_implementation": "eager"}), 96)
    rows = torch.zeros((2, 32), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=rows, use_cache=False).logits.sum().backward()
    norms, rotary = 7 * 48, 2 * 5 * 32  # not products of a token with a matrix; the frequencies, once a forward pass
    expected = (flops_per_token(model, 32) or 0) - 6 * norms
    assert counter.get_total_flops() == pytest.approx(2 * 32 * expected, abs=2 * rotary)


def test_of_experts_those_that_a_token_goes_to() -> None:
    sizes = {"intermediate_size": 80, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    found = counted(LLAMA | sizes | {"model_type": "mixtral"}, vocab_size=96, sequence_tokens=32)
    routers_and_second_experts = 3 * (8 * 48 + 3 * 48 * 80)
    assert found == 6 * (GROUPED_PARAMETERS + routers_and_second_experts) + 12 * 3 * 4 * 10 * 32


def test_a_window_counts_where_it_is_shorter_than_the_sequence() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    window = {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True, "layer_types": kinds}
    short, long = (counted(GROUPED | window, vocab_size=96, sequence_tokens=tokens) or 0 for tokens in (8, 32))
    assert long - short == 12 * 4 * 10 * (32 - 8)  # of the middle layer


def test_of_a_model_whose_layers_do_something_else_nothing_is_said() -> None:
    mamba = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    assert counted(mamba, vocab_size=96, sequence_tokens=32) is None


def test_a_card_that_is_not_known_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    card, name = torch.device("cuda", 0), "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(card) == 989.4e12
    name = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    assert peak_flops(card) is None
    assert peak_flops(torch.device("cpu")) is None
    assert all(60 < tflops < 3000 for tflops in PEAK_TFLOPS.values())


@pytest.fixture
def one_rank() -> Ranks:
    """A silo's only rank, without the process group that it would make."""
    ranks = object.__new__(Ranks)
    ranks.device, ranks.rank, ranks.num_ranks = torch.device("cuda", 0), 0, 1
    return ranks


def test_tokens_at_the_peak(monkeypatch: pytest.MonkeyPatch, one_rank: Ranks) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    model = build_without_memory(ModelConfig(config=GPT2), 50_257)
    assert peak_tokens_per_second(model, 1024, one_rank) == pytest.approx(312e12 / 855_166_464)
    one_rank.device = torch.device("cpu")
    assert peak_tokens_per_second(model, 1024, one_rank) is None


def test_bf16_on_a_card_without_it_is_one_line(monkeypatch: pytest.MonkeyPatch, one_rank: Ranks) -> None:
    assert has_bf16(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    check_precision("law", "fp32", one_rank)
    assert one_line_error(check_precision, "law", "bf16", one_rank) == (
        "silos.law.precision: 'bf16' given; 1 of its 1 ranks has a card (Tesla V100-SXM2-32GB) that does not compute "
        "in it; allowed: fp32, or cards that have bf16 (of NVIDIA's, from A100 on)"
    )


def test_the_log_line_and_the_record_say_the_share_of_the_peak(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = RunConfig(directory=str(tmp_path), silos={"law": SiloConfig()}, wandb=WandbConfig(mode="disabled"))
    journal, progress = Journal(config, "silos/law", silo="law"), Progress()
    for peak in (None, 1e6):
        log = StepLog(config, "law", journal, progress, peak)
        progress.step, progress.position = progress.step + 1, progress.position + 8
        log.step(0.1, 1.0)
    without, told = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert "mfu" not in without
    assert told["mfu"] == told["tokens_per_second"] / 1e6
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" Mtok")
    assert lines[1].endswith(f"{told['mfu']:6.1%} MFU")
