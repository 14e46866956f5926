"""Conversations of a file, packed to be evaluated: in rows by their kind, as a model's own template renders them."""

from dataclasses import dataclass
from pathlib import Path

from data_tools.chat import ChatEncoder, ChatJob
from data_tools.chat_template import Template
from data_tools.formats import WHOLE, Bad
from data_tools.pack import SHARD_TOKENS
from data_tools.rows import Kept, Rows
from data_tools.sources import Source, find_text, read_blocks
from pretrain.config.errors import ConfigError
from pretrain.silo.shards import Chat, tokenizer_sha256
from pretrain.silo.writer import SplitWriter


@dataclass(kw_only=True, frozen=True)
class Packed:
    """What became of a file."""

    kinds: dict[str, Path]
    """Kind of conversation (see `Conversation.kind`) to a packed split of all that are of it."""
    num_too_long: int
    """How many have more tokens than a row, and are in no split."""


def pack_file(
    file: Path, output: Path, *, tokenizer: Path, template: Template, sequence_tokens: int, prompt_tokens: int = 0
) -> Packed:
    """Render, tokenize and pack all conversations of a file, in any form that `atoll data prepare --chat` reads.

    Before each is room for a prompt of `prompt_tokens`. Raises ConfigError for what is no conversation, or
    where none is short enough.
    """
    encoder = ChatEncoder(
        ChatJob(
            tokenizer=tokenizer,
            template=template,
            sequence_tokens=sequence_tokens,
            too_long="skip",
            held_out=0.0,
            prompt_tokens=prompt_tokens,
        )
    )
    chat = Chat(template_sha256=template.sha256, sequence_tokens=sequence_tokens, prompt_tokens=prompt_tokens or None)
    splits: dict[str, tuple[SplitWriter, Rows]] = {}
    num_too_long = 0
    for part in find_text(Source(path=str(file), text=WHOLE)).parts:
        for block in read_blocks(part):
            bad, dropped = list[Bad](), list[tuple[str, int]]()
            for text, tokens, learned in encoder.each(block, bad, dropped):
                if text.kind not in splits:
                    writer = SplitWriter(
                        output / text.kind,
                        vocab_size=encoder.vocab_size,
                        end_of_text_id=encoder.end_id,
                        shard_tokens=SHARD_TOKENS,
                        chat=chat,
                    )
                    splits[text.kind] = writer, Rows(sequence_tokens, encoder.end_id, writer.write)
                splits[text.kind][1].add(Kept(tokens, learned, text.num_bytes))
            if bad:
                raise ConfigError(bad[0].message)
            num_too_long += len(dropped)
    if not splits:
        raise ConfigError(f"--data: {str(file)!r} given; it has no conversation of up to {sequence_tokens:,} tokens")
    for writer, rows in splits.values():
        rows.flush()
        writer.finish(tokenizer_sha256=tokenizer_sha256(tokenizer), recipe_sha256="")
    return Packed(kinds={kind: output / kind for kind in sorted(splits)}, num_too_long=num_too_long)
