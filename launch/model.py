"""`atoll export`, `generate`, `chat`: what becomes of a model when it is trained."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.config.errors import ConfigError
from pretrain.config.paths import expand_home
from pretrain.host.foreign import shown_lines

if TYPE_CHECKING:
    from pretrain.federation.generate import Message, Sampling, Speaker, Spoken

Where = Annotated[str, typer.Argument(help="Exported directory, run directory, or URL of a store.")]
Version = Annotated[int | None, typer.Option(help="Of a run or a store; default: the newest.")]
Config = Annotated[
    list[Path] | None, typer.Option("--config", "-c", help="Own YAML file, where WHERE is the URL of a store.")
]
Tokenizer = Annotated[Path | None, typer.Option(help="The run's, with a URL and no configuration.")]
NumTokens = Annotated[int, typer.Option(help="New ones at most; a model ends earlier where it ends a document.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Only so many of the likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Only the likeliest tokens that together have this probability.")]
Seed = Annotated[int, typer.Option(help="The same one says the same.")]


def export(
    directory: Annotated[Path, typer.Argument(help="Run directory.")],
    *,
    output: Annotated[Path, typer.Option(help="Directory to make; must not exist.")],
    version: Annotated[int | None, typer.Option(help="Version of the global parameters; default: the newest.")] = None,
    current: Annotated[
        bool, typer.Option("--current", help="The current version, by the contract's gate, instead of the newest.")
    ] = False,
    license: Annotated[str, typer.Option(help="For the model card, as model hubs name it: apache-2.0.")] = "",
    merged: Annotated[
        bool, typer.Option("--merged", help="Of an adapter: a whole model, with it in its base.")
    ] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="Of an adapter: a peft directory, without base.")] = False,
    personal: Annotated[
        bool, typer.Option("--personal", help="A silo's own: with its personal adapter beside the shared one.")
    ] = False,
    silo: Annotated[str, typer.Option(help="With --personal: whose; default: the only one that has one.")] = "",
) -> None:
    """Write the global model as a transformers directory with tokenizer and model card, or an adapter for peft.

    With --personal, a silo's own model from its newest checkpoint, which no other party has.

    [bold]Example:[/bold] atoll export runs/demo --output model --license apache-2.0
    """
    from launch.show.run import held_out_of
    from pretrain.config.load import load_run
    from pretrain.federation.current import current_version
    from pretrain.federation.export import describe_export, export_global_model, open_ledger
    from pretrain.federation.personal import export_personal_model

    if merged and adapter:
        raise ConfigError("--merged: given with --adapter; allowed: one of them")
    if personal and version is not None:
        raise ConfigError(f"--version: {version} given with --personal; allowed: without it, as the newest counts")
    if current and (personal or version is not None):
        raise ConfigError("--current: given with --version or --personal; allowed: without them")
    if silo and not personal:
        raise ConfigError("--silo: given without --personal; allowed: with it")
    output = Path(expand_home("--output", str(output)))
    config = load_run(directory)
    if current:
        version = current_version(config, open_ledger(config))
    options: dict[str, Any] = {
        "form": "merged" if merged else "adapter" if adapter else "",
        "license": license,
        "held_out": lambda found: held_out_of(config, found.get("version"), found.get("personal")),
    }
    if personal:
        provenance = export_personal_model(config, output, silo=silo, **options)
    else:
        provenance = export_global_model(config, output, version, **options)
    print(describe_export(config, output, provenance))


def generate(
    where: Where,
    *,
    prompt: Annotated[str, typer.Option(help="What the text begins with; -: read it from stdin.")],
    num_tokens: NumTokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    version: Version = None,
    config: Config = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Write what a model goes on with, as it comes: stdout has the text alone.

    Characters that a terminal would obey are spelled out.

    [bold]Example:[/bold] atoll generate runs/demo --prompt "The court finds"
    """
    from pretrain.federation.generate import Sampling, open_speaker

    sampling = Sampling(num_tokens=num_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    speaker = open_speaker(where, version=version, paths=config, tokenizer=tokenizer)
    began = time.monotonic()
    spoken = _interruptible(lambda: speaker.go_on(text, sampling, _say))
    print(flush=True)
    if spoken is None:
        raise typer.Exit(130)
    seconds = time.monotonic() - began
    print(
        f"{speaker.name}: {spoken.num_tokens} new tokens in {seconds:.1f} s{_beyond(speaker, spoken)}", file=sys.stderr
    )


def chat(
    where: Where,
    *,
    system: Annotated[str, typer.Option(help="What the model is told first; only with a chat template.")] = "",
    num_tokens: NumTokens = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    version: Version = None,
    config: Config = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Talk to a model, a line at a time, in the form of its tokenizer's chat template.

    Without a template each line is continued by itself, which is said. Ctrl-C ends an answer, Ctrl-D all.

    [bold]Example:[/bold] atoll chat model
    """
    from pretrain.federation.generate import Sampling, open_speaker

    sampling = Sampling(num_tokens=num_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    speaker = open_speaker(where, version=version, paths=config, tokenizer=tokenizer)
    if system and not speaker.has_template:
        raise ConfigError("--system: given; this model has no chat template; allowed: with a model that has one")
    form = "its chat template" if speaker.has_template else "no chat template: each line is continued by itself"
    print(f"{speaker.name}: {form}; Ctrl-D ends", file=sys.stderr, flush=True)
    _converse(speaker, sampling, [{"role": "system", "content": system}] if system else [])


def _converse(speaker: "Speaker", sampling: "Sampling", messages: "list[Message]") -> None:
    """Until there is no more to read. A line that is too long is said, and not the end."""
    if is_terminal := sys.stdin.isatty():
        import readline  # noqa: F401 (from then on `input` has a history)
    while True:
        try:
            line = input("> " if is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        pieces: list[str] = []

        def emit(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            _say(piece)

        try:
            if speaker.has_template:
                messages.append({"role": "user", "content": line})
                spoken = _interruptible(lambda: speaker.answer(messages, sampling, emit))
                messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                spoken = _interruptible(lambda text=line: speaker.go_on(text, sampling, emit))  # type: ignore[misc]
        except ConfigError as error:
            print(f"atoll: {error}", file=sys.stderr)
            del messages[-1:]  # what was not answered was not said
            spoken = None
        print(flush=True)
        if spoken and spoken.is_cut:
            print(f"cut after {spoken.num_tokens} tokens{_beyond(speaker, spoken)}", file=sys.stderr)


def _say(piece: str) -> None:
    print(shown_lines(piece), end="", flush=True)


def _interruptible(speak: "Callable[[], Spoken]") -> "Spoken | None":
    """What became of it; None if somebody had enough before."""
    try:
        return speak()
    except KeyboardInterrupt:
        return None


def _beyond(speaker: "Speaker", spoken: "Spoken") -> str:
    """What there is to know of how long a text is."""
    whole = spoken.num_given + spoken.num_tokens
    if spoken.is_cut:
        return f": no more fit the {speaker.positions:,} positions of this model after {spoken.num_given:,} given"
    if speaker.trained_tokens is None or whole <= speaker.trained_tokens:
        return ""
    return f", with the {spoken.num_given:,} given more than the {speaker.trained_tokens:,} of a sequence in training"
