"""Hugging Face text towers against open_clip's HFTextEncoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import ModelError
from clip_models.hf_text_tower import HFTextTower, read_hf_config
from clip_models.tokenizer import tokenizer_for
from open_clip.hf_model import HFTextEncoder
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from .hugging_face import KINDS, TEXTS, clip_config, make_text_model

SHORT = [text for text in TEXTS if len(text) < 50]  # no caption as long as the context
WIDTH = 32


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hub")
    return {kind: make_text_model(kind, folder / kind) for kind in KINDS}


def both(source: Path, embed: int = 16, **text: Any) -> tuple[HFTextTower, HFTextEncoder]:
    """Ours and open_clip's, from the same pretrained weights and with the same projection."""
    config = clip_config(source, **text).text_cfg
    ours = HFTextTower(config, embed).eval()
    theirs = HFTextEncoder(
        str(source), embed, pooler_type=config.hf_pooler_type, proj_type=config.hf_proj_type
    ).eval()
    before = theirs.state_dict()
    assert ours.state_dict().keys() == before.keys()
    encoder = {n: t for n, t in ours.state_dict().items() if n.startswith("transformer.")}
    assert all(torch.equal(before[n], t) for n, t in encoder.items() if ".pooler." not in n)
    ours.load_state_dict(before)
    return ours, theirs


def tokens_of(source: Path, texts: list[str] = SHORT) -> torch.Tensor:
    return tokenizer_for(clip_config(source))(texts)


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_open_clips(sources: dict[str, Path], kind: str, pooler: str) -> None:
    ours, theirs = both(sources[kind], hf_pooler_type=pooler)
    with torch.no_grad():
        for tokens in (tokens_of(sources[kind]), tokens_of(sources[kind], TEXTS)):
            torch.testing.assert_close(
                ours.float()(tokens), theirs.float()(tokens), rtol=0, atol=1e-5
            )
            # T5 takes the softmax and the norms in float32 at any precision: cut columns change its
            # rounding, and only the plain path is equal beyond that
            plain = ours.double()(tokens) if kind != "mt5" else _plain(ours.double(), tokens)
            torch.testing.assert_close(plain, theirs.double()(tokens), rtol=0, atol=1e-10)


def _plain(tower: HFTextTower, tokens: torch.Tensor) -> torch.Tensor:
    tower.fast = False
    features = tower(tokens)
    tower.fast = True
    return features


@pytest.mark.parametrize("proj", ["mlp", "linear", None])
def test_projections_are_open_clips(sources: dict[str, Path], proj: str | None) -> None:
    ours, theirs = both(sources["bert"], WIDTH, hf_proj_type=proj)
    tokens = tokens_of(sources["bert"])
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0, atol=1e-5)


def test_the_maximum_is_over_the_words(sources: dict[str, Path]) -> None:
    """open_clip's max_pooler fails on every input, so that the meaning is tested."""
    ours, theirs = both(sources["roberta"], hf_pooler_type="max_pooler")
    tokens = tokens_of(sources["roberta"])
    with pytest.raises(RuntimeError, match="boolean"):
        theirs(tokens)
    states = theirs.transformer(tokens, attention_mask=(tokens != 1).long()).last_hidden_state
    expected = [row[ids != 1].max(dim=0).values for row, ids in zip(states, tokens, strict=True)]
    torch.testing.assert_close(ours.features(tokens), torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_padding_changes_no_gradient(sources: dict[str, Path], kind: str) -> None:
    tower = HFTextTower(clip_config(sources[kind]).text_cfg, 16).eval().double()
    tokens = tokens_of(sources[kind])
    target = torch.randn(len(tokens), 16, dtype=torch.float64)
    gradients = []
    for fast in (True, False):
        tower.fast = fast
        tower.zero_grad()
        (tower(tokens) * target).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in tower.named_parameters()})
        assert all(gradient.any() for gradient in gradients[-1].values())
    for name, gradient in gradients[0].items():
        scale = gradients[1][name].abs().max()
        atol = 1e-12 if kind != "mt5" else 1e-6  # float32 inside, as above
        assert (gradient - gradients[1][name]).abs().max() <= atol * max(scale, 1), name


def test_a_row_of_padding_keeps_the_columns(sources: dict[str, Path]) -> None:
    """With nothing to attend to, a model attends to all padding, so that its amount matters."""
    ours, theirs = both(sources["bert"], hf_pooler_type="cls_pooler")
    tokens = tokens_of(sources["bert"])
    tokens[1] = 0
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0, atol=1e-6)


@pytest.mark.parametrize("unlocked", [0, 1, 2, 4, 9])
@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "mt5"])  # open_clip fails for others
def test_locking_is_open_clips(sources: dict[str, Path], kind: str, unlocked: int) -> None:
    ours, theirs = both(sources[kind])
    ours.lock(unlocked)
    theirs.lock(unlocked)
    free = {n: p.requires_grad for n, p in theirs.named_parameters()}
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == free


@pytest.mark.parametrize("kind", ["bert", "m2m_100"])
def test_locking_where_open_clip_fails(sources: dict[str, Path], kind: str) -> None:
    tower = HFTextTower(clip_config(sources[kind]).text_cfg, 16)
    tower.lock(1)
    locked = {n for n, p in tower.named_parameters() if not p.requires_grad}
    parts = ("transformer.embed", "r.0.", "s.0.", "r.1.", "s.1.")  # layer.0. or layers.0.
    assert locked == {
        n
        for n, _ in tower.named_parameters()
        if n.startswith("transformer.") and any(part in n for part in parts)
    } - {"transformer.embed_positions.weights"}


def test_checkpointing_changes_nothing(sources: dict[str, Path]) -> None:
    for kind in ("roberta", "mt5"):
        tower = HFTextTower(clip_config(sources[kind]).text_cfg, 16).double()
        for module in tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        tokens, gradients = tokens_of(sources[kind]), []
        for enabled in (True, False):
            tower.set_grad_checkpointing(enabled)
            tower.zero_grad()
            tower(tokens).square().sum().backward()
            gradients.append([p.grad.clone() for p in tower.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_once_for_all_caption_lengths(sources: dict[str, Path]) -> None:
    config = clip_config(sources["roberta"])
    tower = HFTextTower(config.text_cfg, 16).eval()
    tokenizer, counter = tokenizer_for(config), CompileCounter()
    compiled, frames = torch.compile(tower, backend=counter), []
    for words in (3, 9, 1, 15, 6):
        tokens = tokenizer(["a " * words, "cat"])
        torch.testing.assert_close(compiled(tokens), tower(tokens))
        frames.append(counter.frame_count)
    assert frames[1] == frames[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_gives_the_cpus_features(sources: dict[str, Path], kind: str) -> None:
    tower = HFTextTower(clip_config(sources[kind]).text_cfg, 16).eval()
    tokens = tokens_of(sources[kind])
    with torch.no_grad():
        expected = tower(tokens)
        tower.cuda()
        for place in (tokens, tokens.cuda()):
            torch.testing.assert_close(tower(place).cpu(), expected, rtol=1e-3, atol=1e-4)
        with torch.autocast("cuda", torch.bfloat16):
            half = tower(tokens).float().cpu()
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.05)


def test_random_weights_where_asked_for(sources: dict[str, Path], tmp_path: Path) -> None:
    bare = make_text_model("roberta", tmp_path / "bare", weights=False)
    config = clip_config(bare, hf_model_pretrained=False).text_cfg
    torch.manual_seed(0)
    first = HFTextTower(config, 16).state_dict()
    torch.manual_seed(0)
    again = HFTextTower(config, 16, read_hf_config(sources["roberta"])).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def edit(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def drop_layer(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    kept = {n: t for n, t in weights.items() if "layer.2." not in n}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


FAULTS: dict[str, tuple[Any, str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "cannot be read"),
    "not JSON": (lambda p: (p / "config.json").write_text("{"), "not a valid JSON"),
    "unknown kind": (lambda p: edit(p, model_type="new"), "does not recognize"),
    "own code": (
        lambda p: edit(p, auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
        "code of its own",
    ),
    "absurd value": (lambda p: edit(p, hidden_size="x"), "expected int"),
    "odd width": (lambda p: edit(p, hidden_size=33), "cannot be built"),
    "no padding": (lambda p: edit(p, pad_token_id=None), "no pad_token_id"),
    "not text": (lambda p: edit(p, model_type="clip", hidden_size=None), "a clip model"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), '"hf_model_pretrained": false'),
    "pickled weights": (
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        '"hf_model_pretrained": false',
    ),
    "truncated": (
        lambda p: (p / "model.safetensors").write_bytes(
            (p / "model.safetensors").read_bytes()[:9000]
        ),
        '"hf_model_pretrained": false',
    ),
    "lost layer": (drop_layer, "its weights lack encoder.layer.2"),
    "other shapes": (lambda p: edit(p, intermediate_size=20), "cannot be built"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_line(tmp_path: Path, fault: str) -> None:
    source = make_text_model("roberta", tmp_path / "source")
    (tmp_path / "source/evil.py").write_text("raise SystemExit('code was run')")
    damage, message = FAULTS[fault]
    damage(source)
    with pytest.raises(ModelError, match=message) as caught:
        HFTextTower(clip_config(source).text_cfg, 16)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)


def test_wrong_choices_are_named(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="hf_pooler_type 'last'; known: mean_pooler"):
        HFTextTower(clip_config(sources["bert"], hf_pooler_type="last").text_cfg, 16)
    with pytest.raises(ModelError, match="needs a text model of width 16"):
        HFTextTower(clip_config(sources["bert"], hf_proj_type=None).text_cfg, 16)
    with pytest.raises(ModelError, match="'no-such/model' cannot be read"):
        HFTextTower(clip_config("no-such/model").text_cfg, 16)
