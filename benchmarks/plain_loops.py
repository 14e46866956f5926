"""What a silo is compared with on a card: a plain loop as nanoGPT has it, and `transformers.Trainer`.

Both train the GPT-2 of `model_section` in bf16 by autocast, with layers compiled, fused AdamW and clipped gradients;
tokens are drawn at random and lie in memory.
"""

import itertools
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from pretrain.silo.model import compile_layers

WARM_UP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Size:
    """A GPT-2, and the batch that it is trained with."""

    layers: int
    heads: int
    width: int
    sequence_tokens: int
    micro_batch_sequences: int
    accumulation_steps: int
    vocab_size: int = 50_304  # 50,257, and what makes it a multiple of 64, as nanoGPT has it
    precision: str = "bf16"

    @property
    def step_tokens(self) -> int:
        """Of an optimizer's step."""
        return self.micro_batch_sequences * self.accumulation_steps * self.sequence_tokens


def model_section(size: Size) -> dict[str, Any]:
    """The configuration of `transformers`; without dropout, as pre-training has it."""
    return {
        "model_type": "gpt2",
        "n_layer": size.layers,
        "n_head": size.heads,
        "n_embd": size.width,
        "n_positions": size.sequence_tokens,
        "vocab_size": size.vocab_size,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    }


class Layer(nn.Module):
    """Causal attention and a feed-forward of four times the width, each beside a residual."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norms = nn.ModuleList([nn.LayerNorm(size.width) for _ in range(2)])
        self.to_heads, self.from_heads = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.wide, self.narrow = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(num_sequences, sequence_tokens, width) to the same."""
        parts = self.to_heads(self.norms[0](hidden)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.from_heads(attended.transpose(1, 2).flatten(2))
        return hidden + self.narrow(F.gelu(self.wide(self.norms[1](hidden)), approximate="tanh"))


class Gpt(nn.Module):
    """GPT-2 with tied embeddings (https://github.com/karpathy/nanoGPT, model.py)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocab_size, size.width)
        self.positions = nn.Embedding(size.sequence_tokens, size.width)
        self.layers = nn.ModuleList([Layer(size) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_last = name.endswith(("from_heads.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * size.layers) if is_last else 0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss."""
        hidden = self.tokens(inputs) + self.positions.weight
        for layer in self.layers:
            hidden = layer(hidden)
        return self.loss(hidden, targets)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of what the last layer says."""
        return F.cross_entropy(F.linear(self.norm(hidden), self.tokens.weight).flatten(0, 1), targets.flatten())


def drawn(size: Size, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro batches of random tokens, the same few again and again."""
    shape = (8, size.micro_batch_sequences, size.sequence_tokens + 1)
    rows = torch.randint(1, size.vocab_size, shape, device=device)
    while True:
        yield from ((row[:, :-1], row[:, 1:]) for row in rows)


class PlainLoop:
    """A model of its own, and steps of it."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self._size, self._device = size, device
        with device:
            self.model = Gpt(size)
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        self.model.loss = torch.compile(self.model.loss, dynamic=False)  # type: ignore[method-assign]
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
        )
        self._batches = drawn(size, device)

    def _precision(self) -> AbstractContextManager[Any]:
        if self._size.precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def steps(self, number: int) -> None:
        """So many of the optimizer's."""
        for _ in range(number):
            for _ in range(self._size.accumulation_steps):
                with self._precision():
                    loss = self.model(*next(self._batches)) / self._size.accumulation_steps
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)


class Clock(TrainerCallback):
    """Notes when steps end, the device's work included, and stops when that is long enough."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """`Trainer` calls it."""
        get_accelerator().synchronize()
        self.ends.append(time.perf_counter())
        measured = self.ends[WARM_UP_STEPS - 1 :]
        if len(measured) > WARM_UP_STEPS and measured[-1] - measured[0] > self._seconds:
            control.should_training_stop = True


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Random sequences, in memory."""

    def __init__(self, size: Size) -> None:
        self._rows = torch.randint(1, size.vocab_size, (256, size.sequence_tokens))

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index % len(self._rows)]
        return {"input_ids": row, "labels": row}


def trainer_step_seconds(size: Size, device: torch.device, directory: Path, seconds: float) -> list[float]:
    """Of each step of `transformers.Trainer` after it has warmed up."""
    section = model_section(size)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**section), dtype=torch.float32)
    compile_layers(model)
    clock = Clock(seconds)
    with _alone():
        arguments = TrainingArguments(
            output_dir=str(directory),
            max_steps=1 << 20,
            per_device_train_batch_size=size.micro_batch_sequences,
            gradient_accumulation_steps=size.accumulation_steps,
            bf16=size.precision == "bf16",
            use_cpu=device.type == "cpu",
            optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=Rows(size), callbacks=[clock]).train()
    measured = clock.ends[WARM_UP_STEPS - 1 :]
    return [after - before for before, after in itertools.pairwise(measured)]


@contextmanager
def _alone() -> Iterator[None]:
    """Without what says that this process is one of several, from which accelerate would make a group."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= before
