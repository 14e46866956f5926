"""Device memory that `atoll plan` predicts against what DeepSpeed really takes, at every ZeRO stage.

    python -m launch.start.workers --num-processes 2 -- python -m benchmarks.plan_memory [key=value ...]

An engine is built and makes three inner steps, at stages 0 to 3 one after another. Counted is the highest of any rank:
on a GPU the allocator's own count, on a CPU tensor by tensor (benchmarks.device_memory).
"""

import argparse

import torch
from torch import Tensor

from benchmarks.device_memory import Created
from pretrain.config.keys import RunConfig, SiloConfig
from pretrain.config.load import load_config
from pretrain.plan.bytes import model_shapes
from pretrain.plan.memory import silo_memory
from pretrain.silo.architecture import model_config
from pretrain.silo.batch import Batch
from pretrain.silo.engine import Engine
from pretrain.silo.model import build_initial
from pretrain.silo.ranks import Ranks

MIB = 1 << 20
VOCAB_SIZE = 8192
SETTINGS = [
    "exchange.kind=none",
    "sequence_tokens=128",
    "silos.bench.micro_batch_sequences=2",
    "model.config={model_type: llama, hidden_size: 384, intermediate_size: 1024, num_hidden_layers: 8, "
    f"num_attention_heads: 6, num_key_value_heads: 2, vocab_size: {VOCAB_SIZE}}}",
    "silos.bench.deepspeed.zero_optimization.reduce_bucket_size=2000000",
]


def main() -> None:
    """Plan, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments, ranks = parser.parse_args(), Ranks()
    for stage in range(4):
        layout = [
            f"silos.bench.processes_per_node={ranks.num_ranks}",
            f"silos.bench.global_batch_sequences={2 * ranks.num_ranks}",
            f"silos.bench.deepspeed.zero_optimization.stage={stage}",
        ]
        config = load_config([], [*SETTINGS, *layout, *arguments.overrides])
        silo, shapes = config.silos["bench"], model_shapes(config, VOCAB_SIZE)
        planned = silo_memory(config, "bench", shapes, model_config(config.model, VOCAB_SIZE)).device_bytes[stage]
        own = counted_bytes(config, silo, ranks)
        counted = max(ranks.sum([float(own) * (rank == ranks.rank) for rank in range(ranks.num_ranks)]))
        if ranks.is_leader:
            print(
                f"RESULT {ranks.device.type}, {ranks.num_ranks} ranks, {silo.precision}, {config.inner.optimizer}, "
                f"ZeRO-{stage}: planned {planned / MIB:.1f} MiB, counted {counted / MIB:.1f} MiB, "
                f"ratio {planned / counted:.3f}",
                flush=True,
            )
    ranks.close()


def counted_bytes(config: RunConfig, silo: SiloConfig, ranks: Ranks) -> int:
    """The most that this rank's device holds while an engine is built and trains."""
    parameters = {n: p.detach() for n, p in build_initial(config.model, VOCAB_SIZE).named_parameters()}
    created = Created(patience_seconds=0.02 if ranks.num_ranks > 1 else 0.0)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
        before = torch.cuda.memory_allocated(ranks.device)
        train(config, silo, ranks, parameters)
        return torch.cuda.max_memory_allocated(ranks.device) - before
    with created:
        train(config, silo, ranks, parameters)
    return created.peak_bytes


def train(config: RunConfig, silo: SiloConfig, ranks: Ranks, parameters: dict[str, Tensor]) -> None:
    """Three inner steps on text of zeros, from these parameters on."""
    engine = Engine(config.model, silo, config.inner, vocab_size=VOCAB_SIZE, ranks=ranks)
    engine.write(iter(parameters.items()) if ranks.is_leader else None)
    ids = torch.zeros(silo.micro_batch_sequences, config.sequence_tokens, dtype=torch.long, device=ranks.device)
    for _ in range(3):
        engine.step([Batch(ids, ids)] * (silo.global_batch_sequences // silo.micro_batch_sequences), config.inner.lr)


if __name__ == "__main__":
    main()
