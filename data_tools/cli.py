"""`atoll data`: from text to packed shards. A ConfigError leaves every command; the caller turns it into one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status

app = typer.Typer(
    name="data", no_args_is_help=True, rich_markup_mode="rich", help="Text to packed shards, inside one institution."
)


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
def tokenizer(
    corpora: Annotated[list[Path], typer.Argument(help="Corpus folders (their train text is read) or files.")],
    output: Annotated[Path, typer.Option(help="Folder to write tokenizer.json in.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens of the vocabulary, bytes and end of text included.")] = 32_768,
) -> None:
    """Train the byte-level BPE tokenizer that all silos share.

    Every silo must use the same file: train it once, on text that may be seen by all, and hand it round.

    [bold]Example:[/bold] atoll data tokenizer corpora/library corpora/prose --vocab-size 2048 --output tokenizer
    """
    from data_tools.corpora import read_documents, training_file
    from data_tools.tokenizer import train_tokenizer
    from pretrain.silo.shards import tokenizer_sha256

    files = [training_file(corpus) for corpus in corpora]

    def texts() -> Iterator[str]:
        for file in files:
            yield from read_documents(file)

    with _waiting("training the tokenizer"):
        file = train_tokenizer(texts(), vocab_size=vocab_size, output=output)
    _say(f"{file}  vocabulary {vocab_size:,}  sha256 {tokenizer_sha256(file)}")


@app.command()
def prepare(
    corpus: Annotated[Path, typer.Argument(help="Folder with train and valid text, or one .jsonl[.gz] or .txt[.gz].")],
    tokenizer: Annotated[Path, typer.Option(help="The shared tokenizer.json, or the folder that holds it.")],
    output: Annotated[Path, typer.Option(help="Folder to make train/ and valid/ in; for one file, the split itself.")],
    shard_tokens: Annotated[int, typer.Option(help="Most tokens in one shard file.")] = 100_000_000,
) -> None:
    """Tokenize a corpus and pack it into shards that training reads, for any sequence length.

    A folder becomes OUTPUT/train (for silo.data) and OUTPUT/valid (for silo.valid), a file OUTPUT itself. What has
    been packed from the same text with the same tokenizer is left as it is.

    [bold]Example:[/bold] atoll data prepare corpora/library --tokenizer tokenizer --output packed/library
    """
    from data_tools.pack import prepare_corpus

    manifests = prepare_corpus(corpus, tokenizer=tokenizer, output=output, shard_tokens=shard_tokens)
    for directory, manifest in manifests.items():
        _say(
            f"{directory}  {manifest.num_documents:,} documents  {manifest.num_tokens:,} tokens  "
            f"{manifest.num_bytes / manifest.num_tokens:.2f} bytes/token  {len(manifest.shards)} shards"
        )


def _waiting(what: str) -> Status:
    return Console(stderr=True).status(what)


def _say(line: str) -> None:
    """Print a line as it is: paths are neither wrapped nor read as markup."""
    Console(soft_wrap=True, markup=False, highlight=False).print(line)
