"""An SQL expression chooses what the same thing in Python would; and can do nothing else."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clip_data import DataError, verify
from clip_data.filter import filter_shards
from upath import UPath

from .conftest import contents
from .handmade import members, row, write_shards

ROWS = (30, 12, 25)

Record = dict[str, Any]


def number(value: Any) -> float:
    """As SQL compares: what is NULL is neither less nor more."""
    return math.nan if value in (None, "") else float(value)


CASES: dict[str, Callable[[Record], bool]] = {
    "similarity > 0.3": lambda r: number(r["similarity"]) > 0.3,
    "NOT similarity > 0.3": lambda r: number(r["similarity"]) <= 0.3,
    "similarity IS NULL": lambda r: math.isnan(r["similarity"]),
    "score > 3": lambda r: number(r["score"]) > 3,  # texts: "10.0" is more than "3"
    "score = 7.5": lambda r: number(r["score"]) == 7.5,
    "min(width, height) >= 200": lambda r: min(r["width"], r["height"]) >= 200,
    "1.0 * max(width, height) / min(width, height) < 1.5": lambda r: (
        max(r["width"], r["height"]) / min(r["width"], r["height"]) < 1.5
    ),
    "NSFW = 'UNLIKELY' AND watermarked = 0": lambda r: (
        r["NSFW"] == "UNLIKELY" and not r["watermarked"]
    ),
    "NSFW IS NOT 'UNLIKELY'": lambda r: r["NSFW"] != "UNLIKELY",
    "NSFW IN ('UNSURE', 'NSFW')": lambda r: r["NSFW"] in ("UNSURE", "NSFW"),
    "NSFW = 'it''s'": lambda r: r["NSFW"] == "it's",
    "watermarked": lambda r: r["watermarked"],
    "length(caption) > 9 AND caption LIKE 'PICTURE %'": lambda r: (
        len(r["caption"] or "") > 9 and r["caption"].startswith("picture ")
    ),
    "caption GLOB '*1'": lambda r: (r["caption"] or "").endswith("1"),
    "key LIKE '00001%'": lambda r: r["key"].startswith("00001"),
    "json_array_length(tags) = 2": lambda r: len(r["tags"]) == 2,
    "tags ->> 0 = 'a'": lambda r: r["tags"][:1] == ["a"],
    '"similarity" < .1 OR [width] < 150 OR `height` < 150': lambda r: (
        number(r["similarity"]) < 0.1 or r["width"] < 150 or r["height"] < 150
    ),
    "WIDTH_2 BETWEEN 5 AND 12": lambda r: 5 <= r["WIDTH"] <= 12,
    "width > 300 -- a note": lambda r: r["width"] > 300,
    '1 /* all: " */': lambda r: True,
}


@pytest.mark.parametrize("kind", ["ours", "img2dataset"])
def test_as_python_would(tmp_path: Path, kind: str) -> None:
    source = write_shards(tmp_path / "in", ROWS, kind)
    whole = members(source)
    rows = [row(shard, n) for shard, count in enumerate(ROWS) for n in range(count)]
    for case, (where, oracle) in enumerate(CASES.items()):
        out = UPath(tmp_path / str(case))
        selected = filter_shards(source, out, where=where)
        expected = [r["key"] for r in rows if r["key"] in whole and oracle(r)]
        assert expected, where
        assert members(out) == {key: whole[key] for key in expected}, where
        assert (selected.samples, selected.dropped) == (len(expected), len(whole) - len(expected))
        assert verify(out).faults == {}
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["arguments"] == {"command": "filter", "where": where}


def test_shards_of_which_all_or_nothing_stays(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "in", ROWS), tmp_path / "out"
    selected = filter_shards(source, UPath(out), where="WIDTH_2 < 105")
    assert (selected.shards, selected.linked, selected.rewritten) == (2, 1, 1)
    assert (out / "00000.tar").samefile(source / "00000.tar")
    assert not (out / "00002.tar").exists()
    table = pq.read_table(out / "00001.parquet")
    assert table.schema.equals(pq.read_schema(source / "00001.parquet"), check_metadata=True)
    assert table["WIDTH"].to_pylist() == [100, 101, 102, 103, 104]
    with pytest.raises(DataError, match="no sample stays"):
        filter_shards(source, UPath(tmp_path / "none"), where="width < 0")
    assert not (tmp_path / "none").exists()


def test_continues_and_then_does_nothing(tmp_path: Path) -> None:
    source, out = write_shards(tmp_path / "in", ROWS), tmp_path / "out"
    selected = filter_shards(source, UPath(out), where="similarity > 0.2")
    whole = contents(out)
    (out / "manifest.json").rename(out / "manifest.json.partial")
    (out / "00001.parquet").unlink()
    (out / "00002.tar").rename(out / "00002.tar.partial")
    assert filter_shards(source, UPath(out), where="similarity > 0.2") == selected
    assert contents(out) == whole
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert filter_shards(source, UPath(out), where="similarity > 0.2") == selected
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(DataError, match="of another source, or of another command"):
        filter_shards(source, UPath(out), where="similarity > 0.3")
    assert contents(out) == whole


def test_other_file_systems(tmp_path: Path) -> None:
    source, out = UPath("memory://filter-in"), UPath("memory://filter-out")
    write_shards(source, ROWS, "img2dataset")
    local = write_shards(tmp_path / "in", ROWS, "img2dataset")
    selected = filter_shards(source, out, where="width > 200")
    assert replace(selected, output="") == replace(
        filter_shards(local, UPath(tmp_path / "out"), where="width > 200"), output=""
    )
    for name, data in contents(tmp_path / "out").items():
        assert name == "manifest.json" or (out / name).read_bytes() == data


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "syntax error"),
        ("width >", "syntax error"),
        ("widht > 5", "no such column: widht; .* the columns url, key, status, caption, width,"),
        ('NSFW = "UNLIKELY"', "no such column: UNLIKELY"),  # SQLite would take it for a text
        ('NSFW = "a""b`c"', 'no such column: a"b`c'),
        ("1); DROP TABLE samples; --", "one statement at a time"),
        ("1; DROP TABLE samples", "syntax error"),
        ("load_extension('x')", "not authorized to use function: load_extension"),
        ("randomblob(1e9)", "not authorized to use function: randomblob"),
        ("zeroblob(1e9)", "not authorized to use function: zeroblob"),
        ("printf('%1000000000d', 1)", "not authorized to use function: printf"),
        ("replace(" * 8 + "'x'" + f", 'x', '{16 * 'x'}')" * 8, "too big"),
        ("random() > 0", "not authorized to use function: random"),
        ("url < CURRENT_TIMESTAMP", "not authorized to use function: current_timestamp"),
        ("readfile('/etc/passwd') = 1", "no such function: readfile"),
        ("(SELECT 1 FROM sqlite_master)", "not authorized"),
        ("width > (SELECT avg(width) FROM samples)", "not authorized"),
        ("EXISTS (SELECT 1)", "not authorized"),
        ("1) UNION SELECT key FROM samples WHERE (1", "not authorized"),
        (
            "1 IN (WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT x FROM n)",
            "not authorized",
        ),
        ("ATTACH DATABASE 'x.db' AS x", "syntax error"),
        ("1) AND (ATTACH 'x.db' AS x", "syntax error"),
        ("PRAGMA writable_schema = 1", "syntax error"),
        ("1 IN pragma_table_list", "not authorized"),
        ("sum(width) > 1", "not authorized to use function: sum"),
        ("width = ?", "Incorrect number of bindings"),
        ("width = '\0'", "null character"),
        ("NSFW = '\udcff'", "surrogates not allowed"),
        ("(" * 200_000 + "1" + ")" * 200_000, "overflow|depth"),
    ],
)
def test_mischief_and_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_shards(tmp_path / "in", (5,))
    before = contents(tmp_path)
    with pytest.raises(DataError, match=rf"(?is)00000\.parquet: .*{message}"):
        filter_shards(source, UPath(tmp_path / "out"), where=where)
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_shards_that_lack_something(tmp_path: Path) -> None:
    out = UPath(tmp_path / "out")
    with pytest.raises(DataError, match=r"00000\.parquet: expected the columns of 00000\.tar"):
        filter_shards(write_shards(tmp_path / "plain", ROWS, "plain"), out, where="1")
    source = write_shards(tmp_path / "in", ROWS)
    table = pq.read_table(source / "00001.parquet")
    pq.write_table(table.drop_columns(["similarity"]), source / "00001.parquet")
    with pytest.raises(DataError, match=r"00001\.parquet: .*no such column: similarity"):
        filter_shards(source, out, where="similarity > 0.3")
    pq.write_table(table.drop_columns(["key"]), source / "00000.parquet")
    with pytest.raises(DataError, match=r"00000\.parquet: expected the columns"):
        filter_shards(source, UPath(tmp_path / "other"), where="1")


def test_rows_that_are_not_of_the_tar(tmp_path: Path) -> None:
    """A key with two rows stays if one does; a row without a sample and one of no key are none."""
    source = write_shards(tmp_path / "in", (20,), "img2dataset")
    table = pq.read_table(source / "00000.parquet")
    twice = [{**row(0, 2), "width": 1000}, {**row(0, 3), "key": "elsewhere", "width": 1000}]
    more = pa.Table.from_pylist([*twice, {"width": 1000}], table.schema)
    pq.write_table(pa.concat_tables([table, more]), source / "00000.parquet")
    filter_shards(source, UPath(tmp_path / "out"), where="width = 1000")
    assert list(members(tmp_path / "out")) == [row(0, 2)["key"]]
    widths = pq.read_table(tmp_path / "out/00000.parquet")["width"].to_pylist()
    assert widths == [row(0, 2)["width"], 1000]


def test_values_of_every_kind(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", (1,), "plain")
    columns = {
        "key": pa.array([row(0, 0)["key"]]),
        "big": pa.array([2**64 - 1], pa.uint64()),
        "day": pa.array([0], pa.date32()),
        "at": pa.array([0], pa.timestamp("us")),
        "price": pa.array([None], pa.decimal128(5, 2)),
        "about": pa.array([{"a": [1, None]}]),
        "raw": pa.array([b"\0x"]),
        'a "name"': pa.array([5]),
        "flag": pa.array([True]),
        "CAPTION": pa.array(["007"]),
        "code": pa.array(["007"]),
    }
    pq.write_table(pa.table(columns), source / "00000.parquet")
    where = (
        "big > 1.8e19 AND day = '1970-01-01' AND at >= '1970' AND price IS NULL AND flag = 1 "
        'AND about -> \'a\' ->> 0 = 1 AND length(raw) = 2 AND "a ""name""" = 5 '
        "AND caption LIKE '00%' AND code = 7"
    )
    assert filter_shards(source, UPath(tmp_path / "out"), where=where).samples == 1
