"""Hugging Face tokenizers against open_clip's HFTokenizer."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clip_models import ModelError
from clip_models.hf_tokenizer import HFTokenizer
from clip_models.tokenizer import CLEANERS, Tokenizer, tokenizer_for
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer as OpenClips
from open_clip.tokenizer import get_clean_fn

from .hugging_face import KINDS, TEXTS, clip_config, make_tokenizer


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hub")
    for kind in KINDS:
        make_tokenizer(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in KINDS}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"clean": "lower"},
    {"clean": "canonicalize"},
    {"strip_sep_token": True},
]


# mt5 has no separator to strip
CASES = [(k, o) for k in KINDS for o in OPTIONS if (k, "strip_sep_token") != ("mt5", *o)]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_tokens_are_open_clips(sources: dict[str, Path], kind: str, options: dict) -> None:
    for length in (24, 5):
        ours = HFTokenizer(sources[kind], length, **options)
        theirs = OpenClips(str(sources[kind]), length, **options)
        assert ours(TEXTS).dtype == torch.int64
        assert torch.equal(ours(TEXTS), theirs(TEXTS))
        assert torch.equal(ours(TEXTS[1]), theirs(TEXTS[1]))


def test_language_is_marked(sources: dict[str, Path]) -> None:
    """By the language's token in front, as open_clip has it before transformers 5 forgot it."""
    german = HFTokenizer(sources["m2m_100"], 24, language="deu_Latn")
    english = HFTokenizer(sources["m2m_100"], 24)
    code = german.backend.convert_tokens_to_ids("deu_Latn")
    assert (german(TEXTS)[:, 0] == code).all()
    assert torch.equal(german(TEXTS)[:, 1:], english(TEXTS)[:, 1:])
    assert torch.equal(pickle.loads(pickle.dumps(german))(TEXTS), german(TEXTS))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.sampled_from(TEXTS))
def test_cleaning_is_open_clips(text: str) -> None:
    for name, clean in CLEANERS.items():
        assert clean(text) == get_clean_fn(name)(text)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizers_are_the_same(sources: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """In another directory, in another process, and when saved once more."""
    ours = HFTokenizer(sources[kind], 24)
    expected = ours(TEXTS)
    ours.save(tmp_path / "saved")
    again = HFTokenizer(tmp_path / "saved", 24)
    assert torch.equal(again(TEXTS), expected)
    assert torch.equal(ours(TEXTS), expected)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(TEXTS), expected)
    again.save(tmp_path / "twice")
    assert {f.name: f.read_bytes() for f in (tmp_path / "saved").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "twice").iterdir()
    }


@pytest.mark.slow
def test_loader_processes_do_not_warn(sources: dict[str, Path]) -> None:
    program = f"""
import torch
from clip_models.hf_tokenizer import HFTokenizer
tokenizer = HFTokenizer({str(sources["roberta"])!r}, 24)
texts = ["a cat"] * 64
tokenizer(texts)
class Data(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return tokenizer(texts)
    def __len__(self):
        return 2
print(len(list(torch.utils.data.DataLoader(Data(), num_workers=1))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_which_tokenizer_a_model_has(sources: dict[str, Path], tmp_path: Path) -> None:
    assert isinstance(
        tokenizer_for(clip_config("x", hf_model_name=None, hf_tokenizer_name=None)), Tokenizer
    )
    by_name = tokenizer_for(clip_config(sources["bert"], tokenizer_kwargs={"clean": "lower"}))
    assert isinstance(by_name, HFTokenizer)
    assert by_name.context_length == 24
    # the model directory's own files come first
    shutil.copytree(sources["mt5"], tmp_path / "model")
    assert (
        "T5"
        in type(tokenizer_for(clip_config(sources["bert"]), tmp_path / "model").backend).__name__
    )
    assert "Bert" in type(tokenizer_for(clip_config(sources["bert"]), tmp_path).backend).__name__


FAULTS: dict[str, tuple[Any, str]] = {
    "no files": (lambda p: [f.unlink() for f in p.iterdir()], "cannot be read"),
    "no tokenizer.json": (lambda p: (p / "tokenizer.json").unlink(), "has no vocabulary"),
    "not JSON": (lambda p: (p / "tokenizer.json").write_text("{"), "cannot be read"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), "cannot be read"),
    "broken": (
        lambda p: (p / "tokenizer.json").write_text(
            (p / "tokenizer.json").read_text().replace('"type"', '"kind"')
        ),
        "did not match",
    ),
    "no padding": (
        lambda p: edit(p, pad_token=None, tokenizer_class="PreTrainedTokenizerFast"),
        "without a padding token",
    ),
}


def edit(path: Path, **values: Any) -> None:
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["roberta", "mt5"])
def test_faults_are_named_in_one_line(
    sources: dict[str, Path], tmp_path: Path, kind: str, fault: str
) -> None:
    path = shutil.copytree(sources[kind], tmp_path / "source")
    damage, message = FAULTS[fault]
    damage(path)
    with pytest.raises(ModelError, match=message) as caught:
        HFTokenizer(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_code_that_comes_with_a_tokenizer_is_not_run(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(sources["roberta"], tmp_path / "source")
    (path / "evil.py").write_text("raise SystemExit('code was run')")
    expected = HFTokenizer(path)(TEXTS)
    edit(path, auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]})
    assert torch.equal(HFTokenizer(path)(TEXTS), expected)
    edit(path, tokenizer_class="Unheard")
    with pytest.raises(ModelError, match="contains custom code"):
        HFTokenizer(path)


def test_wrong_choices_are_named(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="clean 'shout'; known: lower"):
        HFTokenizer(sources["bert"], clean="shout")
    for kind in ("bert", "m2m_100"):
        with pytest.raises(ModelError, match="does not know language 'xyz'"):
            HFTokenizer(sources[kind], language="xyz")
    with pytest.raises(ModelError, match="tokenizer_kwargs trust_remote_code; known: clean"):
        tokenizer_for(clip_config(sources["bert"], tokenizer_kwargs={"trust_remote_code": True}))
    with pytest.raises(ModelError, match='add "hf_tokenizer_name": "x"'):
        tokenizer_for(clip_config("x", hf_tokenizer_name=None))
    with pytest.raises(ModelError, match="tokenizer_kwargs are for"):
        tokenizer_for(
            clip_config("x", hf_model_name=None, hf_tokenizer_name=None, tokenizer_kwargs={"a": 1})
        )
    with pytest.raises(ModelError, match="tokenizer 'no-such/name' cannot be read"):
        HFTokenizer("no-such/name")


def test_open_clip_reads_siglips_options_from_the_directory(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    config = clip_config("x", hf_model_name=None, tokenizer_kwargs={"clean": "canonicalize"})
    path = shutil.copytree(sources["mt5"], tmp_path / "model")
    values = {"model_cfg": config.to_dict(), "preprocess_cfg": {}}
    (path / "open_clip_config.json").write_text(json.dumps(values))
    theirs = open_clip.get_tokenizer(f"local-dir:{path}")
    assert torch.equal(tokenizer_for(config, path)(TEXTS), theirs(TEXTS))
