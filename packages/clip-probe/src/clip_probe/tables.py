"""A report of headings, paragraphs, tables and pictures, as Markdown and as one HTML page."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Cell:
    """A figure in a table."""

    text: str
    best: bool = False  # of its kind, to be set in bold


@dataclass
class Report:
    """Parts in reading order; each is rendered to both formats as it is added."""

    title: str
    markdown: list[str] = field(default_factory=list[str])
    body: list[str] = field(default_factory=list[str])

    def heading(self, text: str) -> None:
        """Begin a section."""
        self.markdown.append(f"## {text}")
        self.body.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Plain text."""
        self.markdown.append(text)
        self.body.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> None:
        """A table; the first column is text, the others are figures."""
        lines = [
            "| " + " | ".join(_escape(name) for name in header) + " |",
            "| --- |" + " ---: |" * (len(header) - 1),
        ]
        page = ["<table><thead><tr>", *(f"<th>{html.escape(name)}" for name in header), "</thead>"]
        for row in rows:
            cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
            texts = (f"**{_escape(c.text)}**" if c.best else _escape(c.text) for c in cells)
            lines.append("| " + " | ".join(texts) + " |")
            page.append("<tr>")
            page += [f"<td{' class=best' * c.best}>{html.escape(c.text)}" for c in cells]
        self.markdown.append("\n".join(lines))
        self.body.append(f"<div class=scroll>{''.join(page)}</table></div>")

    def picture(self, file: Path, text: str) -> None:
        """A PNG: beside the Markdown by its name, in the page itself."""
        self.markdown.append(f"![{text}]({file.name})")
        png = file.read_bytes()
        width = int.from_bytes(png[16:20]) * 2 // 3  # drawn at 150 dots an inch, for screens of 100
        data = base64.b64encode(png).decode()
        alt = html.escape(text)
        self.body.append(
            f'<figure><img width={width} src="data:image/png;base64,{data}" alt="{alt}">'
            f"<figcaption>{alt}</figcaption></figure>"
        )

    def to_markdown(self) -> str:
        """The whole report."""
        return "\n\n".join([f"# {self.title}", *self.markdown]) + "\n"

    def to_html(self) -> str:
        """The whole report, one self-contained page."""
        title = html.escape(self.title)
        return "\n".join(
            [_HEAD.replace("TITLE", title), f"<h1>{title}</h1>", *self.body, "</main></html>\n"]
        )


def best_of(values: Sequence[float | None], texts: Sequence[str]) -> list[Cell]:
    """Cells of which the greatest values are marked, where there are two to choose from."""
    there = [value for value in values if value is not None]
    best = max(there, default=None) if len(there) > 1 else None
    return [
        Cell(text, value is not None and value == best)
        for value, text in zip(values, texts, strict=True)
    ]


def percent(share: float | None) -> str:
    """A share in percent, or a dash."""
    return "–" if share is None else f"{100 * share:.1f}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
  body { margin: 0; background: #fafafa; color: #222; font: 15px/1.45 system-ui, sans-serif; }
  main { max-width: 1080px; margin: 0 auto; padding: 16px 16px 48px; }
  h1 { font-size: 26px; } h2 { margin: 36px 0 8px; font-size: 20px; }
  p { max-width: 760px; color: #444; }
  .scroll { overflow-x: auto; margin: 12px 0; }
  table { border-collapse: collapse; background: #fff; font-variant-numeric: tabular-nums; }
  th, td { padding: 4px 12px; border-bottom: 1px solid #eee; text-align: right;
           white-space: nowrap; }
  th { font-weight: 600; color: #555; border-bottom: 2px solid #ddd; white-space: normal;
       max-width: 110px; vertical-align: bottom; }
  th:first-child, td:first-child { text-align: left; }
  .best { font-weight: 700; }
  figure { margin: 16px 0; } figure img { max-width: 100%; background: #fff; }
  figcaption { color: #666; font-size: 13px; }
</style>
<main>"""
