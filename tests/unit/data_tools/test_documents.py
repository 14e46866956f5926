"""PDF, Word and HTML as text; what cannot be read is named and counted."""

import json
import sys
from pathlib import Path

import pytest

from data_tools.pack import Recipe, prepare
from data_tools.sources import Source, find_text
from data_tools.tokenizer import train_tokenizer
from tests.support import one_line_error
from tests.text_files import TEXTS, messages, part_of, records_of, write

pypdf = pytest.importorskip("pypdf", reason="pip install 'atoll[documents]'")
docx = pytest.importorskip("docx", reason="pip install 'atoll[documents]'")
pytest.importorskip("bs4", reason="pip install 'atoll[documents]'")

HTML = """<!doctype html><html><head><title>No text</title><style>p {}</style></head><body><!-- nor this -->
<nav>Menu</nav><h1>The  <b>big</b>
case</h1><p>One<br>two &amp; \u65e5\u672c</p><script>x()</script>
<table><tr><td>a</td><td>b</td></tr></table><pre>def f():
    return 2</pre></body></html>"""


def pdf(*pages: str) -> bytes:
    """A PDF with a line of text on each page (ISO 32000-1, 7.5)."""
    streams = [f"BT /F1 12 Tf 50 700 Td ({page}) Tj ET" if page else "" for page in pages]
    kids = " ".join(f"{4 + 2 * index} 0 R" for index in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for index, stream in enumerate(streams):
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {5 + 2 * index} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    raw, offsets = "%PDF-1.4\n", []
    for number, one in enumerate(objects, start=1):
        offsets.append(len(raw))
        raw += f"{number} 0 obj\n{one}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    end = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(raw)}\n%%EOF\n"
    return f"{raw}xref\n0 {size}\n0000000000 65535 f \n{table}{end}".encode()


def write_docx(path: Path) -> Path:
    document = docx.Document()
    document.add_heading("A ruling")
    document.add_paragraph("Costs follow the event.")
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip(table._cells, ("sum", "10", "over both", ""), strict=True):
        cell.text = text
    table.cell(1, 0).merge(table.cell(1, 1))
    document.add_paragraph("The end.")
    document.save(str(path))
    return path


def test_documents_by_hand(tmp_path: Path) -> None:
    read = {
        write(tmp_path / "a.pdf", pdf("The appeal", "is allowed.")): "The appeal\nis allowed.",
        write_docx(tmp_path / "b.DOCX"): "A ruling\nCosts follow the event.\nsum\t10\nover both\nThe end.",
        write(tmp_path / "c.html", HTML.encode()): (
            "Menu\nThe big case\nOne\ntwo & \u65e5\u672c\na\tb\ndef f():\n    return 2\n"
        ),
        write(tmp_path / "d.htm", '<meta charset="latin-1"><p>caf\xe9'.encode("latin-1")): "caf\xe9\n",
    }
    for file, text in read.items():
        assert records_of(part_of(file)) == [(1, text)]
        assert records_of(part_of(file), (-1, 1)) == []  # goes on after it
    assert [Path(part.path).name for part in find_text(Source(path=str(tmp_path))).parts] == [
        file.name for file in read
    ]
    # Its source, where that is what somebody wants.
    (part,) = find_text(Source(path=str(tmp_path / "c.html"), as_text=("*.html",))).parts
    assert records_of(part) == [(1, HTML)]


def test_what_cannot_be_read_is_named_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    scan, whole = write(folder / "scan.pdf", pdf("", "")), write(folder / "whole.pdf", pdf("The appeal is allowed."))
    writer = pypdf.PdfWriter(clone_from=str(whole))
    writer.encrypt("secret")
    writer.write(str(folder / "locked.pdf"))
    write(folder / "cut.docx", write_docx(tmp_path / "b.docx").read_bytes()[:5_000])
    write(folder / "no.pdf", b"no PDF")
    assert messages(part_of(scan)) == [
        ": without text (pictures only, perhaps of a scan: read it by OCR, or leave it out)"
    ]
    assert messages(part_of(folder / "locked.pdf")) == [": encrypted (save it without a password, or leave it out)"]
    recipe = Recipe(
        sources=(Source(path=str(folder)),),
        tokenizer=train_tokenizer(TEXTS, vocab_size=270, output=tmp_path),
        held_out=0.0,
    )
    message = one_line_error(prepare, recipe, tmp_path / "packed", num_workers=0)
    assert message.startswith(f"{folder / 'cut.docx'}: damaged (")
    assert message.endswith("copy it again, or leave it out, or give --on-bad skip")
    prepare(recipe, tmp_path / "packed", num_workers=0, on_bad="skip")
    report = json.loads((tmp_path / "packed" / "report.json").read_text())
    raw = report["sources"]["raw"]
    assert raw["bad"] == {"damaged .docx": 1, ".pdf encrypted": 1, "damaged .pdf": 1, ".pdf without text": 1}
    assert [example.split(":")[0] for example in raw["bad_examples"]] == [
        str(folder / name) for name in ("cut.docx", "locked.pdf", "no.pdf", "scan.pdf")
    ]
    assert raw["documents"] == 1
    assert "pypdf" in report["recipe"]["documents"]


def test_without_the_packages_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "raw" / "a.pdf", pdf("a"))
    monkeypatch.setitem(sys.modules, "pypdf", None)
    assert one_line_error(find_text, Source(path=str(file))) == (
        f"corpus: {str(file)!r} given; .pdf needs packages that are not installed: type pip install 'atoll[documents]'"
    )
    assert one_line_error(find_text, Source(path=str(tmp_path / "raw"))).endswith(
        "; there are 1 .pdf (a.pdf): type pip install 'atoll[documents]' to read .pdf"
    )
    write(tmp_path / "raw" / "b.txt", b"text")
    listing = find_text(Source(path=str(tmp_path / "raw")))
    assert listing.left_out == {".pdf": ["a.pdf"]}
    assert listing.remarks == ["to read .pdf, too, type pip install 'atoll[documents]'"]
