"""Read html, pdf, docx and epub: converted once into plain text in the cache, and then read like txt.

Of html and epub the text is read, in paragraphs; of pdf what pypdf finds on each page; of docx paragraphs and tables.
pdf and docx need the packages of `smolforge[documents]`.
"""

from __future__ import annotations

import io
import logging
import posixpath
import re
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

from smolforge.data.readers.text import PlainTextReader, not_utf8
from smolforge.data.sources.local import INSTALL
from smolforge.errors import DataError

logger = logging.getLogger(__name__)

MAX_UNPACKED = 512 << 20  # bytes of all parts of a book
_CHARSET = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?([\w.:-]+)""", re.IGNORECASE)
_PARAGRAPHS = {
    "p", "div", "section", "article", "blockquote", "pre", "table", "ul", "ol", "dl", "hr", "figure", "main", "aside",
    "header", "footer", "nav", "title", "h1", "h2", "h3", "h4", "h5", "h6",
}  # fmt: skip
_LINES = {"br", "li", "tr", "dt", "dd", "figcaption", "option"}
_HIDDEN = {"script", "style"}


class DocumentReader(PlainTextReader):
    """A document with a layout, through its plain text."""

    def is_copied(self) -> bool:
        return True

    def convert(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        data, name = b"".join(blocks), self.shard.name
        convert = {"html": html_text, "pdf": _pdf_text, "docx": _docx_text, "epub": _epub_text}[self.shard.format]
        try:
            text = convert(data)
        except ModuleNotFoundError as error:
            problem = f"{name} needs the package {error.name}"
            raise DataError(problem, field="data.sources", hint=f"Install it: {INSTALL}") from None
        except UnicodeDecodeError as error:
            raise not_utf8(name, error, 0) from None
        except Exception as error:  # these libraries raise errors of many kinds for damaged files
            message = " ".join(str(error).split())[:200] or type(error).__name__
            problem = f"{name} cannot be read as {self.shard.format}: {message}"
            raise DataError(problem, field="data.sources", hint="Write the file again, or take it out.") from None
        if not text.strip():
            logger.warning("%s holds no text, only pictures perhaps", name)
        yield text.encode("utf-8", "replace")


def html_text(data: bytes) -> str:
    """The text of a page, in paragraphs: in the encoding that it names, else in UTF-8."""
    named = _CHARSET.search(data[:2048])
    name = named[1].decode().lower() if named else "utf-8"
    try:
        page = data.decode("utf-8" if name.startswith("utf") else name)  # what was UTF-16 by its mark is UTF-8 by now
    except LookupError:
        page = data.decode("utf-8")
    parser = _TextOfHtml()
    parser.feed(page.removeprefix("\ufeff"))
    parser.close()
    return tidy("".join(parser.parts))


class _TextOfHtml(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden += tag in _HIDDEN
        self._verbatim += tag == "pre"
        self._break(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in _HIDDEN))
        self._verbatim = max(0, self._verbatim - (tag == "pre"))
        if tag not in _LINES:
            self._break(tag)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if self._verbatim else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.parts.append("\t")
        elif tag in _PARAGRAPHS or tag in _LINES:
            self.parts.append("\n\n" if tag in _PARAGRAPHS else "\n")


def tidy(text: str) -> str:
    """Text with at most one blank line between its paragraphs and no blanks at the end of lines."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]*\n(?: (?=\S))?", "\n", text)).strip() + "\n"


def _pdf_text(data: bytes) -> str:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it tells of each font that is not quite right
    return tidy("\n\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages))


def _docx_text(data: bytes) -> str:
    import docx

    parts = []
    for block in docx.Document(io.BytesIO(data)).iter_inner_content():
        rows: Any = getattr(block, "rows", None)
        if rows is None:
            parts.append(getattr(block, "text", ""))
        else:
            parts.append("\n".join("\t".join(cell.text for cell in row.cells) for row in rows))
    return tidy("\n\n".join(parts))


def _epub_text(data: bytes) -> str:
    with zipfile.ZipFile(io.BytesIO(data)) as book:
        if sum(entry.file_size for entry in book.infolist()) > MAX_UNPACKED:
            raise ValueError(f"its parts are larger than {MAX_UNPACKED >> 20} MiB")
        container = ElementTree.fromstring(book.read("META-INF/container.xml"))
        place = next(element.attrib["full-path"] for element in container.iter() if "full-path" in element.attrib)
        package = ElementTree.fromstring(book.read(place))
        items = {e.attrib["id"]: unquote(e.attrib["href"]) for e in package.iter() if {"id", "href"} <= e.attrib.keys()}
        chapters = [items[e.attrib["idref"]] for e in package.iter() if e.attrib.get("idref") in items]
        names = [posixpath.normpath(posixpath.join(posixpath.dirname(place), name)) for name in chapters]
        return "\n\n".join(html_text(book.read(name)).strip() for name in names) + "\n"
