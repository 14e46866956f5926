"""`atoll eval`: what a model is worth on text or conversations that it has not seen."""

import sys
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.model import Config, Tokenizer, Version, Where
from pretrain.config.errors import ConfigError
from pretrain.config.paths import expand_home

if TYPE_CHECKING:
    from data_tools.chat_template import Template
    from pretrain.federation.evaluation import Subject
    from pretrain.federation.held_out import SplitLoss


Data = Annotated[
    list[str] | None,
    typer.Option(metavar="[CORPUS=]SPLIT", help="Packed split, several times, too; default of a run: its silos'."),
]
Chat = Annotated[bool, typer.Option("--chat", help="The data are conversations: packed splits, or JSON lines.")]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(help="Of files, where the model has no template, as a base may be."),
]
ChatDate = Annotated[str, typer.Option(help="YYYY-MM-DD, for a template that writes today's date.")]
Tools = Annotated[
    list[str] | None,
    typer.Option(metavar="[SILO=]FILE", help="Questions whose right calls are known, JSON lines; several times, too."),
]
Answers = Annotated[Path | None, typer.Option(help="With --tools: keep what is answered there, and go on from it.")]
NumTokens = Annotated[int, typer.Option(min=1, help="With --tools: tokens of an answer, at most.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(help="Task of lm-evaluation-harness: a YAML file, or a name below --include-path; several, too."),
]
IncludePath = Annotated[Path | None, typer.Option(help="With --tasks: a folder of tasks, which then have names.")]
Results = Annotated[
    Path | None,
    typer.Option(
        help="With --tasks: folder of what is finished, which goes on there; default: RUN/tasks, MODEL.tasks."
    ),
]
Network = Annotated[bool, typer.Option("--network", help="With --tasks: data may come from where a task says.")]
Base = Annotated[Path | None, typer.Option(help="Of an adapter's directory: the model that it belongs to.")]
Label = Annotated[str, typer.Option(help="With --publish: what a model beside the run is called.")]
Silo = Annotated[str, typer.Option(help="With --publish: who signs; default: the only one.")]
SequenceTokens = Annotated[int | None, typer.Option(help="Tokens of a sequence; default: as trained.")]
NumSequences = Annotated[
    int | None,
    typer.Option(min=0, help="Sequences, evenly spread over each split; 0: all; default: as the run did."),
]
DocumentMasking = Annotated[
    bool | None, typer.Option(help="Keep the documents of a sequence apart; default: as trained.")
]


def evaluate(
    where: Where,
    *,
    data: Data = None,
    chat: Chat = False,
    chat_template: ChatTemplate = None,
    chat_date: ChatDate = "",
    tasks: Tasks = None,
    include_path: IncludePath = None,
    results: Results = None,
    network: Network = False,
    tools: Tools = None,
    answers: Answers = None,
    num_tokens: NumTokens = 256,
    version: Version = None,
    base: Base = None,
    config: Config = None,
    tokenizer: Tokenizer = None,
    publish: Annotated[bool, typer.Option("--publish", help="Sign the losses as a silo, into its store.")] = False,
    label: Label = "",
    silo: Silo = "",
    sequence_tokens: SequenceTokens = None,
    num_sequences: NumSequences = None,
    num_examples: Annotated[int | None, typer.Option(min=1, help="First examples of each task; default: all.")] = None,
    batch_sequences: Annotated[int, typer.Option(min=1, help="Sequences of one forward pass.")] = 8,
    document_masking: DocumentMasking = None,
) -> None:
    """Loss of a model on packed text in nats per token, its perplexity, and bits per byte of text; scores of tasks.

    Of conversations the tokens are those that the assistant says, and "right" is the share of them that is the model's
    likeliest with the true ones before it. By default of the sequences that the run's own evaluations are of, so that
    the numbers are the same. With --publish they are on the federation's page, too (atoll report).

    [bold]Example:[/bold] atoll eval model --data runs/demo/packed/prose/valid

    [bold]Example:[/bold] atoll eval model --chat --data packed/valid --data questions.jsonl

    [bold]Example:[/bold] atoll eval model --tools bank=bank.jsonl --tools court=court.jsonl --answers answers.jsonl
    """
    _check_options(locals())
    where, paths = str(where), config or []
    of_tasks = {"results": results, "network": network, "include_path": include_path, "num_examples": num_examples}
    of_model: dict[str, Any] = {"version": version, "paths": paths, "tokenizer": tokenizer, "base": base}
    options: dict[str, Any] = {"batch_sequences": batch_sequences}
    if tasks:  # first, as it must be the first to import what could look into a network
        _score_tasks(where, tasks, of_model, of_tasks | options)
    if tools:
        asking = options | {"num_tokens": num_tokens, "answers": answers}
        _evaluate_calls(where, tools, of_model, (chat_template, chat_date), asking)
    if (tasks or tools) and not (data or publish or chat):
        return
    of_rows = {"sequence_tokens": sequence_tokens, "document_masking": document_masking, "num_sequences": num_sequences}
    form, signer = (chat_template, chat_date) if chat else None, (silo, label) if publish else None
    _evaluate_splits(where, data, of_model, options | of_rows, form=form, signer=signer)


def _score_tasks(where: str, tasks: list[str], of_model: dict[str, Any], options: dict[str, Any]) -> None:
    from launch.show.scores import score

    score(where, tasks, of_model=of_model, **options)


def _evaluate_splits(
    where: str,
    data: list[str] | None,
    of_model: dict[str, Any],
    options: dict[str, Any],
    *,
    form: tuple[Path | None, str] | None,
    signer: tuple[str, str] | None,
) -> None:
    """Print losses; of conversations with a `form`, template and date; signed by a silo, with a label, if given."""
    from pretrain.federation.evaluation import Publisher, open_subject

    publisher = Publisher(where, *signer, of_model["paths"]) if signer else None
    subject = open_subject(where, **of_model, publishes=signer is not None)
    if publisher:
        publisher.take(subject)
    held_out = publisher.held_out if publisher else subject.held_out
    splits = _splits(data, held_out, must_be_named=signer is not None)
    with tempfile.TemporaryDirectory() as scratch:
        if form:
            looks = _Form(subject, *form, options["sequence_tokens"])
            chosen = looks.conversations(splits, Path(scratch), is_given=bool(data))
        else:
            chosen = _packed(splits, subject.template)
        found = _print_losses(subject, chosen, options)
    if publisher:
        print(f"published: {publisher.publish(found)}")


def _check_options(given: dict[str, Any]) -> None:
    """Raise ConfigError for an option without the one that it belongs to."""
    for name, needed in {
        **dict.fromkeys(("chat_template", "chat_date"), ("chat", "tools")),
        **dict.fromkeys(("results", "network", "include_path", "num_examples"), ("tasks",)),
        "answers": ("tools",),
        **dict.fromkeys(("label", "silo"), ("publish",)),
    }.items():
        if given[name] and not any(given[one] for one in needed):
            without = " or ".join(f"--{one}" for one in needed)
            raise ConfigError(f"--{name.replace('_', '-')}: given without {without}; allowed: with it")


def _splits(data: list[str] | None, held_out: dict[str, Path], *, must_be_named: bool) -> dict[str, Path]:
    """Packed splits by corpus, or by their place where that is not known. Raises ConfigError."""
    if not data and not held_out:
        raise ConfigError("--data, --tasks, --tools: none given; allowed: one at least")
    found, known = dict[str, Path](), {place.resolve(): corpus for corpus, place in held_out.items()}
    for given in data or []:
        corpus, equals, place = given.partition("=")
        if not equals or Path(given).exists():
            corpus, place = known.get(Path(given).resolve(), "") if must_be_named else given, given
        if not corpus or not place or corpus in found:
            raise ConfigError(f"--data: {given!r} given; allowed: CORPUS=SPLIT, each corpus once")
        found[corpus] = Path(expand_home("--data", place))
    return found or held_out


@dataclass(kw_only=True)
class _Chosen:
    """What is evaluated."""

    splits: dict[str, Path]
    """Packed, by name."""
    template: str | None
    """sha256 of the template that conversations have to be of; None: of any."""
    of_files: dict[str, list[str]] = field(default_factory=dict)
    """A file to the names of its kinds of conversations among `splits`, which are evaluated to their end."""


def _packed(splits: dict[str, Path], template: str | None) -> _Chosen:
    """The splits as they are. Raises ConfigError for a file."""
    for place in splits.values():
        if place.is_file():
            allowed = "a packed split (atoll data prepare), or with --chat a file of conversations"
            raise ConfigError(f"--data: {str(place)!r} given, which is a file; allowed: {allowed}")
    return _Chosen(splits=splits, template=template)


class _Form:
    """How conversations look to a model."""

    def __init__(self, subject: "Subject", template: Path | None, date: str, sequence_tokens: int | None) -> None:
        self.subject, self._template, self._date = subject, template, date
        self._sequence_tokens = sequence_tokens or subject.sequence_tokens

    def conversations(self, splits: dict[str, Path], scratch: Path, *, is_given: bool) -> _Chosen:
        """The same with files packed, into `scratch`, and without text, which is refused if it `is_given`.

        Raises ConfigError.
        """
        from pretrain.silo.shards import read_manifest

        expected = self.template.sha256 if self._template else self.subject.template
        if expected is None:
            _tell("this model has no chat template: conversations are evaluated as they were prepared")
        found = _Chosen(splits={}, template=expected)
        for name, place in splits.items():
            if place.is_file():
                self._pack(name, place, scratch, found)
            elif read_manifest(place, key="--data").chat:
                found.splits[name] = place
            elif is_given:
                raise ConfigError(f"--data: {str(place)!r} given, which is text; allowed with --chat: conversations")
        if not found.splits:
            raise ConfigError("--chat: given, and the run evaluates on text alone; allowed: --data with conversations")
        return found

    def _pack(self, name: str, file: Path, scratch: Path, found: _Chosen) -> None:
        from data_tools.chat_file import pack_file
        from pretrain.federation.export import PROMPT_TOKENS

        if self._sequence_tokens is None:
            raise ConfigError("--sequence-tokens: none given; this model was not exported by atoll, so say how many")
        packed = pack_file(
            file,
            scratch / str(len(found.of_files)),
            tokenizer=self.subject.tokenizer_file,
            template=self.template,
            sequence_tokens=self._sequence_tokens,
            prompt_tokens=self.subject.provenance.get(PROMPT_TOKENS, 0),
        )
        if packed.num_too_long:
            longer = f"{packed.num_too_long:,} conversations of more than {self._sequence_tokens:,} tokens"
            _tell(f"{name}: {longer} are left out (--sequence-tokens)")
        named = {f"{name}: {kind}" if len(packed.kinds) > 1 else name: place for kind, place in packed.kinds.items()}
        found.splits |= named
        found.of_files[name] = [*named]

    @cached_property
    def template(self) -> "Template":
        """The model's own template, or what is given for one that has none. Raises ConfigError."""
        from data_tools.chat_template import find_template

        subject = self.subject
        found = find_template(subject.tokenizer_file, self._template or subject.template_file, self._date)
        if subject.template not in (None, found.sha256):
            raise ConfigError(
                f"--chat-template: {str(self._template)!r} given, {found.sha256[:12]}, which is another template than "
                f"the model's, {str(subject.template)[:12]}; allowed: none, as the model's own is taken"
            )
        return found


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_losses(subject: "Subject", chosen: _Chosen, options: dict[str, Any]) -> "dict[str, SplitLoss]":
    """Print the loss on each split, on each file, and on all conversations; returns those that were asked for."""
    from launch.show.evaluating import Evaluating
    from pretrain.federation.held_out import together

    in_files = {name for names in chosen.of_files.values() for name in names}
    options |= {"template": chosen.template, "whole": in_files if options["num_sequences"] is None else ()}
    with Evaluating() as evaluating:
        found = subject.losses(chosen.splits, **options, tell=evaluating.tell)
    for name, split in found.items():
        _print_loss(name, split)
    for file, names in chosen.of_files.items():
        if file not in found:
            found[file] = together([found.pop(name) for name in names])
            _print_loss(file, found[file])
    if len(talks := [split for split in found.values() if split.is_chat]) > 1:
        _print_loss("all conversations", together(talks))
    return found


def _print_loss(name: str, split: "SplitLoss") -> None:
    bits = "" if split.bits_per_byte is None else f"{split.bits_per_byte:.4f} bits/byte  "
    right = "" if split.accuracy is None else f"{split.accuracy:.2%} right  {split.num_tokens:,} tokens  "
    print(
        f"{split.loss:.4f} nats  perplexity {split.perplexity:.2f}  {bits}{right}"
        f"{split.num_sequences} of {split.of_sequences} sequences  {name}"
    )


def _files(tools: list[str]) -> dict[str, Path]:
    """Files of questions by the name of a silo, or by their own. Raises ConfigError."""
    found = dict[str, Path]()
    for given in tools:
        silo, equals, place = given.partition("=")
        if not equals or Path(given).exists():
            silo, place = Path(given).name, given
        file = Path(expand_home("--tools", place))
        if not silo or silo in found or not file.is_file():
            raise ConfigError(f"--tools: {given!r} given; allowed: [SILO=]FILE, a file, each silo once")
        found[silo] = file
    return found


def _evaluate_calls(
    where: str, tools: list[str], of_model: dict[str, Any], form: tuple[Path | None, str], options: dict[str, Any]
) -> None:
    """Print how many calls are right; rendered by a template and date, if given, else by the model's own."""
    from launch.calling import evaluate_calls, print_calls
    from launch.show.evaluating import Evaluating
    from pretrain.federation.evaluation import open_subject

    files, subject = _files(tools), open_subject(where, **of_model)
    template = _Form(subject, *form, None).template
    with Evaluating() as evaluating:
        found = evaluate_calls(subject, template, files, **options, tell=evaluating.tell)
    print_calls(found)
