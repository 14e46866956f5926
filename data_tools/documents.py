"""The text of PDF, Word and HTML files, by the packages of the extra `documents`; one file is one document.

What the packages do not read is not there: no text of pictures, so none of a scan, and of HTML all that a page says,
its menus, too. What a document cannot be read for is a Bad that names it.
"""

import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Bad, Part, checked_text
from data_tools.pieces import one_line, unreadable

# The module, and the package that has it.
PACKAGES = {"pypdf": "pypdf", "docx": "python-docx", "bs4": "beautifulsoup4", "lxml": "lxml"}
EXTRA = "pip install 'atoll[documents]'"
# Of HTML, what a reader does not see as text, and what ends a line.
_UNSEEN = ("script", "style", "noscript", "template", "head")
_BLOCKS = re.compile(
    "address|article|aside|blockquote|br|caption|dd|div|dl|dt|fieldset|figcaption|figure|footer|form|h[1-6]|header|hr|li"
    "|main|nav|ol|p|pre|section|table|tr|ul"
)
_SPACES, _LINE_ENDS = re.compile(r"\s+"), re.compile(r"[ \t]*\n(?:[ \t]*\n)*")
# Left of the space between two blocks; code that is indented has more of them.
_ONE_SPACE = re.compile(r"(?m)^ (?! )")


class _NoTextError(Exception):
    """Why there is no text, as a reason and with what to do."""


def is_installed() -> bool:
    """Whether the extra `documents` is."""
    return all(importlib.util.find_spec(module) for module in PACKAGES)


def versions() -> dict[str, str]:
    """The packages that read documents: another version may read another text."""
    return {package: importlib.metadata.version(package) for package in PACKAGES.values()}


def document_text(part: Part) -> str | Bad:
    """All text of a document; the Bad says why there is none."""
    ending = Path(part.path).suffix.lower()
    read = {".pdf": _pdf_text, ".docx": _docx_text}.get(ending, _html_text)
    try:
        with open(part.path, "rb") as file:
            if not file.read(1):
                return Bad("empty file", f"{part.path}: empty: fill it or leave it out")
        text = read(part.path)
        if not text.strip():
            raise _NoTextError("without text", "pictures only, perhaps of a scan: read it by OCR, or leave it out")
    except _NoTextError as error:
        reason, what = error.args
        return Bad(f"{ending} {reason}", f"{part.path}: {reason} ({what})")
    except OSError as error:
        ends = unreadable(error)
        return Bad(ends.reason, f"{part.path}: {ends.what}")
    except Exception as error:  # what is damaged raises errors of every kind
        return Bad(f"damaged {ending}", f"{part.path}: damaged ({one_line(error)}): copy it again, or leave it out")
    return checked_text(part, 1, text)


def _pdf_text(path: str) -> str:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells of every oddity; the result says it all
    with open(path, "rb") as file:
        reader = pypdf.PdfReader(file)
        if reader.is_encrypted and not reader.decrypt(""):
            raise _NoTextError("encrypted", "save it without a password, or leave it out")
        return "\n".join(page.extract_text() for page in reader.pages)


def _docx_text(path: str) -> str:
    import docx

    return "\n".join(_docx_lines(docx.Document(path)))


def _docx_lines(document: Any) -> Iterator[str]:
    """Paragraphs as lines, rows of tables as lines with tabs between cells, in the order of the document."""
    for item in document.iter_inner_content():
        if hasattr(item, "rows"):
            for row in item.rows:
                # One that spans several columns is named for each of them.
                yield "\t".join({cell._tc: cell.text.strip() for cell in row.cells}.values())
        else:
            yield item.text


def _html_text(path: str) -> str:
    import bs4

    soup = bs4.BeautifulSoup(Path(path).read_bytes(), "lxml")
    if soup.contains_replacement_characters:
        raise _NoTextError("of another encoding than it says", "convert it to UTF-8, or leave it out")
    for unseen in soup(_UNSEEN):
        unseen.decompose()
    for text in soup.find_all(string=True):
        if isinstance(text, bs4.element.PreformattedString):  # a comment, a declaration
            text.extract()
        elif not text.find_parent("pre"):
            text.replace_with(_SPACES.sub(" ", text))
    for block in soup.find_all(_is_block):
        block.insert_before("\n")
        block.insert_after("\n")
    for cell in soup(("td", "th")):
        cell.insert_after("\t")
    return _ONE_SPACE.sub("", _LINE_ENDS.sub("\n", f"{soup.get_text()}\n")).removeprefix("\n")


def _is_block(tag: Any) -> bool:
    return bool(_BLOCKS.fullmatch(tag.name))
