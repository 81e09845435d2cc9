"""An inspection as one HTML page that needs nothing beside it: no script, no font, no network."""

import base64
import html
import io
import math
import warnings
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image, ImageOps
from upath import UPath

from clip_data.atomic import write_text
from clip_data.inspector import Count, Example, Inspection
from clip_data.perceptual_hash import FORMATS
from clip_data.tally import Histogram
from clip_data.tar import read_span

_INK, _FAINT = "#1b4f8a", "#e6e6e6"
_THUMBNAIL = 256  # pixels, the longer side
_TEXT = 500  # characters of a caption
_ROWS = 25  # of a table

_TITLES = {
    "caption_characters": "Caption length",
    "caption_words": "Caption length",
    "width": "Image width",
    "height": "Image height",
    "aspect": "Aspect ratio",
    "image_bytes": "Image file size",
}

_STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 1160px; padding: 16px 20px 48px; color: #222; background: #fff;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif }
h1 { font-size: 24px; margin: 12px 0 2px; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 36px 0 10px; border-bottom: 1px solid #ddd; padding-bottom: 4px }
h3 { font-size: 15px; margin: 0 0 6px }
.note { color: #666; font-size: 13px; margin: 0 0 8px }
.tiles, .plots, .tables, .sheet { display: grid; gap: 14px }
.tiles { grid-template-columns: repeat(auto-fit, minmax(105px, 1fr)); margin-top: 18px }
.tiles div { background: #f3f6fa; border-radius: 6px; padding: 10px 12px; font-size: 13px }
.tiles b { display: block; font-size: 20px; white-space: nowrap; color: #1b4f8a; font-weight: 600 }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)) }
.plots figure { margin: 0 } .plots img { width: 100%; height: auto; display: block }
.tables { grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 28px }
table { border-collapse: collapse; width: 100%; table-layout: fixed; font-size: 13px }
td { padding: 2px 6px; border-bottom: 1px solid #f0f0f0; vertical-align: top }
td:first-child { overflow-wrap: anywhere; width: 55% }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #9ab4d0; height: 9px; margin-top: 5px; min-width: 1px; border-radius: 2px }
.checks { max-width: 520px }
.bad { color: #b3261e; font-weight: 600 }
.sheet { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); align-items: start }
.sheet figure { margin: 0; border: 1px solid #e3e3e3; border-radius: 6px; overflow: hidden }
.sheet .picture { height: 150px; background: #f3f3f3; display: flex; align-items: center;
  justify-content: center; color: #b3261e; font-size: 13px }
.sheet img { max-width: 100%; max-height: 150px }
.sheet figcaption { padding: 6px 8px; font-size: 12.5px; overflow-wrap: anywhere }
.sheet figcaption p { margin: 0 0 3px; display: -webkit-box; -webkit-line-clamp: 6;
  -webkit-box-orient: vertical; overflow: hidden }
.sheet small { color: #777 }
.class { color: #1b4f8a; font-weight: 600 }
@media (max-width: 480px) { body { padding: 8px 12px 32px } .sheet, .tiles {
  grid-template-columns: 1fr 1fr } }
"""


def write_page(path: UPath, inspection: Inspection) -> None:
    """Write the page; the pictures of the contact sheet are read from their shards."""
    title = _text(f"Contents of {inspection.source}")
    body = "\n".join(
        [
            f"<h1>{_text(inspection.source)}</h1>",
            _tiles(inspection),
            _checks(inspection),
            '<h2>Lengths and sizes</h2>\n<div class="plots">',
            *(_plot(name, each) for name, each in inspection.histograms.items()),
            "</div>",
            f"<h2>{len(inspection.examples)} samples at random</h2>" if inspection.examples else "",
            '<div class="sheet">',
            *map(_figure, inspection.examples),
            "</div>",
            _tables(inspection),
        ]
    )
    head = (
        '<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>"
    )
    write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n",
    )


def _text(text: str) -> str:
    """For any place in the page. What XML cannot carry is shown as an escape."""
    shown = "".join(c if c.isprintable() or c in " \n" else repr(c)[1:-1] for c in text)
    return html.escape(shown.encode("utf-8", "backslashreplace").decode())


def _tiles(inspection: Inspection) -> str:
    tiles = {
        "samples": f"{inspection.samples:,}",
        "captions": f"{inspection.captions:,}",
        "classes": f"{inspection.classes:,}" if inspection.classes else None,
        "shards": f"{inspection.shards:,}",
        "in tars": _size(inspection.bytes),
        **{f"samples in {name}": f"{count:,}" for name, count in inspection.splits.items()},
        **{f".{name or '?'}": f"{count:,}" for name, count in inspection.extensions.items()},
    }
    cells = (f"<div><b>{value}</b>{_text(name)}</div>" for name, value in tiles.items() if value)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _checks(inspection: Inspection) -> str:
    """What may be wrong, each with its share."""
    samples, captions = inspection.samples, inspection.captions
    rows = [
        ("damaged shards, read in part", len(inspection.damaged), inspection.shards),
        ("samples without an image", inspection.without_image, samples),
        ("images with a damaged header", inspection.unreadable_images, samples),
        ("samples without a caption", inspection.without_caption, samples),
        ("captions that are not UTF-8", inspection.not_utf8, samples),
        ("captions of one word or none", inspection.near_empty, captions),
    ]
    if inspection.classes and not captions:  # a labelled set needs none
        rows = [row for row in rows if "caption" not in row[0]]
    cells = (
        f'<tr><td>{what}</td><td class="n{" bad" if count else ""}">{count:,}</td>'
        f'<td class="n">{count / max(total, 1):.2%}</td></tr>'
        for what, count, total in rows
    )
    damaged = "".join(
        f'<p class="bad">{_text(tar)}: {_text(why)}</p>' for tar, why in inspection.damaged.items()
    )
    table = f'<table class="checks">{"".join(cells)}</table>'
    return f"<h2>Checks</h2>\n{table}{damaged}"


def _tables(inspection: Inspection) -> str:
    words, labels = inspection.words[: 2 * _ROWS], inspection.labels
    half = min(len(words), _ROWS)
    near_empty = f"{inspection.near_empty:,} in all"
    of_classes = f"{len(labels):,} with samples"
    if len(labels) > _ROWS:
        of_classes += f"; the largest {_ROWS} of them, the smallest has {labels[-1].count:,}"
    blocks = [
        _table("Samples of each class", of_classes, labels[:_ROWS]),
        _table("Most common words", f"1 to {half}, in lower case", words[:half]),
        _table("Most common words", f"{half + 1} to {len(words)}", words[half:]),
        _table("Captions of one word or none", near_empty, inspection.near_empty_captions[:_ROWS]),
        _table("Captions that repeat", "the same text again", inspection.repeated_captions[:_ROWS]),
    ]
    return f'<h2>Texts</h2>\n<div class="tables">{"".join(blocks)}</div>' if any(blocks) else ""


def _table(title: str, note: str, counts: Sequence[Count]) -> str:
    """Texts with their counts and a bar for each; nothing if there are none."""
    if not counts:
        return ""
    most = max(count.count for count in counts)
    rows = (
        f'<tr><td>{_text(each.text)}</td><td class="n">{each.count:,}</td>'
        f'<td><div class="bar" style="width:{each.count / most:.1%}"></div></td></tr>'
        for each in counts
    )
    head = f'<h3>{title}</h3><p class="note">{note}</p>'
    return f"<section>{head}<table>{''.join(rows)}</table></section>"


def _plot(name: str, histogram: Histogram) -> str:
    """Bars of equal width: sizes and ratios have a logarithmic axis by the bins they are in."""
    figure = Figure(figsize=(4.2, 2.5), layout="constrained")
    axes = figure.add_subplot()
    counts, edges = histogram.counts, histogram.edges
    axes.bar(range(len(counts)), counts, width=0.92, align="edge", color=_INK)
    single = name.startswith("caption") and edges[1] - edges[0] == 1  # a bar is one number
    ticks = _ticks(edges[:-1] if single else edges, name)
    labels = [_tick(edges[tick], name) for tick in ticks]
    axes.set_xticks([tick + single / 2 for tick in ticks], labels)
    logarithmic = "" if name.startswith("caption") else ", logarithmic"
    axes.set_xlabel(histogram.unit + logarithmic)
    axes.set_ylabel("captions" if name.startswith("caption") else "images")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # the same bytes every time
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    smallest, mean, largest = (
        _tick(value, name) for value in (histogram.smallest, histogram.mean, histogram.largest)
    )
    unit = "" if name == "image_bytes" else f" {histogram.unit}"
    note = f"{smallest} to {largest}{unit}, mean {mean}"
    if histogram.largest >= edges[-1]:
        note += f"; the last bar: {_tick(edges[-2], name)} or more"
    title, source = _TITLES[name], _uri("svg+xml", buffer.getvalue())
    return (
        f'<figure><h3>{title}</h3><p class="note">{note}</p>'
        f'<img alt="Histogram: {title}, {note}" src="{source}"/></figure>'
    )


def _ticks(edges: Sequence[float], name: str) -> list[int]:
    """Up to seven of the edges; of logarithmic ones the powers of two, if there are two."""
    chosen = list(range(len(edges)))
    if not name.startswith("caption"):
        powers = [place for place in chosen if math.log2(edges[place]).is_integer()]
        chosen = powers if len(powers) > 1 else chosen
    return chosen[:: -(-len(chosen) // 7)]


def _tick(value: float, name: str) -> str:
    if name == "image_bytes":
        return _size(value)
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _figure(example: Example) -> str:
    """A thumbnail with its captions. Only what the browser is to show is read."""
    picture = _thumbnail(example)
    image = f'<img alt="" src="{_uri("jpeg", picture)}"/>' if picture else "not decodable"
    label = "" if example.label is None else f'<p class="class">{_text(example.label)}</p>'
    captions = "".join(f"<p>{_text(caption[:_TEXT])}</p>" for caption in example.captions)
    where = f"<small>{_text(example.key)}</small>"
    return (
        f'<figure><div class="picture">{image}</div>'
        f"<figcaption>{label}{captions}{where}</figcaption></figure>"
    )


def _thumbnail(example: Example) -> bytes | None:
    """A small JPEG on white; None if the picture cannot be decoded."""
    with UPath(example.shard).open("rb") as file:
        data = read_span(file, example.span)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on harmless metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.draft("RGB", (2 * _THUMBNAIL, 2 * _THUMBNAIL))
                small = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception:  # Pillow's decoders raise nearly anything on broken bytes
        return None
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    white = Image.new("RGBA", small.size, "white")
    buffer = io.BytesIO()
    Image.alpha_composite(white, small).convert("RGB").save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
