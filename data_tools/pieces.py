"""The bytes of files of text, unpacked piece by piece; which files these are, by the ends of their names."""

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Literal

import zstandard

from pretrain.host.foreign import shown

KINDS: dict[str, Literal["jsonl", "txt", "csv", "parquet"]] = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "txt": "txt",
    "text": "txt",
    "csv": "csv",
    "tsv": "csv",
}
PACKED = (".gz", ".zst", ".bz2", ".xz")
# A file is a document; data_tools.documents reads them.
DOCUMENTS = (".pdf", ".docx", ".html", ".htm")
SUFFIXES = (*(f".{kind}{packed}" for kind in KINDS for packed in (*PACKED, "")), ".parquet", *DOCUMENTS)
# As a user is told of them.
FORMATS = f"{' '.join(f'.{kind}' for kind in KINDS)} [{' '.join(PACKED)}], .parquet, {' '.join(DOCUMENTS)}"
RECORD_FORMATS = (
    f"{' '.join(f'.{kind}' for kind, how in KINDS.items() if how == 'jsonl')} [{' '.join(PACKED)}], .parquet"
)
# What a plain file is read by.
READ_BYTES = 1 << 20
# What is unpacked at a time; so much text before the damage in an archive can be lost.
PIECE_BYTES = 1 << 16
MAX_QUOTED_CHARACTERS = 300


class PartEnds(Exception):
    """Nothing more can be read from a part. Has the reason of its Bad, and the message without the place."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(reason, what)
        self.reason, self.what = reason, what


def suffix_of(name: str) -> str:
    """The one of SUFFIXES that a file's name ends with, in letters of any case, or nothing."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def packing_of(name: str) -> str:
    """The one of PACKED that a file's name ends with, in letters of any case, or nothing."""
    return next((packed for packed in PACKED if name.lower().endswith(packed)), "")


def one_line(value: object) -> str:
    """Another's words, fit to be quoted in a line of ours."""
    return shown(" ".join(str(value).split()), limit=MAX_QUOTED_CHARACTERS)


class Pieces:
    """The unpacked bytes of a file from an offset on, piece by piece. Raises PartEnds where they end early."""

    def __init__(self, path: str, offset: int) -> None:
        self._path, self._offset = path, offset
        self.bytes_read = 0

    def __iter__(self) -> Iterator[bytes]:
        packing, skip_bytes = packing_of(self._path), self._offset
        try:
            with open(self._path, "rb") as raw:
                if packing == ".gz":
                    pieces = _gzip_pieces(raw)
                elif packing == ".zst":
                    pieces = _zstandard_pieces(raw)
                elif packing == ".bz2":
                    pieces = _stream_pieces(raw, bz2.BZ2Decompressor)
                elif packing == ".xz":
                    pieces = _stream_pieces(raw, lzma.LZMADecompressor)
                else:
                    raw.seek(skip_bytes)
                    pieces, skip_bytes = iter(lambda: raw.read(READ_BYTES), b""), 0
                for piece in pieces:
                    self.bytes_read = raw.tell()
                    if len(piece) > skip_bytes:
                        yield piece[skip_bytes:]
                    skip_bytes = max(0, skip_bytes - len(piece))
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError) as error:
            raise PartEnds("damaged archive", f"damaged archive ({one_line(error)}): copy it again") from None
        except OSError as error:
            raise unreadable(error) from None


def unreadable(error: OSError) -> PartEnds:
    what = os.strerror(error.errno) if error.errno else one_line(error)
    return PartEnds("unreadable", f"unreadable ({what}): mend its permissions or its disk, or leave it out")


def _gzip_pieces(raw: IO[bytes]) -> Iterator[bytes]:
    # read1: what precedes an error is returned before it is raised.
    unpacked = gzip.GzipFile(fileobj=raw)
    return iter(lambda: unpacked.read1(PIECE_BYTES), b"")


def _zstandard_pieces(raw: IO[bytes]) -> Iterator[bytes]:
    """Unpack frame after frame. The library's own reader takes a file that was cut off for a whole one."""
    frame, packed = None, b""
    while packed or (packed := raw.read(PIECE_BYTES)):
        # Large corpora come with the largest window there is (zstd --long=31).
        frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        yield frame.decompress(packed)
        packed = frame.unused_data if frame.eof else b""
        frame = None if frame.eof else frame
    if frame:
        raise EOFError("it ends within a frame")


def _stream_pieces(
    raw: IO[bytes], decompressor: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]
) -> Iterator[bytes]:
    """Unpack stream after stream. The libraries' own readers end in silence where a later one is damaged."""
    stream, packed = None, b""
    while True:
        if not packed and (stream is None or stream.needs_input) and not (packed := raw.read(PIECE_BYTES)):
            break
        if stream is None:
            packed = packed.lstrip(b"\0")  # what xz fills up with between streams
            if not packed:
                continue
            stream = decompressor()
        try:
            yield stream.decompress(packed, PIECE_BYTES)
        except OSError as error:  # of bzip2, which has no error of its own
            raise EOFError(str(error)) from None
        packed = stream.unused_data if stream.eof else b""
        stream = None if stream.eof else stream
    if stream:
        raise EOFError("it ends within a stream")
