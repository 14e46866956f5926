"""Throughput and memory of `atoll data prepare --chat` against `tokenizers` alone, on the same rendered text.

    python -m benchmarks.prepare_chat CORPUS.jsonl.gz ... [--megabytes 100] [--vocab-size 32768] [--template FILE]
    python -m benchmarks.prepare_chat CORPUS.jsonl.gz ... --worker

The documents of the given corpora are cut into conversations: questions of 300 characters, answers of 900, four turns
at most, numbered so that none comes twice. The reference is the time within `Tokenizer.encode_batch`, which also uses
all cores, on batches of 1,000 conversations that have been rendered already; the mean of once before and once after.
With --worker it is one worker's whole task, from raw lines to tokens and masks, against `encode_batch` in the same
thread on what that rendered: processor times of two blocks of a megabyte, the least of seven each, one after the other.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.memory import MIB
from benchmarks.prepare import REFERENCE_DOCUMENTS, prepare_seconds
from data_tools.chat import ChatEncoder, ChatJob
from data_tools.chat_template import Renderer, find_template
from data_tools.conversations import normalised
from data_tools.formats import WHOLE
from data_tools.listing import file_part
from data_tools.sources import parse_block, read_blocks, read_documents
from data_tools.tokenizer import train_tokenizer

QUESTION_CHARACTERS, ANSWER_CHARACTERS, MAX_TURNS = 300, 900, 4
SEQUENCE_TOKENS = 4096
REPEATS = 7


def cut(text: str) -> Iterator[list[dict[str, Any]]]:
    """Conversations of a document's text."""
    turn = QUESTION_CHARACTERS + ANSWER_CHARACTERS
    for begin in range(0, len(text), turn * MAX_TURNS):
        messages = []
        for first in range(begin, min(len(text), begin + turn * MAX_TURNS), turn):
            asked, said = text[first : first + QUESTION_CHARACTERS], text[first + QUESTION_CHARACTERS : first + turn]
            if said.strip():
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        if messages:
            yield messages


def write_conversations(corpora: list[Path], file: Path, num_bytes: int) -> None:
    """Conversations, numbered, as JSON lines until they are `num_bytes` of text."""
    conversations = [one for corpus in corpora for text in read_documents(corpus) for one in cut(text)]
    written = 0
    with file.open("w") as lines:
        for copy in itertools.count():
            for messages in conversations:
                numbered = [messages[0] | {"content": f"{copy}. {messages[0]['content']}"}, *messages[1:]]
                lines.write(json.dumps({"messages": numbered}, ensure_ascii=False) + "\n")
                written += sum(len(one["content"].encode()) for one in numbered)
                if written >= num_bytes:
                    return


def reference(file: Path, tokenizer: Path, template: Path | None) -> tuple[float, int]:
    """Seconds within encode_batch over all rendered conversations of the file, and their bytes."""
    encoder, seconds, num_bytes = Tokenizer.from_file(str(tokenizer)), 0.0, 0
    names = {token.content for token in encoder.get_added_tokens_decoder().values()}
    renderer = Renderer(find_template(tokenizer, template, ""), names)
    with file.open() as lines:
        while batch := list(itertools.islice(lines, REFERENCE_DOCUMENTS)):
            texts = [renderer.render(normalised(json.loads(line))).text for line in batch]
            num_bytes += sum(len(text.encode()) for text in texts)
            began = time.monotonic()
            encoder.encode_batch(texts, add_special_tokens=False)
            seconds += time.monotonic() - began
    return seconds, num_bytes


def one_worker(file: Path, tokenizer: Path, template: Path | None) -> None:
    """Print what a worker's task costs beside what tokenizing costs."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as workers have it
    chosen = find_template(tokenizer, template, "")
    job = ChatJob(tokenizer=tokenizer, template=chosen, sequence_tokens=SEQUENCE_TOKENS, too_long="stop", held_out=0.01)
    encoder, alone = ChatEncoder(job), Tokenizer.from_file(str(tokenizer))
    renderer = Renderer(chosen, {token.content for token in alone.get_added_tokens_decoder().values()})
    blocks = list(itertools.islice(read_blocks(file_part(file, WHOLE)), 2))
    texts = [
        renderer.render(normalised(json.loads(str(one)))).text for block in blocks for _, one in parse_block(block)
    ]
    of_worker, of_library = [], []
    for _ in range(REPEATS):
        began = time.process_time()
        num_tokens = sum(len(encoder.encode(block).tokens) for block in blocks)
        of_worker.append(time.process_time() - began)
        began = time.process_time()
        found = alone.encode_batch(texts, add_special_tokens=False)
        of_library.append(time.process_time() - began)
    assert num_tokens == sum(len(one) for one in found)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"one worker: {len(texts):,} conversations, {megabytes:.2f} MB rendered, {num_tokens:,} tokens  "
        f"encode_batch {min(of_library):.3f} s  worker {min(of_worker):.3f} s of a processor  "
        f"ratio {min(of_library) / min(of_worker):.3f}"
    )


def main() -> None:
    """Print one line a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", type=Path)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[100])
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--template", type=Path)
    parser.add_argument("--worker", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        texts = (text for corpus in arguments.corpora for text in read_documents(corpus))
        vocab_size = arguments.vocab_size
        tokenizer = train_tokenizer(texts, vocab_size=vocab_size, output=directory / "tokenizer", chat=True)
        if arguments.worker:
            write_conversations(arguments.corpora, directory / "worker.jsonl", 2_500_000)
            one_worker(directory / "worker.jsonl", tokenizer, arguments.template)
            return
        options = ["--chat", "--sequence-tokens", str(SEQUENCE_TOKENS)]
        options += ["--chat-template", str(arguments.template)] if arguments.template else []
        for megabytes in arguments.megabytes:
            file = directory / f"{megabytes}.jsonl"
            write_conversations(arguments.corpora, file, megabytes * 1_000_000)
            before, num_bytes = reference(file, tokenizer, arguments.template)
            seconds, peak_bytes = prepare_seconds(file, tokenizer, directory / str(megabytes), options)
            after, _ = reference(file, tokenizer, arguments.template)
            alone = (before + after) / 2
            report = json.loads((directory / str(megabytes) / "report.json").read_text())["rows"]["train"]
            padding = report["padding_tokens"] / (report["rows"] * report["row_tokens"])
            print(
                f"{num_bytes / 1e6:5.0f} MB rendered  encode_batch alone {num_bytes / alone / 1e6:6.2f} MB/s  "
                f"prepare --chat {num_bytes / seconds / 1e6:6.2f} MB/s  ratio {alone / seconds:.3f}  "
                f"padding {padding:.2%}  peak memory {peak_bytes / MIB:.0f} MiB",
                flush=True,
            )
            file.unlink()


if __name__ == "__main__":
    main()
