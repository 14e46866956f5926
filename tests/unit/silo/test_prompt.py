"""Prompts without processes: what they begin as, where they stand, what is trained, and mistakes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pretrain.config.keys import ModelConfig, RunConfig
from pretrain.federation.preflight import check_silo
from pretrain.plan.plan import make_plan
from pretrain.plan.seconds import Given
from pretrain.silo.base import fill_base
from pretrain.silo.batch import IGNORED
from pretrain.silo.data import BadTokenError, Batches, Mixture, PackedTokens, held_out_batches
from pretrain.silo.flops import flops_per_token
from pretrain.silo.model import (
    build_empty,
    build_initial,
    build_without_memory,
    initial_parameters,
    load_checkpoint,
    token_losses,
)
from pretrain.silo.prompt import MATRIX, check_prompt
from pretrain.silo.shards import read_manifest, verify_shards
from pretrain.silo.verify import verify_tokens
from pretrain.silo.vocabulary import read_tokenizer
from pretrain.trust.contract import build_contract, check_same_contract, first_contract
from tests.adapters import adapter_model, prompt_model, save_base
from tests.chats import Conversation, write_chat
from tests.conftest import TinyConfig
from tests.support import VOCAB_SIZE, TinyText, one_line_error, with_keys

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
# As Gemma scales what it looks up within the embedding, and as files of Mixtral have other names than its model.
GEMMA = {"model_type": "gemma3_text", "head_dim": 8, "num_key_value_heads": 1, **SMALL}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 1, **SMALL}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
TIED = {"model_type": "llama", "tie_word_embeddings": True, **SMALL}
ROWS = torch.arange(24).reshape(2, 12) % 7 + 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_text: TinyText) -> Path:
    """The frozen model."""
    return save_base(tmp_path_factory.mktemp("base"), tiny_text)


def filled(config: RunConfig) -> torch.nn.Module:
    """The model with its base and version 0 of its prompt."""
    model = build_empty(config.model, VOCAB_SIZE, dtype=torch.float32)
    assert config.model.checkpoint
    fill_base(model, config.model.checkpoint)
    ((name, value),) = initial_parameters(config).items()
    model.get_parameter(name).data.copy_(value)
    return model.eval()


@pytest.mark.parametrize("config", [TIED, GPT2, GEMMA, MIXTRAL], ids=["tied", "gpt2", "gemma", "mixtral"])
def test_version_0_is_the_text_in_front(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, config: dict[str, Any]
) -> None:
    base = tmp_path / "base"
    build_initial(ModelConfig(config=config), VOCAB_SIZE).save_pretrained(base)  # type: ignore[operator]
    tokens = read_tokenizer(tiny_text.tokenizer).encode("bada gefi").ids
    assert len(tokens) > 2
    plain = load_checkpoint(base).eval()
    for number, expected in ((2, tokens[:2]), (len(tokens) + 2, tokens + tokens[:2])):  # cut, and again
        run = tiny_config(tmp_path, model=prompt_model(base, tokens=number))
        model = filled(run)
        ids = torch.cat([torch.arange(-1, -number - 1, -1).expand(2, -1), ROWS], 1)
        as_text = torch.cat([torch.tensor(expected).expand(2, -1), ROWS], 1)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, plain(input_ids=as_text).logits)
        check_prompt(model, torch.device("cpu"))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        ((name, matrix),) = trained.items()
        assert name.endswith(MATRIX)
        assert matrix.shape == (number, 16)
        num_frozen = sum(p.numel() for p in load_checkpoint(base).parameters())
        assert matrix.numel() + num_frozen == sum(p.numel() for p in model.parameters())


def test_the_prompt_alone_is_trained_and_its_gradient_is_that_of_vectors_in_front(
    tmp_path: Path, tiny_config: TinyConfig, base: Path
) -> None:
    model = filled(tiny_config(tmp_path, model=prompt_model(base)))
    ids = torch.cat([torch.tensor([[-1, -2, -3]]).expand(2, -1), ROWS], 1)
    targets = torch.cat([torch.full((2, 3), IGNORED), ROWS.roll(-1, 1)], 1)
    token_losses(model, ids, targets).sum().backward()
    (matrix,) = [p for p in model.parameters() if p.requires_grad]
    plain = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    rows = matrix.detach().clone().requires_grad_(True)
    embedded = torch.cat([rows.expand(2, -1, -1), plain.get_input_embeddings()(ROWS)], 1)
    logits = plain(inputs_embeds=embedded).logits[:, 3:]
    F.cross_entropy(logits.flatten(0, 1), ROWS.roll(-1, 1).flatten(), reduction="sum").backward()
    assert rows.grad is not None
    assert matrix.grad is not None
    assert rows.grad.abs().max() > 1e-3
    assert torch.allclose(matrix.grad, rows.grad, rtol=1e-5, atol=1e-7)


class OfTwoTables(torch.nn.Module):
    """A model in which a token is looked up twice, as in some types with vectors for every layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.more = model, torch.nn.Embedding(8, VOCAB_SIZE)

    def forward(self, input_ids: Any = None, **options: Any) -> Any:
        found = self.module(input_ids=input_ids, **options)
        if input_ids is not None:
            found.logits = found.logits + self.more(input_ids.clamp(min=0))
        return found


def test_a_model_that_makes_more_of_its_tokens_is_one_line(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    model = OfTwoTables(filled(tiny_config(tmp_path, model=prompt_model(base))))
    said = one_line_error(check_prompt, model, torch.device("cpu"))
    assert said.startswith("model.adapter.kind: 'prompt' given; this type of model makes more of its tokens than")


# --- sequences ---

TALKS: list[Conversation] = [([7, 3, 4, 0], [0, 0, 1, 1]), ([9, 8, 1], [0, 1, 0]), ([5, 6, 2, 1, 0], [0, 1, 0, 1, 1])]


def packed(directory: Path, **changes: Any) -> Path:
    options = {"row_tokens": 12, "vocab_size": VOCAB_SIZE, "tokenizer": "a1" * 32, "prompt_tokens": 2}
    return write_chat(directory, TALKS, **(options | changes))


def test_it_stands_before_every_conversation(tmp_path: Path) -> None:
    tokens = PackedTokens([packed(tmp_path / "chat")], sequence_tokens=12, prompt_tokens=2)
    batch, nothing = tokens.batch([0, 1]), IGNORED
    assert batch.inputs.tolist() == [
        [-1, -2, 7, 3, 4, 0, -1, -2, 9, 8, 1, -1],  # what fills a row has no loss, and is not seen
        [-1, -2, 5, 6, 2, 1, 0, -1, -2, 0, 0, 0],
    ]
    assert batch.targets.tolist() == [
        [nothing] * 3 + [4, 0] + [nothing] * 3 + [8] + [nothing] * 3,
        [nothing] * 2 + [6, nothing, 1, 0] + [nothing] * 6,
    ]
    assert batch.positions is not None
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0]
    without = PackedTokens([packed(tmp_path / "without", prompt_tokens=0)], sequence_tokens=12)
    assert [t.manifests[0].num_trained_tokens for t in (tokens, without)] == [6, 6]  # the same are trained


def test_it_stands_before_every_sequence_of_text(tmp_path: Path, tiny_text: TinyText) -> None:
    split = tiny_text.packed["alpha"] / "train"
    plain = PackedTokens([split], sequence_tokens=14)
    tokens = PackedTokens([split], sequence_tokens=16, prompt_tokens=2)
    assert tokens.num_sequences == plain.num_sequences
    batch, expected = tokens.batch([0, 5]), plain.batch([0, 5])
    assert batch.inputs[:, :2].tolist() == [[-1, -2]] * 2
    assert batch.targets[:, :2].tolist() == [[IGNORED] * 2] * 2
    assert torch.equal(batch.inputs[:, 2:], expected.inputs)
    assert torch.equal(batch.targets[:, 2:], expected.targets)
    assert batch.positions is None
    mixture = Mixture([tokens], seed=0, silo="court")
    step = next(Batches(mixture, micro_batch_sequences=2, accumulation_steps=2, rank=0, num_ranks=2))
    assert step.num_trained == 8 * 14
    assert mixture.terms["prompt_tokens"] == 2
    held = next(held_out_batches(tokens, num_sequences=0, micro_batch_sequences=2, rank=0, num_ranks=1))[0]
    assert int((held.targets != IGNORED).sum()) == 2 * 14


def test_splits_that_do_not_fit_a_prompt_are_one_line(
    tmp_path: Path, tiny_config: TinyConfig, tiny_text: TinyText, base: Path
) -> None:
    split = packed(tmp_path / "chat")

    def message(directory: Path, **options: Any) -> str:
        options = {"sequence_tokens": 12, "key": "silos.law.data"} | options
        return one_line_error(lambda: PackedTokens([directory], **options))

    has = f"silos.law.data: {split} has room for prompts of 2 tokens, and the run trains"
    assert message(split) == f"{has} none; allowed: the conversations prepared again without --prompt-tokens, or " + (
        "model.adapter.tokens=2"
    )
    assert message(split, prompt_tokens=3) == (
        f"{has} one of 3 (model.adapter.tokens); allowed: the conversations prepared again with --prompt-tokens 3, or "
        "model.adapter.tokens=2"
    )
    without = packed(tmp_path / "without", prompt_tokens=0)
    assert message(without, prompt_tokens=3).endswith(
        "allowed: the conversations prepared again with --prompt-tokens 3"
    )
    text = tiny_text.packed["alpha"] / "train"
    assert message(text, prompt_tokens=3, keeps_apart=True) == (
        f"silos.law.data: {text} has text, and the run keeps documents apart and trains a prompt (model.adapter): what "
        "is left of a document from the sequence before would have none; allowed: conversations, or text with "
        "document_masking=false"
    )
    config = tiny_config(tmp_path, document_masking=True, model=prompt_model(base))
    assert one_line_error(check_silo, config, "alpha").endswith("or text with document_masking=false")
    manifest = without / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_trained', '"prompt_tokens": 2, "num_trained'))
    with pytest.raises(BadTokenError, match="has no room for a prompt of 2 tokens before it: copy or prepare"):
        PackedTokens([without], sequence_tokens=12, prompt_tokens=2).row(0)
    assert one_line_error(verify_tokens, without, read_manifest(without), key="verify") == (
        f"verify: {without / 'shard-00000.bin'} has a conversation without room for a prompt of 2 tokens before it: "
        "prepare the split again"
    )
    verify_tokens(split, verify_shards(split))
    manifest.write_text(manifest.read_text().replace('"prompt_tokens": 2', '"prompt_tokens": 12'))
    assert "its chat, num_documents or shards disagree" in message(without, prompt_tokens=12)


# --- what is agreed, and mistakes ---


def test_the_text_is_agreed(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    agreed = tiny_config(tmp_path, model=prompt_model(base))
    contract = first_contract(build_contract(agreed))
    assert build_contract(agreed)["model"]["adapter"] == {"kind": "prompt", "tokens": 3, "text": "bada gefi"}
    other = tiny_config(tmp_path, model=prompt_model(base, text="gefi bada"))
    said = one_line_error(check_same_contract, build_contract(other), contract, "store")
    assert 'model.adapter.text is "gefi bada" here and "bada gefi" there' in said
    of_factors = tiny_config(tmp_path, model=adapter_model(base))
    terms = build_contract(of_factors)["model"]["adapter"]
    assert {*dataclasses.asdict(of_factors.model.adapter)} - {*terms} == {"tokens", "text"}


def test_a_plan_counts_what_travels(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    config = tiny_config(tmp_path, model=prompt_model(base))
    given = Given(link_bits_per_second=1e6, latency_seconds=0.0, tokens_per_second={"alpha": 1e3, "beta": 1e3})
    plan = make_plan(config, given)
    assert plan.num_parameters == 3 * 32
    assert plan.num_frozen == sum(p.numel() for p in load_checkpoint(base).parameters())
    plain, beside = (
        flops_per_token(build_without_memory(model, VOCAB_SIZE), 8)
        for model in (ModelConfig(checkpoint=str(base)), config.model)
    )
    assert plain
    assert beside == plain - 2 * sum(
        p.numel() for name, p in load_checkpoint(base).named_parameters() if "embed" not in name
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.adapter.kind": "prefix"}, "model.adapter.kind: 'prefix' given; allowed: none, lora, prompt, and not"),
        ({"model.adapter.kind": "p_tuning"}, "model.adapter.kind: 'p_tuning' given; allowed: none, lora, prompt, and"),
        ({"model.adapter.kind": "none"}, "model.adapter.tokens: 3 given; allowed: 20 with model.adapter.kind=none"),
        ({"model.adapter.kind": "lora"}, "model.adapter.tokens: 3 given; allowed: 20 with model.adapter.kind=lora"),
        ({"model.adapter.tokens": 0}, "model.adapter.tokens: 0 given; allowed: 1 or more"),
        (
            {"model.adapter.tokens": 15},
            "model.adapter.tokens: 15 given; allowed: 1 to 14, so that two tokens are left of sequence_tokens=16",
        ),
        (
            {"model.adapter.text": ""},
            "model.adapter.text: '' given; allowed: what it begins as, with model.adapter.kin",
        ),
        ({"model.adapter.rank": 2}, "model.adapter.rank: 2 given; allowed: 8 with model.adapter.kind=prompt"),
        (
            {"model.adapter.merge": "alternate", "outer.num_fragments": 2},
            "model.adapter.merge: 'alternate' given; allowed: factors with model.adapter.kind=prompt",
        ),
        ({"outer.num_fragments": 2}, "outer.num_fragments: 2 given; allowed: 1 with model.adapter.kind=prompt: it is"),
        (
            {"inner.optimizer": "muon"},
            "inner.optimizer: 'muon' given; allowed: adamw, sgd with model.adapter.kind=prom",
        ),
        (
            {"model.checkpoint": None, "model.config": {"model_type": "llama"}},
            "model.checkpoint: None given; allowed: a transformers directory with model.adapter.kind=prompt",
        ),
    ],
)
def test_what_cannot_be_with_a_prompt_is_one_line(
    tmp_path: Path, tiny_config: TinyConfig, base: Path, changes: dict[str, Any], said: str
) -> None:
    sections = with_keys({"model": prompt_model(base)}, changes)
    assert one_line_error(tiny_config, tmp_path, **sections).startswith(said)


def test_a_text_of_no_token_is_one_line(tmp_path: Path, tiny_config: TinyConfig, base: Path) -> None:
    config = tiny_config(tmp_path, model=prompt_model(base))
    config.model.adapter.text = ""
    said = one_line_error(initial_parameters, config)
    assert said.startswith(
        "model.adapter.text: '' given, of which the tokenizer makes no token; allowed: a text of one"
    )
