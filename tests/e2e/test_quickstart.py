"""tools/quickstart.sh from end to end: six installed tools, real pictures, one model directory."""

import json
import re
from pathlib import Path

import open_clip
import pytest
import torch
from clip_models import load_head, load_model

from .conftest import quickstart

pytestmark = pytest.mark.slow

TEXTS = ["a red apple", "an emoji of flags", ""]


def test_it_ends_with_the_table_and_the_page(finished: tuple[Path, str]) -> None:
    out, stdout = finished
    assert "zero-shot category, noto" in stdout
    assert "Nothing left to do" not in stdout
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 40
    assert not re.search(r"(src|href)=['\"]?https?:", page)
    assert not list(out.rglob("*.part"))


def test_it_trained_on_training_concepts_and_styles_only(finished: tuple[Path, str]) -> None:
    out, _ = finished
    held_out = set(json.loads((out / "demo" / "splits.json").read_text())["held_out"])
    rows = [json.loads(line) for line in (out / "demo" / "train.jsonl").read_text().splitlines()]
    assert held_out
    assert not held_out & {row["concept"] for row in rows}
    assert not {"noto", "openmoji"} & {row["style"] for row in rows}
    manifest = json.loads((out / "shards" / "manifest.json").read_text())
    assert manifest["samples"] == len(rows)


def test_it_learns(finished: tuple[Path, str]) -> None:
    out, _ = finished
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_its_model_opens_in_open_clip_with_the_same_features(finished: tuple[Path, str]) -> None:
    out, _ = finished
    for name in ("run/model", "tuned", "interpolated"):
        loaded = load_model(out / name)
        theirs = open_clip.create_model(f"local-dir:{out / name}").eval()
        images = [p.read_bytes() for p in sorted((out / "demo" / "noto").glob("*.png"))[:16]]
        pixels = loaded.preprocess.normalize(
            torch.stack([loaded.preprocess.eval(i) for i in images])
        )
        tokens = loaded.tokenizer(TEXTS)
        assert torch.equal(tokens, open_clip.get_tokenizer(f"local-dir:{out / name}")(TEXTS))
        with torch.no_grad():
            for ours, other in (
                (loaded.model.encode_image(pixels), theirs.encode_image(pixels)),
                (loaded.model.encode_text(tokens), theirs.encode_text(tokens)),
            ):
                torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def test_its_heads_belong_to_their_models(finished: tuple[Path, str]) -> None:
    out, _ = finished
    assert load_head(out / "run" / "model", "categories-probe").kind == "probe"
    assert load_head(out / "tuned", "twemoji").kind == "zero-shot"


def test_run_again_it_has_nothing_left_to_do(finished: tuple[Path, str]) -> None:
    out, stdout = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    process = quickstart(out)
    again, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert again.startswith("Nothing left to do")
    assert again.endswith(stdout)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
