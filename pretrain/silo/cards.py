"""What the makers of cards say of them: their peak, against which a silo's use of them (MFU) is told."""

from typing import TYPE_CHECKING

import torch

from pretrain.config.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.silo.ranks import Ranks

# TFLOP/s of one device as torch names it: products of dense 16-bit matrices, sums in fp32. The sheets of NVIDIA tell
# twice as much from Ampere on, with sparsity. bf16, but for V100 and T4, which have fp16 only. Exact names: a part of a
# card (MIG) is none of them.
PEAK_TFLOPS = {
    # NVIDIA A100 data sheet
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    # NVIDIA H100 data sheet: 1,979 (SXM), 1,513 (PCIe), 1,671 (NVL) with sparsity
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    # NVIDIA GH200 data sheet; H200 data sheet: 1,979 (SXM), 1,671 (NVL) with sparsity
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    # NVIDIA Blackwell data sheet: HGX B200, and GB200, 4.5 and 5 PFLOP/s with sparsity
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    # Data sheets of NVIDIA L40S (733 with sparsity), L4 (242), A10 (250), A40 (299.4), A30 (330)
    "NVIDIA L40S": 362.05,
    "NVIDIA L4": 121.0,
    "NVIDIA A10": 125.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A30": 165.0,
    # NVIDIA Ada and GA102 architecture white papers: tensor cores, bf16 with sums in fp32
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.2,
    # NVIDIA V100 and T4 data sheets
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla V100-SXM2-32GB": 125.0,
    "Tesla V100-PCIE-16GB": 112.0,
    "Tesla V100-PCIE-32GB": 112.0,
    "Tesla T4": 65.0,
    # AMD Instinct data sheets; of MI250X, 383, torch sees two devices
    "AMD Instinct MI250X": 191.5,
    "AMD Instinct MI300X": 1307.4,
    "AMD Instinct MI325X": 1307.4,
}


def card_name(device: torch.device) -> str:
    """As torch has it; a CPU's is empty."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def peak_flops(device: torch.device) -> float | None:
    """Operations a second of one device, or None of one that is not in the table, as every CPU."""
    tflops = PEAK_TFLOPS.get(card_name(device))
    return None if tflops is None else tflops * 1e12


def summed_peak_flops(ranks: "Ranks") -> float | None:
    """Of all devices of a silo; None if one of them is not known. All ranks must call it."""
    own = peak_flops(ranks.device)
    total, num_unknown = ranks.sum([own or 0.0, float(own is None)])
    return None if num_unknown else total


def has_bf16(device: torch.device) -> bool:
    """Whether this process's device computes in bf16; NVIDIA's before Ampere only pretend to, slower than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    from deepspeed.accelerator import get_accelerator  # only who trains waits for it

    return get_accelerator().is_bf16_supported()


def check_precision(silo: str, precision: str, ranks: "Ranks") -> None:
    """Raise ConfigError, on all ranks alike, for bf16 on a card that has none. All ranks must call it."""
    lacks = precision == "bf16" and not has_bf16(ranks.device)
    (num_lacking,) = ranks.sum([float(lacks)])
    if num_lacking:
        which = f"{num_lacking:.0f} of its {ranks.num_ranks} ranks"
        card = f"a card ({card_name(ranks.device)})" if lacks else "a card"
        raise ConfigError(
            f"silos.{silo}.precision: 'bf16' given; {which} has {card} that does not compute in it; allowed: fp32, or "
            "cards that have bf16 (of NVIDIA's, from A100 on)"
        )
