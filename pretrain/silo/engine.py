"""DeepSpeed: build, step, and read and write fp32 parameters at every ZeRO stage.

All that knows DeepSpeed's inner names is in zero.py.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch._dynamo  # GPT-2 would load it while it is built, which fails inside zero.Init's replaced constructors
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn

from pretrain.config.errors import ConfigError
from pretrain.config.keys import InnerConfig, ModelConfig, SiloConfig
from pretrain.silo.activations import checkpoint_activations
from pretrain.silo.adapter import Turns
from pretrain.silo.attention import DOCUMENTS
from pretrain.silo.base import fill_base
from pretrain.silo.batch import IGNORED, Batch
from pretrain.silo.copies import HostCopies
from pretrain.silo.deepspeed_settings import deepspeed_config, has_optimizer_on_host
from pretrain.silo.extensions import load_extension
from pretrain.silo.model import (
    build_empty,
    check_causality,
    check_chunks,
    check_document_masking,
    compile_layers,
    go_by_documents,
    restore_buffers,
    target_losses,
    token_losses,
)
from pretrain.silo.muon import MuonAdamW, Piece
from pretrain.silo.named_state import PARAMETER, STATE, SavedState, save_pieces
from pretrain.silo.optim import MEAN_STEPS, build_optimizer
from pretrain.silo.personal import Personal
from pretrain.silo.preference import Objective
from pretrain.silo.prompt import check_prompt, num_prompt_tokens
from pretrain.silo.ranks import Ranks
from pretrain.silo.zero import begin_backward, forget_initial_step, fp32_masters, muon_pieces, own_piece, refresh_module


def _build(
    model: ModelConfig,
    silo: SiloConfig,
    vocab_size: int,
    partitioned: AbstractContextManager[Any] | None,
    attention: str,
    *,
    reads: bool,
) -> nn.Module:
    """What computes. Its trained parameters are about to be overwritten; what is frozen, the leader `reads`."""
    dtype = torch.bfloat16 if silo.precision == "bf16" else torch.float32
    module = build_empty(model, vocab_size, dtype=dtype, partitioned=partitioned, attention=attention)
    if model.checkpoint and model.adapter.is_on:
        fill_base(module, model.checkpoint, reads=reads, is_partitioned=partitioned is not None)
    if silo.activation_checkpointing != "none":
        checkpoint_activations(module, silo)
    return module


class Engine:
    """One silo's DeepSpeed engine. Every method that touches parameters must be called by all ranks."""

    def __init__(
        self,
        model: ModelConfig,
        silo: SiloConfig,
        inner: InnerConfig,
        *,
        vocab_size: int,
        ranks: Ranks,
        mask_at: int | None = None,
        sums_gradients: bool = False,
    ) -> None:
        """Parameters must be written or loaded next. `mask_at`: see `model.token_losses`.

        `sums_gradients`: for `take_mean_gradient` and `correct_gradients`.
        """
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        settings = deepspeed_config(silo, inner)
        offloaded = has_optimizer_on_host(settings)
        self.stage = silo.zero_stage
        partitioned = deepspeed.zero.Init(config_dict_or_path=settings) if self.stage == 3 else None
        stated = silo.attention or (model.config or {}).get("attn_implementation")
        by_mask = stated or ranks.device.type != "cpu"
        self._by_documents = silo.attention == DOCUMENTS or (mask_at is not None and not by_mask)
        attention = "" if self._by_documents else silo.attention
        module = _build(model, silo, vocab_size, partitioned, attention, reads=ranks.is_leader)
        self.turns, self.personal = Turns(module, model.adapter), Personal(module, silo.personal_adapter)
        self._cross_entropy = target_losses
        if silo.compile:
            compile_layers(module)
            self._cross_entropy = torch.compile(target_losses, dynamic=False)
        if offloaded:
            load_extension("CPUAdamBuilder", ranks.waits_for)
        optimizer = build_optimizer(
            module.named_parameters(),
            inner,
            on_cpu=offloaded,
            fused=silo.fused_adamw,
            sums_gradients=sums_gradients,
            turns=self.turns.of | self.personal.turns,
        )
        self._deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self._deepspeed.module.train()
        if partitioned:
            restore_buffers(self.module, model, vocab_size)
        self._parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._masters = fp32_masters(self._deepspeed)
        self._ranks = ranks
        self.copies = HostCopies(ranks.device, of_gathered=self.stage > 0)
        self._precision, self._optimizer_name, self._clip_norm = silo.precision, inner.optimizer, inner.clip_norm
        self._mask_at, self._chunk_tokens, self._asked = mask_at, silo.loss_chunk_tokens, bool(silo.attention)
        self._optimizer, self.objective = optimizer, Objective(inner)
        self._counts_in_numbers = offloaded  # DeepSpeed's AdamW; torch's has a tensor
        self._count_device = ranks.device if silo.fused_adamw else torch.device("cpu")  # where the kernel wants it
        forget_initial_step(optimizer)
        if isinstance(optimizer, MuonAdamW):
            optimizer.place(muon_pieces(self._deepspeed, optimizer, self.stage) if self.stage else {}, ranks.device)
        if own := {name: self._shape(name) for name in self._parameters if name in self.personal.names}:
            self.write(self.personal.initial(own, model.seed) if ranks.is_leader else None, list(own))

    @property
    def module(self) -> nn.Module:
        """The model that computes, in the silo's precision; its parameters may be partitioned."""
        return self._deepspeed.module

    @property
    def layout(self) -> dict[str, Any]:
        """How its ranks share what they keep; a checkpoint of any other can be loaded."""
        return {"num_ranks": self._ranks.num_ranks, "stage": self.stage, "precision": self._precision}

    @property
    def terms(self) -> dict[str, Any]:
        """What its checkpoints can only be loaded with; by the name of what to change."""
        shapes = json.dumps({name: list(shape) for name, shape in self.shapes.items()})
        return {
            "optimizer": self._optimizer_name,
            "model": hashlib.sha256(shapes.encode()).hexdigest()[:12],
        }

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name to shape of every trained parameter that others know, in model order: not of the silo's own adapter."""
        return {name: self._shape(name) for name in self._parameters if name not in self.personal.names}

    def _shape(self, name: str) -> torch.Size:
        parameter = self._parameters[name]
        return getattr(parameter, "ds_shape", parameter.shape)

    def step(
        self,
        micro_batches: Iterable[Batch],
        lr: float,
        part: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> tuple[float, float]:
        """One inner step over this rank's micro batches, along the mean gradient of all targets of all ranks.

        `lr` is the schedule's; Muon's matrices take it times muon_lr / lr of the configuration. `part` is put around
        each forward, backward and optimizer.
        Returns a loss in nats whose mean over the ranks is that of all targets, and the gradient's L2 norm before
        clipping.
        """
        self._set_lr(lr)
        losses = []
        for batch in micro_batches:
            with part("forward"):
                loss = self._part_of_mean(*self.objective.of_step(self.token_losses(batch), batch))
            with part("backward"):
                self._deepspeed.backward(loss)
            losses.append(loss.detach())
            with part("optimizer"):
                own_norm = self._use_gradient()
        return torch.stack(losses).mean().item(), self._norm(own_norm)

    def _part_of_mean(self, losses: Tensor, num_trained: int | None) -> Tensor:
        """What of a micro batch's losses makes, averaged over micro batches and ranks, the mean over all targets.

        Where not every target has a loss, micro batches have unlike numbers of them, so a mean of their means would
        weigh a target by how few there are beside it. A step of which not one target has a loss has no gradient.
        """
        if num_trained is None:
            return losses.mean()
        num_parts = self._deepspeed.gradient_accumulation_steps() * self._ranks.num_ranks
        return losses.sum() * (num_parts / max(1, num_trained))

    def sequence_gradients(self, batch: Batch) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Losses and gradients of their mean, in the order of `shapes`, of one sequence of a micro batch after another.

        A sequence of which no target has a loss is left out. At ZeRO 0 to 2. Nothing is accumulated, and no other rank
        takes part.
        """
        for row in batch.split():
            num_trained = row.targets.numel() if row.num_trained is None else int((row.targets != IGNORED).sum())
            if num_trained:
                losses = self._token_losses(self.module, row)
                mean = losses.mean() if row.num_trained is None else losses.sum() / num_trained
                gradients = torch.autograd.grad(mean, [*self._parameters.values()], materialize_grads=True)
                yield losses.detach(), gradients

    def step_along(self, gradients: Iterable[Tensor], lr: float) -> float:
        """One inner step by gradients that are made elsewhere; returns their L2 norm before clipping.

        They are fp32, whole, the same on all ranks, and in the order of `shapes`. At ZeRO 0 to 2.
        """
        self._set_lr(lr)
        parts = zip(self._parameters.values(), gradients, strict=True)
        along = torch.stack([(parameter.float() * gradient).sum() for parameter, gradient in parts]).sum()
        begin_backward(self._deepspeed, along)
        self._deepspeed.backward(along)  # hands each parameter its gradient as DeepSpeed wants it
        return self._norm(self._use_gradient())

    def _set_lr(self, lr: float) -> None:
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"] if self.turns.trains(group["turn"]) else 0.0

    def _use_gradient(self) -> float | None:
        """After a backward pass: what DeepSpeed does then; the norm as `_clip_own_gradient` says."""
        own_norm = self._clip_own_gradient()
        self.copies.hold()
        self._deepspeed.step()
        return own_norm

    def _norm(self, own_norm: float | None) -> float:
        return float(self._deepspeed.get_global_grad_norm() if own_norm is None else own_norm)

    def _clip_own_gradient(self) -> float | None:
        """In plain fp32, at the last micro batch of a step: clip the gradient, and say what its norm was."""
        if self.stage or self._masters or not self._deepspeed.is_gradient_accumulation_boundary():
            return None
        trained = [p for p in self._parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        found = norm.item()
        if 0 < self._clip_norm < found:
            torch.nn.utils.clip_grads_with_norm_(trained, self._clip_norm, norm)
        return found

    def forget_optimizer(self) -> None:
        """Start the inner optimizer anew: what it remembers of gradients is zero."""
        for state in self._optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        forget_initial_step(self._optimizer)

    @property
    def num_skipped_steps(self) -> int:
        """Inner steps that DeepSpeed dropped because a gradient was not finite."""
        return int(self._deepspeed.skipped_steps)

    def token_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy in nats of every target, 0 of IGNORED ones, (num_sequences, sequence_tokens)."""
        return self._token_losses(self._deepspeed, batch)

    def values(self, batch: Batch) -> tuple[Tensor, ...]:
        """What evaluations are means of: see Objective."""
        return self.objective.values(self.token_losses(batch), batch)

    def _token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        placed = batch.placed(lambda tensor: tensor.to(self._ranks.device))
        return token_losses(
            model,
            placed.inputs,
            placed.targets,
            self._mask_at,
            positions=placed.positions,
            chunk_tokens=self._chunk_tokens,
            cross_entropy=self._cross_entropy,
        )

    def check_sight(self) -> None:
        """Raise ConfigError, on all ranks alike, when a token of this model sees what it must not.

        That is a later token, and another document where they are to be kept apart. Or where its loss cannot be had in
        chunks that are asked for.
        """
        self.evaluating(True)
        with torch.compiler.set_stance("force_eager"):  # compiling for these few short rows would take minutes
            check_causality(self._deepspeed, self._ranks.device)
            if self._mask_at is not None:
                if self._by_documents and (why := go_by_documents(self._deepspeed, self._mask_at, self._ranks.device)):
                    self._use_a_mask(why)
                check_document_masking(self._deepspeed, self._mask_at, self._ranks.device)
            if num_prompt_tokens(self.module):
                check_prompt(self._deepspeed, self._ranks.device)
            if self._chunk_tokens:
                check_chunks(self._deepspeed, self._chunk_tokens, self._ranks.device)
        self.evaluating(False)

    def _use_a_mask(self, why: str) -> None:
        """Where a type of model asks attention for more. Raises ConfigError if that was not left to us."""
        if self._asked:
            raise ConfigError(f"silo.attention: {DOCUMENTS!r} given; allowed for this type of model: sdpa: {why}")
        if self._ranks.is_leader:
            print(f"silo.attention: documents are kept apart by a mask: {why}", flush=True)

    def read(self, name: str) -> Tensor:
        """The whole fp32 parameter `name` on this rank's device; gathers one tensor, at no stage the model."""
        parameter = self._parameters[name]
        if self.stage == 0:
            return self._masters.get(name, parameter).detach()
        return safe_get_full_fp32_param(parameter)

    def write(self, values: Iterator[tuple[str, Tensor]] | None, names: Sequence[str] | None = None) -> None:
        """Replace parameters (`names`, or all in model order) by the leader's fp32 `values`; other ranks pass None.

        Writes the fp32 masters and then the module that computes: DeepSpeed's own setter leaves the latter stale.
        """
        self.copies.hold()
        for name in self.shapes if names is None else names:
            shape = self._shape(name)
            if values is not None:
                given_name, given = next(values)
                assert (given_name, given.shape) == (name, shape)
                value = given.to(self._ranks.device).contiguous()  # itself, where it is in host memory anyway
            else:
                value = torch.empty(shape, dtype=torch.float32, device=self._ranks.device)
            if self._ranks.num_ranks > 1:
                dist.broadcast(value, src=0)
            self._write_one(name, value)
            del value  # before the next one is made
        refresh_module(self._deepspeed, self.stage)

    def _write_one(self, name: str, value: Tensor) -> None:
        parameter = self._parameters[name]
        if self.stage == 3:  # DeepSpeed's own setter fails where the ranks' parts are not equal
            partition, piece = own_piece(self._deepspeed, parameter, self.stage)
            partition.data[piece.in_partition] = value.flatten()[piece.in_matrix]
        elif self.stage:
            safe_set_full_fp32_param(parameter, value)
        else:
            parameter.data.copy_(value)
            if name in self._masters:
                self._masters[name].data.copy_(value)

    def read_second_moment(self, name: str) -> Tensor:
        """The whole second moment of a parameter that AdamW trains, bias-corrected; fp32, on this rank's device."""
        return self._read_state(name, "exp_avg_sq", self._bias_correction)

    def write_second_moment(self, name: str, value: Tensor | None) -> None:
        """Replace the second moment of a parameter by the leader's `value`, fp32, with Adam's bias correction.

        Nowhere does it become less than what the gradients in the first moment make at least: `value` may be older than
        a word's first gradients, and Adam would divide them by next to nothing. Other ranks pass None. A parameter that
        was not trained yet has no second moment, and keeps none.
        """
        whole, (state, piece) = self._from_leader(name, value), self._state_of(name)
        if state:
            own = whole[piece.in_matrix] * self._bias_correction(state)
            # (sum of w g)^2 <= sum of w g^2 for weights w of a sum up to 1; those of the moments differ by this factor.
            first, (decay, second_decay) = state["exp_avg"].view(-1)[piece.in_partition], self._betas
            least = first.square() * ((1 - second_decay) / (1 - decay))
            state["exp_avg_sq"].view(-1)[piece.in_partition] = torch.maximum(own.to(least.device), least)

    def take_mean_gradient(self, name: str, num_steps: int) -> Tensor:
        """The mean of Muon's gradients of a matrix, clipped as they were, in the `num_steps` since it was last taken.

        A shorter time than MEAN_STEPS is too noisy: it counts in proportion, and what was told before for the rest.
        fp32, whole, on this rank's device.
        """
        state, piece = self._state_of(name)
        if state:
            own, told = (state[key].view(-1)[piece.in_partition] for key in ("gradient_sum", "told"))
            told.lerp_(own / num_steps, min(1.0, num_steps / MEAN_STEPS))
            own.zero_()
        return self._read_state(name, "told", lambda _: 1.0)

    def correct_gradients(self, name: str, correction: Tensor | None) -> None:
        """From now on add the leader's `correction`, fp32, to each of Muon's gradients of a matrix.

        Other ranks pass None. A matrix that was not trained yet is not corrected.
        """
        whole, (state, piece) = self._from_leader(name, correction), self._state_of(name)
        if state:
            state["correction"].view(-1)[piece.in_partition] = whole[piece.in_matrix]

    def _read_state(self, name: str, key: str, divisor: Callable[[dict[str, Any]], float]) -> Tensor:
        state, piece = self._state_of(name)
        whole = torch.zeros(self.shapes[name].numel(), dtype=torch.float32, device=self._ranks.device)
        if state:
            own = state[key].flatten()[piece.in_partition]
            whole[piece.in_matrix] = own.to(whole.device) / divisor(state)
        if self.stage:
            dist.all_reduce(whole)  # the ranks' pieces do not overlap, so the sum is exact
        return whole.view(self.shapes[name])

    def _from_leader(self, name: str, value: Tensor | None) -> Tensor:
        """The leader's value for a parameter, flat, fp32, on every rank's device."""
        buffer = torch.empty(self.shapes[name], dtype=torch.float32, device=self._ranks.device)
        if value is not None:
            buffer.copy_(value)
        if self._ranks.num_ranks > 1:
            dist.broadcast(buffer, src=0)
        return buffer.flatten()

    def _state_of(self, name: str) -> tuple[dict[str, Any], Piece]:
        """This rank's state of the inner optimizer for a parameter, and which piece of it that has."""
        partition, piece = self._partition_of(name)
        return self._optimizer.state.get(partition, {}), piece

    def _partition_of(self, name: str) -> tuple[Tensor, Piece]:
        """This rank's fp32 values, and which piece of a parameter they hold."""
        parameter, shape = self._parameters[name], self._shape(name)
        if self.stage:
            return own_piece(self._deepspeed, parameter, self.stage)
        piece = Piece(shape=shape, start=0, offset=0, num_elements=shape.numel())
        return self._masters.get(name, parameter), piece

    def _bias_correction(self, state: dict[str, Any]) -> float:
        """By which Adam divides its second moment; at least that of one step."""
        return 1.0 - self._betas[1] ** max(1, int(state["step"]))

    @property
    def _betas(self) -> tuple[float, float]:
        """AdamW's decay rates; Muon's group, if there is one, is the first."""
        return self._optimizer.param_groups[-1]["betas"]

    def evaluating(self, on: bool) -> None:
        """Switch dropout and the like off or on again."""
        self._deepspeed.train(not on)

    def save(self, directory: Path) -> None:
        """Every rank writes what it keeps: fp32 parameters and inner optimizer state, by name."""
        pieces = {name: self._own_part(name) for name in self._parameters}
        states = {name: self._optimizer.state.get(partition, {}) for name, (partition, _) in pieces.items()}

        def of_kind(kind: str) -> dict[str, tuple[int, Tensor]]:
            values = {
                name: partition if kind == PARAMETER else states[name].get(kind)
                for name, (partition, _) in pieces.items()
            }
            return {
                name: (piece.start, values[name].view(-1)[piece.in_partition])
                for name, (_, piece) in pieces.items()
                if values[name] is not None
            }

        # A step is one number of a whole tensor, though some optimizers keep it as one.
        found = (item for state in states.values() for item in state.items())
        tensors = {kind for kind, value in found if isinstance(value, Tensor) and kind != "step"}
        steps = {name: int(state["step"]) for name, state in states.items() if "step" in state}
        kinds = [PARAMETER, *sorted(tensors)]
        save_pieces(directory / STATE, self._ranks.rank, ((kind, of_kind(kind)) for kind in kinds), steps)

    def _own_part(self, name: str) -> tuple[Tensor, Piece]:
        """This rank's fp32 values of a parameter, and which piece of it a checkpoint takes from there.

        Without ZeRO every rank has all, and writes its share.
        """
        partition, piece = self._partition_of(name)
        if self.stage:
            return partition, piece
        bounds = [piece.num_elements * rank // self._ranks.num_ranks for rank in range(self._ranks.num_ranks + 1)]
        start, stop = bounds[self._ranks.rank : self._ranks.rank + 2]
        return partition, dataclasses.replace(piece, start=start, offset=start, num_elements=stop - start)

    def load(self, directory: Path) -> None:
        """Every rank reads what it keeps, whatever ranks, ZeRO stage and precision it was written with.

        Raises ConfigError.
        """
        saved = SavedState(directory / STATE)
        self.forget_optimizer()
        for name, parameter in self._parameters.items():
            if name in self.personal.names and not saved.holds(name):
                continue  # it begins here
            partition, piece = self._partition_of(name)

            def fill(value: Tensor, kind: str, name: str = name, piece: Piece = piece) -> None:
                own = saved.read(kind, name, piece.start, piece.num_elements)
                value.data.view(-1)[piece.in_partition] = own.to(value.device)

            fill(partition, PARAMETER)
            if not self.stage and partition is not parameter:
                parameter.data.copy_(partition)
            kinds = saved.kinds(name)
            state = self._optimizer.state[partition] if kinds else {}
            for kind in kinds:
                fill(state.setdefault(kind, torch.zeros_like(partition, requires_grad=False)), kind)
            if name in saved.steps:
                state["step"] = self._step_count(saved.steps[name])
        refresh_module(self._deepspeed, self.stage)

    def _step_count(self, num_steps: int) -> Tensor | int:
        """As the inner optimizer counts."""
        return num_steps if self._counts_in_numbers else torch.tensor(float(num_steps), device=self._count_device)
