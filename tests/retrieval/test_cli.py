"""The commands, end to end, and their bad input: one line, exit status 1."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import clip_retrieval
import numpy as np
import pytest
from click.testing import CliRunner, Result
from clip_retrieval.cli import main

from .conftest import caption, picture, write_tar


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def lines(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def error(result: Result) -> str:
    """The one line on stderr, of an expected failure."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.splitlines()[-1] == line
    return line


@pytest.fixture(scope="module")
def index(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "index"
    (result,) = lines(run("build-index", model, shards, path, "--workers", 0))
    assert (result["status"], result["images"]) == ("built", 40)
    return path


@pytest.fixture
def copy(index: Path, tmp_path: Path) -> Path:
    return shutil.copytree(index, tmp_path / "copy")


@pytest.mark.parametrize("command", [[], *([name] for name in main.commands)])
def test_every_command_and_option_has_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    for parameter in (main.commands[command[0]] if command else main).params:
        assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from clip_retrieval.cli import main; main(['--help'], standalone_mode=False);"
        "heavy = {'torch', 'numpy', 'pyarrow', 'faiss', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_public_names() -> None:
    for name in clip_retrieval.__all__:
        assert getattr(clip_retrieval, name).__name__ == name


def test_build_again(index: Path, model: Path, shards: Path) -> None:
    (result,) = lines(run("build-index", model, shards, index))
    assert result["status"] == "nothing left to do"


def test_query(index: Path, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(picture(1003))
    answers = lines(
        run(
            *("query", index, "--text", "red cat", "--image", file, "--image", "-"),
            *("--text", "a stone", "-k", 3),
            stdin=picture(5),
        )
    )
    assert [a["query"] for a in answers] == [
        {"text": "red cat"},
        {"text": "a stone"},
        {"image": str(file)},
        {"image": "-"},
    ]
    for answer in answers:
        assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3]
        similarities = [hit["similarity"] for hit in answer["hits"]]
        assert similarities == sorted(similarities, reverse=True)
    first = answers[2]["hits"][0]
    assert first == {
        "rank": 1,
        "row": 23,
        "key": "000010003",
        "caption": caption(1003),
        "similarity": pytest.approx(1, abs=1e-3),
        "url": None,
        "shard": "00001.tar",
        "json": {"seed": 1003},
    }
    assert answers[3]["hits"][0]["key"] == "000000005"


def test_k_above_the_count_shows_all(index: Path) -> None:
    result = run("query", index, "--text", "cat", "-k", 100)
    assert len(lines(result)[0]["hits"]) == 40
    assert "-k 100 is above the 40 images of the index" in result.stderr


def test_the_model_may_lie_elsewhere(copy: Path, model: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(model, tmp_path / "moved")
    facts = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(facts | {"model": str(tmp_path / "gone")}))
    assert "is gone; give --model DIR" in error(run("query", copy, "--text", "cat"))
    assert lines(run("query", copy, "--text", "cat", "--model", moved))


def test_table(index: Path, tmp_path: Path) -> None:
    output = tmp_path / "table.txt"
    result = run("query", index, "--text", "cat", "-k", 2, "--format", "table", "--output", output)
    assert (result.exit_code, result.stdout) == (0, "")
    title, header, *rows = output.read_text().splitlines()
    assert title == "“cat”"
    assert header.split() == ["rank", "sim", "row", "key", "caption"]
    assert [row.split()[0] for row in rows] == ["1", "2"]


def test_contact_sheet(index: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "<b>.png", tmp_path / "sheet.html"
    file.write_bytes(picture(7))
    arguments = ("query", index, "--image", file, "-k", 4, "--format", "html", "--output", output)
    assert run(*arguments).exit_code == 0
    page = output.read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "<b>.png" not in page
    assert "&lt;b&gt;.png" in page
    assert "http" not in page
    assert not list(tmp_path.glob("*.tmp"))


def test_eval(model: Path, retrieval_set: Path, shards: Path) -> None:
    benchmark, training = lines(
        run("eval", model, retrieval_set, shards, "--recall-k", "1,5", "--workers", 0)
    )
    assert (benchmark["images"], benchmark["captions"], benchmark["split"]) == (20, 39, "test")
    assert (training["images"], training["captions"], training["split"]) == (40, 40, None)
    names = {f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5)}
    for result in (benchmark, training):
        for part in ("metrics", "hits", "queries", "interval_95", "chance"):
            assert set(result[part]) == names
        for name in names:
            low, high = result["interval_95"][name]
            assert low <= result["metrics"][name] <= high
            assert result["metrics"][name] == result["hits"][name] / result["queries"][name]
    assert benchmark["queries"]["image_retrieval_recall@1"] == 39
    assert benchmark["queries"]["text_retrieval_recall@1"] == 20
    assert benchmark["chance"]["image_retrieval_recall@5"] == pytest.approx(5 / 20)


def test_eval_bad_sets(model: Path, retrieval_set: Path, tmp_path: Path) -> None:
    line = error(run("eval", model, retrieval_set, "--split", "val"))
    assert "has no split 'val': its splits are test" in line
    assert "no split or shard is there" in error(run("eval", model, tmp_path))
    write_tar(tmp_path / "set" / "0.tar", [("s0000000", {"png": picture(0), "txt": b" \n"})])
    line = error(run("eval", model, tmp_path / "set", "--workers", 0))
    assert "s0000000 has no caption" in line


def test_bad_models_and_shards(model: Path, shards: Path, tmp_path: Path) -> None:
    for command in (
        ("build-index", tmp_path / "gone", shards, tmp_path / "x"),
        (
            "eval",
            tmp_path / "gone",
            shards,
        ),
    ):
        assert str(tmp_path / "gone") in error(run(*command))
    assert "no is not there" in error(run("build-index", model, tmp_path / "no", tmp_path / "x"))
    line = error(run("build-index", model, shards, tmp_path / "x", "--max-memory", "1K"))
    assert "--max-memory is 1.0 KB" in line
    line = error(run("build-index", model, shards, tmp_path / "x", "--device", "quantum"))
    assert "device 'quantum' is not usable" in line
    assert not list(tmp_path.glob("x*"))


def test_bad_queries(index: Path, other_model: Path, tmp_path: Path) -> None:
    assert "is no index" in error(run("query", tmp_path, "--text", "cat"))
    line = error(run("query", index, "--text", "cat", "--model", other_model))
    assert "is not the model of" in line
    text = tmp_path / "words.txt"
    text.write_text("not a picture")
    assert "words.txt: not a readable image" in error(run("query", index, "--image", text))
    assert "gone.png" in error(run("query", index, "--image", tmp_path / "gone.png"))
    assert "-: not a readable image" in error(run("query", index, "--image", "-", stdin=b""))


def test_queries_of_another_width(index: Path) -> None:
    with pytest.raises(clip_retrieval.RetrievalError, match="holds vectors of 32 numbers"):
        clip_retrieval.Index(index).nearest(np.ones((1, 31), np.float32), 3)


@pytest.mark.parametrize("name", ["image.index", "rows.index", "metadata.arrow"])
@pytest.mark.parametrize("harm", ["truncated", "missing", "garbled"])
def test_harmed_index(copy: Path, name: str, harm: str) -> None:
    file = copy / "g1" / name
    data = file.read_bytes()
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-100] if harm == "truncated" else b"?" * len(data))
    line = error(run("query", copy, "--text", "cat"))
    assert name in line
    assert "build the index again" in line


def test_harmed_facts(copy: Path) -> None:
    (copy / "index.json").write_text('{"format": 99}')
    assert "format 99, expected 2" in error(run("query", copy, "--text", "cat"))
    (copy / "index.json").write_text("{")
    assert "is not JSON" in error(run("query", copy, "--text", "cat"))


def test_the_shards_are_gone(copy: Path, shards: Path) -> None:
    facts = json.loads((copy / "index.json").read_text())
    facts["parts"] = [part | {"source": str(copy)} for part in facts["parts"]]
    (copy / "index.json").write_text(json.dumps(facts))
    assert lines(run("query", copy, "--text", "cat"))  # pictures are not needed for this
    assert ".tar is gone" in error(run("query", copy, "--text", "cat", "--format", "html"))


def test_usage_errors(index: Path, model: Path, shards: Path, tmp_path: Path) -> None:
    assert run("query", index).exit_code == 2
    assert run("query", index, "--text", "x", "-k", 0).exit_code == 2
    assert run("eval", model).exit_code == 2
    assert run("eval", model, shards, "--recall-k", "0,5").exit_code == 2
    assert run("build-index", model, shards, tmp_path / "x", "--max-memory", "much").exit_code == 2
    assert run("build-index", model, shards, tmp_path / "x", "--target-recall", 0).exit_code == 2
    (tmp_path / "img_emb").mkdir()
    result = run("build-index", tmp_path, tmp_path / "x", "--thumbnails", 64)
    assert (result.exit_code, "holds embeddings" in result.stderr) == (2, True)
    result = run("build-index", "--remove", "-", index, "--thumbnails", 64, stdin=b"none")
    assert (result.exit_code, "the INDEX only" in result.stderr) == (2, True)
