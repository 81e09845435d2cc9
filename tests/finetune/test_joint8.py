"""tools/joint8.py on a few pictures: eight tasks, training, patching."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_finetune import open_set
from clip_models import build_head, list_heads, load_head, load_model
from PIL import Image

from .conftest import RESNET, save_random_model

TOOL = Path(__file__).parents[2] / "tools" / "joint8.py"
STYLES = ("twemoji", "twemoji-inked", "twemoji-lines", "openmoji", "openmoji-lines", "noto")


@pytest.mark.slow
def test_joint_tasks_and_patching(tmp_path: Path):
    rng = np.random.default_rng(0)
    demo, out = tmp_path / "demo", tmp_path / "out"
    for split in ("train", "test"):
        rows = []
        for number in range(24):
            name = f"{split}{number}.png"
            for style in STYLES:
                (demo / style).mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (72, 72, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(demo / style / name)
            category = ("flags", "objects")[number % 2]
            row = {"image": f"twemoji/{name}", "concept": name, "category": category}
            rows.append(json.dumps(row))
        (demo / f"categories-twemoji-{split}.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "run").mkdir()
    save_random_model(tmp_path / "run" / "model", RESNET)
    command = [sys.executable, TOOL, tmp_path, out, "--iterations", "10", "--batch-size", "4"]
    done = subprocess.run([*command, "--limit", "9"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    table = report["accuracy"]
    tasks = [name for name in table if name != "control"]
    assert len(tasks) == 8
    for what, count in (
        ("fine-tuned", report["fine_tuned_tasks_improved"]),
        ("patched", report["patched_tasks_improved"]),
    ):
        assert count == sum(table[name][what] > table[name]["zero-shot"] for name in tasks)
    control = table["control"]
    lost = control["zero-shot"] - control["patched"]  # of rounded figures
    assert report["control_points_lost"] == pytest.approx(lost, abs=0.11)
    assert (out / "curve" / "curve.png").is_file()
    assert {path.name for path in (out / "sets").iterdir()} == table.keys()
    base, tuned = load_model(tmp_path / "run" / "model"), load_model(out / "tuned")
    before, after = base.model.state_dict(), tuned.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("visual.") for name in changed)
    assert list_heads(out / "tuned") == sorted(tasks)
    for name in tasks:
        data = open_set(out / "sets" / name, "train")
        start = build_head(base, data.class_names, data.templates)
        assert torch.equal(load_head(out / "tuned", name).weight, start.weight), name
    curve = json.loads((out / "curve" / "curve.json").read_text())
    assert len(curve["id"]) == 8
    start, chosen = curve["points"][0]["validation"], curve["chosen"]["validation"]
    before, after = (point["sets"]["control"]["accuracy"] for point in (start, chosen))
    assert before - after <= 0.005
    digits = open_set(out / "sets" / "digits", "train")
    assert len(digits) == 9
    assert "seven" in digits.class_names
    assert open_set(out / "sets" / "counts", "val").class_names == ("four", "one", "three", "two")
