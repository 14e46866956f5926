"""What a model may be: keys, sizes, sight; checkpoints that are not whole; what an export says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pretrain.config.keys import ModelConfig, RunConfig
from pretrain.federation.evaluation import open_subject
from pretrain.federation.export import describe_export, export_global_model
from pretrain.federation.preflight import check_run
from pretrain.silo.exported import export
from pretrain.silo.model import (
    build_empty,
    build_initial,
    check_causality,
    check_chunks,
    check_shapes,
    initial_parameters,
    token_losses,
)
from pretrain.trust.contract import build_contract
from tests.conftest import TinyConfig
from tests.support import VOCAB_SIZE, TinyText, one_line_error
from tests.unit.test_aggregate import start

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LLAMA, BERT = SMALL | {"model_type": "llama"}, SMALL | {"model_type": "bert"}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
MOE = SMALL | EXPERTS | {"model_type": "qwen3_moe", "num_key_value_heads": 1}
FUTURE = "model: one given that sees the tokens which it shall predict"


def settings_of(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig(config=config)


# ---- keys and sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"hiden_size": 64}, "config.hiden_size: unknown key given; allowed: keys of llama, such as hidden_si"),
        (GPT2 | {"n_layers": 3}, "config.n_layers: unknown key given; allowed: keys of gpt2, such as n_layer"),
        (LLAMA | {"dtype": "bfloat16"}, "config.dtype: unknown key given"),
        (LLAMA | {"rope_parameters": {"rope_theat": 1}}, "config.rope_parameters.rope_theat: unknown key given"),
        (LLAMA | {"model_type": "qwen4"}, "config.model_type: 'qwen4' given; allowed: a decoder that transformers has"),
        (LLAMA | {"vocab_size": 299}, "config.vocab_size: 299 given; allowed: 300 (the tokenizer's) or more"),
        (LLAMA | {"max_position_embeddings": 64}, "config.max_position_embeddings: 64 given; allowed: 128 (s"),
        (GPT2, "config.n_positions: 64 given; allowed: 128 (sequence_tokens) or more"),
        (GPT2 | {"n_head": 3, "n_positions": 128}, "config: `embed_dim` must be divisible by num_heads"),
        (MOE | {"num_attention_heads": 3, "num_key_value_heads": 2}, ": its sizes (numbers of heads, widths, "),
        (LLAMA | {"num_key_value_heads": 8}, ": its sizes (numbers of heads, widths, experts) do not fit each other: "),
        (MOE | {"output_router_logits": True}, "config: output_router_logits: true given; the load-balancing loss"),
        (SMALL | {"model_type": "glm"}, "config.pad_token_id: 151329 given; allowed: null (packed text has no pad"),
        ({"model_type": "gemma3"}, "config: gemma3 given, which is not of text alone; allowed: a model of text alone"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_trained(config: dict[str, Any], message: str) -> None:
    said = one_line_error(check_shapes, settings_of(config), VOCAB_SIZE, 128)
    assert said.startswith(f"model.{message}" if message.startswith("config") else f"model{message}")
    assert len(said) < 400


@pytest.mark.parametrize("config", [LLAMA, GPT2, MOE, BERT | {"is_decoder": True}, LLAMA | {"rope_theta": 5000.0}])
def test_a_model_that_can(config: dict[str, Any]) -> None:
    check_shapes(settings_of(config), VOCAB_SIZE, 64)
    for dtype in (torch.float32, torch.bfloat16):
        check_causality(build_initial(settings_of(config), VOCAB_SIZE).to(dtype).eval(), CPU)


@pytest.mark.parametrize(
    "config",
    [BERT, SMALL | {"model_type": "roberta"}, {"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 2}],
    ids=lambda config: config["model_type"],
)
def test_a_model_that_sees_the_future_is_refused(config: dict[str, Any]) -> None:
    check_shapes(settings_of(config), VOCAB_SIZE, 16)
    for dtype in (torch.float32, torch.bfloat16):
        model = build_initial(settings_of(config), VOCAB_SIZE).to(dtype).eval()
        assert one_line_error(check_causality, model, CPU).startswith(FUTURE)


def test_a_refused_model_leaves_nothing_behind(tmp_path: Path, tiny_config: TinyConfig) -> None:
    model = {"config": {"max_position_embeddings": 8}}
    config = tiny_config(tmp_path, model=model)
    for refused in (start, check_run):
        assert one_line_error(refused, config).startswith("model.config.max_position_embeddings: 8 given; allowed: 16 ")
    config.model.config = BERT
    assert one_line_error(start, config).startswith(FUTURE)
    assert not (Path(config.store_url) / "contract.json").exists()
    config.model.config = LLAMA
    start(config)


def test_every_token_is_trained_though_the_type_has_a_padding_token() -> None:
    config = SMALL | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False}
    model = build_empty(settings_of(config), VOCAB_SIZE, dtype=torch.float32)
    model.load_state_dict(build_initial(settings_of(config), VOCAB_SIZE).state_dict())
    rows = torch.tensor([[5, 0, 6, 7]])
    token_losses(model, rows, rows).mean().backward()
    gradient = model.get_input_embeddings().weight.grad  # type: ignore[operator]
    assert gradient[0].norm() > 0
    assert gradient[1].norm() == 0  # did not occur


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mask_at", [None, 3])
def test_a_loss_in_chunks_and_its_gradients_are_those_of_whole_logits(tied: bool, mask_at: int | None) -> None:
    config = LLAMA | {"tie_word_embeddings": tied}
    rows = torch.randint(0, VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(0))

    def gradients(dtype: torch.dtype, chunk_tokens: int) -> dict[str, torch.Tensor]:
        model = build_initial(settings_of(config), VOCAB_SIZE).to(dtype)
        losses = token_losses(model, rows, rows.roll(-1, 1), mask_at, chunk_tokens=chunk_tokens)
        losses.mean().backward()
        found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        return found | {"losses": losses.detach().double()}

    def way_off(found: dict[str, torch.Tensor]) -> float:
        return max(((found[name] - right).norm() / right.norm()).item() for name, right in exact.items())

    exact = gradients(torch.float32, 0)
    assert way_off(gradients(torch.float32, 7)) < 1e-6
    assert way_off(gradients(torch.bfloat16, 7)) < 1.1 * way_off(gradients(torch.bfloat16, 0))


def test_chunks_are_refused_where_logits_are_capped() -> None:
    capped = SMALL | {"model_type": "gemma2", "num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 0.1}
    check_chunks(build_initial(settings_of(LLAMA), VOCAB_SIZE).eval(), 4, CPU)
    assert one_line_error(check_chunks, build_initial(settings_of(capped), VOCAB_SIZE).eval(), 4, CPU) == (
        "silo.loss_chunk_tokens: 4 given; this type of model makes more of its logits than its last layer does; "
        "allowed: 0"
    )


# ---- checkpoints


Damage = Callable[[Path], None]


def rename(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def configure(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40_000])


def shards(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="40KB")
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def only_bin(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "decoy.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"code")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DAMAGED: dict[str, tuple[Damage, str]] = {
    "wrapped": (
        lambda d: rename(d, lambda tensors: {f"module.{name}": value for name, value in tensors.items()}),
        "21 of its model's tensors are missing, 21 are unexpected and 0 have another shape: lm_head.weight, ",
    ),
    "half": (
        lambda d: rename(d, lambda tensors: {n: v for n, v in tensors.items() if "layers.1." not in n}),
        "9 of its model's tensors are missing, 0 are unexpected and 0 have another shape: model.layers.1.input",
    ),
    "too many layers": (lambda d: configure(d, num_hidden_layers=1), "0 of its model's tensors are missing, 9 are un"),
    "other size": (lambda d: configure(d, intermediate_size=80), "0 are unexpected and 6 have another shape: model.la"),
    "pointer": (
        lambda d: (d / "model.safetensors").write_text(POINTER) and None,
        "model.safetensors is a pointer of Git LFS; fetch what it points to: git lfs pull",
    ),
    "cut": (cut, "model.safetensors is damaged or cut ("),
    "shard missing": (shards, "shards are missing: model-00002-of-"),
    "quantised": (
        lambda d: configure(d, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "its config.json has quantization_config; allowed: a model whose weights are not quantised",
    ),
    "other weights": (
        lambda d: configure(d, transformers_weights="decoy.safetensors"),
        "its config.json has transformers_weights; allowed: weights named model.safetensors",
    ),
    "decoy": (only_bin, "there is no model.safetensors or model.safetensors.index.json in it"),
    "adapter": (lambda d: (d / "adapter_config.json").write_text("{}") and None, "it holds an adapter; allowed: a"),
    "no JSON": (lambda d: (d / "config.json").write_text("{") and None, "config.json is no JSON ("),
    "no config": (lambda d: (d / "config.json").unlink(), "there is no config.json in it; allowed: a directory with"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """An exported llama; never write into it."""
    directory = tmp_path_factory.mktemp("good") / "model"
    export(build_initial(settings_of(LLAMA), VOCAB_SIZE), tiny_text.tokenizer, directory)
    return directory


def from_checkpoint(tiny_config: TinyConfig, directory: Path, checkpoint: Path) -> RunConfig:
    return tiny_config(directory, model={"config": None, "checkpoint": str(checkpoint)})


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_checkpoint_that_is_not_whole(tmp_path: Path, tiny_config: TinyConfig, good: Path, kind: str) -> None:
    damage, message = DAMAGED[kind]
    damaged = Path(shutil.copytree(good, tmp_path / "model"))
    damage(damaged)
    config = from_checkpoint(tiny_config, tmp_path, damaged)
    said = one_line_error(start, config)
    assert said.startswith(f"model.checkpoint: '{damaged}' given; ")
    assert message in said
    assert not (Path(config.store_url) / "contract.json").exists()
    shutil.rmtree(damaged)
    shutil.copytree(good, damaged)
    start(config)  # the directory mended, the same command goes on


def test_the_contract_names_the_files_that_are_loaded(tmp_path: Path, tiny_config: TinyConfig, good: Path) -> None:
    whole = Path(shutil.copytree(good, tmp_path / "whole"))
    (whole / "decoy.safetensors").write_bytes(b"nobody loads it")
    named = build_contract(from_checkpoint(tiny_config, tmp_path, whole))["model"]["checkpoint"]
    assert set(named) == {"config.json", "model.safetensors"}
    cut_up = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(good).save_pretrained(cut_up, max_shard_size="60KB")
    config = from_checkpoint(tiny_config, tmp_path, cut_up)
    held = {path.name for path in cut_up.glob("model-*.safetensors")}
    assert len(held) > 1
    named = build_contract(config)["model"]["checkpoint"]
    assert set(named) == held | {"config.json", "model.safetensors.index.json"}
    expected = load_file(good / "model.safetensors")
    for name, value in initial_parameters(config).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


BUFFERS: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        **{"num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "sliding_window": 8},
        **{"hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"]},
        **{"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB_SIZE},
    },
    "glm4_moe": {
        **{"num_key_value_heads": 2, "head_dim": 16, "first_k_dense_replace": 1, "moe_intermediate_size": 32},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    },
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_what_a_checkpoint_holds_beside_parameters_stays(
    tmp_path: Path, tiny_text: TinyText, tiny_config: TinyConfig, kind: str
) -> None:
    """Silos, and with them the export, have the buffers of the checkpoint, and the loss of its model."""
    config = SMALL | BUFFERS[kind] | {"model_type": kind, "pad_token_id": None, "vocab_size": VOCAB_SIZE}
    model = build_initial(settings_of(config), VOCAB_SIZE).eval()
    changed = {n: b for n, b in model.named_buffers() if n.endswith(("layer_scalar", "correction_bias"))}
    assert changed
    for value in changed.values():
        value.copy_(torch.tensor([0.1]) if value.numel() == 1 else torch.tensor([5.0, -5.0, 5.0, -5.0]))
    export(model, tiny_text.tokenizer, tmp_path / "model")
    run = from_checkpoint(tiny_config, tmp_path, tmp_path / "model")
    parameters = initial_parameters(run)
    silo = build_empty(run.model, VOCAB_SIZE, dtype=torch.float32).eval()
    silo.load_state_dict(parameters, strict=False)
    buffers = dict(silo.named_buffers())
    for name, value in changed.items():
        torch.testing.assert_close(buffers[name], value, rtol=0, atol=0)
    rows = torch.arange(16)[None]
    torch.testing.assert_close(token_losses(silo, rows, rows), token_losses(model, rows, rows), rtol=0, atol=0)


def test_buffers_that_nobody_else_would_have(tmp_path: Path, tiny_config: TinyConfig, monkeypatch: Any) -> None:
    """A type of model that draws a buffer at random."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    class Drawn(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("drawn", torch.rand(3))

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda config, dtype: Drawn(config).to(dtype))
    said = one_line_error(initial_parameters, tiny_config(tmp_path))
    assert said.startswith("model: 1 buffers of llama do not follow from its configuration: drawn; allowed: ")


# ---- export


@pytest.mark.parametrize("end_of_text", ["<|endoftext|>", "</s>", "<eos>"])
def test_an_export_says_what_was_trained(tmp_path: Path, tiny_text: TinyText, end_of_text: str) -> None:
    renamed = tmp_path / "tokenizer.json"
    renamed.write_text(tiny_text.tokenizer.read_text().replace("<|endoftext|>", end_of_text))
    trained = Tokenizer.from_file(str(renamed)).token_to_id(end_of_text)
    config = SMALL | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16}
    model = build_empty(settings_of(config), VOCAB_SIZE, dtype=torch.float32)
    export(model, renamed, tmp_path / "model")
    written, tokenizer = (
        AutoConfig.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for part in (written, loaded.generation_config):
        assert (part.eos_token_id, part.bos_token_id, part.pad_token_id) == (trained, trained, None)
    assert written.use_cache
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token) == (end_of_text, trained, None)
    assert loaded.get_input_embeddings().padding_idx is None
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes["model.safetensors"] == renamed.stat().st_mode
    assert len(set(modes.values())) == 1


def test_what_export_and_eval_print(tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, good: Path) -> None:
    config = tiny_config(tmp_path)
    start(config)
    said = describe_export(config, tmp_path / "out", export_global_model(config, tmp_path / "out"))
    assert said.splitlines() == [
        f"{tmp_path}/out: version 0 of tiny, trained on sequences of 16 tokens",
        f"next: atoll eval {tmp_path}/out --data {tiny_text.packed['alpha']}/valid",
    ]
    encoder: nn.Module = build_initial(settings_of(BERT), VOCAB_SIZE)
    export(encoder, tiny_text.tokenizer, tmp_path / "encoder")
    split = tiny_text.packed["alpha"] / "valid"
    sees_all = open_subject(str(tmp_path / "encoder"))
    assert one_line_error(sees_all.losses, {"alpha": split}, sequence_tokens=16).startswith(FUTURE)
    damaged = Path(shutil.copytree(good, tmp_path / "cut"))
    cut(damaged)
    said = one_line_error(open_subject(str(damaged)).losses, {"alpha": split}, sequence_tokens=16)
    assert said.startswith(f"model: '{damaged}' given; model.safetensors is damaged or cut (")
