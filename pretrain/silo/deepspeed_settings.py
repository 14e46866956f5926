"""DeepSpeed's own configuration: the user's section, completed by what our keys decide."""

from typing import Any

from pretrain.config.errors import ConfigError
from pretrain.config.keys import InnerConfig, SiloConfig


def deepspeed_config(silo: SiloConfig, inner: InnerConfig) -> dict[str, Any]:
    """The user's DeepSpeed section, completed by what our own keys decide; accumulation follows, on all ranks.

    Without ZeRO and in fp32 DeepSpeed keeps no norm of the gradient: we take it, and clip by it.
    """
    is_plain = silo.precision == "fp32" and not silo.zero_stage
    # A private silo adds up gradients itself.
    batch = {"gradient_accumulation_steps": 1} if silo.is_private else {"train_batch_size": silo.global_batch_sequences}
    return {
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": inner.optimizer != "muon",  # its AdamW is DeepSpeed's, inside of ours
        **silo.deepspeed,
        **batch,
        "train_micro_batch_size_per_gpu": silo.micro_batch_sequences,
        "gradient_clipping": 0.0 if is_plain else inner.clip_norm,
        "bf16": {"enabled": silo.precision == "bf16"},
    }


def has_optimizer_on_host(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed's settings offload it. Raises ConfigError for what would lie on a disk."""
    devices = [
        settings.get("zero_optimization", {}).get(part, {}).get("device")
        for part in ("offload_optimizer", "offload_param")
    ]
    if "nvme" in devices:
        raise ConfigError("deepspeed.zero_optimization: offload to nvme given; allowed: none, cpu")
    return devices[0] == "cpu"
