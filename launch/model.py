"""`atoll export`, `eval`, `generate`, `chat`: what becomes of a model when it is trained."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.config.errors import ConfigError
from pretrain.config.paths import expand_home
from pretrain.host.foreign import shown, shown_lines

if TYPE_CHECKING:
    from pretrain.federation.evaluation import Subject
    from pretrain.federation.export import SplitLoss
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
    from pretrain.federation.export import describe_export, export_global_model
    from pretrain.federation.personal import export_personal_model

    if merged and adapter:
        raise ConfigError("--merged: given with --adapter; allowed: one of them")
    if personal and version is not None:
        raise ConfigError(f"--version: {version} given with --personal; allowed: without it, as the newest counts")
    if silo and not personal:
        raise ConfigError("--silo: given without --personal; allowed: with it")
    output = Path(expand_home("--output", str(output)))
    config = load_run(directory)
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


def evaluate(
    where: Where,
    *,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[CORPUS=]SPLIT", help="Packed split, several times, too; default of a run: its silos'."),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(help="Task of lm-evaluation-harness: a YAML file whose data are local; several times, too."),
    ] = None,
    version: Version = None,
    config: Config = None,
    tokenizer: Tokenizer = None,
    publish: Annotated[bool, typer.Option("--publish", help="Sign the losses as a silo, into its store.")] = False,
    label: Annotated[str, typer.Option(help="With --publish: what a model beside the run is called.")] = "",
    silo: Annotated[str, typer.Option(help="With --publish: who signs; default: the only one.")] = "",
    sequence_tokens: Annotated[int | None, typer.Option(help="Tokens of a sequence; default: as trained.")] = None,
    num_sequences: Annotated[
        int | None,
        typer.Option(min=0, help="Sequences, evenly spread over each split; 0: all; default: as the run did."),
    ] = None,
    num_examples: Annotated[int | None, typer.Option(min=1, help="First examples of each task; default: all.")] = None,
    batch_sequences: Annotated[int, typer.Option(min=1, help="Sequences of one forward pass.")] = 8,
    document_masking: Annotated[
        bool | None, typer.Option(help="Keep the documents of a sequence apart; default: as trained.")
    ] = None,
) -> None:
    """Loss of a model on packed text in nats per token, its perplexity, and bits per byte of text; scores of tasks.

    By default of the sequences that the run's own evaluations are of, so that the numbers are the same. With --publish
    they are on the federation's page, too (atoll report).

    [bold]Example:[/bold] atoll eval model --data runs/demo/packed/prose/valid
    """
    if tasks:  # first, as it must be the first to import what could look into a network
        _print_scores(Path(expand_home("model", str(where))), tasks, batch_sequences, num_examples)
        if not (data or publish):
            return
    if (label or silo) and not publish:
        raise ConfigError(f"{'--label' if label else '--silo'}: given without --publish; allowed: with it")
    from pretrain.federation.evaluation import Publisher, open_subject

    where, paths = str(where), config or []
    publisher = Publisher(where, silo, label, paths) if publish else None
    subject = open_subject(where, version=version, paths=paths, tokenizer=tokenizer, publishes=publish)
    if publisher:
        publisher.take(subject)
    splits = _splits(data, publisher.held_out if publisher else subject.held_out, must_be_named=publish)
    options = {"sequence_tokens": sequence_tokens, "document_masking": document_masking, "num_sequences": num_sequences}
    found = _print_losses(subject, splits, options | {"batch_sequences": batch_sequences})
    if publisher:
        print(f"published: {publisher.publish(found)}")


def _splits(data: list[str] | None, held_out: dict[str, Path], *, must_be_named: bool) -> dict[str, Path]:
    """Packed splits by corpus, or by their place where that is not known. Raises ConfigError."""
    if not data and not held_out:
        raise ConfigError("--data, --tasks: none given; allowed: one at least")
    found, known = dict[str, Path](), {place.resolve(): corpus for corpus, place in held_out.items()}
    for given in data or []:
        corpus, equals, place = given.partition("=")
        if not equals or Path(given).exists():
            corpus, place = known.get(Path(given).resolve(), "") if must_be_named else given, given
        if not corpus or not place or corpus in found:
            raise ConfigError(f"--data: {given!r} given; allowed: CORPUS=SPLIT, each corpus once")
        found[corpus] = Path(expand_home("--data", place))
    return found or held_out


def _print_losses(subject: "Subject", splits: dict[str, Path], options: dict[str, Any]) -> "dict[str, SplitLoss]":
    from launch.show.evaluating import Evaluating
    from pretrain.federation.export import evaluate_model

    with Evaluating() as evaluating:
        origin = subject.load, splits, subject.provenance, subject.tokenizer_sha256
        found = evaluate_model(*origin, **options, tell=evaluating.tell)
    for name, split in found.items():
        bits = "" if split.bits_per_byte is None else f"{split.bits_per_byte:.4f} bits/byte  "
        print(
            f"{split.loss:.4f} nats  perplexity {split.perplexity:.2f}  {bits}"
            f"{split.num_sequences} of {split.of_sequences} sequences  {name}"
        )
    return found


def _print_scores(model: Path, tasks: list[Path], batch_sequences: int, num_examples: int | None) -> None:
    from pretrain.federation.tasks import evaluate_tasks

    for score in evaluate_tasks(model, tasks, batch_sequences=batch_sequences, num_examples=num_examples):
        error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        print(f"{score.value:.4f}{error}  {score.metric}  {score.num_examples} examples  {shown(score.task)}")


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
