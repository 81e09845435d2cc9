"""Models of the Hugging Face hub, through a cache that a test lays out, without network."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from clip_models import ModelError, fingerprint_of, load_model
from clip_models.convert import convert
from clip_models.convert_export import export_transformers
from clip_models.convert_hub import hub_name

MakeModel = Callable[[str], Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way to the hub."""
    cache = tmp_path / "home/hub"
    cache.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def publish(hub: Path, name: str, model: Path) -> Path:
    """Lay a directory out as the hub's cache has it."""
    home = hub / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(COMMIT)
    snapshot = home / "snapshots" / COMMIT
    shutil.copytree(model, snapshot)
    return snapshot


def test_a_cached_model_converts(hub: Path, make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model("vit")
    publish(hub, "laion/a-CLIP", path)
    for source in ("laion/a-CLIP", "hf-hub:laion/a-CLIP"):
        output = tmp_path / source.partition(":")[0].replace("/", "-")
        assert convert(source, output)["fingerprint"] == fingerprint_of(path)
        provenance = load_model(output).provenance
        assert provenance["converted_from"] == "laion/a-CLIP"
        assert provenance["revision"] == COMMIT


def test_a_cached_clip_model_converts(hub: Path, make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model("vit-quickgelu")
    export_transformers(path, tmp_path / "theirs")
    snapshot = publish(hub, "openai/clip", tmp_path / "theirs")
    result = convert("openai/clip", tmp_path / "output")
    assert result["format"] == "transformers CLIPModel"
    assert result["fingerprint"] == fingerprint_of(path)
    # in shards, one of which was never fetched
    weights = snapshot / "model.safetensors"
    weights.rename(snapshot / "part-1.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"openai/clip.* cannot be had") as caught:
        convert("openai/clip", tmp_path / "more")
    assert "\n" not in str(caught.value)


def test_what_is_not_cached_is_said(hub: Path, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no local path laion/none, .* cannot be had") as caught:
        convert("laion/none", tmp_path / "output")
    assert "\n" not in str(caught.value)
    snapshot = publish(hub, "laion/half", make_model("vit"))
    (snapshot / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match="laion/half has no weights here") as caught:
        convert("laion/half", tmp_path / "output")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_command_offline(hub: Path, make_model: MakeModel, tmp_path: Path) -> None:
    """By the environment's variables, as a user sets them."""
    publish(hub, "laion/a-CLIP", path := make_model("vit"))
    command = [Path(sys.executable).with_name("clip-models"), "convert"]
    environment = {**os.environ, "HF_HOME": str(hub.parent), "HF_HUB_OFFLINE": "1"}
    for source, status in (("laion/none", 1), ("laion/a-CLIP", 0)):
        ran = subprocess.run(
            [*command, source, tmp_path / "output"], env=environment, capture_output=True, text=True
        )
        assert ran.returncode == status, ran.stderr
        assert ran.stderr.count("\n") == status
    assert json.loads(ran.stdout)["fingerprint"] == fingerprint_of(path)


def test_what_is_a_hub_name() -> None:
    assert hub_name("hf-hub:laion/CLIP-ViT-B-32") == "laion/CLIP-ViT-B-32"
    assert hub_name("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    for path in ("model.pt", "/models/a", "a/b/c", "../a"):
        assert hub_name(path) is None, path
