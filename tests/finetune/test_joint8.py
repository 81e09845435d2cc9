"""tools/joint8.py on a few pictures: eight tasks, training, patching."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clip_finetune import open_set
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
    assert len(report["accuracy"]) == 9
    assert 0 <= report["patched_tasks_improved"] <= 8
    curve = json.loads((out / "curve" / "curve.json").read_text())
    assert len(curve["id"]) == 8
    start, chosen = curve["points"][0]["validation"], curve["chosen"]["validation"]
    lost = [point["sets"]["control"]["accuracy"] for point in (start, chosen)]
    assert lost[0] - lost[1] <= 0.01
    digits = open_set(out / "sets" / "digits", "train")
    assert len(digits) == 9
    assert "seven" in digits.class_names
    assert open_set(out / "sets" / "counts", "val").class_names == ("four", "one", "three", "two")
