"""What a table may hold, and that anything else is refused by the name of its row."""

import io
import re
from pathlib import Path

import pytest
from errors import ScalingError
from fits import fit_points
from points import read_points
from settings import Settings

LONG = "run,model,group,data,samples_seen,gmacs,task,dataset,metric,value,n_eval\n"
GOOD = "a,m,g,d,1e9,7.4,zero-shot,in,acc1,0.5,1000\n"


def read(tmp_path: Path, text: str, percent: bool = False, metrics: tuple[str, ...] = ()):
    file = tmp_path / "points.csv"
    file.write_text(text)
    return read_points(file, metrics, percent)


def test_a_long_table(tmp_path: Path) -> None:
    (point,) = read(tmp_path, LONG + GOOD)
    assert (point.run, point.quantity, point.error) == ("a", "zero-shot/in/acc1", 0.5)
    assert (point.compute, point.n_eval, point.kind) == (7.4e9, 1000, "error")


def test_a_wide_table_is_melted(tmp_path: Path) -> None:
    text = "model,samples_seen,in,coco_loss\nViT-B-32,1e9,75,2.5\nViT-B-16,1e9,,2.25\n"
    points = read(tmp_path, text, percent=True)
    assert [(p.model, p.quantity, p.error, p.kind) for p in points] == [
        ("ViT-B-32", "in", 0.25, "error"),
        ("ViT-B-32", "coco_loss", 2.5, "loss"),
        ("ViT-B-16", "coco_loss", 2.25, "loss"),
    ]
    assert [p.gmacs for p in points] == [7.4, 7.4, 20.57]  # the paper's


def test_errors_and_losses_are_not_turned_round(tmp_path: Path) -> None:
    rows = GOOD.replace("acc1", "top1_error").replace("0.5", "0.3")
    rows += GOOD.replace("acc1", "val_loss").replace("0.5", "5.3")
    rows += GOOD.replace("acc1", "image_retrieval_recall@5").replace("0.5", "0.6")
    assert [p.error for p in read(tmp_path, LONG + rows)] == [0.3, 5.3, 0.4]


def test_metrics_are_chosen_by_consecutive_parts(tmp_path: Path) -> None:
    rows = GOOD + GOOD.replace("zero-shot", "probe-10")
    chosen = read(tmp_path, LONG + rows, metrics=("probe-10/in",))
    assert [p.quantity for p in chosen] == ["probe-10/in/acc1"]
    assert len(read(tmp_path, LONG + rows, metrics=("in",))) == 2
    with pytest.raises(ScalingError, match="no measurement of shot"):
        read(tmp_path, LONG + rows, metrics=("shot",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LONG + GOOD + GOOD.replace("0.5", "50"), "row 3: zero-shot/in/acc1: 50 .*--percent"),
        (LONG + GOOD.replace("0.5", "1.0"), "row 2: .*error of zero"),
        (LONG + GOOD.replace("0.5", "1").replace("acc1", "err1"), None),
        (LONG + GOOD + GOOD, "row 3: repeats row 2: a, zero-shot/in/acc1"),
        (LONG + GOOD.replace("0.5", "inf"), "row 2: .*'inf' is not finite"),
        (LONG + GOOD.replace("0.5", "nan"), "row 2: .*'nan' is not finite"),
        (LONG + GOOD.replace("0.5", "-0.5"), "row 2: .*-0.5 is negative"),
        (LONG + GOOD.replace("0.5", "half"), "row 2: .*'half' is not a number"),
        (LONG + GOOD.replace("0.5", ""), "row 2: .*'' is not a number"),
        (LONG + GOOD.replace("1e9", "0"), "row 2: samples_seen: 0; it must be positive"),
        (LONG + GOOD.replace("7.4", "-7"), "row 2: gmacs: -7 is negative"),
        (LONG + GOOD.replace("7.4", ""), "row 2: no gmacs, and 'm' is none"),
        (LONG + GOOD.replace("1000", "0"), "row 2: n_eval: 0"),
        (LONG + GOOD.replace("acc1", "quality"), "row 2: metric 'quality' does not say"),
        (LONG + GOOD.replace(",1000", ""), "row 2: 10 cells, the header has 11"),
        (LONG.replace("samples_seen", "seen") + GOOD, "column samples_seen missing; found: run"),
        (LONG.replace("metric", "m") + GOOD, "column metric missing"),
        ("model,samples_seen\nm,1\n", "column value .or a column for each quantity. missing"),
        (LONG.replace("run", "model") + GOOD, "column 'model' appears twice"),
        ("", "missing; found: nothing"),
        (LONG, "no measurement"),
    ],
)
def test_bad_tables_are_refused_by_row(tmp_path: Path, text: str, message: str | None) -> None:
    if message is None:
        assert read(tmp_path, text)
        return
    with pytest.raises(ScalingError, match=message) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "points.csv"))
    assert "\n" not in str(caught.value)


def test_fractions_are_not_read_as_percent(tmp_path: Path) -> None:
    with pytest.raises(ScalingError, match="omit --percent"):
        read(tmp_path, LONG + GOOD, percent=True)
    with pytest.raises(ScalingError, match=r"row 2: .*101 is no percentage"):
        read(tmp_path, LONG + GOOD.replace("0.5", "101"), percent=True)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "points.csv"
    file.write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(ScalingError, match="not UTF-8"):
        read_points(file)


def test_two_computes_make_no_law(tmp_path: Path) -> None:
    rows = GOOD + GOOD.replace("a,", "b,", 1) + GOOD.replace("a,", "c,", 1).replace("1e9", "2e9")
    points = read(tmp_path, LONG + rows)
    message = "zero-shot/in/acc1, group g: 2 distinct computes (a, b, c); a law needs three"
    with pytest.raises(ScalingError, match=re.escape(message)):
        fit_points(points, Settings())
    near = "".join(GOOD.replace("a,", f"{x},", 1).replace("1e9", f"1.00{x}e9") for x in (0, 1, 2))
    with pytest.raises(ScalingError, match="1 distinct computes"):
        fit_points(read(tmp_path, LONG + near), Settings())


def test_data_are_told_apart_by_their_size_alone(tmp_path: Path) -> None:
    header = "model,data_size,samples_seen,in\n"
    points = read(tmp_path, header + "ViT-B-32,10,1e9,0.5\nViT-B-32,20,1e9,0.6\n")
    assert [p.data for p in points] == ["10", "20"]


def test_standard_input_may_begin_with_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '\ufeff"model",samples_seen,in\nViT-B-32,1e9,0.5\n'.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    assert read_points("-")[0].model == "ViT-B-32"
