"""`atoll rollout`: a model tries tasks, and what a verifier says was right becomes packed shards."""

from pathlib import Path
from typing import Annotated

import typer

from launch.model import Config, NumTokens, Seed, Temperature, Tokenizer, TopK, TopP, Version, Where
from pretrain.config.paths import expand_home

Tasks = Annotated[
    Path, typer.Option(help='JSON lines: {"prompt": text or messages, ...}, the rest is for the verifier.')
]
VerifierName = Annotated[
    str, typer.Option("--verifier", help="package.module:function, a verify(task, messages) -> bool.")
]
Output = Annotated[
    Path | None, typer.Option(help="Directory of what was tried and the shards of what was right; default: none.")
]


def rollout(
    where: Where,
    *,
    tasks: Tasks,
    verifier: VerifierName,
    output: Output = None,
    samples: Annotated[int, typer.Option(help="Tries of each task.")] = 4,
    keep: Annotated[int, typer.Option(help="Of each task at most so many different right answers.")] = 1,
    num_tokens: NumTokens = 128,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_sequences: Annotated[int, typer.Option(help="Tries of one forward pass.")] = 64,
    time_limit: Annotated[float, typer.Option(help="Seconds that a verifier has for one try.")] = 10.0,
    memory_mib: Annotated[int, typer.Option(help="Memory of a verifier's process.")] = 2048,
    network: Annotated[bool, typer.Option("--network", help="A verifier may reach a network.")] = False,
    sequence_tokens: Annotated[int, typer.Option(help="Tokens of a row; default: as the model was trained.")] = 0,
    version: Version = None,
    config: Config = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Have a model try tasks, ask a verifier of one's own what is right, and pack that as conversations to train on.

    Each try is verified in a process of its own with a time limit and without a network; whatever that does costs the
    one try. Without --output only says how many are right. What was killed goes on with the same command.

    [bold]Example:[/bold] atoll rollout runs/run --tasks tasks.jsonl --verifier ours.checks:verify --output practice
    """
    from pretrain.federation.generate import Sampling
    from pretrain.practice import rollout as practice
    from pretrain.practice.verifier import Limits

    plan = practice.Plan(
        tasks=Path(expand_home("--tasks", str(tasks))),
        verifier=verifier,
        samples=samples,
        keep=keep,
        sampling=Sampling(num_tokens=num_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        batch_sequences=batch_sequences,
        limits=Limits(seconds=time_limit, memory_bytes=memory_mib << 20, network=network),
    )
    plan.check()
    practice.read_tasks(plan.tasks)  # a mistake must not cost the loading of a model
    options = {"version": version, "paths": config, "tokenizer": tokenizer, "sequence_tokens": sequence_tokens}
    trier = practice.open_trier(str(where), **options)  # type: ignore[arg-type]
    if output is None:
        print(practice.score(trier, plan, say=_say).words())
        return
    output = Path(expand_home("--output", str(output)))
    outcome = practice.rollout(trier, plan, output, say=_say)
    print(outcome.words())
    print(
        f"kept {outcome.kept:,} in {outcome.rows:,} rows: {output / practice.PACKED / 'train'}, recipe "
        f"{outcome.recipe_sha256[:12]}"
    )


def _say(line: str) -> None:
    print(line, flush=True)
