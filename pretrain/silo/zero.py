"""What knows DeepSpeed's inner names; those of 0.19."""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor

from pretrain.silo.muon import MuonAdamW, Piece


def begin_backward(engine: Any, loss: Tensor) -> None:
    """Prepare the backward pass of a loss that no forward pass of the engine has made."""
    if isinstance(engine.optimizer, ZeROOptimizer):
        engine.optimizer.clear_backward_seen_flag()
    loss.register_hook(lambda _: engine._backward_prologue())


def fp32_masters(engine: Any) -> dict[str, Tensor]:
    """Stage 0 in bf16: name to fp32 master, which DeepSpeed keeps beside the module's parameters."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp16_groups") or not hasattr(optimizer, "fp32_groups"):
        return {}
    names = {id(p): name for name, p in engine.module.named_parameters()}
    return {
        names[id(low)]: high
        for low_group, high_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for low, high in zip(low_group, high_group, strict=True)
    }


def forget_initial_step(optimizer: torch.optim.Optimizer) -> None:
    """DeepSpeed allocates optimizer states by a step on zero gradients; Adam's bias correction must not count it."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0


def muon_pieces(engine: Any, optimizer: MuonAdamW, stage: int) -> dict[Tensor, list[Piece]]:
    """ZeRO 1, 2 and 3: what this rank's flat fp32 partitions hold of Muon's matrices."""
    found: dict[Tensor, list[Piece]] = {}
    for matrix in optimizer.matrices:
        partition, piece = own_piece(engine, matrix, stage)
        found.setdefault(partition, []).append(piece)
    return found


def own_piece(engine: Any, parameter: Any, stage: int) -> tuple[Tensor, Piece]:
    """ZeRO 1, 2 and 3: the flat fp32 partition with this rank's piece of a parameter, which may be empty.

    At stage 3 the pieces of the last ranks are shorter than their room.
    """
    optimizer = engine.optimizer
    if stage < 3:
        group = next(i for i, found in enumerate(optimizer.bit16_groups) if any(p is parameter for p in found))
        start = offset = num_elements = 0
        if (mapping := parameter._hp_mapping) is not None:
            start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
            num_elements = mapping.lp_fragment_address.numel
        piece = Piece(shape=parameter.shape, start=start, offset=offset, num_elements=num_elements)
        return optimizer.single_partition_of_fp32_groups[group], piece
    num_elements = parameter.ds_shape.numel()
    group, offset, room = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = min(dist.get_rank(parameter.ds_process_group) * room, num_elements)
    piece = Piece(shape=parameter.ds_shape, start=start, offset=offset, num_elements=min(room, num_elements - start))
    return optimizer.fp32_partitioned_groups_flat[group], piece


def refresh_module(engine: Any, stage: int) -> None:
    """Copy the fp32 masters into the module that computes, as the optimizer does after its own step.

    tests/distributed/test_engine.py compares the next loss with a plain model.
    """
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
