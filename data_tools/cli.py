"""`atoll data`: from text to packed shards. A ConfigError leaves every command; the caller turns it into one line."""

import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.status import Status

if TYPE_CHECKING:
    from data_tools.formats import Part
    from data_tools.pack import Recipe
    from data_tools.sources import Source
    from pretrain.silo.shards import Manifest

STOPPED = 75  # EX_TEMPFAIL, as in pretrain.train: all is saved, the same command goes on

app = typer.Typer(
    name="data", no_args_is_help=True, rich_markup_mode="rich", help="Text to packed shards, inside one institution."
)

AsText = Annotated[
    list[str] | None, typer.Option(help="Files to read as text whatever their ending: a glob, '*.py'; repeatable.")
]
DataSets = Annotated[
    list[str] | None, typer.Option(help="A data set that `datasets` loads, by hub name or directory; streamed.")
]

OnBad = Annotated[str, typer.Option(help="stop or skip what cannot be used or listed.")]
SourcesFile = Annotated[
    Path | None, typer.Option(help="YAML file of sources, each with path or dataset, text, name and weight.")
]
HeldOut = Annotated[
    float, typer.Option(help="Share of documents for valid/, chosen by hash; text that is split already stays so.")
]
NearDuplicates = Annotated[
    float, typer.Option(help="Drop documents as similar as this to an earlier one (MinHash, 0 to 1); 0: off.")
]
DropOverlap = Annotated[
    bool, typer.Option("--drop-overlap", help="Drop training documents that share 13 words in a row with valid/.")
]
LanguageReport = Annotated[bool, typer.Option("--language-report", help="Count documents and tokens of each language.")]
KeepLanguage = Annotated[str, typer.Option(help="Drop documents of other languages than these: de,en.")]
QualityReport = Annotated[
    bool, typer.Option("--quality-report", help="Measure what Gopher, C4 and FineWeb filter by; nothing is dropped.")
]
PersonalData = Annotated[
    str, typer.Option(help="count, mask or drop: e-mail addresses, numbers of accounts, cards, telephones; not names.")
]
Chat = Annotated[
    bool, typer.Option("--chat", help="The records are conversations: messages, ShareGPT, or prompt and completion.")
]
SequenceTokens = Annotated[int, typer.Option(help="With --chat: tokens of a row, which are the run's sequence_tokens.")]
TooLong = Annotated[str, typer.Option(help="With --chat: stop at, skip, or split at turns, what is longer.")]
ChatTemplate = Annotated[
    Path | None, typer.Option(help="With --chat: a chat template (Jinja) instead of the tokenizer's own.")
]
PromptTokens = Annotated[
    int, typer.Option(help="With --chat: room before each for a prompt (model.adapter.kind=prompt) of so many tokens.")
]
Pairs = Annotated[bool, typer.Option("--pairs", help="With --chat: preference pairs, chosen and rejected (DPO).")]
ChatDate = Annotated[str, typer.Option(help="With --chat: YYYY-MM-DD, for a template that writes today's date.")]


@app.command()
def corpora(
    output: Annotated[Path, typer.Argument(help="Folder to make library/, tests/ and prose/ in.")],
) -> None:
    """Make three small corpora from the Python that is installed, to try Atoll without text of your own.

    Each gets train.jsonl.gz (up to 6 MB of text) and valid.jsonl.gz (up to 0.3 MB). What is there is left as it is.

    [bold]Example:[/bold] atoll data corpora runs/demo/corpora
    """
    from data_tools.corpora import write_python_corpora

    with _waiting("reading the installed Python"):
        folders = write_python_corpora(output)
    for name, folder in folders.items():
        _say(f"{name:<12} {folder}")


@app.command()
def counts(
    corpora: Annotated[list[str], typer.Argument(help="Files, folders or globs of text, as for prepare.")],
    *,
    output: Annotated[Path, typer.Option(help="File to write, counts.tsv; read it before you send it.")],
    text_field: Annotated[str, typer.Option(help="JSON key or column that holds the text.")] = "text",
    as_text: AsText = None,
    min_count: Annotated[int, typer.Option(help="Leave out what occurs less often.")] = 5,
    min_documents: Annotated[int, typer.Option(help="Leave out what occurs in fewer documents.")] = 3,
    on_bad: OnBad = "stop",
    epsilon: Annotated[
        float | None, typer.Option(help="Add Gaussian noise: (epsilon, delta)-differential privacy for one document.")
    ] = None,
    delta: Annotated[float, typer.Option(help="With --epsilon; less than 1 / documents.")] = 1e-6,
    workers: Annotated[int | None, typer.Option(help="Processes that count; default: one a core.")] = None,
) -> None:
    """Count words (pre-tokens) and export the frequent ones, for a shared tokenizer without sharing text.

    Stop it or kill it whenever you like: the same command goes on, and writes the same file.

    [bold]Example:[/bold] atoll data counts raw/law --output law.counts.tsv --min-count 5 --min-documents 3
    """
    from data_tools.counts import export_parts
    from data_tools.report import ALL_SOURCES, print_bad
    from data_tools.sources import Source, source_name

    parts = _parts(corpora, text_field, as_text, on_bad)
    with _going_on(output) as asked_to_stop:
        done = export_parts(
            parts,
            output=output,
            console=Console(stderr=True),
            on_bad=on_bad,
            asked_to_stop=asked_to_stop,
            min_count=min_count,
            min_documents=min_documents,
            epsilon=epsilon,
            delta=delta,
            num_workers=workers,
        )
    if done.skipped["bad"]:
        names = {source_name(Source(path=corpus)) for corpus in corpora}
        print_bad({names.pop() if len(names) == 1 else ALL_SOURCES: done.skipped}, Console())
    noise = f"  noise of {done.noise.sigma:.1f}, from {done.noise.threshold:.1f} on" if done.noise else ""
    _say(f"{output}  {done.num_exported:,} of {done.num_pretokens:,} pre-tokens{noise}; read it before you send it")


@app.command()
def tokenizer(
    corpora: Annotated[
        list[str] | None, typer.Argument(help="Corpus folders (their train text is read), files or globs of text.")
    ] = None,
    *,
    output: Annotated[Path, typer.Option(help="Folder to write tokenizer.json in.")],
    counts: Annotated[
        list[Path] | None, typer.Option(help="Instead of text: one silo's counts.tsv; give one for each silo.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="JSON key or column that holds the text.")] = "text",
    as_text: AsText = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens of the vocabulary, bytes and end of text included.")] = 32_768,
    chat: Annotated[
        bool, typer.Option("--chat", help="Reserve <|im_start|>, <|im_end|>; write chat_template.jinja (ChatML).")
    ] = False,
) -> None:
    """Train the byte-level BPE tokenizer that all silos share, from counts that each silo exported or from text.

    Every silo must use the same file: its hash is in the contract.

    [bold]Example:[/bold] atoll data tokenizer --counts law.counts.tsv --counts press.counts.tsv --output tokenizer
    """
    from data_tools.counts import merge_counts
    from data_tools.sources import read_parts
    from data_tools.tokenizer import train_from_counts, train_tokenizer
    from pretrain.config.errors import ConfigError
    from pretrain.silo.shards import tokenizer_sha256

    if corpora and counts and {Path(one).suffix for one in corpora} == {counts[0].suffix}:  # a shell's --counts *.tsv
        typed = " ".join(f"--counts {shlex.quote(str(file))}" for file in [*counts, *corpora])
        raise ConfigError(f"--counts: text or files beside it given; allowed: one file each: type {typed}")
    if bool(corpora) == bool(counts):
        raise ConfigError("tokenizer: text and counts, or neither, given; allowed: text, or --counts of every silo")
    divisor, texts = 1, read_parts(_parts(corpora or [], text_field, as_text))
    with _waiting("training the tokenizer"):
        if counts:
            merged = merge_counts(counts, warn=_warn)
            file, divisor = train_from_counts(merged, vocab_size=vocab_size, output=output, chat=chat)
        else:
            file = train_tokenizer(texts, vocab_size=vocab_size, output=output, chat=chat)
    scaled = f"  (counts divided by {divisor})" if divisor > 1 else ""
    _say(f"{file}  vocabulary {vocab_size:,}  sha256 {tokenizer_sha256(file)}{scaled}")


@app.command()
def prepare(
    corpora: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders or globs: .jsonl .txt .csv (packed, too) .parquet .pdf"),
    ] = None,
    *,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The shared tokenizer.json, or the folder that holds it; required.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder to make train/ and valid/ in, NAME/train/ for several sources.")],
    text_field: Annotated[str, typer.Option(help="JSON key or column that holds the text.")] = "text",
    as_text: AsText = None,
    dataset: DataSets = None,
    sources: SourcesFile = None,
    held_out: HeldOut = 0.01,
    normalize: Annotated[str, typer.Option(help="Unicode normalisation: NFC, NFD, NFKC or NFKD.")] = "",
    personal_data: PersonalData = "",
    min_characters: Annotated[int, typer.Option(help="Drop shorter documents.")] = 0,
    max_characters: Annotated[int, typer.Option(help="Drop longer documents; 0: no bound.")] = 0,
    drop_duplicates: Annotated[bool, typer.Option("--drop-duplicates", help="Drop exact repetitions.")] = False,
    near_duplicates: NearDuplicates = 0.0,
    drop_overlap: DropOverlap = False,
    language_report: LanguageReport = False,
    keep_language: KeepLanguage = "",
    quality_report: QualityReport = False,
    filter: Annotated[str, typer.Option(help="Your own, package.module:function, str -> bool or new str.")] = "",
    on_bad: OnBad = "stop",
    chat: Chat = False,
    sequence_tokens: SequenceTokens = 0,
    too_long: TooLong = "stop",
    chat_template: ChatTemplate = None,
    chat_date: ChatDate = "",
    prompt_tokens: PromptTokens = 0,
    pairs: Pairs = False,
    shard_tokens: Annotated[int, typer.Option(help="Most tokens in one shard file.")] = 100_000_000,
    workers: Annotated[int | None, typer.Option(help="Processes that clean and tokenize; default: one a core.")] = None,
) -> None:
    """Clean, tokenize and pack text into shards that training reads, for any sequence length; or conversations.

    OUTPUT/train is for silo.data and OUTPUT/valid for silo.valid; OUTPUT/silo.yaml says it as configuration, and
    OUTPUT/report.json and report.png what was dropped and why. Stop it or kill it whenever you like: the same command
    goes on. What has been prepared already is left as it is.

    [bold]Example:[/bold] atoll data prepare "raw/*.jsonl.zst" --tokenizer tokenizer --output packed --drop-duplicates

    [bold]Example:[/bold] atoll data prepare chats.jsonl --chat --sequence-tokens 2048 --tokenizer model --output packed
    """
    given = dict(locals())
    listed = _sources(corpora or [], dataset or [], sources, text_field, as_text or [])
    recipe = _recipe(given, sources=listed, tokenizer=_given(tokenizer), held_out=held_out, shard_tokens=shard_tokens)
    _prepare(recipe, output, on_bad, workers)


def _recipe(given: dict[str, Any], **recipe: Any) -> "Recipe":
    """A recipe, with the options of cleaning and of conversations, which have the names that they are given by."""
    from data_tools.clean import Cleaning
    from data_tools.pack import ChatRecipe, Recipe
    from pretrain.config.errors import ConfigError

    cleaning, chat = ({one.name: given[one.name] for one in fields(kind)} for kind in (Cleaning, ChatRecipe))
    for name, value in chat.items():
        if value and value != "stop" and not given["chat"]:
            raise ConfigError(f"--{name.replace('_', '-')}: {value} given; allowed: with --chat, for conversations")
    return Recipe(cleaning=Cleaning(**cleaning), chat=ChatRecipe(**chat) if given["chat"] else None, **recipe)


def _given(tokenizer: Path | None) -> Path:
    from pretrain.config.errors import ConfigError

    if tokenizer is None:
        raise ConfigError(
            "--tokenizer: nothing given; allowed: the tokenizer.json that all silos share, or its folder: type "
            "--tokenizer tokenizer (atoll data tokenizer makes one)"
        )
    return tokenizer


def _sources(
    paths: list[str], datasets: list[str], file: Path | None, text_field: str, as_text: list[str]
) -> "tuple[Source, ...]":
    from data_tools.sources import Source, load_sources

    chosen = [Source(path=path, text=text_field, as_text=tuple(as_text)) for path in paths]
    chosen += [Source(dataset=name, text=text_field) for name in datasets]
    return (*chosen, *(load_sources(file) if file else ()))


def _prepare(recipe: "Recipe", output: Path, on_bad: str, num_workers: int | None) -> None:
    from data_tools.pack import prepare
    from data_tools.report import REPORT_FILE, print_report

    with _going_on(output) as asked_to_stop:
        manifests = prepare(recipe, output, on_bad=on_bad, num_workers=num_workers, asked_to_stop=asked_to_stop)
    print_report(json.loads((output / REPORT_FILE).read_text()), Console())
    for split, manifest in manifests.items():
        _say(f"{output / split}  {_summary(manifest)}")


@app.command()
def verify(
    directories: Annotated[list[Path], typer.Argument(help="Packed splits, or folders that hold some.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Also check that this tokenizer.json packed them.")] = None,
) -> None:
    """Read every byte of packed text and check it: hashes, sizes, vocabulary, ends of documents.

    [bold]Example:[/bold] atoll data verify packed/law --tokenizer tokenizer
    """
    from data_tools.inspect import find_splits
    from data_tools.tokenizer import tokenizer_file
    from pretrain.silo.shards import tokenizer_sha256, verify_shards
    from pretrain.silo.verify import verify_tokens

    expected = tokenizer_sha256(tokenizer_file(tokenizer), key="--tokenizer") if tokenizer else None
    for directory in find_splits(directories):
        manifest = verify_shards(directory, key="verify", tokenizer_sha256=expected)
        verify_tokens(directory, manifest, key="verify")
        _say(f"{directory}  {_summary(manifest)}  whole")


@app.command()
def inspect(
    directories: Annotated[list[Path], typer.Argument(help="Packed splits, or folders that hold some.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer.json that packed them, to show text.")] = None,
    samples: Annotated[int, typer.Option(help="Decoded documents of each split to show; private text!")] = 0,
    seed: Annotated[int, typer.Option(help="Which documents are shown.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="PNG of document lengths and token frequencies.")] = None,
) -> None:
    """Show what packed splits hold: sizes, lengths, bytes per token, frequent tokens, samples.

    [bold]Example:[/bold] atoll data inspect packed --tokenizer tokenizer --samples 2 --picture packed.png
    """
    from data_tools.inspect import find_splits, inspect_splits, print_inspections, print_reports

    found = inspect_splits(directories, tokenizer=tokenizer, num_samples=samples, seed=seed, picture=picture)
    print_inspections(found, Console())
    print_reports(find_splits(directories), Console())


@app.command()
def show(
    directories: Annotated[
        list[Path], typer.Argument(help="Packed splits of conversations, or folders that hold some.")
    ],
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer.json that packed them; required.")] = None,
    samples: Annotated[int, typer.Option(help="Conversations of each split to show; private text!")] = 3,
    seed: Annotated[int, typer.Option(help="Which conversations are shown.")] = 0,
) -> None:
    """Show packed conversations, and in colour (in a pipe or with NO_COLOR: in [[ ]]) what of them is learned.

    [bold]Example:[/bold] atoll data show packed/train --tokenizer tokenizer
    """
    from data_tools.show import print_conversations

    print_conversations(directories, _given(tokenizer), num_samples=samples, seed=seed, console=Console())


@app.command()
def reference(
    directories: Annotated[list[Path], typer.Argument(help="Packed splits of pairs, or folders that hold some.")],
    base: Annotated[Path | None, typer.Option(help="The checkpoint that the run goes on from; required.")] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16: that of the silo that trains on them.")] = "fp32",
    batch_sequences: Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")] = 8,
) -> None:
    """Compute once what a base says of preference pairs, beside their shards: what DPO compares the model with.

    What is there already of the same base, precision and tokens is left as it is.

    [bold]Example:[/bold] atoll data reference packed/train packed/valid --base base
    """
    from data_tools.reference import refer

    for line in refer(directories, base, precision=precision, batch_sequences=batch_sequences):
        _say(line)


def _parts(corpora: list[str], text_field: str, as_text: list[str] | None, on_bad: str = "") -> "list[Part]":
    """All parts of files, folders and globs; what is read and what is not is said before."""
    from data_tools.listing import check_listed
    from data_tools.sources import Source, find_text, source_name

    chosen = [Source(path=path, text=text_field, as_text=tuple(as_text or ())) for path in corpora]
    listings = {source: find_text(source) for source in chosen}
    for source, listing in listings.items():
        for line in listing.lines(source_name(source)):
            print(line, file=sys.stderr)
    other = ", or give --on-bad skip" if on_bad else ", or name what is to be read, file by file or by a glob"
    check_listed(listings.values() if on_bad != "skip" else (), advice=other)
    return [part for listing in listings.values() for part in listing.parts]


def _summary(manifest: "Manifest") -> str:
    masked = f"  {100 * manifest.num_trained_tokens / manifest.num_tokens:.1f} % trained" if manifest.chat else ""
    return (
        f"{manifest.num_documents:,} documents  {manifest.num_tokens:,} tokens  "
        f"{manifest.num_bytes / manifest.num_tokens:.2f} bytes/token  {len(manifest.shards)} shards{masked}"
    )


@contextlib.contextmanager
def _going_on(output: Path) -> Iterator[Callable[[], bool]]:
    """Work that a signal stops and the same command goes on with; where it stopped is said."""
    from data_tools.workers import StoppedError

    try:
        with _stop_signals() as asked_to_stop:
            yield asked_to_stop
    except StoppedError:
        begun = Path(f"{output}.partial").exists()
        saved = f"all is saved in {output}.partial, the same command goes on" if begun else "nothing was read yet"
        print(f"stopped on request; {saved}", file=sys.stderr)
        raise typer.Exit(STOPPED) from None


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM, SIGINT and SIGUSR1; the work asks between two blocks of text."""
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda received, frame: asked.append(received))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def _waiting(what: str) -> Status:
    return Console(stderr=True).status(what)


def _say(line: str) -> None:
    """Print a line as it is: paths are neither wrapped nor read as markup."""
    Console(soft_wrap=True, markup=False, highlight=False).print(line)
