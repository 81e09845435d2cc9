"""Training with a Hugging Face text model, from a JSON file to a directory that loads alone."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from clip_models import HFTokenizer, load_model
from clip_train.config import TrainConfig
from clip_train.loop import train
from safetensors.torch import load_file

from ..models.hugging_face import TEXTS, clip_config, make_text_model

WEIGHTS = "open_clip_model.safetensors"
WORDS = "text.transformer.embeddings.word_embeddings.weight"


def test_from_json_to_a_directory_that_loads_alone(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    source = make_text_model("roberta", tmp_path / "source")
    (tmp_path / "tiny.json").write_text(json.dumps(clip_config(source).to_dict()))
    settings = TrainConfig(
        model=str(tmp_path / "tiny.json"),
        train_data=str(data),
        output=tmp_path / "run",
        samples_seen=64,
        batch_size=16,
        warmup=1,
        workers=1,
    )
    assert train(settings).status == "finished"
    assert "TOKENIZERS_PARALLELISM" not in capfd.readouterr().err

    model = tmp_path / "run" / "model"
    before = load_file(source / "model.safetensors")[WORDS.removeprefix("text.transformer.")]
    after = load_file(model / WEIGHTS)[WORDS]
    assert 0 < (after - before).abs().max() < 0.05  # pretrained weights, trained a little

    theirs = open_clip.create_model(f"local-dir:{model}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{model}")(TEXTS)
    shutil.rmtree(source)
    loaded = load_model(model)
    assert isinstance(loaded.tokenizer, HFTokenizer)
    assert torch.equal(loaded.tokenizer(TEXTS), tokens)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model.encode_text(tokens), theirs.encode_text(tokens), rtol=0, atol=1e-5
        )
