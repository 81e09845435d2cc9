"""Held-out evaluation: open_clip's numbers, one process or several, and samples that are broken."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_models import CLIP, ContrastiveLoss, Preprocess, Tokenizer
from clip_train import TrainError
from clip_train.shards import open_data, open_shard
from clip_train.validate_data import open_labelled_set
from clip_train.validate_scores import mean_loss, ranks
from open_clip.loss import SigLipLoss
from open_clip_train.train import get_clip_metrics
from sklearn.metrics import top_k_accuracy_score

from .conftest import jpeg, pair, run, write_shard
from .validation_process import random_model, validator

PROCESS = f"{__package__}.validation_process"
NAMES = ["red", "green", "blue", "yellow", "grey", "white", "black"]
TEMPLATES = ["a photo of a {c} thing.", "{c}", "the colour {c}"]
RECALLS = [f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def labelled_set(path: Path, labels: list[int | str], classes: int = len(NAMES)) -> Path:
    """Two shards of images in CLIP_benchmark's layout."""
    split = path / "test"
    split.mkdir(parents=True)
    (path / "classnames.txt").write_text("\n".join(NAMES[:classes]) + "\n")
    (path / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (split / "nshards.txt").write_text("2\n")
    samples = {
        f"s{i:07}": {"jpg": jpeg(100 + i), "cls": str(label).encode()}
        for i, label in enumerate(labels)
    }
    keys = list(samples)
    half = len(keys) // 2
    for number, part in enumerate((keys[:half], keys[half:])):
        write_shard(split / f"{number}.tar", {key: samples[key] for key in part})
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = np.random.default_rng(0).integers(0, len(NAMES), 30)
    return labelled_set(tmp_path_factory.mktemp("sets") / "colours", drawn.tolist())


def features(model: CLIP, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all pairs of a training set, in stored order, in one forward pass."""
    images, texts = [], []
    for path in open_data(str(data)).shards:
        shard = open_shard(path)
        images += [Preprocess(64).eval(shard.image(row)) for row in range(len(shard))]
        texts += [shard.caption(row).decode() for row in range(len(shard))]
    model.eval()
    with torch.no_grad():
        output = model(Preprocess(64).normalize(torch.stack(images)), Tokenizer()(texts))
    model.train()
    return output.image_features_BE, output.text_features_BE


def test_pairs_agree_with_open_clip(data: Path) -> None:
    model = random_model()
    image_NE, text_NE = features(model, data)
    found = validator(val_data=data).run(model)
    assert model.training
    expected = get_clip_metrics(image_NE, text_NE, model.logit_scale.exp().detach())
    for name in RECALLS:
        assert found[name] == pytest.approx(expected[name.replace("recall", "R")], abs=1e-6)
    assert 0 < found["text_to_image_recall@10"] < 1
    loss = open_clip.ClipLoss()
    losses = [  # 70 pairs: four batches of 16, six pairs left out
        loss(image_NE[i : i + 16], text_NE[i : i + 16], model.logit_scale.exp()).item()
        for i in range(0, 64, 16)
    ]
    assert found["val_loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert found["val_unreadable"] == 0
    one_batch = validator(val_data=data, batch_size=1000).run(model)["val_loss"]
    assert one_batch == pytest.approx(loss(image_NE, text_NE, model.logit_scale.exp()).item())


def test_siglip_has_its_own_loss(data: Path) -> None:
    model = random_model(bias=-10.0)
    image_NE, text_NE = features(model, data)
    scale, bias = model.logit_scale.exp(), model.logit_bias
    expected = SigLipLoss()(image_NE, text_NE, scale, bias)
    found = validator(val_data=data, batch_size=70).run(model)["val_loss"]
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_classes_agree_with_open_clip(labelled: Path) -> None:
    model = random_model()
    found = validator(zeroshot_data=labelled).run(model)
    assert validator(zeroshot_data=labelled / "test").run(model) == found  # the split by name
    model.eval()
    templates = [lambda c, t=template: t.replace("{c}", c) for template in TEMPLATES]
    weight_EC = open_clip.build_zero_shot_classifier(model, Tokenizer(), NAMES, templates)
    data = open_labelled_set(str(labelled))
    images_N3SS = torch.stack(
        [Preprocess(64).eval(open_shard(s.shard).image(s.row)) for s in data.samples]
    )
    with torch.no_grad():
        image_NE = model.encode_image(Preprocess(64).normalize(images_N3SS), normalize=True)
    scores_NC, classes = image_NE @ weight_EC, range(len(NAMES))
    top1, top5 = (
        top_k_accuracy_score(data.labels_N, scores_NC, k=k, labels=classes) for k in (1, 5)
    )
    expected = {"zeroshot_top1": top1, "zeroshot_top5": top5, "zeroshot_unreadable": 0}
    assert found == pytest.approx(expected)
    assert 0 < top1 < top5 < 1


def test_autocast_and_micro_batches(data: Path, labelled: Path) -> None:
    """bf16 towers, a forward pass of one pair or class at a time: near float32's values."""
    model = random_model()
    full = validator(val_data=data, zeroshot_data=labelled).run(model)
    small = validator(val_data=data, zeroshot_data=labelled, micro_batch_size=1).run(model)
    assert small == pytest.approx(full, abs=1e-5)
    rough = validator(torch.bfloat16, val_data=data, workers=2).run(model)
    assert rough["val_loss"] != full["val_loss"]
    assert rough["val_loss"] == pytest.approx(full["val_loss"], rel=0.05)


def test_few_classes_have_no_top5(tmp_path: Path) -> None:
    found = validator(zeroshot_data=labelled_set(tmp_path / "set", [0, 1, 1, 0], 2))
    assert found.run(random_model()).keys() == {"zeroshot_top1", "zeroshot_unreadable"}


def test_training_goes_on_as_if_nothing_had_been(data: Path, labelled: Path) -> None:
    """Neither the random numbers nor the model's mode change, and no gradient appears."""
    model = random_model()
    before = torch.get_rng_state()
    validator(val_data=data, zeroshot_data=labelled, workers=1).run(model.eval())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_unreadable_samples_are_left_out(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {f"k{i:02}": pair(i) for i in range(20)}
    write_shard(tmp_path / "whole.tar", kept)
    broken = {"b0": pair(30), "b1": pair(31), "b2": pair(32), "b3": pair(33)}
    broken["b0"]["jpg"] = broken["b0"]["jpg"][:100]
    del broken["b1"]["jpg"]
    del broken["b2"]["txt"]
    broken["b3"]["txt"] = b"\xff\xfe"
    write_shard(tmp_path / "mixed.tar", {"b0": broken["b0"], **kept, **broken})
    model = random_model()
    whole = validator(val_data=tmp_path / "whole.tar").run(model)
    subject = validator(val_data=tmp_path / "mixed.tar")
    found = subject.run(model)
    assert found["val_unreadable"] == 4
    assert found == pytest.approx(whole | {"val_unreadable": 4}, abs=1e-5)
    named = [r.message.split(": ")[1] for r in caplog.records if "left out" in r.message]
    assert sorted(named) == [f"{tmp_path.name}/mixed.tar/b{i}" for i in range(4)]
    caplog.clear()
    subject.run(model)
    assert not caplog.records  # named once


def test_unreadable_images_of_a_labelled_set(tmp_path: Path) -> None:
    path = labelled_set(tmp_path / "set", [0, 1, 2, 3])
    write_shard(path / "test" / "0.tar", {"a": {"jpg": b"no", "cls": b"1"}, "b": {"cls": b"0"}})
    found = validator(zeroshot_data=path).run(random_model())
    assert found["zeroshot_unreadable"] == 2
    path = labelled_set(tmp_path / "other", [0, 1])
    for number in range(2):
        write_shard(path / "test" / f"{number}.tar", {"c": {"jpg": b"no", "cls": b"1"}})
    with pytest.raises(TrainError, match="--zeroshot-data: none of its 2 samples is readable"):
        validator(zeroshot_data=path).run(random_model())


def test_errors_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"^--val-data: no file"):
        validator(val_data=tmp_path / "none.tar")
    write_shard(tmp_path / "captions.tar", {"a": {"txt": b"a dog"}})
    with pytest.raises(TrainError, match=r"^--val-data: no image-caption pair"):
        validator(val_data=tmp_path / "captions.tar")
    for label, problem in (
        (7, "the label is 7; expected 0 to 6, a line of classnames.txt"),
        (-1, "the label is -1; expected 0 to 6"),
        ("dog", "holds b'dog'; expected an integer"),
    ):
        path = labelled_set(tmp_path / f"label{label}", [0, 1, 2, label])
        with pytest.raises(TrainError, match=problem) as caught:
            validator(zeroshot_data=path)
        assert f"{path / 'test' / '1.tar' / 's0000003'}: " in str(caught.value)
    path = labelled_set(tmp_path / "set", [0, 1])
    (path / "test" / "nshards.txt").rename(path / "nshards.txt")
    with pytest.raises(TrainError, match=r"nshards.txt is missing.* splits found: none"):
        validator(zeroshot_data=path)
    (path / "test" / "nshards.txt").write_text("1")
    (path / "zeroshot_classification_templates.txt").write_text("a photo\n")
    with pytest.raises(TrainError, match=r"template 'a photo' has no \{c\}"):
        validator(zeroshot_data=path)


def test_ranks_count_ties_and_nan_against_the_model() -> None:
    torch.manual_seed(0)
    image_NE = F.normalize(torch.randn(40, 16), dim=-1)
    text_NE = F.normalize(image_NE + 0.5 * torch.randn(40, 16), dim=-1)
    scores = image_NE.double() @ text_NE.double().T
    expected = (scores > scores.diagonal()[:, None]).sum(1)
    assert torch.equal(ranks(image_NE, text_NE), expected)
    constant = F.normalize(torch.ones(40, 16), dim=-1)
    assert (ranks(constant, constant) == 39).all()
    assert (ranks(image_NE, constant) == 39).all()
    assert (ranks(image_NE, torch.full_like(text_NE, torch.nan)) == 39).all()
    twice = torch.cat([text_NE, text_NE])  # every caption is there again
    assert (ranks(twice, twice) == 1).all()


def test_ranks_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = F.normalize(torch.randn(2, 50, 8, generator=torch.manual_seed(1)), dim=-1)
    whole = ranks(rows[0], rows[1])
    monkeypatch.setattr("clip_train.validate_scores._SCORES_AT_ONCE", 7 * 50)
    assert torch.equal(ranks(rows[0], rows[1]), whole)


def test_loss_is_float32s_and_of_whole_batches() -> None:
    model = random_model()
    rows = F.normalize(torch.randn(2, 11, 8, generator=torch.manual_seed(1)), dim=-1)
    scale = model.logit_scale.exp().detach()
    parts = [ContrastiveLoss()(rows[0, i : i + 4], rows[1, i : i + 4], scale) for i in (0, 4)]
    with torch.no_grad():
        assert mean_loss(model, rows[0], rows[1], 4) == pytest.approx(sum(map(float, parts)) / 2)


def test_a_failure_leaves_no_worker(data: Path) -> None:
    """Workers ignore SIGTERM: one that is left would keep the process from ending."""
    model = random_model()
    model.visual.forward = None  # type: ignore[assignment]
    with pytest.raises(TypeError) as caught:
        validator(val_data=data, workers=1).run(model)
    assert caught.traceback
    assert not multiprocessing.active_children()


def test_a_lost_worker_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_train.validate_data.choose_caption", lambda *_: os._exit(1))
    with pytest.raises(TrainError, match=r"the data loader failed: .*DataLoader worker"):
        validator(val_data=data, workers=1).run(random_model())


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "pairs"), [(2, 70), (4, 3)])
def test_processes_equal_one(tmp_path: Path, labelled: Path, processes: int, pairs: int) -> None:
    """Whole or sharded; with fewer pairs than processes; with a sample that all must leave out."""
    samples = {f"k{i:02}": pair(i) for i in range(pairs)}
    samples["k01"]["jpg"] = b"no"
    write_shard(tmp_path / "0.tar", samples)
    expected = validator(val_data=tmp_path, zeroshot_data=labelled).run(random_model())
    launch = ["torchrun", "--standalone", "--nproc-per-node", str(processes)]
    found = run([*launch, "-m", PROCESS, str(tmp_path), str(labelled)])
    assert found.returncode == 0, found.stderr
    for rank in range(processes):
        values = json.loads((tmp_path / f"{rank}.json").read_text())
        assert values == [pytest.approx(expected, abs=1e-5)] * 3, rank
    assert found.stderr.count(f"left out of validation: {tmp_path.name}/0.tar/k01") == 1
