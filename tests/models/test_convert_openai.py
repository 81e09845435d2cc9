"""OpenAI's TorchScript archives and state dicts, read without running them."""

import os
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clip_models import ModelError, architecture, load_model
from clip_models.config import ModelConfig
from clip_models.convert import convert
from clip_models.convert_openai import openai_config
from clip_models.convert_torchscript import read_torchscript
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*trace")

VIT = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
RESNET = {
    "image_size": 32,
    "layers": [1, 2, 1, 1],
    "width": 8,
    "patch_size": None,
    "head_width": 64,
}
TEXT = {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2}
MARKS = {"input_resolution": 32, "context_length": 12, "vocab_size": 100}
# the end of text is the highest id
TOKENS = torch.tensor([[98, 5, 6, 99, *[0] * 8], [98, *range(10), 99], [98, 99, *[0] * 10]])


def openai_model(vision: dict[str, Any]) -> nn.Module:
    """A small model of OpenAI's form: the mask is no parameter, three numbers are buffers."""
    torch.manual_seed(0)
    model = open_clip.CLIP(32, vision, TEXT, quick_gelu=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    mask = model._buffers.pop("attn_mask")
    model.attn_mask = mask
    for name, value in MARKS.items():
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    return model


def save_archive(model: nn.Module, file: Path, half: bool = True) -> None:
    inputs = {"encode_image": (torch.ones(1, 3, 32, 32),), "encode_text": (TOKENS,)}
    traced = torch.jit.trace_module(model, inputs, check_trace=False)
    (traced.half() if half else traced).save(str(file))


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def same_features(path: Path, theirs: Any) -> None:
    ours = load_model(path).model
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        ours, theirs, images = (
            ours.to(dtype),
            theirs.to(dtype),
            torch.randn(3, 3, 32, 32, dtype=dtype),
        )
        with torch.no_grad():
            close(ours.encode_image(images), theirs.encode_image(images), tolerance)
            close(ours.encode_text(TOKENS), theirs.encode_text(TOKENS), tolerance)
            close(ours.logit_scale, theirs.logit_scale, tolerance)


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("half", [True, False])
def test_an_archive_gives_the_features_of_open_clip(
    tmp_path: Path, vision: dict[str, Any], half: bool
) -> None:
    if vision is RESNET:
        pytest.importorskip("clip_models.resnet_tower")
    theirs = openai_model(vision)
    save_archive(theirs, tmp_path / "model.pt", half)
    result = convert(tmp_path / "model.pt", tmp_path / "output")
    assert result["format"] == "OpenAI TorchScript archive"
    assert load_model(tmp_path / "output").config.quick_gelu
    if half:  # open_clip rounds to float16 whatever it finds
        theirs = open_clip.load_openai_model(str(tmp_path / "model.pt"), device="cpu").eval()
    same_features(tmp_path / "output", theirs)
    # what open_clip loads from our directory is the same model again
    same_features(
        tmp_path / "output", open_clip.create_model(f"local-dir:{tmp_path / 'output'}").eval()
    )


def test_a_state_dict_gives_the_features_of_open_clip(tmp_path: Path) -> None:
    torch.save(openai_model(VIT).half().state_dict(), tmp_path / "model.pt")
    assert convert(tmp_path / "model.pt", tmp_path / "output")["format"] == "OpenAI state dict"
    theirs = open_clip.load_openai_model(str(tmp_path / "model.pt"), device="cpu").eval()
    same_features(tmp_path / "output", theirs)


def test_quick_gelu_is_not_given_up(tmp_path: Path) -> None:
    torch.save(openai_model(VIT).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ModelError, match="need quick_gelu, and XS has none"):
        convert(tmp_path / "model.pt", tmp_path / "output", "XS")


@pytest.mark.parametrize(
    "name",
    ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "RN50", "RN101", "RN50x4", "RN50x64"],
)
def test_architectures_are_told_from_shapes(name: str) -> None:
    """OpenAI's published models, by open_clip's configurations of them."""
    values = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(**values, quick_gelu=True)
    text = ("positional", "token_embedding", "transformer", "ln_final", "text_projection")
    weights = {f"text.{n}" if n.startswith(text) else n: t for n, t in model.state_dict().items()}
    assert openai_config(weights) == ModelConfig.from_dict({**values, "quick_gelu": True})


def test_other_weights_are_not_openais() -> None:
    with pytest.raises(ModelError, match=r"text\.text_projection is missing"):
        openai_config({"visual.proj": torch.ones(2, 2)})


class Scripted(nn.Module):
    """Attributes of the kinds that TorchScript pickles in ways of their own."""

    sizes: list[int]
    names: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.names, self.rate, self.flag = [1, 2], {"a": 1}, 0.5, True
        self.pair = (3, 4.0)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())])
        self.weight = nn.Parameter(torch.randn(4, 6).bfloat16())
        self.register_buffer("view", torch.arange(24.0).view(4, 6).T[1:3])
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.rate if self.flag else x + self.sizes[0] + self.names["a"] + self.pair[0]


def test_any_archive_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    model = torch.jit.script(Scripted())
    model.save(str(tmp_path / "model.pt"))
    ours = read_torchscript(tmp_path / "model.pt")
    theirs = torch.jit.load(str(tmp_path / "model.pt")).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[n].dtype == theirs[n].dtype for n in ours)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def edit(file: Path, entry: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Replace an entry of a zip archive."""
    with zipfile.ZipFile(file) as archive:
        entries = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            if name.endswith(entry):
                archive.writestr(name, data, compression)
            else:
                archive.writestr(name, content)


def call(function: str, argument: str) -> bytes:
    """A pickle that calls function(argument)."""
    module, name = function.rsplit(".", 1)
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


@pytest.mark.parametrize(
    ("entry", "data", "message"),
    [
        ("/data.pkl", "os.system", r"asks to run os\.system, .*nothing in it has run"),
        ("/data.pkl", "builtins.eval", r"asks to run builtins\.eval"),
        ("/data.pkl", "torch.load", r"asks to run torch\.load"),
        ("/data.pkl", "torch._utils._rebuild_tensor_v2", "damaged TorchScript archive"),
        ("/data.pkl", b"\x80\x02}q\x00.", "data.pkl is not a module"),
        ("/data.pkl", b"", "damaged TorchScript archive"),
        ("/data/0", b"\0" * 8, "holds 4 numbers, not 24"),
        ("/byteorder", b"big", "big-endian"),
    ],
)
def test_tampered_archives(tmp_path: Path, entry: str, data: bytes | str, message: str) -> None:
    file, witness = tmp_path / "model.pt", tmp_path / "run"
    torch.jit.script(Scripted()).save(str(file))
    edit(file, entry, call(data, f"touch {witness}") if isinstance(data, str) else data)
    with pytest.raises(ModelError, match=message) as caught:
        convert(file, tmp_path / "output", "XS")
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["model.pt"]


def test_a_zip_bomb_and_a_module_within_itself(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.jit.script(Scripted()).save(str(file))
    edit(file, "/data/0", b"\0" * 1000, zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match="is compressed"):
        read_torchscript(file)
    edit(file, "/data.pkl", b"\x80\x02c__torch__\nM\nq\x00)\x81q\x01}X\x01\x00\x00\x00ah\x01sb.")
    with pytest.raises(ModelError, match="more than 50 modules within one another"):
        read_torchscript(file)


def test_an_archive_of_another_model_needs_an_architecture(tmp_path: Path) -> None:
    """open_clip's own traces lack OpenAI's marks; nothing then tells the activation."""
    model = openai_model(VIT)
    for mark in MARKS:
        delattr(model, mark)
    save_archive(model, tmp_path / "model.pt")
    with pytest.raises(ModelError, match="give --architecture"):
        convert(tmp_path / "model.pt", tmp_path / "output")
    assert not architecture("XS").quick_gelu
