"""From an institution's raw text to packed shards: `atoll data prepare`.

The main process reads blocks of text, workers clean and tokenize them, the main process writes what they return, in
the order of the text. Memory depends on neither the corpus nor its files; the bytes that are written depend on the
text and the recipe only, not on the number of workers or on how often the work was stopped, killed and started again.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from data_tools import chat, encode, languages
from data_tools.chat import TOO_LONG, ChatEncoder, ChatJob
from data_tools.chat_template import find_template
from data_tools.clean import Cleaning, told, write_grams
from data_tools.documents import versions
from data_tools.encode import Job
from data_tools.formats import WHOLE, check_on_bad, stop_at_bad
from data_tools.listing import Listing, check_listed
from data_tools.progress import Speed
from data_tools.report import REPORT_FILE, write_report
from data_tools.sources import Block, Part, Source, find_text, part_identity, read_blocks, source_name
from data_tools.tokenizer import PlainText, tokenizer_file
from data_tools.work import Work
from data_tools.workers import StoppedError, begin_workers, in_order, workers_for
from pretrain.config.adapter import PROMPT
from pretrain.config.errors import ConfigError
from pretrain.host.lock import lock_directory
from pretrain.silo.shards import (
    TEMPLATE_FILE,
    UNFINISHED,
    Chat,
    Manifest,
    atomic_path,
    read_manifest,
    tokenizer_sha256,
)

SHARD_TOKENS = 100_000_000
# Time between two commits, and so the work that a kill can cost.
COMMIT_SECONDS = 2.0
OVERLAY_FILE = "silo.yaml"
# With less held-out text than this, some 50 sequences of 1,024 tokens, its loss says little.
ENOUGH_DOCUMENTS, ENOUGH_TOKENS = 100, 50 * 1024
MOST_HELD_OUT = 0.2
_NOTHING_KEPT = {"documents": 0, "tokens": 0}


@dataclass(kw_only=True, frozen=True)
class ChatRecipe:
    """That conversations are packed, and how."""

    sequence_tokens: int
    """Tokens of a row: what the run's sequence_tokens has to be."""
    too_long: str = "stop"
    """What is done about a conversation of more tokens: stop, skip it, or split it between turns."""
    chat_template: Path | None = None
    """A chat template instead of the tokenizer's own."""
    chat_date: str = ""
    """The day, YYYY-MM-DD, for a template that writes today's date."""
    prompt_tokens: int = 0
    """Room before each conversation for a prompt of so many tokens: what the run's model.adapter.tokens has to be."""
    pairs: bool = False
    """Whether the records are preference pairs, both sides of which lie in one row."""

    def check(self) -> None:
        """Raise ConfigError for what cannot be."""
        if self.sequence_tokens < 2:
            given = self.sequence_tokens or "nothing"
            raise ConfigError(f"--sequence-tokens: {given} given; allowed with --chat: 2 or more, those of the run")
        if not 0 <= self.prompt_tokens <= self.sequence_tokens - 2:
            most = self.sequence_tokens - 2
            raise ConfigError(
                f"--prompt-tokens: {self.prompt_tokens} given; allowed: 0 to {most}, so that two tokens are left of "
                f"--sequence-tokens {self.sequence_tokens}"
            )
        if self.pairs and self.prompt_tokens:
            given = f"--prompt-tokens: {self.prompt_tokens} given with --pairs"
            raise ConfigError(f"{given}; allowed: 0, as the model that pairs are compared with knows no prompt")
        if self.pairs and self.too_long == "split":
            given = "--too-long: 'split' given with --pairs"
            raise ConfigError(f"{given}; allowed: stop, skip, as no part of an answer is the better one")
        if self.too_long not in TOO_LONG:
            raise ConfigError(f"--too-long: {self.too_long!r} given; allowed: {', '.join(TOO_LONG)}")


@dataclass(kw_only=True, frozen=True)
class Recipe:
    """What is packed and how. Equal recipes give equal bytes."""

    sources: tuple[Source, ...]
    """Where the text is."""
    tokenizer: Path
    """The tokenizer.json that all silos share, or the folder that holds it."""
    cleaning: Cleaning = field(default_factory=Cleaning)
    """What is done to documents before."""
    held_out: float = 0.01
    """Share of documents that go to the held-out split, by their hash; text that is split already stays so."""
    shard_tokens: int = SHARD_TOKENS
    """Most tokens in one shard file."""
    chat: ChatRecipe | None = None
    """How conversations are packed; None: the sources are text."""

    def checked(self) -> "Recipe":
        """The same, of conversations with whole records to read. Raises ConfigError for what cannot be."""
        if self.shard_tokens < 1:
            raise ConfigError(f"--shard-tokens: {self.shard_tokens} given; allowed: 1 or more")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"--held-out: {self.held_out} given; allowed: 0 to below 1")
        self.cleaning.check()
        if not self.chat:
            return self
        self.chat.check()
        given = dataclasses.asdict(dataclasses.replace(self.cleaning, drop_duplicates=False))
        for name in (name for name, value in dataclasses.asdict(Cleaning()).items() if given[name] != value):
            raise ConfigError(
                f"--{name.replace('_', '-')}: {given[name]} given; allowed with --chat: --drop-duplicates alone, as "
                "the other steps are of text"
            )
        if any(source.as_text for source in self.sources):
            raise ConfigError("--as-text: given; allowed with --chat: conversations, which no text file holds")
        sources = tuple(dataclasses.replace(one, text=WHOLE) for one in self.sources)
        return dataclasses.replace(self, sources=sources)


@dataclass(frozen=True)
class _Piece:
    """One part of the text, in the order of reading."""

    source: str
    folder: str  # of its splits, within the output: "" or "NAME/"
    part: Part


def prepare(
    recipe: Recipe,
    output: Path,
    *,
    on_bad: str = "stop",
    num_workers: int | None = None,
    console: Console | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    commit_seconds: float = COMMIT_SECONDS,
) -> dict[str, Manifest]:
    """Pack text into `output`/train and `output`/valid, or with several sources into `output`/NAME/train and so on.

    `output` appears whole or not at all, with report.json, report.png and an overlay for the silo's configuration.
    What has been prepared by the same recipe is left as it is; what was begun by it (in `output`.partial) goes on.
    Records that cannot be used stop the work (`on_bad` "stop") or are counted ("skip"). `num_workers` processes, by
    default one a core; 0 works in this process. Returns each split's manifest.

    Raises ConfigError for a user's mistake, unusable text or a full disk, and StoppedError when `asked_to_stop`.
    """
    check_on_bad(on_bad)
    recipe = recipe.checked()
    job, sha256 = _job(recipe), tokenizer_sha256(tokenizer_file(recipe.tokenizer), key="--tokenizer")
    console = console or Console(stderr=True)
    listings = _listings(recipe, on_bad, console, asked_to_stop)
    pieces = _pieces(listings)
    num_workers = workers_for([piece.part.num_bytes for piece in pieces]) if num_workers is None else num_workers
    begin_workers(num_workers, __name__, *(["transformers.utils.chat_template_utils"] if recipe.chat else []))
    vocabulary = ChatEncoder(job) if isinstance(job, ChatJob) else PlainText(job.tokenizer)
    terms = _terms(recipe, pieces, job, sha256)
    partial = output.with_name(output.name + ".partial")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        manifests = _already_there(output, terms)
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed after its last rename
        return manifests
    lock = lock_directory(partial, f"preparing {output}")
    try:
        packing = _Packing(
            job,
            vocabulary=vocabulary,
            terms=terms,
            pieces=pieces,
            left_out={name: listing.num_left_out for name, listing in listings.items()},
            partial=partial,
            num_workers=num_workers,
            on_bad=on_bad,
        )
        manifests = packing.run(console, asked_to_stop, commit_seconds)
        _write_overlay(partial / "output", output, recipe.sources, manifests)
        (partial / "output").replace(output)
        shutil.rmtree(partial)
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            f"--output: {output}: {reason}: mend it (make room), then run the same command again; it goes on from "
            f"{partial}"
        ) from None
    finally:
        os.close(lock)
    return manifests


def _remove_unfinished(partial: Path) -> None:
    """What an attempt left that was killed while it wrote a file."""
    for unfinished in partial.glob(f"output/**/{UNFINISHED}"):
        shutil.rmtree(unfinished)


def _listings(recipe: Recipe, on_bad: str, console: Console, asked_to_stop: Callable[[], bool]) -> dict[str, Listing]:
    """What there is of each source, by its name; said before anything is read."""

    def check() -> None:
        if asked_to_stop():
            raise StoppedError

    if not recipe.sources:
        raise ConfigError("corpus: nothing given; allowed: files, folders or globs of text, --dataset or --sources")
    names = [source_name(source) for source in recipe.sources]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"corpus: sources named {', '.join(names)} given; allowed: each name once: put a glob in quotes, or use "
            "--sources"
        )
    listings = {name: find_text(source, check) for name, source in zip(names, recipe.sources, strict=True)}
    for name, listing in listings.items():
        for line in listing.lines(name, held_out=recipe.held_out):
            console.print(Text(line), soft_wrap=True)
    check_listed(listings.values() if on_bad == "stop" else (), advice=", or give --on-bad skip")
    return listings


def _pieces(listings: dict[str, Listing]) -> list[_Piece]:
    """All parts of all sources, held-out text first: what it repeats is then dropped from the training text."""
    pieces = [
        _Piece(name, f"{name}/" if len(listings) > 1 else "", part)
        for name, listing in listings.items()
        for part in listing.parts
    ]
    if all(piece.part.split == "valid" for piece in pieces):
        raise ConfigError("corpus: all files given are held out, by their names; allowed: text to train on, too")
    return sorted(pieces, key=lambda piece: piece.part.split != "valid")


def _job(recipe: Recipe) -> Job | ChatJob:
    """What workers are told. Raises ConfigError."""
    file = tokenizer_file(recipe.tokenizer)
    if not (given := recipe.chat):
        return Job(tokenizer=file, cleaning=recipe.cleaning, held_out=recipe.held_out)
    return ChatJob(
        tokenizer=file,
        template=find_template(file, given.chat_template, given.chat_date),
        sequence_tokens=given.sequence_tokens,
        too_long=given.too_long,
        held_out=recipe.held_out,
        prompt_tokens=given.prompt_tokens,
        pairs=given.pairs,
    )


def _terms(recipe: Recipe, pieces: list[_Piece], job: Job | ChatJob, tokenizer_sha256: str) -> dict[str, Any]:
    """All that decides about the bytes of the shards, as JSON holds it. A file is known by name, size and time."""
    extra: dict[str, Any] = {"documents": versions()} if any(p.part.kind == "document" for p in pieces) else {}
    if recipe.cleaning.asks_languages:
        extra |= {"languages": {languages.PACKAGE: languages.version()}}
    if isinstance(job, ChatJob):
        template = job.template
        extra["chat"] = {
            "template_sha256": template.sha256,
            "special_tokens": dict(template.special_tokens),
            "date": template.date,
            "sequence_tokens": job.sequence_tokens,
            "too_long": job.too_long,
            **({"prompt_tokens": job.prompt_tokens} if job.prompt_tokens else {}),
            **({"pairs": True} if job.pairs else {}),
        }
    return extra | {
        "text": [[p.source, Path(p.part.path).name, *part_identity(p.part)[1:]] for p in pieces],
        "tokenizer_sha256": tokenizer_sha256,
        "cleaning": told(dataclasses.asdict(recipe.cleaning)),
        "held_out": recipe.held_out,
        "shard_tokens": recipe.shard_tokens,
    }


def _differences(ours: dict[str, Any], theirs: Any) -> str:
    """The names of the terms that differ; theirs may be of another version of atoll."""
    if isinstance(theirs, dict) and isinstance(cleaning := theirs.get("cleaning"), dict):
        theirs = theirs | {"cleaning": told(cleaning)}
    return ", ".join(key for key in ours if not isinstance(theirs, dict) or theirs.get(key) != ours[key])


def _already_there(output: Path, terms: dict[str, Any]) -> dict[str, Manifest]:
    """The manifests of what `output` holds, if it was made by the same recipe."""
    try:
        recorded = json.loads((output / REPORT_FILE).read_bytes())["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--output: {output} exists and is no prepared text: delete it or choose another --output"
        ) from None
    if differing := _differences(terms, recorded):
        raise ConfigError(
            f"--output: {output} was prepared with other {differing}: delete it or choose another --output"
        )
    files = sorted(output.rglob("manifest.json"))
    return {str(file.parent.relative_to(output)): read_manifest(file.parent, key="--output") for file in files}


class _Packing:
    """One attempt at the work in `partial`."""

    def __init__(
        self,
        job: Job | ChatJob,
        *,
        vocabulary: PlainText | ChatEncoder,
        terms: dict[str, Any],
        pieces: list[_Piece],
        left_out: dict[str, dict[str, int]],
        partial: Path,
        num_workers: int,
        on_bad: str,
    ) -> None:
        _remove_unfinished(partial)
        self._pieces, self._left_out, self._partial = pieces, left_out, partial
        self._num_workers, self._on_bad, self._job = num_workers, on_bad, job
        self._chat = None
        if isinstance(job, ChatJob):
            self._chat = Chat(
                template_sha256=job.template.sha256,
                sequence_tokens=job.sequence_tokens,
                prompt_tokens=job.prompt_tokens or None,
                num_pairs=0 if job.pairs else None,
            )
        self._work = Work(
            partial,
            terms,
            vocab_size=vocabulary.vocab_size,
            end_of_text_id=vocabulary.end_id,
            near_duplicates=terms["cleaning"]["near_duplicates"],
            chat=self._chat,
        )
        if differing := _differences(terms, self._work.terms):
            self._work.close()
            raise ConfigError(
                f"--output: {partial} was begun with other {differing}: delete it, or choose another --output"
            )

    def run(self, console: Console, asked_to_stop: Callable[[], bool], commit_seconds: float) -> dict[str, Manifest]:
        """Do what is left; returns the manifests."""
        work = self._work
        if isinstance(self._job, Job) and self._job.cleaning.drop_overlap:
            self._job = dataclasses.replace(self._job, held_out_grams=self._held_out_grams(asked_to_stop))
        try:
            with Speed(console, "packing", [piece.part.num_bytes for piece in self._pieces]) as speed:
                committed = time.monotonic()
                task = chat.encode if self._chat else encode.encode
                for (index, block), encoded in self._each_block(task, work.place):
                    stop_at_bad(encoded.bad, self._on_bad)
                    piece = self._pieces[index]
                    work.take(encoded, piece.source, piece.folder, (index, *block.next))
                    speed.update(index, block.bytes_read, work.num_tokens)
                    stop = asked_to_stop()
                    if stop or time.monotonic() - committed >= commit_seconds:
                        work.commit()
                        committed = time.monotonic()
                    if stop:
                        raise StoppedError
            manifests = self._finish()
            for line in self._too_little_held_out():
                console.print(Text(line), soft_wrap=True)
            return manifests
        finally:
            work.close()

    def _finish(self) -> dict[str, Manifest]:
        work = self._work
        counts = list(work.counts.values())
        if not any("train" in source["kept"] for source in counts):
            num_read = sum(source["documents"] for source in counts)
            raise ConfigError(f"corpus: no document to train on is left of {num_read} that were read")
        canonical = json.dumps(work.terms, sort_keys=True, separators=(",", ":"))
        manifests = work.finish(
            tokenizer_sha256=work.terms["tokenizer_sha256"],
            recipe_sha256=hashlib.sha256(canonical.encode()).hexdigest(),
        )
        num_bytes = sum(source["bytes"] for source in counts)
        report = {
            "format": 1,
            "sources": work.counts,
            "left_out": self._left_out,
            "recipe": work.terms,
            "seconds": work.seconds,
            "bytes_per_second": num_bytes / work.seconds,
            "tokens_per_second": work.num_tokens / work.seconds,
        }
        if isinstance(self._job, ChatJob):
            with atomic_path(work.output / TEMPLATE_FILE) as temporary:
                temporary.write_bytes(self._job.template.source.encode())
            report["rows"] = {split: self._filled(split, manifest) for split, manifest in manifests.items()}
        write_report(report, work.output)
        return manifests

    def _filled(self, split: str, manifest: Manifest) -> dict[str, int]:
        """How well a split's rows are filled, and what of them is trained."""
        assert self._chat
        source, _, name = split.rpartition("/")
        counts = self._work.counts[source] if source else next(iter(self._work.counts.values()))
        return {
            "rows": manifest.num_tokens // self._chat.sequence_tokens,
            "row_tokens": self._chat.sequence_tokens,
            "trained_tokens": manifest.num_trained_tokens,
            "padding_tokens": manifest.num_tokens - counts["kept"][name]["tokens"],
        }

    def _too_little_held_out(self) -> list[str]:
        """A line for each source of whose documents too few were held out by their hash to measure a loss with."""
        share, lines = self._job.held_out, []
        by_hash = {piece.source for piece in self._pieces if not piece.part.split}
        for name, source in self._work.counts.items():
            kept = source["kept"].get("valid", _NOTHING_KEPT)
            documents, tokens = (sum(one[what] for one in source["kept"].values()) for what in ("documents", "tokens"))
            if not share or name not in by_hash or not tokens:
                continue
            wanted = max(ENOUGH_DOCUMENTS / documents, ENOUGH_TOKENS / tokens)
            if kept["documents"] < ENOUGH_DOCUMENTS or kept["tokens"] < ENOUGH_TOKENS:
                better = f"--held-out {min(MOST_HELD_OUT, math.ceil(wanted * 100) / 100):g}"
                enough = f"{better} is the most that makes sense" if wanted > MOST_HELD_OUT else f"{better} would do"
                lines.append(
                    f"{name}: warning: --held-out {share:g} holds out {kept['documents']:,} of {documents:,} documents "
                    f"({kept['tokens']:,} tokens), too few for a loss that says much: {enough}, at another --output"
                )
        return lines

    def _each_block(
        self, task: Callable[[tuple[int, Block]], Any], place: tuple[int, int, int]
    ) -> Iterator[tuple[tuple[int, Block], Any]]:
        """Every block from `place` on, with its part's index, and what the task made of it."""

        def blocks() -> Iterator[tuple[int, Block]]:
            first, *within = place
            for index, piece in enumerate(self._pieces[first:], start=first):
                start = (within[0], within[1]) if index == first else (0, 0)
                yield from ((index, block) for block in read_blocks(piece.part, start))

        start = chat.start if self._chat else encode.start
        return in_order(task, blocks(), num_workers=self._num_workers, start=start, arguments=(self._job,))

    def _held_out_grams(self, asked_to_stop: Callable[[], bool]) -> Path:
        """A first reading: the 13-grams of all held-out documents, in a file that the workers map."""
        file = self._partial / "held_out_grams.npy"
        if file.exists():
            return file

        def grams() -> Iterator[Any]:
            for _, found in self._each_block(encode.held_out_grams, (0, 0, 0)):
                if asked_to_stop():
                    raise StoppedError
                yield found

        with atomic_path(file) as temporary:
            write_grams(temporary, grams())
        return file


def _write_overlay(directory: Path, output: Path, sources: tuple[Source, ...], manifests: dict[str, Manifest]) -> None:
    """Write the lines of a silo's configuration that name what has been prepared."""
    train = [split for split in manifests if split.split("/")[-1] == "train"]
    names = [source_name(source) for source in sources]
    folders = {name: f"{name}/" if len(sources) > 1 else "" for name in names}
    silo: dict[str, Any] = {"data": [str(output / split) for split in train]}
    weights = {f"{folders[source_name(source)]}train": source.weight for source in sources}
    if any(weight is not None for weight in weights.values()):
        silo["data_weights"] = [weights[split] for split in train]
    silo["valid"] = {
        name: str(output / f"{folder}valid") for name, folder in folders.items() if f"{folder}valid" in manifests
    }
    with atomic_path(directory / OVERLAY_FILE) as temporary:
        temporary.write_text(yaml.safe_dump({"silo": silo} | _terms_of_rows(output, manifests), sort_keys=False))
        os.chmod(temporary, 0o644)


def _terms_of_rows(output: Path, manifests: dict[str, Manifest]) -> dict[str, Any]:
    """What a run has to have agreed on to train on rows of conversations; nothing for text."""
    chat = next(iter(manifests.values())).chat
    if chat is None:
        return {}
    terms: dict[str, Any] = {"chat_template": str(output / TEMPLATE_FILE), "document_masking": True}
    if chat.num_pairs is not None:
        terms["inner"] = {"loss": "dpo"}
    if chat.prompt_tokens:
        terms["model"] = {"adapter": {"kind": PROMPT, "tokens": chat.prompt_tokens}}
    return terms | {"sequence_tokens": chat.sequence_tokens}
