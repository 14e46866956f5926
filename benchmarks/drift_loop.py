"""Silos whose text differs, as one plain loop: what a measure against their drift is worth, before it is built.

    python -m benchmarks.drift_loop CORPORA DIRECTORY --seeds 0 1 2 central h=20 h=20,slide=0.8

CORPORA is that of benchmarks/heterogeneity.py: a folder of folders with train.jsonl.gz and valid.jsonl.gz, each a silo.
The model is the Llama of 0.5 M parameters of docs/learning.md, its settings those of `outer=recommended` there, but for
codecs: all in fp32. All silos are one tensor with one dimension more, so that a step of all is one pass. Documents of
valid.jsonl.gz are parted by the sha256 of their text: `valid` is for choosing, `test` for reporting (--report).

A run is `central` or `h=STEPS`, and settings of `Settings` after commas. Central training sees the same rows, those of
all silos at each step. Prints the loss in nats, the mean of the corpora; what has run is kept in DIRECTORY.
"""

import argparse
import dataclasses
import hashlib
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.heterogeneity import VOCAB_SIZE
from data_tools.sources import read_documents, training_file
from data_tools.tokenizer import train_tokenizer
from pretrain.outer.learning_rate import scheduled_lr
from pretrain.silo.muon import COEFFICIENTS, EPS, NUM_ITERATIONS

Text = dict[str, dict[str, Tensor]]  # of each silo by split
ROW, BATCH, EVALUATED = 64, 8, 512
HEAD_WIDTH, WARMUP, CLIP, DECAY, BETAS = 24, 50, 1.0, 0.1, (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a run."""

    h: int = 0
    """Steps between syncs; 0: central."""
    steps: int = 1000
    width: int = 96
    layers: int = 3
    lr: float = 0.006
    """AdamW's."""
    muon_lr: float = 0.02
    muon_momentum: float = 0.9
    end: float = 0.1
    """What the learning rate falls to, of its peak."""
    outer_lr: float = 0.8
    outer_momentum: float = 0.5
    control: float = 0.8
    """Control variates of Muon's matrices."""
    slide: float = 0.0
    """Of what the merged step of the last round has and the silo's own has not, spread over the next one: AdamW's."""
    muon_slide: float = 0.0
    """The same of Muon's matrices."""
    importance: bool = True
    shared: bool = True
    beta2: float = 0.95
    slow: float = 0.0
    """Quasi-hyperbolic AdamW: the share of the slow average in what is stepped along."""
    slow_beta: float = 0.99
    last: int = 0
    """Steps at the end that are synced at every `last_h`."""
    last_h: int = 5
    share_momentum: bool = False
    """Muon's momentum and AdamW's first moment are averaged at syncs."""


# ---- text


def rows_of(corpora: Path, directory: Path) -> Text:
    """Of each silo its training tokens in order, and rows of `valid` and `test`."""
    folders = sorted(path for path in corpora.iterdir() if path.is_dir())
    file = directory / "tokenizer" / "tokenizer.json"
    if not file.exists():
        every = (text for folder in folders for text in read_documents(training_file(folder)))
        train_tokenizer(every, vocab_size=VOCAB_SIZE, output=file.parent)
    tokenizer = Tokenizer.from_file(str(file))
    found = {}
    for folder in folders:
        kept = directory / f"{folder.name}.pt"
        if not kept.exists():
            texts: dict[str, list[str]] = {
                "train": list(read_documents(training_file(folder))),
                "valid": [],
                "test": [],
            }
            for text in read_documents(folder / "valid.jsonl.gz"):
                texts["valid" if hashlib.sha256(text.encode()).digest()[0] % 2 else "test"].append(text)
            torch.save({split: packed(tokenizer, some) for split, some in texts.items()}, kept)
        found[folder.name] = torch.load(kept)
    return found


def packed(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Rows of ROW tokens and the one after them."""
    ids = [token for one in tokenizer.encode_batch(texts) for token in (*one.ids, 0)]
    return torch.tensor(ids).unfold(0, ROW + 1, ROW).contiguous()


# ---- a model for each silo


def initial(settings: Settings, seed: int) -> dict[str, Tensor]:
    """A Llama with two heads to one of keys and values, and one matrix for the first and last layer."""
    width, generator = settings.width, torch.Generator().manual_seed(seed)
    inside = 8 * width // 3

    def drawn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.02

    found = {"embedding": drawn(VOCAB_SIZE, width), "norm": torch.ones(width)}
    for i in range(settings.layers):
        shapes = {"q": (width, width), "k": (width // 2, width), "v": (width // 2, width), "o": (width, width)}
        shapes |= {"gate": (inside, width), "up": (inside, width), "down": (width, inside)}
        found |= {f"{i}.{name}": drawn(*shape) for name, shape in shapes.items()}
        found |= {f"{i}.norm1": torch.ones(width), f"{i}.norm2": torch.ones(width)}
    return found


def is_muons(name: str) -> bool:
    """Whether Muon trains it."""
    return "norm" not in name and name != "embedding"


def losses(parameters: dict[str, Tensor], rows: Tensor, layers: int) -> Tensor:
    """Mean loss of each silo. `rows`: (silos, sequences, ROW + 1)."""
    silos, sequences, _ = rows.shape
    given, wanted = rows[..., :-1].reshape(silos, -1), rows[..., 1:].reshape(silos, -1)
    x = torch.stack([F.embedding(ids, table) for ids, table in zip(given, parameters["embedding"], strict=True)])
    width = x.shape[-1]

    def normed(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (width,), eps=1e-6) * parameters[name][:, None]

    def times(x: Tensor, name: str) -> Tensor:
        return torch.bmm(x, parameters[name].transpose(1, 2))

    def heads(x: Tensor) -> Tensor:
        return x.view(silos * sequences, ROW, -1, HEAD_WIDTH).transpose(1, 2)

    angles = torch.arange(ROW)[:, None] / 10_000 ** (torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    for i in range(layers):
        y = normed(x, f"{i}.norm1")
        q, k, v = (heads(times(y, f"{i}.{name}")) for name in "qkv")
        seen = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
        x = x + times(seen.transpose(1, 2).reshape(silos, -1, width), f"{i}.o")
        y = normed(x, f"{i}.norm2")
        x = x + times(F.silu(times(y, f"{i}.gate")) * times(y, f"{i}.up"), f"{i}.down")
    logits = torch.bmm(normed(x, "norm"), parameters["embedding"].transpose(1, 2))
    found = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return found.view(silos, -1).mean(1)


def orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz as in pretrain/silo/muon.py, in fp32."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


# ---- training


class Silos:
    """Their models and inner optimizers: tensors with the silo as first dimension."""

    def __init__(self, settings: Settings, start: dict[str, Tensor], num_silos: int) -> None:
        """All begin alike."""
        self.settings, self.num_steps = settings, 0
        self.parameters = {k: v.expand(num_silos, *v.shape).clone().requires_grad_() for k, v in start.items()}
        self.first = {k: torch.zeros_like(v) for k, v in self.parameters.items()}
        self.second = {k: torch.zeros_like(v) for k, v in self.parameters.items() if not is_muons(k)}
        self.slow = {k: torch.zeros_like(v) for k, v in self.second.items()} if settings.slow else {}
        self.sums = {k: torch.zeros_like(v) for k, v in self.parameters.items() if is_muons(k)}
        self.correction = {k: torch.zeros_like(v) for k, v in self.sums.items()}
        self.slides: dict[str, Tensor] = {}

    def step(self, rows: Tensor, scale: float) -> None:
        """One inner step of each; `scale`: of the learning rates."""
        found = losses(self.parameters, rows, self.settings.layers)
        of_each = torch.autograd.grad(found.sum(), [*self.parameters.values()])
        gradients = dict(zip(self.parameters, of_each, strict=True))
        squared = sum(gradient.flatten(1).square().sum(1) for gradient in gradients.values())
        clip = (CLIP / (torch.as_tensor(squared).sqrt() + 1e-6)).clamp(max=1.0)
        self.num_steps += 1
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                gradient = gradients[name] * clip.view(-1, *[1] * (parameter.ndim - 1))
                (self._muon if is_muons(name) else self._adamw)(name, parameter, gradient, scale)
                if name in self.slides:
                    parameter.add_(self.slides[name], alpha=scale)

    def _muon(self, name: str, parameter: Tensor, gradient: Tensor, scale: float) -> None:
        settings, (rows, columns) = self.settings, parameter.shape[1:]
        self.sums[name].add_(gradient)
        gradient = gradient + self.correction[name]
        momentum = self.first[name].lerp_(gradient, 1 - settings.muon_momentum)
        change = orthogonal(gradient.lerp(momentum, settings.muon_momentum))
        lr = scale * settings.muon_lr
        parameter.mul_(1 - lr * DECAY).add_(change, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _adamw(self, name: str, parameter: Tensor, gradient: Tensor, scale: float) -> None:
        settings, (beta1, beta2), lr = self.settings, (BETAS[0], self.settings.beta2), scale * self.settings.lr
        first = self.first[name].lerp_(gradient, 1 - beta1) / (1 - beta1**self.num_steps)
        second = self.second[name].lerp_(gradient.square(), 1 - beta2) / (1 - beta2**self.num_steps)
        if name in self.slow:
            slow = self.slow[name].lerp_(gradient, 1 - settings.slow_beta) / (1 - settings.slow_beta**self.num_steps)
            first = first.lerp(slow, settings.slow)
        parameter.mul_(1 - lr * DECAY).addcdiv_(first, second.sqrt() + 1e-8, value=-lr)


def by_rows_and_columns(second: Tensor) -> Tensor:
    """Second moments as they are told: of a matrix the product of the means of rows and columns over that of all."""
    if second.ndim < 3:
        return second
    rows, columns = second.mean(2, keepdim=True), second.mean(1, keepdim=True)
    return rows * columns / rows.mean(1, keepdim=True).clamp(min=1e-30)


class Outer:
    """The global model, and what a sync does."""

    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        """Before the first."""
        self.settings, self.parameters = settings, {k: v.clone() for k, v in start.items()}
        self.momentum = {k: torch.zeros_like(v) for k, v in start.items()}

    @torch.no_grad()
    def sync(self, silos: Silos, steps: int, scales: float) -> None:
        """Merge, step, and put all silos on the result. `scales`: of the round's learning rates, their sum."""
        settings = self.settings
        for name, parameter in silos.parameters.items():
            own = self.parameters[name] - parameter
            if name in silos.slides:
                own += silos.slides[name] * scales
            told = by_rows_and_columns(silos.second[name]) if not is_muons(name) else None
            weights = torch.ones_like(own)
            if told is not None and settings.importance:
                weights = told.sqrt() + 1e-8
            merged = (own * weights).sum(0) / weights.sum(0)
            self.momentum[name].mul_(settings.outer_momentum).add_(merged)
            self.parameters[name].sub_(merged + settings.outer_momentum * self.momentum[name], alpha=settings.outer_lr)
            parameter.copy_(self.parameters[name].expand_as(parameter))
            slide = settings.muon_slide if is_muons(name) else settings.slide
            if slide:
                silos.slides[name] = (own - merged) * (slide / scales)
            if told is not None and settings.shared:
                silos.second[name].copy_(told.mean(0).expand_as(told))
            if is_muons(name):
                gradients = silos.sums[name] / steps
                silos.correction[name] = settings.control * (gradients.mean(0) - gradients)
                silos.sums[name].zero_()
            if settings.share_momentum:
                silos.first[name].copy_(silos.first[name].mean(0).expand_as(parameter))


def schedule(step: int, settings: Settings) -> float:
    """A warm-up, then a cosine."""
    shape: Any = {"schedule": "cosine", "warmup": WARMUP, "decay": 0, "min_ratio": settings.end}
    return scheduled_lr(step, lr=1.0, num_steps=settings.steps, **shape)


def run(settings: Settings, text: Text, seed: int) -> dict[str, dict[str, float]]:
    """Train, and return the losses of `valid` and `test`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    order = {name: torch.randperm(len(of["train"]), generator=generator) for name, of in text.items()}
    start = initial(settings, seed)
    silos, outer = Silos(settings, start, len(text) if settings.h else 1), Outer(settings, start)
    begun, scales = 0, 0.0
    for step in range(settings.steps):
        drawn = torch.arange(step * BATCH, (step + 1) * BATCH)
        rows = torch.stack([of["train"][order[name][drawn % len(order[name])]] for name, of in text.items()])
        scale = schedule(step, settings)
        silos.step(rows if settings.h else rows.flatten(0, 1)[None], scale)
        scales += scale
        interval = settings.last_h if step >= settings.steps - settings.last else settings.h
        if settings.h and ((step + 1 - begun) >= interval or step + 1 == settings.steps):
            outer.sync(silos, step + 1 - begun, scales)
            begun, scales = step + 1, 0.0
    final = {k: v[:1].detach() for k, v in silos.parameters.items()}
    return {split: evaluated(final, text, split, settings.layers) for split in ("valid", "test")}


@torch.no_grad()
def evaluated(parameters: dict[str, Tensor], text: Text, split: str, layers: int) -> dict[str, float]:
    """Loss on each corpus."""
    found = {}
    for name, of in text.items():
        parts = of[split][:EVALUATED].split(64)
        found[name] = statistics.fmean(losses(parameters, part[None], layers).item() for part in parts)
    return found


def parsed(words: str) -> Settings:
    """`central`, or settings with commas between."""
    given = dict(word.split("=") for word in words.split(",") if word != "central")
    defaults = dataclasses.asdict(Settings())
    return Settings(**{name: type(defaults[name])(float(value)) for name, value in given.items()})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--report", action="store_true", help="the loss on `test`, not `valid`")
    parser.add_argument("runs", nargs="+")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    text = rows_of(given.corpora, given.directory)
    for words in given.runs:
        found = []
        for seed in given.seeds:
            kept = given.directory / "runs" / f"{words}-{seed}.json"
            if not kept.exists():
                began = time.process_time()
                result = run(parsed(words), text, seed)
                kept.parent.mkdir(exist_ok=True)
                kept.write_text(json.dumps(result | {"seconds": time.process_time() - began}))
            found.append(json.loads(kept.read_text())["test" if given.report else "valid"])
        means = [statistics.fmean(one.values()) for one in found]
        print(f"{words}: {statistics.fmean(means):.4f}  {' '.join(f'{mean:.4f}' for mean in means)}", flush=True)


if __name__ == "__main__":
    main()
