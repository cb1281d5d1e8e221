"""Reading rows and making ids: every bad line is named, and all stages see the same ids."""

import json

import pytest

from rlhf import data
from tests.tiny import write_jsonl


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.jsonl", b"", "rows.jsonl:1: holds no rows"),
        ("rows.jsonl", b"\n\n", "rows.jsonl:1: holds no rows"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "rows.jsonl:2: is not UTF-8"),
        ("rows.json", b'[{"text": "a"},\n{]', "rows.json:2: is not JSON"),
        ("rows.json", b"[]", "rows.json:1: holds no rows"),
        ("rows.xml", b"<text>a</text>", "comes as .jsonl"),
    ],
)
def test_bad_file(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.DataError, match=reason.replace(".", r"\.")):
        data.load_rows(tmp_path / name, "text")


def test_missing_file_and_folder_without_the_split(tmp_path):
    with pytest.raises(data.DataError, match="no such file"):
        data.load_rows(tmp_path / "missing.jsonl", "sft")
    with pytest.raises(data.DataError, match="holds no rows of the split 'train'; it is empty"):
        data.load_rows(tmp_path, "sft")
    with pytest.raises(ValueError, match="kind: got 'sftt'"):
        data.load_rows(tmp_path, "sftt")


def test_plain_text_needs_the_kind_text(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(data.DataError, match="sft data comes as"):
        data.load_rows(tmp_path / "a.txt", "sft")


def test_file_forms_agree(tmp_path):
    rows = [{"text": "a b"}, {"text": "c"}]
    write_jsonl(tmp_path / "train.jsonl", ["", json.dumps(rows[0]), "", json.dumps(rows[1])])
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    (tmp_path / "rows.txt").write_text("a b\n<|endoftext|>\n\nc\n", encoding="utf-8")
    (tmp_path / "blank.txt").write_text("a b\n\nc\n", encoding="utf-8")
    for name in ("train.jsonl", "rows.json", "rows.txt", "blank.txt", "."):
        assert [row["text"] for row in data.load_rows(tmp_path / name, "text")] == ["a b", "c"]
    assert [row["at"] for row in data.load_rows(tmp_path / "rows.txt", "text")] == [
        f"{tmp_path}/rows.txt:1",
        f"{tmp_path}/rows.txt:4",
    ]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the optional package pyarrow")
    import pyarrow

    rows = [
        {"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    columns = {name: [row.get(name) for row in rows] for name in {**rows[0], **rows[1]}}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    assert [row["ranks"] for row in data.load_rows(tmp_path / "rows.parquet", "ranked")] == [[0, 1], [0, 1]]
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(data.DataError, match="is not a whole parquet file"):
        data.load_rows(tmp_path / "bad.parquet", "ranked")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_plain_text(tmp_path, end):
    (tmp_path / "t.txt").write_bytes(end.join(["one", "", "two", "lines", "", "three"]).encode())
    rows = data.load_rows(tmp_path / "t.txt", "text")
    assert [row["text"] for row in rows] == ["one", "two\nlines", "three"]
    assert [row["at"].rpartition(":")[2] for row in rows] == ["1", "3", "6"]


def test_real_data_loads(shared_data):
    rankings = data.load_rows(shared_data / "rankings.jsonl", "ranked")
    assert len(rankings) == 562 and {len(row["ranks"]) for row in rankings} >= {2, 4, 9}
    assert len(data.load_rows(shared_data / "demonstrations.jsonl", "sft")) == 779
    assert len(data.load_rows(shared_data / "tinystories_sample.txt", "text")) > 2000
