"""Tokens per byte of tokenizers that no text leaves for, against the one that is trained on all the text pooled.

    python -m benchmarks.shared_tokenizer CORPUS... [--vocab-size 2048 8192 32768] [--min-count 5] [--min-documents 3]
        [--epsilon 1] [--delta 1e-6] [--repeat 1]

Each corpus is a folder with train and valid text, and one silo. Every silo exports its counts, without noise and with;
the exports are merged and trained from. Measured on the held-out texts, in the same run: the pooled tokenizer, the two
merged ones and each silo's own. Where counts are not enough for a vocabulary, the largest one that they are enough for
is measured, and also compared with the pooled tokenizer of that size. `--repeat N` counts every document N times before
the noise is added: what the noise would cost in N times as much text of the same words.
"""

import argparse
import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from data_tools.counts import count_pretokens, export_counts, merge_counts
from data_tools.sources import read_documents, split_file
from data_tools.tokenizer import bpe_from_counts, load_tokenizer, train_tokenizer


def tokens_per_byte(tokenizer: Tokenizer, held_out: dict[str, list[str]]) -> dict[str, float]:
    """Of each corpus, and of all of them together."""
    num_tokens = {
        name: sum(len(document) for document in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for name, texts in held_out.items()
    }
    num_bytes = {name: sum(len(text.encode()) for text in texts) for name, texts in held_out.items()}
    ratios = {name: num_tokens[name] / num_bytes[name] for name in held_out}
    return ratios | {"all": sum(num_tokens.values()) / sum(num_bytes.values())}


def row(label: str, tokenizer: Tokenizer, held_out: dict[str, list[str]], pooled: dict[str, float]) -> None:
    """Print one line: tokens per byte and the difference to `pooled`."""
    ratios = tokens_per_byte(tokenizer, held_out)
    cells = "  ".join(
        f"{name} {ratio:.4f} ({100 * (ratio / pooled[name] - 1):+6.2f} %)" for name, ratio in ratios.items()
    )
    print(f"{label:29} {tokenizer.get_vocab_size():>6}  {cells}", flush=True)


def exports(texts: dict[str, list[str]], directory: Path, arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Each silo's counts, exported without noise and with, and merged."""
    directory.mkdir()
    thresholds = {"min_count": arguments.min_count, "min_documents": arguments.min_documents}
    merged = {}
    for label, epsilon in (("merged", None), (f"merged, epsilon {arguments.epsilon:g}", arguments.epsilon)):
        files = [directory / label / f"{name}.tsv" for name in texts]
        for name, file in zip(texts, files, strict=True):
            repeated = itertools.chain.from_iterable(itertools.repeat(texts[name], arguments.repeat if epsilon else 1))
            summary = export_counts(repeated, output=file, epsilon=epsilon, delta=arguments.delta, **thresholds)
            noise = summary.noise and f", sigma {summary.noise.sigma:.1f}, released from {summary.noise.threshold:.0f}"
            print(
                f"{label}: {name} exports {summary.num_exported:,} of {summary.num_pretokens:,} pre-tokens, "
                f"{file.stat().st_size / 1000:,.0f} kB{noise or ''}"
            )
        merged[label] = merge_counts(files)
        print(f"{label}: {len(merged[label]):,} pre-tokens", flush=True)
    return merged


def compare(
    vocab_size: int,
    texts: dict[str, list[str]],
    held_out: dict[str, list[str]],
    counts: Mapping[str, Mapping[str, int]],
    directory: Path,
) -> None:
    """Print the rows of one vocabulary size."""
    everything = [text for corpus in texts.values() for text in corpus]

    def pooled(size: int) -> Tokenizer:
        return load_tokenizer(train_tokenizer(everything, vocab_size=size, output=directory / f"pooled-{size}"))

    reference = pooled(vocab_size)
    of_pooled = tokens_per_byte(reference, held_out)
    row("pooled", reference, held_out, of_pooled)
    for label, table in counts.items():
        tokenizer, _ = bpe_from_counts(table, vocab_size=vocab_size)
        row(label, tokenizer, held_out, of_pooled)
        size = tokenizer.get_vocab_size()
        if size < vocab_size:
            row("  against pooled of that size", tokenizer, held_out, tokens_per_byte(pooled(size), held_out))


def main() -> None:
    """Export, merge, train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, nargs="+")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--min-count", type=int, default=5)
    parser.add_argument("--min-documents", type=int, default=3)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-6)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    texts = {folder.name: list(read_documents(split_file(folder, "train"))) for folder in arguments.corpora}
    held_out = {folder.name: list(read_documents(split_file(folder, "valid"))) for folder in arguments.corpora}
    alone = {
        f"{name} alone": {count.pretoken: count.value for count in count_pretokens(corpus)}
        for name, corpus in texts.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        counts = exports(texts, Path(folder) / "counts", arguments) | alone
        for vocab_size in arguments.vocab_size:
            print(f"\nvocabulary {vocab_size:,}: tokens per byte on held-out text, and against pooled")
            compare(vocab_size, texts, held_out, counts, Path(folder))


if __name__ == "__main__":
    main()
