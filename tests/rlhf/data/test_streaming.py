"""Rows that are read when they are needed."""

import itertools
import random

import pytest

from rlhf import data
from rlhf.data import sources
from rlhf.data.streaming import shuffled, stream_identity, stream_rows
from tests.tiny import write_jsonl


def shards(folder, count=3, rows=10):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        texts = [{"text": f"{shard} {row}"} for row in range(rows)]
        write_jsonl(folder / f"train-{shard}-of-{count}.jsonl", texts)
    return str(folder)


def texts(name, **options):
    return [row["text"] for row in stream_rows(name, "text", **options)]


def test_a_stream_gives_the_rows_of_load_rows(tmp_path):
    name = shards(tmp_path)
    assert list(stream_rows(name, "text")) == data.load_rows(name, "text")
    write_jsonl(tmp_path / "chat.jsonl", [{"instruction": "a", "input": "", "output": "b"}] * 3)
    rows = list(stream_rows(str(tmp_path / "chat.jsonl"), "sft"))
    assert rows == data.load_rows(tmp_path / "chat.jsonl", "sft") and len(rows) == 3


def test_no_more_is_read_than_is_asked_for(tmp_path, monkeypatch):
    """Of the shards the first, and of that as much as the 50 rows that tell the format, in chunks."""
    opened = []
    for ending, reader in sources.FORMATS.items():
        watched = lambda path, split, reader=reader: opened.append(path.name) or reader(path, split)  # noqa: E731
        monkeypatch.setitem(sources.FORMATS, ending, watched)
    name = shards(tmp_path, count=9, rows=60)
    (tmp_path / "train-8-of-9.jsonl").write_text("this is reached by nobody")
    rows = stream_rows(name, "text")
    assert [next(rows)["text"] for _ in range(60)][-1] == "0 59" and opened == ["train-0-of-9.jsonl"]
    assert next(rows)["text"] == "1 0" and opened == ["train-0-of-9.jsonl", "train-1-of-9.jsonl"]


def test_a_bad_row_is_an_error_when_it_is_reached(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [*({"text": "a"} for _ in range(100)), "{", {"text": ""}, {"text": "b"}])
    rows = stream_rows(path, "text")
    for _ in range(100):
        next(rows)
    with pytest.raises(data.DataError, match=rf"^{path}:101: is not JSON"):
        next(rows)
    assert texts(path, bad_rows="skip") == [*"a" * 100, "b"]
    assert caplog.messages[0].startswith(f"left out {path}:101: is not JSON") and f"{path}:102" in caplog.messages[1]


def test_what_is_not_there_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for name, reason in (("empty.jsonl", "holds no rows"), ("none.jsonl", "no such file"), ("none*", "no file has")):
        with pytest.raises(data.DataError, match=reason):
            next(stream_rows(str(tmp_path / name), "text"))


def test_several_sets_in_a_stream(tmp_path):
    """With shares: at every point the counts are within one row of them, until a set ends."""
    first, second = (
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{row}"} for row in range(count)])
        for name, count in (("a", 100), ("b", 12))
    )
    assert texts(f"{second},{first}")[:14] == [*(f"b{row}" for row in range(12)), "a0", "a1"]
    found = texts(f"{first}:0.75,{second}:0.25")
    assert [text for text in found if text[0] == "b"] == [f"b{row}" for row in range(12)]
    assert [text for text in found if text[0] == "a"] == [f"a{row}" for row in range(found.count("b11") * 36 + 3)]
    for length in range(1, len(found)):
        assert abs(sum(text[0] == "a" for text in found[:length]) - 0.75 * length) <= 1


def test_the_shuffle_depends_on_the_seed_alone_and_holds_so_many_rows():
    rows = list(range(1000))
    first, again, other = (list(shuffled(iter(rows), 100, random.Random(seed))) for seed in (1, 1, 2))
    assert first == again != other and sorted(first) == sorted(other) == rows
    assert sum(x > y for x, y in itertools.pairwise(first)) > 300
    source = iter(rows)
    for given, _ in enumerate(shuffled(source, 100, random.Random(1)), start=1):
        assert source.__length_hint__() == max(1000 - 100 - given, 0)
    assert list(shuffled(iter(rows), 1, random.Random(1)))[:-1] == rows[:-1]


def test_the_identity_of_a_stream_is_of_its_content(tmp_path):
    first = stream_identity(shards(tmp_path / "a"))
    assert first == stream_identity(shards(tmp_path / "b")) and len(first) == 3
    assert first != stream_identity(shards(tmp_path / "c", rows=9))
    weighted = [stream_identity(f"{tmp_path}/a:{share},{tmp_path}/b:1") for share in (1, 2)]
    assert weighted[0] != weighted[1]
