"""Small documents of each kind with a layout, as bytes."""

import io
import zipfile

PAGE = (
    "<!doctype html><html><head><title>Bread</title><style>p{}</style><script>var a = '<p>no</p>';</script></head><body>"
    "<h1>Rye &amp; wheat</h1><p>Mix   the\nflour.</p><p>Wait<br>one night.</p><ul><li>salt</li><li>water</li></ul></body></html>"
)
PAGE_TEXT = "Bread\n\nRye & wheat\n\nMix the flour.\n\nWait\none night.\n\nsalt\nwater\n"


def epub(chapters: dict[str, str], order: list[str]) -> bytes:
    """A book whose spine names the chapters in this order."""
    container = '<container><rootfiles><rootfile full-path="OPS/book.opf"/></rootfiles></container>'
    items = "".join(f'<item id="{name}" href="{name}.xhtml"/>' for name in chapters)
    spine = "".join(f'<itemref idref="{name}"/>' for name in order)
    package = f"<package><manifest>{items}</manifest><spine>{spine}</spine></package>"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as book:
        book.writestr("META-INF/container.xml", container)
        book.writestr("OPS/book.opf", package)
        for name, text in chapters.items():
            book.writestr(f"OPS/{name}.xhtml", f"<html><body><p>{text}</p></body></html>")
    return data.getvalue()


def docx(paragraphs: list[str], table: list[list[str]]) -> bytes:
    """A document of these paragraphs and a table after them."""
    import docx as library

    document, data = library.Document(), io.BytesIO()
    for text in paragraphs:
        document.add_paragraph(text)
    made = document.add_table(rows=len(table), cols=len(table[0]))
    for row, texts in zip(made.rows, table, strict=True):
        for cell, text in zip(row.cells, texts, strict=True):
            cell.text = text
    document.save(data)
    return data.getvalue()


def pdf(lines: list[str]) -> bytes:
    """One page with these lines in Helvetica."""
    content = "BT /F1 12 Tf 50 700 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    start = len(data)
    size = len(objects) + 1
    tail = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n"
    return data + tail.encode()
