"""The command: JSON out, one-line errors, exit codes."""

import json
from pathlib import Path

import clip_models
import pytest
from click.testing import CliRunner
from clip_models.cli import main


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_init_build_head_show(tmp_path: Path) -> None:
    model = tmp_path / "deep" / "model"
    made = json.loads(run("init", "XS", model, "--seed", 3))
    assert (
        json.loads(run("init", "XS", tmp_path / "same", "--seed", 3))["fingerprint"]
        == (made["fingerprint"])
    )
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\n")
    head = json.loads(run("build-head", model, "pets", "--dataset", tmp_path))
    assert head["classes"] == 2
    shown = json.loads(run("show", model, "--json"))
    assert shown["heads"] == {"pets": {"kind": "zero-shot", "classes": 2, "feature": "post"}}
    assert shown["parameters"] == made["parameters"]
    assert shown["provenance"]["init_seed"] == 3
    table = run("show", model)
    assert "pets: zero-shot, 2 classes" in table
    assert f"parameters: {made['parameters']:,}" in table


def test_init_from_a_config_file(tmp_path: Path) -> None:
    config = clip_models.architecture("XS").to_dict()
    (tmp_path / "small.json").write_text(json.dumps(config))
    run("init", tmp_path / "small.json", tmp_path / "model")
    (tmp_path / "bad.json").write_text(json.dumps({**config, "novelty": 1}))
    assert "unknown field 'novelty'" in run("init", tmp_path / "bad.json", tmp_path / "m", code=1)
    assert not (tmp_path / "m").exists()


def test_list_names_the_papers_models() -> None:
    lines = [json.loads(line) for line in run("list").splitlines()]
    assert {"ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-g-14"} <= {line["name"] for line in lines}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["init", "nosuch", "out"], 1, "no architecture 'nosuch'"),
        (["show", "nowhere"], 1, "not a model directory"),
        (["build-head", "nowhere", "x", "--dataset", "nodata"], 1, "not a model directory"),
        (["build-head", "nowhere", "x"], 2, "give --dataset"),
        (["init"], 2, "Missing argument"),
    ],
)
def test_errors(tmp_path: Path, args: list[str], code: int, message: str) -> None:
    with CliRunner().isolated_filesystem(tmp_path):
        error = run(*args, code=code)
        assert message in error
        assert list(Path().iterdir()) == []
    if code == 1:
        assert error.startswith("Error: ")
        assert error.count("\n") == 1


def test_public_names_are_these() -> None:
    """A new name is a promise: think before you add one."""
    assert sorted(clip_models.__all__) == [
        "CLIP",
        "ContrastiveLoss",
        "HFTokenizer",
        "Head",
        "ImageError",
        "LoadedModel",
        "ModelConfig",
        "ModelError",
        "Preprocess",
        "SigmoidLoss",
        "Tokenizer",
        "architecture",
        "architecture_names",
        "build_head",
        "decode_image",
        "fingerprint_of",
        "list_heads",
        "load_head",
        "load_model",
        "profile",
        "read_class_names",
        "read_model_config",
        "read_templates",
        "save_head",
        "save_model",
        "tokenizer_for",
        "without_shutdown",
    ]
    for name in clip_models.__all__:
        assert getattr(clip_models, name) is not None
    with pytest.raises(AttributeError, match="nosuch"):
        clip_models.nosuch  # noqa: B018
