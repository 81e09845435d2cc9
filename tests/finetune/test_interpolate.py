import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from clip_finetune import FinetuneError, interpolate_models, open_set, soup_models, train
from clip_finetune.interpolate import blend_heads
from clip_finetune.weights import combine
from clip_models import (
    ModelError,
    build_head,
    list_heads,
    load_head,
    load_model,
    read_model_config,
    save_head,
    save_model,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from .conftest import VIT, config, equal, save_random_model, weights


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_are_exact(base: Path, finetuned: Path, tmp_path: Path, alpha: float):
    result = interpolate_models(base, finetuned, tmp_path / "out", alpha)
    end = finetuned if alpha else base
    assert equal(tmp_path / "out", end)
    assert result["fingerprint"] == load_model(end).fingerprint


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_equals_arithmetic_in_float64(base: Path, finetuned: Path, tmp_path: Path, alpha: float):
    interpolate_models(base, finetuned, tmp_path / "out", alpha)
    theta0, theta1, theta = weights(base), weights(finetuned), weights(tmp_path / "out")
    for name in theta0:
        exact = (1 - alpha) * theta0[name].double() + alpha * theta1[name].double()
        assert torch.equal(theta[name], exact.float()), name
        if not name.startswith("visual."):
            assert torch.equal(theta[name], theta0[name]), name  # equal ends stay bit-identical


def test_counters_come_from_the_nearer_end(resnet: Path, tmp_path: Path):
    loaded = load_model(resnet)
    counters = [b for n, b in loaded.model.named_buffers() if n.endswith("num_batches_tracked")]
    for counter in counters:
        counter.fill_(100)
    save_model(tmp_path / "moved", loaded.model, loaded.preprocess, provenance={})
    for alpha, expected in ((0.4, 0), (0.6, 100)):
        out = tmp_path / str(alpha)
        interpolate_models(resnet, tmp_path / "moved", out, alpha)
        values = [v for n, v in weights(out).items() if n.endswith("num_batches_tracked")]
        assert len(values) == len(counters) > 0
        assert all(int(value) == expected for value in values)


def test_trained_and_interpolated_score_the_same_in_open_clip(
    base: Path, digits_set: Path, tmp_path: Path
):
    """Both directories as open_clip opens them: its tower, transform and zero-shot classifier."""
    tuned, half = tmp_path / "tuned", tmp_path / "half"
    train(base, tuned, config(digits_set, iterations=30))
    interpolate_models(base, tuned, half, 0.4)
    data = open_set(digits_set, "test")
    for path in (tuned, half):
        ours = load_model(path)
        theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
        theirs = theirs.eval()
        classifier = open_clip.build_zero_shot_classifier(
            theirs,
            open_clip.get_tokenizer(f"local-dir:{path}"),
            data.class_names,
            [lambda c, t=template: t.replace("{c}", c) for template in data.templates],
        )
        images = [data.read(row) for row in range(len(data))]
        mine = torch.stack([ours.preprocess.eval(image) for image in images])
        decoded = [Image.open(io.BytesIO(image)) for image in images]
        other = torch.stack([transform(image) for image in decoded])  # pyright: ignore
        with torch.no_grad():
            features = ours.model.encode_image(ours.preprocess.normalize(mine))
            logits = load_head(path, "digits").logits(features)
            scale = theirs.logit_scale.exp()
            expected = scale * theirs.encode_image(other, normalize=True) @ classifier
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(logits.argmax(1), expected.argmax(1))


def test_trained_head_meets_the_one_it_started_from(base: Path, digits_set: Path, tmp_path: Path):
    """End to end: the other end of the head is the zero-shot head that base's text tower makes."""
    tuned, mixed = tmp_path / "tuned", tmp_path / "mixed"
    train(base, tuned, config(digits_set, method="end-to-end"))
    data = open_set(digits_set, "train")
    start = build_head(load_model(base), data.class_names, data.templates)
    end = load_head(tuned, "digits")
    assert not torch.equal(start.weight, end.weight)
    interpolate_models(base, tuned, mixed, 0.3)
    head = load_head(mixed, "digits")
    assert head.kind == "interpolated"
    exact = 0.7 * start.weight.double() + 0.3 * end.weight.double()
    assert torch.equal(head.weight, exact.float())
    # of another base, nobody knows where the head began
    with pytest.raises(FinetuneError, match="neither says which head"):
        interpolate_models(tuned, save_other(tuned, tmp_path / "o"), tmp_path / "x", 0.5)


def save_other(model: Path, path: Path) -> Path:
    """The same weights but one, the same heads under another name, and no provenance."""
    loaded = load_model(model)
    with torch.no_grad():
        loaded.model.visual.ln_post.bias.add_(1)
    save_model(path, loaded.model, loaded.preprocess)
    fingerprint = load_model(path).fingerprint
    save_head(path, "foreign", replace(load_head(model, "digits"), fingerprint=fingerprint))
    return path


def test_flyp_heads_are_made_anew(base: Path, digits_set: Path, tmp_path: Path):
    train(base, tmp_path / "tuned", config(digits_set, method="flyp"))
    interpolate_models(base, tmp_path / "tuned", tmp_path / "mixed", 0.5)
    data, loaded = open_set(digits_set, "train"), load_model(tmp_path / "mixed")
    head = load_head(tmp_path / "mixed", "digits")
    assert head.kind == "zero-shot"
    assert torch.equal(head.weight, build_head(loaded, data.class_names, data.templates).weight)


def test_heads(own_base: Path, finetuned: Path, digits_set: Path, tmp_path: Path):
    tuned = Path(shutil.copytree(finetuned, tmp_path / "tuned"))
    data = open_set(digits_set, "train")
    zero_shot = build_head(load_model(tuned), data.class_names, data.templates)
    save_head(tuned, "zero-shot", zero_shot)  # in one model only, but both have its text tower
    probes = {}
    for path, shift in ((own_base, 0.0), (tuned, 2.0)):
        head = replace(zero_shot, fingerprint=load_model(path).fingerprint, kind="probe")
        probes[path] = replace(head, weight=head.weight + shift, bias=head.bias + shift)
        save_head(path, "probe", probes[path])
        save_head(path, "other", replace(head, class_names=(*"0123456789"[:9], path.name)))
        names = data.class_names if path == tuned else data.class_names[::-1]
        order = slice(None) if path == tuned else [*range(9, -1, -1)]
        permuted = replace(probes[path], weight=probes[path].weight[order], class_names=names)
        save_head(path, "permuted", permuted)
        twice = ("a", *names[1:-1], "a")
        save_head(path, "twice", replace(permuted, class_names=twice))
        save_head(path, f"only-{path.name}", head)

    result = interpolate_models(own_base, tuned, tmp_path / "out", 0.25)
    assert result["heads"] == list_heads(tmp_path / "out") == ["permuted", "probe", "zero-shot"]
    kept = load_head(tmp_path / "out", "zero-shot")
    assert kept.kind == "zero-shot"
    assert torch.equal(kept.weight, zero_shot.weight)
    blended = load_head(tmp_path / "out", "probe")
    assert blended.kind == "interpolated"
    assert blended.fingerprint == result["fingerprint"]
    torch.testing.assert_close(blended.weight, zero_shot.weight + 0.5)
    torch.testing.assert_close(blended.bias, zero_shot.bias + 0.5)
    permuted = load_head(tmp_path / "out", "permuted")
    assert permuted.class_names == data.class_names[::-1]
    torch.testing.assert_close(permuted.weight, zero_shot.weight.flip(0) + 0.5)


def test_killed_and_run_again(base: Path, finetuned: Path, tmp_path: Path, monkeypatch):
    """What a kill leaves behind is of one name, whichever process it was, and is cleared away."""
    monkeypatch.setattr("os.rename", lambda *_: os._exit(1))
    if (process := os.fork()) == 0:
        torch.set_num_threads(1)
        interpolate_models(base, finetuned, tmp_path / "out", 0.5)
    os.waitpid(process, 0)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    interpolate_models(base, finetuned, tmp_path / "out", 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_run_again(base: Path, finetuned: Path, tmp_path: Path):
    first = interpolate_models(base, finetuned, tmp_path / "out", 0.5)
    again = interpolate_models(base, finetuned, tmp_path / "out", 0.5)
    assert again == first | {"status": "nothing left to do"}
    with pytest.raises(FinetuneError, match=r"another run's \(alpha is 0\.5 there, 0\.6 here"):
        interpolate_models(base, finetuned, tmp_path / "out", 0.6)


def test_alpha_outside(base: Path, finetuned: Path, tmp_path: Path):
    with pytest.raises(FinetuneError, match=r"alpha is 1\.5; .*--extrapolate"):
        interpolate_models(base, finetuned, tmp_path / "out", 1.5)
    interpolate_models(base, finetuned, tmp_path / "out", 1.5, extrapolate=True)
    theta0, theta1, theta = weights(base), weights(finetuned), weights(tmp_path / "out")
    name = "visual.proj"
    torch.testing.assert_close(theta[name], -0.5 * theta0[name] + 1.5 * theta1[name])


def test_towers_of_different_shape(base: Path, tmp_path: Path):
    wide = save_random_model(tmp_path / "wide", VIT | {"width": 48})
    with pytest.raises(FinetuneError, match=r"vision_cfg\.width is 48 there, 32 here"):
        interpolate_models(base, wide, tmp_path / "out", 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=4), st.floats(0, 1), st.data())
def test_combine(values: list[float], alpha: float, data: st.DataObject):
    one = torch.tensor(values)
    other = torch.tensor([data.draw(st.floats(-1e3, 1e3, width=32)) for _ in values])
    assert torch.equal(combine([one, other], [1, 0]), one)
    assert torch.equal(combine([one, other], [0, 1]), other)
    assert torch.equal(combine([one, one], [1 - alpha, alpha]), one)
    between = combine([one, other], [1 - alpha, alpha])
    assert ((between >= torch.minimum(one, other)) & (between <= torch.maximum(one, other))).all()


def test_soup(base: Path, finetuned: Path, tmp_path: Path):
    third = save_random_model(tmp_path / "third", VIT, seed=5)
    models = [base, finetuned, third]
    uniform = soup_models(models, tmp_path / "uniform")
    assert uniform["weights"] == pytest.approx([1 / 3] * 3)
    soup_models(models, tmp_path / "uneven", [0.5, 0.3, 0.2])
    states = [weights(path) for path in models]
    for name, shares in (("uniform", [1 / 3] * 3), ("uneven", [0.5, 0.3, 0.2])):
        for key, theta in weights(tmp_path / name).items():
            exact = sum(w * state[key].double() for w, state in zip(shares, states, strict=True))
            torch.testing.assert_close(theta.double(), exact, atol=1e-7, rtol=1e-7)
    assert load_model(tmp_path / "uneven").provenance["models"][2] == load_model(third).fingerprint
    assert soup_models(models, tmp_path / "uniform")["status"] == "nothing left to do"

    # an arithmetic of tasks, in which a coefficient of 1 is no end
    soup_models(models, tmp_path / "sum", [1, 1, -1], extrapolate=True)
    for key, theta in weights(tmp_path / "sum").items():
        exact = states[0][key].double() + states[1][key].double() - states[2][key].double()
        assert torch.equal(theta.double(), exact.float().double()), key
    head = build_head(load_model(base), ["a", "b"], ["{c}"])
    parts = [replace(head, weight=shift * head.weight) for shift in (2.0, 3.0, 4.0)]
    torch.testing.assert_close(blend_heads(parts, [1, 1, -1]).weight, head.weight)
    assert blend_heads(parts, [0, 1, 0]) is parts[1]

    soup_models([base, finetuned], tmp_path / "two", [0.5, 0.5])
    interpolate_models(base, finetuned, tmp_path / "half", 0.5)
    assert equal(tmp_path / "two", tmp_path / "half")
    for shares, message in (
        ([0.5, 0.4], r"add up to 0\.9; expected 1"),
        ([1.0], "1 --weights for 2 models"),
        ([1.5, -0.5], r"holds -0\.5; .*--extrapolate"),
    ):
        with pytest.raises(FinetuneError, match=message):
            soup_models([base, finetuned], tmp_path / "o", shares)
    with pytest.raises(FinetuneError, match="two models or more; found 1"):
        soup_models([base], tmp_path / "o")


def test_soup_of_heads(base: Path, digits_set: Path, tmp_path: Path):
    """Two runs from the same start: their heads are averaged as their towers are."""
    paths = [tmp_path / "0", tmp_path / "1"]
    for seed, path in enumerate(paths):
        train(base, path, config(digits_set, method="end-to-end", seed=seed))
    soup_models(paths, tmp_path / "soup")
    heads = [load_head(path, "digits").weight.double() for path in paths]
    mean = load_head(tmp_path / "soup", "digits")
    assert mean.kind == "interpolated"
    assert torch.equal(mean.weight, ((heads[0] + heads[1]) / 2).float())


# a process of its own: what other tests left on the heap would count
WATCHED = """
import sys
from pathlib import Path
import torch
from clip_finetune import interpolate_models, weights

def private_memory():  # pages of a file that is read do not count
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return 1024 * int(line.split()[1])

def watched(*arguments):
    result = true(*arguments)
    seen.append(private_memory())
    return result

one, other, small, out = map(Path, sys.argv[1:])
interpolate_models(small, small, out / "small", 0.5)  # imports, and threads that start but once
true, weights.combine, seen = weights.combine, watched, []
before = private_memory()
interpolate_models(one, other, out / "out", 0.5)
print(len(seen), max(seen) - before)
"""


def test_one_tensor_at_a_time(base: Path, tmp_path: Path):
    """Two models of 100 MB are combined in a tenth of the memory of one."""
    wide = {"layers": 8, "width": 512, "head_width": 64, "patch_size": 4}
    models = [save_random_model(tmp_path / str(seed), wide, seed) for seed in (0, 1)]
    assert (models[0] / "open_clip_model.safetensors").stat().st_size > 100e6
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *models, base, tmp_path],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back at once
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tensors, taken = map(int, done.stdout.split())
    assert tensors > 100
    assert taken < 10e6  # a tensor of 4 MB


def test_half_precision_comes_out_whole(base: Path, finetuned: Path, tmp_path: Path):
    half = Path(shutil.copytree(finetuned, tmp_path / "half"))
    file = half / "open_clip_model.safetensors"
    stored = load_file(file)
    save_file({name: weight.half() for name, weight in stored.items()}, file)
    interpolate_models(base, half, tmp_path / "out", 0.5)
    theta0, theta = weights(base)["visual.proj"], weights(tmp_path / "out")["visual.proj"]
    rounded = stored["visual.proj"].half().double()
    assert theta.dtype == torch.float32
    assert torch.equal(theta, (0.5 * theta0.double() + 0.5 * rounded).float())


def test_damaged_models(base: Path, finetuned: Path, tmp_path: Path):
    broken = Path(shutil.copytree(finetuned, tmp_path / "broken"))
    file = broken / "open_clip_model.safetensors"
    stored = load_file(file)
    for change, message in (
        ({"visual.proj": stored["visual.proj"][:4]}, r"visual\.proj has the shape \[4, 24\]"),
        ({"visual.more": stored["visual.proj"].clone()}, r"broken has the weight visual\.more"),
    ):
        save_file(stored | change, file)
        with pytest.raises(FinetuneError, match=message):
            interpolate_models(base, broken, tmp_path / "out", 0.5)
    del stored["visual.proj"]
    save_file(stored, file)
    with pytest.raises(FinetuneError, match=r"base has the weight visual\.proj, .* has not"):
        interpolate_models(base, broken, tmp_path / "out", 0.5)
    file.unlink()
    with pytest.raises(ModelError, match="has no open_clip_model"):
        interpolate_models(base, broken, tmp_path / "out", 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_what_else_is_in_the_directory(base: Path, finetuned: Path, tmp_path: Path):
    own = Path(shutil.copytree(base, tmp_path / "own"))
    (own / "tokenizer.json").write_text("{}")
    interpolate_models(own, finetuned, tmp_path / "out", 0.5)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    config, values = read_model_config(tmp_path / "out")
    assert config == read_model_config(base)[0]
    assert values["provenance"]["command"] == "interpolate"
