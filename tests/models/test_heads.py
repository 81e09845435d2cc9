"""Class heads: the zero-shot head of CLIP_benchmark, saved, read and refused."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from click.testing import CliRunner
from clip_models import (
    Head,
    ModelError,
    build_head,
    list_heads,
    load_head,
    load_model,
    read_class_names,
    read_templates,
    save_head,
)
from clip_models.cli import main
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from safetensors.torch import save_file

MakeModel = Callable[[str], Path]
NAMES = ["cat", "dog", "", "fire engine", "{brace}"]
TEMPLATES = ["a photo of a {c}.", "a drawing of the {c}", "{c}"]


def test_the_zero_shot_head_is_open_clips_classifier(make_model: MakeModel) -> None:
    path = make_model("vit")
    head = build_head(load_model(path), NAMES, TEMPLATES)
    theirs = open_clip.create_model(f"local-dir:{path}").eval()
    classifier = build_zero_shot_classifier(
        theirs,
        open_clip.get_tokenizer(f"local-dir:{path}"),
        NAMES,
        [lambda c, t=t: t.replace("{c}", c) for t in TEMPLATES],
    )
    expected = classifier.T * theirs.logit_scale.exp()
    torch.testing.assert_close(head.weight, expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(head.bias, torch.zeros(len(NAMES)))
    assert head.class_names == tuple(NAMES)
    assert (head.kind, head.feature) == ("zero-shot", "post")


def test_sigmoid_models_keep_their_bias(make_model: MakeModel) -> None:
    loaded = load_model(make_model("vit-bias"))
    head = build_head(loaded, NAMES, TEMPLATES)
    assert loaded.model.logit_bias is not None
    assert torch.equal(head.bias, loaded.model.logit_bias.detach().expand(len(NAMES)))


def test_logits_are_scaled_cosines_plus_bias() -> None:
    head = Head(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0]), ("x",), "probe", "post", "sha256:")
    assert head.logits(torch.tensor([[10.0, 0.0], [0.0, 0.5]])).tolist() == [[4.0], [5.0]]


def test_saved_and_read_again(make_model: MakeModel) -> None:
    path = make_model("timm")
    head = build_head(load_model(path), NAMES, TEMPLATES)
    assert list_heads(path) == []
    assert save_head(path, "animals", head) == path / "heads" / "animals.safetensors"
    assert list_heads(path) == ["animals"]
    again = load_head(path, "animals")
    assert torch.equal(again.weight, head.weight)
    assert (again.class_names, again.templates_hash) == (head.class_names, head.templates_hash)
    with pytest.raises(ModelError, match="not overwritten"):
        save_head(path, "animals", head)
    # open_clip still loads the directory with heads in it
    open_clip.create_model(f"local-dir:{path}")


def test_another_models_head_is_refused(make_model: MakeModel) -> None:
    path, other = make_model("vit"), make_model("vit-quickgelu")
    head = build_head(load_model(path), NAMES, TEMPLATES)
    loaded = load_model(other)
    with torch.no_grad():
        loaded.model.logit_scale += 1
    with pytest.raises(ModelError, match="another model"):
        save_head(make_model("vit-avg"), "animals", _of(head, "sha256:0"))
    save_head(path, "animals", head)
    third = make_model("timm")
    (third / "heads").mkdir()
    (path / "heads" / "animals.safetensors").rename(third / "heads" / "animals.safetensors")
    with pytest.raises(ModelError, match="another model") as caught:
        load_head(third, "animals")
    assert "\n" not in str(caught.value)


def _of(head: Head, fingerprint: str) -> Head:
    return Head(head.weight, head.bias, head.class_names, head.kind, head.feature, fingerprint)


def test_batches_and_repeated_prompts_change_nothing(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(make_model("vit"))
    names = [*NAMES, "Cat"]  # the tokenizer lower-cases, so these prompts are all known already
    head = build_head(loaded, names, TEMPLATES)
    assert torch.equal(head.weight[5], head.weight[0])
    monkeypatch.setattr("clip_models.heads._PROMPTS_AT_ONCE", 7)
    monkeypatch.setattr("clip_models.heads._TOKENS_A_BATCH", {"cpu": 20})
    torch.testing.assert_close(build_head(loaded, names, TEMPLATES).weight, head.weight)


def test_bad_input_is_named(make_model: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    path = make_model("vit")
    loaded = load_model(path)
    for template, message in (
        ("a photo", r"'a photo' has no \{c\}"),
        ("", r"'' has no \{c\}"),
        ("a photo of {}", r"has \{\}; \{c\}, and only that"),
        ("{c} {}", r"has \{\}; \{c\}, and only that"),
    ):
        with pytest.raises(ModelError, match=message):
            build_head(loaded, NAMES, ["{c}", template])
    with pytest.raises(ModelError, match="at least one of each"):
        build_head(loaded, [], TEMPLATES)
    twice = ["missile", "cat", "missile"]
    with pytest.raises(ModelError, match=r"more than once: \['missile'\].*--allow-duplicates"):
        build_head(loaded, twice, TEMPLATES)
    head = build_head(loaded, twice, TEMPLATES, allow_duplicates=True)
    assert torch.equal(head.weight[0], head.weight[2])
    assert "given twice" in caplog.text
    with pytest.raises(ModelError, match="has no head 'nope'"):
        load_head(path, "nope")
    with pytest.raises(ModelError, match="becomes a file name"):
        load_head(path, "../escape")
    (path / "heads").mkdir()
    save_file({"weight": torch.zeros(1, 2)}, path / "heads" / "half.safetensors")
    with pytest.raises(ModelError, match="damaged or not a class head"):
        load_head(path, "half")
    with pytest.raises(ModelError, match=r"needs weight \[2, D\]"):
        Head(torch.zeros(1, 2), torch.zeros(1), ("a", "b"), "probe", "post", "sha256:")


def test_class_files(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("cat\n\ndog\n\n")
    templates = tmp_path / "zeroshot_classification_templates.txt"
    templates.write_text("a {c}.\nthe {c}.\n\n\n")
    assert read_class_names(tmp_path) == ["cat", "", "dog", ""]  # a blank line is a class
    assert read_class_names(tmp_path / "classnames.txt") == ["cat", "", "dog", ""]
    assert read_templates(tmp_path) == ["a {c}.", "the {c}."]
    for text, line in (("a {c}.\n \nthe {c}.\n", 2), ("\n\n", 1)):
        templates.write_text(text)
        with pytest.raises(ModelError, match=f"line {line}: an empty template"):
            read_templates(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, message in (
        ("empty.txt", "is empty"),
        ("none.txt", "not exist"),
        ("latin.txt", "UTF-8"),
    ):
        with pytest.raises(ModelError, match=message):
            read_class_names(tmp_path / name)


def test_lists_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_class_names("imagenet") == list(open_clip.IMAGENET_CLASSNAMES)
    for name, theirs in (
        ("openai-imagenet", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple-imagenet", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert [t.replace("{c}", "cat") for t in read_templates(name)] == [f("cat") for f in theirs]
    assert all("{c}" in template for template in read_templates("general"))
    with pytest.raises(ModelError, match="known by name: general, openai-imagenet, simple-image"):
        read_templates("openai")
    Path("imagenet").write_text("a file that exists comes first\n")
    assert read_class_names("imagenet") == ["a file that exists comes first"]
    monkeypatch.setattr("clip_models.templates.find_spec", lambda _: None)
    with pytest.raises(ModelError, match="not installed; install open-clip-torch"):
        read_templates("openai-imagenet")
    assert read_templates("general")


def test_open_clip_is_not_imported_for_its_lists() -> None:
    code = (
        "import sys, clip_models; assert len(clip_models.read_templates('openai-imagenet')) == 80;"
        "print({'open_clip', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_build_head_command(make_model: MakeModel, tmp_path: Path) -> None:
    path, sets = make_model("vit"), tmp_path / "set"
    sets.mkdir()
    (sets / "classnames.txt").write_text("cat\ndog\n")

    def run(*args: object, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["build-head", str(path), *map(str, args)])
        assert result.exit_code == code, result.output
        return result.stderr if code else result.stdout

    run("plain", "--dataset", sets)  # the set has no templates
    loaded = load_model(path)
    own = build_head(loaded, ["cat", "dog"], read_templates("general"))
    assert torch.equal(load_head(path, "plain").weight, own.weight)
    (sets / "zeroshot_classification_templates.txt").write_text("{c}!\n")
    run("of-set", "--dataset", sets)
    run("by-name", "--dataset", sets, "--templates", "simple-imagenet")
    for name, templates in (("of-set", ["{c}!"]), ("by-name", read_templates("simple-imagenet"))):
        expected = build_head(loaded, ["cat", "dog"], templates)
        assert torch.equal(load_head(path, name).weight, expected.weight)
    assert "not overwritten" in run("plain", "--dataset", sets, code=1)
    error = run("big", "--classnames", "imagenet", "--templates", "general", code=1)
    assert "['missile', 'sunglasses'], 2 in all" in error
    assert "does not exist" in run("none", "--dataset", tmp_path / "imagenet", code=1)
    assert list_heads(path) == ["by-name", "of-set", "plain"]
