"""Files and directories of open_clip's to model directories, and what is refused."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from clip_models import ModelError, fingerprint_of, load_model
from clip_models.cli import main
from clip_models.convert import convert
from clip_models.model_dir import init_model
from clip_models.weights import disk_name
from safetensors.torch import load_file, save_file
from torch import Tensor

from .conftest import scattered, small_config
from .hugging_face import clip_config, make_text_model

MakeModel = Callable[[str], Path]
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def architecture_file(folder: Path, kind: str = "vit") -> str:
    """A .json file for --architecture."""
    file = folder / "architecture.json"
    file.write_text(json.dumps(small_config(kind).to_dict()))
    return str(file)


def state_of(path: Path) -> dict[str, Tensor]:
    """The weights as open_clip itself holds them."""
    return open_clip.create_model(f"local-dir:{path}").state_dict()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def training_checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    """As open_clip's main.py saves it; its schedules leave NumPy's numbers in the optimizer."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5 * (1 + np.cos(np.pi * 0.3)) * 0.1
    scaler = {"scale": 65536.0, "growth_factor": 2.0}
    return {
        "epoch": 3,
        "name": "run",
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler,
    }


WRITERS: dict[str, tuple[Callable[[dict[str, Tensor], Path], object], str]] = {
    "checkpoint": (
        lambda s, f: torch.save(training_checkpoint(prefixed(s, "module.")), f),
        "open_clip training checkpoint",
    ),
    "compiled": (
        lambda s, f: torch.save(training_checkpoint(prefixed(s, "module._orig_mod.")), f),
        "open_clip training checkpoint",
    ),
    "torch": (lambda s, f: torch.save(s, f), "torch.save weights"),
    "legacy": (
        lambda s, f: torch.save(s, f, _use_new_zipfile_serialization=False),
        "torch.save weights",
    ),
    "safetensors": (lambda s, f: save_file(s, f), "safetensors weights"),
    "old": (
        lambda s, f: torch.save(
            {
                **s,
                "logit_scale": s["logit_scale"].reshape(1),
                "attn_mask": torch.zeros(77, 77),
            },
            f,
        ),
        "torch.save weights",
    ),
}


@pytest.mark.parametrize("how", WRITERS)
def test_a_file_of_weights_converts(
    make_model: MakeModel, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model("vit")
    state = state_of(path)
    write, form = WRITERS[how]
    write(state, tmp_path / "epoch_3")  # without extension: the content tells
    output = tmp_path / "output"
    result = convert(tmp_path / "epoch_3", output, architecture_file(tmp_path))
    assert result == {
        "model": str(output),
        "format": form,
        "parameters": sum(t.numel() for t in state.values()),
        "fingerprint": fingerprint_of(path),
    }
    written = load_file(output / WEIGHTS)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    provenance = load_model(output).provenance
    assert provenance["converted_from"] == "epoch_3"
    assert provenance["format"] == form
    assert len(provenance["sha256"]["epoch_3"]) == 64
    assert open_clip.create_model(f"local-dir:{output}").state_dict().keys() == state.keys()


def test_half_precision_becomes_float32(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {name: tensor.half() for name, tensor in state_of(make_model("vit")).items()}
    torch.save(state, tmp_path / "half.pt")
    with caplog.at_level("INFO"):
        convert(tmp_path / "half.pt", tmp_path / "output", architecture_file(tmp_path))
    assert "float16 weights become float32" in caplog.text
    written = load_file(tmp_path / "output" / WEIGHTS)
    assert all(torch.equal(written[name], state[name].float()) for name in state)


@pytest.mark.parametrize(("kind", "asked"), [("vit-bias", "vit-bias"), ("vit", "custom")])
def test_custom_text_names(make_model: MakeModel, tmp_path: Path, kind: str, asked: str) -> None:
    """text.* names, of a model that has them, and of one trained with --force-custom-text."""
    path = make_model(kind)
    state = state_of(path)
    if asked == "custom":
        text = ("positional", "token_embedding", "transformer", "ln_final", "text_projection")
        state = {f"text.{n}" if n.startswith(text) else n: t for n, t in state.items()}
    torch.save(training_checkpoint(state), tmp_path / "custom.pt")
    convert(tmp_path / "custom.pt", tmp_path / "output", architecture_file(tmp_path, kind))
    assert fingerprint_of(tmp_path / "output") == fingerprint_of(path)


def test_a_directory_with_a_bin(make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model("vit")
    before = fingerprint_of(path)
    torch.save(load_file(path / WEIGHTS), path / "open_clip_pytorch_model.bin")
    (path / WEIGHTS).unlink()
    values = json.loads((path / CONFIG).read_text())
    values["preprocess_cfg"] |= {"mean": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    (path / CONFIG).write_text(json.dumps(values))
    result = convert(path, tmp_path / "output")
    assert result["format"] == "open_clip directory"
    assert result["fingerprint"] == before
    loaded = load_model(tmp_path / "output")
    assert loaded.preprocess.config.mean == (0.5, 0.5, 0.5)
    assert loaded.preprocess.config.resize_mode == "squash"
    assert loaded.provenance["source"]["made_by"] == "a test"
    # the file alone, with its configuration beside it
    result = convert(path / "open_clip_pytorch_model.bin", tmp_path / "again")
    assert result["fingerprint"] == before
    assert load_model(tmp_path / "again").preprocess.hash == loaded.preprocess.hash


def test_shards(make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model("vit")
    before, names = fingerprint_of(path), {}
    for i, (name, tensor) in enumerate(load_file(path / WEIGHTS).items()):
        names.setdefault(f"part-{i % 2}.safetensors", {})[name] = tensor
    for shard, tensors in names.items():
        save_file(tensors, path / shard)
    weight_map = {name: shard for shard, tensors in names.items() for name in tensors}
    index = path / "open_clip_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (path / WEIGHTS).unlink()
    assert convert(path, tmp_path / "output")["fingerprint"] == before
    (path / "part-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lists part-1\.safetensors, which is not there"):
        convert(path, tmp_path / "more")


class _Payload:
    """Pickled, a call of os.system; were it run, it would leave a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def broken_source(tmp_path: Path, state: dict[str, Tensor], fault: str) -> Path:
    file = tmp_path / "source"
    match fault:
        case "code":
            torch.save({"state_dict": state, "x": _Payload(tmp_path / "run")}, file)
        case "code, legacy":
            values = {"state_dict": state, "x": _Payload(tmp_path / "run")}
            torch.save(values, file, _use_new_zipfile_serialization=False)
        case "code, bare pickle":
            file.write_bytes(pickle.dumps(_Payload(tmp_path / "run"), protocol=2))
        case "code, protocol 4":
            file.write_bytes(pickle.dumps(_Payload(tmp_path / "run"), protocol=4))
        case "whole model":
            torch.save(torch.nn.Linear(2, 2), file)
        case "truncated pickle":
            torch.save(state, file)
            file.write_bytes(file.read_bytes()[:20000])
        case "truncated safetensors":
            save_file(state, file)
            file.write_bytes(file.read_bytes()[:20000])
        case "a list":
            torch.save([1, 2], file)
        case "numbers":
            torch.save({"state_dict": {**state, "steps": 3}}, file)
        case "empty":
            torch.save({"state_dict": {}}, file)
        case "text":
            file.write_text("a model, honestly")
        case "LFS pointer":
            file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        case "missing key":
            torch.save({n: t for n, t in state.items() if n != "visual.proj"}, file)
        case "surplus key":
            torch.save({**state, "extra": torch.ones(1)}, file)
        case "wrong shape":
            torch.save({**state, "visual.proj": torch.ones(3, 4)}, file)
        case "other image size":
            torch.save({**state, "visual.positional_embedding": torch.ones(50, 64)}, file)
        case "other context":
            torch.save({**state, "positional_embedding": torch.ones(32, 64)}, file)
        case "missing":
            pass
        case "empty directory":
            file.mkdir()
        case _:
            raise AssertionError(fault)
    return file


FAULTS = {
    "code": r"asks to run (posix|nt)\.system, .*nothing in it has run",
    "code, legacy": r"asks to run (posix|nt)\.system, .*nothing in it has run",
    "code, bare pickle": r"asks to run (posix|nt)\.system, .*nothing in it has run",
    "code, protocol 4": "is not a file of tensors",
    "whole model": r"asks to run torch\.nn\.modules\.linear\.Linear",
    "truncated pickle": "is damaged",
    "truncated safetensors": "is damaged",
    "a list": "holds a list",
    "numbers": "holds 'steps' of type int",
    "empty": "holds no tensors",
    "text": "is no safetensors, torch.save or TorchScript file$",
    "LFS pointer": "a Git LFS pointer",
    "missing key": r"lacks visual\.proj",
    "surplus key": "has the unexpected extra",
    "wrong shape": r"has visual\.proj of shape \(3, 4\)",
    "other image size": "50 positions in visual.positional_embedding, where 17 .*models resize",
    "other context": "32 positions in text.positional_embedding, where 77 .*models resize",
    "missing": "does not exist, and is not a hub's org/name",
    "empty directory": "has neither open_clip_config.json nor",
}


@pytest.fixture(scope="module")
def good_state() -> dict[str, Tensor]:
    """What the faults are made from."""
    config = small_config("vit")
    names = scattered(config).state_dict()
    return {disk_name(name, config): tensor for name, tensor in names.items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(good_state: dict[str, Tensor], tmp_path: Path, fault: str) -> None:
    source = broken_source(tmp_path, good_state, fault)
    architecture = [] if fault == "empty directory" else [architecture_file(tmp_path)]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=FAULTS[fault]) as caught:
        convert(source, tmp_path / "output", *architecture)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before  # nothing written, nothing run


def test_weights_alone_need_an_architecture(make_model: MakeModel, tmp_path: Path) -> None:
    torch.save(state_of(make_model("vit")), tmp_path / "alone.pt")
    with pytest.raises(ModelError, match="give --architecture"):
        convert(tmp_path / "alone.pt", tmp_path / "output")
    with pytest.raises(ModelError, match="no architecture 'ViT-Z'"):
        convert(tmp_path / "alone.pt", tmp_path / "output", "ViT-Z")
    with pytest.raises(ModelError, match="leave out the architecture"):
        convert(make_model("timm"), tmp_path / "output", "XS")


def test_an_interrupted_conversion_leaves_nothing(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model("vit")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_models.model_dir.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "output")
    assert list(tmp_path.iterdir()) == [path]


def test_command(make_model: MakeModel, tmp_path: Path) -> None:
    torch.save(state_of(make_model("vit")), tmp_path / "alone.pt")
    torch.save({"x": _Payload(tmp_path / "run")}, tmp_path / "bad.pt")
    architecture = ["--architecture", architecture_file(tmp_path)]

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["convert", *arguments])

    good = run(str(tmp_path / "alone.pt"), str(tmp_path / "output"), *architecture)
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["fingerprint"] == fingerprint_of(tmp_path / "output")
    again = run(str(tmp_path / "alone.pt"), str(tmp_path / "output"), *architecture)
    assert again.exit_code == 1
    assert "exists" in again.stderr
    bad = run(str(tmp_path / "bad.pt"), str(tmp_path / "other"), *architecture)
    assert bad.exit_code == 1
    assert bad.stderr.startswith("Error: ")
    assert bad.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "run").exists()
    both = run(str(tmp_path / "x"), str(tmp_path / "y"), *architecture, "--to", "transformers")
    assert both.exit_code == 2


def test_a_hugging_face_text_tower(tmp_path: Path) -> None:
    """From a checkpoint with a buffer of old, and from a directory when the source is gone."""
    source, path = make_text_model("roberta", tmp_path / "source"), tmp_path / "model"
    config = clip_config(source)
    init_model(config, path, seed=0)
    ids = {"text.transformer.embeddings.position_ids": torch.ones(1, 4)}
    torch.save(training_checkpoint({**state_of(path), **ids}), tmp_path / "epoch_1.pt")
    architecture = tmp_path / "architecture.json"
    architecture.write_text(json.dumps(config.to_dict()))
    result = convert(tmp_path / "epoch_1.pt", tmp_path / "output", str(architecture))
    assert result["fingerprint"] == fingerprint_of(path)

    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'output'}").eval()
    shutil.rmtree(source)
    torch.save(load_file(path / WEIGHTS), path / "open_clip_pytorch_model.bin")
    (path / WEIGHTS).unlink()
    assert convert(path, tmp_path / "again")["fingerprint"] == result["fingerprint"]
    loaded = load_model(tmp_path / "again")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'output'}")(["a cat", "two dogs"])
    assert torch.equal(loaded.tokenizer(["a cat", "two dogs"]), tokens)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model.encode_text(tokens), theirs.encode_text(tokens), rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ModelError, match="source"):  # which is gone, and its tokenizer with it
        convert(tmp_path / "epoch_1.pt", tmp_path / "more", str(architecture))


def test_a_timm_tower_and_a_siglip_model(make_model: MakeModel, tmp_path: Path) -> None:
    for kind in ("timm", "timm-siglip"):
        path = make_model(kind)
        torch.save(prefixed(state_of(path), "module."), tmp_path / f"{kind}.pt")
        output = tmp_path / f"{kind}-output"
        convert(tmp_path / f"{kind}.pt", output, architecture_file(tmp_path, kind))
        assert fingerprint_of(output) == fingerprint_of(path)
        assert load_model(output).config == replace(small_config(kind))
